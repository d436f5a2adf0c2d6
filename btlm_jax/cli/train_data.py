"""`btlm train --data=PATH ...`: text -> token store -> a run that is sized to the text, the time and the machine.

What was chosen is kept in the workdir's own_text.json: a later start reads it there and measures nothing again. With
--config nothing is chosen: the run is that config on a store of the text.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from btlm_jax import notices
from btlm_jax.cli import UsageError
from btlm_jax.cli.parse import Flags, find_config, load_config
from btlm_jax.corpus import own_examples, own_text
from btlm_jax.corpus.engine.inputs import Input, raw_inputs_of
from btlm_jax.corpus.engine.stage import only_command
from btlm_jax.corpus.engine.workers import LocalWorkers, Workers
from btlm_jax.corpus.example_encoding import make_encoder
from btlm_jax.corpus.stages.examples import WORK_FOLDER, begun_at, describe
from btlm_jax.data.store import MANIFEST_FILE, TOKENIZER_INFO_FILE, TRAIN, Manifest
from btlm_jax.recipe.config import (
    PREPARED,
    TrainConfig,
    check_section,
    config_from,
    train_config_from,
    value_from_text,
    with_later_keys,
)
from btlm_jax.recipe.mixture import check_sources, parse_weights
from btlm_jax.recipe.sizes import Shape
from btlm_jax.storage.files import read_json_object, write_atomically
from btlm_jax.storage.location import PathOrUrl, absolute_location, expand_pattern
from btlm_jax.tokenizers.named_templates import NAMED_TEMPLATES
from btlm_jax.tokenizers.template_files import find_template
from btlm_jax.tokenizers.tokenizer import find_tokenizer
from btlm_jax.train import CHECKPOINTS, CONFIG_FILE, SUMMARY_FILE, loop, sizing
from btlm_jax.train.setup import make_workdir, weights_in
from btlm_jax.train.size_run import size_run

if TYPE_CHECKING:
    from btlm_jax.cli.train_init import Opened

RECORD_FILE = "own_text.json"  # in the workdir
CORPUS_FOLDER, STORE_FOLDER = "corpus", "store"  # in the workdir: the stages' work, the token store
FORMAT = "btlm-own-text"
_LATER_KEYS = {"init": "", "weights": "", "template": "", "config_file": ""}  # that files did not have at first
BASE_CONFIG = "local_cpu"  # whose family the chosen run belongs to
DEFAULT_MINUTES = 20.0  # at most, where no time is given
_MIN_MINUTES, _MAX_MINUTES = 1.0, 60.0 * 24 * 366
# Sections that --config.section.key=value may change.
_OPEN_SECTIONS = ("optimizer", "evaluation", "checkpoint", "bad_numbers", "log")
_NUM_PHASES = 2  # that a chosen run has
_WEIGHTS = "data.weights"  # a key that may be given too
_LONGEST_WINDOW = 8192  # of examples; a model of --init has its own limit
_MANY_BYTES = 64_000_000  # from here on worker processes are worth their start
_OF_ANOTHER_RUN = (CHECKPOINTS, STORE_FOLDER, CONFIG_FILE, SUMMARY_FILE)  # and weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What a workdir's own_text.json has."""

    format: str
    data: tuple[str, ...]  # absolute paths and patterns, or URLs
    tokenizer: str  # directory; "" where one is trained
    init: str  # the model that the run begins with; "" if it begins with random weights
    weights: str  # of the sources, as given; "" without
    template: str  # name or absolute path of a chat template; "" for that of the tokenizer
    inputs: str  # hash of the raw files' names and sizes
    config_file: str  # --config: a name, or an absolute path; "" where the run is chosen
    minutes: float  # as given; 0: no time was given
    lines: tuple[str, ...]  # what was chosen and why; empty until it is
    config: str  # JSON of the config, of --config as it was at first; "" until it is chosen

    @property
    def parsed_weights(self) -> tuple[dict[str, int], ...]:
        """The sources' weights, those of all phases or of each; nothing without weights."""
        return parse_weights(self.weights) if self.weights else ()


