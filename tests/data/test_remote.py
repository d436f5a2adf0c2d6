"""A token store behind a URL gives what it gives on a disk; what is missing or damaged there is named."""

import dataclasses
from unittest import mock

import fsspec
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import fake_gcs
from support.loader import make_loader, make_mesh
from support.real_store import build_real_store, write_config
from support.run_command import ONE_PHASE, train_arguments
from support.run_here import run_here
from support.tiny import tiny_config
from support.tiny_store import write_store
from support.web import serve_folder

from btlm_jax.cli import main
from btlm_jax.data import remote, store
from btlm_jax.data.reader import open_store
from btlm_jax.data.verify import verify
from btlm_jax.hub.native import read_run, store_of_run
from btlm_jax.storage import location
from btlm_jax.train import METRICS_FILE
from btlm_jax.train.finish import heldout_batches
from btlm_jax.train.metric_writer import read_metrics
from btlm_jax.train.setup import prepare_store

SHARD = "tokens-train.array_record-00001-of-00004"


@pytest.fixture
def directory(tmp_path):
    write_store(
        tmp_path / "store",
        block_len=16,
        train_tokens=27 * 16 + 5,
        heldout_tokens={"b": 40, "a": 31},
        blocks_per_shard=7,
    )
    return tmp_path / "store"


@pytest.fixture
def memory(directory, monkeypatch):
    """The store in fsspec's memory, by name of the file; failures are not waited for."""
    monkeypatch.setattr(location, "_RETRY_SECONDS", (0.0, 0.001))
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in directory.iterdir():
        system.pipe(f"/bucket/store/{path.name}", path.read_bytes())
    yield system
    system.store.clear()


@pytest.mark.slow
def test_batches_from_google_cloud_storage_are_those_of_the_disk(directory, monkeypatch):
    objects = {f"a/store/{path.name}": path.read_bytes() for path in directory.iterdir()}
    objects["a/store/folder/other"] = b""
    with fake_gcs.connected(objects, monkeypatch) as bucket:
        local = open_store(directory, expected_fingerprint="")
        far = open_store(f"{bucket}/a/store/", expected_fingerprint=local.manifest.fingerprint)
        assert far.manifest == local.manifest
        steps = 0
        for (step, expected), (found_step, found) in zip(
            make_loader(local).batches(first_step=0), make_loader(far).batches(first_step=0), strict=True
        ):
            assert step == found_step
            steps += 1
            for name, leaf in expected.items():
                np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(leaf))
        assert steps > 3
        assert verify(f"{bucket}/a/store", log=print) == local.manifest


@pytest.mark.slow
def test_a_run_reads_its_store_from_google_cloud_storage(tmp_path, monkeypatch, capsys):
    manifest = build_real_store(tmp_path / "store")
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    objects = {str(path.relative_to(tmp_path)): path.read_bytes() for path in files}
    with fake_gcs.connected(objects, monkeypatch) as bucket:
        config = write_config(tmp_path / "config.py", store=f"{bucket}/store", log__sample_prompt="eta", **ONE_PHASE)
        assert run_here(*train_arguments(config, tmp_path / "run")) == 0
        losses = [row["loss"] for row in read_metrics(tmp_path / "run" / METRICS_FILE) if row["kind"] == "train"]
        assert len(losses) == 3 and losses[-1] < losses[0]
        assert read_run(tmp_path / "run").tokenizer.vocab_size == manifest.tokenizer.vocab_size
        assert store_of_run(tmp_path / "run").location == f"{bucket}/store"
        assert main(["corpus", "stats", f"--input={bucket}/store", f"--plots={tmp_path / 'plots'}"]) == 0
        assert f"{manifest.splits['train'].num_tokens:,}" in capsys.readouterr().out
        assert main(["corpus", "verify", f"--store={bucket}/store"]) == 0
        assert manifest.fingerprint in capsys.readouterr().out
        del objects["store/manifest.json"]
        config = tiny_config(data__store=f"{bucket}/store")
        with pytest.raises(FileNotFoundError, match=f"{bucket}/store is not a token store: it has no manifest.json"):
            prepare_store(
                config,
                workdir=tmp_path / "other",
                expected_fingerprint="",
                build_store=mock.Mock(side_effect=AssertionError),
                wait_for_all=mock.Mock(),
            )
        assert not (tmp_path / "other").exists()  # nothing is made in place of a URL


