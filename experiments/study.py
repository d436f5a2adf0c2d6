"""An experiment: ordinary training runs of a config's variants in one folder; then its numbers and its figure.

    python -m experiments.NAME --folder=DIR [--data FILES]

    DIR/corpus, DIR/store    what --data was made into; without it the documentation of the installed packages
    DIR/trials/VARIANT-sN    the runs, as btlm_jax/tune/trials.py makes them, each with its measured.json

The same command goes on where it was, after a kill too; any number of them take runs from one folder. Seeds come last:
whenever time ends there are whole comparisons, with fewer seeds. What is reported is of the seeds of which every
variant is finished. An interval is Student's, of seeds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shlex
import statistics
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.machine import machine
from btlm_jax import notices, stopping
from btlm_jax.cli import DONE, PREEMPTED, USAGE, UsageError, main, quiet_orbax
from btlm_jax.cli.parse import Flags
from btlm_jax.recipe.config import PREPARED, TrainConfig
from btlm_jax.stopping import Stopped
from btlm_jax.storage.files import read_json_object, write_atomically

MEASURED_FILE, RESULTS_FILE, FIGURE_FILE = "measured.json", "results.json", "figure.png"
TEXT_FILE = "text.json"  # which raw text a folder's store is of
CORPUS_FOLDER, STORE_FOLDER = "corpus", "store"
QUICK, LARGE = "quick", "large"  # arguments of an experiment's config.py
LEVEL = 0.95

Measured = Mapping[str, dict]  # what a run left, by the variant's name


def make_one_store(config: TrainConfig, data: Sequence[str], folder: Path) -> dict[str, Path]:
    """Make the token store of raw text, or else of the installed packages' documentation; it is named ""."""
    from btlm_jax.cli.train import build_store
    from btlm_jax.display.progress import print_line
    from btlm_jax.train import setup

    if not data:
        setup.prepare_store(
            config, workdir=folder, expected_fingerprint="", build_store=build_store, wait_for_all=lambda: None
        )
        return {"": folder / config.data.store}
    from btlm_jax.corpus import own_text
    from btlm_jax.corpus.engine.workers import LocalWorkers

    store, workers = folder / STORE_FOLDER, LocalWorkers(1)
    if not setup.has_store(store):
        place = folder / CORPUS_FOLDER
        text = own_text.split_text([Path(each) for each in data], directory=place, workers=workers, log=print_line)
        tokenizer = own_text.make_tokenizer(text, vocab_size=config.model.vocab_size, directory=place, log=print_line)
        own_text.make_store(
            text, tokenizer=tokenizer, block_len=config.curriculum.table.block_len, by_source=False, output=store,
            workers=workers, log=print_line,
        )  # fmt: skip
    return {"": store}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is varied, what is measured of each run, and what is made of that.

    `make_stores` returns the config on its token stores by variant, or one under "": (config, data, folder).
    `make_variants` returns the configs by name; it is given what the runs of the first seed have left, so that some may
    follow from others, and the stores. `measure` is called of a finished run whose checkpoint is still there. A run
    is made and measured within `surround` of its variant.
    `report` gets what was measured, a mapping for each seed, and returns values of JSON.
    """

    folder: Path  # its README.md and config.py; results go there
    kind: str  # experiments of one kind share their runs
    help_text: str
    make_variants: Callable[[TrainConfig, Measured, Mapping[str, Path]], dict[str, TrainConfig]]
    report: Callable[[TrainConfig, Sequence[Measured]], dict]
    describe: Callable[[dict], str]
    plot: Callable[[dict, Path], None]
    make_stores: Callable[[TrainConfig, Sequence[str], Path], dict[str, Path]] = make_one_store
    measure: Callable[[TrainConfig, Path], dict] = lambda config, workdir: {}
    num_seeds: int = 3
    surround: Callable[[str], contextlib.AbstractContextManager[None]] = lambda variant: contextlib.nullcontext()
    may_diverge: bool = False  # a run that stops on a loss that is not finite is measured as {"loss": None}
    most_heldout_tokens: int | None = None  # that a run's loss is of; None: all there are

    @property
    def name(self) -> str:
        return self.folder.name


def run(experiment: Experiment) -> None:
    """Run the command line of an experiment and exit with its code."""
    run_command(experiment.name, functools.partial(conduct, experiment))


def run_command(name: str, command: Callable[[Sequence[str]], int]) -> None:
    """Run the command line of this process and exit with its code; Ctrl-C and SIGTERM stop it as `btlm train`."""
    stopping.begin()
    quiet_orbax()
    code = code_of_command(name, command, sys.argv[1:])
    sys.stdout.flush()
    if stopping.leave(code):
        os._exit(code)  # threads of libraries are at work
    sys.exit(code)


def code_of_command(name: str, command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run an experiment's command and return its exit code; an error is said in one line, as `btlm` does."""
    notices.begin(strict=())
    try:
        return command(arguments)
    except UsageError as error:
        print(f"{name}: usage: {error}", file=sys.stderr)
        return USAGE
    except Stopped:
        print(f"{name}: {stopping.current().said()}", file=sys.stderr)
        return PREEMPTED
    except Exception as error:
        from btlm_jax.cli import errors

        return errors.report(error, verb=f"experiment {name}", arguments=arguments)
    finally:
        notices.finish()


