"""Flags of every verb: defined, parsed, explained and read in one way; and the files that --config names.

The only importer of absl.flags.

A flag's name has underscores, as absl's have; hyphens are accepted in their place, in keys of the config too, and
`--no-search` for absl's `--nosearch`.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

import btlm_jax
from btlm_jax import notices
from btlm_jax.cli import UsageError

if TYPE_CHECKING:
    from btlm_jax.recipe.config import TrainConfig

_HELP = ("--help", "-help", "-h")
_ALL = "all"


class Flags:
    """The flags of one verb: define them, `parse`, then read their values."""

    def __init__(self, help_text: str):
        self._help_text = help_text
        self._values = flags.FlagValues()
        self._argv: list[str] = []  # where ml_collections looks for --config.section.key
        self.define_boolean("help", False, "show this help", short_name="h")
        self.define_string("strict", "", "end with an error at any notice, or with =NAME,NAME at those named")
        self.define_boolean("debug", False, "print the traceback of an error")

    def define_string(self, name: str, default: str, help_text: str) -> None:
        """Define a flag whose value is text."""
        flags.DEFINE_string(name, default, help_text, flag_values=self._values)

    def define_strings(self, name: str, help_text: str) -> None:
        """Define a flag that may be given several times, each with a text."""
        flags.DEFINE_multi_string(name, [], help_text, flag_values=self._values)

    def define_integer(self, name: str, default: int, help_text: str) -> None:
        """Define a flag whose value is a whole number."""
        flags.DEFINE_integer(name, default, help_text, flag_values=self._values)

    def define_float(self, name: str, default: float, help_text: str) -> None:
        """Define a flag whose value is a number."""
        flags.DEFINE_float(name, default, help_text, flag_values=self._values)

    def define_boolean(self, name: str, default: bool, help_text: str, *, short_name: str | None = None) -> None:
        """Define a flag that is given without a value; `--noNAME` turns it off."""
        flags.DEFINE_boolean(name, default, help_text, short_name=short_name, flag_values=self._values)

    def define_config(self) -> None:
        """Define --config, the name or path of a config file, and --config.section.key=value, which changes one."""
        from ml_collections import config_flags

        config_flags.DEFINE_config_file(
            "config",
            None,
            "name or path of a config (btlm configs lists them); --config.model.num_layers=2 changes a value",
            flag_values=self._values,
            sys_argv=self._argv,
        )

    def parse(self, arguments: Sequence[str]) -> bool:
        """Read the command line; return False when help was asked for and printed.

        Raises:
          UsageError: a flag is unknown, or its value is refused.
        """
        if any(argument in _HELP for argument in arguments):
            print(self._help_text)
            print(self._explain())
            return False
        self._argv[:] = ["btlm", *self._canonical(arguments)]
        try:
            rest = self._values(self._argv)[1:]
        except (AttributeError, KeyError, IndexError) as error:  # how config_flags reports a --config.x.y it cannot set
            raise UsageError(f"unknown config key {_one_line(error)}") from error
        except flags.Error as error:
            raise UsageError(_one_line(error)) from error
        except (OSError, TypeError, ValueError, SyntaxError) as error:
            raise UsageError(f"--config cannot be loaded: {_one_line(error)}") from error
        if rest:
            raise UsageError(f"unexpected argument {rest[0]!r}; flags are --name=value")
        notices.begin(strict=_strict_names(self.string("strict")))
        return True

    def is_defined(self, name: str) -> bool:
        """Return whether the verb has the flag."""
        return name in self._values

    def is_given(self, name: str) -> bool:
        """Return whether the command line has the flag."""
        return bool(self._values[name].present)

    def string(self, name: str) -> str:
        """Return the value of a flag that `define_string` made."""
        value = self._values[name].value
        assert isinstance(value, str), name
        return value

    def strings(self, name: str) -> list[str]:
        """Return the values of a flag that `define_strings` made."""
        value = self._values[name].value
        assert isinstance(value, list), name
        return value

    def integer(self, name: str) -> int:
        """Return the value of a flag that `define_integer` made."""
        value = self._values[name].value
        assert isinstance(value, int), name
        return value

    def number(self, name: str) -> float:
        """Return the value of a flag that `define_float` made."""
        value = self._values[name].value
        assert isinstance(value, float), name
        return value

    def boolean(self, name: str) -> bool:
        """Return the value of a flag that `define_boolean` made."""
        value = self._values[name].value
        assert isinstance(value, bool), name
        return value

    def path(self, name: str) -> Path:
        """Return the value of a string flag as a path.

        Raises:
          UsageError: it is empty.
        """
        if not self.string(name):
            raise UsageError(f"--{name}=DIR is needed: {self._values[name].help}")
        return Path(self.string(name))

    def config(self) -> TrainConfig:
        """Return the config that --config names, changed by --config.section.key=value.

        Raises:
          UsageError: --config is missing, or the file or a value is refused.
        """
        from btlm_jax.recipe.config import train_config_from

        try:
            loaded = self._values["config"].value
            mapping = None if loaded is None else loaded.to_dict()
        except Exception as error:  # a config file is a program: anything may go wrong in it
            raise UsageError(f"--config cannot be loaded: {_one_line(error)}") from error
        if mapping is None:
            raise UsageError("--config=NAME or FILE is needed, for example --config=local_cpu (btlm configs lists all)")
        try:
            return train_config_from(mapping)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def config_file(self) -> Path:
        """Return the file that --config named."""
        from ml_collections import config_flags

        return Path(config_flags.get_config_filename(self._values["config"]).partition(":")[0])

    def _canonical(self, arguments: Sequence[str]) -> list[str]:
        """Write every flag's name with underscores, and --config with the path of its file."""
        canonical, rest = [], list(arguments)
        while rest:
            argument = rest.pop(0)
            if argument == "--":
                return [*canonical, argument, *rest]
            if not argument.startswith("-") or not argument.strip("-"):
                canonical.append(argument)
                continue
            given, equals, value = argument.partition("=")
            name = self._name(given.lstrip("-"))
            if name == "strict" and not equals:
                equals, value = "=", _ALL
            if not equals and rest and self._takes_value(name):
                equals, value = "=", rest.pop(0)
            if name == "config" and equals:
                value = _config_path(value)
            canonical.append(f"--{name}{equals}{value}")
        return canonical

    def _name(self, given: str) -> str:
        name = given.replace("-", "_")
        positive = name.removeprefix("no_")
        return f"no{positive}" if name not in self._values and positive in self._values else name

    def _takes_value(self, name: str) -> bool:
        return name.startswith("config.") or (name in self._values and not self._values[name].boolean)

    def _explain(self) -> str:
        names = [name for name in self._values if name != "h" and "." not in name]
        return "flags:\n" + "\n".join(f"  --{name:<15} {self._values[name].help}" for name in names) + "\n"


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

    Raises:
      UsageError: it is neither.
    """
    if Path(given).is_file():
        return Path(given)
    if given in (names := config_names()):
        return packaged_folder("configs") / f"{given}.py"
    hint = did_you_mean(given.removeprefix("configs/").removesuffix(".py"), names)
    raise UsageError(f"--config={given} is neither a file nor one of {', '.join(names)} (btlm configs){hint}")


def did_you_mean(given: str, allowed: Sequence[str]) -> str:
    """Return "; did you mean X?" if one of the allowed is like what was given, otherwise ""."""
    close = difflib.get_close_matches(given, allowed, n=1)
    return f"; did you mean {close[0]}?" if close else ""


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


def _config_path(given: str) -> str:
    """Return the path of a config file, with what follows a colon: the argument of its get_config."""
    name, colon, argument = given.partition(":")
    file = find_config(name)
    print(f"config: {file}", file=sys.stderr)
    return f"{file}{colon}{argument}"


def _one_line(error: Exception) -> str:
    # config_flags raises KeyErrors and AttributeErrors whose message is the repr of another message.
    message = str(error).replace("\\n", "\n").replace("\\'", "'")
    while message[:1] == message[-1:] == "'":
        message = message[1:-1]
    return " ".join(message.replace("'\n", "': ").split())
