"""The CPU's kernels for training: long sequences, threads, numbers that are none, vectors of every width, no compiler.

test_attention.py holds them to float64 besides.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention import FLOAT32_ERROR, NAMES, attend_and_gradients, digest, errors, make_inputs, oracle_at

from btlm_jax.attention import attend, blockwise, cpu
from btlm_jax.attention.alibi import alibi_window
from btlm_jax.kernels import build


@pytest.mark.slow
@pytest.mark.parametrize("H, dtype, limit", [(80, np.float32, FLOAT32_ERROR), (64, jnp.bfloat16, 8e-3)])
def test_matches_float64_at_8192_positions(H, dtype, limit):
    T, queries = 8192, np.asarray([0, 63, 64, 1000, 4097, 8190, 8191])
    q, k, v, do, _ = make_inputs(B=1, T=T, N=4, H=H, dtype=dtype)
    do = np.array(do)
    do[:, np.setdiff1d(np.arange(T), queries)] = 0
    slopes_N = np.asarray([0.3, 0.05, 1e-4, 0.0], np.float32)  # windows of some 70 and 460 positions, and everything
    o, dq, dk, dv = attend_and_gradients(q, k, v, do, slopes_N, scale=1 / H, implementation="cpu")
    expected = oracle_at(queries, q, k, v, do, slopes_N, scale=1 / H)
    assert not np.asarray(dq)[:, np.setdiff1d(np.arange(T), queries)].any()
    o = np.where(np.isin(np.arange(T), queries)[None, :, None, None], np.asarray(o), 0)
    for name, error in zip(NAMES, errors((o, dq, dk, dv), expected), strict=True):
        assert error < limit, name


DIGEST = """
import hashlib, sys
sys.path.insert(0, {tests!r})
from support.attention import digest
print(digest())
"""


@pytest.mark.slow
def test_computes_the_same_bits_with_any_number_of_threads():
    here = {digest() for _ in range(5)}
    alone = os.environ | {"NPROC": "1", "JAX_NUM_CPU_DEVICES": "1"}  # XLA then has one thread
    program = DIGEST.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", program], env=alone, check=True, capture_output=True, text=True)
    assert here == {done.stdout.strip()}


@pytest.mark.parametrize(
    "which, value", [*((which, np.nan) for which in range(4)), (0, np.inf), (2, np.inf), (3, np.inf)]
)
def test_nothing_is_hidden_that_is_not_finite(which, value):
    """What depends on the damaged number by the definition is not finite; other sequences and heads stay."""
    t, T = 70, 200
    *inputs, slopes_N = make_inputs(B=2, T=T, N=2, H=20)
    slopes_N = slopes_N / 8
    assert T < alibi_window(0.0, slopes_N.max(), xp=np)  # every key is seen
    sound = attend_and_gradients(*inputs, slopes_N, scale=1 / 20, implementation="cpu")
    inputs[which] = np.array(inputs[which])
    inputs[which][1, t, 0, 3] = value
    results = attend_and_gradients(*inputs, slopes_N, scale=1 / 20, implementation="cpu")
    early, own, late = slice(0, t + 1), slice(t, t + 1), slice(t, T)
    if which == 0:  # q: the weights of one query
        damaged = {"o": own, "dq": own, "dk": early, "dv": early}
    elif which == 1:  # k: the weights of all later queries
        damaged = {"o": late, "dq": late, "dk": slice(0, T), "dv": slice(0, T)}
    elif which == 2:  # v: what all later queries give, and the gradients of their weights
        damaged = {"o": late, "dq": late, "dk": slice(0, T)}
    else:  # do: the gradients of one query's weights
        damaged = {"dq": own, "dk": early, "dv": early}
    for name, result, whole in zip(NAMES, map(np.asarray, results), map(np.asarray, sound), strict=True):
        if name in damaged:
            assert not np.isfinite(result[1, damaged[name], 0]).all(-1).any(), name
        np.testing.assert_array_equal(result[0], whole[0])
        np.testing.assert_array_equal(result[:, :, 1], whole[:, :, 1])


def test_without_kernels_another_implementation_is_taken(monkeypatch):
    *inputs, slopes_N = make_inputs(B=1, T=50, N=2, H=8)
    calls = []
    for module in (blockwise, cpu):
        name = module.__name__.rpartition(".")[2]
        run = getattr(module, f"attend_{name}")
        spy = lambda *x, n=name, f=run, **y: (calls.append(n), f(*x, **y))[1]  # noqa: E731
        monkeypatch.setattr(module, f"attend_{name}", spy)
    attend(*inputs[:3], slopes_N, scale=0.1, implementation="auto")
    attend(*(x.astype(jnp.float16) for x in inputs[:3]), slopes_N, scale=0.1, implementation="auto")
    monkeypatch.setattr(cpu, "has_training_kernels", lambda: False)
    attend(*inputs[:3], slopes_N, scale=0.1, implementation="auto")
    assert calls == ["cpu", "blockwise", "blockwise"]
    with pytest.raises(
        ValueError, match="takes float32 and bfloat16, on a CPU with a C.. compiler; got float32 on cpu"
    ):
        attend(*inputs[:3], slopes_N, scale=0.1, implementation="cpu")


MICRO = r"""
#include "wide.h"
#include <cstdio>
#ifdef __AVX512BF16__
template <Into INTO, Stored STORED>
void run_pairs(int rows, int columns, int depth, std::vector<float> a, std::vector<float> b, std::vector<float> whole) {
  std::vector<bf16x2> pairs_a(rows * depth), pairs_b(depth * columns);  // each number with one more: twice the depth
  for (size_t i = 0; i < a.size(); ++i) pairs_a[i].bits = to_bf16(a[i]).bits | uint32_t{to_bf16(3).bits} << 16;
  for (size_t i = 0; i < b.size(); ++i) pairs_b[i].bits = to_bf16(b[i]).bits | uint32_t{to_bf16(2).bits} << 16;
  std::vector<float> c(rows * columns, 1.0f);
  product<INTO>(Left<STORED, bf16x2>{pairs_a.data(), STORED == Stored::kByRows ? depth : rows}, pairs_b.data(), columns,
                c.data(), columns, depth, rows, columns);
  for (size_t i = 0; i < c.size(); ++i) {
    if (c[i] != whole[i] + 6 * depth) printf("pairs, %d x %d x %d: %g\n", rows, columns, depth, c[i]);
  }
}
#endif
template <Into INTO, Stored STORED>
void run(int rows, int columns, int depth) {  // whole numbers, so that every order of sums gives the same
  std::vector<float> a(rows * depth), b(depth * columns), c(rows * columns, 1.0f);
  for (size_t i = 0; i < a.size(); ++i) a[i] = int(i * 7 % 11) - 5;
  for (size_t i = 0; i < b.size(); ++i) b[i] = int(i * 5 % 13) - 6;
  int64_t ld = STORED == Stored::kByRows ? depth : rows, wrong = 0;
  Left<STORED> left{a.data(), ld};
  product<INTO>(left, b.data(), columns, c.data(), columns, depth, rows, columns);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      float sum = INTO == Into::kSum;
      for (int k = 0; k < depth; ++k) sum += *left.at(i, k) * b[k * columns + j];
      wrong += sum != c[i * columns + j];
    }
  }
  if (wrong) printf("%ld wrong of %d x %d x %d\n", long(wrong), rows, columns, depth);
