"""Are there better constants than BTLM's at this scale? A search on the proxy, and the large config that it writes.

    python -m experiments.search --folder=DIR [--data FILES] [--quick]

DIR is the directory of `btlm tune search`, whose trials this makes: the same command goes on there, and ends a piece
with Ctrl-C. Then `btlm new --constants` writes a config of more parameters, and a few of its steps are trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import machine
from btlm_jax import notices
from btlm_jax.cli import DONE, main
from btlm_jax.cli.parse import load_config
from btlm_jax.display.plotting import new_panels, write_figure
from btlm_jax.recipe.config import train_config_from
from btlm_jax.storage.files import read_json_object
from btlm_jax.train import SUMMARY_FILE
from experiments.study import make_one_store, write_results

FOLDER = Path(__file__).parent
POINTS = {"": 40, "quick": 6, "large": 120}
LARGE_PARAMETERS, LARGE_STEPS = "12M", 12


def search_arguments(folder: Path, *, size: str, store: Path) -> list[str]:
    """Return the command of the search."""
    config = FOLDER / "config.py"
    return [
        "tune", "search", f"--directory={folder}", f"--config={config}:{size}" if size else f"--config={config}",
        f"--config.data.store={store.resolve()}", "--config.corpus.source=prepared", f"--points={POINTS[size]}",
        f"--fresh_seeds={2 if size == 'quick' else 5}",
    ]  # fmt: skip


def large_arguments(folder: Path, *, vocab_size: int, store: Path) -> list[list[str]]:
    """Return the commands that write the large config and train its first steps on the store."""
    config, step = folder / "large.py", 512
    new = [
        "new", f"--params={LARGE_PARAMETERS}", f"--vocab_size={vocab_size}", "--seq_len=512",
        f"--constants={folder / 'search.json'}", f"--output={config}", "--replace",
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


def run(folder: Path, data: Sequence[str], *, size: str) -> int:
    """Make the trials that are missing, write and train the large config, report; return an exit code."""
    config = train_config_from(load_config(FOLDER / "config.py", argument=size, changes={}))
    notices.begin(strict=())
    store = make_one_store(config, data, folder)[""]
    notices.finish()
    code = main(search_arguments(folder, size=size, store=store))
    if code != DONE:
        return code
    for arguments in large_arguments(folder, vocab_size=config.model.vocab_size, store=store):
        if (code := main(arguments)) != DONE:
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
        "text": [Path(each).name for each in data],
        "search": read_json_object(folder / "search.json"),
        "large": {
            "parameters": count_parameters(large.model),
            "steps": LARGE_STEPS,
            "first_loss": evaluated[0],
            "last_loss": read_json_object(folder / "large" / SUMMARY_FILE)["heldout"]["loss"],
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the trials, outside of the repository")
    parser.add_argument("--data", nargs="*", default=[], help="raw text; without it docs of the installed packages")
    parser.add_argument("--quick", action="store_true", help="config.py:quick: some minutes")
    parser.add_argument("--large", action="store_true", help="config.py:large")
    options = parser.parse_args()
    sys.exit(run(options.folder, options.data, size="quick" if options.quick else "large" if options.large else ""))
