"""What ALiBi's window leaves out: outputs and gradients of attention with the keys in the window against all keys.

Command: python benchmarks/alibi_window.py [--lengths=512,2048]

Head dim 80, eight of the slopes of 32 heads, normal q, k, v and gradients, q times a sharpness. Errors are the largest
of an array relative to its largest value, in units of 2^-24, half a unit in float32's last place: "left out" between
two computations in float64, with the keys in the window and with all; "rounding" of the CPU's kernels in float32
against float64 with all keys, with the window and, in brackets, with every key in it.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np
from machine import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.attention import NAMES, attend_and_gradients, errors, make_inputs, oracle

from btlm_jax.attention import cpu
from btlm_jax.attention.alibi import alibi_slopes, windows_of_heads

HEAD_DIM, HALF_ULP = 80, 2.0**-24
SHARPNESSES = (1.0, 8.0)


def measure(length: int, sharpness: float) -> str:
    """Return a row of the table."""
    slopes_N = alibi_slopes(32, scaling=1.0)[3::4]
    q, k, v, do, _ = make_inputs(B=1, T=length, N=len(slopes_N), H=HEAD_DIM)
    inputs, scale = (q * sharpness, k, v, do, slopes_N), 1 / HEAD_DIM
    window_BN = np.asarray(windows_of_heads(inputs[0], k, slopes_N, scale=scale))
    seen_NT = np.minimum(np.arange(length), window_BN[0][:, None]) + 1
    attend = functools.partial(attend_and_gradients.__wrapped__, *inputs, scale=scale, implementation="cpu")
    with_window = attend()
    with mock.patch.object(cpu, "windows_of_heads", lambda *_, **__: jnp.full(window_BN.shape, length, jnp.int32)):
        with_all = attend()
    exact_with_window, exact = (
        oracle(*inputs, scale=scale, windows_BN=windows_BN) for windows_BN in (window_BN, np.inf)
    )
    left_out, rounding, rounding_with_all = (
        [error / HALF_ULP for error in errors(results, exact)] for results in (exact_with_window, with_window, with_all)
    )
    share = seen_NT.sum() / len(slopes_N) / (length * (length + 1) / 2)
    return (
        f"| {length:,} | {sharpness:g} | {share:.0%} | {' '.join(f'{x:.2f}' for x in left_out)} | "
        + " ".join(f"{x:.1f} ({y:.1f})" for x, y in zip(rounding, rounding_with_all, strict=True))
        + " |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="512,2048")
    arguments = parser.parse_args()
    names = " ".join(NAMES)
    print(f"{machine('jax')}\n\n| T | sharpness | keys seen | left out: {names} | rounding: {names} |")
    print("|---|---|---|---|---|")
    for length in map(int, arguments.lengths.split(",")):
        for sharpness in SHARPNESSES:
            print(measure(length, sharpness), flush=True)


if __name__ == "__main__":
    main()
