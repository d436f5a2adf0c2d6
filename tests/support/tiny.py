"""Tiny configs for tests: every size different, so that a swapped axis cannot hide."""

import runpy
from pathlib import Path

from btlm_jax.recipe.config import TrainConfig, train_config_from

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.py"))


def config_dict(name: str) -> dict:
    """Return the plain dict of a file under configs/; those of a folder there are called "pods/v5e_256"."""
    return runpy.run_path(str(REPOSITORY / "configs" / f"{name}.py"))["get_config"]().to_dict()


# 8 x 24 = 4 x 48 tokens a step, 6 + 4 steps.
TINY = {
    "model.vocab_size": 300,
    "model.num_layers": 2,
    "model.d_model": 40,
    "model.num_heads": 4,
    "model.d_ff": 54,
    "model.loss_chunk": 20,
    "mup.base_d_model": 20.0,
    "mup.base_d_ff": 24.0,
    "mup.base_num_layers": 2,
    "mup.output_multiplier": 2.22,
    "curriculum.seq_len": (24, 48),
    "curriculum.batch_size": (16, 8),
    "curriculum.num_tokens": (6 * 384, 4 * 384),
    "optimizer.warmup_tokens": 2 * 384,
    "evaluation.batch_size": 8,
    "evaluation.blocks_per_source": 2,
    "evaluation.every_steps": 4,
    "checkpoint.every_steps": 3,
}


def tiny_config(**changes) -> TrainConfig:
    """Return the tiny config; a change is written model__d_model=80."""
    values = config_dict("local_cpu")
    dotted = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
    for key, value in dotted.items():
        *sections, name = key.split(".")
        target = values
        for section in sections:
            target = target[section]
        assert name in target, key
        target[name] = value
    return train_config_from(values)
