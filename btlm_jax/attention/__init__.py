"""Causal attention with ALiBi: one entry point, `attend`, over implementations that agree.

An implementation is imported where it is chosen, while a step is traced: Pallas kernels are not loaded on a CPU.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from btlm_jax.parallel.mesh import axis_names, num_ways, platform

IMPLEMENTATIONS = ("reference", "blockwise", "chunked", "cpu", "tpu", "splash", "gpu")
AUTO = "auto"  # the one made for the devices, `_implementation_for`


def attend(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    slopes_N: jax.Array,
    *,
    scale: float,
    implementation: str,
    starts_BT: jax.Array | None = None,
) -> jax.Array:
    """Return softmax over s <= t of (scale * q_t . k_s - slopes * (t - s)), applied to v, as o_BTNH in q's dtype.

    `starts_BT`, int32, is the position at which the document of each position begins: then only keys of the query's
    own document, s >= starts_t, are seen. It never falls along T, and starts_t <= t. None: one document.

    `implementation` is one of IMPLEMENTATIONS or AUTO. The softmax is float32 whatever the dtype. The slopes are
    constants: no gradient flows to them. Under an explicit mesh each device attends with its own sequences and heads.
    A sharded length is exchanged for heads, of which each device then has a share at all positions, and back
    (Ulysses, arXiv 2309.14509); the mesh axes of the length must divide the heads.

    For remat, q, k, v and what the backward pass needs besides have the names of remat_names.py.

    Raises:
      ValueError: an unknown implementation, shapes or shardings that do not fit together.
    """
    if implementation not in (AUTO, *IMPLEMENTATIONS):
        raise ValueError(
            f"attention implementation {implementation!r} is not known; allowed are "
            f"{', '.join((AUTO, *IMPLEMENTATIONS))}"
        )
    _check_shapes(q_BTNH, k_BSNH, v_BSNH, slopes_N, starts_BT)
    if implementation == AUTO:
        implementation = _implementation_for(q_BTNH, has_documents=starts_BT is not None)
    slopes_N = jax.lax.stop_gradient(jnp.asarray(slopes_N, jnp.float32))
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        attend_local = _local_attention(implementation, length_axes=())
        return attend_local(q_BTNH, k_BSNH, v_BSNH, slopes_N, starts_BT, scale=scale)
    spec = _sharding_spec(q_BTNH, k_BSNH, v_BSNH)
    length_axes, heads_axes = (tuple(axis for axis in axis_names(spec[dim]) if mesh.shape[axis] > 1) for dim in (1, 2))
    _check_heads(q_BTNH.shape[2], mesh=mesh, length_axes=length_axes, heads_axes=heads_axes)
    slopes_spec = P((*heads_axes, *length_axes))
    slopes_N = jax.sharding.reshard(slopes_N, slopes_spec)
    starts_spec = P(spec[0], None)
    if starts_BT is not None:
        starts_BT = jax.sharding.reshard(starts_BT, starts_spec)
    mapped = jax.shard_map(
        functools.partial(_local_attention(implementation, length_axes=length_axes), scale=scale),
        in_specs=(spec, spec, spec, slopes_spec, starts_spec),
        out_specs=spec,
        # The kernels do not declare what their results vary over, which the check would need.
        check_vma=implementation in ("reference", "blockwise", "chunked"),
    )
    return mapped(q_BTNH, k_BSNH, v_BSNH, slopes_N, starts_BT)


def _implementation_for(q_BTNH: jax.Array, *, has_documents: bool) -> str:
    """Return the implementation made for the devices; where it takes no such queries, one that does."""
    T, H, dtype = q_BTNH.shape[1], q_BTNH.shape[3], q_BTNH.dtype
    if platform() == "tpu":
        from btlm_jax.attention.alibi_lanes import MAX_LENGTH
        from btlm_jax.attention.tpu import has_kernels_for as fits_vmem

        other = "splash" if T <= MAX_LENGTH else "blockwise"
        return "tpu" if fits_vmem(_num_heads_of_device(q_BTNH), H, dtype) else other
    if platform() == "gpu":
        from btlm_jax.attention.gpu import why_no_kernel

        return "chunked" if why_no_kernel(dtype, length=T, head_dim=H, has_documents=has_documents) else "gpu"
    from btlm_jax.attention.cpu import has_kernels_for

    return "cpu" if platform() == "cpu" and has_kernels_for(q_BTNH) else "blockwise"


def _num_heads_of_device(q_BTNH: jax.Array) -> int:
    """Return how many heads a device attends with, once a sharded length has been exchanged for heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return q_BTNH.shape[2]
    _, length, heads, _ = P(*jax.typeof(q_BTNH).sharding.spec)
    return q_BTNH.shape[2] // num_ways(mesh, (*axis_names(length), *axis_names(heads)))


