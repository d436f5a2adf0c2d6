"""Fold into the weights what other clients cannot configure: the scale of the scores, and padding of n_inner.

llama.cpp always computes scores as q.k/head_dim, and its block types need rows of a multiple of 32 or 256 values. What
cannot be folded is refused here, because the clients compute wrong logits for it without an error.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from btlm_jax.hub.published import PublishedConfig, Tensors, tensor_shapes

_QKV = (".attn.c_attn.weight", ".attn.c_attn.bias")


def padded_config(config: PublishedConfig, *, multiple: int) -> PublishedConfig:
    """Return the config with n_inner rounded up; zero-padding is exact, as silu(0) = 0 and zero rows add nothing."""
    return dataclasses.replace(config, n_inner=config.n_inner + -config.n_inner % multiple)


class FoldedTensors:
    """A model's folded tensors by published name; see `published.Tensors`. `config` is the folded model's."""

    def __init__(self, tensors: Tensors, config: PublishedConfig, *, pad_ffn: int):
        """Check the model; its n_inner will be a multiple of `pad_ffn`.

        Raises:
          ValueError: the model scales ALiBi, or a tensor is missing or has another shape than the config says.
        """
        if config.alibi_scaling != 1 or config.alibi_train_len:
            scaling = f"{config.alibi_scaling:g}"
            if config.alibi_train_len:
                scaling = f"keys/{config.alibi_train_len}"
            raise ValueError(
                f"alibi_scaling={scaling} cannot be expressed in a Jais model: its clients ignore it "
                "and give wrong logits; convert it with alibi_scaling 1, or keep it in the Hugging Face BTLM format"
            )
        for name, shape in tensor_shapes(config).items():
            actual = tensors.shapes.get(name)
            if actual is None or tuple(actual) != shape:
                raise ValueError(f"tensor {name} has shape {actual}, but the config asks for {shape}")
        self._tensors, self._source = tensors, config
        self.config = dataclasses.replace(padded_config(config, multiple=pad_ffn), mup_scale_qk_dot_by_d=True)
        self.shapes = tensor_shapes(self.config)

    def read(self, name: str) -> np.ndarray:
        """Return one folded tensor, in float32 if folding changes its values, else in the dtype it is stored in.

        Raises:
          ValueError: its shape is not the one in `shapes` of the source, or it holds NaN or infinity.
        """
        array, announced = self._tensors.read(name), tuple(self._tensors.shapes[name])
        if array.shape != announced:
            raise ValueError(f"tensor {name} has shape {array.shape}, not {announced} as announced")
        if not np.isfinite(array).all():
            raise ValueError(f"tensor {name} holds values that are not finite; the model cannot be converted")
        array = _times_query(array, name, self._source, factor=math.sqrt(self._source.head_dim))
        widths = [(0, after - before) for before, after in zip(announced, self.shapes[name], strict=True)]
        return np.pad(array, widths) if any(after for _, after in widths) else array


def unfolded_query(array: np.ndarray, name: str, config: PublishedConfig) -> np.ndarray:
    """Undo the folding of the scores' scale; `config` is the source's."""
    return _times_query(array, name, config, factor=1 / math.sqrt(config.head_dim))


def _times_query(array: np.ndarray, name: str, config: PublishedConfig, *, factor: float) -> np.ndarray:
    """Multiply the query's columns, the first third of c_attn: (q sqrt(d)).k / d = q.k / sqrt(d)."""
    if config.mup_scale_qk_dot_by_d or not name.endswith(_QKV):
        return array
    array = array.astype(np.float32)
    array[..., : config.n_embd] *= np.float32(factor)
    return array
