"""A directory of trials: ordinary training runs that any number of commands, on any number of hosts, take one by one.

    study.json            what is studied; another study is refused once there is a store or a trial
    store/                the token store, where the config makes one
    store.json            the fingerprint of the token store that the losses are of; another one is refused
    compile_cache/        of all trials: those of equal shapes and multipliers compile once
    trials/NAME/          the workdir of a run as `btlm train` makes it, resumed by whoever takes it next after a kill
    trials/NAME/log.txt   what that run printed
    trials/NAME/result.json

A trial belongs to the command that owns its workdir (storage/owner.py); a dead owner's is taken over. What is tried
next follows from the results alone, so all workers choose alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from btlm_jax import ending_of, notices, stopping
from btlm_jax.data.reader import TokenStore
from btlm_jax.recipe.config import PREPARED, TrainConfig, with_later_keys
from btlm_jax.stopping import ERROR, Stop
from btlm_jax.storage import owner
from btlm_jax.storage.files import lock_open_file, read_json_object, write_atomically
from btlm_jax.train import CHECKPOINTS, COMPILE_CACHE, CONFIG_FILE, SUMMARY_FILE
from btlm_jax.train.loop import DONE, PREEMPTED, WRONG_DEVICE

STUDY_FILE, STORE_FILE, TRIALS, RESULT_FILE, LOG_FILE = (
    "study.json", "store.json", "trials", "result.json", "log.txt"
)  # fmt: skip
MIN_HELDOUT_TOKENS = 1 << 16
MOST_FACTOR = 1e6  # of a config's batch, tokens or warm-up
_WAIT_SECONDS = 1.0
_SAVE_SECONDS = 30.0  # for those that a command has started, where it ends at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A run to be made; its name is that of its directory."""

    name: str
    config: TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a trial: the final held-out loss in nats a token, infinite of one that diverged."""

    loss: float
    seconds: float  # of the run that finished it


Results = Mapping[str, Result]
Choose = Callable[[Results], Sequence[Trial]]  # what is to be tried, finished trials included; no new ones: the end
RunTrial = Callable[[TrainConfig, Path], str]  # (config, workdir) -> how it ended: see train/loop.py


def heldout_tokens(config: TrainConfig) -> int:
    """Return how many held-out tokens the losses of a study's trials are of, at most: a quarter of the config's tokens.

    The same text for all trials, however many tokens they have. On all of 1 MB the proxy of a search took longer to
    evaluate than to train (2 vCPU AMD EPYC (Zen 4), 2026-11-30: 45 and 32 of 97 s).
    """
    return max(MIN_HELDOUT_TOKENS, config.curriculum.table.num_tokens // 4)


def scale_tokens(tokens: int, ratio: float, *, per_step: int) -> int:
    """Return so many times the tokens in whole steps; as they are at 1."""
    return tokens if ratio == 1 else round(tokens * ratio / per_step) * per_step


def scale_phases(num_tokens: Sequence[int], ratio: float, *, per_step: int) -> tuple[int, ...]:
    """Return so many times the tokens of each phase in whole steps, one or more."""
    return tuple(max(1, round(tokens * ratio / per_step)) * per_step for tokens in num_tokens)


def resampled_mean(values: Sequence[float], rng: np.random.Generator) -> float:
    """Return the mean of a bootstrap's sample of n >= 2 values, its deviation widened by sqrt(n / (n - 1))."""
    mean, count = float(np.mean(values)), len(values)
    return mean + (float(np.mean(rng.choice(values, count))) - mean) * math.sqrt(count / (count - 1))


def student_half_width(values: Sequence[float], *, quantile: float) -> float:
    """Return half the width of Student's interval of the mean of two values or more; its upper end is the quantile."""
    from scipy import stats

    count = len(values)
    return float(stats.t.ppf(quantile, count - 1)) * statistics.stdev(values) / math.sqrt(count)


def begin_study(directory: Path, study: dict) -> None:
    """Make the directory of a study, or see that it is this study's, or one that has nothing but study.json yet.

    Raises:
      ValueError: it is another study's, or of a training run or a model.
      OSError: it cannot be written.
    """
    path, wanted = directory / STUDY_FILE, json.loads(json.dumps(study))
    if not path.is_file():
        for other in (directory / CONFIG_FILE, directory / CHECKPOINTS):
            if other.exists():
                raise ValueError(f"{directory} has {other.name} of a training run or a model; give another directory")
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        if path.is_file():
            found = _read_own(path, "and give the same command again, which writes it anew")
            found, asked = _with_later_keys(found), _with_later_keys(wanted)
            if found == asked:
                return
            different = f"{directory} holds another study, of {_first_difference(found, asked)}"
            if _has_begun(directory):
                raise ValueError(f"{different}; give its flags again, or another --directory")
            notices.report("study-replaced", f"{different}, which has no store and no trial yet: it is replaced")
            (directory / STORE_FILE).unlink(missing_ok=True)
        write_atomically(path, json.dumps(wanted, indent=1))


