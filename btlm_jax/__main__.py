"""`python -m btlm_jax <verb> ...` is the same as `btlm <verb> ...`."""

from __future__ import annotations

import os
import signal
import sys

from btlm_jax import interrupted_line


def run() -> None:
    """Run the command line; from here on Ctrl-C ends it in one line, and SIGTERM a training run."""
    for number in (signal.SIGINT, signal.SIGTERM) if _trains() else (signal.SIGINT,):
        signal.signal(number, _end)
    from btlm_jax.cli import entry

    entry()


def _end(signum, frame) -> None:
    """End at once: nothing has begun yet, and an import would turn an exception into another."""
    del signum, frame
    os.write(2, f"{interrupted_line(' '.join(sys.argv[1:2]))}\n".encode())
    os._exit(75 if _trains() else 130)  # cli.PREEMPTED, cli.INTERRUPTED


def _trains() -> bool:
    return sys.argv[1:2] == ["train"]


if __name__ == "__main__":
    run()
