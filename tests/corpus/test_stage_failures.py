"""What a stage leaves when it is interrupted, killed, out of disk, or when somebody deletes what it wrote."""

import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from support import tiny_tokenizers
from support.corpus_files import limited_open_files, made_up_text, write_raw
from support.slow_run import is_alive, start_slow_stage

from btlm_jax.cli import main
from btlm_jax.corpus.engine import inputs
from btlm_jax.corpus.engine.inputs import raw_inputs, read_stage
from btlm_jax.corpus.pack import write_shard
from btlm_jax.corpus.readers.records import Record, RecordWriter, read_records
from btlm_jax.data.store import TokenBlock
from btlm_jax.storage.files import AtomicFile

SECONDS = 100.0  # that workers may take to end on a busy machine; a task left alone takes 300


@pytest.mark.parametrize("num_workers", [1, 2])
def test_ctrl_c_ends_all_in_one_line_with_nothing_half_written(tmp_path, num_workers):
    process, pids = start_slow_stage(tmp_path, num_workers=num_workers)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and time.monotonic() - began < SECONDS
    assert errors == "btlm corpus: interrupted; the same command resumes where it can\n"
    assert not any(map(is_alive, pids))
    assert list(tmp_path.glob("*output*")) == list(tmp_path.glob(".*.tmp")) == list((tmp_path / "done").iterdir()) == []


def test_workers_end_with_a_parent_that_is_killed_and_the_next_start_tidies_up(tmp_path):
    process, pids = start_slow_stage(tmp_path, num_workers=2)
    process.kill()
    process.wait()
    deadline = time.monotonic() + SECONDS
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.communicate()
    assert len(list(tmp_path.glob(".output-*.tmp"))) == 2
    for path in tmp_path.glob("began-*"):
        path.unlink()
    process, _ = start_slow_stage(tmp_path, num_workers=1)
    assert len(list(tmp_path.glob(".output-*.tmp"))) == 1
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    """A memory map keeps its file open, and a corpus has more shards than a process may have open files (1,024)."""
    monkeypatch.setattr("btlm_jax.corpus.readers.records.SHARD_BYTES", 1)  # a document each
    texts = [made_up_text(seed=seed % 45) for seed in range(60)]
    for source in ("A", "B"):
        write_raw(tmp_path / "raw" / f"{source}.jsonl", texts[source == "B" :: 2], source=source)
    tiny_tokenizers.write_gpt2_files(tmp_path / "bpe")
    with limited_open_files(20):
        for verb, source, flags in (
            ("clean", "raw", []),
            ("dedup", "clean", []),
            ("split", "dedup", ["--validation=0.2", "--test=0.2"]),
            ("tokenize", "split", [f"--tokenizer={tmp_path / 'bpe'}"]),
        ):
            command = ["corpus", verb, f"--input={tmp_path / source}", f"--output={tmp_path / verb}", "--workers=1"]
            assert main([*command, *flags]) == 0
        shown = ["corpus", "show", f"--input={tmp_path / 'dedup'}", f"--documents={tmp_path / 'clean'}", "--clusters=9"]
        assert main(shown) == 0
    assert len(read_stage(tmp_path / "clean")["outputs"]) == 60
    written = read_stage(tmp_path / "split")["totals"]["written"]
    assert sum(count["documents"] for count in written.values()) == 45


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    with AtomicFile(tmp_path / "a") as first:
        first.write(b"x" * 100_000)
        with AtomicFile(tmp_path / "a") as second:
            second.write(b"y" * 10)
        assert (tmp_path / "a").read_bytes() == b"y" * 10
    assert (tmp_path / "a").read_bytes() == b"x" * 100_000 and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def small_disk():
    """Let no file grow over 20,000 bytes, which fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path, small_disk):
    noise = np.random.default_rng(0)
    text = noise.bytes(60_000).hex()
    with pytest.raises(OSError, match="too large"), AtomicFile(tmp_path / "a") as file:
        file.write(noise.bytes(20_005))  # the last bytes are in a buffer that closing cannot write
    with pytest.raises(OSError, match="too large"), RecordWriter(tmp_path / "b", frame_bytes=1 << 30) as writer:
        writer.add(Record(id="a", source="b", text=text, meta={}))
    blocks = [TokenBlock(tokens=noise.integers(0, 60_000, 6_001, np.uint16), num_targets=6_000)] * 9
    with pytest.raises(OSError, match="shard .*c cannot be written: .*too large"):
        write_shard(tmp_path / "c", blocks=blocks)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A folder of three raw files, each a task of its own, cleaned."""
    monkeypatch.setattr(inputs, "TASK_BYTES", 1)
    for number in range(3):
        texts = [made_up_text(seed=100 * number + index) for index in range(9)]
        write_raw(tmp_path / "raw" / f"part{number}.jsonl", texts, source="A")
    assert clean(tmp_path) == 0
    return tmp_path


