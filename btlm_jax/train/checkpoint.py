"""Checkpoints through orbax: state, data position and config in one atomic step; restore onto any mesh.

A step is a directory `<workdir>/checkpoints/<step>` with items `state` (arrays), `position` and `config` (JSON). Orbax
writes it beside its final name in the background and renames it when it is complete, so a process that dies at any
moment leaves either the whole step or none. The only importer of orbax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

from btlm_jax.recipe.config import CheckpointConfig, TrainConfig, config_from, train_config_from
from btlm_jax.train import CHECKPOINTS
from btlm_jax.train.step import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands: exact host integers, from which data order and learning rate follow."""

    step: int
    tokens_seen: int
    store_fingerprint: str


class Checkpointer:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: Path, *, config: CheckpointConfig):
        self.directory = workdir.resolve() / CHECKPOINTS
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep_last,
                keep_period=config.keep_every,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
            item_names=("state", "position", "config"),
        )

    def steps(self) -> list[int]:
        """Return the complete checkpoints' steps, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, *, position: Position, config: TrainConfig) -> None:
        """Start saving; returns when the state is copied off the devices, so the next step may donate it.

        Raises:
          OSError: this save could not start, or an earlier one failed, for example because the disk is full; the
            message names the last complete checkpoint.
        """
        with self._naming_the_last_checkpoint():
            self._manager.check_for_errors()
            if position.step in self._manager.all_steps():
                return
            self._manager.save(
                position.step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    position=ocp.args.JsonSave(dataclasses.asdict(position)),
                    config=ocp.args.JsonSave(json.loads(config.to_json())),
                ),
            )

    def read_metadata(self, step: int) -> tuple[Position, TrainConfig]:
        """Return a checkpoint's position and config.

        Raises:
          ValueError: they cannot be read; the message names the directory and what remains.
        """
        args = ocp.args.Composite(position=ocp.args.JsonRestore(), config=ocp.args.JsonRestore())
        metadata = self._restore(step, args)
        try:
            position = config_from(Position, metadata["position"], path="position")
            stored = metadata["config"]
            if isinstance(stored, dict) and isinstance(stored.get("mesh"), dict):
                stored["mesh"].setdefault("context", 1)  # checkpoints from before mesh.context do not have it
            config = train_config_from(stored)
            expected = config.curriculum.table.tokens_seen(step)
            if (position.step, position.tokens_seen) != (step, expected):
                raise ValueError(
                    f"its position is step {position.step:,} with {position.tokens_seen:,} tokens seen, and it is "
                    f"checkpoint {step:,}, with {expected:,} by its config"
                )
        except ValueError as error:
            raise ValueError(self._unreadable(step, error)) from error
        return position, config

    def restore_state(self, step: int, *, abstract: TrainState) -> TrainState:
        """Return a checkpoint's state, laid out as `abstract` says, whatever mesh it was saved from.

        Raises:
          ValueError: it cannot be read; the message names the directory and what remains.
        """
        return self._restore(step, ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]

    def restore_params(self, step: int, *, abstract: dict) -> dict:
        """Return a checkpoint's parameters alone, laid out as `abstract` says; the optimizer's state is not read.

        Raises:
          ValueError: they cannot be read; the message names the directory and what remains.
        """
        args = ocp.args.PyTreeRestore(
            item={"params": abstract},
            restore_args=ocp.checkpoint_utils.construct_restore_args({"params": abstract}),
            partial_restore=True,
        )
        return self._restore(step, ocp.args.Composite(state=args))["state"]["params"]

    def _restore(self, step: int, args: ocp.args.Composite) -> Any:  # a mapping by item
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:  # orbax raises many kinds for a damaged step; the user needs one message
            raise ValueError(self._unreadable(step, error)) from error

    def _unreadable(self, step: int, error: Exception) -> str:
        """Return what to say of a damaged step: its directory, why, and what remains."""
        other_steps = [other for other in self.steps() if other != step]
        remedy = f"delete it to go on from step {other_steps[-1]}" if other_steps else "delete it to start again"
        return f"checkpoint {self.directory / str(step)} cannot be read: {_reason(error)}; {remedy}"

    def wait(self) -> None:
        """Wait until every started save is complete.

        Raises:
          OSError: one of them failed; the message names the last complete checkpoint.
        """
        with self._naming_the_last_checkpoint():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Wait for saves and release orbax's threads.

        Raises:
          OSError: a save failed that nobody waited for.
        """
        with self._naming_the_last_checkpoint():
            self._manager.close()

    @contextlib.contextmanager
    def _naming_the_last_checkpoint(self) -> Iterator[None]:
        """Turn any error of a save into an OSError that names the last complete checkpoint."""
        try:
            yield
        except Exception as error:  # orbax raises many kinds, some of them tensorstore's; the user needs one message
            complete = [int(path.name) for path in self.directory.iterdir() if path.name.isdigit()]
            last = f"the last complete checkpoint is step {max(complete):,}" if complete else "there is none yet"
            raise OSError(
                f"a checkpoint could not be written to {self.directory}: {_reason(error)}; {last}; free some space "
                "or mend the disk, and run the same command to go on"
            ) from error


