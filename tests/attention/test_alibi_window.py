"""How far back heads see, and how they are dealt to devices."""

import jax.numpy as jnp
import numpy as np
import pytest

from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.attention.alibi_window import largest_spread, reach
from btlm_jax.parallel.mesh import balanced_head_order


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("spread", [0.0, 5.0, 64.0])
def test_beyond_its_reach_a_head_sees_less_than_a_rounding(spread, xp):
    slopes_N = alibi_slopes(32, scaling=1.0).astype(np.float64)
    reach_N = np.asarray(reach(spread, xp.asarray(slopes_N), xp=xp), np.float64)

    def weight_beyond(distance_N):
        return np.exp(spread - slopes_N * (distance_N + 1)) / (1 - np.exp(-slopes_N))

    assert (weight_beyond(np.floor(reach_N)) < 1.001 * 2.0**-24).all()
    assert (weight_beyond(np.floor(reach_N) - 2) > 0.999 * 2.0**-24).all()


def test_a_head_without_a_slope_sees_everything():
    assert np.isinf(reach(5.0, jnp.zeros(2))).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_row_of_scores_spreads_further_than_the_bound(dtype):
    S, B, T, N, H = 2, 3, 40, 4, 24
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(S, B, T, N * H)) * rng.lognormal(size=(1, B, 1, N * H)), dtype) for _ in "qk")
    bound_BN = np.asarray(largest_spread(q, k, num_heads=N, scale=1 / H))
    q, k = (np.asarray(x, np.float64).reshape(S, B, T, N, H) for x in (q, k))
    scores = np.einsum("SBTNH,RBUNH->BNSTRU", q, k).reshape(B, N, S * T, S * T) / H
    spread_BN = (scores.max(-1) - scores.min(-1)).max(-1)
    assert (spread_BN < bound_BN).all()
    longest = [np.sqrt(np.square(x).sum(-1)).max((0, 2)) for x in (q, k)]
    np.testing.assert_allclose(bound_BN, 2 / H * longest[0] * longest[1], rtol=0.03)


@pytest.mark.parametrize("num_heads, ways", [(32, 1), (32, 2), (32, 4), (32, 8), (32, 32), (12, 4), (6, 4)])
def test_every_head_is_dealt_once(num_heads, ways):
    assert sorted(balanced_head_order(num_heads, ways=ways)) == list(range(num_heads))


def test_devices_see_much_the_same():
    assert balanced_head_order(8, ways=2).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]
    seen = np.minimum(reach(64.0, alibi_slopes(32, scaling=1.0), xp=np), 8192)
    as_dealt, in_turn = (seen[heads].reshape(8, 4).sum(1) for heads in (balanced_head_order(32, ways=8), np.arange(32)))
    assert as_dealt.max() < 1.1 * as_dealt.mean() and in_turn.max() > 2 * in_turn.mean()