def clean(folder: Path, name: str = "clean", *flags: str) -> int:
    return main(["corpus", "clean", f"--input={folder / 'raw'}", f"--output={folder / name}", "--workers=1", *flags])


def contents(directory: Path) -> dict:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_what_is_gone_or_cut_short_is_made_again_and_the_rest_is_not(raw):
    before = contents(raw / "clean")
    gone, cut, kept = sorted((raw / "clean").glob("documents-*"))
    times = kept.stat().st_mtime_ns
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    assert clean(raw) == 0
    assert contents(raw / "clean") == before and kept.stat().st_mtime_ns == times


def records_of(directory: Path) -> list[Record]:
    outputs = read_stage(directory)["outputs"]
    return [record for output in outputs for record in read_records(directory / output["file"])]


@pytest.mark.parametrize("piece_bytes", [100, 1_000, 1_933, 5_000])
def test_a_large_file_is_read_in_pieces_none_lost_none_doubled(raw, monkeypatch, piece_bytes):
    whole = records_of(raw / "clean")
    monkeypatch.setattr(inputs, "PIECE_BYTES", piece_bytes)
    found = raw_inputs(raw / "raw")
    assert len(found) > 3 and sum(item.num_bytes for item in found) == sum(
        path.stat().st_size for path in (raw / "raw").iterdir()
    )
    assert clean(raw, "pieces") == 0
    pieces = records_of(raw / "pieces")
    assert [(record.text, record.source) for record in pieces] == [(record.text, record.source) for record in whole]
    assert len({record.id for record in pieces}) == len(pieces)
    second = found[1]
    line = (raw / "raw" / "part0.jsonl").read_bytes()[second.begin :].split(b"\n")[0]
    named = {record.id: record.text for record in pieces}[f"part0.jsonl@{second.begin}:1"]
    assert named.replace("\n", "\\n").encode() in line
    assert clean(raw, "pieces") == 0
    path = raw / "raw" / "part2.jsonl"
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    assert clean(raw, "pieces") == 1


@pytest.mark.parametrize("bad", [b'truncated", "meta": {}}\n', b"<html><body>502</body></html>\n"])
def test_a_bad_line_where_a_piece_begins_costs_one_line(raw, monkeypatch, bad):
    path = raw / "raw" / "part0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    first = b"".join(lines[:4])
    path.write_bytes(first + bad + b"".join(lines[4:]))
    monkeypatch.setattr(inputs, "PIECE_BYTES", len(first))
    assert raw_inputs(raw / "raw")[1].name == f"part0.jsonl@{len(first)}"
    assert clean(raw, "pieces", "--max_bad_rate=0.1") == 0
    assert read_stage(raw / "pieces")["totals"]["bad"] == {"quarantined": 1}
    assert [record.text for record in records_of(raw / "pieces")] == [
        record.text for record in records_of(raw / "clean")
    ]


def test_only_plain_lines_are_read_in_pieces(raw, monkeypatch, capsys):
    monkeypatch.setattr(inputs, "PIECE_BYTES", 100)
    write_raw(raw / "raw" / "named_wrongly.zst", ["text " * 999], source="A")
    (raw / "raw" / "named_wrongly.zst").rename(raw / "raw" / "packed.jsonl")
    (raw / "raw" / "book.txt").write_text("text " * 999)
    (raw / "raw" / "picture.png").write_text("")
    names = [item.name for item in raw_inputs(raw / "raw")]
    assert names[0] == "book.txt" and names[1] == "packed.jsonl" and "packed.jsonl" not in names[2]
    assert "1 files of other kinds are not read, picture.png for one" in capsys.readouterr().err
