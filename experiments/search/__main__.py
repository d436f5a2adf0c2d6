"""Are there better constants than BTLM's at this scale? A search on the proxy, and the large config that it writes.

    python -m experiments.search --folder=DIR [--data FILES] [--quick]

DIR/search is the directory of `btlm tune search`: the same command goes on there, and ends a piece with Ctrl-C; another
size or text needs another DIR. Then `btlm new --constants` writes a config of more parameters, and a few of its steps
are trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import machine
from btlm_jax.cli import DONE
from btlm_jax.cli.parse import Flags, load_config
from btlm_jax.display.plotting import new_panels, write_figure
from btlm_jax.recipe.config import train_config_from
from btlm_jax.storage.files import read_json_object
from btlm_jax.train import SUMMARY_FILE
from btlm_jax.tune import trials
from experiments.study import (
    check_text,
    config_of_size,
    define_sizes,
    make_one_store,
    names_of,
    run_command,
    run_verb,
    size_of,
    write_results,
)

FOLDER = Path(__file__).parent
POINTS = {"": 40, "quick": 6, "large": 120}
LARGE_PARAMETERS, LARGE_STEPS = "12M", 12


def search_arguments(folder: Path, *, size: str, store: Path) -> list[str]:
    """Return the command of the search."""
    return [
        "tune", "search", f"--directory={folder / 'search'}", f"--config={config_of_size(FOLDER, size)}",
        f"--config.data.store={store.resolve()}", "--config.corpus.source=prepared", f"--points={POINTS[size]}",
        f"--fresh_seeds={2 if size == 'quick' else 5}",
    ]  # fmt: skip


def large_arguments(folder: Path, *, vocab_size: int, store: Path) -> list[list[str]]:
    """Return the commands that write the large config and train its first steps on the store."""
    config, step = folder / "large.py", 512
    new = [
        "new", f"--params={LARGE_PARAMETERS}", f"--vocab_size={vocab_size}", "--seq_len=512",
        f"--constants={folder / 'search' / 'search.json'}", f"--output={config}", "--replace",
    ]  # fmt: skip
    tokens = f"({LARGE_STEPS // 2 * step}, {LARGE_STEPS // 2 * step})"
    train = [
        "train", f"--config={config}", f"--workdir={folder / 'large'}", f"--config.data.store={store.resolve()}",
        "--config.curriculum.batch_size=(4, 1)", f"--config.curriculum.num_tokens={tokens}",
        f"--config.optimizer.warmup_tokens={2 * step}", "--config.log.sample_tokens=1",
        "--config.evaluation.blocks_per_source=2", "--config.evaluation.batch_size=2", "--config.model.dtype=float32",
    ]  # fmt: skip
    return [new, train]


def describe(values: dict) -> str:
    """Return what the search found, against the config."""
    found = values["search"]
    fresh = found["fresh"]
    lines = [f"{len(found['rungs'][0]) - 1} points, {len(found['final']) - 1} and BTLM's constants on all tokens."]
    for name, gain in (("as chosen", found["gain"]), (f"with {fresh['seeds']} fresh seeds", fresh["gain"])):
        if gain and gain["nats"] is not None:
            ends = "" if gain["low"] is None else f", 90 % from {gain['low']:+.4f} to {gain['high']:+.4f}"
            lines.append(f"The best is better than BTLM's constants by {gain['nats']:+.4f} nats {name}{ends}.")
    lines += ["", "| key | BTLM | best | importance, 90 % |", "|---|---|---|---|"]
    shares = {each["key"]: each for each in found["importance"]}
    best = next(each for each in found["final"] if each["values"])["values"]
    for key, share in shares.items():
        lines.append(
            f"| {key} | {found['own'][key]:.4g} | {best[key]:.4g} | {share['share']:.2f}, {share['low']:.2f} to "
            f"{share['high']:.2f} |"
        )
    large = values["large"]
    lines.append(
        f"\nThe written config of {large['parameters']:,} parameters: loss {large['first_loss']:.2f} before, "
        f"{large['last_loss']:.2f} after {large['steps']} steps."
    )
    return "\n".join(lines)


def plot(values: dict, path: Path) -> None:
    """Draw the losses of the first rung against each key."""
    points, keys = values["search"]["first_rung"], [each["key"] for each in values["search"]["importance"]]
    figure, panels = new_panels(size=(3.0 * len(keys), 3.2), dpi=100, columns=len(keys))
    for panel, key in zip(panels, keys, strict=True):
        finite = [point for point in points if point["loss"] is not None]
        panel.plot([point["values"][key] for point in finite], [point["loss"] for point in finite], "o", markersize=4)
        panel.axvline(values["search"]["own"][key], color="black", linestyle=":")
        panel.set_xscale("log")
        panel.tick_params(which="minor", labelbottom=False)
        panel.set_xlabel(key.rpartition(".")[2])
    panels[0].set_ylabel("held-out loss, first rung")
    write_figure(figure, path)


def conduct(arguments: Sequence[str]) -> int:
    """Make the trials that are missing, write and train the large config, report; return an exit code.

    Raises:
      UsageError, ValueError, OSError: as `btlm train` raises them; the folder is another size's or text's.
    """
    flags = Flags(f"python -m experiments.{FOLDER.name}: {__doc__}")
    define_sizes(flags)
    flags.define_paths("data", "raw text, as btlm train --data takes it; without it docs of the installed packages")
    if not flags.parse(arguments):
        return DONE
    folder, data, size = flags.path("folder"), flags.strings("data"), size_of(flags)
    config = train_config_from(load_config(FOLDER / "config.py", argument=size, changes={}))
    study = {"kind": FOLDER.name, "argument": size, "text": names_of(data), "config": dataclasses.asdict(config)}
    trials.begin_study(folder, study)
    check_text(data, folder)
    store = make_one_store(config, data, folder)[""]
    large = large_arguments(folder, vocab_size=config.model.vocab_size, store=store)
    for command in (search_arguments(folder, size=size, store=store), *large):
        if (code := run_verb(command)) != DONE:
            return code
    values = gather(folder, data, size=size)
    output = folder if size else FOLDER
    write_results(values, output, plot=plot, text=describe(values))
    return DONE


def gather(folder: Path, data: Sequence[str], *, size: str) -> dict:
    """Return the results of a finished search and of its large config's first steps."""
    from btlm_jax.recipe.sizes import count_parameters
    from btlm_jax.train.metric_writer import read_metrics

    large = train_config_from(load_config(folder / "large.py", argument="", changes={}))
    evaluated = [row["loss"] for row in read_metrics(folder / "large" / "metrics.jsonl") if row["kind"] == "eval"]
    return {
        "experiment": FOLDER.name,
        "command": f"python -m experiments.{FOLDER.name} --folder=DIR" + (f" --{size}" if size else ""),
        "machine": machine("jax", "numpy"),
        "text": names_of(data),
        "search": read_json_object(folder / "search" / "search.json"),
        "large": {
            "parameters": count_parameters(large.model),
            "steps": LARGE_STEPS,
            "first_loss": evaluated[0],
            "last_loss": read_json_object(folder / "large" / SUMMARY_FILE)["heldout"]["loss"],
        },
    }


if __name__ == "__main__":
    run_command(FOLDER.name, conduct)
