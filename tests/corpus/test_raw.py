"""Reading raw files: every format gives the same documents, every defect is named, nothing is read silently short."""

import dataclasses
import gzip
import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from btlm_jax.corpus.readers import raw
from btlm_jax.corpus.readers.raw import BadFileError, Defect, Keys, read_objects, read_raw
from btlm_jax.corpus.readers.records import Record, RecordWriter, read_records, record_to_line

BODIES = [
    {"text": f"text {number} é \u2028 line\nbreak", "meta": {"redpajama_set_name": "RedPajamaC4", "n": number}}
    for number in range(400)
]
LINES = b"".join(json.dumps(body).encode() + b"\n" for body in BODIES)


def read(path, name: str = "") -> list:
    return list(read_raw(path, name=name or path.name, default_source="mine"))


def write(folder, name: str, data: bytes):
    path = folder / name
    path.write_bytes(data)
    return path


def expected(name: str) -> list[Record]:
    return [
        Record(id=f"{name}:{number + 1}", source="RedPajamaC4", text=body["text"], meta=body["meta"])
        for number, body in enumerate(BODIES)
    ]


def frames(data: bytes, count: int, compress) -> bytes:
    size = len(data) // count + 1
    return b"".join(compress(data[start : start + size]) for start in range(0, len(data), size))


ZSTD = zstandard.ZstdCompressor(write_checksum=True).compress


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.jsonl", LINES),
        ("no_newline.jsonl", LINES[:-1]),
        ("marked.jsonl", b"\xef\xbb\xbf" + LINES),
        ("marked.data", b"\xef\xbb\xbf" + LINES),
        ("windows.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("a.jsonl.zst", ZSTD(LINES)),
        ("many.jsonl.zst", frames(LINES, 7, ZSTD)),
        ("skippable.jsonl.zst", b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + ZSTD(LINES)),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("many.jsonl.gz", frames(LINES, 5, gzip.compress) + bytes(512)),
        ("named_wrongly.jsonl", gzip.compress(LINES)),
    ],
)
def test_every_format_gives_the_same_documents(tmp_path, name, data):
    assert read(write(tmp_path, name, data)) == expected(name)


def test_parquet_and_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(BODIES), tmp_path / "a.parquet")
    texts_and_sources = [dataclasses.replace(record, meta={}) for record in expected("a.parquet")]
    assert read(tmp_path / "a.parquet") == texts_and_sources  # no other columns are read
    path = write(tmp_path, "book.txt", "\ufeffOnce\r\nupon é".encode())
    assert read(path, "x/book.txt") == [Record(id="x/book.txt", source="mine", text="Once\r\nupon é", meta={})]
    (defect,) = read(write(tmp_path, "latin.txt", b"caf\xe9"))
    assert defect.reason == "not UTF-8: byte 0xe9 at 3"


@pytest.mark.parametrize("name, data", [("a.jsonl.zst", frames(LINES, 4, ZSTD)), ("a.jsonl.gz", gzip.compress(LINES))])
@pytest.mark.parametrize("cut", [1, 5, 700])
def test_a_file_cut_short_gives_its_beginning_and_then_an_error(tmp_path, name, data, cut):
    found = []
    with pytest.raises(BadFileError, match="cut short; fetch it again"):
        for record in read_raw(write(tmp_path, name, data[:-cut]), name=name, default_source="mine"):
            found.append(record)
    assert found == expected(name)[: len(found)]
    if name.endswith("zst"):
        assert len(found) >= 200  # three whole frames of four come through


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path):
    data = bytearray(ZSTD(LINES))
    data[len(data) // 2] ^= 4
    with pytest.raises(BadFileError, match="damaged"):
        read(write(tmp_path, "a.jsonl.zst", bytes(data)))


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("a.jsonl.zst", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
        ("a.jsonl", b"\n<!DOCTYPE HTML><html><body>404</body></html>", "web page"),
        ("a.jsonl.gz", b"<HTML>", "web page"),
        ("a.txt", b"\xef\xbb\xbf<!doctype html>", "web page"),
        ("a.jsonl.zst", LINES, r"ends in .zst, but its contents are not that"),
        ("a.jsonl.zst", b"", r"ends in .zst, but it is empty"),
        ("a.parquet", b"PAR1 and no more", "parquet is damaged"),
    ],
)
def test_what_is_no_data_is_recognised(tmp_path, name, data, said):
    with pytest.raises(BadFileError, match=said):
        read(write(tmp_path, name, data))