def check_flags(flags: Flags) -> None:
    """Refuse flags that contradict --data, with the commands that would be right.

    Raises:
      UsageError: they do.
    """
    if not all(flags.strings("data")):
        raise UsageError("--data needs a path: a file or folder of text, a pattern, or a URL")
    workdir = flags.location("workdir")
    if store := flags.changes.get("data.store", ""):
        other = _store_command(store, workdir, config=flags.string("config") or BASE_CONFIG)
        raise UsageError(
            f"--data and --config.data.store={store} are both given, text to make a store of and what names one. It is "
            f"one of\n  {_command(flags, workdir, config='')}\n  {other}\nthe second with a store that btlm corpus made"
        )
    if flags.is_given("config"):
        _check_given_config(flags, workdir=workdir)
    else:
        _check_changes(flags)
    for name in ("coordinator", "distributed"):
        if flags.is_given(name):
            raise UsageError(
                f"--data is for one process, and --{name} for several; make the store by btlm corpus, then give\n"
                f"  {_store_command('/PATH/OF/STORE', workdir, config='CONFIG')} --{name}"
            )
    if flags.is_given("minutes") and flags.is_given("hours"):
        raise UsageError("--minutes and --hours are both given; give one of them")
    is_timed = flags.is_given("minutes") or flags.is_given("hours")
    if is_timed and not _MIN_MINUTES <= _minutes(flags) <= _MAX_MINUTES:
        raise UsageError(
            f"the time is {_minutes(flags):g} minutes; it must be from {_MIN_MINUTES:g} to {_MAX_MINUTES:,.0f}"
        )


def _check_changes(flags: Flags) -> None:
    """Refuse changes of keys that are chosen.

    Raises:
      UsageError: there is one, or a value is refused.
    """
    for key, text in flags.changes.items():
        try:
            value_from_text(key, text)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if key.partition(".")[0] not in _OPEN_SECTIONS and key != _WEIGHTS:
            raise UsageError(
                f"--config.{key} cannot be given with --data, which chooses it; keys of {', '.join(_OPEN_SECTIONS)} "
                f"and {_WEIGHTS} can. A size of your own is a config beside --data: --config=NAME, of btlm configs, or "
                "a file that btlm new wrote"
            )
    base = load_config(find_config(BASE_CONFIG), argument="", changes={})
    try:
        for key, text in flags.changes.items():
            section, _, name = key.partition(".")
            base[section][name] = value_from_text(key, text)
        for section in _OPEN_SECTIONS:
            check_section(section, base[section])  # before the text is worked on; the whole of them with the run
    except ValueError as error:
        raise UsageError(str(error)) from error
    if weights := _weights(flags):
        try:
            given = len(parse_weights(weights))
        except ValueError as error:
            raise UsageError(str(error)) from error
        if given > _NUM_PHASES:
            raise UsageError(
                f"--config.{_WEIGHTS} has {given} phases, and the run will have {_NUM_PHASES}; give 1 or 2"
            )


def _check_given_config(flags: Flags, *, workdir: PathOrUrl) -> None:
    """Refuse a --config beside --data that cannot be trained on a store of that text, and flags that choose a run.

    Raises:
      UsageError: so it is.
    """
    given = flags.string("config")
    for name in ("init", "minutes", "hours"):
        if flags.is_given(name):
            why = "shape" if name == "init" else "length"
            raise UsageError(
                f"--config={given} and --{name} are both given with --data, and each says the run's {why}: drop one"
            )
    config = flags.config()
    others = [f"--config.{key}" for key in flags.changes if key.startswith("corpus.")]
    if config.data.store != STORE_FOLDER:
        other = _store_command(config.data.store, workdir, config=given)
        raise UsageError(
            f"--data is text to make a store of, and --config={given} names one, data.store={config.data.store}. It is "
            f"one of\n  {_command(flags, workdir, config='')}\n  {other}\nthe first without that config"
        )
    if others:
        raise UsageError(f"{others[0]} has no effect on a store of --data, which btlm train makes by its own rules")


