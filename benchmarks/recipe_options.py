"""Train one small model with each option beyond the recipe of 2023, and print the held-out losses beside each other.

Command: python benchmarks/recipe_options.py --workdir=DIR [--seeds=2] [--only=muon,z-loss]
Each run is an ordinary `btlm train` of configs/local_cpu.py at width 128 (its own base width), 200 steps of 1,024
tokens, in DIR/NAME-SEED; runs that are done are not repeated. The table has the mean over the sources of held-out bits
a byte, of the seeds' mean and spread, and its difference to the published recipe's at the same peak rate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

STEP = 1024
COMMON = {
    "model.d_model": 128, "model.d_ff": 342, "mup.base_d_model": 128.0, "mup.base_d_ff": 342.0,
    "mup.base_num_layers": 4, "curriculum.num_tokens": f"({150 * STEP}, {50 * STEP})",
    "optimizer.warmup_tokens": 20 * STEP, "evaluation.every_steps": 1000, "checkpoint.every_steps": 200,
}  # fmt: skip
HOT = {"optimizer.peak_learning_rate": 0.048, "optimizer.end_learning_rate": 0.00081584}
PLAIN = "published"
VARIANTS: dict[str, dict[str, object]] = {
    PLAIN: {},
    "end at 10 %": {"optimizer.end_learning_rate": 0.0006},
    "decay to zero": {"optimizer.end_learning_rate": 0.0},
    "weight decay auto": {"optimizer.weight_decay": "auto"},
    "completep, base depth 2": {"mup.preset": "completep", "mup.base_num_layers": 2},
    "z-loss 1e-4": {"optimizer.z_loss": 1e-4},
    "qk-norm rms": {"model.qk_norm": "rms"},
    "qk-norm rms_gain": {"model.qk_norm": "rms_gain"},
    "muon 0.01": {"optimizer.hidden_optimizer": "muon", "optimizer.muon_learning_rate": 0.01},
    "muon 0.02": {"optimizer.hidden_optimizer": "muon", "optimizer.muon_learning_rate": 0.02},
    "muon 0.04": {"optimizer.hidden_optimizer": "muon", "optimizer.muon_learning_rate": 0.04},
    "ema 0.05": {"optimizer.average": "ema", "optimizer.average_share": 0.05},
    "constant, last 0.2": {
        "optimizer.schedule": "constant",
        "optimizer.average": "last",
        "optimizer.average_share": 0.2,
    },
    "hot": HOT,
    "hot, z-loss 1e-4": HOT | {"optimizer.z_loss": 1e-4},
    "hot, qk-norm rms_gain": HOT | {"model.qk_norm": "rms_gain"},
}


def train(name: str, seed: int, *, folder: Path) -> Path:
    """Train a variant, unless it is done; return its workdir."""
    workdir = folder / f"{name.replace(' ', '_').replace(',', '').replace('%', 'percent')}-{seed}"
    if (workdir / "summary.json").is_file():
        return workdir
    values = {**COMMON, **VARIANTS[name], "seed": seed, "data.seed": seed, "data.store": (folder / "store").resolve()}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    command = [sys.executable, "-m", "btlm_jax", "train", "--config=local_cpu", f"--workdir={workdir}", *flags]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str((folder / "compiled").resolve())}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        sys.exit(f"{name}: {result.stdout[-2000:]}\n{result.stderr[-2000:]}")
    return workdir


def heldout(workdir: Path, key: str) -> float | None:
    """Return the mean over the sources of held-out bits a byte, of the weights or of their average."""
    found = json.loads((workdir / "summary.json").read_text()).get(key)
    return found and statistics.mean(source["bits_per_byte"] for source in found["sources"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default=",".join(VARIANTS).replace(", ", "; "), help="names of variants")
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    names = [name.replace("; ", ", ") for name in options.only.split(",")]
    for seed in range(1, options.seeds + 1):
        for name in names:
            workdir = train(name, seed, folder=options.workdir)
            print(f"{name} ({seed}): {heldout(workdir, 'heldout'):.4f}", flush=True)
    rows: dict[str, list[float]] = {}
    for name in names:
        for key, suffix in (("heldout", ""), ("heldout_of_average", ", its average")):
            values = [
                value for seed in range(1, options.seeds + 1)
                if (value := heldout(train(name, seed, folder=options.workdir), key)) is not None
            ]  # fmt: skip
            if values:
                rows[name + suffix] = values
    print(f"\n| variant | bits a byte | spread of {options.seeds} seeds | to its peer |\n|---|---|---|---|")
    for name, values in rows.items():
        peer = statistics.mean(rows.get("hot" if name.startswith("hot") else PLAIN, values))
        mean = statistics.mean(values)
        print(f"| {name} | {mean:.4f} | {max(values) - min(values):.4f} | {mean / peer - 1:+.2%} |")


if __name__ == "__main__":
    main()
