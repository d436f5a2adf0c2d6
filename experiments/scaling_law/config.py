"""The target of the scaling law: the run that is predicted. The fitted ones have a fifth to half its width: family.py.

Batches and tokens are those of `btlm new`; the constants are those of experiments/lr_transfer at width 64, where a rate
of 2^-6 is within an octave of the best. "" is for 2 CPU cores, "quick" ends within minutes, "large" is for a GPU.
"""

import dataclasses

from ml_collections import ConfigDict

from experiments.scaling_law.family import make_member, make_shape


def get_config(size: str = "") -> ConfigDict:
    if size == "large":
        shape = make_shape(d_model=1280, num_layers=24, num_heads=16, vocab_size=50257)
        return ConfigDict(dataclasses.asdict(make_member(shape, tokens_per_parameter=20, longest=2048)))
    shape = make_shape(d_model=160, num_layers=4, num_heads=2, vocab_size=512)
    made = dataclasses.asdict(make_member(shape, tokens_per_parameter=0.5 if size == "quick" else 5, longest=256))
    changes = {
        "mup": dict(
            base_d_model=64.0, base_d_ff=170.0, init_std=0.125, embedding_multiplier=8.0, output_multiplier=0.25
        ),
        "optimizer": dict(peak_learning_rate=2.0**-6, end_learning_rate=0.0085 * 2.0**-6),
        "corpus": dict(source="installed_python", max_bytes=16_000_000, heldout_fraction=0.05),
        "evaluation": dict(every_steps=1_000_000, blocks_per_source=128),
        "checkpoint": dict(every_steps=200, keep_last=1),
        "log": dict(every_steps=20, sample_tokens=1),
    }
    return ConfigDict(made | {name: made[name] | change for name, change in changes.items()})