#ifdef __AVX512BF16__
  run_pairs<INTO, STORED>(rows, columns, depth, a, b, c);
#endif
}
int main() {
  for (int rows : {1, 7, 9, 15, 64}) {
    for (int columns : {16, 32, 48, 64, 80, 128, 176}) {
      run<Into::kNew, Stored::kByRows>(rows, columns, 13);
      run<Into::kSum, Stored::kByRows>(rows, columns, 64);
      run<Into::kSum, Stored::kByColumns>(rows, columns, 3);
    }
  }
  double worst = 0;
  for (int i = 0; i < 2000000; i += kWide) {
    float x[kWide], y[kWide];
    for (int j = 0; j < kWide; ++j) x[j] = 4 - (i + j) * 4.5e-5f;
    store_wide(y, exp_wide(load_wide(x)));
    for (int j = 0; j < kWide; ++j) worst = std::max(worst, std::abs(y[j] / std::exp(double(x[j])) - 1));
  }
  float far[kWide], none[kWide];
  store_wide(far, exp_wide(wide{} - 1e30f));
  store_wide(none, exp_wide(wide{} + NAN));
  for (int j = 0; j < kWide; ++j) worst = std::max<double>(worst, far[j] > 1e-37f || none[j] == none[j]);
  printf("%g\n", worst);
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["this one", "any x86-64", "one with AVX2"])
def test_vectors_of_every_width_multiply_exactly_and_exponentiate_to_a_rounding(tmp_path, processor):
    flags = {
        "this one": build._command(["c++"], architecture=build.NATIVE)[-1],
        "any x86-64": "-march=x86-64",
        "one with AVX2": "-march=haswell",
    }
    if processor != "this one" and " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("another kind of processor")
    (tmp_path / "micro.cc").write_text(MICRO)
    command = ["c++", *build._FLAGS, flags[processor], f"-I{build._FOLDER}"]
    command += [f"-I{jax.ffi.include_dir()}", str(tmp_path / "micro.cc"), "-o", str(tmp_path / "micro")]
    subprocess.run([x for x in command if x != "-shared"], check=True)
    said = subprocess.run([tmp_path / "micro"], check=True, capture_output=True, text=True).stdout
    assert float(said) < 1.3e-7
