"""Files between stages: a shard that grows too large goes on in another, and nothing half-written is left."""

import pytest

from btlm_jax.corpus.readers import records
from btlm_jax.corpus.readers.records import Record, ShardWriter, read_records

RECORDS = [Record(id=str(number), source="A", text="x" * (50 * number), meta={"n": number}) for number in range(40)]


def test_a_shard_goes_on_in_another_file(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SHARD_BYTES", 9_000)
    with ShardWriter(tmp_path, stem="documents-00007") as writer:
        for record in RECORDS:
            writer.add(record)
    names = [output["file"] for output in writer.outputs]
    assert names == [f"documents-00007-{number:03d}.jsonl.zst" for number in range(len(names))] and len(names) >= 4
    found = [list(read_records(tmp_path / name)) for name in names]
    assert [record.text for part in found for record in part] == [record.text for record in RECORDS]
    assert [len(part) for part in found] == [output["num_documents"] for output in writer.outputs]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_no_document_makes_no_file(tmp_path):
    with ShardWriter(tmp_path, stem="documents") as writer:
        pass
    assert writer.outputs == [] and list(tmp_path.iterdir()) == []


def test_an_error_leaves_no_unfinished_file(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SHARD_BYTES", 9_000)
    with pytest.raises(KeyError), ShardWriter(tmp_path, stem="documents") as writer:
        for record in RECORDS[:30]:
            writer.add(record)
        raise KeyError
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [output["file"] for output in writer.outputs]  # whole ones, which the next try writes again
