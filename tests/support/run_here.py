"""The command in this process, on one device as in a process of its own that has one; nothing is imported again."""

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock

import jax

from btlm_jax.cli import main


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Let the first device be the only one of all that ask JAX by its public names."""
    with contextlib.ExitStack() as stack:
        for name in ("devices", "local_devices"):
            given = getattr(jax, name)
            stack.enter_context(mock.patch.object(jax, name, lambda *a, f=given, **options: f(*a, **options)[:1]))
        for name in ("device_count", "local_device_count"):
            stack.enter_context(mock.patch.object(jax, name, lambda *a, **options: 1))
        yield


def run_here(*arguments) -> int:
    """Run `btlm ARGUMENTS` on one device; return its exit code. pytest's capsys has what it says."""
    words = [str(argument) for argument in arguments]
    with one_device(), mock.patch.object(sys, "argv", ["btlm", *words]):  # config_flags looks there for changes
        return main(words)
