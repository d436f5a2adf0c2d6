"""Documents that do not see each other: every implementation against each document alone, and no array [T, T].

test_attention_tpu.py compiles the TPU kernels with them, test_gpu.py lowers cuDNN's.
"""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.attention import NAMES, attend_and_gradients, errors, make_inputs, oracle, subjaxprs

from btlm_jax.attention import attend, tpu

PACKED_ERROR = 1e-5
# Lengths of the documents of two rows; blocks have up to 256 (blockwise) and 64 or 128 (cpu) positions.
ROWS = {
    "one block": ((5, 1, 1, 20, 10), (37,)),
    "borders of blocks": ((192, 64, 65, 63), (127, 1, 129, 127)),
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


def assert_attends_as_each_alone(implementation, rows, *, N, H, is_spoilt):
    """Compare output and gradients; `is_spoilt`: with the first row's first document not finite, and left out.

    It must fill a block: then nothing else is NaN, because its block is not computed. 0 times NaN would be seen.
    """
    starts_BT = starts_of(rows)
    *inputs, slopes_N = make_inputs(B=len(rows), T=starts_BT.shape[1], N=N, H=H)
    expected = oracle_of_each_alone(*inputs, slopes_N, rows, scale=0.3)
    spoilt = np.s_[:1, : rows[0][0] if is_spoilt else 0]
    inputs = [x.at[spoilt].set(jnp.nan) for x in inputs]
    results = attend_and_gradients(*inputs, slopes_N, starts_BT, scale=0.3, implementation=implementation)
    assert all(np.isnan(result[spoilt]).all() for result in results)
    for value in expected:
        value[spoilt] = 0
    for name, error in zip(NAMES, errors([x.at[spoilt].set(0) for x in results], expected), strict=True):
        assert error < PACKED_ERROR, name


@pytest.mark.slow
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
    assert_attends_as_each_alone(implementation, ROWS[kind], N=3, H=12, is_spoilt=kind == "borders of blocks")


@pytest.mark.slow
def test_the_tpu_kernels_in_interpret_mode():
    """In blocks of 128; benchmarks/document_mask.py has more lengths, and little vector memory."""
    limits = dataclasses.replace(tpu._SMALL_VMEM, block_positions=128, block_bytes=1 << 20, resident_bytes=1 << 24)
    with mock.patch.object(tpu, "_limits", lambda: limits):
        assert_attends_as_each_alone("tpu", ((128, 60, 108, 20, 68),), N=1, H=128, is_spoilt=True)


def test_a_mesh_changes_nothing():
    """Sequences, positions and heads over devices: each gets the documents of its own whole sequences."""
    rows = ((70, 200, 30), (1, 1, 298), (150, 150), (299, 1))
    starts_BT = jnp.asarray(starts_of(rows))
    *inputs, slopes_N = make_inputs(B=4, T=300, N=8, H=12)
    expected = attend_and_gradients(*inputs, slopes_N, starts_BT, scale=0.3, implementation="cpu")
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "context", "tensor"))
    with jax.set_mesh(mesh):
        spec = P("fsdp", "context", "tensor")
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in inputs]
        starts_BT = jax.device_put(starts_BT, NamedSharding(mesh, P(*spec[:2])))
        results = attend_and_gradients(*placed, slopes_N, starts_BT, scale=0.3, implementation="cpu")
    for name, result, value in zip(NAMES, results, expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("implementation", ["blockwise", "cpu", "tpu", "splash"])
def test_no_array_has_the_length_twice(implementation):
    B, T, N, H = 1, 4096, 4, 80
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)
    starts_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
    step = functools.partial(attend_and_gradients, scale=1 / H, implementation=implementation)
    jaxpr = jax.make_jaxpr(step)(x, x, x, x, jax.ShapeDtypeStruct((N,), jnp.float32), starts_BT).jaxpr
    shapes = [value.aval.shape for part in subjaxprs(jaxpr) for each in part.eqns for value in each.outvars]
    assert (B, T, N, H) in shapes
    assert not [shape for shape in shapes if shape.count(T) > 1]


def test_starts_of_another_shape_are_refused():
    *inputs, _, slopes_N = make_inputs(B=1, T=8, N=2, H=4)
    for starts_BT in (jnp.zeros((1, 7), jnp.int32), jnp.zeros((1, 8))):
        with pytest.raises(ValueError, match=r"over \(1, 8\) positions needs documents' starts of that shape, int32"):
            attend(*inputs, slopes_N, scale=1.0, implementation="reference", starts_BT=starts_BT)
