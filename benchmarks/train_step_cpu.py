"""Our training step against the same BTLM in PyTorch, eager and compiled, float32, on this machine's CPU.

Command: python benchmarks/train_step_cpu.py [--output=benchmarks/results/NAME.md]   (needs pip install -e '.[bench]')
Each framework runs in processes of its own, in turns; a row is the median over rounds of each round's median step.
The peer is written as well as we can: SDPA with an ALiBi mask and SDPA with ALiBi folded into the head dim (so that
its causal flash kernel serves), whichever is faster; fused AdamW; the same clipping, multipliers and weight decay.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import machine

SHAPES = ((4, 512), (1, 2048))  # sequences, tokens
FRAMEWORKS = ("jax", "torch eager, mask", "torch eager, folded", "torch compile, mask", "torch compile, folded")
THREADS = 2
CONFIG = Path(__file__).parent.parent / "configs" / "local_cpu.py"


def read_config(batch: int, length: int):
    """Return the local config with one phase of this shape."""
    from btlm_jax.config import train_config_from

    spec = importlib.util.spec_from_file_location("config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = module.get_config().to_dict()
    values["curriculum"] = dict(seq_len=(length,), batch_size=(batch,), num_tokens=(1000 * batch * length,))
    values["model"]["loss_chunk"] = 256
    return train_config_from(values)


def time_steps(step, *, steps: int) -> dict:
    """Return the first step's seconds and the median of the rest."""
    seconds, losses = [], []
    for _ in range(steps + 1):
        began = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - began)
    return {"first": seconds[0], "median": statistics.median(seconds[1:]), "losses": losses}


def run_jax(batch: int, length: int, *, steps: int) -> dict:
    """Time the real train step of this package."""
    import jax
    import numpy as np

    from btlm_jax.model import make_model, parameter_table
    from btlm_jax.mup import make_parametrization
    from btlm_jax.optimizer import make_optimizer
    from btlm_jax.sharding import RULES, batch_sharding, make_mesh
    from btlm_jax.step import init_state, make_train_step

    config = read_config(batch, length)
    mesh = make_mesh(devices=jax.devices(), tensor=1)
    model = make_model(config.model, make_parametrization(config.mup, config.model))
    table = parameter_table(model, mesh)
    optimizer = make_optimizer(config.optimizer, table)
    state = init_state(model, optimizer, mesh, seed=1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (1, batch, length + 1)).astype(np.int32)
    rows = {"inputs_BT": tokens[..., :-1], "targets_BT": tokens[..., 1:]}
    rows["weights_BT"] = np.ones(rows["inputs_BT"].shape, np.float32)
    with jax.set_mesh(mesh):
        arrays = jax.device_put(rows, batch_sharding(mesh, RULES))
        train_step = jax.jit(
            make_train_step(model, optimizer, table, loss_chunk=config.model.loss_chunk), donate_argnums=0
        )

        def step():
            nonlocal state
            state, metrics = train_step(state, arrays, np.float32(1e-3))
            return float(metrics["loss"])

        return time_steps(step, steps=steps)


def run_torch(batch: int, length: int, *, steps: int, attention: str, compiled: bool) -> dict:
    """Time the same step in PyTorch."""
    import torch
    from torch_btlm import TorchBtlm, parameter_groups

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = read_config(batch, length)
    model = TorchBtlm(config, attention=attention, length=length)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config), betas=(config.optimizer.beta1, config.optimizer.beta2), fused=True
    )
    loss_of = torch.compile(model) if compiled else model
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.model.vocab_size, (batch, length + 1), generator=generator)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        return float(loss.detach())

    return time_steps(step, steps=steps)


def run_one(framework: str, batch: int, length: int, *, steps: int) -> dict:
    """Run one measurement in this process."""
    if framework == "jax":
        return run_jax(batch, length, steps=steps)
    mode, attention = framework.removeprefix("torch ").split(", ")
    return run_torch(batch, length, steps=steps, attention=attention, compiled=mode == "compile")


def measure(framework: str, batch: int, length: int, *, steps: int) -> dict:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", framework, str(batch), str(length), "--steps", str(steps)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{framework} at {batch} x {length} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table_of(*, rounds: int, steps: int) -> str:
    """Measure everything and return a markdown table."""
    lines = [
        "| batch x T | framework | ms a step | tokens/s | ours / it | first step s |",
        "|---|---|---|---|---|---|",
    ]
    for batch, length in SHAPES:
        results = {framework: [] for framework in FRAMEWORKS}
        for _ in range(rounds):
            for framework in FRAMEWORKS:
                results[framework].append(measure(framework, batch, length, steps=steps))
                print(f"{batch} x {length} {framework}: {results[framework][-1]}", file=sys.stderr, flush=True)
        medians = {name: statistics.median(result["median"] for result in runs) for name, runs in results.items()}
        best = min((name for name in FRAMEWORKS if name != "jax"), key=medians.get)
        for framework in FRAMEWORKS:
            mark = " (best of PyTorch)" if framework == best else ""
            lines.append(
                f"| {batch} x {length} | {framework}{mark} | {medians[framework] * 1e3:.0f} | "
                f"{batch * length / medians[framework]:,.0f} | {medians[framework] / medians['jax']:.2f} | "
                f"{statistics.median(result['first'] for result in results[framework]):.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, help="write the table there too")
    parser.add_argument("--one", nargs=3, metavar=("FRAMEWORK", "BATCH", "LENGTH"), help="one measurement, as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        framework, batch, length = arguments.one
        print(json.dumps(run_one(framework, int(batch), int(length), steps=arguments.steps)))
        return
    setting = f"{machine('jax', 'torch')}, {THREADS} threads"
    table = f"{setting}\n\n{table_of(rounds=arguments.rounds, steps=arguments.steps)}\n"
    print(table)
    if arguments.output:
        command = f"python benchmarks/train_step_cpu.py --rounds={arguments.rounds} --steps={arguments.steps}"
        arguments.output.write_text(f"# Training step on a CPU, float32\n\n`{command}`\n\n{table}")


if __name__ == "__main__":
    main()
