"""Checkpoints through orbax: state, data position and config in one atomic step; restore onto any mesh.

A step is a directory `<workdir>/checkpoints/<step>` with items `state` (arrays), `position`, `config`, `environment`
and `digests` (JSON). `environment` says what besides the config decides a number's last bits, `digests` has a hash of
each array and of each other item, which are compared whenever something is read. Orbax writes a step beside its final
name in the background and renames it when it is complete, so a process that dies at any moment leaves either the whole
step or none. The only importer of orbax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from btlm_jax import __version__, notices, stopping
from btlm_jax.kernels.build import cpu_facts
from btlm_jax.recipe.config import (
    CheckpointConfig,
    OptimizerConfig,
    TrainConfig,
    config_from,
    train_config_from,
    with_later_keys,
)
from btlm_jax.recipe.optimizer import learning_rate_at, rates_of_steps, stretches_of
from btlm_jax.stopping import AgreedError, OthersFailedError
from btlm_jax.storage.files import hash_json, write_atomically
from btlm_jax.storage.location import DELETED, ORIGIN, mirror_of
from btlm_jax.train import CHECKPOINTS, CONFIG_FILE, DAMAGED, METRICS_FILE, REPLACED, SUMMARY_FILE
from btlm_jax.train.step import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands: exact host integers, from which data order and learning rate follow."""

    step: int
    tokens_seen: int
    store_fingerprint: str
    passed_over: tuple[tuple[int, ...], ...] = ()  # (first, last) step, for each time that the run went back
    is_evaluated: bool = True  # False: the evaluation that is due at this step is still to be made

    def has_passed_over(self, step: int) -> bool:
        """Return whether nothing was trained in a step."""
        return any(first <= step <= last for first, last in self.passed_over)


class DamagedError(ValueError):
    """A checkpoint cannot be read, or is not as it was written; `reason` says why in one line."""

    def __init__(self, message: str, *, reason: str):
        super().__init__(message)
        self.reason = reason


DIGESTS = "digests"
_ITEMS = ("state", "position", "config", "environment", DIGESTS)
_IN_FLIGHT = 16  # hashes at a time: the 33rd program waits in a thread that the others' exchanges need (XLA:CPU 0.10.2)
_PARTIAL_SECONDS = 10.0  # for which what failed saves have left is deleted again and again
_ARRAYS, _TABLES, _OWN = "arrays", "items", "digests"  # of the item `digests`: hashes of arrays, of JSON, of itself
_Read = TypeVar("_Read")


