"""`btlm train`: train from a config, or resume the run in the workdir."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from btlm_jax import notices, stopping
from btlm_jax.cli import BAD_NUMBERS, DONE, ERROR, PREEMPTED, UsageError
from btlm_jax.cli.parse import Flags, check_processes, define_processes, find_config, has_several, place_of
from btlm_jax.stopping import ProcessesDifferError, Stop

if TYPE_CHECKING:
    import jax

    from btlm_jax.data.store import Manifest
    from btlm_jax.recipe.config import CorpusConfig, TrainConfig
    from btlm_jax.storage.location import Mirror
    from btlm_jax.train.metric_writer import GoodputLedger, StartRecord
    from btlm_jax.train.program import Program
    from btlm_jax.train.setup import Beginning, Run, StepPrediction

TRAIN_HELP = """btlm train: train, or resume from the last checkpoint in the workdir.

examples:  btlm train --data=TEXTS --workdir=runs/mine --minutes=10
           btlm train --config=local_cpu --workdir=runs/local --config.optimizer.peak_learning_rate=0.006
           btlm train --config=local_cpu --init=runs/local --workdir=runs/other --config.data.store=/PATH/OF/STORE
           btlm train --data=TEXTS --config=12M --workdir=runs/mine
           btlm train --data=TEXTS --init=runs/local --workdir=runs/mine
           btlm train --data=CHATS.jsonl --init=runs/local --template=zephyr --workdir=runs/tuned
           btlm train --config=btlm_3b_8k --dry-run

--data makes a model of your text, from 64 kB on, without a config: files, folders (subfolders are sources), patterns
or URLs of what btlm corpus clean reads. In the workdir it cleans and deduplicates the text, holds 5 % of it out, trains
a tokenizer and makes a token store; then it measures a step and chooses the model's size, the batch and the tokens so
that the whole command takes --minutes=N or --hours=N (at most 20 minutes without). It says what it chose and why.
With --config it chooses nothing: it trains that config on a store of the text.
--config.data.weights="web=3,books=1" weights sources, here and on any store that btlm corpus tokenize --by_source made.
Lines of {"prompt": ..., "completion": ...} or {"messages": [...]} are taken for examples to fine-tune on: nothing of
them is cleaned, and the loss is on completions only (btlm corpus examples --help says more).

--init=MODEL begins with given weights: of a run (or RUN/checkpoints/STEP), of a directory that btlm convert wrote, of a
Hugging Face BTLM directory, or of one behind a URL. Shape and parametrization are the model's, the rest the config's.
The token store must have the model's tokenizer: btlm corpus tokenize --tokenizer=RUN/tokenizer. The schedule is new.

--config takes a name (btlm configs lists them) or the path of a file.

