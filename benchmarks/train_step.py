"""Our training step against the same BTLM in PyTorch, eager and compiled, with each attention that PyTorch has.

Command: python benchmarks/train_step.py [--device=cuda] [--quick] [--output=benchmarks/results/NAME.md]
Needs pip install -e '.[bench]'. On a CPU the local run's model in float32 and bfloat16, where PyTorch's float32 is also
tried with products rounded to bfloat16 ("medium"); on a GPU models of 125M to 1.3B parameters in bfloat16. Each
framework runs in processes of its own, in turns; a row is the median over rounds of each round's median step. All run
with GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as `btlm train` does. The peer is written as well as we can: SDPA with an
ALiBi mask, SDPA with ALiBi folded into the head dim (so that its causal flash kernel serves), on a GPU the same by
cuDNN, and FlexAttention with ALiBi; fused AdamW; the same clipping, multipliers and weight decay; the best of them, of
any precision, is the one to beat.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import accelerator, machine
from steps import config_of_size, make_jax_step, make_torch_step

from btlm_jax.train.flops import FLOPS_CONVENTION, flops_per_token, peak_flops

OURS, MEDIUM = "btlm_jax", "medium"
# Framework, and precision. PyTorch's others are never the best.
CPU_OURS = tuple(f"{OURS}, {precision}" for precision in ("float32", "bfloat16"))
CPU_PEERS = tuple(
    f"torch {mode}, {attention}, {precision}"
    for precision in ("float32", MEDIUM, "bfloat16")
    for mode in (("eager", "compile") if precision == "float32" else ("compile",))
    for attention in ("mask", "folded")
)
GPU_OURS = (f"{OURS}, bfloat16",)
GPU_PEERS = tuple(f"torch compile, {attention}, bfloat16" for attention in ("folded", "cudnn", "flex"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a batch on a device."""

    size: str
    batch: int
    length: int
    device: str

    @property
    def ours(self) -> tuple[str, ...]:
        return CPU_OURS if self.device == "cpu" else GPU_OURS

    @property
    def peers(self) -> tuple[str, ...]:
        return CPU_PEERS if self.device == "cpu" else GPU_PEERS


CASES = {
    "cpu": (
        Case(size="4M", batch=4, length=512, device="cpu"),
        Case(size="4M", batch=1, length=2048, device="cpu"),
    ),
    "cuda": (
        Case(size="125M", batch=16, length=2048, device="cuda"),
        Case(size="540M", batch=8, length=2048, device="cuda"),
        Case(size="540M", batch=2, length=8192, device="cuda"),
        Case(size="1.3B", batch=4, length=2048, device="cuda"),
    ),
}
QUICK = {"cpu": CASES["cpu"][:1], "cuda": CASES["cuda"][:2]}


def run_one(framework: str, case: Case, *, steps: int) -> dict:
    """Time one framework in this process."""
    name, *attention, precision = framework.split(", ")
    dtype = "float32" if precision == MEDIUM else precision
    config = config_of_size(case.size, batch=case.batch, length=case.length, dtype=dtype)
    began = time.perf_counter()
    if name == OURS:
        step = make_jax_step(config)
    else:
        mode = name.removeprefix("torch ")
        step = make_torch_step(
            config, attention=attention[0], mode=mode, device=case.device, is_medium=precision == MEDIUM
        )
    losses = [float(step.run())]
    first = time.perf_counter() - began
    losses.append(float(step.run()))  # allocators and caches have settled after this one
    seconds = []
    for _ in range(steps):
        step.wait()
        began = time.perf_counter()
        loss = step.run()
        step.wait()
        seconds.append(time.perf_counter() - began)
    losses.append(float(loss))
    result = {"first": first, "median": statistics.median(seconds), "peak": step.peak_bytes(), "losses": losses}
    return result | {"predicted": step.predicted_s}