def tracker_names(flags: Flags) -> tuple[str, ...]:
    """Return the names in log.trackers of the run that will be.

    Raises:
      UsageError: a value of the log is refused.
    """
    if flags.is_given("config"):
        return flags.config().log.tracker_names
    changes = {key: text for key, text in flags.changes.items() if key == "log.trackers"}
    try:
        values = load_config(find_config(BASE_CONFIG), argument="", changes=changes)
        return train_config_from(values).log.tracker_names
    except ValueError as error:
        raise UsageError(str(error)) from error


def config_of_data(flags: Flags, *, workdir: Path, open_model: Callable[[], Opened] | None) -> TrainConfig:
    """Make the token store of --data in the workdir and choose the run, where that is not done; return its config.

    `open_model` opens the model of --init, if that is given, of which shape, parametrization and tokenizer are taken.

    Raises:
      UsageError: the command line and the workdir contradict each other, or a value is refused.
      ValueError: the text is too small or cannot be read, or the tokenizer cannot be used.
      OSError: something cannot be read or written.
    """
    found = _read_record(workdir)
    record = _with_template(found, flags, workdir=workdir)
    _check_workdir(record, flags, workdir=workdir)
    if record is not found:
        with only_command(workdir / STORE_FOLDER, inputs=[]):
            shutil.rmtree(workdir / STORE_FOLDER / WORK_FOLDER, ignore_errors=True)
    locations = _locations(flags, record)
    if locations is not None:
        if flags.string("template"):
            find_template(_given_template(flags), directory=workdir)
        if flags.string("tokenizer"):
            # Refuses what cannot be used before the work begins.
            ids = find_tokenizer(Path(_given_location(flags, "tokenizer"))).vocab_size
            if flags.is_given("config") and ids > (most := flags.config().model.vocab_size):
                raise UsageError(
                    f"--tokenizer={flags.string('tokenizer')} has {ids:,} ids, and model.vocab_size={most:,}; give "
                    f"--config.model.vocab_size={ids} or more, or another tokenizer"
                )
        inputs = _inputs(locations, flags)
        record = _begun(record, inputs, flags, workdir=workdir)
        make_workdir(workdir)
        if open_model is not None and not record.config:
            from btlm_jax.cli.train_init import check_tokenizer

            check_tokenizer(open_model().model, flags)
        _write_record(record, workdir)
        record = _with_store(record, locations, inputs, flags, workdir=workdir, open_model=open_model)
    assert record is not None
    for line in record.lines:
        _log(line)
    return _config_of_record(record, flags)


def dry_run(flags: Flags, *, workdir: Path) -> str:
    """Return what would be read, and the plan of the run where it is chosen already.

    Raises:
      UsageError: the command line and the workdir contradict each other.
      ValueError: the text is too small.
      OSError: it cannot be found.
    """
    record = _with_template(_read_record(workdir), flags, workdir=workdir)
    _check_workdir(record, flags, workdir=workdir)
    if record is not None and record.config:
        plan = loop.dry_run(_config_of_record(record, flags), workdir=workdir)
        return "\n".join([*record.lines, plan])
    inputs = _inputs(_locations(flags, None) or [], flags)
    line = _inputs_line(inputs, are_examples=own_examples.are_examples(inputs))
    if flags.is_given("config"):
        return f"{line}\n{loop.dry_run(_config_on_text(flags), workdir=workdir)}"
    return (
        f"{line}, {inputs[0].name} the first. The run is chosen when the store is made and a step is measured: give "
        "the command without --dry_run"
    )


def _config_of_record(record: Record, flags: Flags) -> TrainConfig:
    """Return the config that was chosen, with changes; where one is given, that as it is now, as without --data."""
    return _config_on_text(flags) if record.config_file else _changed(json.loads(record.config), flags)


def seconds_since_start() -> float:
    """Return how long this process has run: on Linux from its start, elsewhere since this module was imported."""
    try:
        began = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, AttributeError):
        return time.monotonic() - _IMPORTED


_IMPORTED = time.monotonic()


def _minutes(flags: Flags) -> float:
    return flags.number("minutes") + 60 * flags.number("hours")


