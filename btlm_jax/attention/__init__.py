"""Causal attention with ALiBi: one entry point, `attend`, over implementations that agree."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from btlm_jax.attention.blockwise import attend_blockwise
from btlm_jax.attention.gpu import attend_gpu, is_possible
from btlm_jax.attention.reference import attend_reference
from btlm_jax.attention.splash import attend_splash

IMPLEMENTATIONS = ("reference", "blockwise", "splash", "gpu")
AUTO = "auto"  # the one made for the devices: splash on TPUs, gpu on GPUs where it is possible, otherwise blockwise


def attend(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, slopes_N: jax.Array, *, scale: float, implementation: str
) -> jax.Array:
    """Return softmax over s <= t of (scale * q_t . k_s - slopes * (t - s)), applied to v, as o_BTNH in q's dtype.

    `implementation` is one of IMPLEMENTATIONS or AUTO. The softmax is float32 whatever the dtype. The slopes are
    constants: no gradient flows to them. Under an explicit mesh each device attends with its own sequences and heads,
    so the length and the head dim must not be sharded.

    Raises:
      ValueError: an unknown implementation, shapes or shardings that do not fit together.
    """
    if implementation == AUTO:
        implementation = _made_for_the_devices(q_BTNH)
    if implementation == "reference":
        attend_local = attend_reference
    elif implementation == "blockwise":
        attend_local = attend_blockwise
    elif implementation == "splash":
        attend_local = functools.partial(attend_splash, interpret=_platform() != "tpu")
    elif implementation == "gpu":
        attend_local = attend_gpu
    else:
        raise ValueError(
            f"attention implementation {implementation!r} is not known; allowed are "
            f"{', '.join((AUTO, *IMPLEMENTATIONS))}"
        )
    _check_shapes(q_BTNH, k_BSNH, v_BSNH, slopes_N)
    slopes_N = jax.lax.stop_gradient(jnp.asarray(slopes_N, jnp.float32))

    def local(q_BTNH, k_BSNH, v_BSNH, slopes_N):
        return attend_local(q_BTNH, k_BSNH, v_BSNH, slopes_N, scale=scale)

    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return local(q_BTNH, k_BSNH, v_BSNH, slopes_N)
    spec = _sharding_spec(q_BTNH, k_BSNH, v_BSNH)
    slopes_N = jax.sharding.reshard(slopes_N, P(spec[2]))
    # The kernels do not declare what their results vary over, which the check would need.
    is_checked = implementation not in ("splash", "gpu")
    return jax.shard_map(local, in_specs=(spec, spec, spec, P(spec[2])), out_specs=spec, check_vma=is_checked)(
        q_BTNH, k_BSNH, v_BSNH, slopes_N
    )


def _made_for_the_devices(q_BTNH: jax.Array) -> str:
    if _platform() == "tpu":
        return "splash"
    return "gpu" if _platform() == "gpu" and is_possible(q_BTNH) else "blockwise"


def _platform() -> str:
    """Return the platform of the surrounding mesh's devices, which a compilation ahead of time need not have here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


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
    if specs[0][1] is not None or specs[0][3] is not None:
        raise ValueError(
            f"attention cannot shard the length or the head dim; got {specs[0]} for [batch, length, heads, head dim]: "
            "reshard batch and heads only"
        )
    return specs[0]
