"""The training state and the compiled function that updates it, train_step; which updates are not made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btlm_jax.model import Btlm, init_params
from btlm_jax.model.loss import loss_sum
from btlm_jax.recipe.config import UpdateRule
from btlm_jax.recipe.mup import CLASSES

WINDOW = 64  # steps whose numbers the next one's are compared with


@flax.struct.dataclass
class History:
    """What a step is judged by: numbers of the last WINDOW updates made in its phase. S: see `judge`."""

    values_SW: jax.Array
    count: jax.Array  # updates made in the phase
    first_step: jax.Array  # of the phase
    skips: jax.Array  # updates in a row that were not made, up to now


class CorruptionError(Exception):
    """Devices do not have the bits that they should have after `step` steps."""

    def __init__(self, step: int, message: str):
        super().__init__(f"step {step:,}: {message}")
        self.step = step


@flax.struct.dataclass
class TrainState:
    """The state that a step updates: the number of steps, float32 parameters, the optimizer's state, the history."""

    step: jax.Array
    params: Any  # a tree of dicts
    opt_state: optax.OptState
    history: History


def init_state(model: Btlm, optimizer: optax.GradientTransformation, mesh: Mesh, *, seed: int) -> TrainState:
    """Initialize the state of step 0, sharded over the mesh."""
    return make_state(init_params(model, mesh, seed=seed), optimizer, mesh)


def make_state(params: dict, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Make the state of step 0 with these parameters, which are on the mesh."""
    with jax.set_mesh(mesh):
        return jax.jit(lambda params: new_state(params, optimizer))(params)


def abstract_state(table: dict, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return the shapes, dtypes and shardings of the state; nothing is computed. `table` is a tree of ParameterInfo."""
    params = jax.tree.map(lambda info: info.abstract, table)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda params: new_state(params, optimizer), params)
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


