import os
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.loader import BLOCK_LEN, CURRICULUM, HELDOUT_TOKENS, TRAIN_TOKENS, make_loader, make_mesh, write_tiny_store

from btlm_jax.data import store
from btlm_jax.data.loader import TrainLoader, document_starts, make_placement, needed_rows
from btlm_jax.data.reader import TokenStore, open_store
from btlm_jax.recipe.curriculum import make_curriculum
from btlm_jax.train.finish import heldout_batches


@pytest.fixture(scope="module")
def token_store(tmp_path_factory) -> TokenStore:
    directory = tmp_path_factory.mktemp("store")
    write_tiny_store(directory)
    return open_store(directory, expected_fingerprint="")


def flat_batches(loader: TrainLoader, *, first_step: int) -> dict[int, dict[str, np.ndarray]]:
    """Return step -> batch with the two row axes merged to one of B."""
    return {
        step: {name: np.asarray(leaf).reshape(-1, leaf.shape[-1]) for name, leaf in batch.items()}
        for step, batch in loader.batches(first_step=first_step)
    }


def assert_batches_equal(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for step in left:
        for name in ("inputs_BT", "targets_BT", "weights_BT"):
            np.testing.assert_array_equal(left[step][name], right[step][name])


def assert_no_read_threads() -> None:
    deadline = time.monotonic() + 60
    while any(thread.name.startswith("grain-prefetch") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "read-ahead threads are still alive"
        time.sleep(0.01)


def test_a_run_over_the_whole_store_trains_every_token_once(token_store):
    batches = flat_batches(make_loader(token_store), first_step=0)
    assert list(batches) == list(range(7))
    targets, weight_sum = [], 0
    for step, batch in batches.items():
        phase = CURRICULUM.phase_at(step)
        is_real = batch["weights_BT"] == 1
        assert batch["inputs_BT"].shape == (phase.batch_size, phase.seq_len)
        np.testing.assert_array_equal(batch["inputs_BT"][is_real], batch["targets_BT"][is_real] - 1)
        assert not batch["weights_BT"][~is_real].any()
        targets += batch["targets_BT"][is_real].tolist()
        weight_sum += batch["weights_BT"].sum()
    assert sorted(targets) == list(range(1, TRAIN_TOKENS + 1))
    assert weight_sum == token_store.manifest.splits[store.TRAIN].num_tokens


def test_leaves_have_the_declared_shape_dtype_and_sharding(token_store):
    loader = make_loader(token_store, accumulation=2, fsdp=2, tensor=2)
    _, batch = next(loader.batches(first_step=0))
    assert {name: (leaf.shape, str(leaf.dtype)) for name, leaf in batch.items()} == {
        "inputs_BT": ((2, 8, 4), "int32"),
        "targets_BT": ((2, 8, 4), "int32"),
        "weights_BT": ((2, 8, 4), "float32"),
    }
    for leaf in batch.values():
        assert leaf.sharding.spec == P(None, "fsdp")
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(2, 4, 4)}


@pytest.mark.parametrize(
    "accumulation, fsdp, tensor", [(1, 4, 1), (1, 2, 2), (2, 2, 1), (4, 1, 1), (2, 2, 4), (4, 1, 8), (1, 4, 2)]
)
def test_mesh_and_accumulation_do_not_change_a_batch(token_store, accumulation, fsdp, tensor):
    expected = flat_batches(make_loader(token_store), first_step=0)
    loader = make_loader(token_store, accumulation=accumulation, fsdp=fsdp, tensor=tensor)
    assert_batches_equal(flat_batches(loader, first_step=0), expected)


def test_documents_begin_with_their_eos(capsys):
    inputs_BT = np.asarray([[5, 0, 6, 7, 0, 0, 8, 0], [0, 5, 0, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 5, 6, 7]])
    # The second row has 2 targets: what is behind the EOS that ends its document is padding, one document with it.
    num_targets_B = np.asarray([8, 2, 8])
    starts_BT = document_starts(inputs_BT, num_targets_B, eos_id=0, most=9)
    assert starts_BT.dtype == np.int32
    assert starts_BT.tolist() == [[0, 1, 1, 1, 4, 5, 5, 7], [0, 0, 2, 2, 2, 2, 2, 2], [0] * 8]
    assert capsys.readouterr().err == ""
    joined_BT = document_starts(inputs_BT, num_targets_B, eos_id=0, most=3)
    assert joined_BT.tolist() == [[0, 1, 1, 1, 4, 4, 4, 4], *starts_BT[1:].tolist()]
    assert "window of 8 tokens has more than the 3 documents that attention keeps apart" in capsys.readouterr().err


def test_a_batch_has_documents_where_they_are_asked_for(token_store, monkeypatch):
    """The tiny store's ids count up, so that the id 60 opens one document: in block 3, at its position 12."""
    split = token_store.split
    monkeypatch.setattr(TokenStore, "split", lambda self, name: with_eos(split(name), 60))
    batches = flat_batches(make_loader(token_store, most_documents=9), first_step=0)
    for step, batch in batches.items():
        opens = batch["inputs_BT"] == 60
        length = CURRICULUM.phase_at(step).seq_len
        expected = np.where(opens.any(1), opens.argmax(1), 0)[:, None] * (np.arange(length) >= opens.argmax(1)[:, None])
        np.testing.assert_array_equal(batch["starts_BT"], expected)
    assert sum((batch["inputs_BT"] == 60).sum() for batch in batches.values()) == 1
    sharding = NamedSharding(make_mesh(1, 1), P("fsdp"))
    (_, batch), *_ = heldout_batches(
        token_store, batch_size=8, blocks_per_source=9, prefetch=1, sharding=sharding, most_documents=9
    )
    assert batch["starts_BT"].shape == batch["inputs_BT"].shape


def with_eos(reader, eos_id: int):
    reader.eos_id = eos_id
    return reader


@pytest.mark.parametrize("first_step", [1, 3, 4, 6, 7])
def test_starting_at_a_step_equals_having_run_to_it(token_store, first_step):
    expected = flat_batches(make_loader(token_store), first_step=0)
    resumed = flat_batches(make_loader(token_store, prefetch=1), first_step=first_step)
    assert_batches_equal(resumed, {step: batch for step, batch in expected.items() if step >= first_step})


def test_a_longer_last_phase_keeps_the_batches_and_goes_on_in_the_next_epoch(token_store):
    longer = make_curriculum(seq_len=(4, 16), batch_size=(16, 4), num_tokens=(4 * 64, 10 * 64))
    before = flat_batches(make_loader(token_store), first_step=0)
    after = flat_batches(make_loader(token_store, curriculum=longer, max_epochs=2), first_step=0)
    assert_batches_equal({step: after[step] for step in range(7)}, before)
    second_epoch = np.concatenate([after[step]["targets_BT"][after[step]["weights_BT"] == 1] for step in range(7, 14)])
    assert sorted(second_epoch.tolist()) == list(range(1, TRAIN_TOKENS + 1))


def test_a_run_longer_than_the_store_is_refused(token_store):
    longer = make_curriculum(seq_len=(4, 16), batch_size=(16, 4), num_tokens=(4 * 64, 4 * 64))
    with pytest.raises(ValueError, match="wants 512 tokens.*= 448"):
        make_loader(token_store, curriculum=longer)


def test_a_mesh_that_does_not_divide_the_batch_is_refused(token_store):
    with pytest.raises(ValueError, match="divi"):
        make_loader(token_store, fsdp=8)


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
@pytest.mark.parametrize("fsdp, tensor", [(8, 1), (4, 2), (2, 4)])
def test_each_host_needs_each_of_its_rows_once_and_together_all(num_hosts, fsdp, tensor):
    rows_shape = (3, 8)
    indices = NamedSharding(make_mesh(fsdp, tensor), P(None, "fsdp")).devices_indices_map((*rows_shape, 5))
    devices = jax.devices()
    share = len(devices) // num_hosts
    rows_of_hosts = [
        needed_rows([indices[device] for device in devices[start : start + share]], rows_shape=rows_shape)
        for start in range(0, len(devices), share)
    ]
    assert np.union1d(rows_of_hosts[0], np.concatenate(rows_of_hosts)).tolist() == list(range(24))
    for rows in rows_of_hosts:
        assert len(np.unique(rows)) == len(rows) == 24 // min(num_hosts, fsdp)


def test_placement_reads_only_what_its_devices_need():
    placement = make_placement(NamedSharding(make_mesh(2, 4), P(None, "fsdp")), rows_shape=(2, 6), seq_len=5)
    np.testing.assert_array_equal(placement.row_numbers, np.arange(12))
    rows = {"x": np.arange(12 * 5).reshape(12, 5)}
    np.testing.assert_array_equal(np.asarray(placement.place(rows)["x"]).reshape(12, 5), rows["x"])


def test_closing_dropping_and_finishing_stop_the_threads(token_store):
    for stop in (lambda batches: batches.close(), lambda batches: None, list):
        batches = make_loader(token_store).batches(first_step=0)
        next(batches)
        assert any(thread.name.startswith("grain-prefetch") for thread in threading.enumerate())
        stop(batches)
        del batches
        assert_no_read_threads()


def test_a_corrupt_shard_stops_the_consumer_with_its_name(tmp_path):
    write_tiny_store(tmp_path)
    token_store = open_store(tmp_path, expected_fingerprint="")
    name = store.shard_name(split=store.TRAIN, index=2, num_shards=5)
    (tmp_path / name).write_bytes(b"\0" * (tmp_path / name).stat().st_size)
    with pytest.raises(ValueError, match=f"block 1[2-7] in shard .*{name}"):
        list(make_loader(token_store).batches(first_step=0))
    assert_no_read_threads()


@pytest.mark.parametrize("batch_size, fsdp", [(4, 2), (3, 1), (16, 4), (7, 1)])
def test_heldout_batches_give_every_block_once_with_its_source(token_store, batch_size, fsdp):
    sharding = NamedSharding(make_mesh(fsdp, 1), P("fsdp"))
    weights = dict.fromkeys(HELDOUT_TOKENS, 0)
    blocks = dict.fromkeys(HELDOUT_TOKENS, 0)
    targets = []
    for sources, batch in heldout_batches(
        token_store, batch_size=batch_size, blocks_per_source=7, prefetch=2, sharding=sharding
    ):
        assert len(sources) == batch_size
        assert all(leaf.shape == (batch_size, BLOCK_LEN) and leaf.sharding == sharding for leaf in batch.values())
        for source, targets_T, weights_T in zip(
            sources, np.asarray(batch["targets_BT"]), np.asarray(batch["weights_BT"]), strict=True
        ):
            if not source:
                assert not weights_T.any()
                continue
            blocks[source] += 1
            weights[source] += int(weights_T.sum())
            targets += targets_T[weights_T == 1].tolist()
    assert blocks == {"b": 4, "a": 2, "c": 1}
    assert weights == HELDOUT_TOKENS
    assert sorted(targets) == [*range(10_001, 10_051), *range(20_001, 20_032), *range(30_001, 30_017)]


def test_heldout_takes_the_first_blocks_of_each_source(token_store):
    sharding = NamedSharding(make_mesh(1, 1), P("fsdp"))
    [(sources, batch)] = heldout_batches(token_store, batch_size=6, blocks_per_source=2, prefetch=1, sharding=sharding)
    assert sources == ["b", "b", "a", "a", "c", ""]
    assert np.asarray(batch["inputs_BT"])[:, 0].tolist() == [10_000, 10_016, 20_000, 20_016, 30_000, 0]
    assert np.asarray(batch["weights_BT"]).sum(axis=1).tolist() == [16, 16, 16, 15, 16, 0]


PROCESS = """
import sys
import jax
import numpy as np
address, process, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, num_processes=2, process_id=process)
from pathlib import Path
from support.loader import make_loader
from btlm_jax.data.reader import open_store
token_store = open_store(Path(directory), expected_fingerprint="")
loader = make_loader(token_store, accumulation=2, fsdp=2, tensor=2)
reads = []
read_many = loader._reader.read_many
loader._reader.read_many = lambda blocks: reads.extend(blocks) or read_many(blocks)
shards = {}
for step, batch in loader.batches(first_step=1):
    for name, leaf in batch.items():
        for shard in leaf.addressable_shards:
            start = shard.index[1].start or 0
            shards[f"{step}/{name}/{start}/{shard.device.id}"] = np.asarray(shard.data)
np.savez(Path(directory) / f"process-{process}.npz", num_reads=len(reads), **shards)
"""


@pytest.mark.slow
def test_two_processes_read_their_halves_of_the_same_batches(tmp_path):
    write_tiny_store(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(process), str(tmp_path)],
            env=environment | {"PYTHONPATH": ":".join(sys.path)},
        )
        for process in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    token_store = open_store(tmp_path, expected_fingerprint="")
    expected = {step: batch for step, batch in make_loader(token_store, accumulation=2).batches(first_step=1)}
    for process in range(2):
        with np.load(tmp_path / f"process-{process}.npz") as shards:
            assert shards["num_reads"] == (3 * 16 + 3 * 4) // 2
            names = [name for name in shards.files if name != "num_reads"]
            assert len(names) == 6 * 3 * 2
            for key in names:
                step, name, start, _ = key.split("/")
                whole = np.asarray(expected[int(step)][name])
                half = whole.shape[1] // 2
                assert int(start) == process * half
                np.testing.assert_array_equal(shards[key], whole[:, process * half : (process + 1) * half])
