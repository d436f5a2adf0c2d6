"""Go on with one run on 1, 2 and 4 devices, in 1, 2 and 4 processes, and compare it with a run on one device.

Command: python benchmarks/elastic.py --folder=DIR

`btlm train` on a tiny model in one workdir, on loopback. Each start has another number of processes, or of devices in
each, and is preempted after some steps; the last one ends the run. A wrapper around the command writes, for each step,
a hash of the ids of its batch, in which each counts at its place. Compared with one start on one device: the hash of
every step, the tokens counted, every logged number (their largest relative difference is printed), the final state.
Exits with 1 if a token differs, or a loss by more than 1e-4 of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "tests")]

import kill_resume  # noqa: E402  beside this file
import numpy as np  # noqa: E402

PER_STEP = 16 * 24
STEPS = (60, 40)
PARTS = ((1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (1, 2), (2, 1), (1, 1))  # processes, devices of each
PER_PART = 7  # steps after which one is preempted
BATCHES = "batches.jsonl"


def start(config: Path, workdir: Path, *, processes: int, devices: int) -> kill_resume.Started:
    return kill_resume.start_run(
        config,
        workdir,
        outputs=workdir,
        num_processes=processes,
        num_devices=processes * devices,
        changes=[()] * processes,
        command=[sys.executable, str(HERE), "--child"],
    )


def finish(started: kill_resume.Started, code: int) -> None:
    codes = [process.wait(timeout=400) for process in started.processes]
    if set(codes) != {code}:
        raise RuntimeError(f"{codes}:\n{started.output()[-3000:]}")


def train_in_parts(config: Path, workdir: Path) -> list[tuple[int, int, int]]:
    """Return (processes, devices of each, first step) of each start."""
    starts = []
    for number, (processes, devices) in enumerate(PARTS):
        began = max((row["step"] for row in kill_resume.rows_of(workdir) if row["kind"] == "train"), default=0)
        starts.append((processes, devices, began + 1))
        started = start(config, workdir, processes=processes, devices=devices)
        if number == len(PARTS) - 1:
            finish(started, 0)
            break
        while max((row["step"] for row in kill_resume.rows_of(workdir)), default=0) < began + PER_PART:
            if not started.is_running():
                raise RuntimeError(started.output()[-3000:])
            time.sleep(0.01)
        started.processes[-1].send_signal(signal.SIGTERM)
        finish(started, 75)
    return starts


def batches_of(workdir: Path) -> dict[int, list]:
    return dict(json.loads(line) for line in (workdir / BATCHES).read_text().splitlines())


def child() -> None:
    """Run the command of the arguments, and write each batch's hash."""
    import jax
    import jax.numpy as jnp

    from btlm_jax import cli
    from btlm_jax.data import loader

    batches = loader.TrainLoader.batches
    (workdir,) = [Path(text.partition("=")[2]) for text in sys.argv if text.startswith("--workdir=")]

    @jax.jit
    def sums(ids):
        flat = ids.reshape(-1, ids.shape[-1]).astype(jnp.uint32)
        places = jnp.arange(1, flat.size + 1, dtype=jnp.uint32).reshape(flat.shape)
        return jnp.stack([(flat * places).sum(), (flat * (places * places * np.uint32(2654435761) + places)).sum()])

    def hashed(self, *, first_step):
        for index, batch in batches(self, first_step=first_step):
            found = np.asarray(sums(batch["inputs_BT"]).addressable_data(0)).tolist()
            if jax.process_index() == 0:
                with open(workdir / BATCHES, "a", encoding="utf-8") as file:
                    file.write(json.dumps([index + 1, found]) + "\n")
            yield index, batch

    loader.TrainLoader.batches = hashed
    cli.entry()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder.resolve()
    from support.real_store import build_real_store, write_config

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    build_real_store(folder / "store")
    changes = {"curriculum__num_tokens": tuple(steps * PER_STEP for steps in STEPS), "checkpoint__every_steps": 10}
    changes |= {"evaluation__every_steps": 20}
    config = write_config(folder / "config.py", store=folder / "store", **changes)
    whole, elastic = folder / "whole", folder / "elastic"
    finish(start(config, whole, processes=1, devices=1), 0)
    starts = train_in_parts(config, elastic)
    hashes, expected = batches_of(elastic), batches_of(whole)
    wrong = [step for step in expected if hashes.get(step) != expected[step]]
    logs = [[row for row in kill_resume.rows_of(workdir) if row["kind"] == "train"] for workdir in (elastic, whole)]
    steps = [row["step"] for row in logs[0]]
    is_whole = steps == list(range(1, sum(STEPS) + 1)) == [row["step"] for row in logs[1]]
    losses = [np.array([row["loss"] for row in log]) for log in logs]
    difference = np.abs(losses[0] / losses[1] - 1) if is_whole else np.array([np.inf])
    print("| processes x devices | from step | losses as on one device: largest difference |\n|---|---|---|")
    for (processes, devices, first), (*_, last) in zip(starts, [*starts[1:], (0, 0, sum(STEPS) + 1)], strict=True):
        print(f"| {processes} x {devices} | {first} | {difference[first - 1 : last - 1].max():.1e} |")
    print(f"{len(expected)} steps, {len(wrong)} with other tokens; each logged once: {is_whole}")
    return int(bool(wrong) or not is_whole or difference.max() > 1e-4)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        del sys.argv[1]
        child()
    else:
        sys.exit(main())
