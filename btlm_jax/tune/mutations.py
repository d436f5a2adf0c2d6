"""Parametrizations for the coordinate check: the right ones, and deliberately broken ones that it must catch.

A mutation changes the numbers that recipe/mup.py returns, not the code that uses them. m is the width multiplier.
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
    preset: str
    forward: ForwardChange
    rule: RuleChange
    wide_heads: bool  # width by larger heads, queries starting at zero; otherwise by more heads
    is_flat: bool  # expected: statistics do not depend on the width


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


def broken_rule(name: str, rule: RuleChange) -> Case:
    """Make a case of preset btlm whose initialization or learning rates are wrong."""
    return Case(name=name, preset="btlm", forward=same_forward, rule=rule, wide_heads=False, is_flat=False)


def broken_forward(name: str, forward: ForwardChange, *, wide_heads: bool) -> Case:
    """Make a case of preset btlm whose forward multipliers are wrong."""
    return Case(name=name, preset="btlm", forward=forward, rule=same_rule, wide_heads=wide_heads, is_flat=False)


BTLM = correct("btlm", preset="btlm", wide_heads=False)
BTLM_WIDE_HEADS = correct("btlm, wide heads", preset="btlm", wide_heads=True)
COMPLETEP = correct("completep", preset="completep", wide_heads=False)
SP = dataclasses.replace(correct("sp", preset="sp", wide_heads=False), is_flat=False)
NO_HIDDEN_LEARNING_RATE = broken_rule("hidden LR unscaled", learning_rate_power(HIDDEN_CLASSES, 0.0))
NO_HIDDEN_INIT = broken_rule("hidden init unscaled", init_times_root_width(HIDDEN_CLASSES, 1))
NO_OUTPUT_SCALE = broken_forward("logits unscaled", output_times_width_power(1.0), wide_heads=False)
CASES = (
    BTLM,
    COMPLETEP,
    SP,
    NO_HIDDEN_LEARNING_RATE,
    broken_rule("hidden LR / sqrt(m)", learning_rate_power(HIDDEN_CLASSES, 0.5)),
    *(broken_rule(f"{name} LR unscaled", learning_rate_power((name,), 0.0)) for name in HIDDEN_CLASSES),
    NO_HIDDEN_INIT,
    NO_OUTPUT_SCALE,
    broken_forward("logits / sqrt(m)", output_times_width_power(0.5), wide_heads=False),
    broken_rule("embedding LR / m", learning_rate_over_width(("embedding",))),
    broken_rule("embedding init / sqrt(m)", init_times_root_width(("embedding",), -1)),
    BTLM_WIDE_HEADS,
    broken_forward("attention / sqrt(d)", attention_over_root_head_dim, wide_heads=True),
)
