"""Flip single bits in the files of a run's newest checkpoint, and see that a start names the damage or is not harmed.

Command: python benchmarks/damaged_checkpoint.py --flips=300
Makes two checkpoints of a tiny model in a temporary directory. A third of the flips falls on any byte of the newer one,
a third on its files by turns, a third on the largest of the arrays' files. After each, the checkpoints are opened as a
start of btlm train opens them. Either the newer one is set aside with a reason and the older one taken, or what comes
back is what was saved to the bit: parameters, moments, position, config, environment. Prints a row a file and exits
with 1 when anything else happened.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from btlm_jax import notices
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.recipe.config import TrainConfig, train_config_from
from btlm_jax.train import CHECKPOINTS, DAMAGED
from btlm_jax.train.checkpoint import Checkpointer, Position, last_position, restore_last
from btlm_jax.train.program import Program, make_program
from btlm_jax.train.step import TrainState

CONFIG = Path(__file__).parent.parent / "configs" / "local_cpu.py"
STEPS = (3, 6)
NAMED, HARMLESS, UNNOTICED = "named", "harmless", "UNNOTICED"


def make_config() -> TrainConfig:
    """Return configs/local_cpu.py with a tiny model."""
    values = runpy.run_path(str(CONFIG))["get_config"]().to_dict()
    values["model"] |= {"vocab_size": 64, "num_layers": 2, "d_model": 16, "num_heads": 2, "d_ff": 24}
    return train_config_from(values)


def make_checkpoints(workdir: Path, config: TrainConfig, program: Program) -> TrainState:
    """Write the two checkpoints, of random values; return the state of the newer one."""
    checkpointer, rng = Checkpointer(workdir, config=config.checkpoint), np.random.default_rng(0)

    def random_array(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(rng.uniform(0.01, 0.1, leaf.shape).astype(leaf.dtype), leaf.sharding)

    state = program.state
    for step in STEPS:
        state = jax.tree.map(random_array, program.state)
        checkpointer.save(state, position=position_of(config, step), config=config)
    checkpointer.wait()
    checkpointer.close()
    return state


def position_of(config: TrainConfig, step: int) -> Position:
    """Return the position after a step."""
    tokens_seen = config.curriculum.table.tokens_seen(step)
    return Position(step=step, tokens_seen=tokens_seen, store_fingerprint="abc")


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    contents = bytearray(path.read_bytes())
    contents[bit // 8] ^= 1 << bit % 8
    path.write_bytes(contents)


def outcome(workdir: Path, config: TrainConfig, program: Program, *, saved: TrainState, environment: dict) -> str:
    """Return what a start makes of the workdir's checkpoints: one of the three words, and why."""
    checkpointer = Checkpointer(workdir, config=config.checkpoint)
    try:
        first = last_position(checkpointer, config)
        restored = restore_last(checkpointer, config, abstract=program.state)
        found = checkpointer.read_environment(restored.position.step)
        _, found_config = checkpointer.read_metadata(restored.position.step)
    finally:
        checkpointer.close()
    events = first.events + restored.events
    if restored.position.step == STEPS[0]:
        aside = (workdir / DAMAGED / f"{CHECKPOINTS}-{STEPS[1]}").is_dir()
        return f"{NAMED}: {events[0]}" if len(events) == 1 and aside else f"{UNNOTICED}: {events}"
    same = jax.tree.all(
        jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), restored.state, saved)
    )
    same &= found_config == config and found == environment and not events
    return HARMLESS if same and restored.position == position_of(config, STEPS[1]) else f"{UNNOTICED}: other values"


def try_flips(folder: Path, *, flips: int, seed: int) -> dict[str, collections.Counter[str]]:
    """Try so many flips; return, for each file of the checkpoint, how often each of the three outcomes was."""
    config, rng = make_config(), random.Random(seed)
    program = make_program(config, make_mesh(devices=jax.devices()[:1], tensor=1))
    saved = make_checkpoints(folder / "saved", config, program)
    original = Checkpointer(folder / "saved", config=config.checkpoint)
    environment = original.read_environment(STEPS[1])
    original.close()
    newest = folder / "saved" / CHECKPOINTS / str(STEPS[1])
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    rows: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    sizes = [(newest / file).stat().st_size for file in files]
    of_arrays = max((file for file in files if "d" in file.parts), key=lambda file: (newest / file).stat().st_size)
    for number in range(flips):
        file = (rng.choices(files, sizes)[0], files[number // 3 % len(files)], of_arrays)[number % 3]
        workdir = folder / f"flip-{number}"
        shutil.copytree(folder / "saved", workdir)
        path = workdir / CHECKPOINTS / str(STEPS[1]) / file
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        said = outcome(workdir, config, program, saved=saved, environment=environment)
        rows[_shown(file)][said.partition(":")[0]] += 1
        if said.startswith(UNNOTICED):
            print(f"bit {bit} of {file}: {said}", file=sys.stderr)
        shutil.rmtree(workdir)
    return rows


def _shown(file: Path) -> str:
    """Return a file's name, of those that hold arrays one for all."""
    return f"{file.parent}/*" if file.parent.name == "d" else str(file)


def table(rows: dict[str, collections.Counter[str]]) -> str:
    """Return a row a file and one of totals."""
    total: collections.Counter[str] = sum(rows.values(), collections.Counter())
    width = max(map(len, rows))
    lines = [f"{'file':{width}} {NAMED:>9} {HARMLESS:>9} {UNNOTICED:>9}"]
    for name, counts in (*sorted(rows.items()), ("all", total)):
        lines.append(f"{name:{width}} " + " ".join(f"{counts[each]:9}" for each in (NAMED, HARMLESS, UNNOTICED)))
    return "\n".join(lines)


def main() -> int:
    """Print the table; return 1 when a flip was neither named nor harmless."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    notices.print_with(lambda line: None)
    with tempfile.TemporaryDirectory() as folder:
        rows = try_flips(Path(folder), flips=options.flips, seed=options.seed)
    print(table(rows))
    return int(any(counts[UNNOTICED] for counts in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