def _weights(flags: Flags) -> str:
    return flags.changes.get(_WEIGHTS, "")


def _given_location(flags: Flags, name: str) -> str:
    return absolute_location(flags.string(name)) if flags.string(name) else ""


def _given_config(flags: Flags) -> str:
    given = flags.string("config")
    return absolute_location(given) if given and os.path.exists(given) else given


def _given_template(flags: Flags) -> str:
    given = flags.string("template")
    return absolute_location(given) if given and given not in NAMED_TEMPLATES else given


def _command(flags: Flags, workdir: PathOrUrl, *, config: str) -> str:
    """Return the command that trains on the data, with a config unless that is "", and other flags as given."""
    words = ["btlm", "train", "--data", *flags.strings("data"), f"--workdir={workdir}"]
    if config:
        words += [f"--config={config}", *(f"--config.{key}={text}" for key, text in flags.changes.items())]
    for name in ("tokenizer", "template", "init", "init_optimizer"):
        words += [f"--{name}={flags.string(name)}"] if flags.is_given(name) else []
    words += ["--grow_vocabulary"] if flags.boolean("grow_vocabulary") else []
    words += [f"--config.{_WEIGHTS}={_weights(flags)}"] if _weights(flags) and not config else []
    words += [f"--minutes={_minutes(flags):g}"] if _minutes(flags) else []
    return shlex.join(words)


def _store_command(store: str, workdir: PathOrUrl, *, config: str) -> str:
    """Return the command that trains a config on a store."""
    words = [
        "btlm",
        "train",
        f"--config={config}",
        f"--workdir={workdir}",
        f"--config.data.store={absolute_location(store)}",
    ]
    return shlex.join([*words, "--config.corpus.source=prepared"])


def _read_record(workdir: Path) -> Record | None:
    """Return what the workdir says of its data; None if it says nothing.

    Raises:
      ValueError: the file is damaged.
    """
    path = workdir / RECORD_FILE
    if not path.is_file():
        return None
    try:
        record = config_from(Record, {**_LATER_KEYS, **read_json_object(path)}, path=RECORD_FILE)
        if record.format != FORMAT:
            raise ValueError(f"its format is {record.format!r}, not {FORMAT!r}")
        if record.config:
            values = with_later_keys(json.loads(record.config))
            record = dataclasses.replace(record, config=train_config_from(values).to_json())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; choose another --workdir") from error
    return record


def _write_record(record: Record, workdir: Path) -> None:
    write_atomically(workdir / RECORD_FILE, json.dumps(dataclasses.asdict(record), indent=1))


def _new_workdir(workdir: Path) -> Path:
    """Return the name of a workdir that is free."""
    names = (workdir.with_name(f"{workdir.name}-{number}") for number in range(2, 10_000))
    return next(name for name in names if not name.exists())


def check_is_of_data(flags: Flags, *, workdir: Path) -> None:
    """Refuse a workdir of something that was not made from --data, before anything is written to it.

    Raises:
      UsageError: it is.
      ValueError: what it says of its data is damaged.
    """
    if _read_record(workdir) is None:
        _check_workdir(None, flags, workdir=workdir)


