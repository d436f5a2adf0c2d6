"""Models of real shape with random weights, for benchmarks that need the size and not the sense: small and BTLM-3B.

Command: python benchmarks/random_model.py full bfloat16 DIR    (or small, float32)
Writes a Hugging Face directory without a tokenizer, tensor by tensor, the same bits for the same seed.
"""

from __future__ import annotations

import argparse
import math
import zlib
from pathlib import Path

import numpy as np

from btlm_jax.convert.to_hf import write_hf
from btlm_jax.hub.evaluation_card import NO_CARD
from btlm_jax.hub.published import PublishedConfig, tensor_shapes

_BASE_WIDTH, _INIT_STD = 256, 0.073  # of the published recipe
_SEED = 1
MAX_SHARD_BYTES = 5_000_000_000


def published_shape(*, n_embd: int, n_layer: int, n_head: int, n_inner: int) -> PublishedConfig:
    """Return a model of the BTLM family with the paper's multipliers."""
    return PublishedConfig(
        vocab_size=50257,
        n_positions=8192,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        n_inner=n_inner,
        layer_norm_epsilon=1e-5,
        initializer_range=_INIT_STD,
        mup_embeddings_scale=14.6,
        mup_output_alpha=2.22,
        mup_width_scale=_BASE_WIDTH / n_embd,
        mup_scale_qk_dot_by_d=True,
        alibi_scaling=1.0,
        alibi_train_len=0,
        bos_token_id=50256,
        eos_token_id=50256,
    )


SHAPES = {
    "small": published_shape(n_embd=768, n_layer=12, n_head=12, n_inner=2048),
    "full": published_shape(n_embd=2560, n_layer=32, n_head=32, n_inner=6826),
}


class RandomTensors:
    """Freshly initialized weights; see `published.Tensors`. A tensor's values depend on its name alone."""

    def __init__(self, config: PublishedConfig):
        self._config = config
        self.shapes = tensor_shapes(config)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, float32."""
        shape, kind = self.shapes[name], name.split(".", 1)[1]
        if len(shape) == 1:
            is_scale = "ln_" in kind and kind.endswith(".weight")
            return np.full(shape, float(is_scale), np.float32)
        std = _INIT_STD
        if not kind.startswith("wte"):
            std *= math.sqrt(self._config.mup_width_scale)
        if kind.endswith("c_proj.weight"):
            std /= math.sqrt(2 * self._config.n_layer)
        values = np.random.default_rng((_SEED, zlib.crc32(name.encode()))).standard_normal(shape, np.float32)
        return np.multiply(values, np.float32(std), out=values)


def write_random_model(directory: Path, *, shape: str, dtype: str) -> None:
    """Write a model of a shape of SHAPES as a Hugging Face directory, whole or not at all."""
    config = SHAPES[shape]
    partial = directory.with_name(f"{directory.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    write_hf(
        partial,
        config=config,
        tensors=RandomTensors(config),
        dtype=dtype,
        max_shard_bytes=MAX_SHARD_BYTES,
        notes={},
        generation_config={},
        pad_token_id=None,
        evaluation=NO_CARD,
        report=lambda name: None,
    )
    partial.rename(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("dtype", choices=("float32", "bfloat16"))
    parser.add_argument("directory", metavar="DIR", type=Path)
    options = parser.parse_args()
    write_random_model(options.directory, shape=options.shape, dtype=options.dtype)
