"""Train BTLM-3B-8K style language models in JAX. See docs/internals/map.md for the map of the files."""

import sys

__version__ = "0.1.0"


def install_command(extra: str) -> str:
    """Return the command that adds what an extra of setup.cfg names to this installation, wherever that came from."""
    return f"{sys.executable} -m pip install 'btlm_jax[{extra}]'"
