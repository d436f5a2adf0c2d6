"""The TPU kernels that take heads side by side: against float64 in interpret mode, and compiled for TPUs."""

import dataclasses
import functools
from unittest import mock

import jax
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

from btlm_jax import attention
from btlm_jax.attention import tpu
from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.attention.tpu_kernels import Heads
from btlm_jax.plan.chips import slice_devices
from btlm_jax.recipe.sizes import _widths, shape_of


@pytest.mark.slow
@pytest.mark.parametrize(
    "B, T, N, H, together",
    [
        (1, 150, 4, 64, 2),  # one block, partly padding; two programs of two heads
        pytest.param(*(2, 131, 6, 80, 6), marks=pytest.mark.slow),  # heads that fill no whole tiles
        pytest.param(*(1, 600, 8, 80, 8), marks=pytest.mark.slow),  # two blocks; heads across the border of tiles
        (1, 70, 32, 128, 1),
        pytest.param(*(1, 140, 2, 192, 2), marks=pytest.mark.slow),  # heads of a tile and a half
        pytest.param(*(1, 1100, 3, 24, 3), marks=pytest.mark.slow),  # three blocks
    ],
)
def test_output_and_gradients_match_float64(B, T, N, H, together):
    assert Heads(num=N, dim=H, scale=1.0, itemsize=4).together == together
    *inputs, slopes_N = make_inputs(B=B, T=T, N=N, H=H)
    results = attend_and_gradients(*inputs, slopes_N, scale=3 / H, implementation="tpu")
    # ALiBi is counted from a block's first query, whose distance comes off again: a rounding of the largest score.
    allowed = FLOAT32_ERROR + slopes_N.max() * 512 * 2.0**-24
    for name, error in zip(NAMES, errors(results, oracle(*inputs, slopes_N, scale=3 / H)), strict=True):
        assert error < allowed, name


@pytest.mark.slow
def test_little_vector_memory_changes_no_bit():
    """Keys split again for every block of queries, and the backward pass in three spans."""
    *inputs, slopes_N = make_inputs(B=1, T=700, N=2, H=64)

    def run(*inputs):
        with mock.patch.object(tpu, "block_size", lambda heads, length: 256):
            return attend_and_gradients.__wrapped__(*inputs, slopes_N, scale=1 / 64, implementation="tpu")

    whole = jax.jit(lambda *inputs: run(*inputs))(*inputs)
    with mock.patch.object(tpu, "_limits", lambda: dataclasses.replace(tpu._LARGE_VMEM, resident_bytes=1)):
        parts = jax.jit(lambda *inputs: run(*inputs))(*inputs)  # another function: it is traced anew
    assert num_kernels(run, *inputs) == 2
    for name, one, other in zip(NAMES, whole, parts, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=name)


@pytest.mark.slow
def test_bfloat16_errs_like_the_reference():
    *inputs, _ = make_inputs(B=1, T=700, N=4, H=80, dtype=jnp.bfloat16)
    slopes_N = alibi_slopes(32, scaling=1.0)[[0, 5, 14, 31]]  # from steep to flat
    expected = oracle(*inputs, slopes_N, scale=1 / 80)
    ours, reference = (
        root_mean_square_errors(name, *inputs, slopes_N, expected=expected) for name in ("tpu", "reference")
    )
    # The kernels round weights and the gradients of scores to bfloat16, which the reference does not.
    for name, error, theirs in zip(NAMES, ours, reference, strict=True):
        assert error < 1.8 * theirs and error < 4e-3, name


@pytest.mark.parametrize(
    "kind, N, H, T, block, at_once",
    [
        ("TPU v5 lite", 32, 80, 8192, 512, 16),  # the 3B: all queries
        ("TPU v5", 4, 80, 8192, 512, 16),
        ("TPU v5 lite", 16, 72, 8192, 512, 9),  # 13 MiB of scratch and 24 of blocks leave 22 for dq, of 2.25 each
        ("TPU v5", 16, 104, 8192, 512, 3),
        ("TPU v5 lite", 20, 128, 32768, 512, 64),  # a head at a time
        ("TPU v4", 4, 80, 8192, 256, 12),
        ("TPU v4", 16, 72, 2048, 128, 7),
    ],
)
def test_blocks_are_as_large_as_the_vector_memory_allows(kind, N, H, T, block, at_once):
    """The numbers were seen to compile; benchmarks/kernel_vmem.py compiles them, and that a little more does not."""
    heads = Heads(num=N, dim=H, scale=1.0, itemsize=2)
    with mock.patch.object(tpu, "device_kind", lambda: kind):
        assert tpu.block_size(heads, T) == block and tpu._queries_at_once(heads, T, block) == at_once


