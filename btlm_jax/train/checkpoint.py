"""Checkpoints through orbax: state, data position and config in one atomic step; restore onto any mesh.

A step is a directory `<workdir>/checkpoints/<step>` with items `state` (arrays), `position`, `config` and `environment`
(JSON), the last of which says what besides the config decides a number's last bits. Orbax
writes it beside its final name in the background and renames it when it is complete, so a process that dies at any
moment leaves either the whole step or none. The only importer of orbax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from btlm_jax import __version__
from btlm_jax.kernels.build import cpu_facts
from btlm_jax.recipe.config import CheckpointConfig, TrainConfig, config_from, train_config_from, with_later_keys
from btlm_jax.recipe.optimizer import decay_again, flags_of, learning_rate_at, rates_of_steps, stretches_of
from btlm_jax.train import CHECKPOINTS, METRICS_FILE, REPLACED, SUMMARY_FILE
from btlm_jax.train.step import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands: exact host integers, from which data order and learning rate follow."""

    step: int
    tokens_seen: int
    store_fingerprint: str


_ITEMS = ("state", "position", "config", "environment")


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
            item_names=_ITEMS,
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
                    environment=ocp.args.JsonSave(run_environment()),
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
            config = train_config_from(with_later_keys(metadata["config"]))
            expected = config.curriculum.table.tokens_seen(step)
            if (position.step, position.tokens_seen) != (step, expected):
                raise ValueError(
                    f"its position is step {position.step:,} with {position.tokens_seen:,} tokens seen, and it is "
                    f"checkpoint {step:,}, with {expected:,} by its config"
                )
        except ValueError as error:
            raise ValueError(self._unreadable(step, error)) from error
        return position, config

    def read_environment(self, step: int) -> dict[str, str]:
        """Return what `run_environment` was where a checkpoint was written; nothing in checkpoints from before it.

        Raises:
          ValueError: it cannot be read; the message names the directory and what remains.
        """
        if not (self.directory / str(step) / "environment").is_dir():
            return {}
        stored = self._restore(step, ocp.args.Composite(environment=ocp.args.JsonRestore()))["environment"]
        if not isinstance(stored, dict):
            raise ValueError(self._unreadable(step, ValueError(f"its environment is no table: {stored!r}")))
        return stored

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
        others = [other for other in self.steps() if other != step]
        return f"checkpoint {self.directory / str(step)} cannot be read: {_reason(error)}; {self._remedy(others)}"

    def _remedy(self, others: Sequence[int]) -> str:
        return f"delete it to go on from step {others[-1]}" if others else "delete it to start again"

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
            complete = _steps_in(self.directory)
            last = f"the last complete checkpoint is step {complete[-1]:,}" if complete else "there is none yet"
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
        if not _steps_in(self.directory):
            raise FileNotFoundError(f"there is no checkpoint in {workdir}; give the --workdir of a training run")
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(read_only=True),
            item_names=_ITEMS,
        )

    def _remedy(self, others: Sequence[int]) -> str:
        return f"the run also has {self.directory / str(others[-1])}" if others else "the run has no other"


def checkpoint_steps(workdir: Path) -> list[int]:
    """Return the steps of a workdir's complete checkpoints, ascending; nothing is opened."""
    return _steps_in(workdir / CHECKPOINTS)


