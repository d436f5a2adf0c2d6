"""Attention's inputs, its float64 oracle and what is measured of an implementation."""

import functools
import hashlib
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from btlm_jax.attention import attend
from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.plan.chips import slice_devices

NAMES = ("o", "dq", "dk", "dv")
OURS = ("blockwise", "cpu")
CUDNN = "jax._src.cudnn.fused_attention_stablehlo"
FLOAT32_ERROR = 2e-6  # about 16 units in the last place: sums are taken in an order that depends on the threads


def make_inputs(*, B, T, N, H, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v, do = (jnp.asarray(rng.normal(size=(B, T, N, H)), dtype) for _ in range(4))
    slopes_N = np.asarray([0.7 * 0.6**n for n in range(N)], np.float32)
    return q, k, v, do, slopes_N


def oracle(q, k, v, do, slopes_N, *, scale, windows_BN=math.inf):
    """Return o, dq, dk, dv in float64, from the definition and the softmax's Jacobian, one head at a time.

    Keys at a distance above `windows_BN` are left out.
    """
    return oracle_at(np.arange(q.shape[1]), q, k, v, do, slopes_N, scale=scale, windows_BN=windows_BN)


def oracle_at(queries, q, k, v, do, slopes_N, *, scale, windows_BN=math.inf):
    """Return what `oracle` does where `do` is zero but at some queries, and o and dq at these alone."""
    windows_BN = np.broadcast_to(windows_BN, (q.shape[0], q.shape[2]))
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    B, T, N, _ = q.shape
    results = [np.zeros(q.shape) for _ in NAMES]
    distances = np.asarray(queries)[:, None] - np.arange(T)
    for b in range(B):
        for n in range(N):
            scores = scale * q[b, queries, n] @ k[b, :, n].T - np.float64(slopes_N[n]) * distances
            scores[(distances < 0) | (distances > windows_BN[b, n])] = -np.inf
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            own_do = do[b, queries, n]
            dweights = own_do @ v[b, :, n].T
            dscores = weights * (dweights - (dweights * weights).sum(1, keepdims=True))
            results[0][b, queries, n] = weights @ v[b, :, n]
            results[1][b, queries, n] = scale * dscores @ k[b, :, n]
            results[2][b, :, n] = scale * dscores.T @ q[b, queries, n]
            results[3][b, :, n] = weights.T @ own_do
    return results


@functools.partial(jax.jit, static_argnames=("scale", "implementation"))
def attend_and_gradients(q, k, v, do, slopes_N, starts_BT=None, *, scale, implementation):
    def function(q, k, v):
        return attend(q, k, v, slopes_N, scale=scale, implementation=implementation, starts_BT=starts_BT)

    o, vjp = jax.vjp(function, q, k, v)
    return o, *vjp(do)


def errors(results, expected):
    """Return each result's largest error relative to the largest value expected, or to 1e-3 where that is smaller."""
    return [
        np.abs(np.asarray(result, np.float64) - value).max() / max(np.abs(value).max(), 1e-3)
        for result, value in zip(results, expected, strict=True)
    ]


def subjaxprs(jaxpr):
    """Yield a jaxpr and every jaxpr inside it."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from subjaxprs(inner)


def num_kernels(function, *inputs) -> int:
    """Return how many kernels the jaxpr of a function calls."""
    jaxpr = jax.make_jaxpr(function)(*inputs).jaxpr
    return sum(equation.primitive.name == "pallas_call" for part in subjaxprs(jaxpr) for equation in part.eqns)


def root_mean_square_errors(implementation, *inputs, expected):
    """Return each result's error relative to what is expected, of inputs in bfloat16 and the model's scale."""
    scale = 1 / inputs[0].shape[-1]
    results = attend_and_gradients(*inputs, scale=scale, implementation=implementation)
    assert all(x.dtype == jnp.bfloat16 for x in results)
    return [
        np.linalg.norm(np.asarray(result, np.float64) - value) / np.linalg.norm(value)
        for result, value in zip(results, expected, strict=True)
    ]


def num_kernels_compiled(compiled) -> int:
    """Return how many kernels a compiled TPU program calls."""
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


def num_kernels_under_remat(implementation, *, num_heads: int) -> tuple[int, int]:
    """Return how many kernels value and gradients run where remat keeps the output, and where it keeps nothing."""
    B, T, N, H = 1, 256, num_heads, 80
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), devices=slice_devices("v5e:2x2")[:1])
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    slopes_N = alibi_slopes(N, scaling=1.0)

    def kernels(policy):
        def function(q, k, v):
            return jnp.square(attend(q, k, v, slopes_N, scale=1 / H, implementation=implementation)).sum()

        step = jax.value_and_grad(jax.checkpoint(function, policy=policy), argnums=(0, 1, 2))
        with jax.set_mesh(mesh):
            return num_kernels_compiled(jax.jit(step).lower(x, x, x).compile())

    saved = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    return kernels(saved), kernels(jax.checkpoint_policies.nothing_saveable)


def digest():
    """Return a hash of what the kernel computes for heads that look everywhere and for one that does not."""
    *inputs, _ = make_inputs(B=2, T=777, N=3, H=80)
    slopes_N = np.asarray([0.2, 1e-3, 0.0], np.float32)
    results = attend_and_gradients(*inputs, slopes_N, scale=1 / 80, implementation="cpu")
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in results)).hexdigest()