class Checkpointer:
    """The checkpoints of one workdir."""

    _rendezvous, _has_failed_in_all = None, False

    def __init__(self, workdir: Path, *, config: CheckpointConfig):
        self.directory = workdir.resolve() / CHECKPOINTS
        self._config = config
        self._mirror = mirror_of(workdir)
        self._failure: OSError | None = None  # of the last save, until one is complete
        self._is_saving = False
        self._every_by_step: dict[int, int] = {}  # as far as `_every_steps` has looked
        self._saves_alone = self._mirror.is_remote and jax.process_count() > 1  # processes share no folder
        self._manager = self._make_manager()

    def _make_manager(self) -> ocp.CheckpointManager:
        self._rendezvous, self._has_failed_in_all = None, False
        if self._saves_alone:
            return _make_manager_alone(self.directory)
        own: dict[str, Any] = {}
        if jax.process_count() > 1:
            from btlm_jax.parallel.rendezvous import make_rendezvous

            self._rendezvous = make_rendezvous()
            own["async_options"] = ocp.AsyncOptions(barrier_sync_fn=self._rendezvous)
            if jax.process_index() == 0:  # here, as orbax would fail with it later, in one process alone
                _delete_partial(self.directory)
        if self._mirror.is_remote:
            own["todelete_subdir"] = DELETED
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_KeepRules(self._config, every_steps=self._every_steps),
                cleanup_tmp_directories=jax.process_count() == 1,
                enable_async_checkpointing=True,
                **own,
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
        self._raise_if_failed()
        if self._mirror.is_remote:
            self._settle()
        with self._naming_the_last_checkpoint():
            if position.step in self._manager.all_steps():
                return
            self._every_by_step[position.step] = config.checkpoint.every_steps
            tables = {
                "position": dataclasses.asdict(position),
                "config": json.loads(config.to_json()),
                "environment": run_environment(),
            }
            digests: dict[str, Any] = {
                _ARRAYS: {name: facts.digest for name, facts in facts_of(state).items()},
                _TABLES: {name: hash_json(table) for name, table in tables.items()},
            }
            tables[DIGESTS] = digests | {_OWN: hash_json(digests)}
            self._manager.save(
                position.step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state) if self._saves_alone else ocp.args.StandardSave(state),
                    **{name: ocp.args.JsonSave(table) for name, table in tables.items()},
                ),
            )

    def _settle(self) -> None:
        """Wait until the checkpoint before is in the bucket: at most two are kept on this machine."""
        with self._naming_the_last_checkpoint():
            self._manager.wait_until_finished()
            self._mirror.settle()

    def save_or_go_on(self, state: TrainState, *, position: Position, config: TrainConfig) -> None:
        """Save as `save` does, where training can go on after one that failed: the first in a row is only reported.

        Raises:
          OSError: no save is complete since the one before this, which failed.
        """
        for attempt in (self._check_last, lambda: self._start(state, position=position, config=config)):
            try:
                attempt()
            except OSError as error:
                if self._failure is not None or not _is_known_to_all(error):
                    raise
                self._go_on_after(error)

    def retry(self, state: TrainState, *, position: Position, config: TrainConfig) -> None:
        """Save once more if the last save has failed; that this fails too is seen by the next `save_or_go_on`."""
        try:
            self._check_last()
        except OSError as error:  # known to all
            self._go_on_after(error)
        if self._failure is None or self._is_saving:
            return
        try:
            self._start(state, position=position, config=config)
        except OSError as error:
            if not _is_known_to_all(error):
                raise
            self._failure = error

    def finish(self, state: TrainState, *, position: Position, config: TrainConfig) -> None:
        """Wait until this position is saved; if that has failed try once more.

        Raises:
          OSError: it failed again.
        """
        try:
            self.wait()
        except OSError as error:
            self._go_on_after(error)
        if not _is_so_everywhere(position.step in _steps_in(self.directory)):
            self._save_in_all(state, position=position, config=config)
        self.wait()

    def wait_or_report(self, *, then: str) -> None:
        """Wait as `wait` does, where what comes `then`, which is said, does not need a save that failed.

        Raises:
          OSError: one failed, and only this process knows it.
        """
        try:
            self.wait()
        except OSError as error:
            if not _is_known_to_all(error):
                raise
            self._go_on_after(error, then=then)

    def _start(self, state: TrainState, *, position: Position, config: TrainConfig) -> None:
        if jax.process_count() > 1:  # an error in the midst of orbax's own exchanges would leave the others there
            self.wait()
            self._do_in_all(self._try_to_write, say=self._not_written)
        self._save_in_all(state, position=position, config=config)  # after the one before, whose error it raises
        if self._is_saving:
            self._failure = None
        self._is_saving = True

    def _save_in_all(self, state: TrainState, *, position: Position, config: TrainConfig) -> None:
        save = functools.partial(self.save, state, position=position, config=config)
        self._do_in_all(save, say=self._not_written) if self._saves_alone else save()

    def _try_to_write(self) -> None:
        """See that process 0 can make the folder of a checkpoint, for which orbax lets the others wait 5 minutes."""
        if jax.process_index() == 0 or self._saves_alone:
            probe = self.directory / ".probe"
            with self._naming_the_last_checkpoint():
                write_atomically(probe, "x" * 4096)
                probe.unlink()

    def _check_last(self) -> None:
        """Raise the error of the save in the background, if it has one; note that it is complete, if it is."""

        def check() -> None:
            self._raise_if_failed()
            with self._naming_the_last_checkpoint():
                self._mirror.check()

        self._do_in_all(check, say=self._not_written)
        is_over = not self._is_in_progress() and not self._mirror.is_behind()
        if self._is_saving and _is_so_everywhere(is_over):
            self._is_saving, self._failure = False, None

    def _is_in_progress(self) -> bool:
        is_failed = self._rendezvous is not None and self._rendezvous.has_failed
        return self._manager.is_saving_in_progress() and not is_failed

    def _raise_if_failed(self) -> None:
        """Raise the error of the save in the background, if it has ended with one.

        By orbax's `check_for_errors` it would be taken from the thread that does not delete older checkpoints then.
        """
        if not self._is_in_progress():
            with self._naming_the_last_checkpoint():
                self._manager.wait_until_finished()

    def _do_in_all(self, attempt: Callable[[], None], *, say: Callable[[str], str]) -> None:
        """Do in all processes what may fail in one of them.

        Raises:
          OSError: it failed here.
          AgreedError: there are several processes, and it failed in one; all raise what `say` makes of the reason,
            which names the process.
        """
        failure: OSError | None = None
        try:
            attempt()
        except OSError as error:
            failure = error
        if jax.process_count() > 1:
            from btlm_jax.parallel.rendezvous import said_of, texts_of_all

            if said := said_of(texts_of_all("" if failure is None else _why(failure))):
                self._has_failed_in_all = True
                raise AgreedError(say(said), reason=said) from failure
        elif failure is not None:
            raise failure

    def _go_on_after(self, error: OSError, *, then: str = "training goes on, and it is tried again") -> None:
        """Report a save that failed, and what comes then; remove what it left."""
        said = f"a checkpoint could not be written to {self.directory}: {_why(error)}"
        notices.report("save-failed", f"{said}; {then}")
        self._failure, self._is_saving = error, False
        with contextlib.suppress(Exception):  # that it failed is known
            self._manager.close()
        if self._saves_alone:  # what is complete here, and not in the bucket, lacks another process's part
            from btlm_jax.parallel.rendezvous import value_of_first

            whole = value_of_first(self._mirror.committed())
            self._mirror.forget([step for step in _steps_in(self.directory) if step not in whole])
        if jax.process_index() == 0 or self._saves_alone:
            _delete_partial(self.directory)
        self._manager = self._make_manager()

    def read_metadata(self, step: int) -> tuple[Position, TrainConfig]:
        """Return a checkpoint's position and config.

        Raises:
          DamagedError: they cannot be read, or are not as they were written; names the directory and what remains.
        """
        digests = self.read_digests(step)
        metadata = {name: self._read_table(step, name, digests) for name in ("position", "config")}
        self._read_environment(step, digests)  # whose damage, too, is to be seen here

        def parse() -> tuple[Position, TrainConfig]:
            stored = metadata["position"]
            if isinstance(stored, dict):
                stored = {"passed_over": (), "is_evaluated": True, **stored}  # which older ones lack
            position = config_from(Position, stored, path="position")
            config = train_config_from(with_later_keys(metadata["config"]))
            expected = config.curriculum.table.tokens_seen(step)
            if (position.step, position.tokens_seen) != (step, expected):
                raise ValueError(
                    f"its position is step {position.step:,} with {position.tokens_seen:,} tokens seen, and it is "
                    f"checkpoint {step:,}, with {expected:,} by its config"
                )
            return position, config

        return self._in_all(step, parse, errors=ValueError)

    def read_environment(self, step: int) -> dict[str, str]:
        """Return what `run_environment` was where a checkpoint was written; nothing in checkpoints from before it.

        Raises:
          DamagedError: as `read_metadata`.
        """
        return self._read_environment(step, self.read_digests(step))

    def _read_environment(self, step: int, digests: dict[str, Any]) -> dict[str, str]:
        if not (self.directory / str(step) / "environment").is_dir():
            return {}
        stored = self._read_table(step, "environment", digests)
        if not isinstance(stored, dict):
            raise self._damaged(step, f"its environment is no table: {stored!r}")
        return stored

    def read_digests(self, step: int) -> dict[str, Any]:
        """Return a checkpoint's hashes: "arrays" by path and "items" by name; nothing in checkpoints from before them.

        Raises:
          DamagedError: they cannot be read, or are not as they were written.
        """
        if not (self.directory / str(step) / DIGESTS).is_dir():
            return {}
        stored = self._restore(step, ocp.args.Composite(**{DIGESTS: ocp.args.JsonRestore()}))[DIGESTS]

        def check() -> dict[str, Any]:
            own = stored.pop(_OWN, None) if isinstance(stored, dict) else None
            if own != hash_json(stored):
                raise ValueError("its hashes are not as they were written")
            return stored

        return self._in_all(step, check, errors=ValueError)

    def restore_state(self, step: int, *, abstract: TrainState) -> TrainState:
        """Return a checkpoint's state, laid out as `abstract` says, whatever mesh it was saved from.

        Raises:
          DamagedError: it cannot be read, is not as it was written, or has values that are not finite; names the
            directory and what remains.
        """
        wanted = {field.name: getattr(abstract, field.name) for field in dataclasses.fields(abstract)}
        expected = self.read_digests(step).get(_ARRAYS)
        if not any(name.startswith("history/") for name in expected or ()):
            del wanted["history"]  # an older checkpoint has none
        self.complete(step)
        values = self._restore(step, ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))["state"]
        self._check_arrays(step, values, expected, prefix="")
        empty = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), abstract.history)
        return TrainState(**{"history": empty, **values})

    def restore_params(self, step: int, *, abstract: dict) -> dict:
        """Return a checkpoint's parameters alone, laid out as `abstract` says; the optimizer's state is not read.

        Raises:
          DamagedError: as `restore_state`.
        """
        return self._restore_part(step, abstract, at=("params",))

    def restore_average(self, step: int, *, abstract: dict) -> dict:
        """Return the average of the weights that a run with optimizer.average keeps, laid out as `abstract` says.

        Raises:
          DamagedError: as `restore_state`.
        """
        if not any(name.startswith("opt_state/average/") for name in self.read_digests(step).get(_ARRAYS, ())):
            raise self._damaged(step, "it has no average of the weights")
        return self._restore_part(step, abstract, at=("opt_state", "average"))

    def _restore_part(self, step: int, abstract: dict, *, at: tuple[str, ...]) -> dict:
        """Return the arrays below a path of a checkpoint's state, laid out as `abstract` says; read nothing else."""
        item = functools.reduce(lambda inner, name: {name: inner}, reversed(at), abstract)
        args = ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        self.complete(step)
        state = self._restore(step, ocp.args.Composite(state=args))["state"]
        part = functools.reduce(lambda outer, name: outer[name], at, state)
        self._check_arrays(step, part, self.read_digests(step).get(_ARRAYS), prefix="/".join((*at, "")))
        return part

    def complete(self, step: int) -> None:
        """Fetch what this machine's folder of a checkpoint in a bucket lacks.

        Raises:
          DamagedError: a file of it is gone, or not as it was written.
          OSError: the bucket cannot be reached.
        """
        self._in_all(step, lambda: self._fetch(step), errors=ValueError)

    def _fetch(self, step: int) -> None:
        folder = self.directory / str(step)
        if (folder / ORIGIN).is_file():
            from btlm_jax.storage import bucket  # only where there is one

            bucket.fetch(folder)

    def rollback_steps(self, *, before: int, position: Position) -> list[int]:
        """Return the steps, ascending, of the checkpoints that a run may go back to from bad numbers at step `before`.

        They are those that every start of the run saves, whatever else made one save: so all go back to the same.
        Every process calls it at the same place.
        """
        steps = self.steps()
        every = self._every_steps(steps)
        return [s for s in steps if s < before and s % every[s] == 0 and not position.has_passed_over(s)]

    def may_begin_again(self, *, before: int, position: Position) -> bool:
        """Return whether no checkpoint to go back to was due before step `before`, so that none can be missing.

        What was due at a step is told by the first checkpoint from there on. Every process calls it at the same place.
        """
        steps = self.steps()
        every = self._every_steps(steps)

        def is_due(step: int) -> bool:
            return step % next((every[s] for s in steps if s >= step), self._config.every_steps) == 0

        return not any(is_due(s) and not position.has_passed_over(s) for s in range(1, before))

    def _every_steps(self, steps: Sequence[int]) -> dict[int, int]:
        """Return checkpoint.every_steps of the config in each checkpoint; of one that cannot be read, this run's.

        Every process calls it at the same place, and gets what process 0 reads.
        """
        if unread := [step for step in steps if step not in self._every_by_step]:
            found = [(step, self._read_every_steps(step)) for step in unread]
            if jax.process_count() > 1:
                from btlm_jax.parallel.rendezvous import value_of_first

                found = value_of_first(found)
            self._every_by_step |= dict(found)
        return {step: self._every_by_step.get(step, self._config.every_steps) for step in steps}

    def _read_every_steps(self, step: int) -> int:
        try:
            table = self._read(step, ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
            return max(1, int(table["checkpoint"]["every_steps"]))
        except Exception:  # damaged, which is said where it is restored
            stopping.raise_if_interrupted()
            return self._config.every_steps

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints after a step, of a run that has gone back to it."""
        for later in [each for each in self.steps() if each > step]:
            self._manager.delete(later)

    def newest(self, read: Callable[[int], _Read], *, steps: Sequence[int]) -> tuple[_Read, list[str]]:
        """Return what `read` returns of the last of the steps for which it raises no DamagedError.

        The damaged ones after it are set aside: renamed into the workdir's folder DAMAGED, in one process for all.
        With it comes a sentence on each of them.

        Raises:
          DamagedError: all are damaged; none is set aside. Names each.
          OSError: one cannot be renamed.
        """
        reasons: dict[int, str] = {}
        for step in reversed(steps):
            try:
                result = read(step)
            except DamagedError as error:  # in all processes
                reasons[step] = error.reason
                continue
            return result, self._set_aside(reasons, found=step)
        raise DamagedError(
            f"no checkpoint in {self.directory} can be used: "
            + "; ".join(f"{step}: {reason}" for step, reason in reasons.items())
            + "; put back what is missing, or delete them to start again",
            reason="all are damaged",
        )

    def _set_aside(self, reasons: dict[int, str], *, found: int) -> list[str]:
        """Rename damaged checkpoints in favour of the one of step `found`; return a sentence on each, and report it."""
        if not reasons:
            return []
        folder = self.directory.parent / DAMAGED
        targets = {step: folder / f"{CHECKPOINTS}-{step}" for step in reasons}

        def avoid_taken_names() -> None:
            for step in targets:
                while targets[step].exists():  # another one of the same step was set aside before
                    targets[step] = targets[step].with_name(f"{targets[step].name}+")

        def rename() -> None:
            if jax.process_index() == 0 or self._saves_alone:
                folder.mkdir(exist_ok=True)
                for step, target in targets.items():
                    (self.directory / str(step)).replace(target)

        for attempt in (avoid_taken_names, rename, self._manager.reload):  # none while another process renames
            self._do_in_all(attempt, say=lambda why: f"damaged checkpoints cannot be moved into {folder}: {why}")
        said = [
            f"checkpoint {step:,} is damaged and set aside as {targets[step]}: {reason}; going on from step {found:,}"
            for step, reason in reasons.items()
        ]
        for text in said:
            notices.report("checkpoint-damaged", text)
        return said

    def _read_table(self, step: int, name: str, digests: dict[str, Any]) -> Any:  # what is there
        """Return an item of JSON, compared with its hash."""
        args = ocp.args.Composite(**{name: ocp.args.JsonRestore()})
        table = self._restore(step, args)[name]

        def check() -> Any:
            if digests and digests[_TABLES].get(name) != hash_json(table):
                raise ValueError(f"its {name} is not as it was written")
            return table

        return self._in_all(step, check, errors=ValueError)

    def _check_arrays(self, step: int, tree: Any, expected: dict[str, str] | None, *, prefix: str) -> None:
        """Compare arrays, part of the state below `prefix`, with their hashes, and see that they are finite."""
        if expected is None:
            said = "it is from before arrays had hashes, so that nothing tells whether it is as it was written"
            notices.report("checkpoint-without-hashes", f"checkpoint {self.directory / str(step)}: {said}")
        found = {prefix + name: facts for name, facts in facts_of(tree).items()}
        differing = [name for name, facts in found.items() if expected and facts.digest != expected.get(name)]
        infinite = [name for name, facts in found.items() if not facts.is_finite]
        for names, what in ((differing, "not as it was written"), (infinite, "not finite everywhere")):
            if names:
                more = f" and {len(names) - 3} more arrays" if len(names) > 3 else ""
                raise self._damaged(step, f"{', '.join(names[:3])}{more}: {what}")

    def _restore(self, step: int, args: ocp.args.Composite) -> Any:  # a mapping by item
        # Orbax raises many kinds of errors for a damaged step; the user needs one message.
        return self._in_all(step, lambda: self._read(step, args), errors=Exception)

    def _read(self, step: int, args: ocp.args.Composite) -> Any:
        # By itself orbax would wait for all processes at the end, also for those that cannot read their part.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(*_ITEMS), multiprocessing_options=alone) as reader:
            return reader.restore(self.directory / str(step), args=args)

    def _in_all(self, step: int, read: Callable[[], _Read], *, errors: type[Exception]) -> _Read:
        """Return what `read` returns of a step; if it fails in one process raise a DamagedError in all.

        All processes call it at the same place. Between two such places none may fail alone: the others would wait.
        """
        result: list[_Read] = []
        failure: Exception | None = None
        try:
            result.append(read())
        except errors as error:
            stopping.raise_if_interrupted()  # what a signal broke is not damaged
            failure = error
        reason = ""
        if failure is not None:
            reason = str(failure) if notices.is_named(failure) else _reason(failure)
        if jax.process_count() > 1:
            from btlm_jax.parallel.rendezvous import said_of, texts_of_all

            reason = said_of(texts_of_all(reason))
        if reason:
            raise self._damaged(step, reason) from failure
        return result[0]

    def _damaged(self, step: int, reason: str) -> DamagedError:
        """Return the error of a damaged step, which names its directory, why, and what remains."""
        others = [other for other in self.steps() if other != step]
        where = self.directory / str(step)
        return DamagedError(f"checkpoint {where} cannot be used: {reason}; {self._remedy(others)}", reason=reason)

    def _remedy(self, others: Sequence[int]) -> str:
        return f"delete it to go on from step {others[-1]}" if others else "delete it to start again"

    def wait(self) -> None:
        """Wait until every started save is complete.

        Raises:
          OSError: one of them failed; the message names the last complete checkpoint.
          AgreedError: as `_do_in_all`.
        """

        if self._saves_alone:  # in turn, so that no process waits for what another one cannot do
            for do in (self._manager.wait_until_finished, self._mirror.upload, self._commit):
                self._finish_in_all(do)
            self._delete_by_rules()
            return

        def wait_here() -> None:
            self._manager.wait_until_finished()
            self._mirror.flush()

        self._finish_in_all(wait_here)

    def _finish_in_all(self, do: Callable[[], None]) -> None:
        """Do a part of a save in all processes; its errors name the last complete checkpoint, and are agreed on."""

        def attempt() -> None:
            with self._naming_the_last_checkpoint():
                do()

        self._do_in_all(attempt, say=self._not_written)

    def _commit(self) -> None:
        """Bring all to the bucket; what comes after a checkpoint's commit, and fails, is tried again by its thread."""
        try:
            self._mirror.flush()
        except OSError:
            if self._mirror.is_behind() or not self._is_saving:
                raise

    def _delete_by_rules(self) -> None:
        """Delete the checkpoints that the config does not keep, now that the new one is in the bucket.

        What the clock decides, process 0 decides for all.
        """
        from btlm_jax.parallel.rendezvous import value_of_first

        kept: set[int] = set()
        every = self._every_steps(self.steps())

        def judge() -> None:
            times = [(step, (self.directory / str(step)).stat().st_mtime) for step in every]
            kept.update(kept_steps(times, self._config, every_steps=every))

        def delete() -> None:
            for step in [step for step in self.steps() if step not in of_first]:
                self._manager.delete(step)

        self._finish_in_all(judge)
        of_first = value_of_first(sorted(kept))
        self._finish_in_all(delete)

    def close(self) -> None:
        """Wait for saves and release orbax's threads; may be called in one process alone.

        Raises:
          OSError: a save failed that nobody waited for.
        """
        with self._naming_the_last_checkpoint() if not self._has_failed_in_all else contextlib.suppress(Exception):
            self._manager.close()

    @contextlib.contextmanager
    def _naming_the_last_checkpoint(self) -> Iterator[None]:
        """Turn any error of a save into an OSError that names the last complete checkpoint."""
        try:
            yield
        except Exception as error:  # orbax raises many kinds, some of them tensorstore's; the user needs one message
            raise OSError(self._not_written(_reason(error))) from error

    def _not_written(self, reason: str) -> str:
        complete = _steps_in(self.directory)
        last = f"the last complete checkpoint is step {complete[-1]:,}" if complete else "there is none yet"
        what = "the disk or the bucket" if self._mirror.is_remote else "the disk"
        return (
            f"a checkpoint could not be written to {self.directory}: {reason}; {last}; free some space or mend {what}, "
            "and run the same command to go on"
        )


def _delete_partial(directory: Path) -> None:
    """Delete what failed saves have left in a folder of checkpoints, though threads may write there still.

    Those of a save that orbax waits for no longer do. Orbax would fail at the next save where it cannot delete all.
    """
    until = time.monotonic() + _PARTIAL_SECONDS
    while partial := list(directory.glob("*.orbax-checkpoint-tmp*")):
        for path in partial:
            shutil.rmtree(path, ignore_errors=True)
        if time.monotonic() > until:
            break
        time.sleep(0.1)


def _make_manager_alone(directory: Path) -> ocp.CheckpointManager:
    """Return a manager by which each process saves what it holds of the arrays in a folder of its own.

    No process waits for another one. Orbax does so for folders of each host, where all are the "primary host". What
    storage/bucket.py brings together is a checkpoint; a part alone lacks arrays, so that it is not checked for them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=None, active_processes={own}, barrier_sync_key_prefix=f"process-{own}"
    )
    # Orbax's own registry is one for all handlers, and what it keeps of arrays then waits for the folder that process 0
    # makes: the handler that reads, whose first process is another, has told it to.
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(primary_host=None))
    )
    arrays = ocp.BasePyTreeCheckpointHandler(
        multiprocessing_options=alone, type_handler_registry=registry, enable_post_merge_validation=False
    )
    tables = {name: ocp.JsonCheckpointHandler(multiprocessing_options=alone) for name in _ITEMS[1:]}
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            create=False,
            cleanup_tmp_directories=True,
            todelete_subdir=DELETED,
            enable_async_checkpointing=True,
            multiprocessing_options=alone,
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),  # of which all would be told
        ),
        item_handlers={
            "state": ocp.PyTreeCheckpointHandler(multiprocessing_options=alone, handler_impl=arrays),
            **tables,
        },
    )


def kept_steps(
    checkpoints: Sequence[tuple[int, float]], config: CheckpointConfig, *, every_steps: Mapping[int, int]
) -> set[int]:
    """Return which of the checkpoints, (step, time in seconds) ascending, the config keeps.

    The last keep_last; those at multiples of keep_every; with keep_hours the first, and each that is at least so much
    younger than the one kept before it; and the last one at a multiple of the every_steps that it was written with,
    which `every_steps` has by step: to it a run can go back.
    """
    steps = [step for step, _ in checkpoints]
    kept = {*steps[-config.keep_last :], *(step for step in steps if step % config.keep_every == 0)}
    kept.update([step for step in steps if step % every_steps[step] == 0][-1:])
    last = -math.inf
    for step, seconds in checkpoints if config.keep_hours else ():
        if seconds - last >= 3600 * config.keep_hours:
            kept.add(step)
            last = seconds
    return kept


@dataclasses.dataclass(frozen=True)
class _KeepRules:
    """`kept_steps` as orbax asks for it."""

    config: CheckpointConfig
    every_steps: Callable[[Sequence[int]], Mapping[int, int]]  # of checkpoints, by step

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        every = self.every_steps([each.step for each in checkpoints])
        kept = kept_steps([(each.step, each.time.timestamp()) for each in checkpoints], self.config, every_steps=every)
        if self.config.keep_hours and jax.process_count() > 1:  # clocks differ; all ask, in their main threads
            from btlm_jax.parallel.rendezvous import value_of_first

            kept = set(value_of_first(sorted(kept)))
        return [each.step in kept for each in checkpoints]


class CheckpointReader(Checkpointer):
    """Read-only access to the checkpoints of a workdir whose run may still be going on: unfinished saves stay.

    It has the checkpoints that were complete when it was made; the run may delete one of them at any moment. It holds
    nothing open, so that it is not closed.

    Raises:
      FileNotFoundError: there is no complete checkpoint.
    """

    def __init__(self, workdir: Path):
        self.directory = workdir.resolve() / CHECKPOINTS
        self._steps = _steps_in(self.directory)
        if not self._steps:
            raise FileNotFoundError(f"there is no checkpoint in {workdir}; give the --workdir of a training run")
        self._mirror = mirror_of(workdir)

    def steps(self) -> list[int]:
        return self._steps

    def _remedy(self, others: Sequence[int]) -> str:
        return f"the run also has {self.directory / str(others[-1])}" if others else "the run has no other"


class ArrayFacts(NamedTuple):
    """What is to be known of an array without having it."""

    digest: str  # 16 hexadecimal digits
    is_finite: bool


def facts_of(tree: Any) -> dict[str, ArrayFacts]:
    """Return a hash of 64 bits of each array of a tree, by its path, such as "params/embedding/embedding".

    It is that of the bits at each position of the whole array, whatever mesh it is on: with mix and mix' two bijections
    of 32 bits, and y = bits ^ mix(position), the sums of mix(y) and of mix'(y) over all elements modulo 2^32. That one
    element has changed is always seen; of other changes one in 2^64 is not. Computed where the arrays are: every
    process calls it, and all get the same.
    """
    pairs, facts = jax.tree_util.tree_leaves_with_path(tree), []
    for first in range(0, len(pairs), _IN_FLIGHT):
        facts += jax.device_get([_facts(leaf) for _, leaf in pairs[first : first + _IN_FLIGHT]])
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): ArrayFacts(f"{int(a):08x}{int(b):08x}", bool(is_finite))
        for (path, _), (a, b, is_finite) in zip(pairs, facts, strict=True)
    }


_MURMUR = ((16, 13, 16), (0x85EBCA6B, 0xC2B2AE35))  # shifts and factors of MurmurHash3's finalizer
_LOW_BIAS = ((16, 15, 16), (0x7FEB352D, 0x846CA68B))  # of Chris Wellons' "lowbias32"
_HOST_BLOCK = 1 << 15  # elements that are hashed at a time, so that they stay in a core's cache


def _facts(x: jax.Array | np.ndarray) -> tuple[Any, Any, Any]:
    """Return the two sums of `facts_of`, and whether all values are finite.

    A CPU's arrays are hashed by NumPy, as fast as by XLA, which would take 0.1 s to compile each shape.
    """
    is_here = isinstance(x, np.ndarray) or (
        x.is_fully_addressable and all(device.platform == "cpu" for device in x.devices())
    )
    return facts_on_host(np.asarray(x)) if is_here else facts_on_device(x)


def facts_on_host(x: np.ndarray) -> tuple[np.uint32, np.uint32, bool]:
    """Return the two sums of `facts_of`, and whether all values are finite, by NumPy."""
    values = x.reshape(-1)
    bits = values.view(f"uint{8 * x.dtype.itemsize}")
    sums, is_finite = [np.uint32(0), np.uint32(0)], True
    with np.errstate(over="ignore"):
        for begin in range(0, bits.size, _HOST_BLOCK):
            block = slice(begin, min(begin + _HOST_BLOCK, bits.size))
            positions = np.arange(block.start, block.stop, dtype=np.uint64).astype(np.uint32)
            y = bits[block].astype(np.uint32) ^ _mix(positions, *_MURMUR)
            for index, constants in enumerate((_MURMUR, _LOW_BIAS)):
                sums[index] += _mix(y, *constants).sum(dtype=np.uint32)
            is_finite = is_finite and bool(np.isfinite(values[block]).all())
    return sums[0], sums[1], is_finite


@jax.jit
def facts_on_device(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the two sums of `facts_of`, and whether all values are finite, by XLA."""
    sums = local_sums(x)
    return sums[0], sums[1], jnp.isfinite(x).all()


def local_sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the two sums of `facts_of`, traced."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    position = jnp.zeros_like(bits)
    for dim in range(x.ndim):
        stride = np.uint32(math.prod(x.shape[dim + 1 :]) % 2**32)
        sharding = getattr(jax.typeof(x), "sharding", None)
        position += stride * jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim, out_sharding=sharding)
    y = bits ^ _mix(position, *_MURMUR)
    first, second = (_mix(y, *constants).sum(dtype=jnp.uint32) for constants in (_MURMUR, _LOW_BIAS))
    return first, second


