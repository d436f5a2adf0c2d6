"""The splash kernel with ALiBi in its lanes: against float64 in interpret mode, and compiled for a TPU."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.attention import (
    FLOAT32_ERROR,
    NAMES,
    attend_and_gradients,
    errors,
    make_inputs,
    num_kernels,
    num_kernels_compiled,
    num_kernels_under_remat,
    oracle,
    root_mean_square_errors,
    subjaxprs,
)
from support.tpu import needs_libtpu

from btlm_jax.attention import attend
from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.attention.alibi_lanes import MAX_LENGTH, NUM_LANES, alibi_lanes, bfloat16_parts
from btlm_jax.attention.splash import MAX_BLOCK, block_size
from btlm_jax.parallel.mesh import TPU_LANES
from btlm_jax.plan.chips import slice_devices


@pytest.mark.slow
@pytest.mark.parametrize(
    "B, T, N, H, scaling",
    [
        (1, 150, 4, 64, 1.0),  # one block, partly padding
        (2, 131, 6, 80, 3.5),  # interpolated positions
        (1, 70, 32, 128, 1.0),  # ALiBi needs a second tile of lanes
        (1, 700, 2, 80, 1.0),  # two blocks of 512, and coarse positions 0, 256 and 512
    ],
)
def test_output_and_gradients_match_float64(B, T, N, H, scaling):
    *inputs, _ = make_inputs(B=B, T=T, N=N, H=H)
    slopes_N = alibi_slopes(N, scaling=scaling)
    results = attend_and_gradients(*inputs, slopes_N, scale=3 / H, implementation="splash")
    # The kernel adds slope x position to a score and takes it away again: one float32 rounding of the largest.
    allowed = FLOAT32_ERROR + slopes_N.max() * T * 2.0**-24
    for name, error in zip(NAMES, errors(results, oracle(*inputs, slopes_N, scale=3 / H)), strict=True):
        assert error < allowed, name


def test_scores_have_the_exact_scale_in_bfloat16():
    """1/80 in bfloat16 is 0.1 % too large. Scores of one key are read back from its weight, on average over queries."""
    B, T, N, H = 1, 128, 2, 80
    rng = np.random.default_rng(7)
    q = rng.normal(size=(B, T, N, H)).astype(jnp.bfloat16)
    signs = np.sign(rng.normal(size=(1, 1, N, H)))
    q = np.abs(q) * signs.astype(jnp.bfloat16)
    k, v = (np.zeros((B, T, N, H), jnp.bfloat16) for _ in "kv")
    k[:, 0], v[:, 0] = 6 * signs[:, 0], 1  # scores of about 4.8, as much weight as 120 keys of score 0
    o = attend(*map(jnp.asarray, (q, k, v)), np.zeros(N, np.float32), scale=1 / H, implementation="splash")
    share_TN = np.asarray(o, np.float64).mean(-1)[0, 64:]
    found = np.log(share_TN / (1 - share_TN)) + np.log(np.arange(64, T))[:, None]
    exact = np.einsum("TNH,NH->TN", q[0, 64:].astype(np.float64), k[0, 0].astype(np.float64)) / H
    assert abs(found.sum() / exact.sum() - 1) < 3e-4


@pytest.mark.slow
def test_bfloat16_errs_like_the_reference_with_its_float32_bias():
    *inputs, _ = make_inputs(B=1, T=1300, N=3, H=80, dtype=jnp.bfloat16)
    slopes_N = alibi_slopes(32, scaling=1.0)[[0, 5, 31]]  # steep, in between, flat
    expected = oracle(*inputs, slopes_N, scale=1 / 80)
    splash, reference = (
        root_mean_square_errors(name, *inputs, slopes_N, expected=expected) for name in ("splash", "reference")
    )
    assert splash[0] < reference[0] < 3e-3
    # The kernel rounds q x scale and the gradient of the scores to bfloat16, which the reference does not.
    for name, ours, theirs in zip(NAMES[1:], splash[1:], reference[1:], strict=True):
        assert ours < 1.6 * theirs and ours < 4e-3, name


@pytest.mark.parametrize("length", [1000, MAX_LENGTH])
def test_the_lanes_hold_alibi_exactly(length):
    """Every lane is a bfloat16, and their products add up to slope x offset for every pair of positions."""
    slopes_N = alibi_slopes(6, scaling=1.7)
    lanes = jax.jit(functools.partial(alibi_lanes, length=length, head_dim=2, width=2 + NUM_LANES + 3))(slopes_N)
    for x in lanes:
        np.testing.assert_array_equal(x, x.astype(jnp.bfloat16).astype(jnp.float32))
        assert not np.any(x[..., :2]) and not np.any(x[..., 2 + NUM_LANES :])
    t, s = np.random.default_rng(0).integers(length, size=(2, 2000))
    q, k = (np.asarray(x, np.float64) for x in lanes)
    scores = np.einsum("PNW,PNW->NP", q[t], k[s])
    np.testing.assert_array_equal(scores, slopes_N[:, None].astype(np.float64) * (s - t)[None])


def test_slopes_are_split_without_loss():
    slopes_N = alibi_slopes(24, scaling=2.3)
    parts_NP = np.asarray(jax.jit(bfloat16_parts)(slopes_N), np.float64)
    np.testing.assert_array_equal(parts_NP.sum(1), slopes_N.astype(np.float64))
    assert np.all(np.abs(parts_NP[:, 1]) <= np.abs(parts_NP[:, 0]) / 128)


def test_a_length_that_the_lanes_cannot_count_is_refused():
    with pytest.raises(ValueError, match="counts 65,536 positions; got a length of 65,537"):
        alibi_lanes(jnp.ones(1), length=MAX_LENGTH + 1, head_dim=80, width=128)


def test_auto_on_a_cpu_calls_no_kernel():
    *inputs, slopes_N = make_inputs(B=1, T=9, N=2, H=4)
    calls = {
        name: num_kernels(
            functools.partial(attend_and_gradients, slopes_N=slopes_N, scale=0.1, implementation=name), *inputs
        )
        for name in ("auto", "splash")
    }
    assert calls == {"auto": 0, "splash": 3}


def test_no_array_grows_with_the_square_of_the_length():
    B, T, N, H = 1, 8192, 4, 80
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)
    step = functools.partial(attend_and_gradients, scale=1 / H, implementation="splash")
    jaxpr = jax.make_jaxpr(step)(x, x, x, x, jax.ShapeDtypeStruct((N,), jnp.float32)).jaxpr
    sizes = [value.aval.size for part in subjaxprs(jaxpr) for e in part.eqns for value in e.outvars]
    assert max(sizes) == B * N * T * TPU_LANES


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("H", [80, 128])
def test_it_compiles_for_a_tpu_at_8192_tokens(H):
    B, T, N = 2, 8192, 32
    assert block_size(T) == MAX_BLOCK
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), devices=slice_devices("v5e:2x2"))
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp", None, "tensor", None)))
    slopes = jax.ShapeDtypeStruct((N,), jnp.float32, sharding=NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        lowered = attend_and_gradients.lower(x, x, x, x, slopes, scale=1 / H, implementation="splash")
        compiled = lowered.compile()
    assert num_kernels_compiled(compiled) == 3
    rows = (B // 2) * (N // 2) * T  # of a device
    lanes = TPU_LANES if H + NUM_LANES <= TPU_LANES else 2 * TPU_LANES
    # bfloat16 q, k, v and two gradients; the log-sum-exp, which the kernel writes in float32 across a whole tile.
    assert compiled.memory_analysis().temp_size_in_bytes < rows * (5 * 2 * lanes + 4 * TPU_LANES)


@needs_libtpu
def test_a_remat_policy_that_keeps_the_output_runs_the_forward_kernel_once():
    assert num_kernels_under_remat("splash", num_heads=2) == (3, 4)  # forward, dq, dk with dv; forward again
