"""The training state and the two compiled functions: train_step and eval_step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btlm_jax.model import Btlm, init_params
from btlm_jax.model.loss import loss_sum, token_losses
from btlm_jax.recipe.mup import CLASSES


@flax.struct.dataclass
class TrainState:
    """The state that a step updates: the number of steps taken, float32 parameters, and the optimizer's state."""

    step: jax.Array
    params: Any  # a tree of dicts
    opt_state: optax.OptState


def init_state(model: Btlm, optimizer: optax.GradientTransformation, mesh: Mesh, *, seed: int) -> TrainState:
    """Initialize the state of step 0, sharded over the mesh."""
    return make_state(init_params(model, mesh, seed=seed), optimizer, mesh)


def make_state(params: dict, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Make the state of step 0 with these parameters, which are on the mesh."""
    with jax.set_mesh(mesh):
        return jax.jit(lambda params: _new_state(params, optimizer))(params)


def abstract_state(table: dict, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return the shapes, dtypes and shardings of the state; nothing is computed. `table` is a tree of ParameterInfo."""
    params = jax.tree.map(lambda info: info.abstract, table)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda params: _new_state(params, optimizer), params)
    replicated = NamedSharding(mesh, PartitionSpec())

    def with_sharding(leaf):
        spec = getattr(leaf.sharding, "spec", None)
        sharding = NamedSharding(mesh, spec) if spec else replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(with_sharding, state)


def abstract_batch(shape: tuple[int, ...], sharding: NamedSharding, *, document_mask: bool) -> dict:
    """Return the shapes, dtypes and shardings of a batch whose leaves have `shape`."""
    dtypes = {"inputs_BT": jnp.int32, "targets_BT": jnp.int32, "weights_BT": jnp.float32}
    if document_mask:
        dtypes["starts_BT"] = jnp.int32
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}


def make_train_step(
    model: Btlm, optimizer: optax.GradientTransformationExtraArgs, table: dict, *, loss_chunk: int
) -> Callable:
    """Make train_step(state, batch, learning_rate) -> (state, metrics), not yet jitted.

    batch: {"inputs_BT", "targets_BT": int32, "weights_BT": float32}, leaves [A, B/A, T]; with "starts_BT", int32, no
    position sees another document's (see attention's `attend`). Gradients are summed over the A micro-batches and
    divided by the sum of all weights, so that every token counts the same. A batch without a weight leaves parameters
    and optimizer as they are; only the count of steps goes on, and with it the schedule and the data.
    metrics: loss (nats a token; 0 of no targets), weight (targets counted), grad_norm (before clipping), and for every
    class of mup.py grad_norm/<class> and update_norm/<class>; float32 scalars left on the device. Frozen parameters of
    `table` have a gradient of zero, which is not computed, and stay as they are to the bit.
    """
    is_frozen = jax.tree.map(lambda info: info.rule.is_frozen, table)

    def micro_loss(params, micro):
        params = jax.tree.map(lambda p, frozen: jax.lax.stop_gradient(p) if frozen else p, params, is_frozen)
        return loss_sum(
            _hidden(model, params, micro),
            params["embedding"]["embedding"],
            micro["targets_BT"],
            micro["weights_BT"],
            output_scale=model.parametrization.output_scale,
            chunk=loss_chunk,
            rules=model.rules,
        )

    def train_step(state: TrainState, batch: dict, learning_rate) -> tuple[TrainState, dict]:
        def accumulate(carry, micro):
            loss, grads = jax.value_and_grad(micro_loss)(state.params, micro)
            return jax.tree.map(jnp.add, carry, (loss, grads)), None

        if batch["inputs_BT"].shape[0] == 1:
            loss, grads = jax.value_and_grad(micro_loss)(state.params, jax.tree.map(lambda x: x[0], batch))
        else:
            zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params))
            (loss, grads), _ = jax.lax.scan(accumulate, zeros, batch)
        weight = batch["weights_BT"].sum()
        has_targets = weight > 0
        divisor = jnp.where(has_targets, weight, 1)
        grads = jax.tree.map(lambda g: g / divisor, grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, learning_rate=learning_rate)
            # Adam moves on its moments, and weights decay, without a gradient too.
            updates = jax.tree.map(lambda u: jnp.where(has_targets, u, 0), updates)
            opt_state = jax.tree.map(lambda new, old: jnp.where(has_targets, new, old), opt_state, state.opt_state)
        metrics = {
            "loss": loss / divisor,
            "weight": weight,
            "grad_norm": optax.tree.norm(grads),
            **_class_norms("grad_norm", grads, table),
            **_class_norms("update_norm", updates, table),
        }
        params = optax.apply_updates(state.params, updates)
        params = jax.tree.map(lambda new, old, frozen: old if frozen else new, params, state.params, is_frozen)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def make_eval_step(model: Btlm, *, loss_chunk: int) -> Callable:
    """Make eval_step(params, batch) -> sums of the weighted losses, replicated: loss_B, weight_B, loss_T, weight_T.

    T is the position in the window, or in the document as far as it is in the window where batch has "starts_BT".
    """

    def eval_step(params: dict, batch: dict) -> dict:
        losses_BT = token_losses(
            _hidden(model, params, batch),
            params["embedding"]["embedding"],
            batch["targets_BT"],
            output_scale=model.parametrization.output_scale,
            chunk=loss_chunk,
            rules=model.rules,
        )
        losses_BT, weights_BT = _replicated(losses_BT), _replicated(batch["weights_BT"])
        losses_BT = losses_BT * weights_BT
        return {
            "loss_B": losses_BT.sum(1),
            "weight_B": weights_BT.sum(1),
            "loss_T": _sum_by_position(losses_BT, batch),
            "weight_T": _sum_by_position(weights_BT, batch),
        }

    return eval_step


def _hidden(model: Btlm, params: dict, batch: dict) -> jax.Array:
    """Return the network's output, hidden_BTD."""
    hidden_BTD = model.apply({"params": params}, batch["inputs_BT"], batch.get("starts_BT"))
    return cast(jax.Array, hidden_BTD)  # a tuple only with mutable collections


def _sum_by_position(x_BT: jax.Array, batch: dict) -> jax.Array:
    if "starts_BT" not in batch:
        return x_BT.sum(0)
    position_BT = jnp.arange(x_BT.shape[1])[None] - _replicated(batch["starts_BT"])
    return jnp.zeros(x_BT.shape[1:], x_BT.dtype).at[position_BT].add(x_BT)


def _new_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


def _replicated(x_BT):
    return jax.sharding.reshard(x_BT, PartitionSpec(None, None))


def _class_norms(name: str, tree: optax.Updates, table: dict) -> dict:
    """Return the norm of each class: the root of the sum of squares over all its parameters."""
    squares: dict[str, list[jax.Array]] = {parameter_class: [] for parameter_class in CLASSES}
    for leaf, info in zip(jax.tree.leaves(tree), jax.tree.leaves(table), strict=True):
        squares[info.rule.parameter_class].append(jnp.square(leaf).sum())
    return {f"{name}/{parameter_class}": jnp.sqrt(sum(parts)) for parameter_class, parts in squares.items()}
