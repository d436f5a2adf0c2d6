"""Next-token cross-entropy from hidden states, in chunks of positions: never do the logits of all of them exist.

Each device computes the loss of its own sequences and positions, which the tensor axis splits too, with the whole
embedding table, so the vocabulary need not divide by anything. A custom derivative rule forms the gradients of a
chunk's logits in the forward pass, while the logits exist: one pass, no recomputation, no `[tokens, V]` array.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from btlm_jax.kernels import are_for_training, cross_entropy, transpose
from btlm_jax.parallel.collectives import gather_table, scatter_table_gradient
from btlm_jax.parallel.mesh import TENSOR, AxisRules, axis_names, platform


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LossStatics:
    """The arguments of the custom derivative rule that are not arrays."""

    output_scale: float
    chunk: int
    rules: AxisRules
    z_loss: float = 0.0


def loss_sum(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    output_scale: float,
    chunk: int,
    rules: AxisRules,
    z_loss: float = 0.0,
) -> jax.Array:
    """Return the float32 scalar sum over positions of weight * negative log-likelihood of the target, in nats.

    Its gradients are those of weight * (negative log-likelihood + z_loss * log(Z)^2), Z the sum of exp(logits): PaLM's
    z-loss (arXiv 2204.02311), which is not in the value, so that losses stay comparable.
    logits = (hidden @ table^T) * output_scale, of `chunk` positions of each sequence at a time. The float32 table_VD is
    cast to the dtype of hidden_BTD; logits and the table's gradient are accumulated in float32.
    """
    hidden_BTD = jax.sharding.reshard(hidden_BTD, rules.spec("batch", "length", "act_embed"))
    table_VD = jax.sharding.reshard(table_VD, rules.spec("vocab", "embed"))
    statics = _LossStatics(output_scale=output_scale, chunk=chunk, rules=rules, z_loss=z_loss)
    return _loss_sum(statics, hidden_BTD, table_VD, targets_BT, weights_BT)


def token_losses(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    output_scale: float,
    chunk: int,
    rules: AxisRules,
) -> jax.Array:
    """Return each position's negative log-likelihood_BT, float32, in nats; for evaluation, not differentiated."""
    return token_scores(hidden_BTD, table_VD, targets_BT, output_scale=output_scale, chunk=chunk, rules=rules)[0]


def token_scores(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    output_scale: float,
    chunk: int,
    rules: AxisRules,
) -> tuple[jax.Array, jax.Array]:
    """Return the losses_BT of `token_losses`, and whether each target is the likeliest token, of equals the first."""

    def local(hidden_BTD, table_VD, targets_BT):
        table_VD = gather_table(table_VD, dtype=hidden_BTD.dtype)

        def of_chunk(_, chunk_arrays):
            hidden_RD, targets_R = chunk_arrays
            return None, score_logits(_logits(hidden_RD, table_VD, output_scale), targets_R)

        chunks = (_split_chunks(hidden_BTD, chunk), _split_chunks(targets_BT, chunk))
        _, (losses, is_greedy) = jax.lax.scan(of_chunk, None, chunks)
        batch, length = targets_BT.shape
        return tuple(_merge_chunks(each, batch=batch, length=length) for each in (losses, is_greedy))

    by_position = PartitionSpec(*_by_position(rules))
    losses_BT, is_greedy_BT = _per_device(local, rules, out_specs=(by_position,) * 2)(hidden_BTD, table_VD, targets_BT)
    return losses_BT, is_greedy_BT