def test_every_size_has_kernels_on_every_tpu():
    """All heads that `btlm new` gives a model, split between devices in every way."""
    shapes = {(shape_of(d_model=D, num_layers=1, vocab_size=400)) for D in _widths() if D <= 16_384}
    split = {(shape.num_heads >> n, shape.head_dim) for shape in shapes for n in range(shape.num_heads.bit_length())}
    assert {(16, 72), (32, 80), (1, 112), (128, 80)} <= split
    for kind in ("TPU v4", "TPU v5", "TPU v5 lite", "TPU v6 lite"):
        with mock.patch.object(tpu, "device_kind", lambda kind=kind: kind):
            assert [each for each in split if not tpu.has_kernels_for(*each, jnp.bfloat16)] == []


def test_heads_that_do_not_fit_are_left_to_splash_or_refused():
    q_BTNH = jnp.zeros((1, 128, 36, 80), jnp.bfloat16)
    with (
        mock.patch.object(tpu, "device_kind", lambda: "TPU v4"),
        mock.patch.object(attention, "platform", lambda: "tpu"),
    ):
        assert attention._implementation_for(q_BTNH, has_documents=False) == "splash"
        assert attention._implementation_for(q_BTNH[:, :, :32], has_documents=False) == "tpu"
        for length, chosen in ((65_536, "splash"), (65_537, "blockwise")):
            long_BTNH = jax.ShapeDtypeStruct((1, length, 36, 80), jnp.bfloat16)
            assert attention._implementation_for(long_BTNH, has_documents=False) == chosen
        with pytest.raises(
            ValueError, match="36 heads of 80 a device in bfloat16 do not fit the vector memory of a TPU"
        ):
            attention.attend(*3 * [q_BTNH], jnp.ones(36), scale=1.0, implementation="tpu")


def test_no_array_grows_with_the_square_of_the_length_or_is_wider_than_the_heads():
    B, T, N, H = 1, 8192, 8, 80
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)
    step = functools.partial(attend_and_gradients, scale=1 / H, implementation="tpu")
    jaxpr = jax.make_jaxpr(step)(x, x, x, x, jax.ShapeDtypeStruct((N,), jnp.float32)).jaxpr
    sizes = [value.aval.size for part in subjaxprs(jaxpr) for each in part.eqns for value in each.outvars]
    assert max(sizes) == B * T * N * H


def compile_for(topology: str, *, B: int, T: int, N: int, H: int, has_documents: bool):
    """Compile forward and backward for a chip of a slice."""
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), devices=slice_devices(topology)[:1])
    x = jax.ShapeDtypeStruct((B, T, N * H), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    slopes = jax.ShapeDtypeStruct((N,), jnp.float32, sharding=NamedSharding(mesh, P()))
    starts = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=NamedSharding(mesh, P()))

    def step(slopes_N, starts_BT, *inputs):  # side by side, as projections write and read them
        inputs = [x.reshape(B, T, N, H) for x in inputs]
        results = attend_and_gradients(*inputs, slopes_N, starts_BT, scale=1 / H, implementation="auto")
        return [x.reshape(B, T, N * H) for x in results]

    with jax.set_mesh(mesh):
        return jax.jit(step).lower(slopes, starts if has_documents else None, x, x, x, x).compile()


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    "topology, T, N, H, kernels, has_documents",
    [
        ("v5e:2x2", 8192, 16, 72, 3, False),  # 16 heads together: more than 60 MiB for all queries at once
        ("v6e:2x2", 2048, 4, 80, 2, True),  # as context parallelism leaves them
        ("v4:2x2x1", 2048, 16, 72, 4, False),  # little vector memory: the passes in spans
    ],
)
def test_they_compile_for_tpus(topology, T, N, H, kernels, has_documents):
    compiled = compile_for(topology, B=1, T=T, N=N, H=H, has_documents=has_documents)
    assert num_kernels_compiled(compiled) == kernels
    # Beside results the log-sum-exp and its like, in float32; where there are spans, their sums of dk and dv.
    rows = N * T * 4
    assert compiled.memory_analysis().temp_size_in_bytes <= 3 * rows + (kernels > 2) * 6 * rows * H
    assert f"{T},{T}]" not in compiled.as_text()


@pytest.mark.slow
@needs_libtpu
def test_a_remat_policy_that_keeps_the_output_runs_the_forward_kernel_once():
    assert num_kernels_under_remat("tpu", num_heads=8) == (2, 3)