def test_heldout_batches_are_those_of_the_disk(directory, memory):
    sharding = NamedSharding(make_mesh(1, 1), PartitionSpec("fsdp"))
    options = dict(batch_size=4, blocks_per_source=9, prefetch=2, sharding=sharding)
    stores = [open_store(place, expected_fingerprint="") for place in (directory, "memory://bucket/store")]
    near, far = ([(sources, jax_arrays(batch)) for sources, batch in heldout_batches(s, **options)] for s in stores)
    assert str(near) == str(far)


def jax_arrays(batch):
    return {name: np.asarray(leaf).tolist() for name, leaf in batch.items()}


def test_a_store_behind_a_web_server_is_checked(directory):
    with serve_folder(directory.parent) as url:
        assert open_store(f"{url}/store", expected_fingerprint="").manifest == store.read_manifest(directory)
        whole = (directory / SHARD).read_bytes()
        (directory / SHARD).write_bytes(whole[:-1])
        said = rf"^shard {url}/store/{SHARD} is {len(whole) - 1:,} bytes, its manifest says {len(whole):,}: truncated"
        with pytest.raises(ValueError, match=said):
            open_store(f"{url}/store", expected_fingerprint="")


def test_little_more_is_read_than_the_blocks_that_are_wanted(tmp_path, memory, monkeypatch):
    write_store(
        tmp_path / "big", block_len=2000, train_tokens=400 * 2000, heldout_tokens={"a": 9}, blocks_per_shard=400
    )
    for path in (tmp_path / "big").iterdir():
        memory.pipe(f"/bucket/big/{path.name}", path.read_bytes())
    reader = open_store("memory://bucket/big", expected_fingerprint="").split(store.TRAIN)
    asked = []
    read = location.RangeReader.read
    monkeypatch.setattr(location.RangeReader, "read", lambda self, parts: asked.extend(parts) or read(self, parts))
    for blocks in ([3, 391], [17], [5]):
        assert [block.tokens[0] for block in reader.read_many(blocks)] == [2000 * number % 65536 for number in blocks]
    assert [part.end - part.begin > 5000 for part in asked] == [True, False, False, False, False]
    size = memory.size("/bucket/big/tokens-train.array_record-00000-of-00001")
    assert sum(part.end - part.begin for part in asked) < size / 5


def test_a_footer_longer_than_expected_is_read_all_the_same(directory, memory, monkeypatch):
    monkeypatch.setattr(remote, "likely_tail_bytes", lambda num_records: 1 << 16)
    reader = open_store("memory://bucket/store", expected_fingerprint="").split(store.TRAIN)
    assert [reader.read(number).tokens[0] for number in (0, 9, 23)] == [0, 9 * 16, 23 * 16]


def test_missing_and_truncated_objects_are_named_at_the_start(directory, memory):
    data = memory.cat(f"/bucket/store/{SHARD}")
    memory.pipe(f"/bucket/store/{SHARD}", data[:-1])
    with pytest.raises(ValueError, match=f"memory://bucket/store/{SHARD} is .* bytes, its manifest says"):
        open_store("memory://bucket/store", expected_fingerprint="")
    memory.rm(f"/bucket/store/{SHARD}")
    with pytest.raises(FileNotFoundError, match=f"memory://bucket/store lacks shard {SHARD}"):
        open_store("memory://bucket/store", expected_fingerprint="")
    with pytest.raises(FileNotFoundError, match="memory://bucket/none is not a token store"):
        open_store("memory://bucket/none", expected_fingerprint="")


