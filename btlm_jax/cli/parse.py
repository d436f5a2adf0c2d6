"""Flags of every verb: defined, parsed, explained and read in one way; and the files that --config names.

A flag's name has underscores; hyphens are accepted in their place, in keys of the config too. A value follows "=" or is
the next argument. A switch has no value: `--name` turns it on, `--no_name` off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import runpy
import sys
import textwrap
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import btlm_jax
from btlm_jax import notices
from btlm_jax.cli import UsageError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from btlm_jax.parallel.peers import Place
    from btlm_jax.recipe.config import TrainConfig
    from btlm_jax.storage.location import PathOrUrl

_HELP = ("--help", "-help", "-h")
CONFIG_HELP = "config"  # --help=config
_ALL = "all"
_YES, _NO = ("true", "t", "1", "yes", "y"), ("false", "f", "0", "no", "n")
_WIDTH = 120
# Kinds of flags, as --help shows them. PATHS takes the arguments up to the next flag, as a shell expands a pattern.
TEXT, TEXTS, PATHS, WHOLE, NUMBER, SWITCH = "TEXT", "TEXT ...", "PATH ...", "N", "X", ""
_LISTS = (TEXTS, PATHS)


@dataclasses.dataclass(kw_only=True)
class Flag:
    """One flag: what it takes, and what it was given."""

    name: str
    kind: str
    default: Any
    meaning: str
    choices: tuple[str, ...]  # allowed texts; none: any
    value: Any
    is_given: bool = False

    def explain(self) -> str:
        """Return the flag's paragraph of --help."""
        takes = "" if self.kind == SWITCH else f"={self.kind.split()[0]}"
        notes = []
        if self.kind in _LISTS:
            notes.append("may be given several times" if self.kind == TEXTS else "several may follow one another")
        elif self.kind == SWITCH:
            notes += ["on by default, --no_" + self.name + " turns it off"] if self.default else []
        elif self.default != "":
            notes.append(f"default {self.default}")
        meaning = self.meaning
        if self.choices:
            notes.insert(0, f"one of {', '.join(self.choices)}")
        if notes:
            meaning += f" ({'; '.join(notes)})"
        head = f"  --{self.name}{takes}"
        if len(head) > 24:
            return textwrap.fill(meaning, _WIDTH, initial_indent=f"{head}  ", subsequent_indent=" " * 26)
        return textwrap.fill(meaning, _WIDTH, initial_indent=f"{head:<24}  ", subsequent_indent=" " * 26)


