"""Attention that stops at documents, forward and backward: what the mask costs and saves; or is it right?

    python benchmarks/document_mask.py [--length=2048] [--rounds=9]
    python benchmarks/document_mask.py --check [--rounds=9]

The first times each implementation on a sequence of 1 to 200 documents, against the same without the mask; the rounds
go through all of them in turn. The table has medians of the CPU time of all threads, which depends little on what else
the machine does, and in brackets of the time. The second compares every
implementation with the reference on each document alone, on random lengths up to 512 positions; the TPU kernels are
interpreted, in blocks of 128, also with so little vector memory that keys are read again and queries come in spans.
Exit code 1 where outputs or gradients differ by more than 1e-5 of the largest.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.attention import attend, tpu
from btlm_jax.attention.alibi import alibi_slopes

NUM_DOCUMENTS = (1, 2, 5, 20, 50, 200)
TIMED = ("cpu", "blockwise")
CHECKED = ("blockwise", "cpu", "tpu", "tpu in spans", "splash")
ALLOWED = 1e-5
HEADS, HEAD_DIM = 8, 80


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    return check(arguments.rounds) if arguments.check else measure(arguments.length, arguments.rounds)


def measure(length: int, rounds: int) -> int:
    """Print the table of times."""
    inputs, slopes_N = make_inputs(length, HEADS, HEAD_DIM, seed=0), alibi_slopes(HEADS, scaling=1.0)
    rows = {"no mask": None}
    for num in NUM_DOCUMENTS:
        rows[f"{num} documents"] = jnp.asarray(starts_of(random_lengths(num, length, seed=num))[None])
    calls = {
        (name, row): jax.jit(gradients(name, slopes_N)).lower(*inputs, starts_BT).compile()
        for name in TIMED
        for row, starts_BT in rows.items()
    }
    seconds = {key: [] for key in calls}
    for turn in range(rounds + 1):
        for (name, row), call in calls.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call(*inputs, rows[row]))
            if turn:  # the first is for warming up
                seconds[name, row].append((time.process_time() - began_cpu, time.perf_counter() - began))
    print(
        f"attention, forward and backward, of {length:,} positions, {HEADS} heads of {HEAD_DIM}, float32; CPU ms (ms)"
    )
    print(f"{'':<16}" + "".join(f"{name:>34}" for name in TIMED))
    for row in rows:
        cells = []
        for name in TIMED:
            cpu, wall = (statistics.median(each) for each in zip(*seconds[name, row], strict=True))
            plain = statistics.median(each for each, _ in seconds[name, "no mask"])
            cells.append(f"{1e3 * cpu:.0f} ({1e3 * wall:.0f}), {cpu / plain:.2f} x")
        print(f"{row:<16}" + "".join(f"{cell:>34}" for cell in cells))
    return 0


def check(rounds: int) -> int:
    """Print the largest errors of each implementation."""
    rng = np.random.default_rng(0)
    worst = dict.fromkeys(CHECKED, 0.0)
    for seed in range(rounds):
        length = int(rng.integers(40, 513))
        lengths = random_lengths(int(rng.integers(1, 30)), length, seed=seed)
        inputs, slopes_N = make_inputs(length, 2, 64, seed=seed), np.asarray([0.4, 0.01], np.float32)
        expected = each_alone(inputs, lengths, slopes_N)
        for name in CHECKED:
            resident_bytes = 1 if name == "tpu in spans" else 1 << 24
            limits = dataclasses.replace(tpu._SMALL_VMEM, block_positions=128, resident_bytes=resident_bytes)
            with mock.patch.object(tpu, "_limits", lambda limits=limits: limits):
                found = gradients(name.split()[0], slopes_N)(*inputs, jnp.asarray(starts_of(lengths)[None]))
            for result, value in zip(found, expected, strict=True):
                worst[name] = max(worst[name], float(np.abs(result - value).max() / np.abs(value).max()))
    for name, error in worst.items():
        print(f"{name:<16} {error:.1e} of the largest at most, in {rounds} random rows")
    return 0 if max(worst.values()) < ALLOWED else 1


def make_inputs(length: int, num_heads: int, head_dim: int, *, seed: int) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(1, length, num_heads, head_dim)), jnp.float32) for _ in range(4)]


def random_lengths(num: int, length: int, *, seed: int) -> np.ndarray:
    """Return the lengths of at most `num` documents, which fill `length`; exponentially distributed."""
    ends = np.cumsum(np.random.default_rng(seed).exponential(size=num))
    return np.diff(np.unique([0, *np.rint(ends / ends[-1] * length).astype(int)]))


def starts_of(lengths: np.ndarray) -> np.ndarray:
    return np.repeat(np.cumsum(lengths) - lengths, lengths).astype(np.int32)


def gradients(name: str, slopes_N: np.ndarray):
    """Return a function of q, k, v, do and starts_BT to the output and the gradients."""

    def run(q, k, v, do, starts_BT):
        def attended(q, k, v):
            scale = 1 / q.shape[-1]
            return attend(q, k, v, jnp.asarray(slopes_N), scale=scale, implementation=name, starts_BT=starts_BT)

        o, vjp = jax.vjp(attended, q, k, v)
        return o, *vjp(do)

    return run


def each_alone(inputs: list[jax.Array], lengths: np.ndarray, slopes_N: np.ndarray) -> list[np.ndarray]:
    """Return what the reference has of each document as a sequence of its own."""
    parts, stop = [], 0
    for length in lengths.tolist():
        start, stop = stop, stop + length
        parts.append(gradients("reference", slopes_N)(*(x[:, start:stop] for x in inputs), None))
    return [np.concatenate(each, axis=1) for each in zip(*parts, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
