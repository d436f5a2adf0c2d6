"""Held-out evaluation during a run, and its end: final evaluation, plots, a sample, and a summary."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding

from btlm_jax import notices
from btlm_jax.data.loader import Batch, Rows, make_placement, read_ahead, read_rows
from btlm_jax.data.reader import TokenStore
from btlm_jax.data.store import HELDOUT, Split, streams_of
from btlm_jax.parallel.mesh import evaluation_sharding
from btlm_jax.recipe.config import OptimizerConfig, TrainConfig
from btlm_jax.storage.files import read_json_object, write_atomically
from btlm_jax.storage.location import mirror_of
from btlm_jax.train import CHECKPOINTS, CONFIG_FILE, LOSS_PLOT, METRICS_FILE, POSITION_PLOT, SUMMARY_FILE, TENSORBOARD
from btlm_jax.train.checkpoint import decay_again, flags_of
from btlm_jax.train.heldout import HeldoutResult, evaluate_heldout
from btlm_jax.train.metric_writer import MetricWriter, medians_of_phases, read_metrics, text_of
from btlm_jax.train.setup import Run, check_curriculum, log

ContinuePrompt = Callable[[Run, dict], str]  # (run, parameters) -> the continuation of log.sample_prompt


def evaluate_some(run: Run, params: dict) -> HeldoutResult:
    """Return the held-out loss over the first evaluation.blocks_per_source blocks of each source."""
    return _evaluate(run, params, blocks_per_source=run.config.evaluation.blocks_per_source)


def heldout_batches(
    token_store: TokenStore,
    *,
    batch_size: int,
    blocks_per_source: int,
    prefetch: int,
    sharding: NamedSharding,
    most_documents: int = 0,
) -> Generator[tuple[list[str], Batch]]:
    """Yield (source of each row, batch) over the first `blocks_per_source` held-out blocks of every source.

    Leaves are [batch_size, block_len], placed by `sharding`, for example P("fsdp"). Sources come in the order of their
    blocks; of a source with fewer blocks all are read, so the split's num_blocks reads everything. The last batch is
    filled with rows of zero weight, whose source is "". `most_documents` is that of `read_rows`.
    """
    reader = token_store.split(HELDOUT)
    blocks = heldout_blocks(reader.split, blocks_per_source=blocks_per_source)
    num_batches = -(-len(blocks) // batch_size)
    sources = [source for source, _ in blocks] + [""] * (num_batches * batch_size - len(blocks))
    placement = make_placement(sharding, rows_shape=(batch_size,), seq_len=reader.block_len)

    def read_batch(index: int) -> Rows:
        numbers = [index * batch_size + number for number in placement.row_numbers.tolist()]
        starts = [(blocks[number][1], 0) for number in numbers if number < len(blocks)]
        rows = read_rows(reader, starts, seq_len=reader.block_len, most_documents=most_documents)
        missing = len(numbers) - len(starts)
        return {name: np.pad(leaf, ((0, missing), (0, 0))) for name, leaf in rows.items()}

    with contextlib.closing(read_ahead(read_batch, range(num_batches), prefetch=prefetch)) as rows_of_batches:
        for index, rows in enumerate(rows_of_batches):
            yield sources[index * batch_size : (index + 1) * batch_size], placement.place(rows)


def heldout_blocks(split: Split, *, blocks_per_source: int) -> list[tuple[str, int]]:
    """Return (source, block) of the first `blocks_per_source` blocks of each source, in the order of the blocks."""
    return [
        (name, block)
        for name, source in streams_of(split)
        for block in range(source.first_block, source.first_block + min(blocks_per_source, source.num_blocks))
    ]


def final_blocks_per_source(run: Run) -> int:
    """Return how many blocks of each source, at most, the final loss is of."""
    manifest = run.token_store.manifest
    split = manifest.splits[HELDOUT]
    if run.most_heldout_tokens is None:
        return split.num_blocks
    return max(1, run.most_heldout_tokens // manifest.block_len // len(split.sources))


def num_final_evaluations(optimizer: OptimizerConfig) -> int:
    """Return how often the end evaluates: the last weights, and their average where there is one."""
    return 1 if optimizer.average == "none" else 2


def finish_run(
    run: Run, params: dict, writer: MetricWriter, *, continue_prompt: ContinuePrompt, opt_state: optax.OptState = ()
) -> None:
    """Evaluate on the held-out text, draw the plots, continue the prompt, write and print the summary.

    What only this end needs, plots and decoding, is imported here. The last checkpoint is complete by now, so an error
    loses nothing: the same command repeats the end alone.
    """
    from btlm_jax.train.plots import plot_loss, plot_position

    step = run.config.curriculum.table.num_steps
    split, num_blocks = run.token_store.manifest.splits[HELDOUT], final_blocks_per_source(run)
    count = len(heldout_blocks(split, blocks_per_source=num_blocks))
    text = "all held-out text" if count == split.num_blocks else f"{count:,} of {split.num_blocks:,} held-out blocks"
    log(f"All steps are trained; what is left: the loss on {text}, a sample, the plots")
    result = _evaluate(run, params, blocks_per_source=num_blocks)
    writer.evaluation(step, result)
    of_average = {}
    if num_final_evaluations(run.config.optimizer) == 2:
        averaged = _evaluate(run, optax.tree.get(opt_state, "average"), blocks_per_source=num_blocks)
        of_average = {"heldout_of_average": averaged.to_json()}
    with run.ledger.measure("sample"):
        sample = continue_prompt(run, params)
    writer.sample(step, prompt=run.config.log.sample_prompt, continuation=sample)
    writer.finish()
    if jax.process_index() != 0:
        return
    rows = read_metrics(run.workdir / METRICS_FILE)
    plot_loss(rows, run.config.curriculum.table, run.workdir / LOSS_PLOT)
    mask, seq_lens = run.config.data.document_mask, run.config.curriculum.seq_len
    plot_position(result, run.workdir / POSITION_PLOT, seq_lens=seq_lens, document_mask=mask)
    summary = {
        "num_steps": step,
        "num_tokens": run.config.curriculum.table.num_tokens,
        "data": check_curriculum(run.config, run.token_store.manifest).to_json(),
        "heldout": result.to_json(),
        **of_average,
        "sample": {"prompt": run.config.log.sample_prompt, "continuation": sample},
        "seconds": run.ledger.seconds(),
        **_steps_beside_prediction(run, rows),
    }
    write_atomically(run.workdir / SUMMARY_FILE, json.dumps(summary, indent=2))
    log(_summary_text(summary, run.config, run.workdir))


def _steps_beside_prediction(run: Run, rows: Sequence[dict]) -> dict:
    """Return for the summary what steps took beside what was predicted; nothing where nothing was, or of few steps."""
    seconds, ratios = (
        medians_of_phases(rows, run.config.curriculum.table, name) for name in ("seconds", "seconds_over_predicted")
    )
    steps = [
        {"phase": phase + 1, "seconds": seconds[phase], "seconds_over_predicted": ratio}
        for phase, ratio in ratios.items()
    ]
    return {"steps": {"topology": run.prediction.topology, "phases": steps}} if steps else {}


def finished_report(config: TrainConfig, *, workdir: Path, step: int) -> str:
    """Return the report of a run whose checkpoint is at `step` if it is complete, or "" if it has steps left."""
    path = workdir / SUMMARY_FILE
    if step == 0 or step != config.curriculum.table.num_steps or not path.is_file():
        return ""
    summary = _read_summary(path)
    if summary is None or summary["num_steps"] != step:
        return ""
    return f"Already done: {workdir} has trained its {step:,} steps.\n" + _summary_text(summary, config, workdir)


def _read_summary(path: Path) -> dict | None:
    """Return what `finish_run` wrote, or None, with a notice, if the file is damaged."""
    try:
        summary = read_json_object(path)
    except ValueError as error:
        notices.report("summary-made-again", f"{error}; it is made again")
        return None
    match summary:
        case {
            "num_steps": int(),
            "num_tokens": int(),
            "heldout": {"sources": dict(sources)},
            "sample": {"prompt": str(), "continuation": str()},
        } if all(_has_losses(source) for source in sources.values()):
            return summary
    notices.report("summary-made-again", f"{path} lacks a part of a run's summary; it is made again")
    return None


def _has_losses(source: object) -> bool:
    return isinstance(source, dict) and all(isinstance(source.get(x), float) for x in ("loss", "bits_per_byte"))


def _evaluate(run: Run, params: dict, *, blocks_per_source: int) -> HeldoutResult:
    batches = heldout_batches(
        run.token_store,
        batch_size=run.config.evaluation.batch_size,
        blocks_per_source=blocks_per_source,
        prefetch=run.config.data.prefetch,
        sharding=evaluation_sharding(run.mesh),
        most_documents=run.most_documents,
    )
    with run.ledger.measure("evaluation"):
        return evaluate_heldout(run.eval_step, params, batches, manifest=run.token_store.manifest)


def longer_flags(config: TrainConfig) -> tuple[str, str]:
    """Return how a finished run may go on for 100 steps, and the flags for it.

    Where the schedule would be stretched by them it warms up and decays once more.
    """
    curriculum, optimizer = config.curriculum, config.optimizer
    more_tokens, total_tokens = 100 * curriculum.table.tokens_per_step, curriculum.table.num_tokens
    longer = (*curriculum.num_tokens[:-1], curriculum.num_tokens[-1] + more_tokens)
    flags = f'--config.curriculum.num_tokens="{longer}"'
    if optimizer.schedule == "constant" or optimizer.schedule_tokens:
        return "its schedule stays as it is", flags
    again = decay_again(optimizer, tokens=total_tokens, total_tokens=total_tokens, more_tokens=more_tokens)
    return "the learning rate warms up and decays once more, choose its peak", f"{flags} {flags_of(again)}"


def longer_command(config: TrainConfig, workdir: Path, *, data: object) -> tuple[str, str]:
    """Return how a finished run may go on for 100 steps, and the command; `data` is that of its summary.

    The command is of the workdir's config, which is right for runs that were begun with --data or --init too.
    """
    how, flags = longer_flags(config)
    table = config.curriculum.table
    growth = 1 + 100 * table.tokens_per_step / table.num_tokens
    epochs = math.ceil(growth * max(_epochs(data).values(), default=0.0))
    if epochs > config.data.max_epochs:
        flags += f" --config.data.max_epochs={epochs}"
    words = shlex.join(["btlm", "train", f"--config={workdir / CONFIG_FILE}", f"--workdir={workdir}"])
    return how, f"{words} {flags}"


def _epochs(data: object) -> dict[str, float]:
    """Return how many epochs were read, by source or under "", where a summary says it."""
    match data:
        case {"epochs": float(epochs)}:
            return {"": epochs}
        case {"sources": dict(sources)}:
            epochs = {name: source.get("epochs") for name, source in sources.items() if isinstance(source, dict)}
            return {name: value for name, value in epochs.items() if isinstance(value, float) and value}
    return {}


def _epochs_text(data: object) -> str:
    """Return how many epochs the tokens were; nothing of a summary that does not say it."""
    return "".join(f", {value:.3f} epochs" + f" of {name}" * bool(name) for name, value in _epochs(data).items())


def _average_rows(summary: dict, config: TrainConfig) -> Iterator[str]:
    """Yield the held-out loss of the averaged weights, where a summary has it."""
    match summary.get("heldout_of_average"):
        case {"sources": dict(sources)} if all(_has_losses(source) for source in sources.values()):
            yield f"Of the averaged weights (optimizer.average={config.optimizer.average}):"
            yield from _heldout_rows(sources)


def _step_rows(summary: dict) -> Iterator[str]:
    """Yield what steps took beside what was predicted, where a summary has it."""
    match summary.get("steps"):
        case {"phases": [*phases]}:
            parts = [
                f"{each['seconds']:.3g} s in phase {each['phase']}, {each['seconds_over_predicted']:.2f} times what "
                "was predicted"
                for each in phases
            ]
            yield f"A step took {'; '.join(parts)} (medians)"


def _plan_rows(summary: dict, workdir: Path) -> Iterator[str]:
    """Yield the command by which later predictions take a run's steps into account, where there is one."""
    match summary.get("steps"):
        case {"topology": str(topology)} if topology:
            command = shlex.join(["btlm", "plan", f"--measured={workdir}", f"--topology={topology}"])
            yield f"  {command}   later predictions by these steps"


