"""Workdirs of runs whose steps' seconds were made up, for tests of what is measured by them."""

import json
from pathlib import Path

from support.tiny import tiny_config

TOKENS = tiny_config().curriculum.table.tokens_per_step
RUN = tiny_config(model__remat="full", mesh__accumulation=2, curriculum__num_tokens=(20 * TOKENS, 10 * TOKENS))


def write_run(workdir: Path, *, steps: int, devices: str = "4 x TPU v5 lite") -> None:
    """Write what a run of RUN leaves: steps of 2 s in the first phase, of 3 s in the second, the first three of 9 s."""
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(RUN.to_json())
    write_start(workdir, number=0, facts={"devices": devices})
    write_start(workdir, number=1)  # one that ended before it knew
    first, _ = RUN.curriculum.table.phases
    rows = [
        {"kind": "train", "step": step, "tokens": 1, "seq_len": 1, "learning_rate": 1.0, "loss": 1.0, "grad_norm": 1.0,
         "tokens_per_second": 1.0, "mfu": 0.1, "seconds": 9.0 if step < 4 else 2.0 if step <= first.num_steps else 3.0}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_start(workdir: Path, *, number: int, **parts: object) -> None:
    """Write the record of a start that lasted a second, with these parts of it."""
    (workdir / "starts").mkdir(parents=True, exist_ok=True)
    row = {"began": 0.0, "written": 1.0, "host": "host", "pid": 1, "command": ["btlm", "train"], "facts": {}}
    row |= {"number": number, "seconds": {"total": 1.0}, "marks": [], "notices": {}, **parts}
    (workdir / "starts" / f"{number}.json").write_text(json.dumps(row))