def score_logits(logits_RV: jax.Array, targets_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return each target's negative log-likelihood, float32, in nats, and whether it is the likeliest token."""
    own_R1 = _pick(logits_RV, targets_R)[..., None]
    is_later_RV = jnp.arange(logits_RV.shape[-1]) >= targets_R[..., None]
    # Two comparisons, as XLA's argmax on a CPU takes three times as long.
    is_greedy_R = ((logits_RV < own_R1) | ((logits_RV == own_R1) & is_later_RV)).all(-1)
    return _losses(logits_RV, targets_R), is_greedy_R


def logits(hidden_BTD: jax.Array, table_VD: jax.Array, *, output_scale: float) -> jax.Array:
    """Return logits_BTV in float32 of all positions at once, so few; operands are whole on every device."""
    B, T, D = hidden_BTD.shape
    return _logits(hidden_BTD.reshape(B * T, D), table_VD, output_scale).reshape(B, T, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sum(statics: _LossStatics, hidden_BTD, table_VD, targets_BT, weights_BT):
    def local(hidden_BTD, table_VD, targets_BT, weights_BT):
        table_VD = gather_table(table_VD, dtype=hidden_BTD.dtype)

        def add(total, chunk_arrays):
            hidden_RD, targets_R, weights_R = chunk_arrays
            logits_RV = _logits(hidden_RD, table_VD, statics.output_scale)
            return total + (weights_R * _losses(logits_RV, targets_R)).sum(), None

        chunks = tuple(_split_chunks(x, statics.chunk) for x in (hidden_BTD, targets_BT, weights_BT))
        total, _ = jax.lax.scan(add, _varying(jnp.zeros(())), chunks)
        return _sum_over_devices(total)

    return _per_device(local, statics.rules, out_specs=PartitionSpec())(hidden_BTD, table_VD, targets_BT, weights_BT)


def _loss_sum_forward(statics: _LossStatics, hidden_BTD, table_VD, targets_BT, weights_BT):
    def local(hidden_BTD, table_VD, targets_BT, weights_BT):
        table_VD = gather_table(table_VD, dtype=hidden_BTD.dtype)

        def add(carry, chunk_arrays):
            total, grad_VD = carry
            hidden_RD, targets_R, weights_R = chunk_arrays
            losses_R, delta_RV = _losses_and_deltas(statics, hidden_RD, table_VD, targets_R, weights_R)
            # In the form that XLA:CPU makes by instructions of bfloat16: a float32 result, and nothing read transposed.
            dtype = jnp.float32 if platform() == "cpu" else None
            grad_RD = jnp.einsum("RV,VD->RD", delta_RV, table_VD, preferred_element_type=dtype)
            of_rows, product = delta_RV, "RV,RD->VD"
            if are_for_training():
                of_rows, product = transpose(delta_RV), "VR,RD->VD"
            grad_VD = grad_VD + jnp.einsum(product, of_rows, hidden_RD, preferred_element_type=jnp.float32)
            return (total + (weights_R * losses_R).sum(), grad_VD), grad_RD.astype(hidden_RD.dtype)

        zeros = _varying(jnp.zeros(())), _varying(jnp.zeros(table_VD.shape, jnp.float32))
        chunks = tuple(_split_chunks(x, statics.chunk) for x in (hidden_BTD, targets_BT, weights_BT))
        (total, grad_VD), grads = jax.lax.scan(add, zeros, chunks)
        grad_BTD = _merge_chunks(grads, batch=hidden_BTD.shape[0], length=hidden_BTD.shape[1])
        return _sum_over_devices(total), grad_BTD, scatter_table_gradient(grad_VD, dtype=statics.rules.gradient_dtype)

    out_specs = (
        PartitionSpec(),
        PartitionSpec(*_by_position(statics.rules), None),
        statics.rules.spec("vocab", "embed"),
    )
    mapped = _per_device(local, statics.rules, out_specs=out_specs)
    total, grad_BTD, grad_VD = mapped(hidden_BTD, table_VD, targets_BT, weights_BT)
    grad_BTD = jax.sharding.reshard(grad_BTD, statics.rules.spec("batch", "length", "act_embed"))
    return total, (grad_BTD, grad_VD)


def _losses_and_deltas(statics: _LossStatics, hidden_RD, table_VD, targets_R, weights_R):
    """Return each position's loss, and the gradients of the sum's products hidden @ table^T, in hidden's dtype."""
    if are_for_training():
        products_RV, dtype = _products(hidden_RD, table_VD), hidden_RD.dtype
        scale, z_loss = statics.output_scale, statics.z_loss
        return cross_entropy(products_RV, targets_R, weights_R, scale=scale, z_loss=z_loss, dtype=dtype)
    logits_RV = _logits(hidden_RD, table_VD, statics.output_scale)
    norm_R = jax.nn.logsumexp(logits_RV, -1)
    losses_R = norm_R - _pick(logits_RV, targets_R)
    probability_RV = jnp.exp(logits_RV - norm_R[..., None])
    if statics.z_loss:
        probability_RV *= (1 + 2 * statics.z_loss * norm_R)[..., None]
    delta_RV = probability_RV - _one_hot(targets_R, table_VD.shape[0])
    return losses_R, (delta_RV * (weights_R * statics.output_scale)[..., None]).astype(hidden_RD.dtype)


def _loss_sum_backward(statics: _LossStatics, gradients, cotangent):
    del statics
    grad_BTD, grad_VD = gradients
    return (cotangent * grad_BTD).astype(grad_BTD.dtype), cotangent * grad_VD, None, None


_loss_sum.defvjp(_loss_sum_forward, _loss_sum_backward)


def _per_device(local, rules: AxisRules, *, out_specs):
    """Have `local` run on each device's part of (hidden_BTD, the stored table_VD, then [B, T] arrays)."""

    def run(hidden_BTD, table_VD, *positions_BT):
        by_position = PartitionSpec(*_by_position(rules))
        arguments = hidden_BTD, table_VD, *positions_BT
        specs = PartitionSpec(*by_position, None), rules.spec("vocab", "embed"), *(by_position for _ in positions_BT)
        return jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=not _is_alone())(
            *map(jax.sharding.reshard, arguments, specs)
        )

    return run


def _by_position(rules: AxisRules) -> tuple:
    """Return the mesh axes that split [B, T] here: positions are split over `tensor` too."""
    return rules.batch, (*axis_names(rules.length), TENSOR)


def _logits(hidden_RD, table_VD, output_scale):
    return _products(hidden_RD, table_VD) * output_scale


def _products(hidden_RD, table_VD):
    table_VD = table_VD.astype(hidden_RD.dtype)
    return jnp.einsum("RD,VD->RV", hidden_RD, table_VD, preferred_element_type=jnp.float32)


def _one_hot(targets_R, vocab_size: int):
    return targets_R[..., None] == jnp.arange(vocab_size)


def _losses(logits_RV, targets_R):
    return jax.nn.logsumexp(logits_RV, -1) - _pick(logits_RV, targets_R)


def _pick(logits_RV, targets_R):
    # A masked sum rather than a gather: it fuses with the logsumexp and has no scatter for a gradient.
    return jnp.where(_one_hot(targets_R, logits_RV.shape[-1]), logits_RV, 0.0).sum(-1)


def _sum_over_devices(total):
    return total if _is_alone() else jax.lax.psum(total, _all_axes())


def _is_alone() -> bool:
    """Whether there is one device, over which XLA:CPU would sum by a copy."""
    return jax.sharding.get_abstract_mesh().size == 1


def _varying(x):
    """Give a replicated value the type, inside shard_map, of one that may differ on every device."""
    return jax.lax.pcast(x, _all_axes(), to="varying")


def _all_axes() -> tuple[str, ...]:
    return jax.sharding.get_abstract_mesh().axis_names


def _split_chunks(x_BT, chunk: int):
    """[B, T, ...] -> [T / chunk, R = B * chunk, ...], padded with zeros, whose weight is zero too."""
    batch, length = x_BT.shape[:2]
    chunk = min(chunk, length)
    padding = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x_BT.ndim - 2)
    num_chunks = -(-length // chunk)
    x_BT = jnp.pad(x_BT, padding).reshape(batch, num_chunks, chunk, *x_BT.shape[2:])
    return jnp.swapaxes(x_BT, 0, 1).reshape(num_chunks, batch * chunk, *x_BT.shape[3:])


def _merge_chunks(x, *, batch: int, length: int):
    """Undo `_split_chunks`."""
    num_chunks, rows = x.shape[:2]
    x_BT = jnp.swapaxes(x.reshape(num_chunks, batch, rows // batch, *x.shape[2:]), 0, 1)
    return x_BT.reshape(batch, num_chunks * rows // batch, *x.shape[2:])[:, :length]
