"""Documents that do not see each other: every implementation against each document alone, and what is compiled."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.attention import NAMES, OURS, errors, make_inputs, num_kernels_compiled, oracle, subjaxprs
from support.tpu import needs_libtpu

from btlm_jax.attention import attend, tpu
from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.plan.chips import slice_devices

PACKED_ERROR = 1e-5
FIRST, SECOND = slice(256), slice(256, 512)
# Lengths of the documents of two rows; blocks have 256 (blockwise), 64 or 128 (cpu) and 128 positions (tpu, below).
ROWS = {
    "one block": ((5, 1, 1, 20, 10), (37,)),
    "borders of blocks": ((128, 64, 128, 64), (127, 1, 129, 127)),
    "several blocks": ((100, 3, 260, 1, 1, 1, 234), (300, 300)),
    "many": ((1,) * 70 + (130,), (64, 64, 72)),
}


def starts_of(rows) -> np.ndarray:
    return np.stack([np.repeat(np.cumsum((0, *lengths[:-1])), lengths) for lengths in rows]).astype(np.int32)


def oracle_of_each_alone(q, k, v, do, slopes_N, rows, *, scale):
    """Return what `oracle` does of every document as a sequence of its own."""
    results = [np.zeros(q.shape) for _ in NAMES]
    for b, lengths in enumerate(rows):
        for stop, length in zip(np.cumsum(lengths), lengths, strict=True):
            own = np.s_[b : b + 1, stop - length : stop]
            for result, part in zip(
                results, oracle(*(x[own] for x in (q, k, v, do)), slopes_N, scale=scale), strict=True
            ):
                result[own] = part
    return results


@functools.partial(jax.jit, static_argnames=("scale", "implementation"))
def masked_and_gradients(q, k, v, do, slopes_N, starts_BT, *, scale, implementation):
    def function(q, k, v):
        return attend(q, k, v, slopes_N, scale=scale, implementation=implementation, starts_BT=starts_BT)

    o, vjp = jax.vjp(function, q, k, v)
    return o, *vjp(do)


@pytest.mark.parametrize(
    "implementation, kind",
    [
        ("reference", "one block"),
        ("blockwise", "borders of blocks"),
        *(("cpu", kind) for kind in ROWS),
        ("splash", "many"),
    ],
)
def test_packed_documents_attend_as_each_alone(implementation, kind):
    """The steepest head's window is some 50 positions here, shorter than documents."""
    rows = ROWS[kind]
    starts_BT = starts_of(rows)
    *inputs, slopes_N = make_inputs(B=2, T=starts_BT.shape[1], N=3, H=12)
    results = masked_and_gradients(*inputs, slopes_N, starts_BT, scale=0.3, implementation=implementation)
    expected = oracle_of_each_alone(*inputs, slopes_N, rows, scale=0.3)
    for name, error in zip(NAMES, errors(results, expected), strict=True):
        assert error < PACKED_ERROR, name


@pytest.mark.slow
def test_the_tpu_kernels_in_interpret_mode():
    """In blocks of 128; benchmarks/document_mask.py has more lengths, and little vector memory.

    The third document is not finite, and has a block of its own, which is not read: 0 times it would be seen.
    """
    lengths, spoilt = (60, 68, 128, 20, 40, 68), np.s_[:, 128:256]
    starts_BT = starts_of((lengths,))
    *inputs, slopes_N = make_inputs(B=1, T=sum(lengths), N=2, H=64)
    expected = oracle_of_each_alone(*inputs, slopes_N, (lengths,), scale=1 / 64)
    limits = tpu._Limits(block_positions=128, block_bytes=1 << 20, resident_bytes=1 << 24, vmem_bytes=1 << 24)
    with mock.patch.object(tpu, "_limits", lambda: limits):
        results = masked_and_gradients.__wrapped__(
            *(x.at[spoilt].set(jnp.nan) for x in inputs),
            slopes_N,
            jnp.asarray(starts_BT),
            scale=1 / 64,
            implementation="tpu",
        )
    for result, value in zip(results, expected, strict=True):
        assert np.isnan(result[spoilt]).all()
        value[spoilt] = 0
    for name, error in zip(NAMES, errors([x.at[spoilt].set(0) for x in results], expected), strict=True):
        assert error < PACKED_ERROR, name