def run_verb(arguments: Sequence[str]) -> int:
    """Run a command of btlm within an experiment and return its exit code; what was noticed before it is said first."""
    notices.finish()
    code = main(arguments)
    notices.begin(strict=())  # its own are said
    return code


def define_sizes(flags: Flags) -> None:
    """Define the flags of an experiment made of verbs, whose config is one of config.py in three sizes."""
    flags.define_string("folder", "", "where all is made, outside of the repository; the same command goes on there")
    flags.define_boolean(QUICK, False, f"config.py:{QUICK}, some minutes")
    flags.define_boolean(LARGE, False, f"config.py:{LARGE}")


def size_of(flags: Flags) -> str:
    """Return the argument of config.py, "" for neither size.

    Raises:
      UsageError: both are given.
    """
    given = [size for size in (QUICK, LARGE) if flags.boolean(size)]
    if len(given) > 1:
        raise UsageError(f"--{QUICK} and --{LARGE} are both given, and each is a size; leave one out")
    return given[0] if given else ""


def config_of_size(folder: Path, size: str) -> str:
    """Return what --config takes for an experiment's config in a size."""
    return f"{folder / 'config.py'}{f':{size}' if size else ''}"


def experiment_flags(experiment: Experiment) -> Flags:
    """Define the flags of an experiment."""
    flags = Flags(f"python -m experiments.{experiment.name}: {experiment.help_text}")
    flags.define_string("folder", "", "where the runs go, outside of the repository; the same command goes on there")
    flags.define_paths("data", "raw text, as btlm train --data takes it; without it docs of the installed packages")
    flags.define_config()
    flags.define_integer("seeds", experiment.num_seeds, "runs of each variant; with --quick 1 unless it is given")
    flags.define_float("minutes", 0.0, "stop after so long, to be gone on with; 0: at the end")
    flags.define_boolean("quick", False, f"config.py:{QUICK}, a few minutes with one seed")
    flags.define_boolean("gather", False, "make no run: report those that are finished")
    flags.define_string(
        "output", "", "where numbers and figure go; else beside config.py, of another config to --folder"
    )
    return flags


def conduct(experiment: Experiment, arguments: Sequence[str]) -> int:
    """Make the runs that are missing and report the finished ones; return the exit code.

    Raises:
      UsageError, ValueError, OSError: as `btlm train` and `btlm tune` raise them.
    """
    flags = experiment_flags(experiment)
    if not flags.parse(arguments):
        return DONE
    folder, num_seeds = flags.path("folder"), flags.integer("seeds")
    if flags.boolean("quick"):
        if flags.is_given("config"):
            raise UsageError("--quick and --config are both given, and each names a config; leave one out")
        num_seeds = num_seeds if flags.is_given("seeds") else 1
    if num_seeds < 1 or flags.number("minutes") < 0:
        raise UsageError("--seeds must be at least 1, and --minutes not negative")
    is_own = not flags.is_given("config") and not flags.boolean("quick") and not flags.changes
    if not flags.is_given("config"):
        flags.set_string("config", config_of_size(experiment.folder, QUICK if flags.boolean("quick") else ""))
    config, data = flags.config(), flags.strings("data")
    from btlm_jax.tune import trials

    trials.begin_study(folder, {"kind": experiment.kind, "config": dataclasses.asdict(config), "text": names_of(data)})
    check_text(data, folder)
    stores = experiment.make_stores(config, data, folder)

    def choose(results: trials.Results) -> list[trials.Trial]:
        return trials_of(experiment, config, folder=folder, stores=stores, num_seeds=num_seeds)

    is_stopped = False
    if not flags.boolean("gather"):
        is_stopped = _make_runs(experiment, choose, folder=folder, minutes=flags.number("minutes"))
    seeds = finished_seeds(experiment, config, folder=folder, stores=stores)[:num_seeds]
    if not seeds:
        print(f"no seed has all its runs yet in {folder}: give the command again")
        return PREEMPTED
    values = {
        "experiment": experiment.name,
        "command": _shown_command(experiment, arguments),
        "machines": sorted({measured["machine"] for seed in seeds for measured in seed.values()}),
        "text": names_of(data) or ["documentation of the installed packages"],
        "num_seeds": len(seeds),
        "config": dataclasses.asdict(config),
        **experiment.report(config, seeds),
    }
    output = flags.optional_path("output") or (experiment.folder if is_own else folder)
    write_results(values, output, plot=experiment.plot, text=experiment.describe(values))
    return PREEMPTED if is_stopped else DONE


