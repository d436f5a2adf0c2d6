"""`btlm train --init=MODEL`: the config of a run that begins with given weights, and its first state.

What decides the function of the model (shape, parametrization, ALiBi) is the model's, not the config file's. What a run
began with is kept in the workdir's init.json: a later start reads it there, and the model only where bad numbers lead
back to the beginning.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from btlm_jax import notices, stopping
from btlm_jax.cli import UsageError
from btlm_jax.cli.parse import Flags
from btlm_jax.data.store import Manifest, read_manifest, write_tokenizer
from btlm_jax.hub.client_files import keep_client_settings
from btlm_jax.hub.given_model import (
    GivenModel,
    NewRows,
    begin_state,
    check_has_moments,
    fetch_model,
    open_given_model,
    split_step,
)
from btlm_jax.recipe.config import TrainConfig, config_from, train_config_from, value_from_text
from btlm_jax.recipe.sizes import count_parameters
from btlm_jax.storage.files import read_json_object, write_atomically
from btlm_jax.storage.location import PathOrUrl, absolute_location, is_absolute
from btlm_jax.tokenizers.compare import difference
from btlm_jax.tokenizers.tokenizer import Tokenizer, find_tokenizer, load_tokenizer, tokenizer_info
from btlm_jax.train import INIT_FILE, KEPT_TOKENIZER
from btlm_jax.train.checkpoint import checkpoint_steps
from btlm_jax.train.setup import Beginning, Run, has_store, locate_store, log, make_workdir
from btlm_jax.train.step import TrainState

FORMAT = "btlm-init"
KEPT = "kept"  # of --init_optimizer
# Keys of `model` that do not decide which function the weights are: the run's own.
OWN_KEYS = ("dtype", "attention", "remat", "loss_chunk")
_ALIBI_SCALING, _VOCAB_SIZE = "model.alibi_scaling", "model.vocab_size"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What a workdir's init.json has."""

    format: str
    init: str  # absolute path or URL, as given
    step: int  # of the checkpoint that was taken, where the model is a run; else 0
    fingerprint: str  # of the model's files
    init_optimizer: str
    grow_vocabulary: bool
    said: str  # what was begun with, for a reader
    taken: str  # JSON of the config's keys that are the model's, by section


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """A run's config, and how its first state is made."""

    config: TrainConfig
    beginning: Beginning


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """The model of --init, and the folder that it was fetched to, if it was."""

    model: GivenModel
    fetched: Path | None


def open_init(flags: Flags, *, workdir: Path) -> Opened:
    """Open the model of --init, and fetch it into the workdir first if it is behind a URL.

    Raises:
      FileNotFoundError, ValueError, OSError: it is missing, damaged or unreadable.
    """
    return _open(absolute_location(flags.string("init")), step=0, workdir=workdir)


def _open(name: str, *, step: int, workdir: Path) -> Opened:
    """Open a model as `open_init`; of a run the checkpoint `step` where its name says none, and `step` is not 0."""
    name, named_step = split_step(name)
    step = named_step or step
    directory, fetched = Path(name), None
    if "://" in name:
        fetched = workdir / f".init-{jax.process_index()}"
        shutil.rmtree(fetched, ignore_errors=True)
        directory = fetch_model(name, step=step, directory=fetched, log=log)
    return Opened(model=open_given_model(directory, step=step), fetched=fetched)


