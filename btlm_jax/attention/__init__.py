"""Causal attention with ALiBi: one entry point, `attend`, over implementations that agree."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from btlm_jax.attention.alibi_lanes import named
from btlm_jax.attention.blockwise import attend_blockwise
from btlm_jax.attention.cpu import attend_cpu, has_kernels_for
from btlm_jax.attention.gpu import attend_gpu, is_possible
from btlm_jax.attention.reference import attend_reference
from btlm_jax.attention.splash import attend_splash
from btlm_jax.attention.tpu import attend_tpu
from btlm_jax.attention.ulysses import exchanged, in_pieces, joined, own_positions, positions_for_heads
from btlm_jax.parallel.mesh import axis_names, num_ways, platform

IMPLEMENTATIONS = ("reference", "blockwise", "cpu", "tpu", "splash", "gpu")
AUTO = "auto"  # the one made for the devices: tpu on TPUs, gpu and cpu where they are possible, otherwise blockwise


def attend(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    slopes_N: jax.Array,
    *,
    scale: float,
    implementation: str,
) -> jax.Array:
    """Return softmax over s <= t of (scale * q_t . k_s - slopes * (t - s)), applied to v, as o_BTNH in q's dtype.

    `implementation` is one of IMPLEMENTATIONS or AUTO. The softmax is float32 whatever the dtype. The slopes are
    constants: no gradient flows to them. Under an explicit mesh each device attends with its own sequences and heads.
    A sharded length is exchanged for heads, of which each device then has a share at all positions, and back
    (Ulysses, arXiv 2309.14509); the mesh axes of the length must divide the heads.

    For remat, q, k and v are named attention_query, attention_key and attention_value where they are attended with.

    Raises:
      ValueError: an unknown implementation, shapes or shardings that do not fit together.
    """
    if implementation == AUTO:
        implementation = _made_for_the_devices(q_BTNH)
    if implementation == "reference":
        attend_local = attend_reference
    elif implementation == "blockwise":
        attend_local = attend_blockwise
    elif implementation == "cpu":
        attend_local = attend_cpu
    elif implementation in ("tpu", "splash"):
        kernels = attend_tpu if implementation == "tpu" else attend_splash
        attend_local = functools.partial(kernels, interpret=platform() != "tpu")
    elif implementation == "gpu":
        attend_local = attend_gpu
    else:
        raise ValueError(
            f"attention implementation {implementation!r} is not known; allowed are "
            f"{', '.join((AUTO, *IMPLEMENTATIONS))}"
        )
    _check_shapes(q_BTNH, k_BSNH, v_BSNH, slopes_N)
    slopes_N = jax.lax.stop_gradient(jnp.asarray(slopes_N, jnp.float32))

    def local(q_BTNH, k_BSNH, v_BSNH, slopes_N, length_axes=()):
        B, *_, head_dim = q_BTNH.shape
        q_SBTM, k_SBTM, v_SBTM = (positions_for_heads(x, length_axes) for x in (q_BTNH, k_BSNH, v_BSNH))
        if implementation == "tpu":  # which takes pieces as they come, and exchanges its output itself
            o_SBTM = attend_local(q_SBTM, k_SBTM, v_SBTM, slopes_N, scale=scale, axes=length_axes)
            return own_positions(o_SBTM, head_dim=head_dim)
        all_positions = (B, q_SBTM.shape[0] * q_SBTM.shape[2], -1, head_dim)
        q_BTNH, k_BTNH, v_BTNH = (joined(x).reshape(all_positions) for x in (q_SBTM, k_SBTM, v_SBTM))
        if implementation != "splash":  # which names what it makes of them
            q_BTNH, k_BTNH, v_BTNH = named(q_BTNH, k_BTNH, v_BTNH)
        o_BTNH = attend_local(q_BTNH, k_BTNH, v_BTNH, slopes_N, scale=scale)
        o_SBTM = exchanged(in_pieces(o_BTNH.reshape(*all_positions[:2], -1), len(q_SBTM)), length_axes)
        return own_positions(o_SBTM, head_dim=head_dim)

    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return local(q_BTNH, k_BSNH, v_BSNH, slopes_N)
    spec = _sharding_spec(q_BTNH, k_BSNH, v_BSNH)
    length_axes, heads_axes = (tuple(axis for axis in axis_names(spec[dim]) if mesh.shape[axis] > 1) for dim in (1, 2))
    _check_heads(q_BTNH.shape[2], mesh=mesh, length_axes=length_axes, heads_axes=heads_axes)
    slopes_spec = P((*heads_axes, *length_axes))
    slopes_N = jax.sharding.reshard(slopes_N, slopes_spec)
    # The kernels do not declare what their results vary over, which the check would need.
    is_checked = implementation not in ("cpu", "tpu", "splash", "gpu")
    mapped = jax.shard_map(
        functools.partial(local, length_axes=length_axes),
        in_specs=(spec, spec, spec, slopes_spec),
        out_specs=spec,
        check_vma=is_checked,
    )
    return mapped(q_BTNH, k_BSNH, v_BSNH, slopes_N)


def _made_for_the_devices(q_BTNH: jax.Array) -> str:
    if platform() == "tpu":
        return "tpu"
    if platform() == "gpu":
        return "gpu" if is_possible(q_BTNH) else "blockwise"
    return "cpu" if platform() == "cpu" and has_kernels_for(q_BTNH) else "blockwise"


def _check_shapes(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, slopes_N: jax.Array) -> None:
    if q_BTNH.ndim != 4 or not q_BTNH.shape == k_BSNH.shape == v_BSNH.shape:
        raise ValueError(
            f"attention needs q, k and v of one shape [batch, length, heads, head dim]; got {q_BTNH.shape}, "
            f"{k_BSNH.shape} and {v_BSNH.shape}"
        )
    if slopes_N.shape != (q_BTNH.shape[2],):
        raise ValueError(f"attention over {q_BTNH.shape[2]} heads needs as many slopes; got shape {slopes_N.shape}")


def _sharding_spec(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array) -> P:
    specs = [P(*jax.typeof(x).sharding.spec) for x in (q_BTNH, k_BSNH, v_BSNH)]
    if not specs[0] == specs[1] == specs[2]:
        raise ValueError(f"attention needs q, k and v sharded alike; got {specs[0]}, {specs[1]} and {specs[2]}")
    if specs[0][3] is not None:
        raise ValueError(
            f"attention cannot shard the head dim; got {specs[0]} for [batch, length, heads, head dim]: "
            "reshard batch, length and heads only"
        )
    return specs[0]


def _check_heads(num_heads: int, *, mesh, length_axes: tuple[str, ...], heads_axes: tuple[str, ...]) -> None:
    ways = num_ways(mesh, (*heads_axes, *length_axes))
    if num_heads % ways:
        raise ValueError(
            f"attention over {num_heads} heads cannot be split {ways} ways, by heads over {heads_axes} and by length "
            f"over {length_axes}: the number of heads must be divisible by that"
        )