class CheckpointReader(Checkpointer):
    """Read-only access to the checkpoints of a workdir whose run may still be going on: unfinished saves stay.

    Raises:
      FileNotFoundError: there is no complete checkpoint.
    """

    def __init__(self, workdir: Path):
        self.directory = workdir.resolve() / CHECKPOINTS
        if not self.directory.is_dir() or not any(path.name.isdigit() for path in self.directory.iterdir()):
            raise FileNotFoundError(f"there is no checkpoint in {workdir}; give the --workdir of a training run")
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(read_only=True),
            item_names=("state", "position", "config"),
        )


def write_params(directory: Path, params: dict) -> None:
    """Write parameters (jax or NumPy arrays) alone to a new directory, complete when this returns."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory.resolve(), args=ocp.args.PyTreeSave(params))


def read_params(directory: Path, *, abstract: dict) -> dict:
    """Return what `write_params` wrote, laid out as `abstract` says.

    Raises:
      ValueError: the directory is damaged, or its arrays are not of these shapes.
    """
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args)
            return checkpointer.restore(directory.resolve(), args=args)
    except Exception as error:  # orbax raises many kinds for a damaged directory; the user needs one message
        raise ValueError(f"the parameters in {directory} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return an error in one line; of tensorstore's nested messages about a file, what the operating system said."""
    message = str(error).strip()
    if code := re.search(r"os_error_code='(\d+)'", message):
        return os.strerror(int(code[1]))
    return message.splitlines()[0] if message else type(error).__name__


# What may not change between the start of a run and a resume: with another value it would be another run.
_FIXED = ("seed", "mup", "data.seed", "curriculum.seq_len", "curriculum.batch_size")
_FIXED_MODEL = ("vocab_size", "num_layers", "d_model", "num_heads", "d_ff", "layer_norm_eps", "alibi_scaling", "dtype")


def last_position(checkpointer: Checkpointer, config: TrainConfig) -> Position:
    """Return where the workdir's run stands, step 0 without a checkpoint, having checked that `config` continues it.

    Raises:
      ValueError: the checkpoint cannot be read, is of another run, or is past the configured end.
    """
    steps = checkpointer.steps()
    if not steps:
        return Position(step=0, tokens_seen=0, store_fingerprint="")
    position, saved = checkpointer.read_metadata(steps[-1])
    check_same_run(saved, config, where=str(checkpointer.directory / str(steps[-1])))
    curriculum = config.curriculum.table
    if position.step > curriculum.num_steps:
        raise ValueError(
            f"the checkpoint is at step {position.step:,} ({position.tokens_seen:,} tokens), past the configured "
            f"{curriculum.num_steps:,} steps ({curriculum.num_tokens:,} tokens): raise curriculum.num_tokens of the "
            "last phase, or choose another --workdir"
        )
    return position


def check_same_run(saved: TrainConfig, config: TrainConfig, *, where: str) -> None:
    """Check that `config` continues the run that wrote `saved`: what decides the numbers trained is equal.

    Of the curriculum only the last phase's tokens may change.

    Raises:
      ValueError: naming each key that differs, with both values.
    """
    keys = [*_FIXED, *(f"model.{name}" for name in _FIXED_MODEL)]
    pairs = [(key, _value(saved, key), _value(config, key)) for key in keys]
    saved_phases, phases = saved.curriculum.num_tokens[:-1], config.curriculum.num_tokens[:-1]
    pairs.append(("curriculum.num_tokens before the last phase", saved_phases, phases))
    differing = [f"{key}: checkpoint {old!r}, config {new!r}" for key, old, new in pairs if old != new]
    if differing:
        raise ValueError(
            f"the checkpoint in {where} is of another run:\n  "
            + "\n  ".join(differing)
            + "\nuse the config it was made with, or another --workdir"
        )


class SettingChange(NamedTuple):
    """A key of the config that has another value than in the checkpoint."""

    key: str  # section.name
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.old!r}, is now {self.new!r}"


def changed_settings(checkpointer: Checkpointer, config: TrainConfig) -> list[SettingChange]:
    """Return every key whose value in the last checkpoint's config is another one; nothing without a checkpoint.

    Raises:
      ValueError: the checkpoint cannot be read.
    """
    steps = checkpointer.steps()
    if not steps:
        return []
    _, saved = checkpointer.read_metadata(steps[-1])
    pairs = zip(_leaves(dataclasses.asdict(saved), ""), _leaves(dataclasses.asdict(config), ""), strict=True)
    return [SettingChange(key, old, new) for (key, old), (_, new) in pairs if old != new]


def _leaves(values: dict, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of a config as a tree of dicts."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _value(config: TrainConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