class Flags:
    """The flags of one verb: define them, `parse`, then read their values."""

    def __init__(self, help_text: str):
        self._help_text = help_text
        self._flags: dict[str, Flag] = {}
        self._has_config = False
        self._config: TrainConfig | None = None
        self._changes: dict[str, str] = {}  # section.key of the config -> text
        self._repeated: list[str] = []  # flags that were given again, with the value that counts

    def define_string(self, name: str, default: str, help_text: str, *, choices: Sequence[str] = ()) -> None:
        """Define a flag whose value is text, one of `choices` if there are any."""
        self._define(name, TEXT, default, help_text, choices)

    def define_strings(self, name: str, help_text: str) -> None:
        """Define a flag that may be given several times, each with a text."""
        self._define(name, TEXTS, [], help_text)

    def define_paths(self, name: str, help_text: str) -> None:
        """Define a flag that may be given several times, each with one path or more: `--data a.txt b.txt`."""
        self._define(name, PATHS, [], help_text)

    def define_integer(self, name: str, default: int, help_text: str) -> None:
        """Define a flag whose value is a whole number."""
        self._define(name, WHOLE, default, help_text)

    def define_float(self, name: str, default: float, help_text: str) -> None:
        """Define a flag whose value is a number."""
        self._define(name, NUMBER, default, help_text)

    def define_boolean(self, name: str, default: bool, help_text: str) -> None:
        """Define a flag that is given without a value; `--no_NAME` turns it off."""
        self._define(name, SWITCH, default, help_text)

    def define_config(self) -> None:
        """Define --config, the name or path of a config file, and --config.section.key=value, which changes one."""
        self.define_string(
            "config",
            "",
            "name or path of a config (btlm configs lists them); --config.model.num_layers=2 changes a value "
            "(--help=config lists the keys)",
        )
        self._has_config = True

    def define_for_all(self) -> None:
        """Define the flags that every verb has; `parse` does so itself."""
        self.define_string("strict", "", "end with an error at any notice, or with =NAME,NAME at those named")
        self.define_boolean("debug", False, "print the traceback of an error")
        self.define_boolean("version", False, "print the version and end")
        self.define_boolean("help", False, "print this and end" + ("; =config: the keys" if self._has_config else ""))

    def parse(self, arguments: Sequence[str]) -> bool:
        """Read the command line; return False when help or the version was asked for and printed.

        Raises:
          UsageError: a flag is unknown, or its value is refused.
        """
        self.define_for_all()
        if any(argument in _HELP or argument.startswith(("--help=", "-help=")) for argument in arguments):
            self._print_help(f"--help={CONFIG_HELP}" in arguments)
            return False
        rest = list(arguments)
        while rest:
            self._parse_next(rest)
        if self.boolean("version"):
            print(f"btlm {btlm_jax.__version__}")
            return False
        notices.begin(strict=_strict_names(self.string("strict")))
        for text in self._repeated:
            notices.report("given-twice", f"{text} is given more than once; the last one counts")
        return True

    def defined(self) -> list[Flag]:
        """Return the flags of the verb."""
        return list(self._flags.values())

    @property
    def has_config(self) -> bool:
        """Return whether --config and keys of a config are among the flags."""
        return self._has_config

    def is_defined(self, name: str) -> bool:
        """Return whether the verb has the flag."""
        return name in self._flags

    def is_given(self, name: str) -> bool:
        """Return whether the command line has the flag."""
        return self._flags[name].is_given

    def is_off(self, name: str) -> bool:
        """Return whether this is a switch that is off."""
        return self._flags[name].value is False

    def string(self, name: str) -> str:
        """Return the value of a flag that `define_string` made."""
        value = self._flags[name].value
        assert isinstance(value, str), name
        return value

    def text(self, name: str) -> str:
        """Return the same, where it is kept or compared as text: it must be valid Unicode.

        Raises:
          UsageError: it has bytes that are no UTF-8.
        """
        value = self.string(name)
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise UsageError(f"--{name}={value!a} is not valid Unicode")
        return value

    def strings(self, name: str) -> list[str]:
        """Return the values of a flag that `define_strings` or `define_paths` made."""
        value = self._flags[name].value
        assert isinstance(value, list), name
        return value

    def integer(self, name: str) -> int:
        """Return the value of a flag that `define_integer` made."""
        value = self._flags[name].value
        assert isinstance(value, int), name
        return value

    def number(self, name: str) -> float:
        """Return the value of a flag that `define_float` made."""
        value = self._flags[name].value
        assert isinstance(value, float), name
        return value

    def boolean(self, name: str) -> bool:
        """Return the value of a flag that `define_boolean` made."""
        value = self._flags[name].value
        assert isinstance(value, bool), name
        return value

    @property
    def changes(self) -> dict[str, str]:
        """The keys of the config that the command line changes, each with the text of its value."""
        return dict(self._changes)

    def path(self, name: str) -> Path:
        """Return the value of a string flag as a path on this machine; a leading ~ is the home directory.

        Raises:
          UsageError: it is empty, or a URL.
        """
        if not self.string(name):
            raise UsageError(f"--{name}=DIR is needed: {self._flags[name].meaning}")
        if "://" in self.string(name):
            raise UsageError(f"--{name}={self.string(name)} is a URL; a path on this machine is needed")
        return Path(os.path.expanduser(self.string(name)))

    def run_path(self, name: str) -> Path:
        """Return the same of a run or a model that is read; what is behind a URL is copied to this machine.

        Raises:
          UsageError: it is empty.
          OSError: the URL cannot be reached.
        """
        return self.path(name) if "://" not in self.string(name) else _copy_of_run(self.string(name))

    def run_paths(self, name: str) -> list[Path]:
        """Return the same of each value of a flag that `define_paths` made; raises as `run_path`."""
        if not all(self.strings(name)):
            raise UsageError(f"--{name} has an empty value; give {self._flags[name].meaning}")
        return [_copy_of_run(text) if "://" in text else Path(text).expanduser() for text in self.strings(name)]

    def set_string(self, name: str, value: str) -> None:
        """Replace the value of a string flag, by the local folder of a URL that was given."""
        self._flags[name].value = value

    def optional_path(self, name: str) -> Path | None:
        """Return the same, or None if the flag is not given.

        Raises:
          UsageError: it is given and empty, or a URL.
        """
        if not self.is_given(name):
            return None
        if not self.string(name):
            raise UsageError(f"--{name}= is empty; give the name of a file or directory, or leave the flag out")
        return self.path(name)

    def location(self, name: str) -> PathOrUrl:
        """Return the value of a string flag as a path or, if it is one, a URL.

        Raises:
          UsageError: it is empty.
        """
        if not self.string(name):
            raise UsageError(f"--{name}=DIR is needed: {self._flags[name].meaning}")
        from btlm_jax.storage.location import parse_location

        return parse_location(self.string(name))

    def config(self) -> TrainConfig:
        """Return the config that --config names, changed by --config.section.key=value.

        Raises:
          UsageError: --config is missing, or the file or a value is refused.
        """
        from btlm_jax.recipe.config import train_config_from

        if self._config is not None:
            return self._config
        given = self.string("config")
        if not given:
            raise UsageError("--config=NAME or FILE is needed, for example --config=local_cpu (btlm configs lists all)")
        file = self.config_file()
        print(f"config: {file}", file=sys.stderr)
        try:
            values = load_config(file, argument=self._config_argument(), changes=self._changes)
            self._config = train_config_from(values)
            return self._config
        except ValueError as error:
            raise UsageError(str(error)) from error

    def optional_config(self) -> TrainConfig | None:
        """Return what `config` does, or None where there is neither --config nor a change of one of its keys.

        Raises:
          UsageError: as `config`.
        """
        return self.config() if self.string("config") or self._changes else None

    def config_file(self) -> Path:
        """Return the file that --config named.

        Raises:
          UsageError: there is none.
        """
        given = self.string("config")
        return find_config(given if "://" in given else given.partition(":")[0])

    def config_file_and_argument(self) -> Path:
        """Return the same with the argument that --config handed to it, as --config would take both again."""
        file, argument = self.config_file(), self._config_argument()
        return file.with_name(f"{file.name}:{argument}") if argument else file

    def _config_argument(self) -> str:
        """Return the text after the colon of --config."""
        given = self.string("config")
        return "" if "://" in given else given.partition(":")[2]

    def _define(self, name: str, kind: str, default: Any, meaning: str, choices: Sequence[str] = ()) -> None:
        value = list(default) if kind in _LISTS else default
        self._flags[name] = Flag(
            name=name, kind=kind, default=default, meaning=meaning, choices=tuple(choices), value=value
        )

    def _parse_next(self, rest: list[str]) -> None:
        """Take one flag, with its value, from the front of the arguments."""
        argument = rest.pop(0)
        if not argument.startswith("-") or not argument.strip("-"):
            word = rest[0] if argument == "--" and rest else argument
            raise UsageError(f"unexpected argument {word!r}; flags are --name=value, and come after what needs none")
        given, equals, text = argument.partition("=")
        name = given.lstrip("-").replace("-", "_")
        if name.startswith("config.") and self._has_config:
            key = name.removeprefix("config.")
            text = self._value_of(given, equals, text, rest)
            if key in self._changes:
                self._repeated.append(f"--config.{key}")
            self._changes[key] = text
            return
        positive = name.removeprefix("no").removeprefix("_")
        is_off = name not in self._flags and name.startswith("no") and positive in self._flags
        flag = self._flags.get(positive if is_off else name)
        if flag is None or (is_off and flag.kind != SWITCH):
            keys = [*self._flags, *(["config.section.key"] if self._has_config else [])]
            hint = did_you_mean(name, keys, shown=lambda key: f"--{key}")
            raise UsageError(f"unknown flag {given}{hint or f' ({self._command} --help lists all)'}")
        if flag.kind == SWITCH:
            value = _switch(given, text) if equals else True
            self._set(flag, value != is_off)
        else:
            if flag.name == "strict" and not equals:
                equals, text = "=", _ALL
            self._set(flag, _converted(flag, self._value_of(given, equals, text, rest)))
            while flag.kind == PATHS and rest and not rest[0].startswith("-"):
                self._set(flag, rest.pop(0))

    @property
    def _command(self) -> str:
        """The words of the command, with which its help begins."""
        return self._help_text.partition(":")[0]

    def _set(self, flag: Flag, value: Any) -> None:
        if flag.kind in _LISTS:
            flag.value.append(value)
        else:
            if flag.is_given:
                self._repeated.append(f"--{flag.name}")
            flag.value = value
        flag.is_given = True

    def _value_of(self, given: str, equals: str, text: str, rest: list[str]) -> str:
        if not equals and not rest:
            raise UsageError(f"{given} needs a value: {given}=...")
        return text if equals else rest.pop(0)

    def _print_help(self, is_of_config: bool) -> None:
        if self._has_config:
            from btlm_jax.cli.config_keys import explain_keys
        if not is_of_config:
            print(self._help_text)
            print("flags:")
            for flag in self._flags.values():
                print(flag.explain())
        if self._has_config:
            print(("" if is_of_config else "\n") + explain_keys())