def _steps_in(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, ascending, as orbax takes them from their names."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(path.name) for path in paths if path.name.isdecimal() and path.is_dir())


def read_params(directory: Path, *, abstract: dict) -> dict:
    """Return the parameters of a directory of them alone, laid out as `abstract` says.

    btlm convert --format=native wrote such directories before 2026-11-29.

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
    message = message.partition(" See full TensorStore details")[0]
    return message.splitlines()[0] if message else type(error).__name__


# What may not change between the start of a run and a resume: with another value it would be another run.
_FIXED = (
    *("seed", "mup", "optimizer.freeze", "data.seed", "data.weights_by_phase", "data.document_mask"),
    *("curriculum.seq_len", "curriculum.batch_size"),
)
_FIXED_MODEL = ("vocab_size", "num_layers", "d_model", "num_heads", "d_ff", "layer_norm_eps", "alibi_scaling", "dtype")


def last_position(checkpointer: Checkpointer, config: TrainConfig) -> Position:
    """Return where the workdir's run stands, step 0 without a checkpoint, having checked that `config` continues it.

    Raises:
      ValueError: the checkpoint cannot be read, is of another run, is past the configured end, or was trained with
        learning rates that are not those of the configured schedule.
    """
    steps = checkpointer.steps()
    optimizer, curriculum = config.optimizer, config.curriculum.table
    if not steps:
        if optimizer.schedule_begin:
            raise ValueError(
                f"optimizer.schedule_begin={optimizer.schedule_begin:,} is for a run that has trained so many tokens, "
                f"and there is no checkpoint in {checkpointer.directory}: give the --workdir of that run, or 0"
            )
        return Position(step=0, tokens_seen=0, store_fingerprint="")
    position, saved = checkpointer.read_metadata(steps[-1])
    check_same_run(saved, config, where=str(checkpointer.directory / str(steps[-1])))
    if position.step > curriculum.num_steps:
        raise ValueError(
            f"the checkpoint is at step {position.step:,} ({position.tokens_seen:,} tokens), past the configured "
            f"{curriculum.num_steps:,} steps ({curriculum.num_tokens:,} tokens): raise curriculum.num_tokens of the "
            "last phase, or choose another --workdir"
        )
    check_schedule(saved, config, position=position, steps=steps)
    return position


def environment_changes(checkpointer: Checkpointer, step: int) -> list[str]:
    """Return what of `run_environment` is not as it was when the checkpoint was written: a text each, with both values.

    Call it when the steps are compiled, so that it is known which kernels they have.

    Raises:
      ValueError: the checkpoint cannot be read.
    """
    old, new = checkpointer.read_environment(step), run_environment()
    return [f"{name} was {old[name]!r}, is now {new[name]!r}" for name in old if name in new and old[name] != new[name]]


def check_schedule(saved: TrainConfig, config: TrainConfig, *, position: Position, steps: list[int]) -> None:
    """Check that a new length does not change the learning rates of the steps that `saved` trained.

    A rate that the config names is the user's to change; a schedule that is stretched would change all of them, and
    heat up again what has cooled down. `steps` are those of the complete checkpoints.

    Raises:
      ValueError: it would, with the ways to go on; or a schedule begins neither where it did nor where the run stands.
    """
    old, new = saved.optimizer, config.optimizer
    old_total, new_total = saved.curriculum.table.num_tokens, config.curriculum.table.num_tokens
    if old.schedule_begin != new.schedule_begin:
        if new.schedule_begin != position.tokens_seen:
            raise ValueError(
                f"optimizer.schedule_begin={new.schedule_begin:,}: the run stands at {position.tokens_seen:,} tokens, "
                f"and its schedule began at {old.schedule_begin:,}; allowed are these two"
            )
        return
    old_length, new_length = old.schedule_length(old_total), new.schedule_length(new_total)
    if old_length == new_length:
        return
    stretched = dataclasses.replace(old, schedule_tokens=new_length)
    as_trained, as_stretched = (
        rates_of_steps(each, curriculum)[: position.step]
        for each, curriculum in ((old, saved.curriculum.table), (stretched, config.curriculum.table))
    )
    if np.array_equal(as_trained, as_stretched, equal_nan=True):
        return
    parts = stretches_of(old, total_tokens=old_total)
    decay_began = (old.schedule_begin + parts.warmup + parts.stable) // saved.curriculum.table.tokens_per_step
    before = [step for step in steps if step <= decay_began]
    back = f"--resume_step={before[-1]}" if before else "no checkpoint is left from before it (checkpoint.keep_every)"
    more_tokens = max(new_total - position.tokens_seen, saved.curriculum.table.tokens_per_step)
    again = decay_again(old, tokens=position.tokens_seen, total_tokens=old_total, more_tokens=more_tokens)
    next_rate = learning_rate_at(
        stretched, tokens=min(position.tokens_seen + config.curriculum.table.tokens_per_step, new_total),
        total_tokens=new_total,
    )  # fmt: skip
    raise ValueError(
        f"with a schedule of {new_length:,} tokens in place of {old_length:,} the learning rate of the next step would "
        f"be {next_rate:.6g}, and those of the {position.step:,} steps that are trained would have been others: "
        f"optimizer.schedule={old.schedule} decays from step {decay_began:,} on, and the run stands at "
        f"{as_trained[-1]:.6g}. Choose how to go on:\n"
        f"  decay again, from a rate and after a warm-up that you state: {flags_of(again)}\n"
        f"  keep the schedule, and go on at its last rate after its end: {flags_of({'schedule_tokens': old_length})}\n"
        f"  go back to the checkpoint before the decay: {back}"
    )


def go_back(workdir: Path, step: int) -> str:
    """Set checkpoints after `step` aside, with a copy of the metrics; return a sentence on it, "" if there are none.

    They are moved to `replaced/from-<step>`, once: the same command does nothing more when it is repeated.

    Raises:
      ValueError: there is no such checkpoint.
      OSError: a file cannot be moved.
    """
    directory = workdir / CHECKPOINTS
    steps = _steps_in(directory)
    target = workdir / REPLACED / f"from-{step}"
    if target.is_dir():
        return (
            f"--resume_step={step} was done before, and is not done again: {target} has what it replaced; to go back "
            "once more give that folder another name"
        )
    if step not in steps:
        raise ValueError(
            f"--resume_step={step}: there is no such checkpoint in {directory}; there are "
            f"{', '.join(map(str, steps)) or 'none'}"
        )
    partial = target.with_name(f".{target.name}.partial")  # left by a start that was killed here
    if steps[-1] == step and not partial.is_dir():
        return ""
    (partial / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    if (workdir / METRICS_FILE).is_file():
        shutil.copy(workdir / METRICS_FILE, partial / METRICS_FILE)
    if (workdir / SUMMARY_FILE).is_file():
        (workdir / SUMMARY_FILE).replace(partial / SUMMARY_FILE)
    for later in reversed(steps[steps.index(step) + 1 :]):  # the last first: what remains is always a run to go on from
        (directory / str(later)).replace(partial / CHECKPOINTS / str(later))
    partial.replace(target)
    return f"went back to the checkpoint of step {step:,}; what came after it is in {target}"


def run_environment() -> dict[str, str]:
    """Return what besides the config decides the last bits of a run's numbers."""
    device = jax.devices()[0]
    facts = {
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "processes": str(jax.process_count()),
        "btlm_jax": __version__,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "LIBTPU_INIT_ARGS": os.environ.get("LIBTPU_INIT_ARGS", ""),
    }
    if device.platform == "cpu":
        facts |= cpu_facts()
    else:
        facts["platform_version"] = device.client.platform_version
    return facts


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
