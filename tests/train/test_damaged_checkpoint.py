"""What a checkpoint holds is compared with hashes of it; a damaged one is set aside, and the one before it is taken."""

import gc
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.tiny import tiny_config

from btlm_jax import notices
from btlm_jax.cli import errors
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.train import checkpoint
from btlm_jax.train.checkpoint import (
    Checkpointer,
    CheckpointReader,
    DamagedError,
    Position,
    facts_of,
    facts_on_device,
    facts_on_host,
    last_position,
    restore_last,
)
from btlm_jax.train.program import make_program

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "damaged_checkpoint.py"
CONFIG = tiny_config(model__num_layers=1, checkpoint__keep_last=9)
pytestmark = [  # orbax drops reads in flight after the first that fails; cli/__init__.py quiets the same
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def dropped_reads():
    """Have what orbax dropped collected while it is ignored."""
    yield
    gc.collect()


def digest_in_plain_integers(x: np.ndarray) -> tuple[int, int]:
    """The definition in facts_of, an element at a time."""

    def mix(value: int, shifts: tuple[int, int, int], factors: tuple[int, int]) -> int:
        for shift, factor in zip(shifts, (*factors, 1), strict=True):
            value = (value ^ (value >> shift)) * factor % 2**32
        return value

    murmur, low_bias = ((16, 13, 16), (0x85EBCA6B, 0xC2B2AE35)), ((16, 15, 16), (0x7FEB352D, 0x846CA68B))
    assert mix(1, *murmur) == 0x514E28B7  # published for MurmurHash3's finalizer
    size = x.dtype.itemsize
    words = [int.from_bytes(x.tobytes()[at : at + size], "little") for at in range(0, x.nbytes, size)]
    y = [word ^ mix(index, *murmur) for index, word in enumerate(words)]
    return sum(mix(value, *murmur) for value in y) % 2**32, sum(mix(value, *low_bias) for value in y) % 2**32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_the_hash_of_an_array_is_its_definition_on_the_host_and_on_every_mesh(dtype):
    x = (1000 * np.random.default_rng(0).normal(size=(16, 6, 8))).astype(dtype)
    expected = (*digest_in_plain_integers(x), True)
    assert facts_on_host(x) == expected
    for devices, tensor, spec in (
        (1, 1, P()),
        (2, 1, P(None, None, "fsdp")),
        (8, 2, P(("fsdp", "tensor"), None, None)),
    ):
        mesh = make_mesh(devices=jax.devices()[:devices], tensor=tensor)
        array = jax.device_put(x, NamedSharding(mesh, spec))
        assert tuple(map(int, facts_on_device(array))) == expected
        assert facts_of({"a": array})["a"].digest == f"{expected[0]:08x}{expected[1]:08x}"


def test_fewer_hashes_are_computed_at_a_time_than_xla_takes(monkeypatch):
    """Two processes of two CPU devices stood still at more (benchmarks/elastic.py, jaxlib 0.10.2)."""
    get, calls = jax.device_get, []
    monkeypatch.setattr(checkpoint, "_facts", lambda x: calls.append("h") or (x, x, True))
    monkeypatch.setattr(checkpoint.jax, "device_get", lambda tree: calls.append(" ") or get(tree))
    assert [facts.digest for facts in facts_of(list(range(70))).values()] == [f"{x:08x}" * 2 for x in range(70)]
    assert 1 < max(map(len, "".join(calls).split())) < 32


def test_every_flipped_bit_and_every_exchange_changes_the_hash_and_nan_is_seen():
    x = np.random.default_rng(1).normal(size=70_000).astype(np.float32)  # three blocks of the host's loop
    expected = facts_on_host(x)
    for index, bit in ((0, 0), (0, 31), (32_768, 31), (69_999, 22)):
        other = x.copy()
        other.view(np.uint32)[index] ^= np.uint32(1 << bit)
        assert facts_on_host(other)[:2] != expected[:2]
        other.view(np.uint32)[index + 1 if index < 69_999 else 0] ^= np.uint32(1 << bit)
        assert facts_on_host(other)[:2] != expected[:2]
    exchanged = x.copy()
    exchanged[[3, 40_000]] = x[[40_000, 3]]
    assert facts_on_host(exchanged)[:2] != expected[:2]
    for value in (np.nan, np.inf, -np.inf):
        x[69_999] = value
        assert facts_on_host(x)[2] is False and not facts_on_device(jnp.asarray(x))[2]


@pytest.fixture(scope="module")
def program():
    return make_program(CONFIG, make_mesh(devices=jax.devices()[:1], tensor=1))


def make_state(program, value: float):
    return jax.tree.map(
        lambda leaf: jax.device_put(np.full(leaf.shape, value, leaf.dtype), leaf.sharding), program.state
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory, program):
    """A workdir with checkpoints 3, 5 and 6, whose arrays are 3, 5 and 6 everywhere."""
    workdir = tmp_path_factory.mktemp("run")
    checkpointer = Checkpointer(workdir, config=CONFIG.checkpoint)
    for step in (3, 5, 6):
        position = Position(step=step, tokens_seen=384 * step, store_fingerprint="abc")
        checkpointer.save(make_state(program, step), position=position, config=CONFIG)
    checkpointer.wait()
    checkpointer.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    notices.begin(strict=())
    return tmp_path / "run"


def restored(workdir, program):
    """What a start finds: the step, the value of the arrays, and what is said of damages."""
    checkpointer = Checkpointer(workdir, config=CONFIG.checkpoint)
    try:
        events = last_position(checkpointer, CONFIG).events
        found = restore_last(checkpointer, CONFIG, abstract=program.state)
    finally:
        checkpointer.close()
    assert found.state is not None
    values = {float(np.unique(leaf).item()) for leaf in jax.tree.leaves(jax.device_get(found.state))}
    return found.position.step, values.pop(), events + found.events


def files_of(workdir: Path, step: int) -> dict[Path, bytes]:
    folder = workdir / "checkpoints" / str(step)
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def drop_state(folder: Path) -> None:
    shutil.rmtree(folder / "state")


def cut(folder: Path) -> None:
    for path in folder.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-20])


