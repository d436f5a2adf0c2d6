"""The files of a run's workdir, read from outside: its config, the records of its starts, its checkpoints.

What is damaged is not an error here, as the rest is still worth reading: it becomes a sentence in `problems`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from btlm_jax.recipe.config import TrainConfig, train_config_from, with_later_keys
from btlm_jax.storage.files import read_json_object
from btlm_jax.storage.location import ORIGIN
from btlm_jax.storage.owner import BEAT_SECONDS, OWNER_FILE, Owner, is_alive, read_owner
from btlm_jax.train import CHECKPOINTS, CONFIG_FILE, METRICS_FILE, STARTS, SUMMARY_FILE
from btlm_jax.train.starts import Start, read_starts

_OF_A_RUN = (CHECKPOINTS, METRICS_FILE, OWNER_FILE, STARTS)  # a workdir has one of them
_OTHERS = {  # what else a folder may be, by a file in it
    "manifest.json": "it is a token store",
    "model.json": "it is a model that btlm convert wrote",
    "model.safetensors": "it is a model",
    "model.safetensors.index.json": "it is a model",
}
RUNNING, UNKNOWN, DEAD = "running", "unknown", "dead"
_SLACK_SECONDS = 2.0  # for a write to a bucket
SILENT_SECONDS = 60.0  # an owner on another machine is taken for dead when it has not written for so long


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """A complete checkpoint."""

    step: int
    time: float  # when it was complete, of the Unix epoch
    folder: Path

    def num_bytes(self) -> int:
        """Return its size, 0 if it was deleted meanwhile."""
        try:
            if (self.folder / ORIGIN).is_file():  # in a bucket
                from btlm_jax.storage.bucket import num_bytes_of

                return num_bytes_of(self.folder)
            return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        except OSError:
            return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workdir:
    """What a workdir says, but for its metrics."""

    path: Path  # of a run in a bucket: the local copy
    name: str  # what it is called: the path or the URL
    values: dict[str, Any]  # of config.json
    config: TrainConfig | None  # None: there is none yet, or one that this version cannot read
    starts: tuple[Start, ...]  # in order
    owner: Owner | None
    life: str  # RUNNING, UNKNOWN or DEAD: of the process that owns it
    checkpoints: tuple[Saved, ...]  # ascending
    summary: dict[str, Any]
    problems: tuple[str, ...]

    @property
    def metrics(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def is_finished(self) -> bool:
        """Return whether the run has trained all its steps and written its end.

        Where there is no checkpoint any more, the exit code of its last start tells.
        """
        num_steps = self.config.curriculum.table.num_steps if self.config else 0
        if not num_steps or self.summary.get("num_steps") != num_steps:
            return False
        if self.checkpoints:
            return self.checkpoints[-1].step == num_steps
        return bool(self.starts) and self.starts[-1].code == 0


_copies: dict[str, Path] = {}  # of URLs, which are brought up to date when they are read again


def read_workdir(text: str) -> Workdir:
    """Read a workdir, a path or a URL, of a run that may be going on, of this version or an older one.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it is no workdir; says what it is, where that is known.
      OSError: it cannot be read.
    """
    path = _local(text)
    check_is_workdir(path, name=text)
    problems: list[str] = []
    values = _json(path / CONFIG_FILE, problems)
    owner = read_owner(path)
    return Workdir(
        path=path,
        name=text,
        values=values,
        config=_config(path / CONFIG_FILE, values, problems),
        starts=read_starts(path, problems),
        owner=owner,
        life=_life(text, owner),
        checkpoints=_checkpoints(path / CHECKPOINTS),
        summary=_json(path / SUMMARY_FILE, problems),
        problems=tuple(problems),
    )


def _local(text: str) -> Path:
    """Return a path as it is, and of a URL the local copy, which is made or brought up to date."""
    if "://" not in text:
        return Path(text)
    from btlm_jax.storage import bucket

    if text in _copies:
        bucket.read_again(text, _copies[text])
    else:
        _copies[text] = bucket.open_for_reading(text)
    return _copies[text]


def check_is_workdir(path: Path, *, name: str) -> None:
    """Check that a folder is a run's workdir; raises as `read_workdir`."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {name}; give the --workdir of a training run")
    if not path.is_dir():
        raise ValueError(f"{name} is a file; give the --workdir of a training run")
    names = set(os.listdir(path))
    if not names.intersection(_OF_A_RUN):
        other = next((said for name, said in _OTHERS.items() if name in names), "")
        other = other or ("it holds " + ", ".join(sorted(names)[:4]) if names else "it is empty")
        raise ValueError(
            f"{name} is no workdir of a training run: it has none of {', '.join(_OF_A_RUN)}; {other}. Give the "
            "--workdir of btlm train"
        )


def _config(file: Path, values: dict[str, Any], problems: list[str]) -> TrainConfig | None:
    if not values:
        return None
    try:
        return train_config_from(with_later_keys(values))
    except ValueError as error:
        problems.append(f"{file} cannot be read by this version: {error}")
        return None


def _json(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return {}


def _life(text: str, owner: Owner | None) -> str:
    """Return whether the process that owns a workdir is there; of one on another machine its writes tell."""
    if owner is None:
        return DEAD
    alive = is_alive(owner)
    if alive is not None:
        return RUNNING if alive else DEAD
    if "://" in text:
        return _life_in_bucket(text, owner)
    try:
        silent = time.time() - (Path(text) / OWNER_FILE).stat().st_mtime
    except OSError:
        return UNKNOWN
    return RUNNING if silent < SILENT_SECONDS else UNKNOWN


def _life_in_bucket(url: str, owner: Owner) -> str:
    """Return whether an owner writes to its file in a bucket; another owner is a sign of life, too."""
    from btlm_jax.storage import bucket

    time.sleep(BEAT_SECONDS + _SLACK_SECONDS)
    now = read_owner(bucket.RemoteFolder(url))
    return DEAD if now is None else UNKNOWN if now == owner else RUNNING


def _checkpoints(folder: Path) -> tuple[Saved, ...]:
    """Return the complete checkpoints: orbax gives a folder its step as a name when it is complete."""
    found = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name.isdecimal() and entry.is_dir():
            try:
                found.append(Saved(step=int(entry.name), time=entry.stat().st_mtime, folder=entry))
            except OSError:  # deleted meanwhile
                continue
    return tuple(sorted(found, key=lambda saved: saved.step))