def trials_of(
    experiment: Experiment, config: TrainConfig, *, folder: Path, stores: Mapping[str, Path], num_seeds: int
) -> list:
    """Return the trials that there are to be, as far as what the first seed has left says; seeds come last."""
    from btlm_jax.tune.trials import Trial

    variants = experiment.make_variants(config, _measured_of(folder, seed=0), stores)
    return [
        Trial(name=f"{name}-s{seed}", config=with_seed(variant, seed))
        for seed in range(num_seeds)
        for name, variant in variants.items()
    ]


def finished_seeds(
    experiment: Experiment, config: TrainConfig, *, folder: Path, stores: Mapping[str, Path]
) -> list[Measured]:
    """Return what the runs of each seed have left, of seeds of which all are finished."""
    names = experiment.make_variants(config, _measured_of(folder, seed=0), stores).keys()
    found = []
    while names <= (measured := _measured_of(folder, seed=len(found))).keys():
        found.append({name: measured[name] for name in names})
    return found


def with_seed(config: TrainConfig, seed: int) -> TrainConfig:
    """Return the config with other initial parameters and another order of data; seed 0 is the config."""
    data = dataclasses.replace(config.data, seed=config.data.seed + seed)
    return dataclasses.replace(config, seed=config.seed + seed, data=data)


def on_store(config: TrainConfig, store: Path) -> TrainConfig:
    """Return the config on a token store that is there."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, store=str(store.resolve())),
        corpus=dataclasses.replace(config.corpus, source=PREPARED),
    )


def with_peak(config: TrainConfig, factor: float, *, end: float | None = None) -> TrainConfig:
    """Return the config with a factor on its peak rate; it ends at a share of the peak, by default the config's."""
    optimizer = config.optimizer
    peak = factor * optimizer.peak_learning_rate
    last = factor * optimizer.end_learning_rate if end is None else end * peak
    return dataclasses.replace(
        config, optimizer=dataclasses.replace(optimizer, peak_learning_rate=peak, end_learning_rate=last)
    )


def mean_and_interval(values: Sequence[float]) -> dict:
    """Return the mean of the seeds' values and its interval at LEVEL, None for the ends of one seed."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "values": list(values)}
    from btlm_jax.tune.trials import student_half_width

    half = student_half_width(values, quantile=(1 + LEVEL) / 2)
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": list(values)}


def difference_and_interval(first: Sequence[float], second: Sequence[float]) -> dict:
    """Return `mean_and_interval` of the differences of two variants, seed by seed."""
    return mean_and_interval([a - b for a, b in zip(first, second, strict=True)])


def write_results(values: dict, output: Path, *, plot: Callable[[dict, Path], None], text: str) -> None:
    """Write an experiment's numbers and figure, and print what they say."""
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / RESULTS_FILE, json.dumps(values, indent=1) + "\n")
    plot(values, output / FIGURE_FILE)
    print(f"{text}\nwrote {output / RESULTS_FILE} and {output / FIGURE_FILE}")


def shown(value: Mapping, *, digits: int = 4, sign: str = "") -> str:
    """Return a mean with its interval as text."""
    mean = f"{value['mean']:{sign}.{digits}f}"
    if value["low"] is None:
        return f"{mean} (one seed)"
    return f"{mean} ({value['low']:{sign}.{digits}f} to {value['high']:{sign}.{digits}f})"


