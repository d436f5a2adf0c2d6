"""Attention over the cache against float64: windows, rings, dtypes, batches of mixed lengths, growth, the bound."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btlm_jax.decode import cpu_cache as cache
from btlm_jax.decode.cpu_cache import attend, make_cache, make_layout, resize_cache
from btlm_jax.kernels import build
from btlm_jax.recipe.config import ModelConfig

N, H, L, LAYER = 6, 12, 2, 1
SCALE = 0.3


def model_config(**changes) -> ModelConfig:
    values = dict(
        vocab_size=99, num_layers=L, d_model=N * H, num_heads=N, d_ff=56, layer_norm_eps=1e-5, qk_norm="none",
        alibi_scaling=1.0,
        dtype="float32", attention="blockwise", remat="full", loss_chunk=20,
    )  # fmt: skip
    return ModelConfig(**values | changes)


CONFIG = model_config()


@pytest.fixture(params=["kernels", "XLA"])
def way(request, monkeypatch):
    """Compute in the compiled kernels, or without them."""
    if request.param == "XLA":
        monkeypatch.setattr(cache, "has_kernels", lambda: False)
    else:
        assert build.has_kernels(), "no C++ compiler here?"
    return request.param


@pytest.fixture
def narrow(monkeypatch):
    """Windows so narrow that rings wrap, and that real weight is lost."""
    monkeypatch.setattr(cache, "SPREAD", -12.0)
    monkeypatch.setattr(cache, "MAX_PIECE", 8)


def random_qkv(B, T, *, seed=0):
    return np.random.default_rng(seed).standard_normal((3, B, T, N, H), np.float32)


def run(qkv, pieces, *, layout, dtype="float32", kept=None, first=0):
    """Attend piece by piece; `pieces` are counts for each row, [piece][row]. Returns o[row][token], cache, lost_B."""
    B = qkv.shape[1]
    kept = make_cache(CONFIG, layout, batch_size=B, dtype=dtype) if kept is None else kept
    starts_B, outputs, lost_B = np.full(B, first, np.int32), [[] for _ in range(B)], np.zeros(B)
    attend_now = jax.jit(functools.partial(attend, layout=layout, scale=SCALE))  # anew: ways differ by a patch
    for counts_B in np.array(pieces, np.int32):
        T = max(2, counts_B.max())  # a piece may be wider than any row needs
        piece = np.full((3, B, T, N, H), 7.0, np.float32)
        for b, count in enumerate(counts_B):
            piece[:, b, :count] = qkv[:, b, starts_B[b] : starts_B[b] + count]
        o_BTNH, kept, lost = attend_now(
            *piece, kept, layer=jnp.int32(LAYER), starts_B=starts_B, counts_B=counts_B, lengths_B=starts_B + counts_B
        )
        lost_B = np.maximum(lost_B, lost)
        for b, count in enumerate(counts_B):
            outputs[b].append(np.asarray(o_BTNH[b, :count]))
            assert not np.asarray(o_BTNH[b, count:]).any()
        starts_B = starts_B + counts_B
    return [np.concatenate(rows) for rows in outputs], kept, lost_B


def oracle(qkv_TNH, layout, *, windowed):
    """Return float64 o_TNH of one row, and the largest share of weight outside of a window."""
    q_TNH, k_TNH, v_TNH = qkv_TNH.astype(np.float64)
    T = len(q_TNH)
    distance_TS = np.arange(T)[:, None] - np.arange(T)
    scores_NTS = SCALE * np.einsum("TNH,SNH->NTS", q_TNH, k_TNH)
    scores_NTS = scores_NTS - np.array(layout.slopes, np.float64)[:, None, None] * distance_TS
    weights_NTS = np.where(distance_TS >= 0, np.exp(scores_NTS - scores_NTS.max(-1, keepdims=True)), 0)
    outside_NTS = distance_TS >= np.array(layout.windows)[:, None, None]
    lost = ((weights_NTS * outside_NTS).sum(-1) / weights_NTS.sum(-1)).max()
    if windowed:
        weights_NTS = weights_NTS * ~outside_NTS
    return np.einsum("NTS,SNH->TNH", weights_NTS / weights_NTS.sum(-1, keepdims=True), v_TNH), lost


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [[[37]], [[8]] * 4 + [[5]], [[16], [1], [1], [3], [1], [15]]], ids=["1", "5", "6"])
def test_pieces_of_any_size(way, pieces):
    qkv = random_qkv(1, 37)
    layout = make_layout(CONFIG, length=64)
    (found,), kept, lost_B = run(qkv, pieces, layout=layout)
    np.testing.assert_allclose(found, oracle(qkv[:, 0], layout, windowed=False)[0], atol=2e-6)
    assert lost_B == 0 and not np.asarray(kept.k_LBSH[0]).any()  # the other layer is left alone


def test_rings_keep_exactly_the_window(way, narrow):
    layout = make_layout(CONFIG, length=200)
    assert min(layout.slots) < 40 and max(layout.slots) == 200  # heads that wrap many times, and heads that never do
    qkv = random_qkv(1, 150)
    expected_TNH, lost = oracle(qkv[:, 0], layout, windowed=True)
    (found,), _, bound_B = run(qkv, [[8]] * 15 + [[1]] * 30, layout=layout)
    np.testing.assert_allclose(found, expected_TNH, atol=2e-6)
    assert lost > 1e-4 and bound_B[0] >= lost  # what is lost is known


def test_many_queries_see_exactly_their_windows(monkeypatch):
    """Pieces of 16 queries and more, which the kernels take together, beside pieces of fewer; narrow windows."""
    assert build.has_kernels(), "no C++ compiler here?"
    monkeypatch.setattr(cache, "SPREAD", -12.0)
    layout = make_layout(CONFIG, length=400)
    assert min(layout.windows) < 20 and min(layout.slots) < 300
    qkv = random_qkv(2, 340)
    found, _, bound_B = run(qkv, [[70, 16], [3, 17], [130, 129], [1, 100], [19, 1], [117, 77]], layout=layout)
    for b, rows in enumerate(found):
        expected_TNH, lost = oracle(qkv[:, b, : len(rows)], layout, windowed=True)
        np.testing.assert_allclose(rows, expected_TNH, atol=2e-6)
        assert lost > 1e-4 and bound_B[b] >= lost


def test_what_windows_cut_off_cannot_be_seen(way):
    layout = make_layout(CONFIG, length=1000)
    assert layout.windows[0] < 400 and layout.slots[0] < 1000
    qkv = random_qkv(1, 800) * 2  # scores of some 10 nats
    (found,), _, bound_B = run(qkv, [[256], [256], [256], [32]], layout=layout)
    expected_TNH, lost = oracle(qkv[:, 0], layout, windowed=False)
    np.testing.assert_allclose(found, expected_TNH, atol=3e-5)  # scores up to 30 in float32
    assert lost <= bound_B[0] < 2**-24


@pytest.mark.parametrize("name", ["SPREAD", "slope"])
def test_windows_follow_their_formula(name):
    for heads in (4, 6, 32):
        layout = make_layout(dataclasses.replace(CONFIG, num_heads=heads, d_model=heads * H), length=8192)
        for slope, window in zip(layout.slopes, layout.windows, strict=True):

            def share(distance, slope=slope):
                return math.exp(cache.SPREAD - slope * distance) / (1 - math.exp(-slope))

            assert share(window) <= 2**-24 * 1.001 < share(window - 2)


def test_a_scaling_that_turns_alibi_off_has_windows_that_the_kernels_can_hold():
    layout = make_layout(dataclasses.replace(CONFIG, alibi_scaling=1e9), length=8192)
    assert np.array(layout.windows, np.int32).min() > 8192 and set(layout.slots) == {8192}


def test_slots_of_the_paper_s_model():
    layout = make_layout(dataclasses.replace(CONFIG, num_heads=32, d_model=32 * 80), length=8192)
    assert layout.num_slots / (32 * 8192) < 0.4
    assert list(layout.firsts) == [sum(layout.slots[:n]) for n in range(32)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype,error", [("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_kept_in_fewer_bits(way, dtype, error):
    qkv = random_qkv(2, 40)
    rounded = qkv.copy()
    for part in (1, 2):
        if dtype == "bfloat16":
            rounded[part] = qkv[part].astype(jnp.bfloat16)
        else:
            step = np.abs(qkv[part]).max(-1, keepdims=True) / 127
            rounded[part] = np.rint(qkv[part] / step) * step
    layout = make_layout(CONFIG, length=64)
    found, kept, _ = run(qkv, [[32, 20], [8, 20]], layout=layout, dtype=dtype)
    assert kept.k_LBSH.dtype == dtype
    for b in range(2):
        exact, expected = (oracle(part[:, b], layout, windowed=False)[0] for part in (qkv, rounded))
        np.testing.assert_allclose(found[b], expected, atol=2e-6 if dtype == "bfloat16" else 2e-3)
        assert 1e-4 < np.abs(found[b] - exact).max() < 4 * error


def test_rows_of_mixed_lengths(way, narrow):
    layout = make_layout(CONFIG, length=120)
    qkv = random_qkv(3, 100)
    pieces = [[8, 8, 3], *[[8, 5, 0]] * 5, *[[8, 0, 0]] * 3, *[[1, 1, 1]] * 20]  # short rows wait, then all decode
    found, _, _ = run(qkv, pieces, layout=layout)
    for b, rows in enumerate(found):
        expected_TNH, _ = oracle(qkv[:, b, : len(rows)], layout, windowed=True)
        np.testing.assert_allclose(rows, expected_TNH, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_growth_changes_nothing(way, narrow, dtype):
    small, large = (make_layout(CONFIG, length=length) for length in (64, 160))
    assert any(a < b for a, b in zip(small.slots, large.slots, strict=True))
    assert any(a == b for a, b in zip(small.slots, large.slots, strict=True))
    qkv = random_qkv(1, 120)
    (whole,), _, _ = run(qkv, [[8]] * 15, layout=large, dtype=dtype)
    (before,), kept, _ = run(qkv, [[8]] * 8, layout=small, dtype=dtype)
    kept = jax.jit(resize_cache, static_argnums=(1, 2))(kept, small, large)
    (after,), _, _ = run(qkv, [[8]] * 7, layout=large, kept=kept, first=64)
    rounding = 0 if way == "kernels" else 2e-6  # XLA's sums depend on how long a ring is
    np.testing.assert_allclose(np.concatenate([before, after]), whole, rtol=0, atol=rounding)


def test_the_bound_is_nearly_reached(narrow):
    """One query whose own key has half the length of those that its head's window has just left out."""
    layout, T, key = make_layout(CONFIG, length=250), 198, 6.0
    qkv = np.zeros((3, 1, T, N, H), np.float32)
    for n, window in enumerate(layout.windows):
        qkv[1, 0, :, n, 0] = np.where(np.arange(T) <= T - 1 - window, key, -key)
        qkv[1, 0, T - 1, n, 0] = key / 2
    qkv[0, 0, T - 1, :, 0] = 2.0
    _, lost = oracle(qkv[:, 0], layout, windowed=False)
    _, _, bound_B = run(qkv, [[8]] * 24 + [[6]], layout=layout)
    assert 0.02 < lost <= bound_B[0] < 1.2 * lost


@pytest.mark.slow
@pytest.mark.parametrize("dtype", cache.DTYPES)
def test_a_number_that_is_none_is_seen(way, dtype):
    layout = make_layout(CONFIG, length=64)
    qkv = random_qkv(1, 30)
    qkv[1, 0, 20, 2, 3] = np.nan
    (found,), _, _ = run(qkv, [[15], [15]], layout=layout, dtype=dtype)
    (of_many,), _, _ = run(qkv, [[30]], layout=layout, dtype=dtype)
    np.testing.assert_array_equal(np.isnan(of_many), np.isnan(found))
    assert not np.isnan(found[:20]).any() and np.isnan(found[20:, 2]).all() and not np.isnan(found[:, 3]).any()


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="cache_dtype='int4' is not known; allowed are float32, bfloat16, int8"):
        make_cache(CONFIG, make_layout(CONFIG, length=64), batch_size=1, dtype="int4")
