"""Muon for the hidden matrices, Adam for the rest: runs with optimizer.hidden_optimizer="muon" alone load this file.

Of a matrix that maps n inputs to k outputs, with the clipped gradient g; query, key and value are three matrices:

    m <- 0.95 m + 0.05 g                     momentum
    x <- 0.95 m + 0.05 g                     Nesterov's; / its Frobenius norm
    x <- a x + (b A + c A^2) x, A = x x^T    five times: Newton-Schulz, a, b, c = 3.4445, -4.775, 2.0315
    u <- sqrt(max(1, k / n)) x

Sources: https://kellerjordan.github.io/posts/muon, whose shape factor is that of optax.contrib.muon too. u has the same
spectral norm at every width, so the learning rate, muon_learning_rate at the peak, has no 1/m; decay follows that rate.

Momentum is split over devices as parameters are. For the products each device gets whole matrices, of other layers than
the other devices: its bytes change hands twice a step, in and out. With more devices than layers some have none.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from btlm_jax.recipe.config import TrainConfig
from btlm_jax.recipe.mup import HIDDEN_CLASSES

MOMENTUM, STEPS, COEFFICIENTS = 0.95, 5, (3.4445, -4.775, 2.0315)


class MuonState(NamedTuple):
    """The momentum of the hidden matrices."""

    momentum: optax.Updates


def with_muon_rates(table: dict, config: TrainConfig) -> dict:
    """Return a tree of ParameterInfo in which the rules of hidden matrices that learn have Muon's rate."""
    rate = config.optimizer.muon_learning_rate / config.optimizer.peak_learning_rate
    decay = 1 / rate if config.is_decay_independent else 1.0

    def ruled(info):
        if info.rule.parameter_class not in HIDDEN_CLASSES or info.rule.is_frozen:
            return info
        rule = dataclasses.replace(info.rule, learning_rate=rate, weight_decay=decay, eps=1.0)
        return dataclasses.replace(info, rule=rule)

    return jax.tree.map(ruled, table)


def with_muon(adam: optax.GradientTransformation, table: dict) -> optax.GradientTransformationExtraArgs:
    """Make Muon of the hidden matrices of a tree of ParameterInfo and `adam` of the rest; frozen ones have neither."""
    is_hidden = jax.tree.map(lambda info: info.rule.parameter_class in HIDDEN_CLASSES, table)
    is_trained = jax.tree.map(lambda info: not info.rule.is_frozen, table)
    has_adam = jax.tree.map(lambda hidden, trained: trained and not hidden, is_hidden, is_trained)
    has_muon = jax.tree.map(lambda hidden, trained: trained and hidden, is_hidden, is_trained)
    masked = jax.tree.map(lambda info, has: info if has else optax.MaskedNode(), table, has_muon)
    return optax.chain(optax.masked(adam, has_adam), optax.masked(_scale_by_muon(masked), has_muon))


def exchanged_bytes(table: dict) -> int:
    """Return the bytes of momentum that change hands twice a step, of all devices together."""
    infos = [info for info in jax.tree.leaves(table) if info.rule.parameter_class in HIDDEN_CLASSES]
    return sum(4 * math.prod(info.shape) for info in infos if not info.rule.is_frozen)


def _scale_by_muon(table: dict) -> optax.GradientTransformation:
    def init(params):
        return MuonState(momentum=jax.tree.map(jnp.zeros_like, params))

    def update(updates, state: MuonState, params=None):
        del params
        momentum = jax.tree.map(lambda m, g: MOMENTUM * m + (1 - MOMENTUM) * g, state.momentum, updates)
        nesterov = jax.tree.map(lambda m, g: MOMENTUM * m + (1 - MOMENTUM) * g, momentum, updates)
        return jax.tree.map(_orthogonalised, nesterov, table), MuonState(momentum=momentum)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType] # as optimizer.py's


def _orthogonalised(x: jax.Array, info) -> jax.Array:
    """Return the update of a stack of matrices [layers, inputs..., outputs...]."""
    num_in = 2 if info.axes[1] == "heads" else 1  # axes of the inputs
    n, k = math.prod(x.shape[1 : 1 + num_in]), math.prod(x.shape[1 + num_in :])
    mesh, layers = info.sharding.mesh, x.shape[0]
    padding = [(0, -layers % mesh.size)] + [(0, 0)] * (x.ndim - 1)
    whole = jax.sharding.reshard(jnp.pad(x, padding), PartitionSpec(mesh.axis_names))
    y_LIO = _newton_schulz(whole.reshape(-1, n, k)) * math.sqrt(max(1, k / n))
    return jax.sharding.reshard(y_LIO.reshape(whole.shape), info.sharding.spec)[:layers]


def _newton_schulz(x_LIO: jax.Array) -> jax.Array:
    """Bring the singular values of each matrix near 1, in products of the smaller side."""
    x_LIO = x_LIO / (jnp.sqrt(jnp.square(x_LIO).sum((1, 2), keepdims=True)) + 1e-12)
    is_tall = x_LIO.shape[1] > x_LIO.shape[2]
    x = jnp.swapaxes(x_LIO, 1, 2) if is_tall else x_LIO
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        A = jnp.einsum("Lij,Lkj->Lik", x, x)
        x = a * x + jnp.einsum("Lij,Ljk->Lik", b * A + c * jnp.einsum("Lij,Ljk->Lik", A, A), x)
    return jnp.swapaxes(x, 1, 2) if is_tall else x
