"""AWQ: scale up the weights of inputs with large activations before rounding, and fold the inverse into earlier layers.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (arXiv:2306.00978).
Only the scales are chosen here, which leave the float network as it is; any method can round the scaled weights.
"""

from __future__ import annotations

import numpy as np

from btlm_jax.quantize.grouped import dequantize, round_to_nearest

NUM_EXPONENTS = 20  # alpha = 0, 1/20, ..., 19/20 (the authors' grid search)
SEARCH_TOKENS = 512  # evenly spaced calibration tokens on which each candidate's error is measured

BlockTensors = dict[str, np.ndarray]  # a block's float32 tensors, named as in `published.block_shapes`


def scaled_block(block: BlockTensors, inputs: dict[str, np.ndarray], group_size: int) -> BlockTensors:
    """Return an equivalent block with scaled weights; diag(s)^-1 is folded into the layer that computes each input.

    That is the gain and bias of ln_1 for c_attn and of ln_2 for c_fc and c_fc2, the values' columns of c_attn for
    attn.c_proj (attention is linear in the values), and c_fc for mlp.c_proj (up * silu(gate) is linear in up).
    `inputs` are the calibration inputs x_RK of "attn.c_attn", "attn.c_proj", "mlp.c_fc" and "mlp.c_proj".
    """
    block = dict(block)

    def scale(names: tuple[str, ...], producers: tuple[str, ...]) -> None:
        """Scale the rows of the weights `names`; divide the last columns of `producers`, which compute their inputs."""
        weights = [block[f"{name}.weight"] for name in names]
        scale_K = best_scale(np.concatenate(weights, axis=1), inputs[names[0]], group_size)
        for name in names:
            block[f"{name}.weight"] = block[f"{name}.weight"] * scale_K[:, None]
        for producer in producers:
            num_unscaled = block[producer].shape[-1] - len(scale_K)  # q and k, of c_attn
            block[producer] = block[producer] / np.concatenate([np.ones(num_unscaled, np.float32), scale_K])

    scale(("attn.c_attn",), ("ln_1.weight", "ln_1.bias"))
    scale(("attn.c_proj",), ("attn.c_attn.weight", "attn.c_attn.bias"))
    scale(("mlp.c_fc", "mlp.c_fc2"), ("ln_2.weight", "ln_2.bias"))
    scale(("mlp.c_proj",), ("mlp.c_fc.weight", "mlp.c_fc.bias"))
    return block


def best_scale(w_KM: np.ndarray, x_RK: np.ndarray, group_size: int) -> np.ndarray:
    """Return s_K = mean|x|^alpha with the alpha whose rounded weights change the outputs least (equations 4 and 5).

    That is argmin over alpha of |Q(W diag(s)) diag(s)^-1 X - W X|. Scales are divided by sqrt(max(s) min(s)), as in the
    authors' code; alpha = 0 leaves the weights as they are.
    """
    magnitude_K = np.maximum(np.abs(x_RK).mean(0), 1e-4)
    x_RK = x_RK[:: -(-len(x_RK) // SEARCH_TOKENS)]

    def error_of(scale_K: np.ndarray) -> float:
        rounded_KM = dequantize(round_to_nearest(w_KM * scale_K[:, None], group_size)) / scale_K[:, None]
        return float(np.square(x_RK @ (rounded_KM - w_KM)).sum())

    scales = []
    for exponent in np.arange(NUM_EXPONENTS, dtype=np.float32) / NUM_EXPONENTS:
        scale_K = magnitude_K**exponent
        scales.append(scale_K / np.sqrt(scale_K.max() * scale_K.min()))
    return min(scales, key=error_of)
