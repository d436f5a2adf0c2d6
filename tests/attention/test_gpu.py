"""Attention for GPUs, without one: its arithmetic with another kernel in cuDNN's place, and what it lowers to."""

import dataclasses
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.attention import CUDNN, NAMES, attend_and_gradients, make_inputs, oracle
from support.tiny import tiny_config

from btlm_jax.attention import _implementation_for, attend
from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.attention.gpu import (
    MAX_HEAD_DIM,
    MAX_HEAD_DIM_HOPPER,
    MOST_DOCUMENTS,
    describe_attention,
    packed_documents,
)
from btlm_jax.attention.remat_names import save_attention_and
from btlm_jax.train.setup import most_documents

FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


@pytest.fixture
def become(monkeypatch):
    """Return what lets JAX believe that cuDNN 9.10 and a GPU of a compute capability are here, as lowering asks."""

    def become(own: float) -> None:
        monkeypatch.setattr(f"{CUDNN}.check_cudnn_version", lambda: 91000)
        monkeypatch.setattr(f"{CUDNN}.check_compute_capability", lambda capability: own >= float(capability))
        monkeypatch.setattr(f"{CUDNN}.is_cuda_compute_capability_equal", lambda capability: own == float(capability))

    return become


@pytest.fixture
def hopper(become):
    become(9.0)


def kernels(*inputs, implementation: str) -> list[str]:
    """Return the custom calls that attention and its gradients lower to for CUDA."""
    step = functools.partial(attend_and_gradients.__wrapped__, scale=1 / 80, implementation=implementation)
    text = lowered(step, *inputs)
    length = inputs[0].shape[1]
    if implementation == "gpu":
        assert f"x{length}x{length}x" not in text  # no array of scores
    return calls(text)


def lowered(function, *inputs) -> str:
    return jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()


def calls(text: str) -> list[str]:
    return re.findall(r"custom_call @(__cudnn[\w$]+)", text)


@pytest.mark.slow
@pytest.mark.parametrize("B, T, N, H", [(2, 37, 4, 64), (1, 300, 6, 80), (1, 70, 2, MAX_HEAD_DIM)])
def test_the_arithmetic_is_that_of_float64(hopper, B, T, N, H):
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
    expected = [FORWARD, BACKWARD]
    assert kernels(*inputs, slopes_N, implementation="gpu") == expected
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))
    sharding = NamedSharding(mesh, P("fsdp", None, "tensor", None))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in inputs]
    with jax.set_mesh(mesh):
        assert kernels(*shapes, slopes_N, implementation="gpu") == expected


@pytest.mark.parametrize(
    "own, H, dtype, is_kernel",
    [
        (9.0, 80, jnp.bfloat16, True),
        (9.0, 80, jnp.float32, False),
        (9.0, MAX_HEAD_DIM_HOPPER, jnp.bfloat16, True),
        (9.0, MAX_HEAD_DIM_HOPPER + 1, jnp.bfloat16, False),
        (8.0, MAX_HEAD_DIM, jnp.bfloat16, True),
        (8.0, MAX_HEAD_DIM + 1, jnp.bfloat16, False),
        (7.5, 80, jnp.bfloat16, False),
        (10.0, MAX_HEAD_DIM + 1, jnp.bfloat16, False),  # cuDNN's backward pass takes 128 there, and just 256
    ],
)
def test_auto_takes_it_on_a_gpu_where_it_is_possible_and_chunks_elsewhere(become, own, H, dtype, is_kernel):
    become(own)
    *inputs, _, slopes_N = make_inputs(B=1, T=24, N=2, H=H, dtype=dtype)
    with (
        mock.patch("btlm_jax.attention.platform", return_value="gpu"),
        mock.patch("btlm_jax.attention.chunked.attend_chunked", side_effect=lambda q, *_, **__: q) as chunked,
    ):
        text = lowered(lambda q, k, v: attend(q, k, v, slopes_N, scale=0.1, implementation="auto"), *inputs)
    assert (calls(text), chunked.called) == (([FORWARD], False) if is_kernel else ([], True))


def test_auto_leaves_lengths_that_the_lanes_cannot_count_to_xla(become):
    become(9.0)
    config = tiny_config(model__d_model=160, model__num_heads=2, model__dtype="bfloat16").model
    with mock.patch("btlm_jax.attention.platform", return_value="gpu"):
        for length, chosen in ((65_536, "gpu"), (65_537, "chunked")):
            q_BTNH = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)
            assert _implementation_for(q_BTNH, has_documents=False) == chosen
            assert describe_attention(config, length=length, has_documents=False).startswith(chosen)


