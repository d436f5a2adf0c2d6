"""Run a config file and change keys of what it gives; nothing here knows what the keys mean."""

from __future__ import annotations

import contextlib
import difflib
import runpy
import traceback
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from btlm_jax.cli import UsageError
from btlm_jax.cli.parse import finite_number, whole_number
from btlm_jax.storage.files import read_json_object


def load_config(file: Path, *, argument: str, changes: Mapping[str, str]) -> dict:
    """Return what the file's get_config gives, as plain dicts, with keys changed by texts.

    `argument` is handed to get_config unless it is empty; `changes` maps section.key to a text. A key that others of
    the file refer to (ml_collections' FieldReference) changes those too.

    Raises:
      UsageError: the file fails, names no config, or a change is refused.
      ValueError: a .json file is damaged.
    """
    values = {key: _value(key, text) for key, text in changes.items()}
    is_json = file.suffix == ".json"  # such as the config.json of a workdir
    stored = read_json_object(file) if is_json else {}
    with _naming(file):
        config = ConfigDict(stored if is_json else _run(file, argument))
    with config.ignore_type(), config.unlocked():
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            target = config.get(section) if section else config
            if not isinstance(target, ConfigDict):
                raise UsageError(f"config {file} has no section {section}")
            target[name] = value
    with _naming(file):
        return config.to_dict()


def _run(file: Path, argument: str) -> dict:
    """Return what a config file's get_config gives."""
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


def _value(key: str, text: str) -> object:
    """Return the value of a key of the config as its type reads it.

    Raises:
      UsageError: there is no such key, or the text is no value of its type.
    """
    hints = config_types()
    if key not in hints:
        raise UsageError(_unknown_key(key, hints))
    hint, name = hints[key], f"--config.{key}"
    if hint is int:
        return whole_number(name, text)
    if hint is float:
        return finite_number(name, text)
    if hint is str:
        return text
    assert hint == tuple[int, ...], f"{key} is of a type that is not read here"
    inner = text.strip()
    if (inner[:1], inner[-1:]) in (("(", ")"), ("[", "]")):
        inner = inner[1:-1]
    parts = [part.strip() for part in inner.split(",")]
    if parts[-1] == "":  # "(8,)"
        parts.pop()
    try:
        return tuple(whole_number(name, part) for part in parts)
    except UsageError:
        raise UsageError(f"{name}={text[:80]} must be whole numbers, for example {name}=2048,8192") from None


def config_types() -> dict[str, object]:
    """Return the type of every key, as section.key."""
    from btlm_jax.recipe.config import TrainConfig

    types: dict[str, object] = {}
    for section, hint in typing.get_type_hints(TrainConfig).items():
        if hasattr(hint, "__dataclass_fields__"):
            types |= {f"{section}.{name}": inner for name, inner in typing.get_type_hints(hint).items()}
        else:
            types[section] = hint
    return types


def _unknown_key(key: str, hints: Mapping[str, object]) -> str:
    sections = {name.rpartition(".")[0] for name in hints} - {""}
    if key in sections:
        names = ", ".join(name for name in hints if name.startswith(f"{key}."))
        return f"--config.{key} is a section; give one of its keys: {names}"
    if "[" in key and key.partition("[")[0] in hints:
        return f"--config.{key}: give the whole tuple, for example --config.{key.partition('[')[0]}=2048,8192"
    near = nearest_keys(key, list(hints))
    hint = f"did you mean {' or '.join(near)}?" if near else "btlm train --help=config lists all"
    return f"unknown config key {key}; {hint}"


def nearest_keys(given: str, keys: list[str]) -> list[str]:
    """Return the keys that were probably meant, at most three: spelled alike, abbreviated, or of another section."""
    section, _, name = given.rpartition(".")
    own = [key for key in keys if section and key.startswith(f"{section}.")]
    for candidates in (own, keys):
        names = {key: key.rpartition(".")[2] for key in candidates}
        alike = difflib.get_close_matches(name, list(names.values()), n=2, cutoff=0.75)
        for found in (
            [key for key in candidates if names[key] == name],
            [key for key in candidates if names[key] in alike],
            [key for key in candidates if _is_short_for(name, names[key])],
        ):
            if found:
                return found[:3]
    return difflib.get_close_matches(given, keys, n=1)


def _is_short_for(short: str, name: str) -> bool:
    """Return whether `short` is some words of a name, or the initials of some that end it: lr, layers."""
    words = name.split("_")
    initials = "".join(word[0] for word in words)
    return set(short.split("_")) <= set(words) or (len(short) > 1 and initials.endswith(short))
