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
from support.tiny import tiny_config

from btlm_jax.attention import attend, most_documents
from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.attention.gpu import MAX_HEAD_DIM, MOST_DOCUMENTS, packed_documents

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


@pytest.mark.slow
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


def test_documents_are_packed_rows_to_cudnn():
    """Lengths and offsets as JAX documents them: of the row, one offset more than lengths, filled up with -1."""
    starts_BT = jnp.asarray([[0, 0, 2, 3, 3, 3], [0] * 6, [0, 1, 2, 3, 4, 5]], jnp.int32)
    lengths_BM, offsets_BM = packed_documents(starts_BT, most=4)
    assert lengths_BM.tolist() == [[2, 1, 3, -1], [6, -1, -1, -1], [1, 1, 1, 3]]  # the last three of six are one
    assert offsets_BM.tolist() == [[0, 2, 3, 6, -1], [0, 6, -1, -1, -1], [0, 1, 2, 3, 6]]
    assert lengths_BM.dtype == offsets_BM.dtype == jnp.int32


def test_documents_lower_to_cudnn_by_offsets(hopper):
    B, T, N, H = 4, 640, 4, 80
    *inputs, slopes_N = make_inputs(B=B, T=T, N=N, H=H, dtype=jnp.bfloat16)
    starts_BT = jnp.zeros((B, T), jnp.int32)

    def step(q, k, v, do, starts_BT):
        attend_masked = functools.partial(attend, scale=0.1, implementation="gpu", starts_BT=starts_BT)
        o, vjp = jax.vjp(lambda *qkv: attend_masked(*qkv, slopes_N), q, k, v)
        return o, *vjp(do)

    text = jax.jit(step).trace(*inputs, starts_BT).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(__cudnn[\w$]+)", text)
    assert calls == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    for line in (line for line in text.splitlines() if "__cudnn" in line):
        assert f"max_seg_per_batch\\22: {MOST_DOCUMENTS}," in line and "PADDING_CAUSAL" in line
        operands = line.rpartition(" : (")[2].partition(") -> ")[0]
        assert operands.count(f"tensor<{B}x{MOST_DOCUMENTS}xi32>") == 2  # lengths of queries and of keys
        assert operands.count(f"tensor<{B}x{MOST_DOCUMENTS + 1}xi32>") == 2  # offsets
    assert f"{T}x{T}x" not in text


def test_documents_need_a_hopper(hopper, monkeypatch):
    monkeypatch.setattr(f"{CUDNN}.check_compute_capability", lambda capability: False)
    *inputs, _, slopes_N = make_inputs(B=1, T=24, N=2, H=80, dtype=jnp.bfloat16)
    starts_BT = jnp.zeros((1, 24), jnp.int32)
    with pytest.raises(ValueError, match="data.document_mask.* from Hopper on"):
        attend(*inputs, slopes_N, scale=1.0, implementation="gpu", starts_BT=starts_BT)
    with mock.patch("btlm_jax.attention.platform", return_value="gpu"):
        attend(*inputs, slopes_N, scale=1.0, implementation="auto", starts_BT=starts_BT)  # blockwise
        assert most_documents(tiny_config().model) == MOST_DOCUMENTS
    assert most_documents(tiny_config().model) > 1 << 30
