"""The family of the scaling law: shapes, batches and tokens by the dial of `btlm new`, constants of one config."""

from __future__ import annotations

import dataclasses

from btlm_jax.recipe import sizes
from btlm_jax.recipe.config import MeshConfig, TrainConfig

PARTS = (12.7, 8.0, 5.75, 4.0)  # the target has so many times the parameters of each fitted size
TOKENS = (1, 2)  # fitted runs have the target's tokens a parameter, and twice as many


def make_size(num_parameters: int, *, tokens_per_parameter: float, vocab_size: int, longest: int) -> TrainConfig:
    """Return the dial's config of a size, for a CPU.

    Raises:
      ValueError: the dial has no such size.
    """
    shape = sizes.shape_for(num_parameters, vocab_size=vocab_size)
    made = sizes.make_config(
        sizes.Choices(
            shape=shape, num_tokens=round(tokens_per_parameter * shape.num_parameters), longest=longest,
            weight_decay=sizes.PUBLISHED, dtype="float32", mesh=MeshConfig(tensor=1, context=1, accumulation=1),
            remat="none", store="store", max_epochs=4,
        )
    )  # fmt: skip
    return made


def fitted_sizes(target: TrainConfig) -> dict[str, TrainConfig]:
    """Return the smaller runs by name, the cheapest first: the dial's sizes with everything else as the target has it.

    Raises:
      ValueError: the dial has no such size, or the same for two.
    """
    ratio = target.curriculum.table.num_tokens / sizes.count_parameters(target.model)
    found = {}
    for part in PARTS:
        for times in TOKENS:
            made = make_size(
                round(sizes.count_parameters(target.model) / part), tokens_per_parameter=times * ratio,
                vocab_size=target.model.vocab_size, longest=target.curriculum.seq_len[-1],
            )  # fmt: skip
            name = f"{sizes.count_parameters(made.model) // 1000}K-{times}x"
            if name in found:
                raise ValueError(f"two of the fitted sizes are {name}: the target is too small; give a larger one")
            found[name] = with_constants(made, target)
    return dict(sorted(found.items(), key=lambda each: _cost(each[1])))


def with_constants(made: TrainConfig, target: TrainConfig) -> TrainConfig:
    """Return a size with the target's constants, and what no size decides."""
    peak, mup = target.optimizer.peak_learning_rate, target.mup
    share = target.optimizer.end_learning_rate / peak
    return dataclasses.replace(
        target,
        model=dataclasses.replace(
            made.model, dtype=target.model.dtype, remat=target.model.remat, attention=target.model.attention
        ),
        mup=dataclasses.replace(mup, base_d_ff=made.model.d_ff * mup.base_d_model / made.model.d_model),
        curriculum=made.curriculum,
        optimizer=dataclasses.replace(
            target.optimizer, warmup_tokens=made.optimizer.warmup_tokens, end_learning_rate=share * peak
        ),
    )


def _cost(config: TrainConfig) -> float:
    return sizes.count_parameters(config.model) * config.curriculum.table.num_tokens