def other_position(folder: Path) -> None:
    path = folder / "position" / "metadata"
    path.write_text(path.read_text().replace("abc", "abd"))


def other_environment(folder: Path) -> None:
    path = folder / "environment" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"jax": "0.0"}))


def other_digest(folder: Path) -> None:
    path = folder / "digests" / "metadata"
    values = json.loads(path.read_text())
    values["arrays"]["step"] = "0" * 16
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("damage", [empty, drop_state, cut, other_position, other_environment, other_digest])
def test_a_damaged_checkpoint_is_set_aside_whole_and_the_one_before_it_is_taken(workdir, program, damage, capsys):
    damage(workdir / "checkpoints" / "6")
    damaged = files_of(workdir, 6)
    step, value, events = restored(workdir, program)
    assert (step, value) == (5, 5.0) and len(events) == 1
    aside = workdir / "damaged" / "checkpoints-6"
    assert f"checkpoint 6 is damaged and set aside as {aside}: " in events[0] and "going on from step 5" in events[0]
    assert events[0] in capsys.readouterr().err and notices.counts() == {"checkpoint-damaged": 1}
    assert {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()} == damaged
    assert not (workdir / "checkpoints" / "6").exists()
    assert restored(workdir, program) == (5, 5.0, [])


def test_several_are_set_aside_and_a_name_that_is_taken_is_left_alone(workdir, program):
    (workdir / "damaged" / "checkpoints-6").mkdir(parents=True)
    cut(workdir / "checkpoints" / "6")
    other_position(workdir / "checkpoints" / "5")
    step, value, events = restored(workdir, program)
    assert (step, value, len(events)) == (3, 3.0, 2)
    assert sorted(path.name for path in (workdir / "damaged").iterdir()) == [
        "checkpoints-5",
        "checkpoints-6",
        "checkpoints-6+",
    ]


