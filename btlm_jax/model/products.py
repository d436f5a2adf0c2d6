"""Products of matrices in the form in which each platform's hardware takes them.

XLA:CPU widens bfloat16 operands to float32 wherever a product's result is bfloat16, or an operand is read transposed;
rows times columns with a float32 result run in the processor's bfloat16 instructions (AVX-512-BF16, AMX) and take half
the time (2 vCPU AMD EPYC (Zen 4), jax 0.10.2, 2026-11-30: 390 against 190 GFLOP/s). In float32 too a transposed operand
costs time: 116 to 175 GFLOP/s against 190. So what is summed over rows is transposed first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from btlm_jax.kernels.build import has_training_kernels_for
from btlm_jax.parallel.mesh import platform


def multiply(dims: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return einsum(dims, a, b) in the operands' dtype, summed in float32."""
    if _is_bfloat16_on_cpu(a):
        return jnp.einsum(dims, a, b, preferred_element_type=jnp.float32).astype(a.dtype)
    return jnp.einsum(dims, a, b)


def sum_outer(dims: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return einsum(dims, a, b) in float32; of matrices over their rows, as "RK,RM->KM"."""
    if a.ndim == 2 and has_kernels(a):
        rows, columns = dims[:2]
        dims, a = f"{columns}{rows}{dims[2:]}", transpose(a)
    return jnp.einsum(dims, a, b, preferred_element_type=jnp.float32)


def transpose(x_RK: jax.Array) -> jax.Array:
    """Return x_KR by a C++ kernel: XLA would merge a transposition of its own into the product."""
    R, K = x_RK.shape
    return jax.ffi.ffi_call("btlm_transpose", jax.ShapeDtypeStruct((K, R), x_RK.dtype))(x_RK)


def has_kernels(x: jax.Array) -> bool:
    """Whether the C++ kernels compute with such an array, on the mesh that is set."""
    return platform() == "cpu" and has_training_kernels_for(x.dtype)


def _is_bfloat16_on_cpu(x: jax.Array) -> bool:
    return x.dtype == jnp.bfloat16 and platform() == "cpu"