def _mix(x: Any, shifts: tuple[int, int, int], factors: tuple[int, int]) -> Any:
    """Return a bijection of uint32, of an array of NumPy or JAX."""
    x = (x ^ (x >> np.uint32(shifts[0]))) * np.uint32(factors[0])
    x = (x ^ (x >> np.uint32(shifts[1]))) * np.uint32(factors[1])
    return x ^ (x >> np.uint32(shifts[2]))


def _is_known_to_all(error: OSError) -> bool:
    """Return whether every process has an error, so that all act on it alike."""
    return jax.process_count() == 1 or isinstance(error, AgreedError)


def _why(error: OSError) -> str:
    """Return why a checkpoint could not be written, in one line, as this process knows it."""
    if isinstance(error, AgreedError):
        return error.reason
    cause: BaseException | None = error.__cause__
    while isinstance(cause, OthersFailedError) and cause.__context__ is not None:
        cause = cause.__context__  # what made this process come to the end of the save before the others
    return _reason(cause) if isinstance(cause, Exception) else str(error)


def _is_so_everywhere(value: bool) -> bool:
    """Return whether it is true in all processes."""
    return value if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(value)).all())


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
        stopping.raise_if_interrupted()
        raise ValueError(f"the parameters in {directory} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return an error in one line; of tensorstore's nested messages about a file, what the operating system said."""
    message = str(error).strip()
    if code := re.search(r"os_error_code='(\d+)'", message):
        return os.strerror(int(code[1]))
    message = message.partition(" See full TensorStore details")[0]
    return message.splitlines()[0][:200] if message else type(error).__name__


# What may not change between the start of a run and a resume: with another value it would be another run.
_FIXED = (
    *("seed", "mup", "optimizer.freeze", "optimizer.average", "optimizer.hidden_optimizer"),
    *("data.seed", "data.weights_by_phase", "data.document_mask", "curriculum.seq_len", "curriculum.batch_size"),
)
_FIXED_MODEL = (
    *("vocab_size", "num_layers", "d_model", "num_heads", "d_ff"),
    *("layer_norm_eps", "qk_norm", "alibi_scaling", "dtype"),
)


class Restored(NamedTuple):
    """Where a run stands, and its state, if that was asked for."""

    position: Position
    state: TrainState | None
    events: list[str]  # of checkpoints that were set aside


def last_position(checkpointer: Checkpointer, config: TrainConfig) -> Restored:
    """Return where the workdir's run stands, step 0 without a checkpoint, having checked that `config` continues it.

    The newest checkpoint whose position and config can be read counts; those after it are set aside.

    Raises:
      DamagedError: none can be read.
      ValueError: the checkpoint is of another run, is past the configured end, or was trained with learning rates that
        are not those of the configured schedule.
    """
    if not checkpointer.steps():
        if config.optimizer.schedule_begin:
            raise ValueError(
                f"optimizer.schedule_begin={config.optimizer.schedule_begin:,} is for a run that has trained so many "
                f"tokens, and there is no checkpoint in {checkpointer.directory}: give the --workdir of that run, or 0"
            )
        return Restored(Position(step=0, tokens_seen=0, store_fingerprint=""), None, [])
    (position, saved), events = checkpointer.newest(checkpointer.read_metadata, steps=checkpointer.steps())
    _check_continues(saved, config, position=position, checkpointer=checkpointer)
    return Restored(position, None, events)


def restore_last(checkpointer: Checkpointer, config: TrainConfig, *, abstract: TrainState) -> Restored:
    """Return `last_position` with the state, laid out as `abstract` says, of the newest checkpoint that is whole.

    Call it after `last_position`, where there is a checkpoint. Raises as it does.
    """
    ((position, saved), state), events = checkpointer.newest(
        lambda step: (checkpointer.read_metadata(step), checkpointer.restore_state(step, abstract=abstract)),
        steps=checkpointer.steps(),
    )
    _check_continues(saved, config, position=position, checkpointer=checkpointer)
    return Restored(position, state, events)


def _check_continues(
    saved: TrainConfig, config: TrainConfig, *, position: Position, checkpointer: Checkpointer
) -> None:
    """Check that `config` goes on from a checkpoint; raises the ValueErrors of `last_position`."""
    curriculum = config.curriculum.table
    check_same_run(saved, config, where=str(checkpointer.directory / str(position.step)))
    if position.step > curriculum.num_steps:
        raise ValueError(
            f"the checkpoint is at step {position.step:,} ({position.tokens_seen:,} tokens), past the configured "
            f"{curriculum.num_steps:,} steps ({curriculum.num_tokens:,} tokens): raise curriculum.num_tokens of the "
            f"last phase, give --config={checkpointer.directory.parent / CONFIG_FILE} of the last start, "
            "or choose another --workdir"
        )
    check_schedule(saved, config, position=position, steps=checkpointer.steps())


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


def decay_again(config: OptimizerConfig, *, tokens: int, total_tokens: int, more_tokens: int) -> dict[str, float]:
    """Return values of the optimizer that warm up and decay once more over `more_tokens`, from where a run stands.

    The peak is half of what it was and the warm-up a tenth of the tokens, where a decay leaves it so much: a proposal.
    Muon's peak is halved too: its rate is a multiple of the other, which would otherwise double.
    """
    decay = round(config.decay_share * more_tokens) if config.schedule == "wsd" else 0
    has_muon = config.hidden_optimizer == "muon"
    return {
        "schedule_begin": tokens,
        "schedule_tokens": 0,
        "initial_learning_rate": learning_rate_at(config, tokens=tokens, total_tokens=total_tokens),
        "peak_learning_rate": config.peak_learning_rate / 2,
        "warmup_tokens": min(more_tokens // 10, more_tokens - decay),
        **({"muon_learning_rate": config.muon_learning_rate / 2} if has_muon else {}),
    }


def flags_of(values: dict[str, float]) -> str:
    """Return the flags that set these values of the optimizer."""
    return " ".join(f"--config.optimizer.{name}={value!r}" for name, value in values.items())


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
    old, new = (_leaves(dataclasses.asdict(each.with_numbers()), "") for each in (saved, config))
    pairs = zip(old, new, strict=True)
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
