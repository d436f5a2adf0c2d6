"""A run goes on with other numbers of devices: same order, same tokens in each step, to the token.

The loop, the loader, the store, the meshes and the checkpoints are real; the step is one whose state is exact integers
in which each token of each step counts, so that the mesh cannot change its bits. benchmarks/elastic.py does it with
the real step in real processes.
"""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from support.tiny import tiny_config

from btlm_jax.data.reader import open_store
from btlm_jax.data.store import TRAIN
from btlm_jax.parallel.make_mesh import make_run_mesh
from btlm_jax.parallel.mesh import FSDP
from btlm_jax.train import loop
from btlm_jax.train.checkpoint import Checkpointer, last_position, restore_last
from btlm_jax.train.metric_writer import GoodputLedger
from btlm_jax.train.setup import Beginning
from btlm_jax.train.step import TrainState, new_state

PRIME = 4093
CHANGES = {"curriculum__num_tokens": (9 * 384, 7 * 384), "checkpoint__every_steps": 4, "model__vocab_size": 400}


def digest(tokens_BT) -> Any:
    """A number in which each token of a batch counts at its place; the same in NumPy and on any mesh."""
    rows, columns = tokens_BT.shape
    places_BT = np.arange(1, rows * columns + 1, dtype=np.int32).reshape(rows, columns)
    return (tokens_BT * places_BT % PRIME).sum() % PRIME


@jax.jit
def train_step(state, batch, learning_rate):
    number = digest(batch["inputs_BT"].reshape(-1, batch["inputs_BT"].shape[-1])).astype(jnp.float32)
    params = {"w": (3 * state.params["w"] + number) % PRIME}
    metrics = {"loss": number, "weight": batch["weights_BT"].sum(), "skips": state.history.skips}
    return TrainState(state.step + 1, params, (), state.history), metrics


class Recorder:
    def __init__(self):
        self.steps, self.last_step = {}, 0

    def train(self, step, *, learning_rate, metrics):
        self.steps[step] = (metrics["loss"], metrics["weight"])

    def evaluation(self, step, result):
        pass


class StopAt:
    reason, seconds_since = "a test", 0.0

    def __init__(self, step):
        self._step = step

    def begin_steps(self):
        pass

    allow_long = begin_end = finish = begin_steps

    def is_agreed(self, step):
        return step == self._step


def train(workdir, store, monkeypatch, parts):
    """Train in parts of (devices, last step or 0 for the end); return what was recorded, and the final parameters."""
    config = tiny_config(**CHANGES)
    monkeypatch.setattr(loop, "evaluate_some", lambda run, params: None)
    finished = []
    monkeypatch.setattr(loop, "finish_run", lambda run, params, writer, **_: finished.append(np.asarray(params["w"])))
    writer = Recorder()
    for num_devices, last in parts:
        mesh = make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices()[:num_devices])
        optimizer = types.SimpleNamespace(init=lambda params: ())
        with jax.set_mesh(mesh):
            state = new_state(
                {"w": jax.device_put(jnp.ones((8, 3)), NamedSharding(mesh, PartitionSpec(FSDP)))}, optimizer
            )
            whole = NamedSharding(mesh, PartitionSpec())
            state = state.replace(step=jax.device_put(state.step, whole), history=jax.device_put(state.history, whole))
        run = types.SimpleNamespace(
            config=config, workdir=workdir, mesh=mesh, train_steps=(train_step,) * 2, ledger=GoodputLedger(),
            learning_rates=np.ones(16), token_store=store, most_documents=1,
        )  # fmt: skip
        checkpointer = Checkpointer(workdir, config=config.checkpoint)
        position, _, _ = last_position(checkpointer, config)
        if position.step:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            position, state, _ = restore_last(checkpointer, config, abstract=abstract)
            assert len(state.params["w"].sharding.device_set) == num_devices
        with jax.set_mesh(mesh):
            train_from: Any = loop._train_from
            outcome = train_from(
                run, state, position, checkpointer=checkpointer, writer=writer, stop=StopAt(last),
                beginning=Beginning(make_state=lambda run: None, events=()), continue_prompt=lambda run, params: "",
            )  # fmt: skip
        checkpointer.close()
        assert outcome == (loop.PREEMPTED if last else loop.DONE)
    return writer.steps, finished[0]


def test_a_run_goes_on_with_1_2_4_and_8_devices_and_back_to_the_token(token_store, tmp_path, monkeypatch):
    store = open_store(token_store, expected_fingerprint="")
    parts = [(1, 2), (2, 5), (4, 6), (8, 9), (2, 11), (1, 14), (4, 0)]
    steps, final = train(tmp_path / "elastic", store, monkeypatch, parts)
    expected, whole = train(tmp_path / "whole", store, monkeypatch, [(1, 0)])
    assert steps == expected and (final == whole).all() and len(steps) == 16

    config = tiny_config(**CHANGES)
    order, reader = loop._make_loader(
        types.SimpleNamespace(
            config=config, token_store=store, most_documents=1,
            mesh=make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices()[:1]),
        )
    ).order, store.split(TRAIN)  # fmt: skip
    w = 1
    for phase in config.curriculum.table.phases:  # by hand, from the blocks
        for step in range(phase.first_step, phase.end_step):
            first = (step - phase.first_step) * phase.batch_size
            rows = []
            for window in order.windows(phase, sequences=range(first, first + phase.batch_size)):
                (block,) = reader.read_many([window.block])
                begin = window.window * phase.seq_len
                rows.append(block.tokens[begin : begin + phase.seq_len])
            number = int(digest(np.stack(rows).astype(np.int32)))
            assert steps[step + 1][0] == number
            w = (3 * w + number) % PRIME
    assert (final == w).all()
