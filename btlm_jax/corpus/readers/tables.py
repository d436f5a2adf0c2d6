"""Read rows of Parquet files, Arrow files (Hugging Face datasets on disk), and TFDS shards in ArrayRecord."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from btlm_jax.corpus.readers.frames import BadFileError

TFDS_SHARD = re.compile(r"(.*\.array_record)-\d{5}-of-(\d{5})")
_BATCH_ROWS = 256
_ARROW_FILE = b"ARROW1"
NOT_UTF8 = "bytes that are not UTF-8 became U+FFFD"


def parquet_rows(
    file: BinaryIO, *, columns: Sequence[str], needed: str, key_flag: str, left_out: set[str]
) -> Iterator[dict | ValueError]:
    """Yield the rows of a Parquet file with the values of some columns; a ValueError for a row that has bad values.

    a.b is the field b of the column a. Of these the file must have the column `needed`, named by the flag `key_flag`.
    No other column is read; their names are added to `left_out`.

    Raises:
      BadFileError: it is damaged, or lacks the column `needed`.
    """
    import pyarrow.parquet

    def batches(names: list[str]) -> Iterator:
        return reader.iter_batches(batch_size=_BATCH_ROWS, columns=names)

    with _named_errors("parquet", []):
        reader = pyarrow.parquet.ParquetFile(file)
        schema = reader.schema_arrow
        paths = _paths(schema, columns=columns, needed=needed, key_flag=key_flag)
        left_out.update(_left_out(schema, paths))
    yield from _rows(batches, paths, kind="parquet")


def arrow_rows(
    file: BinaryIO, *, columns: Sequence[str], needed: str, key_flag: str, left_out: set[str]
) -> Iterator[dict | ValueError]:
    """Yield the rows of an Arrow file or stream, which is what Hugging Face datasets keep on disk; as `parquet_rows`.

    Raises:
      BadFileError: it is damaged, or lacks the column `needed`.
    """
    import pyarrow.ipc

    is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
    file.seek(0)

    def batches(names: list[str]) -> Iterator:
        found = reader if not is_file else map(reader.get_batch, range(reader.num_record_batches))
        for batch in found:  # an Arrow file is read whole
            for name in names:
                _check_offsets(batch.column(batch.schema.get_field_index(name)))
            yield batch

    with _named_errors("Arrow", []):
        reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
        paths = _paths(reader.schema, columns=columns, needed=needed, key_flag=key_flag)
        left_out.update(_left_out(reader.schema, paths))
    yield from _rows(batches, paths, kind="Arrow")


def _check_offsets(column: Any) -> None:
    """Check where an Arrow file says that each value is: reading elsewhere would crash the process.

    Raises:
      pyarrow.ArrowException: it is damaged.
    """
    import pyarrow

    bytes_of = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    column.validate()
    if column.type in bytes_of:  # text that is not UTF-8 costs its row only
        column = column.view(bytes_of[column.type])
    column.validate(full=True)


def _paths(schema: Any, *, columns: Sequence[str], needed: str, key_flag: str) -> dict[str, list[str]]:
    """Return the path to each of the columns that the table has: its name, and inside structures the names of fields.

    Raises:
      BadFileError: it lacks the column `needed`, or has two of a name.
    """
    paths = {name: path for name in columns if (path := _path(schema, name))}
    if needed not in paths:
        raise BadFileError(
            f"it has no column {needed} but {', '.join(schema.names)}; {key_flag} names the column of the text"
        )
    for name, *_ in paths.values():
        if schema.names.count(name) > 1:
            raise BadFileError(f"it has {schema.names.count(name)} columns of the name {name}")
    return paths


def _left_out(schema: Any, paths: dict[str, list[str]]) -> set[str]:
    return set(schema.names) - {path[0] for path in paths.values()}


def _rows(
    read_batches: Callable[[list[str]], Iterator], paths: dict[str, list[str]], *, kind: str
) -> Iterator[dict | ValueError]:
    number = [0]
    with _named_errors(kind, number):
        for batch in read_batches(sorted({path[0] for path in paths.values()})):
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                values = [_values(batch.slice(start, _BATCH_ROWS), path) for path in paths.values()]
                for row in zip(*values, strict=True):
                    number[0] += 1
                    bad = [value for value in row if isinstance(value, ValueError)]
                    yield bad[0] if bad else dict(zip(paths, row, strict=True))


def _path(schema: Any, name: str) -> list[str]:
    if name in schema.names:
        return [name]
    first, *fields = name.split(".")
    if not fields or schema.names.count(first) != 1:
        return []
    kind = schema.field(first).type
    for field in fields:
        if not hasattr(kind, "get_field_index") or kind.get_field_index(field) < 0:
            return []
        kind = kind.field(field).type
    return [first, *fields]


def _values(batch: Any, path: list[str]) -> list:
    """Return a column's values; a ValueError for one that Python cannot hold, such as text that is not UTF-8."""
    import pyarrow.compute

    name, *fields = path
    column = batch.column(batch.schema.get_field_index(name))
    if fields:
        column = pyarrow.compute.struct_field(column, fields)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return [_value(cell, name=".".join(path)) for cell in column]


def _value(cell: Any, *, name: str) -> object:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return _not_utf8(name, error)
    except (ValueError, OverflowError) as error:
        return ValueError(f"{name} has a value that cannot be read: {error}")


def _not_utf8(name: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{name} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}")


@contextlib.contextmanager
def _named_errors(kind: str, number: list[int]) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        place = f" after row {number[0]:,}" if number else ""
        reason = str(error) or "it asks for more memory than there is"
        raise BadFileError(f"{kind} is damaged{place}: {reason}") from error


def tfds_rows(path: Path, *, columns: Sequence[str], repairs: Counter) -> Iterator[dict | ValueError]:
    """Yield the examples of one ArrayRecord shard of a TFDS dataset, whose features.json is in the same folder.

    A ValueError for one of which a value of `columns` (a.b: b inside a) is not UTF-8; `repairs` counts examples of
    which others are not, where what is not becomes U+FFFD.

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
                errors: dict[str, UnicodeDecodeError] = {}
                row = cast(dict, _to_json(features.deserialize_example_np(data), name="", errors=errors))
                bad = [_not_utf8(name, errors[name]) for name in columns if name in errors]
                repairs.update([NOT_UTF8] if errors and not bad else [])
                yield bad[0] if bad else row
        reader.close()
    except (RuntimeError, ValueError, KeyError) as error:
        raise BadFileError(f"it is damaged after example {number:,}: {error}") from error


def _to_json(value: object, *, name: str, errors: dict[str, UnicodeDecodeError]) -> object:
    """Convert NumPy values to the types of JSON; add to `errors`, by name, those of values that are not UTF-8."""
    if isinstance(value, dict):
        inside = f"{name}." if name else ""
        return {key: _to_json(item, name=inside + key, errors=errors) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _to_json(value.tolist(), name=name, errors=errors)
    if isinstance(value, list):
        return [_to_json(item, name=name, errors=errors) for item in value]
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        errors.setdefault(name, error)
        return value.decode("utf-8", "replace")
