"""The table between published tensors and our parameters; it drives both directions.

Ours stacks the layers and splits heads: attention/query/kernel is [L, D, N, H], and the published c_attn.weight of a
layer is [D, 3 D], columns q, k, v. So each published tensor of a block is one layer of one or more of ours, reshaped
and put side by side along the last axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from btlm_jax.hub.published import BLOCKS, EMBEDDING, FINAL_NORM, PublishedConfig, Tensors, block_prefix, tensor_shapes

# Published name after `block_prefix` -> our paths, side by side along the last axis.
BLOCK_NAMES = {
    "ln_1.weight": ("ln_1/scale",),
    "ln_1.bias": ("ln_1/bias",),
    "attn.c_attn.weight": ("attention/query/kernel", "attention/key/kernel", "attention/value/kernel"),
    "attn.c_attn.bias": ("attention/query/bias", "attention/key/bias", "attention/value/bias"),
    "attn.c_proj.weight": ("attention/out/kernel",),
    "attn.c_proj.bias": ("attention/out/bias",),
    "ln_2.weight": ("ln_2/scale",),
    "ln_2.bias": ("ln_2/bias",),
    "mlp.c_fc.weight": ("mlp/up/kernel",),
    "mlp.c_fc.bias": ("mlp/up/bias",),
    "mlp.c_fc2.weight": ("mlp/gate/kernel",),
    "mlp.c_fc2.bias": ("mlp/gate/bias",),
    "mlp.c_proj.weight": ("mlp/down/kernel",),
    "mlp.c_proj.bias": ("mlp/down/bias",),
}
OTHER_NAMES = {
    EMBEDDING: "embedding/embedding",
    f"{FINAL_NORM}.weight": "ln_f/scale",
    f"{FINAL_NORM}.bias": "ln_f/bias",
}
# The published code has no residual multiplier, so it is folded into the last product of each residual branch.
_BRANCH_OUTPUTS = ("attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")


class NativeTensors:
    """Our parameters by published name; see `published.Tensors`."""

    def __init__(self, params: dict, config: PublishedConfig, *, residual_scale: float):
        self._params, self._residual_scale = params, residual_scale
        self.shapes = tensor_shapes(config)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, float32."""
        shape = self.shapes[name]
        if name in OTHER_NAMES:
            return np.asarray(_at(self._params, OTHER_NAMES[name]))
        layer, name_in_block = name.removeprefix(BLOCKS).split(".", 1)
        paths = BLOCK_NAMES[name_in_block]
        part_shape = (*shape[:-1], shape[-1] // len(paths))
        parts = [np.asarray(_at(self._params["blocks"], path)[int(layer)]).reshape(part_shape) for path in paths]
        tensor = np.concatenate(parts, axis=-1)
        return tensor * np.float32(self._residual_scale) if name_in_block in _BRANCH_OUTPUTS else tensor


def read_params(tensors: Tensors, config: PublishedConfig, *, shapes: dict, report: Callable[[str], None]) -> dict:
    """Return our parameter tree, float32 NumPy arrays, from published tensors.

    `shapes` is its tree of jax.ShapeDtypeStruct; `report` gets each published name before it is read.
    """

    def read(name: str) -> np.ndarray:
        report(name)
        return tensors.read(name)

    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), shapes)
    for name, path in OTHER_NAMES.items():
        _at(params, path)[...] = read(name)
    for layer in range(config.n_layer):
        for name, paths in BLOCK_NAMES.items():
            tensor = read(block_prefix(layer) + name)
            for path, part in zip(paths, np.split(tensor, len(paths), axis=-1), strict=True):
                target = _at(params["blocks"], path)[layer]
                target[...] = part.reshape(target.shape)
    return params


def _at(tree: dict, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree
