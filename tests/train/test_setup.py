"""What a run cannot have the memory for is refused before anything is compiled, and what may fit is not."""

import jax
import pytest
from support.tiny import tiny_config

from btlm_jax.parallel.make_mesh import make_run_mesh
from btlm_jax.recipe.sizes import count_parameters
from btlm_jax.train import memory as memory_of_runs
from btlm_jax.train.program import make_program

# Per layer and token 40 numbers come in, one layer has 54 more; 20 positions of each sequence have logits of 300 ids.
ROWS, LAYERS, WIDTH, HALF, LOGITS = 8, 2, 40, 54, 20 * 300
TRAIN_BYTES = 16 * (24 * (12 + (LAYERS * WIDTH + HALF) * 4) + LOGITS * 4)  # phase 1 needs more than phase 2
EVALUATION_BYTES = ROWS * (48 * (12 + (WIDTH + HALF) * 4) + LOGITS * 4)


def check(monkeypatch, *, memory: int, num_devices: int = 1, **changes) -> None:
    config = tiny_config(**changes)
    mesh = make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices()[:num_devices])
    monkeypatch.setattr(memory_of_runs, "memory_bytes", lambda device: memory)
    memory_of_runs.check_memory(make_program(config, mesh))


def state_bytes(**changes) -> int:
    """Parameters, two moments, the step, which AdamW counts too, and a history of three numbers of 64 updates."""
    return 3 * 4 * count_parameters(tiny_config(**changes).model) + 2 * 4 + 4 * (3 * 64 + 3)


@pytest.mark.parametrize(
    ("changes", "needed", "said"),
    [
        ({}, TRAIN_BYTES, r"curriculum.batch_size of phase 1 / mesh.accumulation=16 of 24 tokens each needs"),
        (
            {"mesh__accumulation": 2, "evaluation__batch_size": 1},
            TRAIN_BYTES // 2,
            "of phase 1 / mesh.accumulation=8 of 24 tokens",
        ),
        (
            {"evaluation__batch_size": 64},
            8 * EVALUATION_BYTES,
            "evaluation.batch_size=64 of 48 tokens each needs at least 0.0 GiB of each device, which has 0.0",
        ),
        (
            {"bad_numbers__recompute_every": 1000},
            state_bytes() + TRAIN_BYTES,
            "of phase 1 .* and as much again while bad_numbers.recompute_every computes a step twice",
        ),
        ({"model__dtype": "bfloat16"}, 16 * (24 * (12 + (LAYERS * WIDTH + HALF) * 2) + LOGITS * 2), "of phase 1"),
    ],
)
def test_the_least_that_a_batch_needs_is_refused_where_it_does_not_fit(changes, needed, said, monkeypatch):
    enough = state_bytes() + needed
    check(monkeypatch, memory=enough, **changes)
    with pytest.raises(ValueError, match=said):
        check(monkeypatch, memory=enough - 1, **changes)


def test_a_state_that_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="the parameters and their moments are 0.0 GiB of each device"):
        check(monkeypatch, memory=state_bytes() - 1)
    with pytest.raises(ValueError, match=r"moments are 149,175.5 GiB of each device, which has 1,024.0"):
        check(monkeypatch, memory=2**40, model__num_layers=10**9)