The same command resumes: after a kill, a preemption (exit code 75) or with more tokens configured. On several hosts
run it on each, with --distributed (TPU pods find each other) or with the three flags below it. They compare what they
were started with, stop together, and end with 77 when one of them is gone: then run the command again on all.
SIGTERM, one Ctrl-C or a closed terminal saves and ends with 75. A workdir has one owner: a second command is refused.
--workdir may be a folder in a bucket, gs://bucket/run or s3://bucket/run: the run stages in a folder of this machine
(BTLM_STAGING, else ~/.cache) and uploads checkpoints, metrics every minute and all else; any machine goes on from it.
Several hosts then need no folder that all see.
"""


_DATA_FLAGS = ("tokenizer", "template", "minutes", "hours")  # that only --data has


def train(arguments: Sequence[str]) -> int:
    """Run `btlm train`; return the exit code."""
    flags = train_flags()
    if not flags.parse(arguments):
        return DONE
    check_processes(flags)
    _check_init(flags)
    if flags.boolean("print_extras"):
        print(",".join(_extras_of_run(flags.config(), arguments)))
        return DONE
    if flags.is_given("data"):
        return _train_on_data(flags)
    for name in _DATA_FLAGS:
        if flags.is_given(name):
            raise UsageError(f"--{name} goes with --data=PATH: it belongs to a run that begins from text")
    config = flags.config()
    if flags.boolean("dry_run"):
        return _print_plan(config, flags)
    try:
        with _local_workdir(flags) as workdir:
            return _run_as_owner(workdir, flags, functools.partial(_train, config))
    except ProcessesDifferError as error:
        raise UsageError(str(error)) from error
    except Exception as error:
        from btlm_jax.cli import errors

        errors.wait_if_peer_is_gone(error)
        raise


def _extras_of_run(config: TrainConfig, arguments: Sequence[str]) -> list[str]:
    """Return the extras of setup.cfg for the URLs of a run, wherever they are given, and for its trackers."""
    from btlm_jax.storage import location

    places = [*arguments, str(dataclasses.asdict(config)), os.environ.get("JAX_COMPILATION_CACHE_DIR", "")]
    return [*location.extras_for(" ".join(places)), *config.log.tracker_names]


def _print_plan(config: TrainConfig, flags: Flags) -> int:
    from btlm_jax.train import loop

    workdir = _workdir_of_dry_run(flags) if flags.is_given("workdir") else None
    if flags.is_given("init"):
        from btlm_jax.cli import train_init

        config, said = train_init.dry_run(config, flags, workdir=workdir)
        print(said)
    print(notices.named(loop.dry_run(config, workdir=workdir)))
    return DONE


def _workdir_of_dry_run(flags: Flags) -> Path:
    """Return the workdir, which is only read; of one in a bucket a folder with what is there, if anything is."""
    url = flags.string("workdir")
    if "://" not in url:
        return flags.path("workdir")
    from btlm_jax.storage import bucket

    return bucket.open_for_reading(url, may_be_new=True)


def _train(config: TrainConfig, flags: Flags, *, workdir: Path, stop: Stop, ledger: GoodputLedger) -> int:
    from btlm_jax.train import INIT_FILE, setup

    beginning = setup.FROM_SEED
    if has_several(flags):
        _join_processes(config, flags, workdir=workdir, stop=stop)
    if flags.is_given("init") or (workdir / INIT_FILE).is_file():
        from btlm_jax.cli import train_init

        open_model = functools.partial(train_init.open_init, flags, workdir=workdir)
        start = train_init.start(config, flags, workdir=workdir, open_model=open_model)
        config, beginning = start.config, start.beginning
    return _run(
        config,
        flags,
        workdir=workdir,
        config_file=flags.config_file_and_argument(),
        beginning=beginning,
        stop=stop,
        ledger=ledger,
    )


@contextlib.contextmanager
def _local_workdir(flags: Flags) -> Iterator[Path]:
    """Yield the workdir of a run, of one in a bucket its local folder, which the flag then has too.

    What is left to copy is copied at the end.
    """
    url = flags.string("workdir")
    if "://" not in url:
        yield flags.path("workdir")
        return
    from btlm_jax.storage import bucket

    index, count = (place_of(flags).index, place_of(flags).count) if has_several(flags) else (0, 1)
    with contextlib.ExitStack() as stack:
        with _telling_others(flags):
            mirror = stack.enter_context(bucket.opened_for_run(url, index=index, count=count))
        flags.set_string("workdir", str(mirror.folder))
        yield mirror.folder


@contextlib.contextmanager
def _telling_others(flags: Flags) -> Iterator[None]:
    """Tell the other processes of the run, which wait for this one, of an error that keeps it from taking part."""
    try:
        yield
    except (OSError, ValueError, notices.StrictError) as error:
        if has_several(flags):
            from btlm_jax.parallel import peers

            peers.refuse(place_of(flags), str(error))
        raise


def _run_as_owner(workdir: Path, flags: Flags, work: Callable[..., int]) -> int:
    """Own the workdir in process 0 of the run while `work` runs; return its exit code, which is recorded.

    A workdir that was made here, and in which nothing is left at the end, as in a run that is refused, is deleted.
    """
    from btlm_jax.storage import location
    from btlm_jax.train import setup
    from btlm_jax.train.metric_writer import GoodputLedger, StartRecord

    stop = stopping.current()
    ledger = GoodputLedger(began=stop.began)
    is_new = not workdir.exists()
    with _telling_others(flags):
        _watch_notices(stop)
        setup.make_workdir(workdir)
        stop.workdir = workdir
        mirror = location.mirror_of(workdir)
        if _process_id(flags):
            ownership = None
        else:
            from btlm_jax.storage import owner

            ownership = owner.take(mirror.owned or workdir, steal=flags.boolean("steal"))
    if mirror.is_remote:
        stop.at_exit(lambda code, reason: mirror.copy_now(stopping.STACKS))
    if ownership is None:
        with _closed(mirror):
            return work(flags, workdir=workdir, stop=stop, ledger=ledger)
    stop.at_exit(lambda code, reason: ownership.release())
    ownership.keep(on_loss=functools.partial(stop.end_now, ERROR))
    try:
        with _copied(mirror, flags):
            record = StartRecord(workdir, ledger)
            stop.at_exit(record.end)
            record.keep()
            with recorded_errors(record, stop):
                code = work(flags, workdir=workdir, stop=stop, ledger=ledger)
            record.end(code, stop.reason)
        _print_time_of_starts(workdir)
        return code
    finally:
        ownership.release()
        if is_new:
            setup.delete_unused(workdir)


def _print_time_of_starts(workdir: Path) -> None:
    """Print where the time of a run of several starts went; of one start its end has printed it."""
    from btlm_jax.display.progress import print_line
    from btlm_jax.train import STARTS

    if len(list((workdir / STARTS).glob("[!.]*.json"))) < 2:
        return
    from btlm_jax.runs.status import time_text  # only here: a run loads few modules
    from btlm_jax.runs.wall_time import wall_time
    from btlm_jax.train.starts import read_starts

    times = wall_time(read_starts(workdir, []))
    if (num_starts := len(times.starts)) > 1:
        said = time_text(times.seconds, num_starts=num_starts, goodput=times.goodput, lost_steps=times.lost_steps)
        print_line(f"The whole run: {said}")


@contextlib.contextmanager
def recorded_errors(record: StartRecord, stop: Stop) -> Iterator[None]:
    """Record the error that ends a start, and raise it."""
    try:
        yield
    except BaseException as error:
        from btlm_jax.cli import errors

        record.end(errors.code_of(error), str(error) or stop.reason)
        raise


@contextlib.contextmanager
def _copied(mirror: Mirror, flags: Flags) -> Iterator[None]:
    """Copy the workdir to where it belongs meanwhile; all of it at the end, or what can be after an error."""
    from btlm_jax.train import setup

    with _telling_others(flags):
        mirror.begin()
    if mirror.is_remote:
        setup.make_workdir(mirror.folder)  # now that it has what the bucket has
    with _closed(mirror):
        yield


@contextlib.contextmanager
def _closed(mirror: Mirror) -> Iterator[None]:
    """Close it at the end; after an error, what this raises is said beside the error."""
    try:
        yield
    except BaseException:
        try:
            mirror.close()
        except (OSError, notices.StrictError) as error:  # said beside the one that ends the run
            from btlm_jax.display.progress import print_error_line

            print_error_line(str(error))
        raise
    mirror.close()


def _watch_notices(stop: Stop) -> None:
    """Stop at a notice that Google Cloud takes this machine away or halts it."""
    if os.environ.get("GCE_METADATA_HOST") or _machine().startswith("Google"):
        from btlm_jax.parallel import maintenance  # only there: a run loads few modules

        if standing := maintenance.watch(stop.request):
            text = f"the {standing} was there before this start: it goes on, with checkpoints as configured"
            notices.report("notice-before-start", text)


def _machine() -> str:
    """Return what kind of machine this is, "" where that is not known."""
    try:
        return Path("/sys/class/dmi/id/product_name").read_text(encoding="utf-8")
    except OSError:
        return ""


def _process_id(flags: Flags) -> int:
    """Return which process of the run this is."""
    return place_of(flags).index if flags.boolean("distributed") else flags.integer("process_id")


def _join_processes(config: TrainConfig, flags: Flags, *, workdir: Path, stop: Stop) -> None:
    """Join the other processes of this run; must come before anything touches a device."""
    from btlm_jax.display.progress import print_line
    from btlm_jax.parallel import peers
    from btlm_jax.storage import location

    place = place_of(flags)
    if place.index != 0:
        notices.mute()
    log = print_line if place.index == 0 else lambda line: None
    given = {name: flags.string(name) for name in ("init", "init_optimizer")}
    given |= {"resume_step": flags.integer("resume_step"), "grow_vocabulary": flags.boolean("grow_vocabulary")}
    mirror = location.mirror_of(workdir)
    given |= {"workdir": mirror.url} if mirror.is_remote else {}
    facts = peers.facts_of(dataclasses.asdict(config), flags=given)
    joined = peers.join(place, facts=facts, stop=stop, log=log)
    if not mirror.is_remote:
        joined.check_workdir(workdir)
        return
    mirror.run = joined.value_of_first("run", secrets.token_hex(8))
    if place.index != 0:
        mirror.begin()  # process 0 has begun: what the bucket has is what it goes on from
    stop.wait_for_all("workdir in the bucket read")


def _train_on_data(flags: Flags) -> int:
    """Make the store of --data and choose the run, if that is not done, and train; return the exit code."""
    from btlm_jax.cli import train_data

    train_data.check_flags(flags)
    if names := train_data.tracker_names(flags):
        from btlm_jax.train import trackers

        trackers.check_installed(names)  # before the text is worked on
    if flags.boolean("dry_run"):
        print(notices.named(train_data.dry_run(flags, workdir=_workdir_of_dry_run(flags))))
        return DONE
    is_url = "://" in flags.string("workdir")
    with _local_workdir(flags) as workdir:
        if not is_url:
            train_data.check_is_of_data(flags, workdir=workdir)
            return _run_as_owner(workdir, flags, _work_on_data)

        def check_and_work(flags: Flags, *, workdir: Path, stop: Stop, ledger: GoodputLedger) -> int:
            train_data.check_is_of_data(flags, workdir=workdir)  # what is there is known only now
            return _work_on_data(flags, workdir=workdir, stop=stop, ledger=ledger)

        return _run_as_owner(workdir, flags, check_and_work)


def _work_on_data(flags: Flags, *, workdir: Path, stop: Stop, ledger: GoodputLedger) -> int:
    from btlm_jax.cli import train_data
    from btlm_jax.train import setup

    given = flags.is_given("config")
    config_file = flags.config_file_and_argument() if given else find_config(train_data.BASE_CONFIG)
    if not flags.is_given("init"):
        with ledger.measure("corpus"):
            config = train_data.config_of_data(flags, workdir=workdir, open_model=None)
        beginning = setup.FROM_SEED
    else:
        from btlm_jax.cli import train_init

        open_model = functools.cache(functools.partial(train_init.open_init, flags, workdir=workdir))
        with ledger.measure("corpus"):
            config = train_data.config_of_data(flags, workdir=workdir, open_model=open_model)
        start = train_init.start(config, flags, workdir=workdir, open_model=open_model)
        config, beginning = start.config, start.beginning
    return _run(config, flags, workdir=workdir, config_file=config_file, beginning=beginning, stop=stop, ledger=ledger)


def _run(
    config: TrainConfig,
    flags: Flags,
    *,
    workdir: Path,
    config_file: Path,
    beginning: Beginning,
    stop: Stop,
    ledger: GoodputLedger,
) -> int:
    from btlm_jax.train import loop

    outcome = loop.train(
        config,
        workdir=workdir,
        stop=stop,
        ledger=ledger,
        resume_step=flags.integer("resume_step"),
        check_devices=functools.partial(_check_devices, config_file=config_file, changes=flags.changes),
        predict_steps=functools.partial(_predict_steps, config_file=config_file),
        build_store=build_store,
        beginning=beginning,
        continue_prompt=continue_prompt,
    )
    return code_of_outcome(outcome)


def code_of_outcome(outcome: str) -> int:
    """Return the exit code of what train/loop.py returns."""
    from btlm_jax.train import loop

    codes = {loop.DONE: DONE, loop.PREEMPTED: PREEMPTED, loop.BAD_NUMBERS: BAD_NUMBERS, loop.WRONG_DEVICE: BAD_NUMBERS}
    return codes[outcome]


def train_flags() -> Flags:
    """Define the flags of `btlm train`."""
    flags = Flags(TRAIN_HELP)
    flags.define_paths("data", "text to train on: files, folders, patterns, URLs")
    flags.define_string("tokenizer", "", "with --data: directory of a tokenizer; by default one is trained")
    flags.define_string("template", "", "with --data of messages: chat template, a file or chatml, llama2, zephyr, ...")
    flags.define_float("minutes", 0.0, "with --data: how long the whole command shall take")
    flags.define_float("hours", 0.0, "the same in hours")
    flags.define_config()
    define_workdir(flags)
    flags.define_string("init", "", "begin with the weights of a run, a model's directory, or the URL of one")
    flags.define_string(
        "init_optimizer", "fresh", "with --init: moments of a run's checkpoint", choices=("fresh", "kept")
    )
    flags.define_boolean("grow_vocabulary", False, "with --init: new rows for ids that a tokenizer has more")
    flags.define_boolean("steal", False, "take the workdir from a command that owns it and that you know is dead")
    flags.define_integer("resume_step", 0, "go back to this checkpoint and set later ones aside; 0: the last one")
    flags.define_boolean("dry_run", False, "print the whole plan of the run, check the token store, and end")
    flags.define_boolean(
        "print_extras", False, "print the extras of btlm_jax that the run's URLs and trackers need, and end"
    )
    define_processes(flags)
    return flags


def _check_init(flags: Flags) -> None:
    """Refuse flags of --init that have no effect, and names that are empty.

    Raises:
      UsageError: there is one.
    """
    if flags.is_given("init") and not flags.string("init"):
        raise UsageError("--init= is empty; give a run, a model's directory, or the URL of one")
    for name in ("template", "tokenizer"):
        if flags.is_given(name) and not flags.string(name):
            raise UsageError(f"--{name}= is empty; leave it out, or give one")
    for name in ("init_optimizer", "grow_vocabulary"):
        if flags.is_given(name) and not flags.is_given("init"):
            raise UsageError(f"--{name} goes with --init=MODEL: it says how a run begins with given weights")


def define_workdir(flags: Flags) -> None:
    """Define --workdir."""
    flags.define_string("workdir", "", "directory of the run, or its URL in a bucket: checkpoints, metrics, plots")


def build_store(
    config: CorpusConfig, *, vocab_size: int, block_len: int, seed: int, directory: Path, log: Callable[[str], None]
) -> Manifest:
    """Make a token store, as corpus/installed/build.py has it, which is imported only where there is no store yet."""
    from btlm_jax.corpus.installed import build

    return build.build_store(
        config, vocab_size=vocab_size, block_len=block_len, seed=seed, directory=directory, log=log
    )


def continue_prompt(run: Run, params: dict) -> str:
    """Generate the sample at the end of a run; decoding is imported by then only (see train/finish.py)."""
    from btlm_jax.generate import sample

    return sample.continue_prompt(run, params)


def _check_devices(
    config: TrainConfig, devices: Sequence[jax.Device], *, config_file: Path, changes: Mapping[str, str]
) -> str:
    """Ask the table of layouts beside the config file, which knows TPUs only.

    Raises:
      ValueError: the layout does not fit, or JAX took the CPU in place of the accelerator that it was told to use.
    """
    asked = os.environ.get("JAX_PLATFORMS", "")
    if devices[0].platform == "cpu" and (first := asked.partition(",")[0]) not in ("", "cpu"):
        raise ValueError(
            f"JAX_PLATFORMS={asked} asks for {first}; JAX could not start it (it said why, above) and took the CPU: "
            "see that the driver and JAX's plugin are there (docs/guide/gpus.md), or give JAX_PLATFORMS=cpu"
        )
    if not devices[0].device_kind.startswith("TPU"):
        return ""
    from btlm_jax.plan import pod_table

    return pod_table.check_devices(config, devices, config_file=config_file, changes=changes)


def _predict_steps(program: Program, traced: Sequence[jax.stages.Traced], *, config_file: Path) -> StepPrediction:
    """Predict the steps on TPUs and GPUs; of a CPU nothing is known without compiling and running them."""
    from btlm_jax.train.setup import NO_PREDICTION, StepPrediction

    if program.mesh.devices.flat[0].platform == "cpu":
        return NO_PREDICTION
    from btlm_jax.plan import calibration, run_prediction
    from btlm_jax.plan.compiling import default_cache

    measured = default_cache() / calibration.MEASURED_FOLDER
    try:
        return run_prediction.predict_steps(program, traced, config_file=config_file, measured=measured)
    except Exception as error:  # of whatever kind: no run ends because its prediction fails
        return StepPrediction(said=f"The steps' times are not predicted: {type(error).__name__}: {error}")
