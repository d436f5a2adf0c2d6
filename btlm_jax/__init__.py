"""Train BTLM-3B-8K style language models in JAX. See docs/internals/map.md for the map of the files."""

import os
import signal
import sys

__version__ = "0.1.0"


def install_command(extra: str) -> str:
    """Return the command that adds what an extra of setup.cfg names to this installation, wherever that came from."""
    return f"{sys.executable} -m pip install 'btlm_jax[{extra}]'"


def module_command(module: str) -> list[str]:
    """Return the beginning of a command that runs a module of this package in another process of this Python.

    That finds this package wherever this process did, and nothing in the current directory: a file such as
    tokenizers.py there would be taken for the library (-P).
    """
    folders = [
        os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    return ["/usr/bin/env", f"PYTHONPATH={os.pathsep.join(folders)}", sys.executable, "-P", "-m", module]


def ending_of(returncode: int) -> str:
    """Return how a child process ended, of what `subprocess` calls its returncode."""
    if returncode >= 0:
        return f"exit code {returncode}"
    name = next((each.name for each in signal.Signals if each == -returncode), f"signal {-returncode}")
    return f"killed by {name}" + ", perhaps for its memory" * (name == "SIGKILL")


def interrupted_line(verb: str) -> str:
    """Return what a command says when Ctrl-C has ended it."""
    return f"btlm {verb}: interrupted; the same command resumes where it can"
