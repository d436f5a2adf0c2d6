"""Time and memory of attention's forward and backward pass: ours against PyTorch's and JAX's, with ALiBi, head dim 80.

Command: python benchmarks/attention.py [--device=cuda] [--quick] [--output=benchmarks/results/NAME.md]
Needs pip install -e '.[bench]'. On a CPU in float32 (ours are the C++ kernels), on a GPU in bfloat16 (ours is then
cuDNN's kernel with ALiBi in spare lanes). Every contender is a process of its own; they take turns, round by round, and
wait while another runs. The median over rounds is the figure; the least says more where other work disturbs. Memory is
the peak of a call beyond its inputs, with results and bias: on a CPU the growth of the resident set, on a GPU what the
framework's allocator says. The slopes are the model's own. Keys that they put out of reach cost ours nothing; a row
without that gain stands beside it ("every key in reach": slopes so small that none is left out), on a CPU our form in
XLA too, on a GPU one without ALiBi.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from attention_contenders import CONTENDERS, EVERY_KEY, NO_ALIBI, OURS, Shape, make_contender
from machine import accelerator, free_bytes, machine

CPU_HEADS = {512: 32, 2048: 8, 8192: 4, 16384: 2, 32768: 1}
GPU_LENGTHS, GPU_HEADS, GPU_TOKENS = (2048, 8192, 32768), 32, 32768
QUICK_LENGTHS = (2048, 8192)
ROUNDS = {512: 25, 2048: 25, 8192: 7, 16384: 3, 32768: 3}
QUICK_ROUNDS = 5
TURN_S = 0.2  # a turn repeats calls shorter than this
TOLERANCE = 0.02  # between the norms of contenders' results, which only shows that all compute the same


def shapes(device: str, *, is_quick: bool) -> list[Shape]:
    """Return what is measured on a device."""
    lengths = CPU_HEADS if device == "cpu" else GPU_LENGTHS
    return [
        Shape(batch=1, length=length, heads=CPU_HEADS[length], device=device)
        if device == "cpu"
        else Shape(batch=GPU_TOKENS // length, length=length, heads=GPU_HEADS, device=device)
        for length in lengths
        if not is_quick or length in QUICK_LENGTHS
    ]


def serve(name: str, shape: Shape) -> None:
    """Make a contender in this process, say what it needs, then run a turn for every line of the input."""
    contender = make_contender(name, shape)
    began = time.perf_counter()
    contender.wait(results := contender.call())
    first_s = time.perf_counter() - began
    norms = [float(np.linalg.norm(contender.to_numpy(x))) for x in results]
    del results
    memory = measure_memory(contender, name, shape)
    began = time.perf_counter()
    contender.wait(contender.call())
    calls = max(1, int(TURN_S / (time.perf_counter() - began)))
    print(json.dumps({"first_s": first_s, "norms": norms, "memory": memory}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(calls):
            results = contender.call()
        contender.wait(results)
        print((time.perf_counter() - began) / calls, flush=True)
        del results


def measure_memory(contender, name: str, shape: Shape) -> int:
    """Return the peak bytes of a call beyond its inputs."""
    if shape.device == "cpu":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
        before = _status("VmRSS")
        contender.wait(contender.call())
        return _status("VmHWM") - before + contender.bias_bytes
    if name.startswith("torch"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        contender.wait(contender.call())
        return torch.cuda.max_memory_allocated() - shape.input_bytes
    import jax

    return jax.devices()[0].memory_stats()["peak_bytes_in_use"] - shape.input_bytes


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def start(name: str, shape: Shape) -> subprocess.Popen:
    """Start a contender's process."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if shape.device == "cpu":
        environment |= {"JAX_PLATFORMS": "cpu"}
    sizes = [str(size) for size in (shape.batch, shape.length, shape.heads)]
    command = [sys.executable, __file__, "--one", name, *sizes, "--device", shape.device]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen):
    """Return a process's next line, which is JSON, or None if it has ended."""
    line = process.stdout.readline()
    return json.loads(line) if line else None


