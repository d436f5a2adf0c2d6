"""Read rows of Parquet files, Arrow files (Hugging Face datasets on disk), and TFDS shards in ArrayRecord."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from btlm_jax import install_command
from btlm_jax.corpus.readers.frames import BadFileError

TFDS_SHARD = re.compile(r"(.*\.array_record)-\d{5}-of-(\d{5})")
_BATCH_ROWS = 256
_ARROW_FILE = b"ARROW1"
_NEEDED = f"needs pyarrow: {install_command('corpus')}"


def parquet_rows(file: BinaryIO) -> Iterator[dict]:
    """Yield the rows of a Parquet file.

    Raises:
      BadFileError: it is damaged, or pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise BadFileError(f"parquet {_NEEDED}") from error
    yield from _rows(lambda: pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS), kind="parquet")


def arrow_rows(file: BinaryIO) -> Iterator[dict]:
    """Yield the rows of an Arrow file or stream, which is what Hugging Face datasets keep on disk.

    Raises:
      BadFileError: it is damaged, or pyarrow is not installed.
    """
    try:
        import pyarrow.ipc
    except ImportError as error:
        raise BadFileError(f"Arrow {_NEEDED}") from error
    is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
    file.seek(0)

    def batches():
        if not is_file:
            yield from pyarrow.ipc.open_stream(file)
            return
        reader = pyarrow.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)

    yield from _rows(batches, kind="Arrow")


def _rows(read_batches: Callable[[], Iterator], *, kind: str) -> Iterator[dict]:
    import pyarrow

    number = 0
    try:
        for batch in read_batches():
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                    number += 1
                    yield row
    except (pyarrow.ArrowException, OSError) as error:
        raise BadFileError(f"{kind} is damaged after row {number:,}: {error}") from error


def tfds_rows(path: Path) -> Iterator[dict]:
    """Yield the examples of one ArrayRecord shard of a TFDS dataset, whose features.json is in the same folder.

    Raises:
      BadFileError: it is damaged, or has no features.json beside it.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    if not (path.parent / "features.json").is_file():
        raise BadFileError("no features.json lies beside it; TFDS datasets are read from local folders")
    number = 0
    try:
        features = cast(tfds.features.FeaturesDict, tfds.features.FeaturesDict.from_config(str(path.parent)))
        reader = ArrayRecordReader(str(path))
        for start in range(0, reader.num_records(), _BATCH_ROWS):
            for data in reader.read(start, min(start + _BATCH_ROWS, reader.num_records())):
                number += 1
                yield cast(dict, _to_json(features.deserialize_example_np(data)))
        reader.close()
    except (RuntimeError, ValueError, KeyError) as error:
        raise BadFileError(f"it is damaged after example {number:,}: {error}") from error


def _to_json(value: object) -> object:
    """Convert NumPy values to the types of JSON."""
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _to_json(value.tolist())
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
