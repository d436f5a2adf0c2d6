"""How the real train step grows: time and memory with the length T and the depth L, compile time with L.

Command: python benchmarks/scaling.py [--output=benchmarks/results/scaling.md]   (writes a .png beside it)
The local run's model in float32 on a CPU. Every point is a process of its own; the points take turns, round by round.
Time is the median over rounds of each round's median step; memory is what the executable says it needs, state and
temporaries (XLA's own analysis; PyTorch or Python are not in it). Blocks are one loop (nn.scan), so that compile time
should not depend on L, and attention keeps no [T, T] array, so that memory should grow with tokens and not with T.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import machine
from steps import make_jax_step, read_config

from btlm_jax.display.plotting import new_figure, write_figure

TOKENS = 8192  # a step, whatever T is
LENGTHS, LAYERS = (512, 1024, 2048, 4096, 8192), (2, 4, 8, 16, 32)
USUAL_LENGTH, USUAL_LAYERS = 512, 4
POINTS = [(length, USUAL_LAYERS) for length in LENGTHS] + [(USUAL_LENGTH, layers) for layers in LAYERS]
ROUNDS, STEPS = 3, 3


def run_one(length: int, layers: int) -> dict:
    """Measure a point in this process."""
    step = make_jax_step(read_config(batch=TOKENS // length, length=length, num_layers=layers))
    float(step.run())
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        step.run()
        step.wait()
        seconds.append(time.perf_counter() - began)
    return {"compile_s": step.compile_s, "step_s": statistics.median(seconds), "bytes": step.peak_bytes()}


def measure(length: int, layers: int) -> dict:
    """Measure a point in a process of its own."""
    command = [sys.executable, __file__, "--one", str(length), str(layers)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"T {length}, L {layers}: {result}", file=sys.stderr, flush=True)
    return result


def table_of(results: dict) -> str:
    """Return a markdown table of the points' medians."""
    lines = [
        "| T | L | batch | ms a step | tokens/s | memory, MB | compile, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for length, layers in POINTS:
        point = results[length, layers]
        lines.append(
            f"| {length:,} | {layers} | {TOKENS // length} | {point['step_s'] * 1e3:,.0f} | "
            f"{TOKENS / point['step_s']:,.0f} | {point['bytes'] / 1e6:,.0f} | {point['compile_s']:.1f} |"
        )
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Draw every quantity relative to the smallest T or L of its line."""
    figure, axes = new_figure(size=(7, 4.5), dpi=120)
    lines = (
        ("step time against T", [(length, USUAL_LAYERS) for length in LENGTHS], 0, "step_s"),
        ("memory against T", [(length, USUAL_LAYERS) for length in LENGTHS], 0, "bytes"),
        ("step time against L", [(USUAL_LENGTH, layers) for layers in LAYERS], 1, "step_s"),
        ("memory against L", [(USUAL_LENGTH, layers) for layers in LAYERS], 1, "bytes"),
        ("compile time against L", [(USUAL_LENGTH, layers) for layers in LAYERS], 1, "compile_s"),
    )
    for label, points, axis, quantity in lines:
        factors = [point[axis] / points[0][axis] for point in points]
        values = [results[point][quantity] / results[points[0]][quantity] for point in points]
        axes.plot(factors, values, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel(f"times the least: T {LENGTHS[0]} (at {TOKENS:,} tokens a step), L {LAYERS[0]}")
    axes.set_ylabel("times the value there")
    axes.legend()
    write_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the table there too, and the plot beside it")
    parser.add_argument("--one", nargs=2, type=int, metavar=("T", "L"), help="one measurement, as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_one(*arguments.one)))
        return
    points = list(dict.fromkeys(POINTS))
    runs = [{point: measure(*point) for point in points} for _ in range(ROUNDS)]
    results = {
        point: {name: statistics.median(run[point][name] for run in runs) for name in runs[0][point]}
        for point in points
    }
    table = f"{machine('jax')}\n\n{table_of(results)}\n"
    print(table)
    if arguments.output:
        picture = arguments.output.with_suffix(".png")
        draw(results, picture)
        title, command = "# Training step against length and depth", "`python benchmarks/scaling.py`"
        arguments.output.write_text(f"{title}\n\n{command}\n\n{table}\n![scaling]({picture.name})\n")


if __name__ == "__main__":
    main()
