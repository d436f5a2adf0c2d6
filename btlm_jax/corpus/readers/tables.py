"""Rows of other libraries' files: parquet, Arrow (Hugging Face datasets on disk), TFDS shards in ArrayRecord."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from btlm_jax.corpus.readers.frames import BadFile

TFDS_SHARD = re.compile(r"(.*\.array_record)-\d{5}-of-(\d{5})")
_BATCH_ROWS = 256
_ARROW_FILE = b"ARROW1"
_NEEDED = "needs pyarrow: pip install 'btlm_jax[corpus]'"


def parquet_rows(file: BinaryIO) -> Iterator[dict]:
    """Yield the rows of a parquet file.

    Raises:
      BadFile: it is damaged, or pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise BadFile(f"parquet {_NEEDED}") from error
    yield from _counted(lambda: pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS), kind="parquet")


def arrow_rows(file: BinaryIO) -> Iterator[dict]:
    """Yield the rows of an Arrow file or stream, which is what Hugging Face datasets keep on disk.

    Raises:
      BadFile: it is damaged, or pyarrow is not installed.
    """
    try:
        import pyarrow.ipc
    except ImportError as error:
        raise BadFile(f"Arrow {_NEEDED}") from error
    is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
    file.seek(0)

    def batches():
        if not is_file:
            yield from pyarrow.ipc.open_stream(file)
            return
        reader = pyarrow.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)

    yield from _counted(batches, kind="Arrow")


def _counted(batches, *, kind: str) -> Iterator[dict]:
    import pyarrow

    number = 0
    try:
        for batch in batches():
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                    number += 1
                    yield row
    except (pyarrow.ArrowException, OSError) as error:
        raise BadFile(f"{kind} is damaged after row {number:,}: {error}") from error


def tfds_rows(path: Path) -> Iterator[dict]:
    """Yield the examples of one ArrayRecord shard of a TFDS dataset, whose features.json lies beside it.

    Raises:
      BadFile: it is damaged, or no dataset's.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    if not (path.parent / "features.json").is_file():
        raise BadFile("no features.json lies beside it; TFDS datasets are read from local folders")
    number = 0
    try:
        features = tfds.features.FeaturesDict.from_config(str(path.parent))
        reader = ArrayRecordReader(str(path))
        for start in range(0, reader.num_records(), _BATCH_ROWS):
            for data in reader.read(start, min(start + _BATCH_ROWS, reader.num_records())):
                number += 1
                yield _plain(features.deserialize_example_np(data))
        reader.close()
    except (RuntimeError, ValueError, KeyError) as error:
        raise BadFile(f"it is damaged after example {number:,}: {error}") from error


def _plain(value: object) -> object:
    """Return NumPy values as JSON's."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
