"""What a task's scores depend on, as JSON that is the same in every process and at every start.

A task's configuration holds functions and classes: each stands for its name and the contents of its file, so that a
changed helper beside it counts too.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import inspect
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.task import Task

from btlm_jax.storage.files import hash_file

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def config_of(task: Task) -> dict[str, Any]:
    """Return a task's class and configuration, without the metadata that was handed to it."""
    config = task.config.to_dict(keep_callable=True)
    config.pop("metadata", None)
    return json.loads(_text({"class": type(task), **config}))


def digest_of(documents: Iterable[Any], *, limit: int) -> str:
    """Return a hash of documents; of the first `limit` of them, 0: all."""
    digest = hashlib.sha256()
    for document in itertools.islice(documents, limit or None):
        digest.update(_text(document).encode())
    return digest.hexdigest()[:16]


def _text(value: Any) -> str:
    return json.dumps(value, indent=1, default=_plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """Return what stands for a value that JSON has not: no address, and no order that differs by process."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(map(_text, value))
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, (bytes, datetime.date, datetime.time, datetime.timedelta, Path)):
        return str(value)
    if inspect.isclass(value):
        return [value.__qualname__, *map(_hash_of_file, value.__mro__)]
    if callable(value) and hasattr(value, "__qualname__"):
        return [value.__qualname__, _hash_of_file(inspect.unwrap(value))]
    return [_ADDRESS.sub("", str(value)), type(value)]


def _hash_of_file(code: Any) -> str:
    """Return the hash of the file of a function or class, "" if it has none."""
    try:
        file = inspect.getsourcefile(code)
    except TypeError:  # it is built in
        return ""
    return hash_file(Path(file)) if file and Path(file).is_file() else ""
