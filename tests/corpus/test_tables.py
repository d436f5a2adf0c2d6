"""Datasets of other libraries on disk: every row once, none of a file that is not part of the dataset."""

import json
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from support.corpus_files import made_up_text

from btlm_jax.cli import main
from btlm_jax.corpus.engine.inputs import read_stage
from btlm_jax.corpus.readers import raw
from btlm_jax.corpus.readers.raw import BadFileError, Keys, read_raw
from btlm_jax.corpus.readers.records import read_records

ROWS = [{"text": made_up_text(seed=seed), "source": "AB"[seed % 2], "stars": seed} for seed in range(30)]


def clean(folder) -> int:
    return main(["corpus", "clean", f"--input={folder / 'raw'}", f"--output={folder / 'clean'}", "--workers=1"])


def written(folder) -> list:
    outputs = read_stage(folder / "clean")["outputs"]
    return [record for output in outputs for record in read_records(folder / "clean" / output["file"])]


def write_arrow(path, rows, *, make=pyarrow.ipc.new_stream) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


@pytest.mark.parametrize("make", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_a_hugging_face_dataset_on_disk(tmp_path, capsys, make):
    parts = [f"data-{index:05d}-of-00002.arrow" for index in range(2)]
    train = tmp_path / "raw" / "train"
    for part, rows in zip(parts, (ROWS[:17], ROWS[17:]), strict=True):
        write_arrow(train / part, rows, make=make)
    write_arrow(train / "data-00000-of-00001.arrow", ROWS)  # of an earlier save
    write_arrow(tmp_path / "raw" / "cache-1234.arrow", ROWS)
    (train / "state.json").write_text(json.dumps({"_data_files": [{"filename": part} for part in parts]}))
    assert clean(tmp_path) == 0
    found = written(tmp_path)
    assert [(record.text, record.source) for record in found] == [(row["text"], row["source"]) for row in ROWS]
    assert found[17].id == "train/data-00001-of-00002.arrow:1" and "stars" not in found[17].meta
    said = capsys.readouterr().err
    assert "2 files of other kinds are not read" in said and "tables without their column stars: 2" in said
    (train / "state.json").rename(train / "kept.json")
    (train / "state.json").write_text("{}")
    assert clean(tmp_path) == 1 and "does not say which .arrow files" in capsys.readouterr().err
    (train / "kept.json").rename(train / "state.json")
    (train / parts[1]).unlink()
    assert clean(tmp_path) == 1 and "data-00001-of-00002.arrow, which is not there" in capsys.readouterr().err


def test_a_table_cut_short_is_bad(tmp_path):
    write_arrow(tmp_path / "a.arrow", ROWS)
    data = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadFileError, match="Arrow is damaged after row 7|Arrow is damaged after row 14"):
        list(read_raw(tmp_path / "a.arrow", name="a.arrow", default_source="x"))


FEATURES = tfds.features.FeaturesDict(
    {"text": tfds.features.Text(), "stars": tfds.features.Scalar(np.int64), "source": tfds.features.Text()}
)


@pytest.fixture
def tfds_folder(tmp_path):
    """A TFDS dataset of two shards, as its own tools describe it."""
    folder = tmp_path / "raw" / "ds" / "1.0.0"
    folder.mkdir(parents=True)
    for index, rows in enumerate((ROWS[:17], ROWS[17:])):
        writer = ArrayRecordWriter(str(folder / f"ds-train.array_record-{index:05d}-of-00002"), "group_size:1")
        for row in rows:
            writer.write(FEATURES.serialize_example(row))
        writer.close()
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name="ds", filetype_suffix="array_record")
    info = tfds.core.SplitInfo(name="train", shard_lengths=[17, 13], num_bytes=1, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder), features=FEATURES, split_infos=[info], version="1.0.0", filename_template=template,
        check_data=False,
    )  # fmt: skip
    return folder


def test_a_tfds_dataset_gives_what_tfds_reads(tfds_folder, tmp_path, capsys):
    assert clean(tmp_path) == 0
    found = written(tmp_path)
    theirs = tfds.builder_from_directory(str(tfds_folder)).as_data_source("train")
    assert [(record.text, record.source, record.meta["stars"]) for record in found] == [
        (row["text"].decode(), row["source"].decode(), int(row["stars"])) for row in theirs
    ]
    assert len(found) == 30
    shard = tfds_folder / "ds-train.array_record-00001-of-00002"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(BadFileError, match="damaged"):
        list(read_raw(shard, name=shard.name, default_source="x"))
    shard.unlink()
    assert clean(tmp_path) == 1 and "only 1 of 2 shards are there" in capsys.readouterr().err
    (tfds_folder / "features.json").unlink()
    with pytest.raises(BadFileError, match="no features.json"):
        list(
            read_raw(
                tfds_folder / "ds-train.array_record-00000-of-00002",
                name="ds-train.array_record-00000-of-00002",
                default_source="x",
            )
        )


