"""Small raw corpora for the tests of the corpus stages."""

import contextlib
import json
import os
import random
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

import zstandard


def made_up_text(*, seed: int, num_words: int = 90) -> str:
    """Return lines of made-up words, the same for the same seed."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(num_words)]
    return "\n".join(" ".join(words[start : start + 9]) for start in range(0, num_words, 9))


def write_raw(path: Path, texts: Sequence[str], *, source: str) -> None:
    """Write texts in SlimPajama's form, compressed if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "meta": {"redpajama_set_name": source}} for text in texts]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(zstandard.compress(data) if path.suffix == ".zst" else data)


@contextlib.contextmanager
def limited_open_files(num_more: int) -> Iterator[None]:
    """Let this process open so many files more than it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + num_more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file by its name, but for what only restarts read."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.parent.name != "done"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