def test_what_goes_wrong_while_reading_is_named(directory, memory):
    reader = open_store("memory://bucket/store", expected_fingerprint="").split(store.TRAIN)
    data = memory.cat(f"/bucket/store/{SHARD}")
    damaged = bytearray(data)
    damaged[data.find(np.arange(9 * 16, 9 * 16 + 8, dtype=np.uint16).tobytes()) + 3] ^= 0x10
    memory.pipe(f"/bucket/store/{SHARD}", bytes(damaged))
    assert reader.read(8).tokens[0] == 8 * 16
    with pytest.raises(ValueError, match=f"block 9 in shard memory://bucket/store/{SHARD} is unreadable.*its hash"):
        reader.read_many([8, 9, 10])
    memory.pipe(f"/bucket/store/{SHARD}", data[:100])
    with pytest.raises(OSError, match=f"memory://bucket/store/{SHARD} cannot be read after 3 attempts: .* came 0"):
        reader.read(9 + 3)
    memory.rm(f"/bucket/store/{SHARD}")
    with pytest.raises(FileNotFoundError, match=f"memory://bucket/store/{SHARD} is not there any more"):
        reader.read_many([0, 9])


def test_a_damaged_end_of_a_shard_is_named(directory, memory):
    data = bytearray(memory.cat(f"/bucket/store/{SHARD}"))
    data[-65_536 + 70] ^= 1
    memory.pipe(f"/bucket/store/{SHARD}", bytes(data))
    reader = open_store("memory://bucket/store", expected_fingerprint="").split(store.TRAIN)
    assert reader.read(0).tokens[0] == 0
    with pytest.raises(ValueError, match=f"shard memory://bucket/store/{SHARD} is unreadable: its chunk"):
        reader.read_many([0, 9])


def test_a_shard_of_another_store_is_named(directory, memory):
    other = "tokens-heldout.array_record-00000-of-00001"
    manifest = store.read_manifest(directory)
    data, split = memory.cat(f"/bucket/store/{other}"), manifest.splits[store.TRAIN]
    memory.pipe(f"/bucket/store/{SHARD}", data)
    shards = tuple(
        dataclasses.replace(shard, num_bytes=len(data)) if shard.file == SHARD else shard for shard in split.shards
    )
    changed = dataclasses.replace(split, shards=shards)
    reader = remote.RemoteRecords("memory://bucket/store", changed.shards)
    with pytest.raises(ValueError, match=f"{SHARD} is unreadable: it has 5 records, the manifest says 7"):
        reader.read([9])


def test_verify_names_every_damaged_object_and_leaves_nothing(directory, memory, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    last = "tokens-heldout.array_record-00000-of-00001"
    for name in (SHARD, last):
        data = memory.cat(f"/bucket/store/{name}")
        memory.pipe(f"/bucket/store/{name}", data[:-1] + b"x")
    with pytest.raises(ValueError, match=f"memory://bucket/store is damaged: the contents of {last}, {SHARD} do not"):
        verify("memory://bucket/store", log=print)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_verify_says_how_far_it_is_and_what_room_it_needs(directory, memory, monkeypatch):
    lines = []
    monkeypatch.setattr("btlm_jax.data.verify.INTERVAL", 0.0)
    verify("memory://bucket/store", log=lines.append)
    assert len(lines) == 5 and all("GB, " in line and "MB/s, " in line for line in lines)
    assert lines[-1].endswith(" 0 s left")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="has 1,000 bytes free, shard memory://bucket/store/.*TMPDIR"):
        verify("memory://bucket/store", log=print)


def test_what_fails_for_a_while_is_read_again(directory, memory, monkeypatch, capsys):
    reader = open_store("memory://bucket/store", expected_fingerprint="").split(store.TRAIN)
    real, answers = type(memory).cat_ranges, []

    def unsteady(self, paths, starts, ends, **options):
        found = real(self, paths, starts, ends, **options)
        answers.append(len(paths))
        if len(answers) == 1:
            raise ConnectionResetError("gone")
        return [ConnectionError("busy") if len(answers) == 2 and index else data for index, data in enumerate(found)]

    monkeypatch.setattr(type(memory), "cat_ranges", unsteady)
    found = reader.read_many([0, 9, 23])
    assert [block.tokens[0] for block in found] == [0, 9 * 16, 23 * 16]
    assert answers == [3, 3, 2, 3]  # the ends of three shards, twice; of two; then the blocks
    said = capsys.readouterr().err
    assert "memory://bucket/store/tokens-train" in said and "gone" in said and "(read-again)" in said


def test_a_url_of_no_known_kind_is_said(tmp_path, capsys):
    assert main(["corpus", "verify", "--store=nonsense://bucket/store"]) == 1
    assert "nonsense" in capsys.readouterr().err
