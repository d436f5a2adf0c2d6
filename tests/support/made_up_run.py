"""A training run's workdir without training: a checkpoint of random values, and the token store's tokenizer."""

from pathlib import Path

import jax
import numpy as np
from support.real_store import VOCAB_SIZE
from support.tiny import tiny_config

from btlm_jax.data.store import keep_tokenizer, read_manifest
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.recipe.config import TrainConfig
from btlm_jax.train.checkpoint import Checkpointer, Position
from btlm_jax.train.program import make_program
from btlm_jax.train.step import TrainState


def run_config(store: Path, **changes) -> TrainConfig:
    """Return the tiny config on a store of support/real_store.py."""
    fixed = {"model__vocab_size": VOCAB_SIZE, "data__store": str(store), "corpus__source": "prepared"}
    return tiny_config(**{**fixed, **changes})


def write_run(workdir: Path, config: TrainConfig, *, steps: tuple[int, ...]) -> TrainState:
    """Write a checkpoint for each step; return the state of the last one, on the host, in which no value is 0."""
    program = make_program(config, make_mesh(devices=jax.devices()[:1], tensor=1))
    workdir.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(Path(config.data.store))
    keep_tokenizer(manifest.tokenizer, store=Path(config.data.store), directory=workdir / "tokenizer")
    checkpointer = Checkpointer(workdir, config=config.checkpoint)
    for step in steps:
        rng = np.random.default_rng(step)

        def made_up(leaf, rng=rng, step=step):
            values = np.full(leaf.shape, step) if leaf.dtype == np.int32 else rng.uniform(0.01, 0.1, leaf.shape)
            return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

        state = jax.tree.map(made_up, program.state)
        position = Position(
            step=step, tokens_seen=config.curriculum.table.tokens_seen(step), store_fingerprint=manifest.fingerprint
        )
        checkpointer.save(state, position=position, config=config)
    checkpointer.wait()
    checkpointer.close()
    return jax.device_get(state)