@pytest.mark.parametrize(
    "own, H, dtype, most",
    [
        (9.0, MAX_HEAD_DIM_HOPPER + 1, jnp.bfloat16, "244 on Hopper"),
        (8.0, 128, jnp.bfloat16, "116, on Hopper 244"),
        (10.0, 128, jnp.bfloat16, "116, on Hopper 244"),
        (9.0, 80, jnp.float32, "244 on Hopper"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused_and_said(become, own, H, dtype, most):
    become(own)
    q, k, v, _, slopes_N = make_inputs(B=1, T=8, N=2, H=H, dtype=dtype)
    reason = f"takes bfloat16 and head dims up to {most}; got {q.dtype} and {H}"
    with pytest.raises(ValueError, match=f"{reason}: use model.attention=chunked"):
        attend(q, k, v, slopes_N, scale=1.0, implementation="gpu")
    config = tiny_config(model__d_model=2 * H, model__num_heads=2, model__dtype=q.dtype.name).model
    assert describe_attention(config, length=8, has_documents=False) == f"chunked, in XLA: cuDNN's kernel {reason}"
    become(7.5)
    older = "chunked, in XLA: cuDNN's kernel is for compute capability 8.0 (Ampere) or newer"
    assert describe_attention(config, length=8, has_documents=False) == older


def test_what_is_chosen_is_said(hopper):
    config = tiny_config(model__d_model=160, model__num_heads=2, model__dtype="bfloat16").model
    said = describe_attention(config, length=8, has_documents=True)
    assert said == "gpu, cuDNN's kernel: heads of 80 widened to 96 by ALiBi's lanes"
    config = dataclasses.replace(config, attention="blockwise")
    assert describe_attention(config, length=8, has_documents=False) == "blockwise, as model.attention says"


@pytest.mark.parametrize("has_documents", [False, True])
def test_the_saved_forward_pass_does_not_run_again(hopper, has_documents):
    """Where remat saves attention; but with documents, whose statistics are too large to keep."""
    *inputs, _, slopes_N = make_inputs(B=2, T=24, N=2, H=80, dtype=jnp.bfloat16)
    starts_BT = jnp.zeros((2, 24), jnp.int32) if has_documents else None

    def loss(q, k, v):
        return jnp.sin(attend(q, k, v, slopes_N, scale=0.1, implementation="gpu", starts_BT=starts_BT)).sum()

    def forward_calls(policy) -> int:
        step = jax.value_and_grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 2))
        return calls(lowered(step, *inputs)).count(FORWARD)

    assert forward_calls(save_attention_and()) == (2 if has_documents else 1)
    assert forward_calls(jax.checkpoint_policies.nothing_saveable) == 2
    assert forward_calls(jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")) == 2
    # Of the results one form alone is kept: the output as wide as the kernel writes it, 96, and not that of 80 too.
    vjp = jax.eval_shape(lambda *qkv: jax.vjp(jax.checkpoint(loss, policy=save_attention_and()), *qkv)[1], *inputs)
    kept = [x.shape for x in jax.tree.leaves(vjp) if x.ndim == 4]
    assert kept.count((2, 24, 2, 96)) == (0 if has_documents else 1) and kept.count((2, 24, 2, 80)) == 3


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

    text = lowered(step, *inputs, starts_BT)
    assert calls(text) == [FORWARD, BACKWARD]
    for line in (line for line in text.splitlines() if "__cudnn" in line):
        assert f"max_seg_per_batch\\22: {MOST_DOCUMENTS}," in line and "PADDING_CAUSAL" in line
        operands = line.rpartition(" : (")[2].partition(") -> ")[0]
        assert operands.count(f"tensor<{B}x{MOST_DOCUMENTS}xi32>") == 2  # lengths of queries and of keys
        assert operands.count(f"tensor<{B}x{MOST_DOCUMENTS + 1}xi32>") == 2  # offsets
    assert f"{T}x{T}x" not in text


def test_documents_need_a_hopper(become):
    become(8.0)
    *inputs, _, slopes_N = make_inputs(B=1, T=24, N=2, H=80, dtype=jnp.bfloat16)
    starts_BT = jnp.zeros((1, 24), jnp.int32)
    with pytest.raises(ValueError, match="data.document_mask.* from Hopper on"):
        attend(*inputs, slopes_N, scale=1.0, implementation="gpu", starts_BT=starts_BT)
    with mock.patch("btlm_jax.attention.platform", return_value="gpu"):
        attend(*inputs, slopes_N, scale=1.0, implementation="auto", starts_BT=starts_BT)  # chunked


def test_the_most_documents_are_those_of_the_kernel_that_is_taken(become):
    half, single = (tiny_config(model__dtype=dtype) for dtype in ("bfloat16", "float32"))
    with mock.patch("btlm_jax.train.setup.platform", return_value="gpu"):
        for own, config, has_limit in ((8.0, half, False), (9.0, half, True), (9.0, single, False)):
            become(own)
            assert (most_documents(config) == MOST_DOCUMENTS) == has_limit
    assert most_documents(half) > 1 << 30
