"""Attention against a float64 oracle written here, and its memory, causality and behaviour on meshes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support.attention import FLOAT32_ERROR, NAMES, OURS, attend_and_gradients, errors, make_inputs, oracle

from btlm_jax.attention import attend
from btlm_jax.attention.alibi import alibi_window
from btlm_jax.attention.blockwise import BLOCK, MAX_WIDTHS, block_size

LEAVING_OUT = (*OURS, "tpu")  # keys beyond a head's window
PORTABLE = ("reference", *OURS)  # held to one tolerance; kernels of other devices have files of their own
RUN_HERE = (*PORTABLE, "tpu", "splash")  # kernels interpreted


SHAPES = [
    (3, 1, 2, 5),
    (2, 37, 4, 64),  # one block, not a power of two
    (1, 333, 1, 43),  # no multiple of anything
    (1, 261, 6, 80),  # two blocks, the last position of the second padding
    (2, 70, 32, 128),  # many heads, of which 4 run at once and 7 could
    (5, 170, 3, 16),  # 15 heads that 512 // 170 divides
    (1, 1098, 3, 24),  # five blocks, two positions of padding
]


@pytest.mark.parametrize(
    "implementation, B, T, N, H",
    [
        *(("reference", *shape) for shape in SHAPES[:3]),  # which has no blocks
        *((implementation, *shape) for implementation in OURS for shape in SHAPES),
    ],
)
def test_output_and_gradients_match_float64(implementation, B, T, N, H):
    *inputs, slopes_N = make_inputs(B=B, T=T, N=N, H=H)
    results = attend_and_gradients(*inputs, slopes_N, scale=3 / H, implementation=implementation)
    for name, error in zip(NAMES, errors(results, oracle(*inputs, slopes_N, scale=3 / H)), strict=True):
        assert error < FLOAT32_ERROR, name


@pytest.mark.slow
def test_blockwise_matches_float64_when_blocks_share_widths():
    T = 2400
    assert T // block_size(T) > MAX_WIDTHS
    *inputs, slopes_N = make_inputs(B=1, T=T, N=2, H=80)
    slopes_N = np.asarray([0.3, 1e-4], np.float32)  # the first head sees some 60 positions back, the second everything
    results = attend_and_gradients(*inputs, slopes_N, scale=1 / 80, implementation="blockwise")
    for name, error in zip(NAMES, errors(results, oracle(*inputs, slopes_N, scale=1 / 80)), strict=True):
        assert error < FLOAT32_ERROR, name


@pytest.mark.slow
@pytest.mark.parametrize("implementation", LEAVING_OUT)
def test_keeps_a_far_key_whose_score_outweighs_its_distance(implementation):
    T, H = 1100, 8
    q, k, v, do, _ = make_inputs(B=1, T=T, N=1, H=H)
    q, k = np.array(q), np.array(k)
    q[..., 0], k[:, 0, :, 0] = 8.0, 8.0  # 64 nats for key 0, 55 off for the last query's distance
    slopes_N = np.asarray([0.05], np.float32)
    assert alibi_window(0.0, slopes_N[0], xp=np) < T  # were all scores alike, key 0 would be left out
    results = attend_and_gradients(q, k, v, do, slopes_N, scale=1.0, implementation=implementation)
    for name, error in zip(NAMES, errors(results, oracle(q, k, v, do, slopes_N, scale=1.0)), strict=True):
        assert error < 2e-5, name  # one float32 rounding of a score of 64 is 4e-6


@pytest.mark.slow
@pytest.mark.parametrize("implementation, block", [("blockwise", BLOCK), ("cpu", BLOCK), ("tpu", 512)])
def test_does_not_read_keys_that_cannot_count(implementation, block):
    q, k, v, do, _ = make_inputs(B=1, T=4 * block, N=1, H=8)
    v = np.array(v)
    v[:, 0] = np.inf
    slopes_N = np.asarray([1.0], np.float32)
    o, dq, *_ = attend_and_gradients(q, k, v, do, slopes_N, scale=0.1, implementation=implementation)
    o, dq = np.asarray(o), np.asarray(dq)
    assert not np.isfinite(o[:, 0]).any()
    assert np.isfinite(o[:, 2 * block :]).all() and np.isfinite(dq[:, 2 * block :]).all()


@pytest.mark.parametrize("implementation", OURS)
def test_survives_scores_far_beyond_the_range_of_exp(implementation):
    q, k, v, do, slopes_N = make_inputs(B=1, T=150, N=2, H=8)
    q, k = 30 * np.asarray(q), 30 * np.asarray(k)
    results = attend_and_gradients(q, k, v, do, slopes_N, scale=1.0, implementation=implementation)
    for name, error in zip(NAMES, errors(results, oracle(q, k, v, do, slopes_N, scale=1.0)), strict=True):
        assert error < 1e-3, name  # one float32 rounding of a score of 10,000 is 1e-3


@pytest.mark.parametrize("implementation", OURS)
def test_in_bfloat16_errs_by_two_roundings_more_than_the_reference(implementation):
    *inputs, slopes_N = make_inputs(B=2, T=141, N=4, H=63, dtype=jnp.bfloat16)  # odd: kernels may multiply pairs
    expected = oracle(*inputs, slopes_N, scale=1 / 8)
    both = (implementation, "reference")
    results = {name: attend_and_gradients(*inputs, slopes_N, scale=1 / 8, implementation=name) for name in both}
    assert all(x.dtype == jnp.bfloat16 for x in results[implementation])
    for name, ours, theirs in zip(NAMES, *(errors(results[name], expected) for name in both), strict=True):
        # Kernels that multiply pairs of bfloat16 round weights and gradients of scores, the reference does not.
        assert ours < 2 * theirs and ours < 8e-3, name


@pytest.mark.parametrize("implementation", RUN_HERE)
def test_no_output_depends_on_a_later_input(implementation):
    t = 66
    q, k, v, do, slopes_N = make_inputs(B=1, T=140, N=2, H=8)
    do = np.where(np.arange(140)[:, None, None] == t, np.asarray(do), 0)
    slopes_N = slopes_N / 4
    assert t < alibi_window(0.0, slopes_N.max(), xp=np)  # every key is seen
    results = attend_and_gradients(q, k, v, do, slopes_N, scale=1 / 8, implementation=implementation)
    _, dq, dk, dv = map(np.asarray, results)
    for gradient in (dq, dk, dv):
        assert np.all(gradient[:, t + 1 :] == 0)
    assert np.all(np.any(dk[:, : t + 1] != 0, axis=-1))


@pytest.mark.parametrize("implementation", OURS)
def test_memory_grows_with_the_block_not_with_the_square(implementation):
    B, T, N, H = 1, 8192, 4, 16
    shapes = [jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)] * 4 + [jax.ShapeDtypeStruct((N,), jnp.float32)]
    compiled = attend_and_gradients.lower(*shapes, scale=1 / H, implementation=implementation).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 8 * (T * block_size(T) * 4) + 12 * (B * T * N * H * 4)
    assert temporary < N * T * T * 4 / 16


@pytest.mark.parametrize(
    "implementation, mesh_shape",
    [
        *(("blockwise", shape) for shape in [(4, 1, 1, 2), (1, 2, 2, 2), (1, 1, 4, 1)]),
        *(("reference", (4, 1, 1, 2)), ("cpu", (1, 2, 2, 2))),
        pytest.param("tpu", (2, 1, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_meshes_change_nothing(implementation, mesh_shape):
    """Value and gradients through scan, checkpoint and jit under explicit sharding equal those without a mesh.

    Positions are split over two axes, heads over one: on 2 x 2 x 2 devices each attends with 1 of the 8 heads.
    """
    inputs, step, expected = without_mesh(implementation)
    axes = ("fsdp", "batch_or_context", "context", "tensor")
    spec = P("fsdp", ("batch_or_context", "context"), "tensor", None)
    with jax.set_mesh(jax.make_mesh(mesh_shape, axes, devices=jax.devices()[: math.prod(mesh_shape)])):
        results = jax.tree.leaves(step(*(jax.device_put(x, spec) for x in inputs)))
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(np.asarray(result), np.asarray(value), rtol=2e-5, atol=2e-5)
    for gradient in results[1:]:
        assert gradient.sharding.spec == spec


@functools.cache
def without_mesh(implementation):
    """Return q, k, v and do, the function of them, and its value and gradients."""
    *inputs, slopes_N = make_inputs(B=4, T=72, N=8, H=10)
    step = make_layers(implementation, slopes_N)
    return inputs, step, jax.tree.leaves(step(*inputs))


def make_layers(implementation, slopes_N):
    def loss(q, k, v, do):
        def layer(q, _):
            return q + attend(q, k, v, slopes_N, scale=0.1, implementation=implementation), None

        saved = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
        out, _ = jax.lax.scan(jax.checkpoint(layer, policy=saved, prevent_cse=False), q, None, length=2)
        return (out * do).sum() / do.size

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def test_a_remat_policy_can_keep_the_output_and_the_log_sum_exp():
    *inputs, slopes_N = make_inputs(B=1, T=70, N=2, H=8)

    def count_exponentials(policy):
        def function(q):
            return attend(q, *inputs[1:3], slopes_N, scale=0.1, implementation="blockwise").sum()

        return str(jax.make_jaxpr(jax.grad(jax.checkpoint(function, policy=policy)))(inputs[0])).count(" exp ")

    saved = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    assert count_exponentials(saved) < count_exponentials(jax.checkpoint_policies.nothing_saveable)


@pytest.mark.slow
def test_slopes_are_constants():
    q, k, v, do, slopes_N = make_inputs(B=1, T=9, N=2, H=4)

    def total(slopes_N):
        return sum(attend(q, k, v, slopes_N, scale=1.0, implementation=name).sum() for name in RUN_HERE)

    assert np.all(np.asarray(jax.jit(jax.grad(total))(slopes_N)) == 0)


def test_wrong_calls_are_refused():
    q, k, v, _, slopes_N = make_inputs(B=4, T=8, N=2, H=4)
    with pytest.raises(ValueError, match="'flash' is not known; allowed are auto, reference, blockwise"):
        attend(q, k, v, slopes_N, scale=1.0, implementation="flash")
    with pytest.raises(ValueError, match="one shape"):
        attend(q, k[:, :4], v, slopes_N, scale=1.0, implementation="blockwise")
    with pytest.raises(ValueError, match="one dtype; got float32, bfloat16 and float32"):  # kernels read by q's alone
        attend(q, k.astype(jnp.bfloat16), v, slopes_N, scale=1.0, implementation="auto")
    with pytest.raises(ValueError, match="over 2 heads"):
        attend(q, k, v, slopes_N[:1], scale=1.0, implementation="blockwise")
    with jax.set_mesh(jax.make_mesh((2, 2), ("fsdp", "tensor"), devices=jax.devices()[:4])):
        batch, head_dim = P("fsdp", None, "tensor", None), P("fsdp", None, None, "tensor")
        with pytest.raises(ValueError, match="cannot shard the head dim"):
            attend(*(jax.device_put(x, head_dim) for x in (q, k, v)), slopes_N, scale=1.0, implementation="blockwise")
        with pytest.raises(ValueError, match="over 2 heads cannot be split 4 ways"):
            both = P(None, "fsdp", "tensor", None)
            attend(*(jax.device_put(x, both) for x in (q, k, v)), slopes_N, scale=1.0, implementation="blockwise")
        with pytest.raises(ValueError, match="sharded alike"):
            attend(
                jax.device_put(q, batch), *(jax.device_put(x, P("fsdp")) for x in (k, v)), slopes_N,
                scale=1.0, implementation="blockwise",
            )  # fmt: skip