def _with_later_keys(study: dict) -> dict:
    """Return a study with the keys of its config that it is too old to have."""
    return {**study, "config": with_later_keys(study.get("config"))}


def _has_begun(directory: Path) -> bool:
    """Return whether a study has made a store or a trial, or parts of one, in any folder."""
    folders = [path for path in directory.iterdir() if path.is_dir() and path.name != COMPILE_CACHE]
    return any(any(folder.iterdir()) for folder in folders)


def _first_difference(found: object, wanted: object, name: str = "") -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(
            {*found, *wanted}, key=lambda key: (key != "kind", key)
        ):  # studies of two verbs differ in all
            if found.get(key) != wanted.get(key):
                return _first_difference(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for number, (old, new) in enumerate(zip(found, wanted, strict=True)):
            if old != new:
                return _first_difference(old, new, f"{name}[{number}]")
    return f"{name}={json.dumps(found)[:80]}, not {json.dumps(wanted)[:80]}"


def study_store(
    config: TrainConfig, directory: Path, prepare_store: Callable[[TrainConfig, Path], TokenStore]
) -> TokenStore:
    """Return a study's token store, which `prepare_store` makes or finds; one worker at a time.

    Raises:
      ValueError: it is another one than that of the losses that are there.
    """
    with _locked(directory):
        store = prepare_store(config, directory)
        path, found = directory / STORE_FILE, store.manifest.fingerprint
        if path.is_file():
            kept = _read_own(path, "and losses of two texts may be compared").get("fingerprint")
            if kept != found:
                raise ValueError(
                    f"the token store of data.store={config.data.store} has the fingerprint {found}, but the losses in "
                    f"{directory} are of one with {kept}: put that one back, or give another --directory"
                )
        else:
            write_atomically(path, json.dumps({"fingerprint": found}))
    return store


def on_store(config: TrainConfig, store: TokenStore) -> TrainConfig:
    """Return the config on a token store that is there."""
    location = store.directory
    shown = str(location.resolve()) if isinstance(location, Path) else location
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, store=shown),
        corpus=dataclasses.replace(config.corpus, source=PREPARED),
    )


def work(
    directory: Path,
    choose: Choose,
    run_trial: RunTrial,
    *,
    stop: Stop,
    log: Callable[[str], None],
) -> dict[str, Result] | None:
    """Make trials until `choose` names no new one; return all results, or None if the run is to stop.

    Trials that other workers are making are waited for. If another worker takes the trial that this one is making, this
    process is ended at once, or two would write to one workdir.

    Raises:
      ValueError: a trial's device computes wrongly, so that it has no result.
    """
    seen: dict[Path, tuple[owner.Owner, float]] = {}
    while True:
        results = read_results(directory)
        left = [trial for trial in choose(results) if trial.name not in results]
        if not left:
            return results
        is_any_done = False
        for trial in left:
            if stop.reason:
                return None
            if _is_elsewhere(directory / TRIALS / trial.name, seen):
                continue
            with _claimed(directory, trial, stop) as is_ours:
                if not is_ours:
                    continue
                if read_result(directory, trial.name) is None:
                    began = time.monotonic()
                    if _make(directory, trial, run_trial) is None:
                        return None
                    result = read_result(directory, trial.name)
                    assert result is not None
                    done = len(results) + 1
                    log(f"{trial.name}: loss {result.loss:.4f}, {time.monotonic() - began:.0f} s, trial {done}")
            is_any_done = True
            break  # what is to be tried may be other trials now
        if not is_any_done:
            time.sleep(_WAIT_SECONDS)


def read_results(directory: Path) -> dict[str, Result]:
    """Return the results of all finished trials by name."""
    found = {path.parent.name: read_result(directory, path.parent.name) for path in _result_files(directory)}
    return {name: result for name, result in found.items() if result is not None}


def read_result(directory: Path, name: str) -> Result | None:
    """Return the result of a trial, None if it is not finished.

    Raises:
      ValueError: the file is damaged.
    """
    path = directory / TRIALS / name / RESULT_FILE
    if not path.is_file():
        return None
    values = _read_own(path, "and the trial is made again")
    loss, seconds = values.get("loss"), values.get("seconds")
    if not isinstance(loss, (float, type(None))) or not isinstance(seconds, float):
        raise ValueError(f"{path} has no loss and seconds; delete it, and the trial is made again")
    return Result(loss=loss if loss is not None and math.isfinite(loss) else math.inf, seconds=seconds)


def _read_own(path: Path, what_deleting_does: str) -> dict:
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{error}; delete {path}, {what_deleting_does}") from error


