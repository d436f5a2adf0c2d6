"""ALiBi's window: one rule in every backend, what it leaves out; and how heads are assigned to devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention import NAMES, errors, make_inputs, oracle

from btlm_jax.attention import attend, tpu
from btlm_jax.attention.alibi import alibi_slopes, alibi_window, spread_bound, window_of, windows_of_heads
from btlm_jax.parallel.mesh import balanced_head_order

HALF_ULP = 2.0**-24  # of float32
BACKENDS = ("cpu and blockwise", "tpu")


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("spread", [0.0, 5.0, 64.0])
def test_keys_beyond_the_window_weigh_less_than_a_rounding(spread, xp):
    slopes_N = alibi_slopes(32, scaling=1.0).astype(np.float64)
    window_N = np.asarray(alibi_window(spread, xp.asarray(slopes_N), xp=xp), np.float64)

    def weight_beyond(distance_N):
        return np.exp(spread - slopes_N * (distance_N + 1)) / (1 - np.exp(-slopes_N))

    assert (weight_beyond(np.floor(window_N)) < 1.001 * HALF_ULP).all()
    assert (weight_beyond(np.floor(window_N) - 2) > 0.999 * HALF_ULP).all()


def test_a_head_without_a_slope_sees_everything():
    assert np.isinf(alibi_window(5.0, jnp.zeros(2), xp=jnp)).all()


def windows(q, k, slopes_N, *, scale, backend):
    """The largest distances at which heads see keys, int32 [B, N], as a backend computes them from [B, T, N, H]."""
    B, T, N, H = q.shape
    if backend == "cpu and blockwise":
        return np.asarray(jax.jit(windows_of_heads, static_argnames="scale")(q, k, slopes_N, scale=scale))
    heads = tpu.Heads(num=N, dim=H, scale=scale, itemsize=q.dtype.itemsize)
    config = tpu._KernelConfig(heads=heads, axes=(), interpret=True)
    return np.asarray(jax.jit(config.window)(*(x.reshape(1, B, T, N * H) for x in (q, k)), slopes_N))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_backends_have_one_window_that_holds_for_the_spread_of_any_row(dtype):
    B, T, N, H = 3, 80, 4, 24
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(B, T, N, H)) * rng.lognormal(size=(B, 1, N, 1)), dtype) for _ in "qk")
    slopes_N = np.asarray([2.0, 1.2, 0.9, 1e-3], np.float32)
    exact_q, exact_k = (np.asarray(x, np.float64) for x in (q, k))
    scores = np.einsum("BTNH,BSNH->BNTS", exact_q, exact_k) / H
    spread_BN = (scores.max(-1) - scores.min(-1)).max(-1)
    least_BN = np.minimum(np.floor(alibi_window(spread_BN, slopes_N, xp=np)), T)
    centred_k = exact_k - exact_k.mean(1, keepdims=True)
    longest = [np.sqrt(np.square(x).sum(-1)).max(1) for x in (exact_q, centred_k)]
    most_BN = np.minimum(alibi_window(1.03 * 2 / H * longest[0] * longest[1], slopes_N, xp=np), T)
    for backend in BACKENDS:
        window_BN = windows(q, k, slopes_N, scale=1 / H, backend=backend)
        assert (least_BN <= window_BN).all() and (window_BN <= most_BN).all(), backend
        assert (window_BN[:, :3] < T).all() and (window_BN[:, 3] == T).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_with_a_number_that_is_not_finite_sees_everything(backend, value):
    q, k, _, _, _ = make_inputs(B=2, T=90, N=2, H=8)
    slopes_N = np.asarray([2.0, 2.0], np.float32)
    for which in range(2):
        damaged = [np.array(q), np.array(k)]
        damaged[which][1, 70, 0, 3] = value
        window_BN = windows(*damaged, slopes_N, scale=1 / 8, backend=backend)
        assert window_BN[1, 0] == 90 and (window_BN[0] < 40).all()
        if backend != "tpu":  # whose sums over lanes, products with zeros and ones, mix the heads of a position
            assert window_BN[1, 1] < 40


def test_what_the_window_leaves_out_is_below_half_a_unit_in_the_last_place():
    """Outputs and gradients in float64 with the keys in the window, against those with all keys; the model's slopes."""
    B, T, N, H = 1, 700, 6, 80
    slopes_N = alibi_slopes(32, scaling=1.0)[[0, 3, 6, 9, 12, 15]]
    for sharpness in (1.0, 4.0):
        q, k, v, do, _ = make_inputs(B=B, T=T, N=N, H=H)
        q = q * sharpness
        window_BN = windows(q, k, slopes_N, scale=1 / H, backend=BACKENDS[0])
        assert (window_BN < 0.9 * T).sum() >= 3
        with_all, with_window = (
            oracle(q, k, v, do, slopes_N, scale=1 / H, windows_BN=seen) for seen in (np.inf, window_BN)
        )
        for name, difference in zip(NAMES, errors(with_window, with_all), strict=True):
            assert 0 < difference < HALF_ULP, (name, sharpness)


