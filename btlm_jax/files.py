"""Write files so that a reader sees the old contents or the new, never a part."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write to a temporary name beside `path`, sync it to disk, and rename it over `path`."""
    data = contents.encode() if isinstance(contents, str) else contents
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