BAD_LINES = [
    (b'{"text": "cut', "not JSON"),
    (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at 13"),
    (b'{"text": null}', "text is null"),
    (b'{"text": 3, "meta": {}}', "text is int"),
    (b'{"meta": {}}', "there is no text"),
    (b'["text"]', "not an object but list"),
    (b"[" * 100_000, "not JSON"),
    (b'{"text": "x", "deep": ' + b"[" * 985 + b"]" * 985 + b"}", "its values are nested more than 200 deep"),
]


def test_a_bad_line_costs_one_line_and_is_named(tmp_path):
    good = [record_to_line(record) for record in expected("x")]
    data, places = b"", []
    for index, (bad, _) in enumerate(BAD_LINES):
        data += good[index] + b"\n"  # an empty line is nothing, not a defect
        places.append((3 * index + 3, len(data)))
        data += bad + b"\n"
    found = read(write(tmp_path, "bad.jsonl", data + good[99]))
    records = [record for record in found if isinstance(record, Record)]
    assert records == [*expected("x")[: len(BAD_LINES)], expected("x")[99]]
    defects = [defect for defect in found if isinstance(defect, Defect)]
    assert [(defect.line, defect.offset) for defect in defects] == places
    for defect, (bad, reason) in zip(defects, BAD_LINES, strict=True):
        assert defect.file == "bad.jsonl" and defect.reason.startswith(reason)
        assert data[defect.offset :].startswith(bad) and defect.head == bad[:200].decode("utf-8", "replace")


BEGINNINGS = [b'cut", "meta": {}}', b"<html>502</html>", b"PAR1", b"version https://git-lfs", b"\x1f\x8b", ZSTD(b"x")]


@pytest.mark.parametrize("bad", BEGINNINGS)
def test_a_bad_line_at_the_beginning_of_a_piece_costs_one_line(tmp_path, bad):
    path = write(tmp_path, "copy", bad + b"\n" + LINES)
    name = "a.jsonl@128000000"
    defect, *records = read_raw(path, name=name, default_source="mine", is_piece=True)
    assert (defect.line, defect.offset) == (1, 0) and defect.reason.startswith(("not JSON", "not UTF-8"))
    assert [(record.text, record.id) for record in records] == [
        (body["text"], f"{name}:{number}") for number, body in enumerate(BODIES, start=2)
    ]
    first, *objects = read_objects(path, name=name, is_piece=True, repairs=Counter())
    assert first == defect and [line.value for line in objects] == BODIES


@pytest.mark.parametrize("chunk", [16, 1 << 18])  # the line ends in a later chunk, or in the one that it begins in
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_a_line_that_is_too_long_costs_one_line(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(raw, "MAX_LINE_BYTES", 1_000)
    monkeypatch.setattr(raw, "CHUNK", chunk)
    good = LINES.split(b"\n")[:3]
    fits, long = (json.dumps({"text": "y" * size}).encode() for size in (1_000 - 13, 1_000 - 12 + 700))
    assert len(fits) == 999 and len(long) == 1_700
    data = b"\n".join([good[0], long, fits, good[1], good[2], long])
    found = read(write(tmp_path, name, ZSTD(data) if name.endswith("zst") else data))
    assert [record.text for record in found if isinstance(record, Record)] == [
        BODIES[0]["text"], "y" * 987, BODIES[1]["text"], BODIES[2]["text"]
    ]  # fmt: skip
    reason, head = "it is too long: 1,700 bytes, and 1,000 are the most", long[:200].decode()
    assert [defect for defect in found if isinstance(defect, Defect)] == [
        Defect(file=name, line=line, offset=offset, reason=reason, head=head)
        for line, offset in ((2, len(good[0]) + 1), (6, len(data) - 1_700))
    ]
    assert len([line for line in read_objects(tmp_path / name, name=name, is_piece=False, repairs=Counter())]) == 6


def test_strange_but_readable_lines_are_kept(tmp_path):
    lines = [
        rb'{"text": "half \ud809 pair \ud83d\ude00", "meta": {"\udc00": ["\ud800"]}}',
        b'{"text": "nul \\u0000 in it", "meta": null, "url": "u", "id": 7, "source": "books"}',
        b'{"text": "", "meta": "a string", "big": 123456789012345678901234567890}',
    ]
    path = write(tmp_path, "strange.jsonl", b"\n".join(lines))
    half, nul, empty = read(path)
    assert half.text == "half \ufffd pair \U0001f600" and half.meta == {"\ufffd": ["\ufffd"]}
    assert (nul.text, nul.id, nul.source, nul.meta) == ("nul \0 in it", "7", "books", {"url": "u"})
    assert (empty.text, empty.source, empty.meta["meta"]) == ("", "mine", "a string")
    with RecordWriter(tmp_path / "again.jsonl.zst", frame_bytes=5_000) as writer:
        for record in (half, nul):
            writer.add(record)
    again = read(tmp_path / "again.jsonl.zst")
    assert again == list(read_records(tmp_path / "again.jsonl.zst"))
    assert [(record.id, record.text) for record in again] == [(half.id, half.text), (nul.id, nul.text)]


def test_a_document_of_100_megabytes(tmp_path):
    text = "0123456789" * 10_000_000
    path = write(tmp_path, "large.jsonl", json.dumps({"text": text}).encode() + b"\n" + LINES)
    first, *rest = read(path)
    assert first.text == text and len(rest) == len(BODIES)


def test_our_files_have_frames_and_checksums_and_a_cut_one_is_refused(tmp_path):
    records = expected("x")
    with RecordWriter(tmp_path / "a.jsonl.zst", frame_bytes=5_000) as writer:
        for record in records:
            writer.add(record)
    data = (tmp_path / "a.jsonl.zst").read_bytes()
    assert data.count(b"\x28\xb5\x2f\xfd") > 5 and zstandard.get_frame_parameters(data).has_checksum
    found = list(read_records(tmp_path / "a.jsonl.zst"))
    assert [(record.id, record.text) for record in found] == [(record.id, record.text) for record in records]
    (tmp_path / "a.jsonl.zst").write_bytes(data[:-3])
    with pytest.raises(ValueError, match="is damaged"):
        list(read_records(tmp_path / "a.jsonl.zst"))
    with pytest.raises(KeyError), RecordWriter(tmp_path / "b.jsonl.zst", frame_bytes=5_000) as writer:
        writer.add(records[0])
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl.zst"]


def test_values_that_cannot_be_kept_are_changed_the_same_way_everywhere_and_counted(tmp_path):
    """What is written is read again by every later stage, whatever stood beside what."""
    lines = [
        b'{"text": "a", "n": 123456789012345678901234567890, "score": NaN}',
        b'{"text": "b", "n": -9223372036854775809, "deep": {"x": [18446744073709551616, -Infinity]}}',
        b'{"text": "c \\ud800", "n": 18446744073709551615, "id": 99999999999999999999}',
        b'{"text": "20 digits: 12345678901234567890", "n": -9223372036854775808, "x": 1.5e300}',
        b'{"text": "d", "x": Infinity}',
        b'{"text": "e", "n": 18446744073709551616}',
        b'{"text": "f", "id": [1], "source": 3, "n": 4, "same": 5, "meta": {"n": 6, "same": 5}}',
        b'{"text": "g", "id": null, "source": null, "meta": {"redpajama_set_name": "S"}}',
    ]
    path = write(tmp_path, "a.jsonl", b"\n".join(lines))
    repairs = Counter()
    records = list(read_raw(path, name="a.jsonl", default_source="mine", repairs=repairs))
    assert [record.meta for record in records] == [
        {"n": "123456789012345678901234567890", "score": None},
        {"n": "-9223372036854775809", "deep": {"x": ["18446744073709551616", None]}},
        {"n": 18446744073709551615},
        {"n": -9223372036854775808, "x": 1.5e300},
        {"x": None},
        {"n": "18446744073709551616"},
        {"n": 6, "same": 5},
        {"redpajama_set_name": "S"},
    ]
    assert [(record.id, record.source) for record in records[6:]] == [("a.jsonl:7", "mine"), ("a.jsonl:8", "S")]
    assert records[2].text == "c \ufffd" and records[2].id == "99999999999999999999"
    assert records[3].text == "20 digits: 12345678901234567890"
    assert repairs == {
        "NaN and infinities became null": 3,
        "integers over 64 bits became text": 4,
        "lone surrogates became U+FFFD": 1,
        raw.UNUSABLE_IDS: 1,
        raw.UNUSABLE_SOURCES: 1,
        raw.SAME_KEYS: 1,
    }
    for _ in range(2):  # stage after stage
        with RecordWriter(tmp_path / "out.jsonl.zst", frame_bytes=1000) as writer:
            for record in records:
                writer.add(record)
        again = list(read_records(tmp_path / "out.jsonl.zst"))
        assert [record.text for record in again] == [record.text for record in records]
        assert [record.meta["n"] for record in again[:4]] == [record.meta["n"] for record in records[:4]]
        records = again


def test_keys_can_be_named(tmp_path):
    body = {
        "content": "words",
        "text": 5,
        "info": {"name": "n1", "from": {"site": "S"}},
        "a.b": "dotted",
        "source": "T",
    }
    path = write(tmp_path, "a.jsonl", json.dumps(body).encode())

    def read_with(**keys) -> list:
        return list(read_raw(path, name="a.jsonl", default_source="mine", keys=Keys(**keys)))

    (record,) = read_with(text="content", id="info.name", source="info.from.site")
    assert (record.text, record.id, record.source) == ("words", "n1", "S")
    (record,) = read_with(text="a.b", source="nothing")
    assert (record.text, record.id, record.source) == ("dotted", "a.jsonl:1", "mine")
    assert read_with()[0].reason == "text is int"
    path.write_text('{"data": {"content": "words", "n": 1}, "meta": {"site": "S", "raw": "more"}}')
    assert read_with(text="data.content")[0].meta == {"data": {"n": 1}, "site": "S", "raw": "more"}
    assert read_with(text="meta.raw")[0].meta == {"data": {"content": "words", "n": 1}, "site": "S"}
    path.write_text('{"content": "words"}')
    assert read_with()[0].reason == "there is no text; --text_key names another key, such as content"
