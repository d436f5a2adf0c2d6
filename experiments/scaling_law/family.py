"""The family of the scaling law: one depth, widths of heads in proportion; batches and tokens as `btlm new` makes them.

All members have the target's depth and number of heads, so that only the width differs, which muP carries over. The
dial's own shapes of these sizes have 1, 2, 3, 1 and 5 layers, and no law of N and D can know that.
"""

from __future__ import annotations

import dataclasses

from btlm_jax.recipe import sizes
from btlm_jax.recipe.config import MeshConfig, TrainConfig

SHARES = (0.2, 0.3, 0.4, 0.5)  # of the target's width
TOKENS = (1, 2)  # fitted runs have the target's tokens a parameter, and twice as many
HEAD_DIM_MULTIPLE = 8


def make_member(shape: sizes.Shape, *, tokens_per_parameter: float, longest: int) -> TrainConfig:
    """Return the config of a shape for a CPU: batch, curriculum and warm-up by the tokens, as of `btlm new`.

    Raises:
      ValueError: there are too few tokens for two phases.
    """
    return sizes.make_config(
        sizes.Choices(
            shape=shape, num_tokens=round(tokens_per_parameter * shape.num_parameters), longest=longest,
            weight_decay=sizes.PUBLISHED, dtype="float32", mesh=MeshConfig(tensor=1, context=1, accumulation=1),
            remat="none", store="store", max_epochs=4,
        )
    )  # fmt: skip


def make_shape(*, d_model: int, num_layers: int, num_heads: int, vocab_size: int) -> sizes.Shape:
    """Return the shape with the dial's d_ff."""
    return sizes.Shape(
        vocab_size=vocab_size, num_layers=num_layers, d_model=d_model, num_heads=num_heads, d_ff=8 * d_model // 6 * 2
    )


def fitted_sizes(target: TrainConfig) -> dict[str, TrainConfig]:
    """Return the smaller runs by name, the cheapest first; everything that no size decides is the target's.

    Raises:
      ValueError: two of the widths are the same.
    """
    model = target.model
    ratio = target.curriculum.table.num_tokens / sizes.count_parameters(model)
    step = HEAD_DIM_MULTIPLE * model.num_heads
    found = {}
    for share in SHARES:
        shape = make_shape(
            d_model=round(share * model.d_model / step) * step, num_layers=model.num_layers, num_heads=model.num_heads,
            vocab_size=model.vocab_size,
        )  # fmt: skip
        for times in TOKENS:
            name = f"d{shape.d_model}-{times}x"
            if name in found or shape.d_model == 0:
                raise ValueError(
                    f"{share:g} of the target's d_model={model.d_model} in heads of a multiple of {HEAD_DIM_MULTIPLE} "
                    f"is {shape.d_model}, which is 0 or another one's too: give a wider target, or fewer heads"
                )
            made = make_member(
                shape, tokens_per_parameter=times * ratio, longest=target.curriculum.table.block_len
            )  # fmt: skip
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
