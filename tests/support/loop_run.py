"""The training loop, with real loader, store, meshes and checkpoints, around a step whose state is exact integers.

Each token of each step counts in it, at its place, so that no mesh can change its bits.
"""

import dataclasses
import types
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from support.run_command import checkpoint_steps
from support.tiny import tiny_config

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
        self.steps, self.events, self.evaluations, self.last_step = {}, [], [], 0

    def train(self, step, *, learning_rate, metrics):
        self.steps[step] = (metrics["loss"], metrics["weight"])

    def evaluation(self, step, result):
        self.evaluations.append((step, result))

    def evaluation_follows(self):
        pass

    def event(self, step, message):
        self.events.append((step, message))


class StopAt:
    """Ask to stop after a step, once."""

    reason, seconds_since = "a test", 0.0

    def __init__(self, step):
        self._step = step

    def begin_steps(self):
        pass

    allow_long = begin_end = finish = begin_steps

    def is_agreed(self, step):
        return step == self._step


def train(workdir, store, monkeypatch, parts, *, step_function=train_step, **changes):
    """Train in parts of (devices, last step or 0 for the end), with changes of the config.

    Returns what was recorded by step, the final parameters, the events, the evaluations as (step, newest checkpoint
    then), and the outcome of each part.
    """
    config = tiny_config(**{**CHANGES, **changes})
    monkeypatch.setattr(loop, "evaluate_some", lambda run, params: (checkpoint_steps(workdir) or [0])[-1])
    finished, outcomes = [], []
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
            rest = {"step": jax.device_put(state.step, whole), "history": jax.device_put(state.history, whole)}
            state = dataclasses.replace(state, **rest)
        run = types.SimpleNamespace(
            config=config, workdir=workdir, mesh=mesh, train_steps=(step_function,) * 2, ledger=GoodputLedger(),
            learning_rates=np.ones(16), token_store=store, most_documents=1,
        )  # fmt: skip
        checkpointer = Checkpointer(workdir, config=config.checkpoint)
        position, _, _ = last_position(checkpointer, config)
        if position.step:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            position, restored, _ = restore_last(checkpointer, config, abstract=abstract)
            assert restored is not None and len(restored.params["w"].sharding.device_set) == num_devices
            state = restored
        with jax.set_mesh(mesh):
            train_from: Any = loop._train_from
            outcome = train_from(
                run, state, position, checkpointer=checkpointer, writer=writer, stop=StopAt(last),
                beginning=Beginning(make_state=cast(Any, None), why_not_again=lambda: "", events=()),
                continue_prompt=lambda run, params: "",
            )  # fmt: skip
        checkpointer.close()
        outcomes.append(outcome)
    final = finished[0] if finished else None
    return types.SimpleNamespace(
        steps=writer.steps, final=final, events=writer.events, evaluations=writer.evaluations, outcomes=outcomes
    )
