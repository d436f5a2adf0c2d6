"""The family's shapes, with one small vocabulary, at their first steps: what muP says is equal at every width.

    python benchmarks/family_mup.py [--steps=4]

Prints for each shape the loss at the start and after the steps, the mean |activation| at the start and the RMS of its
change. Attention's and the MLP's outputs are multiplied by sqrt(2 L): their initial values have the inverse. Runs on a
CPU, half a minute a shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.model import init_params
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.parallel.mesh import batch_sharding
from btlm_jax.recipe import sizes
from btlm_jax.recipe.config import MeshConfig, TrainConfig
from btlm_jax.train.program import make_program
from btlm_jax.train.step import init_state
from btlm_jax.tune.coord_check import probe_activations

SHAPES = {"12M": (192, 4), "4M": (256, 4), "12M of 4,096 ids": (384, 6), "40M": (256, 24), "111M": (768, 10)}
VOCAB_SIZE, ROWS, LENGTH = 1024, 4, 128
PEAK = 2.0**-8


def make_config(d_model: int, num_layers: int) -> TrainConfig:
    """Return the config of a shape with the small vocabulary and short batches."""
    shape = sizes.shape_of(d_model=d_model, num_layers=num_layers, vocab_size=VOCAB_SIZE)
    choices = sizes.Choices(
        shape=shape,
        num_tokens=10**7,
        longest=4 * LENGTH,
        weight_decay=sizes.PUBLISHED,
        dtype="float32",
        mesh=MeshConfig(tensor=1, context=1, accumulation=1),
        remat="full",
        store="none",
        max_epochs=1,
    )
    config = sizes.make_config(choices)
    tokens = ROWS * LENGTH
    curriculum = dataclasses.replace(
        config.curriculum, seq_len=(LENGTH,), batch_size=(ROWS,), num_tokens=(100 * tokens,)
    )
    optimizer = dataclasses.replace(config.optimizer, warmup_tokens=tokens)
    return dataclasses.replace(config, curriculum=curriculum, optimizer=optimizer)


def first_steps(config: TrainConfig, num_steps: int) -> dict[str, float]:
    """Return statistics of a few steps on one batch of random tokens."""
    program = make_program(config, make_mesh(devices=jax.devices()[:1], tensor=1))
    (phase,) = config.curriculum.table.phases
    step = program.compile(program.trace_train_step(phase))
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (1, ROWS, LENGTH + 1), np.int32)
    batch = {"inputs_BT": tokens[..., :-1], "targets_BT": tokens[..., 1:]}
    batch["weights_BT"] = np.ones((1, ROWS, LENGTH), np.float32)
    batch = jax.device_put(batch, batch_sharding(program.mesh, program.rules_for(phase)))
    probe_BT = jnp.asarray(tokens[0, :1, :LENGTH])
    with jax.set_mesh(program.mesh):
        probe = jax.jit(lambda params: probe_activations(program.model, params, probe_BT))
        before = jax.device_get(probe(init_params(program.model, program.mesh, seed=1)))
        state = init_state(program.model, program.optimizer, program.mesh, seed=1)
        losses = []
        for _ in range(num_steps + 1):
            after = jax.device_get(probe(state.params))
            state, metrics = step(state, batch, np.float32(PEAK))
            losses.append(float(metrics["loss"]))
    depth = math.sqrt(2 * config.model.num_layers)
    factors = {name: depth if name in ("attention", "mlp") else 1.0 for name in before}
    return {
        "loss": losses[0],
        f"loss after {num_steps}": losses[-1],
        **{name: factors[name] * float(np.abs(value).mean()) for name, value in before.items()},
        **{f"d {name}": float(np.sqrt(np.square(after[name] - value).mean())) for name, value in before.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    for number, (name, (d_model, num_layers)) in enumerate(SHAPES.items()):
        row = first_steps(make_config(d_model, num_layers), arguments.steps)
        if not number:
            print("| shape | width, layers | " + " | ".join(row) + " |\n|---|---|" + "---|" * len(row))
        print(
            f"| {name} | {d_model}, {num_layers} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
