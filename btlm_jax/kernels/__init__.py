"""C++ for CPUs: its sources, its build, and what of training runs in it besides attention (attention/cpu.py)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from btlm_jax.kernels.build import has_training_kernels
from btlm_jax.parallel.mesh import platform


def are_for_training() -> bool:
    """Whether training on the mesh that is set runs in the kernels, which XLA has then: on CPUs with a compiler."""
    return platform() == "cpu" and has_training_kernels()


def transpose(x_RK: jax.Array) -> jax.Array:
    """Return x_KR; a transposition of XLA:CPU's is merged into the product, which then takes up to twice as long."""
    R, K = x_RK.shape
    return jax.ffi.ffi_call("btlm_transpose", jax.ShapeDtypeStruct((K, R), x_RK.dtype))(x_RK)


def cross_entropy(
    products_RV: jax.Array, targets_R: jax.Array, weights_R: jax.Array, *, scale: float, z_loss: float, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Return losses_R and the gradients_RV of what model/loss.py's `_losses_and_deltas` says, in one pass a row."""
    shapes = jax.ShapeDtypeStruct(targets_R.shape, jnp.float32), jax.ShapeDtypeStruct(products_RV.shape, dtype)
    call = jax.ffi.ffi_call("btlm_cross_entropy", shapes)
    losses_R, delta_RV = call(products_RV, targets_R, weights_R, scale=np.float32(scale), z_loss=np.float32(z_loss))
    return losses_R, delta_RV


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def swiglu(spec: PartitionSpec, up_BTF: jax.Array, gate_BTF: jax.Array) -> jax.Array:
    """Return up * silu(gate), computed in float32 and rounded once; `spec` is how both are split over the mesh."""
    return _swiglu_forward(spec, up_BTF, gate_BTF)[0]


def _swiglu_forward(spec: PartitionSpec, up_BTF: jax.Array, gate_BTF: jax.Array):
    call = jax.shard_map(lambda up, gate: _call("forward", 1)(up, gate)[0], in_specs=(spec, spec), out_specs=spec)
    return call(up_BTF, gate_BTF), (up_BTF, gate_BTF)


def _swiglu_backward(spec: PartitionSpec, residuals: tuple[jax.Array, jax.Array], dy_BTF: jax.Array):
    up_BTF, gate_BTF = residuals
    call = jax.shard_map(_call("backward", 2), in_specs=(spec,) * 3, out_specs=(spec, spec))
    return call(up_BTF, gate_BTF, dy_BTF)


def _call(direction: str, num_results: int):
    def call(up, *others):
        results = (jax.ShapeDtypeStruct(up.shape, up.dtype),) * num_results
        return tuple(jax.ffi.ffi_call(f"btlm_swiglu_{direction}", results)(up, *others))

    return call


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