def _check_workdir(record: Record | None, flags: Flags, *, workdir: Path) -> None:
    """Refuse a workdir that belongs to another run, or to other data, with the commands that would be right.

    Raises:
      UsageError: it does.
    """
    again = _command(flags, _new_workdir(workdir), config=flags.string("config"))
    anew = f"  {again}\n      (begins anew, in another workdir)"
    if record is None:
        there = [name for name in _OF_ANOTHER_RUN if (workdir / name).exists()]
        there += weights_in(workdir)
        if there:
            is_run = (workdir / CONFIG_FILE).is_file() and (workdir / CHECKPOINTS).is_dir()
            other = ["train", f"--config={workdir / CONFIG_FILE}", f"--workdir={workdir}"]
            other = other if is_run else ["generate", f"--checkpoint={workdir}"]
            raise UsageError(
                f"workdir {workdir} has {', '.join(there)}, which were not made from --data. It is one of\n{anew}\n"
                f"  {shlex.join(['btlm', *other])}\n      (uses what is there)"
            )
        return
    now = {"data": [*map(absolute_location, flags.strings("data"))], "tokenizer": _given_location(flags, "tokenizer")}
    now["init"] = _given_location(flags, "init")
    now |= {"template": _given_template(flags), "config": _given_config(flags)}
    then = {"data": list(record.data), "tokenizer": record.tokenizer, "init": record.init, "template": record.template}
    then["config"] = record.config_file
    if record.config and not record.config_file:
        now[f"config.{_WEIGHTS}"], then[f"config.{_WEIGHTS}"] = _weights(flags), record.weights
    if record.config and _minutes(flags):
        now["minutes"], then["minutes"] = _minutes(flags), record.minutes or "not given"
    if differing := [name for name in now if now[name] != then[name]]:
        said = "; ".join(f"--{name} was {_shown(then[name])}, is now {_shown(now[name])}" for name in differing)
        on = _go_on(record, workdir)
        raise UsageError(f"workdir {workdir} was begun otherwise: {said}. It is one of\n{anew}\n{on}")


def _shown(value: object) -> str:
    return shlex.join(value) if isinstance(value, list) else str(value or "not given")


def _with_template(record: Record | None, flags: Flags, *, workdir: Path) -> Record | None:
    """Return the record with the chat template given now, as long as no store was made with the one from before."""
    given, store = _given_template(flags), workdir / STORE_FOLDER / MANIFEST_FILE
    if record is None or record.config or record.template == given or store.is_file():
        return record
    return dataclasses.replace(record, template=given)


def _go_on(record: Record, workdir: Path) -> str:
    """Return the command that goes on with what a workdir was begun with."""
    words = ["btlm", "train", "--data", *record.data, f"--workdir={workdir}"]
    words += [f"--tokenizer={record.tokenizer}"] if record.tokenizer else []
    words += [f"--template={record.template}"] if record.template else []
    words += [f"--init={record.init}"] if record.init else []
    words += [f"--config={record.config_file}"] if record.config_file else []
    words += [f"--config.{_WEIGHTS}={record.weights}"] if record.weights else []
    return f"  {shlex.join(words)}\n      (goes on with what was begun)"


def _locations(flags: Flags, record: Record | None) -> list[PathOrUrl] | None:
    """Return where the text is; None, with a notice, if it is gone and the store is made.

    Raises:
      FileNotFoundError: it is not there.
      UsageError: a token store or a stage's work is in its place.
    """
    try:
        found = [location for text in flags.strings("data") for location in expand_pattern(text)]
        for location in found:
            if isinstance(location, Path) and not location.exists():
                raise FileNotFoundError(f"--data={location}: there is no such file or folder")
    except FileNotFoundError as error:
        if record is None or not record.config:
            raise
        notices.report("data-gone", f"{error}; the run goes on with the store that was made of it")
        return None
    workdir = flags.path("workdir").resolve()
    for location in found:
        if isinstance(location, Path) and workdir.is_relative_to(location.resolve()):
            raise UsageError(
                f"--workdir={flags.string('workdir')} lies in --data={location}, where its files would be taken for "
                "text; choose another --workdir"
            )
        if isinstance(location, Path) and (location / MANIFEST_FILE).is_file():
            is_stage = (location / "plan.json").is_file() and not (location / "features.json").is_file()
            what = "the work of a stage of btlm corpus" if is_stage else "a token store"
            store = "/PATH/OF/STORE" if is_stage else str(location)
            raise UsageError(
                f"--data={location} is {what}, not text. It is one of\n"
                f"  {_store_command(store, flags.path('workdir'), config=BASE_CONFIG)}\n"
                f"  btlm train --data=TEXT --workdir={shlex.quote(flags.string('workdir'))}"
            )
    return found


