"""Parametrizations for the coordinate check: the right ones, and deliberately broken ones that it must catch.

A mutation changes the numbers that recipe/mup.py returns, not the code that uses them. m is the width multiplier.
What moves neither activations nor the loss of a few steps is caught by the exact checks (optimizer_check.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from btlm_jax.recipe.mup import HIDDEN_CLASSES, ParameterRule, Parametrization

ForwardChange = Callable[[Parametrization], Parametrization]
RuleChange = Callable[[ParameterRule, Parametrization], ParameterRule]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A preset of recipe/mup.py, changes of its forward multipliers and of its rules, and the expected verdict."""

    name: str
    preset: str  # empty: the config's own
    forward: ForwardChange
    rule: RuleChange
    wide_heads: bool  # width by larger heads, queries starting at zero; otherwise by more heads
    is_flat: bool  # expected: statistics do not depend on the width
    is_visible: bool = True  # expected of a broken one: activations or losses show it


def same_forward(parametrization: Parametrization) -> Parametrization:
    return parametrization


def same_rule(rule: ParameterRule, parametrization: Parametrization) -> ParameterRule:
    del parametrization
    return rule


def learning_rate_power(classes: tuple[str, ...], power: float) -> RuleChange:
    """Make the learning rate of hidden classes 1/m^power instead of 1/m."""

    def change(rule: ParameterRule, parametrization: Parametrization) -> ParameterRule:
        del parametrization
        if rule.parameter_class not in classes:
            return rule
        return dataclasses.replace(rule, learning_rate=rule.learning_rate**power)

    return change


def learning_rate_over_width(classes: tuple[str, ...]) -> RuleChange:
    """Divide the learning rate of some classes by m."""

    def change(rule: ParameterRule, parametrization: Parametrization) -> ParameterRule:
        if rule.parameter_class not in classes:
            return rule
        return dataclasses.replace(rule, learning_rate=rule.learning_rate / parametrization.width)

    return change


def decay_times_width(classes: tuple[str, ...]) -> RuleChange:
    """Multiply the weight decay of some classes by m: independent of the learning rate instead of coupled to it."""

    def change(rule: ParameterRule, parametrization: Parametrization) -> ParameterRule:
        if rule.parameter_class not in classes:
            return rule
        return dataclasses.replace(rule, weight_decay=rule.weight_decay * parametrization.width)

    return change


def decay_of_vectors(rule: ParameterRule, parametrization: Parametrization) -> ParameterRule:
    """Decay biases and norms as matrices are."""
    del parametrization
    return dataclasses.replace(rule, weight_decay=1.0) if rule.parameter_class in ("bias", "norm_scale") else rule


def eps_over_width(rule: ParameterRule, parametrization: Parametrization) -> ParameterRule:
    """Divide Adam's epsilon by m."""
    return dataclasses.replace(rule, eps=rule.eps / parametrization.width)


def init_times_root_width(classes: tuple[str, ...], sign: int) -> RuleChange:
    """Multiply the init std of some classes by m^(sign/2)."""

    def change(rule: ParameterRule, parametrization: Parametrization) -> ParameterRule:
        if rule.parameter_class not in classes:
            return rule
        return dataclasses.replace(rule, init_std=rule.init_std * parametrization.width ** (sign / 2))

    return change


def output_times_width_power(power: float) -> ForwardChange:
    """Multiply the logits by m^power on top of their 1/m."""

    def change(parametrization: Parametrization) -> Parametrization:
        scale = parametrization.output_scale * parametrization.width**power
        return dataclasses.replace(parametrization, output_scale=scale)

    return change


def attention_over_root_head_dim(parametrization: Parametrization) -> Parametrization:
    """Scale the scores by 1/sqrt(head_dim) instead of 1/head_dim."""
    return dataclasses.replace(parametrization, attention_scale=math.sqrt(parametrization.attention_scale))


def correct(name: str, *, preset: str, wide_heads: bool) -> Case:
    """Make a case that must pass."""
    return Case(name=name, preset=preset, forward=same_forward, rule=same_rule, wide_heads=wide_heads, is_flat=True)


def broken_rule(name: str, rule: RuleChange, *, is_visible: bool = True) -> Case:
    """Make a case of the config's preset whose initialization, learning rates, decay or epsilon are wrong."""
    return Case(
        name=name, preset="", forward=same_forward, rule=rule, wide_heads=False, is_flat=False, is_visible=is_visible
    )


def broken_forward(name: str, forward: ForwardChange, *, wide_heads: bool) -> Case:
    """Make a case of the config's preset whose forward multipliers are wrong."""
    return Case(name=name, preset="", forward=forward, rule=same_rule, wide_heads=wide_heads, is_flat=False)


def with_own_heads(case: Case) -> Case:
    """Return a case of a config whose heads stay as wide as they are: a wrong multiplier of scores does not show."""
    return dataclasses.replace(case, wide_heads=False, is_visible=False) if case.wide_heads else case


OWN = correct("as configured", preset="", wide_heads=False)
BTLM = correct("btlm", preset="btlm", wide_heads=False)
COMPLETEP = correct("completep", preset="completep", wide_heads=False)
SP = dataclasses.replace(correct("sp", preset="sp", wide_heads=False), is_flat=False)
WIDE_HEADS = correct("wide heads", preset="", wide_heads=True)
NO_OUTPUT_SCALE = broken_forward("logits unscaled", output_times_width_power(1.0), wide_heads=False)
# Wrong ones, in this order: those that activations or losses show, and those that only the optimizer's check does.
BROKEN = (
    broken_rule("hidden LR unscaled", learning_rate_power(HIDDEN_CLASSES, 0.0)),
    broken_rule("hidden LR / sqrt(m)", learning_rate_power(HIDDEN_CLASSES, 0.5)),
    *(broken_rule(f"{name} LR unscaled", learning_rate_power((name,), 0.0)) for name in HIDDEN_CLASSES),
    broken_rule("hidden init unscaled", init_times_root_width(HIDDEN_CLASSES, 1)),
    NO_OUTPUT_SCALE,
    broken_forward("logits / sqrt(m)", output_times_width_power(0.5), wide_heads=False),
    broken_rule("embedding LR / m", learning_rate_over_width(("embedding",))),
    broken_rule("embedding init / sqrt(m)", init_times_root_width(("embedding",), -1)),
    broken_forward("attention / sqrt(d)", attention_over_root_head_dim, wide_heads=True),
    broken_rule("bias, norm LR / m", learning_rate_over_width(("bias", "norm_scale"))),
    broken_rule("hidden decay x m", decay_times_width(HIDDEN_CLASSES), is_visible=False),
    broken_rule("bias, norm decay", decay_of_vectors, is_visible=False),
    broken_rule("Adam eps / m", eps_over_width, is_visible=False),
)
CASES = (BTLM, COMPLETEP, SP, WIDE_HEADS, *BROKEN)