def _heldout_rows(sources: dict) -> list[str]:
    return [
        f"  {name:<12} {source['loss']:.4f} nats/token   {source['bits_per_byte']:.4f} bits/byte"
        for name, source in sources.items()
    ]


def _summary_text(summary: dict, config: TrainConfig, workdir: Path) -> str:
    heldout, prompt = summary["heldout"], summary["sample"]["prompt"]
    how, longer = longer_command(config, workdir, data=summary.get("data"))
    report = " --output=report.html" if mirror_of(workdir).is_remote else ""  # nothing is written to a bucket
    lines = [
        "",
        f"Done: {summary['num_steps']:,} steps, {summary['num_tokens']:,} tokens{_epochs_text(summary.get('data'))}.",
        "Held-out loss:",
        *_heldout_rows(heldout["sources"]),
        *_average_rows(summary, config),
        *_step_rows(summary),
        f"Sample: {text_of(summary['sample'])}",
        "Where everything is:",
        f"  {workdir / LOSS_PLOT}, {workdir / POSITION_PLOT}   the curves",
        f"  {workdir / METRICS_FILE}, {workdir / TENSORBOARD}   every number",
        f"  {workdir / CHECKPOINTS}   checkpoints    {workdir / SUMMARY_FILE}   this, as JSON",
        "What to run next:",
        f"  with more tokens the run goes on from here; {how}:",
        f"  {longer}",
        f"  {'' if shutil.which('tensorboard') else f'{sys.executable} -m pip install tensorboard && '}"
        + shlex.join(["tensorboard", f"--logdir={workdir / TENSORBOARD}"]),
        *_plan_rows(summary, workdir),
        f"  {shlex.join(['btlm', 'report', str(workdir)])}{report}",
        f"  {shlex.join(['btlm', 'generate', f'--checkpoint={workdir}'])} --prompt={shlex.quote(prompt)}",
    ]
    return "\n".join(lines)
