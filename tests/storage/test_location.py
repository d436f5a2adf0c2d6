"""Raw text behind URLs gives the documents of local files; what goes wrong on the way is said in one line."""

import hashlib
import sys
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from support import fake_gcs
from support.corpus_files import made_up_text, write_raw

from btlm_jax.cli import main
from btlm_jax.corpus.engine import inputs, tasks
from btlm_jax.corpus.engine.inputs import read_stage
from btlm_jax.storage.location import hash_range, list_files, parse_location, version_stamp


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A folder of raw files of three kinds, one large enough to be read in pieces."""
    monkeypatch.setattr(inputs, "PIECE_BYTES", 2_000)
    write_raw(tmp_path / "raw" / "a" / "one.jsonl.zst", [made_up_text(seed=seed) for seed in range(5)], source="A")
    write_raw(tmp_path / "raw" / "two.jsonl", [made_up_text(seed=seed) for seed in range(5, 16)], source="B")
    rows = [{"text": made_up_text(seed=seed), "source": "C"} for seed in range(16, 20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "raw" / "three.parquet")
    (tmp_path / "raw" / "picture.png").write_bytes(b"")
    return tmp_path


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def clean(place, output: Path) -> int:
    return main(["corpus", "clean", f"--input={place}", f"--output={output}", "--workers=1"])


def contents(directory: Path) -> dict:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_url_gives_the_bytes_of_the_local_folder(raw, memory, capsys):
    for name, data in files_of(raw / "raw").items():
        memory.pipe(f"/bucket/raw/{name}", data)
    assert clean(raw / "raw", raw / "local") == clean("memory://bucket/raw", raw / "remote") == 0
    assert contents(raw / "remote") == contents(raw / "local")
    assert len(read_stage(raw / "remote")["tasks"][0]) == 5  # one file is in three pieces
    assert clean("memory://bucket/raw/", raw / "remote") == 0 and "done already" in capsys.readouterr().out
    data = memory.cat("/bucket/raw/two.jsonl")
    memory.pipe("/bucket/raw/two.jsonl", data.replace(b"a", b"b", 1))
    assert clean("memory://bucket/raw", raw / "remote") == 1
    assert "two.jsonl changed after it was processed" in capsys.readouterr().err
    assert clean("memory://bucket/raw/two.jsonl", raw / "one") == 0
    assert clean("memory://bucket/nothing", raw / "none") == 1
    assert "memory://bucket/nothing" in capsys.readouterr().err


def test_evaluation_text_may_be_behind_a_url(raw, memory):
    memory.pipe("/held/test.txt", made_up_text(seed=3).encode())
    assert clean(raw / "raw", raw / "clean") == 0
    flags = ["--evaluation=memory://held", "--validation=0", "--test=0", "--workers=1"]
    assert main(["corpus", "split", f"--input={raw / 'clean'}", f"--output={raw / 'split'}", *flags]) == 0
    assert read_stage(raw / "split" / "work" / "assign")["totals"]["dropped"]["has evaluation text"] == 1


def test_a_transfer_that_ends_early_is_an_error_and_is_tidied_up(raw, memory, monkeypatch, capsys):
    memory.pipe("/bucket/a.jsonl", (raw / "raw" / "two.jsonl").read_bytes())
    monkeypatch.setattr(tasks, "version_stamp", lambda place: [0])
    real = list_files
    monkeypatch.setattr(inputs, "list_files", lambda root: [(name, at, size + 7) for name, at, size in real(root)])
    monkeypatch.setattr(inputs, "PIECE_BYTES", 1 << 30)
    assert clean("memory://bucket", raw / "out") == 1
    assert "a.jsonl ended 7 bytes before it should" in capsys.readouterr().err
    assert not list((raw / "out").glob(".*.tmp"))


def test_google_cloud_storage_on_loopback(raw, monkeypatch):
    objects = {f"raw/{name}": data for name, data in files_of(raw / "raw").items()}
    with fake_gcs.connected(objects, monkeypatch) as bucket:
        assert clean(raw / "raw", raw / "local") == clean(f"{bucket}/raw", raw / "remote") == 0
        assert contents(raw / "remote") == contents(raw / "local")
        url = f"{bucket}/raw/two.jsonl"
        before = version_stamp(url)
        objects["raw/two.jsonl"] = objects["raw/two.jsonl"].replace(b"a", b"b", 1)
        assert version_stamp(url) != before


def test_a_missing_library_is_named(raw, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert clean("s3://bucket/raw", raw / "out") == 1
    command = f"{sys.executable} -m pip install 'btlm_jax[s3]'"
    assert f"s3://bucket/raw needs a library that is not installed: {command}" in capsys.readouterr().err
    assert clean("nonsense://bucket/raw", raw / "out") == 1 and "nonsense" in capsys.readouterr().err


def test_locations_are_paths_or_urls(tmp_path):
    assert parse_location("a/b") == Path("a/b") and parse_location("gs://a/b") == "gs://a/b"
    (tmp_path / "a").write_bytes(b"0123456789")
    assert list_files(tmp_path) == list_files(tmp_path / "a") == [("a", tmp_path / "a", 10)]
    url = f"file://{tmp_path}"
    assert [name for name, _, _ in list_files(url)] == ["a"]
    for place in (tmp_path / "a", f"{url}/a"):
        assert hash_range(place, begin=3, num_bytes=4, copy_to=None) == hashlib.sha256(b"3456").hexdigest()
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        list_files(tmp_path / "b")