def start(config: TrainConfig, flags: Flags, *, workdir: Path, open_model: Callable[[], Opened]) -> Start:
    """Return the config with what the model of --init decides, and the beginning; or go on as init.json says.

    `open_model` opens the model, where the run has no checkpoint yet.

    Raises:
      UsageError: the command line, the workdir and the model contradict each other.
      FileNotFoundError, ValueError, OSError: the model, the store or the record is missing, damaged or unreadable.
    """
    if checkpoint_steps(workdir):
        weights = _Weights(workdir=workdir, record=None, opened=None, rows=None)
        return Start(config=_resumed(config, flags, workdir=workdir), beginning=weights.beginning(events=()))
    if not flags.is_given("init"):
        raise UsageError(
            f"workdir {workdir} has {INIT_FILE}, as it was begun with --init, and no checkpoint yet: give that flag "
            "again, or choose another --workdir"
        )
    make_workdir(workdir)
    opened = open_model()
    model = opened.model
    stopping.current().agree("model of --init", {"model of --init": model.fingerprint, "its step": str(model.step)})
    kept = flags.string("init_optimizer") == KEPT
    location, manifest = _open_store(config, workdir=workdir)
    tokenizer = load_tokenizer(location, manifest.tokenizer)
    rows = new_rows(model, flags, tokenizer, f"token store {location}")
    _report(model, rows, manifest, name=flags.string("init"))
    config, taken = _config_of(model, config, flags, rows=rows)
    if kept:
        check_has_moments(model, config, name=flags.string("init"))
    said = _described(model, config, flags, rows=rows)
    record = Record(
        format=FORMAT,
        init=absolute_location(flags.string("init")),
        step=model.step,
        fingerprint=model.fingerprint,
        init_optimizer=flags.string("init_optimizer"),
        grow_vocabulary=flags.boolean("grow_vocabulary"),
        said=said,
        taken=json.dumps(taken),
    )
    if jax.process_index() == 0:
        directory = workdir / KEPT_TOKENIZER
        keep_client_settings(directory, model.metadata.clients, tokenizer=tokenizer, prompt_bos_id=None)
        write_atomically(workdir / INIT_FILE, json.dumps(dataclasses.asdict(record), indent=1))
    log(f"init: {said}")

    event = f"begins with {said}; fingerprint {model.fingerprint[:16]}"
    weights = _Weights(workdir=workdir, record=record, opened=opened, rows=rows)
    return Start(config=config, beginning=weights.beginning(events=(event,)))


@dataclasses.dataclass
class _Weights:
    """What makes the first state from the model of --init, which is opened again where a run needs it once more."""

    workdir: Path
    record: Record | None  # None: of a start before this one, which init.json has
    opened: Opened | None  # until a state is made of it
    rows: NewRows | None  # None: as `rows_of_run` finds them
    num_questions: int = 0

    def beginning(self, *, events: tuple[str, ...]) -> Beginning:
        return Beginning(make_state=self.make_state, why_not_again=self.why_not_again, events=events)

    def make_state(self, run: Run) -> TrainState:
        """Return the first state.

        Raises:
          FileNotFoundError, ValueError, OSError: the model is missing, damaged, unreadable or another one than it was.
        """
        opened, self.opened = self.opened or self._open_again(), None
        record, model = self._read_record(), opened.model
        rows = self.rows or rows_of_run(model, run, is_grown=record.grow_vocabulary)
        state = begin_state(model, run, keep_optimizer=record.init_optimizer == KEPT, rows=rows)
        if opened.fetched is not None:
            shutil.rmtree(opened.fetched)
        return state

    def why_not_again(self) -> str:
        """Open the model for `make_state`; return why that cannot be done, or ""."""
        reason = ""
        try:
            self.opened = self._open_again()
        except (OSError, ValueError) as error:
            reason = f"the model of --init cannot be read again: {error}"
        self.num_questions += 1
        is_read = {"model of --init": "cannot be read again" if reason else "can be read again"}
        stopping.current().agree(f"model of --init, again {self.num_questions}", is_read)
        return reason

    def _open_again(self) -> Opened:
        record = self._read_record()
        opened = _open(record.init, step=record.step, workdir=self.workdir)
        if opened.model.fingerprint != record.fingerprint:
            raise ValueError(f"{record.init} is no longer the model that the run began with: its files have changed")
        return opened

    def _read_record(self) -> Record:
        return self.record or _read_record(self.workdir / INIT_FILE)[0]


def rows_of_run(model: GivenModel, run: Run, *, is_grown: bool) -> NewRows:
    """Return what `new_rows` did at the start of a run, which has gone on since; `is_grown` is --grow_vocabulary."""
    size, vocab_size = model.metadata.model.vocab_size, run.config.model.vocab_size
    first = end = size
    if is_grown and model.tokenizer is not None:
        tokenizer = load_tokenizer(run.token_store.directory, run.token_store.manifest.tokenizer)
        if difference(model.tokenizer, tokenizer).num_new_ids:
            first, end = model.tokenizer.vocab_size, tokenizer.vocab_size
    return NewRows(first=first, end=max(end, vocab_size) if vocab_size > size else end)