@contextlib.contextmanager
def workers_beside(
    count: int, arguments: Sequence[str], *, directory: Path, stop: Stop, log: Callable[[str], None]
) -> Iterator[None]:
    """Have `count` - 1 processes of the command `arguments` beside this one, and wait for their ends.

    Where this process is to stop, or fails, they are to leave checkpoints and end too.

    Raises:
      ValueError: there are more workers than GPUs or cores.
    """
    started: list[subprocess.Popen] = []

    def end_all() -> None:
        for process in started:
            process.terminate()

    def end_with_this(code: int, reason: str) -> None:
        end_all()
        # The end of this process, which has nothing to save, may be that of its container or job.
        until = time.monotonic() + (_SAVE_SECONDS if code == stopping.PREEMPTED else 0.0)
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))

    with stop.calling_at_exit(end_with_this):
        try:
            start_workers(count, arguments, directory=directory, started=started)
            yield
        except BaseException:
            end_all()
            raise
        finally:
            stop.finish()  # it waits as long as the others save
            if stop.reason:
                end_all()
            for number, process in enumerate(started, start=1):
                if process.wait() and not stop.reason:
                    log(f"worker {number} ended ({ending_of(process.returncode)}): see {_log_of(directory, number)}")


def _log_of(directory: Path, number: int) -> Path:
    return directory / f"worker-{number}.txt"


def start_workers(count: int, arguments: Sequence[str], *, directory: Path, started: list[subprocess.Popen]) -> None:
    """Start `count` - 1 processes of the command `arguments` and leave this process its own share of the machine.

    Each is added to `started`. GPUs are dealt out by CUDA_VISIBLE_DEVICES, otherwise CPU cores by affinity. Call it
    before a device is touched.

    Raises:
      ValueError: there are more workers than GPUs or cores.
    """
    if count == 1:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1") or os.environ.get("JAX_PLATFORMS") == "cpu":
        gpus = []
    elif visible:
        gpus = visible.split(",")
    else:
        gpus = [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]
    cores = sorted(os.sched_getaffinity(0))
    parts = gpus or cores
    if count > len(parts):
        raise ValueError(f"--workers={count}, but there are {len(parts)} {'GPUs' if gpus else 'CPU cores'} here")
    shares = [parts[number * len(parts) // count : (number + 1) * len(parts) // count] for number in range(count)]
    directory.mkdir(parents=True, exist_ok=True)
    for number, share in enumerate(shares[1:], start=1):
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(map(str, share))} if gpus else {})}
        if not gpus:
            os.sched_setaffinity(0, set(map(int, share)))  # which the process inherits
        with open(_log_of(directory, number), "ab") as log:
            command = [sys.executable, "-m", "btlm_jax", *arguments]
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, shares[0]))
    else:
        os.sched_setaffinity(0, set(map(int, shares[0])))


def share_compiled(directory: Path) -> None:
    """Have all trials of this process find and leave what is compiled in the study's folder."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = str((directory / COMPILE_CACHE).resolve())
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        jax.config.update("jax_compilation_cache_dir", folder)


def _make(directory: Path, trial: Trial, run_trial: RunTrial) -> Result | None:
    """Run a trial that is ours and write its result; return None if it was preempted."""
    workdir = directory / TRIALS / trial.name
    began = time.monotonic()
    with open(workdir / LOG_FILE, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        outcome = run_trial(trial.config, workdir)
    if outcome == PREEMPTED:
        return None
    if outcome == WRONG_DEVICE:
        raise ValueError(
            f"a device computes wrongly, as {workdir / LOG_FILE} says: take its machine out, and give the same command "
            "again"
        )
    loss = None
    if outcome == DONE:
        found = float(read_json_object(workdir / SUMMARY_FILE)["heldout"]["loss"])
        loss = found if math.isfinite(found) else None
    result = Result(loss=math.inf if loss is None else loss, seconds=time.monotonic() - began)
    values = {"loss": loss, "seconds": result.seconds, "outcome": outcome}
    write_atomically(workdir / RESULT_FILE, json.dumps(values))
    shutil.rmtree(workdir / CHECKPOINTS, ignore_errors=True)  # of dozens of trials; the numbers stay
    return result


def _is_elsewhere(workdir: Path, seen: dict[Path, tuple[owner.Owner, float]]) -> bool:
    """Return whether a command on another machine owns a workdir and may live, by what was `seen` of it when.

    owner.take would stand and watch it, for seconds of each trial, where there are others to be made meanwhile.
    """
    found, now = owner.read_owner(workdir), time.monotonic()
    if found is None or owner.is_alive(found) is not None:
        return False
    if workdir not in seen or seen[workdir][0] != found:
        seen[workdir] = found, now
    return now - seen[workdir][1] <= owner.DEAD_SECONDS


@contextlib.contextmanager
def _claimed(directory: Path, trial: Trial, stop: Stop) -> Iterator[bool]:
    """Own the trial's workdir meanwhile; yield whether it is ours."""
    workdir = directory / TRIALS / trial.name
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        ownership = owner.take(workdir, steal=False)
    except FileExistsError:
        yield False
        return
    ownership.keep(on_loss=functools.partial(stop.end_now, ERROR))
    try:
        with stop.calling_at_exit(lambda code, reason: ownership.release()):
            yield True
    finally:
        ownership.release()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Let one worker of this machine in at a time."""
    with open(directory / ".lock", "w") as file:
        lock_open_file(file, fcntl.LOCK_EX)
        yield


def _result_files(directory: Path) -> list[Path]:
    return sorted((directory / TRIALS).glob(f"*/{RESULT_FILE}"))
