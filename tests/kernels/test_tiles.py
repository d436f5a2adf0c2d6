"""Products with tiled weights against float64, in the kernels and in XLA."""

import platform
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btlm_jax.kernels import build, tiles
from btlm_jax.kernels.tiles import (
    FloatTiles,
    Int4Tiles,
    Int8Tiles,
    columns,
    float_tiles,
    matmul,
    pack_codes,
    target_scores,
    tile_factors,
)

pytestmark = pytest.mark.fully_optimized

SHAPES = [(40, 56), (171, 101), (64, 32), (7, 3), (200, 157)]  # inputs, outputs: whole tiles and groups, and not
LAYERS = 3
# The kernels take one, three, and six to twelve at a time; from 48 on they copy rows, from 192 on in blocks of 96.
ROWS = {"kernels": (1, 2, 3, 13, 29, 61, 205), "XLA": (2, 13)}


@pytest.fixture(params=["kernels", "XLA"])
def way(request, monkeypatch):
    """Compute in the compiled kernels, or without them."""
    if request.param == "XLA":
        monkeypatch.setattr(tiles, "has_kernels", lambda: False)
    else:
        assert build.has_kernels(), "no C++ compiler here?"
    return request.param


def random_int4(K, M, *, seed=0):
    """Int4Tiles of random codes, and the float64 matrices that they stand for."""
    random, G = np.random.default_rng(seed), -(-K // 64)
    codes_LKM = random.integers(0, 16, (LAYERS, K, M)).astype(np.uint8)
    scale_LGM, offset_LGM = (random.standard_normal((LAYERS, G, M)).astype(np.float16) for _ in range(2))
    spread = [np.repeat(part.astype(np.float64), 64, axis=1)[:, :K] for part in (scale_LGM, offset_LGM)]
    packed = {
        "words": np.stack([pack_codes(codes_KM) for codes_KM in codes_LKM]),
        "scale": np.stack([tile_factors(scale_GM) for scale_GM in scale_LGM]),
        "offset": np.stack([tile_factors(offset_GM) for offset_GM in offset_LGM]),
    }
    arrays = {name: jnp.asarray(array) for name, array in packed.items()}
    return Int4Tiles(**arrays, num_inputs=K, num_outputs=M), codes_LKM * spread[0] + spread[1]


def random_int8(K, M, *, seed=0):
    """Int8Tiles of random codes, and the float64 matrices that they stand for."""
    random, G = np.random.default_rng(seed), -(-K // 64)
    codes_LKM = random.integers(-127, 128, (LAYERS, K, M)).astype(np.int8)
    scale_LGM = random.standard_normal((LAYERS, G, M)).astype(np.float16)
    words = jnp.asarray(np.stack([pack_codes(codes_KM) for codes_KM in codes_LKM]))
    scale = jnp.asarray(np.stack([tile_factors(scale_GM) for scale_GM in scale_LGM]))
    matrices_LKM = codes_LKM * np.repeat(scale_LGM.astype(np.float64), 64, axis=1)[:, :K]
    return Int8Tiles(words=words, scale=scale, num_inputs=K, num_outputs=M), matrices_LKM


def random_float(K, M, dtype, *, seed=0):
    """FloatTiles of random values, and the float64 matrices that they stand for."""
    matrices_LKM = np.random.default_rng(seed).standard_normal((LAYERS, K, M), np.float32)
    data = np.stack([float_tiles(matrix_KM, dtype=dtype) for matrix_KM in matrices_LKM])
    kept_LKM = matrices_LKM.astype(jnp.dtype(dtype)).astype(np.float64)
    return FloatTiles(data=jnp.asarray(data), num_inputs=K, num_outputs=M), kept_LKM


MAKE = {
    "float32": lambda K, M: random_float(K, M, "float32"),
    "bfloat16": lambda K, M: random_float(K, M, "bfloat16"),
    "int4": random_int4,
    "int8": random_int8,
}


def as_multiplied(x_RK, *, way, kind):
    """What products are of, float64: the processor's own of bfloat16 round several rows to it."""
    cpuinfo = Path("/proc/cpuinfo")
    has_own = cpuinfo.is_file() and "avx512_bf16" in cpuinfo.read_text().split()
    is_rounded = has_own and way == "kernels" and kind == "bfloat16" and len(x_RK) > 1
    return (x_RK.astype(jnp.bfloat16) if is_rounded else x_RK).astype(np.float64)


def products(x_RK: list[np.ndarray], made, layers: list[int]) -> list[np.ndarray]:
    """Multiply every x_RK by the matrix of its layer, in one program."""

    @jax.jit
    def run(x_RK, layers):
        return [matmul(x, made, layer=layer) for x, layer in zip(x_RK, layers, strict=True)]

    return list(map(np.asarray, run(x_RK, layers)))


@pytest.mark.parametrize("kind", MAKE)
def test_products(way, kind):
    odd = list(MAKE).index(kind) % 2  # XLA has no cases of its own for a shape: two or three of each kind
    for shape in SHAPES if way == "kernels" else SHAPES[odd::2]:
        made, matrices_LKM = MAKE[kind](*shape)
        x_RK = [np.random.default_rng(1).standard_normal((rows, shape[0]), np.float32) for rows in ROWS[way]]
        layers = [rows % LAYERS for rows in ROWS[way]]
        for x, layer, found_RM in zip(x_RK, layers, products(x_RK, made, layers), strict=True):
            exact_RK = as_multiplied(x, way=way, kind=kind)
            scale = np.abs(x).astype(np.float64) @ np.abs(matrices_LKM[layer])
            assert found_RM.shape == (len(x), shape[1])
            np.testing.assert_array_less(np.abs(found_RM - exact_RK @ matrices_LKM[layer]), 3e-6 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKE)
def test_a_product_shared_between_threads(kind):
    assert build.has_kernels(), "no C++ compiler here?"
    made, matrices_LKM = MAKE[kind](640, 1000)
    x_RK = np.random.default_rng(1).standard_normal((9, 640), np.float32)
    multiply = jax.jit(lambda x_RK: matmul(x_RK, made, layer=1))
    for rows in (1, 9):
        expected_RM = as_multiplied(x_RK[:rows], way="kernels", kind=kind) @ matrices_LKM[1]
        for _ in range(5):
            found_RM = multiply(x_RK[:rows])
            np.testing.assert_allclose(found_RM, expected_RM, atol=1e-5 * np.abs(expected_RM).max())


@pytest.mark.parametrize(
    "kind, shape",
    [("float32", SHAPES[1]), ("bfloat16", SHAPES[1]), ("int4", SHAPES[2]), ("int4", SHAPES[3]), ("int8", SHAPES[1])],
)
def test_columns_are_exact(kind, shape):
    made, matrices_LKM = MAKE[kind](*shape)
    wanted = np.array([0, shape[1] - 1, 2, 0])
    found_RK = jax.jit(columns)(made, wanted)
    np.testing.assert_allclose(found_RK, matrices_LKM[0][:, wanted].T, rtol=2e-7, atol=3e-7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKE)
def test_a_number_that_is_none_stays_one(way, kind):
    made, _ = MAKE[kind](70, 40)
    x_RK = [np.ones((rows, 70), np.float32) for rows in (1, 4)]
    for x in x_RK:
        x[-1, 69] = np.nan
    for found_RM in products(x_RK, made, [1, 1]):
        assert np.isnan(found_RM[-1]).all() and not np.isnan(found_RM[:-1]).any()


@pytest.mark.parametrize("kind", MAKE)
def test_scores_of_targets(kind):
    """Losses and ranks against a softmax in float64, of several tasks' outputs and blocks of rows."""
    assert build.has_kernels(), "no C++ compiler here?"
    (K, M), scale = (70, 1100), {"int4": 0.05, "int8": 0.002}.get(kind, 0.4)  # logits of some 10
    made, matrices_LKM = MAKE[kind](K, M)
    for rows in (2, 9, 205):
        x_RK = np.random.default_rng(rows).standard_normal((rows, K), np.float32)
        exact_RM = scale * (as_multiplied(x_RK, way="kernels", kind=kind) @ matrices_LKM[0])
        targets_R = np.arange(rows) * 101 % M
        targets_R[1::2] = exact_RM[1::2].argmax(-1)  # the likeliest of every second row
        targets_R[-1] = M - 1
        losses_R, is_greedy_R = jax.jit(lambda x, t: target_scores(x, made, t, scale=scale))(x_RK, targets_R)
        largest_R = exact_RM.max(-1)
        log_total_R = np.log(np.exp(exact_RM - largest_R[:, None]).sum(-1)) + largest_R
        expected_R = log_total_R - exact_RM[np.arange(rows), targets_R]
        np.testing.assert_allclose(losses_R, expected_R, rtol=2e-6, atol=1e-5)
        np.testing.assert_array_equal(is_greedy_R, exact_RM.argmax(-1) == targets_R)


def test_of_equal_outputs_the_first_is_the_likeliest():
    matrix_KM = np.zeros((3, 1200), np.float32)
    matrix_KM[:, [40, 41, 700]] = 1.0  # in one tile, and in another task
    made = FloatTiles(data=jnp.asarray(float_tiles(matrix_KM, dtype="float32")[None]), num_inputs=3, num_outputs=1200)
    x_RK, targets_R = np.ones((5, 3), np.float32), np.array([40, 41, 700, 0, 40])
    x_RK[4, 1] = np.nan
    losses_R, is_greedy_R = jax.jit(lambda x, t: target_scores(x, made, t, scale=2.0))(x_RK, targets_R)
    assert list(np.asarray(is_greedy_R)) == [True, False, False, False, False]
    total = np.log(3 + 1197 * np.exp(-6))
    np.testing.assert_allclose(losses_R, [total, total, total, total + 6, np.nan], rtol=3e-6)


READ_ALL = """
#include "simd.h"
#include <cstdio>
#ifdef __SSE__
#include <immintrin.h>
#endif
int main() {
#ifdef __SSE__
  _mm_setcsr(_mm_getcsr() | 0x8040);  // as XLA's threads: float32 below the normal ones is zero
#endif
  static uint16_t bits[65536];
  static float values[65536];
  for (int i = 0; i < 65536; ++i) bits[i] = i;
  for (int i = 0; i < 65536; i += 8) store(values + i, load((const f16*)(bits + i)));
  fwrite(values, 4, 65536, stdout);
}
"""


@pytest.mark.parametrize("processor", ["this one", "any x86-64"])
def test_every_float16_is_read_exactly(tmp_path, processor):
    if processor != "this one" and platform.machine() != "x86_64":
        pytest.skip("another kind of processor")
    flag = build._command(["c++"], architecture=build.NATIVE)[-1] if processor == "this one" else "-march=x86-64"
    (tmp_path / "read.cc").write_text(READ_ALL)
    includes = [f"-I{build._FOLDER}", f"-I{jax.ffi.include_dir()}"]
    flags = [flag for flag in build._FLAGS if flag != "-shared"]
    command = ["c++", *flags, flag, *includes, tmp_path / "read.cc", "-o", tmp_path / "read"]
    subprocess.run(command, check=True)
    found = np.frombuffer(subprocess.run([tmp_path / "read"], check=True, capture_output=True).stdout, np.float32)
    np.testing.assert_array_equal(found, np.arange(65536).astype(np.uint16).view(np.float16).astype(np.float32))