def dry_run(config: TrainConfig, flags: Flags, *, workdir: Path | None) -> tuple[TrainConfig, str]:
    """Return the config that `start` would, and what it would say; nothing is written, and no array is read.

    Raises:
      UsageError, FileNotFoundError, ValueError, OSError: as `start`.
    """
    if "://" in flags.string("init"):
        raise UsageError(f"--dry_run does not fetch --init={flags.string('init')}; give a model on this machine")
    if workdir is not None and checkpoint_steps(workdir):
        return _resumed(config, flags, workdir=workdir), "init: of the run's first start, which is resumed"
    name, step = split_step(absolute_location(flags.string("init")))
    model = open_given_model(Path(name), step=step)
    rows = NewRows(first=model.metadata.model.vocab_size, end=model.metadata.model.vocab_size)
    if workdir is not None or is_absolute(config.data.store):
        location, manifest = _open_store(config, workdir=workdir or Path())
        tokenizer = load_tokenizer(location, manifest.tokenizer)
        rows = new_rows(model, flags, tokenizer, f"token store {location}")
        _report(model, rows, manifest, name=flags.string("init"))
    config, _ = _config_of(model, config, flags, rows=rows)
    return config, f"init: {_described(model, config, flags, rows=rows)}"


def _resumed(config: TrainConfig, flags: Flags, *, workdir: Path) -> TrainConfig:
    """Return the config of a run that has a checkpoint, as init.json says; the model is not read.

    Without --init every key is the command's, and the checkpoint is compared with them.

    Raises:
      UsageError: the run is another one, or was begun otherwise.
      ValueError: the record is damaged.
    """
    if not flags.is_given("init"):
        return config
    if not (workdir / INIT_FILE).is_file():
        raise UsageError(
            f"workdir {workdir} holds a run that did not begin with --init, at step {checkpoint_steps(workdir)[-1]:,}: "
            "choose another --workdir, or leave --init out to go on with it"
        )
    record, taken = _read_record(workdir / INIT_FILE)
    now = {
        "init": absolute_location(flags.string("init")),
        "init_optimizer": flags.string("init_optimizer"),
        "grow_vocabulary": flags.boolean("grow_vocabulary"),
    }
    then = {name: getattr(record, name) for name in now}
    if differing := [f"--{name} was {then[name]}, is now {now[name]}" for name in now if now[name] != then[name]]:
        raise UsageError(
            f"workdir {workdir} was begun otherwise: {'; '.join(differing)}. Give what it was begun with to go on, or "
            "another --workdir to begin anew"
        )
    return _with_taken(config, taken, flags)


def _read_record(path: Path) -> tuple[Record, dict]:
    """Return what the file says, and the config's keys in it.

    Raises:
      ValueError: it is damaged.
    """
    try:
        record = config_from(Record, read_json_object(path), path=INIT_FILE)
        if record.format != FORMAT:
            raise ValueError(f"its format is {record.format!r}, not {FORMAT!r}")
        taken = json.loads(record.taken)
        if not isinstance(taken, dict) or not all(isinstance(taken.get(name), dict) for name in ("model", "mup")):
            raise ValueError("its `taken` has no tables model and mup")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; choose another --workdir") from error
    return record, taken


def _open_store(config: TrainConfig, *, workdir: Path) -> tuple[PathOrUrl, Manifest]:
    """Return where the run's token store is, and its manifest.

    Raises:
      UsageError: there is none, and one that the run would make would have a tokenizer of its own.
      FileNotFoundError, ValueError, OSError: it cannot be read.
    """
    location = locate_store(config.data, workdir=workdir)
    if not has_store(location):
        raise UsageError(
            f"there is no token store in {location}, and --init needs one whose tokenizer is the model's. Make it by "
            "btlm corpus tokenize --tokenizer=DIR with a directory that has it (the folder tokenizer/ of a run, or a "
            "model's directory) and give --config.data.store=STORE --config.corpus.source=prepared; or give --data="
            "TEXTS without --config"
        )
    return location, read_manifest(location)


