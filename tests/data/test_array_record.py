"""ArrayRecord read by ranges agrees with the library that wrote it, and notices every damaged byte."""

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from btlm_jax.data import array_record
from btlm_jax.data.array_record import chunk_offsets, footer_offset, likely_tail_bytes, parse_record
from btlm_jax.data.highwayhash import highway_hash_64

# What every riegeli file begins with, by its specification: a block header and the chunk "file signature".
SIGNATURE = bytes.fromhex(
    "83af70d10d884a3f0000000000000000400000000000000091bac23c9287e1a9"
    "0000000000000000e19f13c0e9b1c3727300000000000000" + "00" * 8
)


def write(path, records, options):
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return path.read_bytes()


def read(data, *, num_records):
    begin = footer_offset(data[-likely_tail_bytes(num_records) :], file_bytes=len(data))
    begins = chunk_offsets(data[begin:], begin=begin).tolist()
    return [parse_record(data[first:last], begin=first) for first, last in zip(begins[:-1], begins[1:], strict=True)]


def test_the_hash_is_that_of_the_specification():
    hashes = [highway_hash_64(part, key=array_record._HASH_KEY) for part in (SIGNATURE[8:24], SIGNATURE[32:], b"")]
    found = [value.to_bytes(8, "little") for value in hashes]
    assert found == [SIGNATURE[:8], SIGNATURE[24:32], SIGNATURE[40:48]]


@pytest.mark.parametrize(
    "options",
    ["group_size:1", "group_size:1,uncompressed", "group_size:1,zstd:1", "group_size:1,pad_to_block_boundary:true"],
)
@pytest.mark.parametrize("num_records", [1, 2, 700])
def test_records_are_those_that_were_written(tmp_path, options, num_records):
    rng = np.random.default_rng(num_records)
    records = [rng.integers(0, 60, rng.integers(1, 900)).astype(np.uint16).tobytes() for _ in range(num_records)]
    records[0] = rng.bytes(200_000)  # over three block headers
    data = write(tmp_path / "file", records, options)
    assert read(data, num_records=num_records) == records


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 140), min_size=1, max_size=5), st.integers(0, 255))
def test_records_of_every_length(tmp_path_factory, lengths, byte):
    records = [bytes([byte, index]) * length + b"x" * (length % 3) for index, length in enumerate(lengths)]
    data = write(tmp_path_factory.mktemp("records") / "file", records, "group_size:1,uncompressed")
    assert read(data, num_records=len(records)) == records


def test_block_headers_anywhere_in_a_chunk_are_left_out(tmp_path):
    """Chunks begin at every place around the end of a block, so that headers fall into chunk headers, too."""
    for size in range(65_536 - 64 - 40 - 90, 65_536 - 64 - 40):
        records = [b"a" * size, b"b" * 50, b"c" * 50]
        assert read(write(tmp_path / "file", records, "group_size:1,uncompressed"), num_records=3) == records


@pytest.mark.parametrize("options", ["group_size:1", "group_size:1,uncompressed"])
def test_every_damaged_byte_of_a_chunk_is_noticed(tmp_path, options):
    record = np.random.default_rng(5).integers(0, 9, 40).astype(np.uint16).tobytes()
    data = write(tmp_path / "file", [record], options)
    begin = footer_offset(data, file_bytes=len(data))
    first, last = chunk_offsets(data[begin:], begin=begin).tolist()
    for place in range(first, last):
        damaged = bytearray(data[first:last])
        damaged[place - first] ^= 1
        with pytest.raises(ValueError, match=f"at byte {first}"):
            parse_record(bytes(damaged), begin=first)
    for place in range(begin, begin + 60):
        damaged = bytearray(data[begin:])
        damaged[place - begin] ^= 1
        with pytest.raises(ValueError, match=f"at byte {begin}"):
            chunk_offsets(bytes(damaged), begin=begin)
    with pytest.raises(ValueError, match="cut short"):
        parse_record(data[first : first + 30], begin=first)


@pytest.mark.parametrize(
    "options, said",
    [
        ("group_size:2", "not one a chunk"),
        ("group_size:1,snappy", "compressed by 's'"),
        ("group_size:1,transpose", "of type 116"),
    ],
)
def test_what_is_written_otherwise_is_refused(tmp_path, options, said):
    data = write(tmp_path / "file", [b"ab" * 90, b"c" * 90], options)
    with pytest.raises(ValueError, match=said):
        read(data, num_records=2)


def test_other_files_are_refused():
    for data in (b"", b"nothing", bytes(1 << 17), bytes((1 << 17) + 1)):
        with pytest.raises(ValueError, match="ArrayRecord file|have its hash"):
            footer_offset(data, file_bytes=len(data))


def test_the_tail_that_is_asked_for_holds_the_footer(tmp_path):
    data = write(tmp_path / "file", [b"%d" % number * 40 for number in range(3000)], "group_size:1,uncompressed")
    assert len(data) - footer_offset(data, file_bytes=len(data)) <= likely_tail_bytes(3000)