def test_no_process_lists_the_checkpoints_while_another_sets_some_aside(workdir, program, monkeypatch):
    for step in (5, 6):
        cut(workdir / "checkpoints" / str(step))
    listed, reload = [], ocp.CheckpointManager.reload

    def note(manager):
        listed.append(sorted(path.name for path in (workdir / "checkpoints").iterdir()))
        reload(manager)

    monkeypatch.setattr(ocp.CheckpointManager, "reload", note)
    assert restored(workdir, program)[0] == 3
    assert listed == [["3"]]


def test_where_all_are_damaged_each_is_named_and_none_is_moved(workdir, program):
    for step in (3, 5, 6):
        drop_state(workdir / "checkpoints" / str(step))
    with pytest.raises(DamagedError, match=r"checkpoints can be used: 6: .*; 5: .*; 3: .*to start again") as raised:
        restored(workdir, program)
    assert errors.is_named(raised.value) and not (workdir / "damaged").exists()
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "5", "6"]


def test_values_that_are_not_finite_and_arrays_that_were_replaced_are_refused(workdir, program):
    state = make_state(program, 7)
    table = state.params["embedding"]["embedding"]
    values = np.array(table)
    values[3, 5] = np.inf
    state.params["embedding"]["embedding"] = jax.device_put(values, table.sharding)
    checkpointer = Checkpointer(workdir, config=CONFIG.checkpoint)
    position = Position(step=7, tokens_seen=384 * 7, store_fingerprint="abc")
    checkpointer.save(state, position=position, config=CONFIG)
    checkpointer.wait()
    with pytest.raises(DamagedError, match="7 cannot be used: params/embedding/embedding: not finite everywhere;"):
        checkpointer.restore_state(7, abstract=program.state)
    checkpointer.close()
    shutil.rmtree(workdir / "checkpoints" / "6" / "state")
    shutil.copytree(workdir / "checkpoints" / "5" / "state", workdir / "checkpoints" / "6" / "state")
    reader = CheckpointReader(workdir)  # as btlm generate and convert read it
    with pytest.raises(DamagedError, match="7 cannot be used: params/embedding/embedding: not finite everywhere; the"):
        reader.restore_params(7, abstract=program.state.params)
    with pytest.raises(DamagedError, match=r"and \d+ more arrays: not as it was written; the run also has .*/7$"):
        reader.restore_params(6, abstract=program.state.params)


def test_a_checkpoint_from_before_hashes_is_read_and_that_is_said(workdir, program):
    state = make_state(program, 7)
    tables = {"position": {"step": 7, "tokens_seen": 384 * 7, "store_fingerprint": "abc"}}
    tables |= {"config": json.loads(CONFIG.to_json()), "environment": {"jax": "0.9"}}
    arrays = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    names = ("state", "position", "config", "environment")
    with ocp.CheckpointManager(workdir / "checkpoints", item_names=names) as manager:  # as before 2026-11-29
        json_items = {name: ocp.args.JsonSave(table) for name, table in tables.items()}
        manager.save(7, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), **json_items))
    checkpointer = Checkpointer(workdir, config=CONFIG.checkpoint)
    restored = restore_last(checkpointer, CONFIG, abstract=program.state)
    checkpointer.close()
    assert restored.position == Position(step=7, tokens_seen=384 * 7, store_fingerprint="abc")
    assert restored.state is not None and not restored.events
    assert {float(np.unique(leaf).item()) for leaf in jax.tree.leaves(jax.device_get(restored.state.params))} == {7.0}
    assert int(restored.state.history.count) == 0 and not np.asarray(restored.state.history.values_SW).any()
    assert notices.counts() == {"checkpoint-without-hashes": 1}


@pytest.mark.slow
def test_flipped_bits_are_named_or_harmless(tmp_path):
    spec = importlib.util.spec_from_file_location("damaged_checkpoint", BENCHMARK)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    rows = benchmark.try_flips(tmp_path, flips=12, seed=2)
    assert all(not counts[benchmark.UNNOTICED] for counts in rows.values())
    assert rows["state/ocdbt.process_0/d/*"][benchmark.NAMED]  # the arrays' own bytes among them
    assert benchmark.table(rows).splitlines()[-1].split()[0] == "all"