def _inputs(locations: Sequence[PathOrUrl], flags: Flags) -> list[Input]:
    """Return the raw files, and check that they can be trained on with the flags given.

    Raises:
      UsageError: they are examples and there is no tokenizer for them, or --template is given for documents.
      FileNotFoundError, OSError, ValueError: there are none; one cannot be read; they are too small, or of two kinds.
    """
    inputs = raw_inputs_of(locations)
    if not own_examples.are_examples(inputs):
        own_text.check_inputs(inputs)
        if flags.is_given("template"):
            raise UsageError(
                f"--template={flags.string('template')} is for examples to fine-tune on, prompts and completions or "
                f"messages in lines of JSON; {inputs[0].name} has none"
            )
    elif not (flags.string("init") or flags.string("tokenizer")):
        raise UsageError(
            f"{inputs[0].name} has examples to fine-tune on, prompts and completions or messages: give --init=MODEL, "
            "which is trained on them and whose tokenizer encodes them, or --tokenizer=DIR to train a new model"
        )
    return inputs


def _inputs_line(inputs: Sequence[Input], *, are_examples: bool) -> str:
    kind = " of examples to fine-tune on" if are_examples else ""
    return f"Data: {len(inputs):,} files, {sum(item.num_bytes for item in inputs):,} bytes{kind}"


def _begun(record: Record | None, inputs: Sequence[Input], flags: Flags, *, workdir: Path) -> Record:
    """Return the record of a run that begins, or goes on with the files that it began with.

    Raises:
      UsageError: they are other files.
    """
    fingerprint = own_text.fingerprint_of_inputs(inputs)
    if record is not None and record.inputs != fingerprint:
        on = ["btlm", "train", f"--config={workdir / CONFIG_FILE}", f"--workdir={workdir}"]
        other = f"  {shlex.join(on)}\n      (goes on with the store that was made)"
        if not (workdir / CONFIG_FILE).is_file():
            other = f"  {shlex.join(['rm', '-r', str(workdir)])}\n      (and the same command again: begins anew there)"
        raise UsageError(
            f"the files of --data are others than when {workdir} was begun, or have other sizes. It is one of\n"
            f"  {_command(flags, _new_workdir(workdir), config=flags.string('config'))}\n"
            f"      (begins anew, in another workdir)\n{other}"
        )
    if record is not None and record.config:
        return record
    config = _config_on_text(flags) if flags.is_given("config") else None
    return Record(
        format=FORMAT,
        config_file=_given_config(flags),
        data=tuple(map(absolute_location, flags.strings("data"))),
        tokenizer=_given_location(flags, "tokenizer"),
        init=_given_location(flags, "init"),
        weights=_weights(flags) if config is None else config.data.weights,
        template=_given_template(flags),
        inputs=fingerprint,
        minutes=_minutes(flags),
        lines=(),
        config="" if config is None else config.to_json(),
    )