def test_text_of_a_tfds_dataset_that_is_not_utf8_costs_its_row(tfds_folder, monkeypatch):
    name = "ds-train.array_record-00000-of-00002"
    writer = ArrayRecordWriter(str(tfds_folder / name), "group_size:1")
    for text, source in (("a", "S"), (b"caf\xe9", "S"), ("b", b"\xff"), ("long " * 9, "S"), ("c", "S")):
        writer.write(FEATURES.serialize_example({"text": text, "source": source, "stars": 1}))
    writer.close()
    monkeypatch.setattr(raw, "MAX_LINE_BYTES", 44)
    found = list(read_raw(tfds_folder / name, name=name, default_source="x"))
    assert [getattr(one, "reason", "") or one.text for one in found] == [
        "a", "text is not UTF-8: byte 0xe9 at 3", "source is not UTF-8: byte 0xff at 0",
        "its text is too long: 45 bytes, and 44 are the most", "c",
    ]  # fmt: skip
    repairs = Counter()
    keys = Keys(source="none")
    found = list(read_raw(tfds_folder / name, name=name, default_source="x", keys=keys, repairs=repairs))
    assert found[2].meta["source"] == "\ufffd" and repairs == {"bytes that are not UTF-8 became U+FFFD": 1}


T = [made_up_text(seed=seed) for seed in range(6)]
BAD_UTF8 = pyarrow.array([text.encode() for text in T[:5]] + [b"\xff\xfe bad"], pyarrow.binary()).view(pyarrow.string())
OTHERS = {
    "date past 9999": pyarrow.array([1] * 5 + [10**7], pyarrow.int32()).cast(pyarrow.date32()),
    "timestamp past 9999": pyarrow.array([1] * 5 + [2**62], pyarrow.timestamp("us")),
    "nanoseconds": pyarrow.array([1577836800000000001] * 6, pyarrow.timestamp("ns")),
    "duration": pyarrow.array([1] * 5 + [2**62], pyarrow.duration("us")),
    "zone": pyarrow.array([1] * 6, pyarrow.timestamp("us", tz="Mars/Base")),
    "not UTF-8": BAD_UTF8,
    "map": pyarrow.array([[("a", "b")]] * 6, pyarrow.map_(pyarrow.string(), pyarrow.string())),
}


def write_table(path, columns: dict, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=4)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_that_are_not_needed_cannot_harm(tmp_path, kind):
    names = pyarrow.array([{"redpajama_set_name": "Z", "when": None}] * 6)
    write_table(tmp_path / f"a.{kind}", {"text": T, **OTHERS, "meta": names, "id": list(range(6))}, kind)
    repairs = Counter()
    found = list(read_raw(tmp_path / f"a.{kind}", name=f"a.{kind}", default_source="x", repairs=repairs))
    assert [(record.text, record.source, record.id) for record in found] == [
        (text, "Z", str(number)) for number, text in enumerate(T)
    ]
    assert repairs == {f"tables without their column {name}": 1 for name in OTHERS}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_bad_text_costs_its_row_and_errors_name_file_and_column(tmp_path, kind, capsys):
    path = tmp_path / f"a.{kind}"
    write_table(path, {"text": BAD_UTF8, "source": OTHERS["date past 9999"]}, kind)
    found = list(read_raw(path, name=path.name, default_source="x", keys=Keys(source="none")))
    assert [record.text for record in found[:5]] == T[:5]
    assert (found[5].line, found[5].reason) == (6, "text is not UTF-8: byte 0xff at 0")
    found = list(read_raw(path, name=path.name, default_source="x"))
    assert "source has a value that cannot be read" in found[5].reason or "text is not UTF-8" in found[5].reason
    write_table(tmp_path / "raw" / path.name, {"content": pyarrow.array(T), "n": list(range(6))}, kind)
    assert clean(tmp_path) == 1
    said = capsys.readouterr().err
    assert f"{path.name} cannot be used: it has no column text but content, n; --text_key names" in said
    flags = [f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'other'}", "--text_key=content", "--workers=1"]
    assert main(["corpus", "clean", *flags]) == 0
    table = pyarrow.Table.from_arrays([pyarrow.array(T), pyarrow.array(["x"] * 6)], names=["text", "text"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(BadFileError, match="it has 2 columns of the name text"):
        list(read_raw(path, name="a.parquet", default_source="x"))