def measure(framework: str, case: Case, *, steps: int) -> dict | None:
    """Time one framework in a process of its own; None if it failed."""
    sizes = [str(part) for part in dataclasses.astuple(case)]
    command = [sys.executable, __file__, "--one", framework, *sizes, "--steps", str(steps)]
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    # A peer makes ALiBi's lanes by JAX, which would take most of the GPU's memory.
    environment |= {"JAX_PLATFORMS": "cpu"} if case.device == "cpu" or framework.startswith("torch") else {}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    print(f"{case} {framework}: {result}", file=sys.stderr, flush=True)
    return result


def measure_peak(device: str) -> float:
    """Return the device's FLOP/s to compare with, found in a process of its own, which then leaves the device free."""
    command = [sys.executable, __file__, "--peak"]
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if device == "cpu" else {})
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def rows(case: Case, *, rounds: int, steps: int, peak: float) -> list[str]:
    """Measure a case; return the table's rows."""
    frameworks = (*case.ours, *case.peers)
    results = {framework: [] for framework in frameworks}
    for _ in range(rounds):
        for framework in frameworks:
            results[framework].append(measure(framework, case, steps=steps))
    medians = {
        name: statistics.median(run["median"] for run in runs) for name, runs in results.items() if None not in runs
    }
    best = min((name for name in case.peers if name in medians), key=medians.get, default=None)
    config = config_of_size(case.size, batch=case.batch, length=case.length, dtype="float32")
    tokens = case.batch * case.length
    flops = tokens * flops_per_token(config.model, seq_len=case.length)
    lines = []
    for name in frameworks:
        label = f"| {case.size}, {case.batch} x {case.length:,} | {name}{' (best peer)' if name == best else ''} |"
        if name not in medians:
            lines.append(f"{label} failed{' |' * (5 + len(case.ours))}")
            continue
        seconds = medians[name]
        memory = max(run["peak"] for run in results[name])
        lines.append(
            f"{label} {seconds * 1e3:,.4g} | {tokens / seconds:,.0f} | {flops / seconds / peak:.1%} | "
            f"{' | '.join(f'{seconds / medians[ours]:.2f}' if ours in medians else '' for ours in case.ours)} | "
            f"{f'{memory / 1e9:.2f}' if memory else ''} | "
            f"{statistics.median(run['first'] for run in results[name]):.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, help="write the table there too")
    parser.add_argument("--one", nargs=5, metavar=("FRAMEWORK", "SIZE", "BATCH", "LENGTH", "DEVICE"), help="as JSON")
    parser.add_argument("--peak", action="store_true", help="print the device's FLOP/s")
    arguments = parser.parse_args()
    if arguments.one:
        framework, size, batch, length, device = arguments.one
        case = Case(size=size, batch=int(batch), length=int(length), device=device)
        print(json.dumps(run_one(framework, case, steps=arguments.steps)))
        return
    if arguments.peak:
        import jax

        print(peak_flops(jax.devices()[0]).flops)
        return
    peak = measure_peak(arguments.device)
    cases = (QUICK if arguments.quick else CASES)[arguments.device]
    ratios = [f"time / ours, {name.partition(', ')[2]}" for name in cases[0].ours]
    titles = ["model, batch x T", "framework", "ms a step", "tokens/s", "MFU", *ratios, "memory, GB", "first step, s"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for case in cases:
        lines += rows(case, rounds=arguments.rounds, steps=arguments.steps, peak=peak)
    setting = f"{machine('jax', 'torch')}{accelerator(arguments.device)}; MFU of {peak / 1e12:.4g} TFLOP/s"
    table = f"{setting}: {FLOPS_CONVENTION}\n\n" + "\n".join(lines) + "\n"
    print(table)
    if arguments.output:
        flags = f"--device={arguments.device} --rounds={arguments.rounds} --steps={arguments.steps}"
        command = f"python benchmarks/train_step.py {flags}{' --quick' if arguments.quick else ''}"
        arguments.output.write_text(f"# Training step\n\n`{command}`\n\n{table}")


if __name__ == "__main__":
    main()
