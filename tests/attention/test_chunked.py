"""Attention in chunks by XLA against float64: output, gradients, documents, groups of heads, a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.attention import FLOAT32_ERROR, NAMES, attend_and_gradients, errors, make_inputs, oracle

from btlm_jax.attention import chunked

SCALE = 0.3


def assert_matches(results, expected, *, error: float):
    for name, found in zip(NAMES, errors(results, expected), strict=True):
        assert found < error, name


def test_chunks_cover_the_length():
    for T in (1, 127, 128, 129, 1000, 1024, 1025, 8192):
        chunks = chunked._chunks(T)
        assert [start for start, _ in chunks] == [0, *(stop for _, stop in chunks[:-1])] and chunks[-1][1] == T
        assert len(chunks) <= chunked.CHUNKS and all(stop > start for start, stop in chunks)


@pytest.mark.parametrize("T", [1, 261])
def test_output_and_gradients_match_float64(T):
    *inputs, slopes_N = make_inputs(B=2, T=T, N=3, H=20)
    results = attend_and_gradients(*inputs, slopes_N, scale=SCALE, implementation="chunked")
    assert_matches(results, oracle(*inputs, slopes_N, scale=SCALE), error=FLOAT32_ERROR)


def test_bfloat16_documents_and_groups_of_heads(monkeypatch):
    """All at once: an error of two roundings of bfloat16, each document as if alone, heads in two groups of two."""
    lengths = (100, 1, 29)
    *inputs, slopes_N = make_inputs(B=1, T=sum(lengths), N=4, H=24, dtype=jnp.bfloat16)
    monkeypatch.setattr(chunked, "SCORE_BYTES", 2 * 4 * 128 * 130)
    assert chunked.num_groups(inputs[0].shape) == 2
    starts_T = np.repeat(np.cumsum((0, *lengths[:-1])), lengths).astype(np.int32)
    results = attend_and_gradients(*inputs, slopes_N, starts_T[None], scale=SCALE, implementation="chunked")
    spans = [slice(starts_T[stop - 1], stop) for stop in np.cumsum(lengths)]
    parts = [oracle(*(x[:, span] for x in inputs), slopes_N, scale=SCALE) for span in spans]
    for name, result, expected in zip(NAMES, results, map(np.hstack, zip(*parts, strict=True)), strict=True):
        assert result.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(result, np.float64) - expected) < 8e-3 * np.linalg.norm(expected), name


def test_groups_fit_into_the_bytes_of_scores():
    largest = 4 * 1024 * 8192  # of one head's last chunk of 8,192 positions
    assert chunked.num_groups((1, 8192, 32, 80)) == 32 * largest // chunked.SCORE_BYTES
    assert chunked.num_groups((16, 2048, 12, 64)) == 1
    assert chunked.num_groups((1, 1 << 16, 6, 80)) == 6  # more than the bytes even with one head


def test_each_device_attends_with_its_own():
    *inputs, slopes_N = make_inputs(B=2, T=140, N=4, H=12)
    expected = oracle(*inputs, slopes_N, scale=SCALE)
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "context", "tensor"))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("fsdp", "context", "tensor", None))
        step = functools.partial(attend_and_gradients.__wrapped__, scale=SCALE, implementation="chunked")
        results = jax.jit(step)(*(jax.device_put(x, sharding) for x in inputs), slopes_N)
    assert_matches(results, expected, error=FLOAT32_ERROR)