def _config_on_text(flags: Flags) -> TrainConfig:
    """Return the config of --config with its changes, on the store that is made of the text."""
    values = json.loads(flags.config().to_json())
    values["data"]["store"], values["corpus"]["source"] = STORE_FOLDER, PREPARED
    return train_config_from(values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A token store, and what of its data decides the run."""

    manifest: Manifest
    lengths: sizing.Lengths
    sample_prompt: str
    document_mask: bool
    lines: tuple[str, ...]


def _with_store(
    record: Record,
    locations: Sequence[PathOrUrl],
    inputs: Sequence[Input],
    flags: Flags,
    *,
    workdir: Path,
    open_model: Callable[[], Opened] | None,
) -> Record:
    """Run the stages, then choose the run unless it is chosen; return the record of it, which is written."""
    are_examples = own_examples.are_examples(inputs)
    place = workdir / (STORE_FOLDER if are_examples else CORPUS_FOLDER)
    _log(f"{_inputs_line(inputs, are_examples=are_examples)}; the stages of btlm corpus work in {place}")
    is_large = sum(item.num_bytes for item in inputs) > _MANY_BYTES
    workers = LocalWorkers((os.cpu_count() or 1) if is_large else 1)
    prepare = _prepare_examples if are_examples else _prepare_text
    prepared = prepare(record, locations, inputs, flags, workdir=workdir, workers=workers, open_model=open_model)
    if record.lines:
        return record
    manifest = prepared.manifest
    if record.config:
        tokenizer_line = _tokenizer_line(manifest, is_given=bool(record.tokenizer))
        lines = (*prepared.lines, tokenizer_line, f"Model and run: as --config={record.config_file} has them")
        record = dataclasses.replace(record, lines=lines)
        _write_record(record, workdir)
        return record
    base = load_config(find_config(BASE_CONFIG), argument="", changes={})
    base["data"] |= {"store": STORE_FOLDER, "document_mask": prepared.document_mask}
    base["corpus"]["source"] = "prepared"
    base["log"]["sample_prompt"] = prepared.sample_prompt
    base["checkpoint"]["keep_every"] = 2**31 - 1
    given = None
    if open_model is not None:
        from btlm_jax.cli.train_init import values_of

        for section, keys in values_of(open_model().model).items():
            base[section] |= keys
        shape = {field.name: base["model"][field.name] for field in dataclasses.fields(Shape)}
        given = Shape(**{**shape, "vocab_size": max(shape["vocab_size"], manifest.tokenizer.vocab_size)})
    sized = size_run(
        manifest,
        base=base,
        change=lambda values: _changed(values, flags),
        lengths=prepared.lengths,
        weights=record.parsed_weights,
        budget=60 * (record.minutes or DEFAULT_MINUTES),
        elapsed=seconds_since_start,
        workdir=workdir,
        given=given,
    )
    is_given = bool(record.tokenizer) or open_model is not None
    lines = [*prepared.lines, _tokenizer_line(manifest, is_given=is_given), *sized.lines]
    if not record.minutes:
        lines.append(f"--minutes=N gives it another time than the {DEFAULT_MINUTES:g} minutes at most")
    record = dataclasses.replace(record, lines=tuple(lines), config=sized.config.to_json())
    _write_record(record, workdir)
    return record


def _prepare_text(
    record: Record,
    locations: Sequence[PathOrUrl],
    inputs: Sequence[Input],
    flags: Flags,
    *,
    workdir: Path,
    workers: Workers,
    open_model: Callable[[], Opened] | None,
) -> _Prepared:
    """Make the token store of documents, with a tokenizer trained on them if there is none."""
    folder = workdir / CORPUS_FOLDER
    text = own_text.split_text(locations, directory=folder, workers=workers, log=_log)
    check_sources(record.parsed_weights, text.sources, of="the text")
    if record.config:
        config = train_config_from(json.loads(record.config))
        vocab_size, lengths = config.model.vocab_size, _lengths_of(config)
    else:
        is_accelerator = _is_accelerator()
        vocab_size = sizing.vocab_size_for(text.train_bytes, is_accelerator=is_accelerator)
        lengths = sizing.lengths_for(text.train_bytes, is_accelerator=is_accelerator)
        if open_model is not None:
            lengths = lengths.at_most(open_model().model.longest)
    tokenizer = _given_directory(record, flags, workdir=workdir, open_model=open_model)
    if tokenizer is None:
        tokenizer = own_text.make_tokenizer(text, vocab_size=vocab_size, directory=folder, log=_log)
    manifest = own_text.make_store(
        text,
        tokenizer=tokenizer,
        block_len=lengths.block,
        by_source=bool(record.weights),
        output=workdir / STORE_FOLDER,
        workers=workers,
        log=_log,
    )
    return _Prepared(
        manifest=manifest, lengths=lengths, sample_prompt=text.beginning, document_mask=False, lines=text.lines
    )


def _prepare_examples(
    record: Record,
    locations: Sequence[PathOrUrl],
    inputs: Sequence[Input],
    flags: Flags,
    *,
    workdir: Path,
    workers: Workers,
    open_model: Callable[[], Opened] | None,
) -> _Prepared:
    """Make the token store of examples to fine-tune on, which are whole in windows of the shortest phase.

    Without a config both phases have the length of a window.

    Raises:
      UsageError: the config lets the examples of a window see each other.
    """
    folder = workdir / CORPUS_FOLDER
    folder.mkdir(exist_ok=True)
    tokenizer = _given_directory(record, flags, workdir=workdir, open_model=open_model)
    assert tokenizer is not None, "_inputs asks for it"
    template = find_template(record.template, directory=tokenizer)
    if record.config:
        config = train_config_from(json.loads(record.config))
        lengths = _lengths_of(config)
        if not config.data.document_mask:
            raise UsageError(
                f"{inputs[0].name} has examples to fine-tune on, which must not see each other: give "
                "--config.data.document_mask=true, or a config that has it"
            )
    else:
        usual = sizing.lengths_for(sum(item.num_bytes for item in inputs), is_accelerator=_is_accelerator())
        longest = sizing.Lengths(short=_LONGEST_WINDOW, block=_LONGEST_WINDOW)
        if open_model is not None:
            longest = longest.at_most(open_model().model.longest)
        window = own_examples.choose_window(
            inputs,
            encoder=make_encoder(tokenizer, template=template, now=begun_at(workdir / STORE_FOLDER)),
            least=min(usual.block, longest.block),
            most=longest.block,
            folder=folder,
        )
        lengths = sizing.Lengths(short=window, block=window)
    manifest = own_examples.make_store(
        locations,
        tokenizer=tokenizer,
        template=template,
        window=lengths.short,
        block_len=lengths.block,
        most_examples=_most_examples(lengths),
        output=workdir / STORE_FOLDER,
        workers=workers,
        log=_log,
    )
    check_sources(record.parsed_weights, list(manifest.splits[TRAIN].sources), of="the examples")
    return _Prepared(
        manifest=manifest,
        lengths=lengths,
        sample_prompt=own_examples.first_prompt(workdir / STORE_FOLDER),
        document_mask=True,
        lines=(f"Examples to fine-tune on: {describe(manifest)}", "The loss, held out too, is over completions only"),
    )


def _lengths_of(config: TrainConfig) -> sizing.Lengths:
    return sizing.Lengths(short=min(config.curriculum.seq_len), block=config.curriculum.table.block_len)


def _given_directory(
    record: Record, flags: Flags, *, workdir: Path, open_model: Callable[[], Opened] | None
) -> Path | None:
    """Return the directory of the tokenizer that is given or is the model's; None if there is none."""
    if record.tokenizer:
        return Path(record.tokenizer)
    if open_model is None:
        return None
    directory = workdir / CORPUS_FOLDER / "tokenizer-of-the-model"
    if not (directory / TOKENIZER_INFO_FILE).is_file():
        from btlm_jax.cli.train_init import write_model_tokenizer

        write_model_tokenizer(open_model().model, directory=directory, name=flags.string("init"))
    return directory


def _is_accelerator() -> bool:
    import jax

    return jax.default_backend() != "cpu"


def _most_examples(lengths: sizing.Lengths) -> int:
    """Return how many examples of a window attention keeps apart beside padding, on these devices; 0: any number."""
    import jax

    if jax.default_backend() != "gpu":
        return 0
    from btlm_jax.attention.gpu import MOST_DOCUMENTS

    return max(1, MOST_DOCUMENTS * lengths.short // lengths.block - 1)


def _tokenizer_line(manifest: Manifest, *, is_given: bool) -> str:
    train = manifest.splits[TRAIN]
    num_bytes = sum(source.num_bytes for source in train.sources.values())
    return (
        f"Tokenizer: {manifest.tokenizer.vocab_size:,} ids, {'as given' if is_given else 'trained on this text'}; "
        f"{train.num_tokens:,} tokens to train on, of {num_bytes / train.num_tokens:.2f} bytes"
    )


def _changed(values: dict, flags: Flags) -> TrainConfig:
    """Return the config of some values, changed by --config.section.key=value.

    Raises:
      UsageError: a value is refused.
    """
    try:
        for key, text in flags.changes.items():
            section, _, name = key.rpartition(".")
            value = value_from_text(key, text)
            values[section][name] = value
        return train_config_from(values)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _log(line: str) -> None:
    print(line, flush=True)