def compare(shape: Shape, *, rounds: int) -> list[str]:
    """Measure all contenders on a shape; return the table's rows."""
    names = CONTENDERS[shape.device]
    skipped, processes, facts, seconds = {}, {}, {}, {}
    with contextlib.ExitStack() as stack:
        for name in names:
            if shape.needed_bytes(name) > 0.4 * free_bytes(shape.device):
                skipped[name] = f"not run: about {shape.needed_bytes(name) / 1e9:.0f} GB of [N, T, T] arrays"
                continue
            process = stack.enter_context(start(name, shape))
            stack.callback(process.terminate)
            facts[name] = ask(process)
            print(f"{shape.length} {name}: {facts[name]}", file=sys.stderr, flush=True)
            if facts[name] is None:
                skipped[name] = "failed"
                continue
            processes[name], seconds[name] = process, []
        for _ in range(rounds):
            for name, process in processes.items():
                print("go", file=process.stdin, flush=True)
                seconds[name].append(ask(process))
    return rows(shape, seconds, facts, skipped, names)


def rows(shape: Shape, seconds: dict, facts: dict, skipped: dict, names: tuple[str, ...]) -> list[str]:
    """Return the table's rows of a shape, every contender's norms checked against ours."""
    medians = {name: statistics.median(measured) for name, measured in seconds.items()}
    lines = []
    for name in names:
        label = f"| {shape.batch} x {shape.length:,} x {shape.heads} | {name} |"
        if name in skipped:
            lines.append(f"{label} {skipped[name]} | | | | | |")
            continue
        if name not in (EVERY_KEY, NO_ALIBI):
            for ours, theirs in zip(facts[OURS]["norms"], facts[name]["norms"], strict=True):
                assert abs(ours - theirs) <= TOLERANCE * ours, (name, facts[name]["norms"], facts[OURS]["norms"])
        least, memory = {key: min(measured) for key, measured in seconds.items()}, facts[name]["memory"]
        lines.append(
            f"{label} {medians[name] * 1e3:,.4g} | {medians[name] / medians[OURS]:.2f} | "
            f"{least[name] * 1e3:,.4g} | {least[name] / least[OURS]:.2f} | "
            f"{memory / 1e6:,.0f} | {memory / facts[OURS]['memory']:.2f} |"
        )
    if {EVERY_KEY, NO_ALIBI} <= medians.keys():
        pairs = zip(seconds[EVERY_KEY], seconds[NO_ALIBI], strict=True)
        cost = statistics.median(alibi / none - 1 for alibi, none in pairs)
        print(f"{shape.length}: ALiBi costs {cost:+.1%} (median over rounds)", file=sys.stderr)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help=f"only lengths {QUICK_LENGTHS}, {QUICK_ROUNDS} rounds")
    parser.add_argument("--output", type=Path, help="write the table there too")
    parser.add_argument("--one", nargs=4, metavar=("NAME", "BATCH", "LENGTH", "HEADS"), help="serve one contender")
    arguments = parser.parse_args()
    if arguments.one:
        name, batch, length, heads = arguments.one
        serve(name, Shape(batch=int(batch), length=int(length), heads=int(heads), device=arguments.device))
        return
    lines = [
        "| batch x T x heads | | ms, median | / ours | ms, least | / ours | memory, MB | / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in shapes(arguments.device, is_quick=arguments.quick):
        lines += compare(shape, rounds=QUICK_ROUNDS if arguments.quick else ROUNDS[shape.length])
    flags = f" --device={arguments.device}" + (" --quick" if arguments.quick else "")
    table = f"{machine('jax', 'torch')}{accelerator(arguments.device)}\n\n" + "\n".join(lines) + "\n"
    print(table)
    if arguments.output:
        title = "# Attention, forward and backward, head dim 80"
        arguments.output.write_text(f"{title}\n\n`python benchmarks/attention.py{flags}`\n\n{table}")


if __name__ == "__main__":
    main()
