"""Where config files and launch scripts are, and which file a --config means."""

from __future__ import annotations

import difflib
from pathlib import Path

import btlm_jax
from btlm_jax.cli import UsageError


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
    close = difflib.get_close_matches(given.removeprefix("configs/").removesuffix(".py"), names, n=1)
    hint = f"; did you mean --config={close[0]}?" if close else ""
    raise UsageError(f"--config={given} is neither a file nor one of {', '.join(names)} (btlm configs){hint}")