def new_rows(model: GivenModel, flags: Flags, tokenizer: Tokenizer, where: str) -> NewRows:
    """Compare the tokenizer of the data with the model's, and return which rows the table of embeddings gets.

    Raises:
      UsageError: it is another one, and --grow_vocabulary is not given or does not help.
    """
    name, size = flags.string("init"), model.metadata.model.vocab_size
    known, end = size, max(size, tokenizer.vocab_size)
    if model.tokenizer is None:
        if tokenizer.eos_id != model.metadata.eos_id:
            raise UsageError(
                f"in {where} a text ends with id {tokenizer.eos_id}, in {name} with {model.metadata.eos_id}: it was "
                "made with another tokenizer"
            )
        fault = f"{tokenizer.vocab_size:,} ids in place of {size:,}" if tokenizer.vocab_size > size else ""
        is_extension = bool(fault)
    else:
        found = difference(model.tokenizer, tokenizer)
        fault, is_extension = str(found), found.num_new_ids > 0
        if is_extension:
            known, end = model.tokenizer.vocab_size, tokenizer.vocab_size
    if fault and not (is_extension and flags.boolean("grow_vocabulary")):
        own = (
            "leave --tokenizer out, to take the model's"
            if flags.is_given("tokenizer")
            else "make the store with the model's tokenizer (btlm corpus tokenize --tokenizer=DIR)"
        )
        remedy = (
            f"give --grow_vocabulary, which gives {end - known:,} new ids the mean of the rows of the others"
            if is_extension
            else f"{own}; --grow_vocabulary is for tokenizers that keep all of the model's tokens under their ids"
        )
        raise UsageError(f"{where} has another tokenizer than {name}: {fault}: {remedy}")
    text = flags.changes.get(_VOCAB_SIZE)
    if text is not None and flags.boolean("grow_vocabulary"):
        wanted = value_from_text(_VOCAB_SIZE, text)
        assert isinstance(wanted, int)
        end = max(end, wanted) if wanted > size else end
    return NewRows(first=known, end=end) if end > known else NewRows(first=size, end=size)


def _report(model: GivenModel, rows: NewRows, manifest: Manifest, *, name: str) -> None:
    """Say what is not as the model has it."""
    before = [model.metadata.prompt_bos_id, manifest.prompt_bos_id]
    if before[0] != before[1]:
        said = ["nothing" if number is None else f"id {number}" for number in before]
        notices.report(
            "init-not-kept",
            f"in front of every prompt of {name} is {said[0]}, and in the token store {said[1]}, which is so in the "
            "run's model too",
        )
    if model.tokenizer is None:
        notices.report(
            "tokenizer-unknown", f"{name} has no tokenizer; the ids of the token store are taken for its own"
        )
    if rows.num_rows:
        notices.report(
            "vocabulary-grown",
            f"{rows.num_rows:,} rows of the embeddings, which are the output layer too, are new: ids {rows.first:,} to "
            f"{rows.end - 1:,}, each with the mean of the {rows.first:,} rows of {name} before them",
            count=rows.num_rows,
        )


def model_tokenizer(model: GivenModel, *, name: str) -> Tokenizer:
    """Return the tokenizer that a model comes with.

    Raises:
      UsageError: it has none.
    """
    if model.tokenizer is None:
        raise UsageError(f"--init={name} comes without a tokenizer: give --tokenizer=DIR with the one of its ids")
    return model.tokenizer


def write_model_tokenizer(model: GivenModel, *, directory: Path, name: str) -> None:
    """Write the tokenizer that a model comes with, and its settings, into a directory.

    Raises:
      UsageError: it has none.
    """
    tokenizer, metadata = model_tokenizer(model, name=name), model.metadata
    directory.mkdir(parents=True, exist_ok=True)
    keep_client_settings(directory, metadata.clients, tokenizer=tokenizer, prompt_bos_id=metadata.prompt_bos_id)
    write_tokenizer(tokenizer_info(tokenizer), tokenizer.contents, directory=directory)


