"""The command line, `btlm <verb> ...`: parse, build the config, call one function, return an exit code.

Exit codes: 0 done, 1 error, 2 usage, 75 preempted and saved (run the same command again), 76 stopped on bad numbers.
The only importer of absl.flags. Verbs import what they call late, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from btlm_jax import __version__
from btlm_jax.config import TrainConfig, train_config_from
from btlm_jax.store import Manifest

DONE, ERROR, USAGE, PREEMPTED, BAD_NUMBERS = 0, 1, 2, 75, 76

HELP = f"""btlm {__version__}: train BTLM-3B-8K style language models in JAX.

usage: btlm <verb> [flags]        (btlm <verb> --help explains a verb)

  train            train from a config, or resume what is in the workdir
  generate         continue a prompt with a trained model
  corpus build     make the token store that a config names, without training
  corpus verify    read a token store again and compare every byte with its manifest
  tune coord-check prove on a CPU that the parametrization is right, and that wrong ones are caught (2 minutes)

first:  btlm train --config=configs/local_cpu.py --workdir=runs/local
"""

TRAIN_HELP = """btlm train: train, or resume from the last checkpoint in the workdir.

example:  btlm train --config=configs/local_cpu.py --workdir=runs/local --config.optimizer.peak_learning_rate=0.006

The same command resumes: after a kill, a preemption (exit code 75) or with more tokens configured. On several hosts
run it on each, with --distributed (TPU pods find each other) or with the three flags below it.
"""

GENERATE_HELP = """btlm generate: continue a prompt with the last checkpoint of a run.

example:  btlm generate --checkpoint=runs/local --prompt="Return the" --num_tokens=200 --temperature=0.7 --top_p=0.95

The text appears as it is made; the speed goes to the error stream. The same seed gives the same text.
"""

CORPUS_HELP = """btlm corpus build | verify: make or check the token store of a config.

examples:  btlm corpus build --config=configs/local_cpu.py --workdir=runs/local
           btlm corpus verify --store=runs/local/store
"""

TUNE_HELP = """btlm tune coord-check: train tiny models at several widths and see that nothing depends on the width.

example:  btlm tune coord-check --directory=runs/coord_check