@pytest.mark.parametrize("implementation", OURS)
def test_blocks_of_other_documents_are_not_computed(implementation):
    """What is not finite in another block's document changes no bit: it was not multiplied by a weight of 0 either."""
    *inputs, slopes_N = make_inputs(B=1, T=512, N=2, H=64)
    starts_BT = jnp.asarray(starts_of(((256, 256),)))
    attended, *again = (
        masked_and_gradients(*each, slopes_N * 0, starts_BT, scale=1 / 64, implementation=implementation)
        for each in (inputs, *([x.at[:, part].set(jnp.nan) for x in inputs] for part in (FIRST, SECOND)))
    )
    for results, part in zip(again, (SECOND, FIRST), strict=True):
        for name, result, value in zip(NAMES, results, attended, strict=True):
            np.testing.assert_array_equal(result[:, part], value[:, part], err_msg=name)


def test_a_mesh_changes_nothing():
    """Sequences, positions and heads over devices: each gets the documents of its own whole sequences."""
    rows = ((70, 200, 30), (1, 1, 298), (150, 150), (299, 1))
    starts_BT = jnp.asarray(starts_of(rows))
    *inputs, slopes_N = make_inputs(B=4, T=300, N=8, H=12)
    expected = masked_and_gradients(*inputs, slopes_N, starts_BT, scale=0.3, implementation="cpu")
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "context", "tensor"))
    with jax.set_mesh(mesh):
        spec = P("fsdp", "context", "tensor")
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in inputs]
        starts_BT = jax.device_put(starts_BT, NamedSharding(mesh, P(*spec[:2])))
        results = masked_and_gradients(*placed, slopes_N, starts_BT, scale=0.3, implementation="cpu")
    for name, result, value in zip(NAMES, results, expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("implementation", ["blockwise", "cpu", "tpu", "splash"])
def test_no_array_has_the_length_twice(implementation):
    B, T, N, H = 1, 4096, 4, 80
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)
    starts_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
    step = functools.partial(masked_and_gradients, scale=1 / H, implementation=implementation)
    jaxpr = jax.make_jaxpr(step)(x, x, x, x, jax.ShapeDtypeStruct((N,), jnp.float32), starts_BT).jaxpr
    shapes = [value.aval.shape for part in subjaxprs(jaxpr) for each in part.eqns for value in each.outvars]
    assert (B, T, N, H) in shapes
    assert not [shape for shape in shapes if shape.count(T) > 1]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    "topology, T, N, implementation, kernels",
    [("v5e:2x2", 8192, 4, "tpu", 2), ("v4:2x2x1", 8192, 16, "tpu", 7), ("v5e:2x2", 8192, 4, "splash", 3)],
)
def test_it_compiles_for_tpus(topology, T, N, implementation, kernels):
    B, H = 1, 80
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), devices=slice_devices(topology)[:1])
    replicated = NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16, sharding=replicated)
    starts_BT = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=replicated)
    slopes_N = alibi_slopes(N, scaling=1.0)
    with jax.set_mesh(mesh):
        lowered = masked_and_gradients.lower(
            x, x, x, x, slopes_N, starts_BT, scale=1 / H, implementation=implementation
        )
        compiled = lowered.compile()
    assert num_kernels_compiled(compiled) == kernels
    assert f"{T},{T}]" not in compiled.as_text()


def test_starts_of_another_shape_are_refused():
    *inputs, _, slopes_N = make_inputs(B=1, T=8, N=2, H=4)
    for starts_BT in (jnp.zeros((1, 7), jnp.int32), jnp.zeros((1, 8))):
        with pytest.raises(ValueError, match=r"over \(1, 8\) positions needs documents' starts of that shape, int32"):
            attend(*inputs, slopes_N, scale=1.0, implementation="reference", starts_BT=starts_BT)