def step_seconds(workdir: Path) -> dict[str, float]:
    """Return the seconds of a step at each sequence length: the lowest decile, which other work disturbs least."""
    from btlm_jax.train import METRICS_FILE
    from btlm_jax.train.metric_writer import read_metrics

    seconds: dict[str, list[float]] = {}
    for row in read_metrics(workdir / METRICS_FILE):
        if row["kind"] == "train":
            seconds.setdefault(str(row["seq_len"]), []).append(row["seconds"])
    return {length: sorted(each)[len(each) // 10] for length, each in seconds.items()}


def _make_runs(experiment: Experiment, choose: Callable, *, folder: Path, minutes: float) -> bool:
    """Make the runs that are missing; return whether the run was stopped before they were all made."""
    from btlm_jax.cli.tune import make_run_trial
    from btlm_jax.display.progress import print_line
    from btlm_jax.train import SUMMARY_FILE
    from btlm_jax.train.loop import BAD_NUMBERS
    from btlm_jax.train.loop import DONE as TRAINED
    from btlm_jax.tune import trials

    stop = stopping.current()
    if minutes:
        timer = threading.Timer(60 * minutes, stop.request, [f"{minutes:g} minutes are over"])
        timer.daemon = True
        timer.start()
    trials.share_compiled(folder)
    train = make_run_trial(stop, most_heldout_tokens=experiment.most_heldout_tokens)

    def run_trial(config: TrainConfig, workdir: Path) -> str:
        with experiment.surround(workdir.name.rpartition("-s")[0]):
            outcome = train(config, workdir)
            if outcome == BAD_NUMBERS and experiment.may_diverge:
                diverged = {"machine": machine("jax", "numpy"), "loss": None}
                write_atomically(workdir / MEASURED_FILE, json.dumps(diverged))
            elif outcome == BAD_NUMBERS:
                raise ValueError(
                    f"{workdir} stopped on a loss that is not finite, and cannot be compared: see its log.txt"
                )
            if outcome == TRAINED:
                heldout = read_json_object(workdir / SUMMARY_FILE)["heldout"]
                measured = {
                    "machine": machine("jax", "numpy"),
                    "loss": heldout["loss"],
                    "bits_per_byte": heldout["bits_per_byte"],
                    "sources": heldout["sources"],
                    "step_seconds": step_seconds(workdir),
                    **experiment.measure(config, workdir),
                }
                write_atomically(workdir / MEASURED_FILE, json.dumps(measured))
        return outcome

    return trials.work(folder, choose, run_trial, stop=stop, log=print_line) is None


def _measured_of(folder: Path, *, seed: int) -> dict[str, dict]:
    """Return what was measured of the finished runs of a seed, by variant."""
    from btlm_jax.tune.trials import TRIALS

    suffix = f"-s{seed}"
    paths = sorted((folder / TRIALS).glob(f"*{suffix}/{MEASURED_FILE}"))
    return {path.parent.name.removesuffix(suffix): read_json_object(path) for path in paths}


def names_of(data: Sequence[str]) -> list[str]:
    """Return the names of raw files and folders without their places."""
    return [Path(each).name for each in data]


def check_text(data: Sequence[str], folder: Path) -> None:
    """Check that raw files are those that a folder's store was made of, by their names and sizes, or note them.

    Raises:
      ValueError: they are others.
    """
    from btlm_jax.corpus.engine.inputs import raw_inputs_of
    from btlm_jax.corpus.own_text import fingerprint_of_inputs
    from btlm_jax.data.store import MANIFEST_FILE

    path = folder / TEXT_FILE
    try:
        found = fingerprint_of_inputs(raw_inputs_of([Path(each) for each in data])) if data else ""
    except FileNotFoundError as error:
        if not path.is_file():
            return  # what makes the store says so
        notices.report("data-gone", f"{error}: that it is the text of {folder} is not checked")
        return
    if not path.is_file() or not any(folder.glob(f"{STORE_FOLDER}*/{MANIFEST_FILE}")):
        write_atomically(path, json.dumps({"fingerprint": found}))
    elif read_json_object(path).get("fingerprint") != found:
        raise ValueError(
            f"--data={' '.join(data)[:200]} is other text than that of {folder}, by its files' names and sizes; give "
            "that text, or another --folder"
        )


def _shown_command(experiment: Experiment, arguments: Sequence[str]) -> str:
    """Return the command without the places of files, and without what only ends a piece of it."""
    words, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        name, _, value = word.partition("=")
        if name in ("--folder", "--minutes", "--gather", "--output"):
            if "=" not in word and name != "--gather":
                rest[:1] = []
            continue
        words.append(
            f"{name}={Path(value).name}" if value and "/" in value else Path(word).name if "/" in word else word
        )
    return shlex.join(["python", "-m", f"experiments.{experiment.name}", "--folder=DIR", *words])