def packaged_folder(name: str) -> Path:
    """Return the folder of configs or of launch scripts: inside the installed package, or beside it in a checkout."""
    package = Path(btlm_jax.__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


def config_names() -> list[str]:
    """Return the names that --config takes: paths under configs/, without .py."""
    folder = packaged_folder("configs")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.py"))


def find_config(given: str) -> Path:
    """Return the file that --config names: the path if there is such a file, otherwise the packaged config.

    The last part of a packaged config's name is enough if no other ends in it: 111M for family/111M.

    Of a URL, such as that of the config.json of a run in a bucket, it is a copy in the user's cache.

    Raises:
      UsageError: it is neither, or the URL is not that of a .json file.
      OSError: the URL cannot be read.
    """
    if "://" in given:
        from btlm_jax.storage import files, location

        if not given.endswith(".json"):
            raise UsageError(f"--config={given} is a URL, at which only a .json file is taken: no code is fetched")
        contents = location.read_bytes(given)
        path = files.cache_directory() / "configs" / files.hash_json(given)[:16] / given.rpartition("/")[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, contents)
        return path
    path = Path(os.path.expanduser(given))
    if path.is_file():
        return path
    names = config_names()
    found = [name for name in names if name == given] or [name for name in names if name.rpartition("/")[2] == given]
    if len(found) == 1:
        return packaged_folder("configs") / f"{found[0]}.py"
    name = given.removeprefix("configs/").removesuffix(".py")
    hint = did_you_mean(name, [*names, *(each.rpartition("/")[2] for each in names)], shown="--config={}".format)
    raise UsageError(f"--config={given} is neither a file nor one of {', '.join(names)} (btlm configs){hint}")


def load_config(file: Path, *, argument: str, changes: Mapping[str, str]) -> dict:
    """Return what the file's get_config gives, as plain dicts, with keys changed by texts.

    `argument` is handed to get_config unless it is empty; `changes` maps section.key to a text. A key that others of
    the file refer to (ml_collections' FieldReference) changes those too.

    Raises:
      UsageError: the file fails, or names no config.
      ValueError: a change is refused, or a .json file is damaged.
    """
    from ml_collections import ConfigDict

    from btlm_jax.recipe.config import value_from_text, with_later_keys
    from btlm_jax.storage.files import read_json_object

    values = {key: value_from_text(key, text) for key, text in changes.items()}
    is_json = file.suffix == ".json"  # such as the config.json of a workdir
    stored = with_later_keys(read_json_object(file)) if is_json else {}
    with _naming(file):
        config = ConfigDict(stored if is_json else _run(file, argument))
    with config.ignore_type(), config.unlocked():
        _add_later_keys(config, file=file)
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            target = config.get(section) if section else config
            if not isinstance(target, ConfigDict):
                raise UsageError(f"config {file} has no section {section}")
            target[name] = value
    with _naming(file):
        return config.to_dict()


def _add_later_keys(config: ConfigDict, *, file: Path) -> None:
    """Add the keys that a config file is too old to have, with what they would have been then, and say so."""
    from ml_collections import ConfigDict

    from btlm_jax.recipe.config import with_later_keys

    added = []
    for section, keys in with_later_keys(config.to_dict()).items():
        own = config.get(section)
        if not isinstance(own, ConfigDict):
            continue
        for name in sorted(keys.keys() - own.keys()):
            own[name] = keys[name]
            added.append(f"{section}.{name}={keys[name]!r}")
    if added:
        notices.report("config-is-older", f"{file} lacks keys that came later; as before them: {', '.join(added)}")


def _run(file: Path, argument: str) -> dict:
    """Return what a config file's get_config gives."""
    from ml_collections import ConfigDict

    make = runpy.run_path(str(file)).get("get_config")
    if not callable(make):
        raise UsageError(f"config {file} has no function get_config")
    made = make(argument) if argument else make()
    if not isinstance(made, (dict, ConfigDict)):  # a FrozenConfigDict is one
        raise UsageError(f"config {file}: get_config must return a ConfigDict, not a {type(made).__name__}")
    return typing.cast(dict, made)


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn whatever goes wrong in a config file, which is a program, into a UsageError that names the line."""
    try:
        yield
    except (UsageError, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # sys.exit() is one of the things that may go wrong
        raise UsageError(_fault(file, error)) from error


def _fault(file: Path, error: BaseException) -> str:
    """Return what is wrong with a config file, and in which line."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())[:300]
    return f"config {f'{file}, line {line}' if line else file}: {type(error).__name__}: {text}"


def did_you_mean(given: str, allowed: Sequence[str], *, shown: Callable[[str], str] = str) -> str:
    """Return "; did you mean X?" if one of the allowed is like what was given, otherwise ""."""
    close = difflib.get_close_matches(given, allowed, n=1)
    return f"; did you mean {shown(close[0])}?" if close else ""


def _converted(flag: Flag, text: str) -> Any:
    """Return the value that a flag's text stands for.

    Raises:
      UsageError: it stands for none.
    """
    if flag.kind in (WHOLE, NUMBER):
        from btlm_jax.recipe.config import finite_number, whole_number

        read = whole_number if flag.kind == WHOLE else finite_number
        try:
            return read(f"--{flag.name}", text)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if flag.choices and text not in flag.choices:
        hint = did_you_mean(text, flag.choices)
        raise UsageError(f"--{flag.name}={text} is not known; it may be {', '.join(flag.choices)}{hint}")
    return text


def _copy_of_run(url: str) -> Path:
    """Return a local copy of a run or a model behind a URL; raises as `Flags.run_path`."""
    from btlm_jax.hub import native
    from btlm_jax.storage import bucket

    url, is_average = native.split_average_of_url(url)
    folder = bucket.open_for_reading(url)
    return folder / native.AVERAGE if is_average else folder


def _switch(given: str, text: str) -> bool:
    if text.lower() not in (*_YES, *_NO):
        raise UsageError(f"{given}={text} is a switch: give {given} alone, or true or false")
    return text.lower() in _YES


def _strict_names(given: str) -> list[str]:
    """Return the names of notices that --strict makes errors.

    Raises:
      UsageError: one is not known.
    """
    if given == _ALL:
        return list(notices.NAMES)
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in notices.NAMES:
            hint = did_you_mean(name, list(notices.NAMES))
            raise UsageError(f"--strict={name} is no notice; there are {', '.join(notices.NAMES)}{hint}")
    return names


def define_processes(flags: Flags) -> None:
    """Define the flags of several processes."""
    flags.define_boolean("distributed", False, "join the other hosts of a TPU pod slice")
    flags.define_string("coordinator", "", "host:port of process 0, for several processes")
    flags.define_integer("num_processes", 1, "with --coordinator: how many processes there are")
    flags.define_integer("process_id", 0, "with --coordinator: which of them this is, from 0")


def check_processes(flags: Flags) -> None:
    """Refuse flags of several processes that contradict each other.

    Raises:
      UsageError: they do.
    """
    coordinator = flags.string("coordinator")
    for name in ("num_processes", "process_id"):
        if flags.is_given(name) and not coordinator:
            raise UsageError(f"--{name} has no effect without --coordinator=HOST:PORT, the address of process 0")
    if coordinator and flags.boolean("distributed"):
        raise UsageError("--coordinator and --distributed are both given; --distributed finds the other hosts itself")
    count, number = flags.integer("num_processes"), flags.integer("process_id")
    if coordinator and not coordinator.rpartition(":")[2].isdigit():
        raise UsageError(f"--coordinator={coordinator} must be HOST:PORT, for example --coordinator=10.0.0.1:8476")
    if not 0 <= number < count:
        raise UsageError(f"--process_id={number} must be from 0 to --num_processes - 1 = {count - 1}")


def has_several(flags: Flags) -> bool:
    """Return whether the run has several processes."""
    return bool(flags.string("coordinator")) or flags.boolean("distributed")


def place_of(flags: Flags) -> Place:
    """Return where this process stands among those of the run."""
    from btlm_jax.parallel import peers

    if flags.boolean("distributed"):
        return peers.place_in_cluster()
    count, index = flags.integer("num_processes"), flags.integer("process_id")
    return peers.Place(address=flags.string("coordinator"), count=count, index=index)
