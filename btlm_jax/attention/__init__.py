"""Causal attention with ALiBi: one entry point, `attend`, over implementations that agree."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from btlm_jax.attention.blockwise import attend_blockwise
from btlm_jax.attention.cpu import attend_cpu, has_kernels_for
from btlm_jax.attention.gpu import attend_gpu, is_possible
from btlm_jax.attention.lanes import named
from btlm_jax.attention.reference import attend_reference
from btlm_jax.attention.splash import attend_splash
from btlm_jax.sharding import axis_names, num_ways, platform

IMPLEMENTATIONS = ("reference", "blockwise", "cpu", "splash", "gpu")
AUTO = "auto"  # the one made for the devices: splash on TPUs, gpu and cpu where they are possible, otherwise blockwise


def attend(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    slopes_N: jax.Array,
    *,
    scale: float,
    implementation: str,
    spare_lanes: int = 0,
) -> jax.Array:
    """Return softmax over s <= t of (scale * q_t . k_s - slopes * (t - s)), applied to v, as o_BTNH in q's dtype.

    `implementation` is one of IMPLEMENTATIONS or AUTO. The softmax is float32 whatever the dtype. The slopes are
    constants: no gradient flows to them. The last `spare_lanes` of q, k and v are zero; a
    kernel may use them. Under an explicit mesh each device attends with its own sequences and heads.
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
    elif implementation == "splash":
        attend_local = functools.partial(attend_splash, spare_lanes=spare_lanes, interpret=platform() != "tpu")
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
        q_BTNH, k_BSNH, v_BSNH = (_positions_for_heads(x, length_axes) for x in (q_BTNH, k_BSNH, v_BSNH))
        if implementation != "splash":  # which names what it makes of them
            q_BTNH, k_BSNH, v_BSNH = named(q_BTNH, k_BSNH, v_BSNH)
        o_BTNH = attend_local(q_BTNH, k_BSNH, v_BSNH, slopes_N, scale=scale)
        return _heads_for_positions(o_BTNH, length_axes)

    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return local(q_BTNH, k_BSNH, v_BSNH, slopes_N)
    spec = _sharding_spec(q_BTNH, k_BSNH, v_BSNH)
    length_axes, heads_axes = (tuple(axis for axis in axis_names(spec[dim]) if mesh.shape[axis] > 1) for dim in (1, 2))
    _check_heads(q_BTNH.shape[2], mesh=mesh, length_axes=length_axes, heads_axes=heads_axes)
    slopes_spec = P((*heads_axes, *length_axes))
    slopes_N = jax.sharding.reshard(slopes_N, slopes_spec)
    # The kernels do not declare what their results vary over, which the check would need.
    is_checked = implementation not in ("cpu", "splash", "gpu")
    mapped = jax.shard_map(
        functools.partial(local, length_axes=length_axes),
        in_specs=(spec, spec, spec, slopes_spec),
        out_specs=spec,
        check_vma=is_checked,
    )
    return mapped(q_BTNH, k_BSNH, v_BSNH, slopes_N)


def _positions_for_heads(x_BTNH: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Give away positions of most heads and get all positions of a few; inside shard_map."""
    return _exchange(x_BTNH.swapaxes(1, 2), axes, split_dim=1, join_dim=2).swapaxes(1, 2) if axes else x_BTNH


def _heads_for_positions(x_BTNH: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return _exchange(x_BTNH.swapaxes(1, 2), axes, split_dim=2, join_dim=1).swapaxes(1, 2) if axes else x_BTNH


def _exchange(x_BXXH: jax.Array, axes: tuple[str, ...], *, split_dim: int, join_dim: int) -> jax.Array:
    """All-to-all from parts of one dim to parts of the other.

    Its pieces are brought together outermost: left to itself, XLA:TPU copies more (2 % of a step's cycles on v5e-256).
    """
    ways, shape = jax.lax.axis_size(axes), list(x_BXXH.shape)
    shape[split_dim : split_dim + 1] = [ways, shape[split_dim] // ways]
    pieces = jnp.moveaxis(x_BXXH.reshape(shape), split_dim, 0)
    pieces = jax.lax.all_to_all(pieces, axes, split_axis=0, concat_axis=0, tiled=True)
    shape = list(pieces.shape[1:])
    shape[join_dim] *= ways
    return jnp.moveaxis(pieces, 0, join_dim).reshape(shape)


def _made_for_the_devices(q_BTNH: jax.Array) -> str:
    if platform() == "tpu":
        return "splash"
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
