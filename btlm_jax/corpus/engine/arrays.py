"""Arrays that a stage's tasks leave to the next: written whole or not at all, read where they lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from btlm_jax.corpus.readers.records import describe_output
from btlm_jax.storage.files import AtomicFile


def save_array(directory: Path, stem: str, array: np.ndarray) -> dict:
    """Write `stem.npy` and return what a manifest says of it."""
    with AtomicFile(directory / f"{stem}.npy") as file:
        np.lib.format.write_array(file, array, allow_pickle=False)
    return describe_output(file, num_documents=0)


def load_array(directory: Path, stem: str) -> np.ndarray:
    """Return an array that stays on disk until it is read."""
    return np.load(directory / f"{stem}.npy", mmap_mode="r")