def test_the_bound_on_what_is_left_out_is_nearly_reached():
    """A query whose keys in the window all have the lowest score and those beyond it the highest."""
    slope, scale = 1.0, 0.5
    k_TH = np.full((80, 1), -2.0)
    q_TH = np.full((80, 1), 3.0)
    spread = 2 * scale * 3.0 * 2.0
    window = int(alibi_window(spread, slope, xp=np))
    k_TH[: 79 - window] = 2.0
    scores_S = scale * q_TH[79] @ k_TH.T - slope * (79 - np.arange(80))
    weights_S = np.exp(scores_S - scores_S.max())
    left_out = weights_S[: 79 - window].sum() / weights_S.sum()
    assert 0.2 * HALF_ULP < left_out < HALF_ULP
    largest_square = lambda x_TH: jnp.square(x_TH).sum(-1).max()  # noqa: E731

    @jax.jit
    def bound_and_window(*arrays):
        options = dict(scale=scale, largest_square=largest_square)
        return spread_bound(*arrays, **options), window_of(*arrays, slope, length=80, centre=jnp.zeros(1), **options)

    bound, found = bound_and_window(q_TH.astype(np.float32), k_TH.astype(np.float32))
    assert spread <= bound < 1.03 * spread and window == found


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_all_keys_have_in_common_does_not_widen_the_window(dtype):
    """A bias of 3 key norms, as rounding noise made it in old models, and one of 100: the scores differ no more."""
    B, T, N, H = 2, 200, 3, 24
    q, k, _, _, _ = make_inputs(B=B, T=T, N=N, H=H)
    q, k = np.asarray(q), np.asarray(k)
    slopes_N = np.asarray([2.0, 1.0, 0.7], np.float32)
    bias_NH = np.random.default_rng(8).normal(size=(N, H))
    for backend in BACKENDS:
        plain = windows(q.astype(dtype), k.astype(dtype), slopes_N, scale=1 / H, backend=backend)
        assert (plain < T / 2).all()
        for size, most in ((3, 0), (100, 1)) if dtype == jnp.float32 else ((3, 1),):
            drifted_k = (k + size * bias_NH[None, None]).astype(dtype)
            drifted = windows(q.astype(dtype), drifted_k, slopes_N, scale=1 / H, backend=backend)
            assert (np.abs(drifted - plain) <= most).all(), (backend, size)


@pytest.mark.parametrize("implementation", ["blockwise", "cpu", "tpu"])
def test_a_nan_in_v_is_in_the_output_of_its_own_position(implementation):
    """And of those within the window; beyond it, values are not looked at."""
    q, k, v, _, _ = make_inputs(B=1, T=90, N=1, H=8)
    slopes_N = np.asarray([2.0], np.float32)
    attended = jax.jit(lambda v: attend(q, k, v, slopes_N, scale=1 / 8, implementation=implementation))
    v = np.array(v)
    v[0, 30, 0, 5] = np.nan
    damaged = np.asarray(attended(v))[0, :, 0, 5]
    ((window,),) = windows(q, k, slopes_N, scale=1 / 8, backend=BACKENDS[0])
    assert 5 < window < 25 and np.isnan(damaged[30 : 31 + window]).all()


@pytest.mark.parametrize("num_heads, ways", [(32, 1), (32, 2), (32, 4), (32, 8), (32, 32), (12, 4), (6, 4)])
def test_every_head_is_assigned_once(num_heads, ways):
    assert sorted(balanced_head_order(num_heads, ways=ways)) == list(range(num_heads))


def test_devices_have_about_the_same_to_compute():
    assert balanced_head_order(8, ways=2).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]
    seen = np.minimum(alibi_window(64.0, alibi_slopes(32, scaling=1.0), xp=np), 8192)
    balanced, in_turn = (seen[heads].reshape(8, 4).sum(1) for heads in (balanced_head_order(32, ways=8), np.arange(32)))
    assert balanced.max() < 1.1 * balanced.mean() and in_turn.max() > 2 * in_turn.mean()