def check_tokenizer(model: GivenModel, flags: Flags) -> None:
    """Check the tokenizer that the text of --data is to be encoded with: --tokenizer, or the model's.

    Raises:
      UsageError: there is none, or it is another one than the model's, as `new_rows`.
    """
    given = flags.string("tokenizer")
    tokenizer = find_tokenizer(Path(given)) if given else model_tokenizer(model, name=flags.string("init"))
    new_rows(model, flags, tokenizer, f"--tokenizer={given}")


def values_of(model: GivenModel) -> dict[str, dict]:
    """Return the keys of a config that are the model's, by section."""
    return {
        "model": {key: value for key, value in dataclasses.asdict(model.metadata.model).items() if key not in OWN_KEYS},
        "mup": dataclasses.asdict(model.metadata.mup),
    }


def _config_of(model: GivenModel, config: TrainConfig, flags: Flags, *, rows: NewRows) -> tuple[TrainConfig, dict]:
    """Return the run's config, and the keys of it that are the model's, by section.

    Raises:
      UsageError: the command line contradicts the model.
    """
    name, metadata = flags.string("init"), model.metadata
    taken = values_of(model)
    taken["model"]["vocab_size"] = max(metadata.model.vocab_size, rows.end)
    longest, trained = max(config.curriculum.seq_len), metadata.alibi_train_len
    if trained and _ALIBI_SCALING not in flags.changes:
        if longest > trained:
            raise UsageError(
                f"{name} divides ALiBi's slopes by keys / {trained:,} where there are more keys than that, which "
                f"training does not do: keep curriculum.seq_len (now up to {longest:,}) to {trained:,}, or give a "
                f"fixed factor, --config.model.alibi_scaling={longest / trained:g}"
            )
        notices.report(
            "init-not-kept", f"alibi_scaling of {name} by train_seq_len={trained:,} is not of the run's model"
        )
    return _with_taken(config, taken, flags), taken


def _with_taken(config: TrainConfig, taken: dict, flags: Flags) -> TrainConfig:
    """Return the config with the model's keys; say which of the file are replaced.

    Raises:
      UsageError: the command line gives a key another value than the model has.
    """
    values, name, replaced = dataclasses.asdict(config), flags.string("init"), []
    for section, keys in taken.items():
        for key, value in keys.items():
            given, full = values[section].get(key), f"{section}.{key}"
            if full == _ALIBI_SCALING and full in flags.changes:
                continue
            if given != value and full in flags.changes:
                grows = " (--grow_vocabulary makes it larger)" * (full == _VOCAB_SIZE)
                raise UsageError(
                    f"--config.{full}={flags.changes[full]}: the weights of {name} were made with {full}={value}, "
                    f"which decides what they compute; leave the flag out, or give --config.{full}={value}{grows}"
                )
            if given != value:
                replaced.append(f"{full}={value} (not {given})")
            values[section][key] = value
    if replaced:
        notices.report(
            "config-keys-replaced", f"{name} decides {', '.join(replaced)} of the config", count=len(replaced)
        )
    return train_config_from(values)


def _described(model: GivenModel, config: TrainConfig, flags: Flags, *, rows: NewRows) -> str:
    """Return in one line what is begun with, what is taken of it, and what is not."""
    optimizer, trained, longest = config.optimizer, model.metadata.max_length, max(config.curriculum.seq_len)
    at = f", step {model.step:,}" if model.step else ""
    context = f"trained at up to {trained:,} positions"
    context += (
        f", here up to {longest:,}, with alibi_scaling {config.model.alibi_scaling:g}" if longest > trained else ""
    )
    new = f", {rows.num_rows:,} rows of embeddings new" if rows.num_rows else ""
    return (
        f"the weights of {flags.string('init')} ({model.form}{at}): {count_parameters(config.model):,} parameters, "
        f"parametrization {config.mup.preset}, {context}{new}; optimizer {flags.string('init_optimizer')}; the "
        f"schedule starts anew: warm-up of {optimizer.warmup_tokens:,} tokens from {optimizer.initial_learning_rate:g} "
        f"to {optimizer.peak_learning_rate:g}"
    )
