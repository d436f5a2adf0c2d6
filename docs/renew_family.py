"""Renew configs/family/, each file by the command that it names, and its table: `python docs/renew_family.py`.

After a change of the keys of a config or of a rule. Layouts are those of configs/family/table.json.
"""

from __future__ import annotations

import contextlib
import re
import runpy
import shlex
from pathlib import Path

from btlm_jax.cli import DONE, main
from btlm_jax.plan.chips import GIB
from btlm_jax.plan.placement import span
from btlm_jax.plan.pod_table import Row, read_table, read_versions, training_fields
from btlm_jax.recipe.config import TrainConfig, train_config_from
from btlm_jax.recipe.sizes import count_parameters

ROOT = Path(__file__).resolve().parent.parent
FAMILY = ROOT / "configs" / "family"
TABLE = FAMILY / "table.json"
PAGE = ROOT / "docs" / "reference" / "family.md"
PLANNED = "2026-11-30"  # when the table of layouts was compiled
BTLM_TOKENS_PER_PARAMETER = 237.2
_MARKED = re.compile(r"(<!-- family -->\n).*?(<!-- end of family -->)", flags=re.DOTALL)


def table() -> str:
    """Return the table as Markdown."""
    rows = read_table(TABLE)
    configs = {
        path.stem: train_config_from(runpy.run_path(str(path))["get_config"]().to_dict())
        for path in FAMILY.glob("*.py")
    }
    names = sorted(configs, key=lambda name: count_parameters(configs[name].model))
    lines = [
        "| config | parameters | layers, width, heads | tokens at 20 a parameter | at 237 | batch | where | GiB "
        "| time at 20 | at 237 |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_line(name, configs[name], rows) for name in names),
    ]
    if any(row.name in configs for row in rows):
        versions = ", ".join(f"{name} {version}" for name, version in read_versions(TABLE).items())
        lines += [
            "",
            f"Memory of a chip and times are predicted by `btlm plan --table=configs/family/table.json` ({PLANNED},",
            f"{versions}), not measured on a TPU; the time at 237 is for the batch at 20.",
            "Exchanges, step times and MFU: `configs/family/table.md`; on other slices: the [pod table](pod-table.md).",
            "`btlm train` on TPUs asks the table of the config's folder, `family` or `pods`, whether a layout fits.",
        ]
    lines += ["", "4M is for CPUs: `btlm new --machine=this` measures it on yours."]
    return "\n".join(lines)


def command_of(path: Path) -> list[str]:
    """Return the arguments of btlm that wrote a file of the family, in its folder."""
    (command,) = re.findall(r"^Written by: btlm (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return shlex.split(command)


def renewed(page: str) -> str:
    """Return the page with the table as it is now."""
    return _MARKED.sub(lambda match: f"{match[1]}\n{table()}\n\n{match[2]}", page)


def _line(name: str, config: TrainConfig, rows: list[Row]) -> str:
    model, curriculum = config.model, config.curriculum
    count, tokens = count_parameters(model), curriculum.table.num_tokens
    place, memory, seconds = "", "", []
    for row in rows:
        if row.name == name and row.trains == training_fields(config):
            place, memory = row.topology, f"{row.needed / GIB:.2f} of {row.available / GIB:.2f}"
            seconds = list(row.run_seconds(curriculum.table))
    longer = BTLM_TOKENS_PER_PARAMETER * count / tokens
    times = [span(*seconds), span(*(longer * each for each in seconds))] if seconds else ["", ""]
    batches = zip(curriculum.batch_size, curriculum.seq_len, strict=True)
    cells = [
        f"`family/{name}`",
        f"{count:,}",
        f"{model.num_layers}, {model.d_model:,}, {model.num_heads} x {model.head_dim}",
        f"{tokens / 1e9:.3g} B",
        f"{BTLM_TOKENS_PER_PARAMETER * count / 1e9:.3g} B",
        ", ".join(f"{sequences:,} x {length:,}" for sequences, length in batches),
        place,
        memory,
        *times,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    with contextlib.chdir(FAMILY):
        for file in sorted(FAMILY.glob("*.py")):
            assert main([*command_of(file), "--replace"]) == DONE, file
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