def judge(
    history: History, values_S: jax.Array, has_targets: jax.Array, *, step: jax.Array, rule: UpdateRule
) -> tuple[jax.Array, History]:
    """Return whether a step's update is made, and the history after it. S: loss, norms of gradients and of updates.

    It is made if there are targets, all is finite, nothing a spike, and fewer than max_skips in a row were not made. A
    spike is more than spike_score deviations above the median of the last WINDOW values; a deviation is 1.4826 times
    their median distance from it, at least a hundredth of it. There are none in the warm-up, before a phase has made
    WINDOW updates, and with a spike_score of 0.
    """

    def median(values_SW: jax.Array) -> jax.Array:
        return jnp.sort(values_SW, axis=1)[:, WINDOW // 2 - 1 : WINDOW // 2 + 1].mean(1)

    count = jnp.where(history.first_step == rule.first_step, history.count, 0)
    median_S = median(history.values_SW)
    deviation_S = jnp.maximum(1.4826 * median(jnp.abs(history.values_SW - median_S[:, None])), 0.01 * median_S)
    is_spike = (values_S > median_S + rule.spike_score * deviation_S).any() & (rule.spike_score > 0)
    is_spike &= (count >= WINDOW) & (step >= rule.watched_from)
    is_made = has_targets & jnp.isfinite(values_S).all() & ~is_spike & (history.skips < rule.max_skips)
    is_place_W = is_made & (jnp.arange(WINDOW) == count % WINDOW)
    return is_made, History(
        values_SW=jnp.where(is_place_W, values_S[:, None], history.values_SW),
        count=count + is_made,
        first_step=jnp.full_like(history.first_step, rule.first_step),
        skips=jnp.where(is_made, 0, history.skips + has_targets),
    )


def make_gradients(model: Btlm, table: dict, *, loss_chunk: int, z_loss: float = 0.0) -> Callable:
    """Make gradients(params, batch) -> (loss, weight, gradients) of `make_train_step`, not yet jitted."""
    is_frozen = jax.tree.map(lambda info: info.rule.is_frozen, table)

    def micro_loss(params, micro):
        params = jax.tree.map(lambda p, frozen: jax.lax.stop_gradient(p) if frozen else p, params, is_frozen)
        hidden_BTD = model.apply({"params": params}, micro["inputs_BT"], micro.get("starts_BT"))
        return loss_sum(
            cast(jax.Array, hidden_BTD),  # a tuple only with mutable collections
            params["embedding"]["embedding"],
            micro["targets_BT"],
            micro["weights_BT"],
            output_scale=model.parametrization.output_scale,
            chunk=loss_chunk,
            rules=model.rules,
            z_loss=z_loss,
        )

    def gradients(params: dict, batch: dict) -> tuple[jax.Array, jax.Array, dict]:
        def accumulate(carry, micro):
            loss, grads = jax.value_and_grad(micro_loss)(params, micro)
            return jax.tree.map(jnp.add, carry, (loss, grads)), None

        if batch["inputs_BT"].shape[0] == 1:
            loss, grads = jax.value_and_grad(micro_loss)(params, jax.tree.map(lambda x: x[0], batch))
        else:
            zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
            (loss, grads), _ = jax.lax.scan(accumulate, zeros, batch)
        weight = batch["weights_BT"].sum()
        divisor = jnp.where(weight > 0, weight, 1)
        return loss / divisor, weight, jax.tree.map(lambda g: g / divisor, grads)

    return gradients


def make_train_step(
    model: Btlm, optimizer: optax.GradientTransformationExtraArgs, table: dict,
    *, loss_chunk: int, rule: UpdateRule, z_loss: float = 0.0,
) -> Callable:  # fmt: skip
    """Make train_step(state, batch, learning_rate) -> (state, metrics), not yet jitted.

    batch: {"inputs_BT", "targets_BT": int32, "weights_BT": float32}, leaves [A, B/A, T]; with "starts_BT", int32, no
    position sees another document's (see attention's `attend`). Gradients are summed over the A micro-batches and
    divided by the sum of all weights, so that every token counts the same. Without a weight, or where `judge` says so,
    no update is made: parameters and optimizer stay as they are to the bit, and only the count of steps goes on.
    metrics: loss (nats a token without z_loss; 0 of no targets), weight (targets counted), grad_norm (before clipping),
    for every class of mup.py grad_norm/<class> and update_norm/<class>, also of an update that is not made, skips of
    History. Frozen parameters have a gradient of zero, which is not computed, and stay as they are. All are scalars.
    """
    is_frozen = jax.tree.map(lambda info: info.rule.is_frozen, table)
    gradients = make_gradients(model, table, loss_chunk=loss_chunk, z_loss=z_loss)

    def train_step(state: TrainState, batch: dict, learning_rate) -> tuple[TrainState, dict]:
        loss, weight, grads = gradients(state.params, batch)
        has_targets = weight > 0
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(
                grads, state.opt_state, state.params, learning_rate=learning_rate, step=state.step + 1
            )
            updates = jax.tree.map(lambda u: jnp.where(has_targets, u, 0), updates)
        metrics = {
            "loss": loss,
            "weight": weight,
            "grad_norm": optax.tree.norm(grads),
            **_class_norms("grad_norm", grads, table),
            **_class_norms("update_norm", updates, table),
        }
        values_S = jnp.stack([loss, metrics["grad_norm"], optax.tree.norm(updates)])
        is_made, history = judge(state.history, values_S, has_targets, step=state.step, rule=rule)
        opt_state = jax.tree.map(lambda new, old: jnp.where(is_made, new, old), opt_state, state.opt_state)
        params = jax.tree.map(
            lambda old, u, frozen: old if frozen else jnp.where(is_made, old + u, old), state.params, updates, is_frozen
        )
        after = TrainState(step=state.step + 1, params=params, opt_state=opt_state, history=history)
        return after, metrics | {"skips": history.skips}

    return train_step


def new_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state of step 0 with these parameters."""
    zero = jnp.zeros((), jnp.int32)
    history = History(values_SW=jnp.zeros((3, WINDOW)), count=zero, first_step=zero, skips=zero)
    return TrainState(step=zero, params=params, opt_state=optimizer.init(params), history=history)


def _class_norms(name: str, tree: optax.Updates, table: dict) -> dict:
    """Return the norm of each class: the root of the sum of squares over all its parameters."""
    squares: dict[str, list[jax.Array]] = {parameter_class: [] for parameter_class in CLASSES}
    for leaf, info in zip(jax.tree.leaves(tree), jax.tree.leaves(table), strict=True):
        squares[info.rule.parameter_class].append(jnp.square(leaf).sum())
    return {f"{name}/{parameter_class}": jnp.sqrt(sum(parts)) for parameter_class, parts in squares.items()}
