"""Is a run in bfloat16 as good as in float32? Mean final losses of some seeds of the local config, cut to some steps.

Command: python benchmarks/dtype_losses.py --folder=DIR [--steps=200] [--seeds=3] [--output=benchmarks/results/NAME.md]
         python benchmarks/dtype_losses.py --folder=DIR --key=mesh.gradient_dtype
The second is of gradients that four devices of a CPU sum in bfloat16, with batches twice as large. Each run is
`btlm train` on the corpus that the local config makes; runs that are there are not made again. The verdict is whether
the means of the held-out losses are within two standard errors of their difference.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

from machine import machine

ROOT = Path(__file__).parent.parent
DTYPES = ("float32", "bfloat16")
STEP = 8 * 128  # tokens of the local config
DEVICES = 4  # of a run with mesh.gradient_dtype


def loss_of(folder: Path, *, key: str, dtype: str, seed: int, steps: int) -> float:
    """Train, if that is not done yet, and return the final held-out loss in nats."""
    workdir, first = folder / f"{dtype}-{seed}", 3 * steps // 4
    larger = 1 if key == "model.dtype" else 2
    if not (workdir / "summary.json").exists():
        changes = {
            "seed": seed, "data.seed": seed, key: dtype,
            "curriculum.num_tokens": f"({first * larger * STEP}, {(steps - first) * larger * STEP})",
            "optimizer.warmup_tokens": steps // 10 * larger * STEP, "log.sample_tokens": 1,
        }  # fmt: skip
        made = folder / f"{DTYPES[0]}-0" / "store"
        if made.exists():
            changes |= {"data.store": made.resolve(), "corpus.source": "prepared"}
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        if key != "model.dtype":
            changes |= {"curriculum.batch_size": "(16, 4)"}
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
        command = [sys.executable, "-m", "btlm_jax", "train", f"--config={ROOT / 'configs' / 'local_cpu.py'}"]
        command += [f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in changes.items())]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return json.loads((workdir / "summary.json").read_text())["heldout"]["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the runs")
    parser.add_argument("--key", choices=("model.dtype", "mesh.gradient_dtype"), default="model.dtype")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the table there too")
    arguments = parser.parse_args()
    losses = {dtype: [] for dtype in DTYPES}
    for seed in range(arguments.seeds):
        for dtype in DTYPES:
            losses[dtype].append(
                loss_of(arguments.folder, key=arguments.key, dtype=dtype, seed=seed, steps=arguments.steps)
            )
            print(f"{dtype}, seed {seed}: {losses[dtype][-1]:.4f}", file=sys.stderr, flush=True)
    means = {dtype: statistics.fmean(each) for dtype, each in losses.items()}
    errors = {dtype: statistics.stdev(each) / math.sqrt(len(each)) for dtype, each in losses.items()}
    difference, error = means["bfloat16"] - means["float32"], math.hypot(*errors.values())
    lines = [f"| {arguments.key} | held-out losses, nats | mean | standard error |", "|---|---|---|---|"]
    for dtype, each in losses.items():
        shown = ", ".join(f"{loss:.4f}" for loss in each)
        lines.append(f"| {dtype} | {shown} | {means[dtype]:.4f} | {errors[dtype]:.4f} |")
    verdict = "within" if abs(difference) <= 2 * error else "**not** within"
    table = (
        f"{machine('jax')}; {arguments.steps} steps, {arguments.seeds} seeds\n\n" + "\n".join(lines)
        + f"\n\nbfloat16 less float32: {difference:+.4f}, {verdict} two standard errors of it, {2 * error:.4f}.\n"
    )  # fmt: skip
    print(table)
    if arguments.output:
        command = f"python benchmarks/dtype_losses.py --key={arguments.key} --steps={arguments.steps}"
        command += f" --seeds={arguments.seeds}"
        title = (
            "bfloat16 against float32" if arguments.key == "model.dtype" else "Gradients in bfloat16 against float32"
        )
        arguments.output.write_text(f"# {title}\n\n`{command} --folder=DIR`\n\n{table}")


if __name__ == "__main__":
    main()