Prints a row for every parametrization: presets btlm and completep must be flat, standard parametrization and a dozen
deliberately broken ones must be caught. Exit code 0 when all are as expected, 1 otherwise; a table and a plot stay in
the directory.
"""


class UsageError(Exception):
    """The command line was wrong; the message says how and what would be right."""


def entry() -> None:
    """Run the command line of this process and exit with its code."""
    _quiet_orbax()
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return DONE if arguments else USAGE
    verb, *rest = arguments
    try:
        if verb == "train":
            return _train(rest)
        if verb == "generate":
            return _generate(rest)
        if verb == "corpus":
            return _corpus(rest)
        if verb == "tune":
            return _tune(rest)
        raise UsageError(f"unknown verb {verb!r}; verbs are train, generate, corpus and tune (btlm --help)")
    except UsageError as error:
        print(f"btlm: usage: {error}", file=sys.stderr)
        return USAGE
    except (ValueError, OSError) as error:
        print(f"btlm {verb}: error: {error}", file=sys.stderr)
        return ERROR


def _quiet_orbax() -> None:
    """Leave a failed checkpoint to the one line that `main` prints.

    Orbax logs the same error from each of its threads, and the writes still in flight complain to an event loop that is
    closed by then, or are dropped with their errors unread: hundreds of lines of traceback about one full disk.
    """

    def report_other(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report_other
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    absl_logging.get_absl_logger().addFilter(
        lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
    )
    absl_logging.get_absl_logger().addFilter(  # that a reader only reads needs no warning
        lambda record: not re.search("read_only=True|is read only", record.getMessage())
    )


def _train(arguments: Sequence[str]) -> int:
    values = _run_flags()
    flags.DEFINE_boolean("dry-run", False, "print the whole plan of the run and exit", flag_values=values)
    flags.DEFINE_boolean("distributed", False, "join the other hosts of a TPU pod slice", flag_values=values)
    flags.DEFINE_string("coordinator", "", "host:port of process 0, for several processes", flag_values=values)
    flags.DEFINE_integer("num_processes", 1, "how many processes there are", flag_values=values)
    flags.DEFINE_integer("process_id", 0, "which of them this is", flag_values=values)
    config = _parse(values, arguments, help_text=TRAIN_HELP)
    if config is None:
        return DONE
    train = importlib.import_module("btlm_jax.train")
    if values["dry-run"].value:
        print(train.dry_run(config))
        return DONE
    train.start_processes(
        distributed=values["distributed"].value,
        coordinator=values["coordinator"].value,
        num_processes=values["num_processes"].value,
        process_id=values["process_id"].value,
    )
    outcome = train.train(config, workdir=_workdir(values))
    return {train.DONE: DONE, train.PREEMPTED: PREEMPTED, train.BAD_NUMBERS: BAD_NUMBERS}[outcome]


def _generate(arguments: Sequence[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("checkpoint", "", "workdir of a run: its last checkpoint is used", flag_values=values)
    flags.DEFINE_string("prompt", "", "text to continue; empty: begin a document", flag_values=values)
    flags.DEFINE_integer("num_tokens", 200, "at most so many new tokens", lower_bound=1, flag_values=values)
    flags.DEFINE_float("temperature", 0.7, "0 takes the likeliest token", flag_values=values)
    flags.DEFINE_integer("top_k", 0, "draw from so many likeliest tokens; 0: from all", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "draw from the fewest tokens with this much probability", flag_values=values)
    flags.DEFINE_float("min_p", 0.0, "draw from tokens this share as likely as the likeliest", flag_values=values)
    flags.DEFINE_float("repetition_penalty", 1.0, "above 1 makes tokens seen less likely", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the drawing", lower_bound=0, flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    if any(argument in ("--help", "-h", "-help") for argument in arguments):
        print(GENERATE_HELP)
        print(_flag_help(values))
        return DONE
    _apply(values, arguments)
    if not values["checkpoint"].value:
        raise UsageError("btlm generate needs --checkpoint=DIR, the workdir of a run")
    generate = importlib.import_module("btlm_jax.generate")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    try:
        sampling = generate.Sampling(**{name: values[name].value for name in names})
    except ValueError as error:
        raise UsageError(str(error)) from error
    importlib.import_module("btlm_jax.serve").stream_continuation(
        Path(values["checkpoint"].value),
        prompt=values["prompt"].value,
        num_tokens=values["num_tokens"].value,
        sampling=sampling,
        seed=values["seed"].value,
    )
    return DONE


def _corpus(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] not in ("build", "verify", "--help", "-h"):
        raise UsageError(f"btlm corpus needs build or verify, got {' '.join(arguments[:1]) or 'nothing'}")
    if arguments[0] == "verify":
        return _corpus_verify(arguments[1:])
    values = _run_flags()
    config = _parse(values, arguments[1:] if arguments[0] == "build" else ["--help"], help_text=CORPUS_HELP)
    if config is None:
        return DONE
    prepare = importlib.import_module("btlm_jax.prepare")
    workdir = _workdir(values)
    prepare.make_workdir(workdir)
    token_store = prepare.prepare_store(config, workdir=workdir, expected="")
    _print_store(token_store.manifest)
    return DONE


def _corpus_verify(arguments: Sequence[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("store", "", "directory of the token store", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    _apply(values, arguments)
    if values["help"].value:
        print(CORPUS_HELP)
        return DONE
    if not values["store"].value:
        raise UsageError("btlm corpus verify needs --store=DIR")
    manifest = importlib.import_module("btlm_jax.data.reader").verify(Path(values["store"].value))
    print("every shard is as its manifest says")
    _print_store(manifest)
    return DONE


def _tune(arguments: Sequence[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("directory", "", "where the table and the plot go", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    if not arguments or arguments[0] in ("--help", "-h") or "--help" in arguments[1:]:
        print(TUNE_HELP)
        return DONE if arguments else USAGE
    if arguments[0] != "coord-check":
        raise UsageError(f"btlm tune needs coord-check, got {arguments[0]!r}")
    _apply(values, arguments[1:])
    if not values["directory"].value:
        raise UsageError("btlm tune coord-check needs --directory=DIR")
    full = importlib.import_module("btlm_jax.tune.coord_check").FULL
    report_coord_check = importlib.import_module("btlm_jax.tune.coord_report").report_coord_check
    report = report_coord_check(full, directory=Path(values["directory"].value))
    print(report.table)
    return DONE if report.passed else ERROR


def _print_store(manifest: Manifest) -> None:
    for name, split in manifest.splits.items():
        print(f"{name}: {split.num_blocks:,} blocks, {split.num_tokens:,} tokens, {len(split.shards)} shards")
        for source, part in split.sources.items():
            print(f"  {source}: {part.num_documents:,} documents, {part.num_bytes:,} bytes, {part.num_tokens:,} tokens")
    print(f"fingerprint {manifest.fingerprint}")


def _run_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "config file; --config.model.num_layers=2 changes a value", flag_values=values
    )
    flags.DEFINE_string("workdir", "", "directory of the run: checkpoints, metrics, plots", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    return values


def _parse(values: flags.FlagValues, arguments: Sequence[str], *, help_text: str) -> TrainConfig | None:
    """Parse the flags and return the config, or None when help was asked for and printed."""
    if any(argument in ("--help", "-h", "-help") for argument in arguments):
        print(help_text)
        print(_flag_help(values))
        return None
    _apply(values, arguments)
    try:
        loaded = values["config"].value
        loaded = loaded if loaded is None else loaded.to_dict()
    except Exception as error:  # a config file is a program: anything may go wrong in it
        raise UsageError(f"--config cannot be loaded: {_one_line(error)}") from error
    if loaded is None:
        raise UsageError("--config=FILE is needed, for example --config=configs/local_cpu.py")
    try:
        return train_config_from(loaded)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _apply(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    try:
        rest = values(["btlm", *arguments])[1:]
    except (AttributeError, KeyError, IndexError) as error:  # how config_flags reports a --config.x.y it cannot set
        raise UsageError(f"unknown config key {_one_line(error)}") from error
    except flags.Error as error:
        raise UsageError(_one_line(error)) from error
    except (OSError, TypeError, ValueError, SyntaxError) as error:
        raise UsageError(f"--config cannot be loaded: {_one_line(error)}") from error
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}; flags are --name=value")


def _one_line(error: Exception) -> str:
    # config_flags raises KeyErrors and AttributeErrors whose message is the repr of another message.
    message = str(error).replace("\\n", "\n").replace("\\'", "'")
    while message[:1] == message[-1:] == "'":
        message = message[1:-1]
    return " ".join(message.replace("'\n", "': ").split())


def _flag_help(values: flags.FlagValues) -> str:
    rows = [f"  --{name:<15} {values[name].help}" for name in values if name != "h" and "." not in name]
    return "flags:\n" + "\n".join(rows) + "\n"


def _workdir(values: flags.FlagValues) -> Path:
    if not values["workdir"].value:
        raise UsageError("--workdir=DIR is needed: where checkpoints, metrics and plots go")
    return Path(values["workdir"].value)
