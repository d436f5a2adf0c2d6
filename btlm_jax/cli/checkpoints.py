"""`btlm checkpoints`: list, verify, prune and copy the checkpoints of a run."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btlm_jax import notices
from btlm_jax.cli import DONE, ERROR, UsageError
from btlm_jax.cli.parse import Flags

if TYPE_CHECKING:
    from btlm_jax.storage.location import PathOrUrl

CHECKPOINTS_HELP = """btlm checkpoints WORKDIR: list the checkpoints of a run; the run may be going on.

examples:  btlm checkpoints runs/local                       step, tokens, date, size of each
           btlm checkpoints runs/local --verify              and whether all is as it was written
           btlm checkpoints runs/local --copy=backup/local   a workdir that btlm train, generate and convert take
           btlm checkpoints runs/local --prune               delete what the rules of the run's config do not keep
           btlm checkpoints gs://bucket/run --copy=runs/run  WORKDIR and --copy may be folders in buckets

--verify reads every array, compares it with its hash and looks for values that are not finite, with as much memory as
a state takes; the exit code is 1 if a checkpoint is damaged, and nothing is moved: the next start of the run does that.
"""
_KEPT_WITH_A_COPY = ("config.json", "init.json", "tokenizer")


def checkpoints(arguments: Sequence[str]) -> int:
    """Run `btlm checkpoints`; return the exit code."""
    flags = checkpoints_flags()
    given = [argument for argument in arguments[:1] if not argument.startswith("-")]
    if not flags.parse([*(f"--workdir={name}" for name in given), *arguments[len(given) :]]):
        return DONE
    if flags.boolean("prune") and flags.is_given("copy"):
        raise UsageError("give --prune or --copy, not both")
    workdir = flags.run_path("workdir")
    from btlm_jax.train.checkpoint import CheckpointReader

    reader = CheckpointReader(workdir)
    rows = []
    print(f"{'step':>12} {'tokens':>19} {'written':>17} {'size':>10}  state")
    for step in reader.steps():
        with _unless_deleted(reader.directory / str(step), said=f"{step:>12,} the run has deleted it meanwhile"):
            rows.append(_Row(reader, step, verify=flags.boolean("verify")))
            print(rows[-1].text(), flush=True)
    if flags.is_given("copy"):
        good = [row for row in rows if not row.reason]
        _copy(reader, workdir, flags.location("copy"), good, given=flags.location("workdir"))
    if flags.boolean("prune"):
        _prune(rows)
    return ERROR if any(row.reason for row in rows) else DONE


def checkpoints_flags() -> Flags:
    """Define the flags of `btlm checkpoints`."""
    flags = Flags(CHECKPOINTS_HELP)
    flags.define_string("workdir", "", "the run; may be given without the flag, first")
    flags.define_boolean("verify", False, "compare every array with its hash")
    flags.define_boolean("prune", False, "delete what checkpoint.keep_... of the run's config do not keep")
    flags.define_string("copy", "", "new folder or URL for what is not damaged, config and tokenizer")
    return flags


@contextlib.contextmanager
def _unless_deleted(folder: Path, *, said: str) -> Iterator[None]:
    """Print `said` in place of an error that comes from a checkpoint which is not there any more."""
    try:
        yield
    except OSError:
        if folder.exists():
            raise
        print(said)


class _Row:
    """What is to be said of one checkpoint."""

    def __init__(self, reader, step: int, *, verify: bool):
        from btlm_jax.storage import bucket
        from btlm_jax.storage.location import ORIGIN
        from btlm_jax.train.checkpoint import DamagedError

        self.step, self.folder = step, reader.directory / str(step)
        self.seconds = self.folder.stat().st_mtime
        self.is_remote = (self.folder / ORIGIN).is_file()
        if self.is_remote:
            self.num_bytes = bucket.num_bytes_of(self.folder)
        else:
            self.num_bytes = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        self.config: Any = None  # a TrainConfig, once it is read
        self.tokens, self.reason, self.state = "", "", "not verified"
        try:
            position, self.config = reader.read_metadata(step)
            self.tokens = f"{position.tokens_seen:,}"
            has_hashes = bool(reader.read_digests(step))
            if verify:
                _restore(reader, step, self.config)
                if self.is_remote:
                    bucket.release(self.folder)
                self.state = "verified" if has_hashes else "finite; it has no hashes"
            elif not has_hashes:
                self.state = "has no hashes"
        except DamagedError as error:
            self.folder.stat()  # no checkpoint that the run has deleted meanwhile is damaged
            self.reason, self.state = error.reason, f"DAMAGED: {error.reason}"

    def text(self) -> str:
        """Return its line."""
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.seconds))
        return f"{self.step:>12,} {self.tokens:>19} {written:>17} {self.num_bytes / 1e6:>7,.1f} MB  {self.state}"


def _restore(reader, step: int, config) -> None:
    """Read the whole state, which compares it with its hashes."""
    import jax

    from btlm_jax.parallel.make_mesh import make_mesh
    from btlm_jax.train.program import make_program

    program = make_program(config, make_mesh(devices=jax.local_devices()[:1], tensor=1))
    reader.restore_state(step, abstract=program.state)


def _copy(reader, workdir: Path, target: PathOrUrl, rows: list[_Row], *, given: PathOrUrl) -> None:
    """Copy checkpoints and what a run keeps beside them to a new workdir, which appears when it is complete.

    `given` is the run as the command names it, `workdir` its folder on this machine.

    Raises:
      ValueError: it exists.
    """
    from btlm_jax.storage import bucket
    from btlm_jax.train import CHECKPOINTS

    is_here = isinstance(target, Path)
    if is_here and target.exists():
        raise ValueError(f"--copy={target} exists; give the name of a new folder")
    with contextlib.ExitStack() as stack:
        if is_here:
            partial = target.with_name(f".{target.name}.partial")
        else:
            bucket.check_is_new(target)
            partial = stack.enter_context(bucket.local_folder(target, role="copy"))
        shutil.rmtree(partial, ignore_errors=True)
        num_copied = 0
        for row in rows:
            copy = partial / CHECKPOINTS / str(row.step)
            with _unless_deleted(row.folder, said=f"{row.step:,}: the run has deleted it meanwhile; it is not copied"):
                try:
                    reader.complete(row.step)
                    shutil.copytree(row.folder, copy, ignore=shutil.ignore_patterns(*bucket.NOT_OF_A_CHECKPOINT))
                    row.folder.stat()  # nor was it deleted while it was copied
                except (OSError, ValueError):
                    shutil.rmtree(copy, ignore_errors=True)
                    row.folder.stat()
                    raise
                num_copied += 1
            if row.is_remote:
                bucket.release(row.folder)
        if not num_copied:
            shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(
                f"{workdir} has no checkpoint to copy: none is whole, or the run has deleted them meanwhile"
            )
        for name in _KEPT_WITH_A_COPY:
            if (workdir / name).is_dir():
                shutil.copytree(workdir / name, partial / name)
            elif (workdir / name).is_file():
                shutil.copy2(workdir / name, partial / name)
        command = _adopt_store(partial, target, source=given)
        if is_here:
            partial.rename(target)
        else:
            bucket.upload_run(partial, target)
            shutil.rmtree(partial)
    print(f"copied {num_copied} checkpoints to {target}")
    if command:
        print(f"to go on from there: {command}")


def _adopt_store(partial: Path, target: PathOrUrl, *, source: PathOrUrl) -> str:
    """Have a copied config name the store that it had in the `source`; return the command that goes on, "" if none can.

    Raises:
      ValueError: the config is damaged.
    """
    from btlm_jax.data.store import MANIFEST_FILE
    from btlm_jax.recipe.config import PREPARED
    from btlm_jax.storage.files import read_json_object
    from btlm_jax.storage.location import absolute_location, is_absolute, join_location, parse_location, read_bytes
    from btlm_jax.train import CONFIG_FILE

    if not (partial / CONFIG_FILE).is_file():
        return ""
    words = ["btlm", "train", f"--config={join_location(target, CONFIG_FILE)}", f"--workdir={target}"]
    match values := read_json_object(partial / CONFIG_FILE):
        case {"data": {"store": str(name)}, "corpus": {"source": str(maker)}} if not is_absolute(name):
            store = absolute_location(str(join_location(source, name)))
            try:
                read_bytes(join_location(parse_location(store), MANIFEST_FILE))
            except OSError:
                words += ["--config.data.store=/PATH/OF/STORE"] if maker == PREPARED else []  # others are made again
            else:
                values["data"]["store"] = store
                (partial / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
    return shlex.join(words)


def _prune(rows: list[_Row]) -> None:
    """Delete the checkpoints that the newest one's config does not keep; damaged ones stay, and count for none."""
    from btlm_jax.storage import bucket
    from btlm_jax.train.checkpoint import kept_steps

    good = [(row, row.config.checkpoint) for row in rows if not row.reason and row.config is not None]
    if not good:
        return
    every_steps = {row.step: config.every_steps for row, config in good}
    kept = kept_steps([(row.step, row.seconds) for row, _ in good], good[-1][1], every_steps=every_steps)
    if all(row.step in kept for row, _ in good):
        print("nothing is deleted: checkpoint.keep_last, keep_every and keep_hours keep all of them")
    for row, _ in good:
        if row.step not in kept:
            bucket.delete_checkpoint(row.folder) if row.is_remote else shutil.rmtree(row.folder)
            print(f"deleted {notices.named(str(row.folder))}")
