"""The optimizer's first update of every class, and the forward multipliers, against their closed forms in float64.

No model, no compilation:

    u = g / (|g| + eps eps_c) + weight_decay decay_c p,    p <- p - learning_rate rate_c u

Adam's bias-corrected moments of one gradient g are g and g^2. rate_c, decay_c and eps_c are written here once more,
from the papers' tables and not from recipe/mup.py. g is of eps's own size, where a wrong epsilon shows. So are the
forward multipliers: that of the scores shows in activations only where heads grow, and a config's heads do not.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from btlm_jax.recipe.config import TrainConfig
from btlm_jax.recipe.mup import HIDDEN_CLASSES, Parametrization
from btlm_jax.recipe.optimizer import make_optimizer

_PARAMETER, _RATE = 0.5, 2.0**-7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multipliers:
    """Of a class: its learning rate, decay and epsilon are the config's times these."""

    rate: float
    decay: float
    eps: float


def expected_multipliers(config: TrainConfig, parameter_class: str, *, is_in_block: bool) -> Multipliers:
    """Return what the config's preset says of a class: arXiv 2304.03208 and BTLM's published configs, 2505.01618."""
    model, mup = config.model, config.mup
    m = 1.0 if mup.preset == "sp" else model.d_model / mup.base_d_model
    m_ff = 1.0 if mup.preset == "sp" else model.d_ff / mup.base_d_ff
    own_m = m_ff if parameter_class == "mlp_out" else m
    if parameter_class == "embedding":
        return Multipliers(rate=1.0, decay=1.0, eps=1.0)
    is_hidden, is_completep = parameter_class in HIDDEN_CLASSES, mup.preset == "completep"
    convention = config.optimizer.weight_decay_convention
    is_independent = convention == "independent" or (convention == "preset" and is_completep)
    has_rate = parameter_class != "key_bias" or model.qk_norm != "none"  # without a norm its gradient is noise
    depth = model.num_layers / mup.base_num_layers
    return Multipliers(
        rate=1 / own_m if is_hidden else float(has_rate),
        decay=0.0 if not is_hidden else own_m if is_independent else 1.0,
        eps=1 / (own_m * depth) if is_completep and is_in_block else 1.0,
    )


def forward_error(config: TrainConfig, parametrization: Parametrization) -> float:
    """Return the largest relative error of a forward multiplier."""
    model, mup = config.model, config.mup
    is_standard = mup.preset == "sp"
    expected = {
        "embedding_scale": mup.embedding_multiplier,
        "output_scale": mup.output_multiplier * (1.0 if is_standard else mup.base_d_model / model.d_model),
        "attention_scale": model.head_dim ** (-0.5 if is_standard else -1.0),
        "residual_scale": mup.base_num_layers / model.num_layers if mup.preset == "completep" else 1.0,
    }
    return max(abs(getattr(parametrization, name) / value - 1) for name, value in expected.items())


def optimizer_error(config: TrainConfig, table: dict) -> float:
    """Return the largest error of an update, relative to the largest part of what it should be.

    `table` is a tree of ParameterInfo, with the rules that the optimizer follows. Frozen parameters are left out, and
    hidden matrices that Muon updates.
    """
    has_muon = config.optimizer.hidden_optimizer == "muon"
    optimizer_config = dataclasses.replace(
        config.with_numbers().optimizer, clip_norm=1.0, average="none", hidden_optimizer="adamw"
    )
    infos = jax.tree.leaves(table)
    table = {info.path: info for info in infos if not (has_muon and info.rule.parameter_class in HIDDEN_CLASSES)}
    one = jax.tree.map(lambda info: np.float32(_PARAMETER), table)
    gradients = jax.tree.map(lambda info: np.float32(optimizer_config.eps), table)
    optimizer = make_optimizer(optimizer_config, table)
    updates, _ = optimizer.update(gradients, optimizer.init(one), one, learning_rate=np.float32(_RATE))
    worst = 0.0
    for info, update in zip(jax.tree.leaves(table), jax.tree.leaves(updates), strict=True):
        if info.rule.is_frozen:
            continue
        each = expected_multipliers(config, info.rule.parameter_class, is_in_block="layers" in info.axes)
        g = float(np.float32(optimizer_config.eps))
        adam = g / (g + optimizer_config.eps * each.eps)
        decay = optimizer_config.decay * each.decay * _PARAMETER
        expected = -_RATE * each.rate * (adam + decay)
        scale = _RATE * max(each.rate, 1e-6)
        worst = max(worst, abs(float(update) - expected) / scale)
    return worst
