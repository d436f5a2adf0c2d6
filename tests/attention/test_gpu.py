"""Attention for GPUs, without one: its arithmetic with another kernel in cuDNN's place, and what it lowers to."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.attention import NAMES, attend_and_gradients, make_inputs, oracle

from btlm_jax.attention import attend
from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.attention.gpu import MAX_HEAD_DIM

CUDNN = "jax._src.cudnn.fused_attention_stablehlo"


@pytest.fixture
def hopper(monkeypatch):
    """Let JAX believe that cuDNN 9.10 and a Hopper GPU are here, as far as lowering asks."""
    monkeypatch.setattr(f"{CUDNN}.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(f"{CUDNN}.check_compute_capability", lambda capability: True)
    monkeypatch.setattr(f"{CUDNN}.is_cuda_compute_capability_equal", lambda capability: False)


def kernels(*inputs, implementation: str) -> list[str]:
    """Return the custom calls that attention and its gradients lower to for CUDA."""
    step = functools.partial(attend_and_gradients.__wrapped__, scale=1 / 80, implementation=implementation)
    text = jax.jit(step).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    length = inputs[0].shape[1]
    if implementation == "gpu":
        assert f"x{length}x{length}x" not in text  # no array of scores
    return re.findall(r"custom_call @(__cudnn[\w$]+)", text)


@pytest.mark.parametrize("B, T, N, H", [(2, 37, 4, 64), (1, 300, 6, 80), (1, 70, 2, MAX_HEAD_DIM)])
def test_the_arithmetic_is_that_of_float64(B, T, N, H):
    """With the ordinary kernel of the same function in cuDNN's place; an error of two bfloat16 roundings is allowed."""
    *inputs, _ = make_inputs(B=B, T=T, N=N, H=H, dtype=jnp.bfloat16)
    slopes_N = alibi_slopes(N, scaling=1.5)
    expected = oracle(*inputs, slopes_N, scale=1 / H)
    ordinary = jax.nn.dot_product_attention

    def instead(q, k, v, *, scale, is_causal, implementation):
        assert implementation == "cudnn"
        return ordinary(q, k, v, scale=scale, is_causal=is_causal)

    with mock.patch("jax.nn.dot_product_attention", instead):
        step = functools.partial(attend_and_gradients.__wrapped__, scale=1 / H, implementation="gpu")
        results = jax.jit(step)(*inputs, slopes_N)
    for name, result, value in zip(NAMES, results, expected, strict=True):
        assert result.dtype == jnp.bfloat16 and result.shape == value.shape
        assert np.linalg.norm(np.asarray(result, np.float64) - value) < 8e-3 * np.linalg.norm(value), name


def test_it_lowers_to_cudnn_alone_and_under_a_mesh(hopper):
    *inputs, slopes_N = make_inputs(B=4, T=300, N=4, H=80, dtype=jnp.bfloat16)
    expected = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert kernels(*inputs, slopes_N, implementation="gpu") == expected
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))
    sharding = NamedSharding(mesh, P("fsdp", None, "tensor", None))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in inputs]
    with jax.set_mesh(mesh):
        assert kernels(*shapes, slopes_N, implementation="gpu") == expected


def test_auto_takes_it_on_a_gpu_where_it_is_possible(hopper):
    with mock.patch("btlm_jax.attention.platform", return_value="gpu"):
        for head_dim, dtype, num_kernels in ((80, jnp.bfloat16, 2), (80, jnp.float32, 0), (128, jnp.bfloat16, 0)):
            *inputs, slopes_N = make_inputs(B=1, T=24, N=2, H=head_dim, dtype=dtype)
            assert len(kernels(*inputs, slopes_N, implementation="auto")) == num_kernels


@pytest.mark.parametrize("H, dtype", [(128, jnp.bfloat16), (80, jnp.float32)])
def test_what_the_kernel_does_not_take_is_refused(H, dtype):
    q, k, v, _, slopes_N = make_inputs(B=1, T=8, N=2, H=H, dtype=dtype)
    with pytest.raises(ValueError, match=f"takes bfloat16 and head dims up to 116; got {q.dtype} and {H}"):
        attend(q, k, v, slopes_N, scale=1.0, implementation="gpu")
