"""What every verb shares: exit codes, the usage error, and flags made, read and explained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from btlm_jax.recipe.config import TrainConfig, train_config_from

DONE, ERROR, USAGE, PREEMPTED, BAD_NUMBERS, INTERRUPTED = 0, 1, 2, 75, 76, 130


class UsageError(Exception):
    """The command line was wrong; the message says how and what would be right."""


def config_flag() -> flags.FlagValues:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "config file; --config.model.num_layers=2 changes a value", flag_values=values
    )
    return values


def run_flags() -> flags.FlagValues:
    values = config_flag()
    flags.DEFINE_string("workdir", "", "directory of the run: checkpoints, metrics, plots", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    return values


def parse_config(values: flags.FlagValues, arguments: Sequence[str], *, help_text: str) -> TrainConfig | None:
    """Parse the flags and return the config, or None when help was asked for and printed."""
    if not parse_flags(values, arguments, help_text=help_text):
        return None
    try:
        loaded = values["config"].value
        loaded = loaded if loaded is None else loaded.to_dict()
    except Exception as error:  # a config file is a program: anything may go wrong in it
        raise UsageError(f"--config cannot be loaded: {one_line(error)}") from error
    if loaded is None:
        raise UsageError("--config=FILE is needed, for example --config=configs/local_cpu.py")
    try:
        return train_config_from(loaded)
    except ValueError as error:
        raise UsageError(str(error)) from error


def config_file(values: flags.FlagValues) -> Path:
    """Return the file that --config named."""
    return Path(config_flags.get_config_filename(values["config"]))


def parse_flags(values: flags.FlagValues, arguments: Sequence[str], *, help_text: str) -> bool:
    """Parse the flags; return False when help was asked for and printed."""
    if any(argument in ("--help", "-h", "-help") for argument in arguments):
        print(help_text)
        print(flag_help(values))
        return False
    apply(values, arguments)
    return True


def apply(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    try:
        rest = values(["btlm", *arguments])[1:]
    except (AttributeError, KeyError, IndexError) as error:  # how config_flags reports a --config.x.y it cannot set
        raise UsageError(f"unknown config key {one_line(error)}") from error
    except flags.Error as error:
        raise UsageError(one_line(error)) from error
    except (OSError, TypeError, ValueError, SyntaxError) as error:
        raise UsageError(f"--config cannot be loaded: {one_line(error)}") from error
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}; flags are --name=value")


def one_line(error: Exception) -> str:
    # config_flags raises KeyErrors and AttributeErrors whose message is the repr of another message.
    message = str(error).replace("\\n", "\n").replace("\\'", "'")
    while message[:1] == message[-1:] == "'":
        message = message[1:-1]
    return " ".join(message.replace("'\n", "': ").split())


def flag_help(values: flags.FlagValues) -> str:
    rows = [f"  --{name:<15} {values[name].help}" for name in values if name != "h" and "." not in name]
    return "flags:\n" + "\n".join(rows) + "\n"


def workdir_of(values: flags.FlagValues) -> Path:
    if not values["workdir"].value:
        raise UsageError("--workdir=DIR is needed: where checkpoints, metrics and plots go")
    return Path(values["workdir"].value)