def _local_attention(implementation: str, *, length_axes: tuple[str, ...]) -> Callable[..., jax.Array]:
    """Return what attends on one device: (q_BTNH, k_BSNH, v_BSNH, slopes_N, starts_BT, *, scale) -> o_BTNH.

    Arrays are of its own positions, but starts_BT of all.
    """
    is_interpreted = platform() != "tpu"
    if implementation == "tpu":
        from btlm_jax.attention.tpu import attend_tpu

        return functools.partial(attend_tpu, length_axes=length_axes, interpret=is_interpreted)
    if implementation == "splash":
        from btlm_jax.attention.splash import attend_splash

        attend_local = functools.partial(attend_splash, interpret=is_interpreted)
    elif implementation == "gpu":
        from btlm_jax.attention.gpu import attend_gpu as attend_local
    elif implementation == "cpu":
        from btlm_jax.attention.cpu import attend_cpu as attend_local
    elif implementation == "chunked":
        from btlm_jax.attention.chunked import attend_chunked as attend_local
    elif implementation == "blockwise":
        from btlm_jax.attention.blockwise import attend_blockwise as attend_local
    else:
        from btlm_jax.attention.reference import attend_reference as attend_local
    if not length_axes:
        return attend_local
    from btlm_jax.attention.ulysses import attend_exchanged

    return functools.partial(attend_exchanged, attend_local, length_axes=length_axes)


def _check_shapes(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, slopes_N: jax.Array, starts_BT: jax.Array | None
) -> None:
    if q_BTNH.ndim != 4 or not q_BTNH.shape == k_BSNH.shape == v_BSNH.shape:
        raise ValueError(
            f"attention needs q, k and v of one shape [batch, length, heads, head dim]; got {q_BTNH.shape}, "
            f"{k_BSNH.shape} and {v_BSNH.shape}"
        )
    if not q_BTNH.dtype == k_BSNH.dtype == v_BSNH.dtype:
        raise ValueError(f"attention needs one dtype; got {q_BTNH.dtype}, {k_BSNH.dtype} and {v_BSNH.dtype}")
    if slopes_N.shape != (q_BTNH.shape[2],):
        raise ValueError(f"attention over {q_BTNH.shape[2]} heads needs as many slopes; got shape {slopes_N.shape}")
    if starts_BT is not None and (starts_BT.shape != q_BTNH.shape[:2] or starts_BT.dtype != jnp.int32):
        raise ValueError(
            f"attention over {q_BTNH.shape[:2]} positions needs documents' starts of that shape, int32; got "
            f"{starts_BT.shape}, {starts_BT.dtype}"
        )


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


def _check_heads(
    num_heads: int, *, mesh: AbstractMesh, length_axes: tuple[str, ...], heads_axes: tuple[str, ...]
) -> None:
    ways = num_ways(mesh, (*heads_axes, *length_axes))
    if num_heads % ways:
        raise ValueError(
            f"attention over {num_heads} heads cannot be split {ways} ways, by heads over {heads_axes} and by length "
            f"over {length_axes}: the number of heads must be divisible by that"
        )
