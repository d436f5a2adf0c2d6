"""Continue a text by running the whole forward pass for every token: right at any length, fast enough for a sample.

There is no KV cache here: a fixed-length buffer is filled from the left, and causality makes what is to the right of
the last token irrelevant.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btlm_jax.loss import logits
from btlm_jax.model import Btlm
from btlm_jax.sharding import FSDP, TENSOR


def continue_tokens(
    model: Btlm,
    params: dict,
    mesh: Mesh,
    *,
    prompt: Sequence[int],
    num_tokens: int,
    temperature: float,
    seed: int,
    stop_id: int,
) -> list[int]:
    """Return up to `num_tokens` ids after the prompt, ending early with `stop_id`; temperature 0 takes the likeliest.

    Raises:
      ValueError: the prompt is empty.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token to continue from")
    rows = mesh.shape[FSDP]  # equal rows, so that the batch divides over the mesh
    length = len(prompt) + num_tokens
    length += -length % mesh.shape[TENSOR]
    buffer_BT = np.zeros((rows, length), np.int32)
    buffer_BT[:, : len(prompt)] = prompt
    sharding = NamedSharding(mesh, PartitionSpec(FSDP))
    generator = np.random.default_rng(seed)
    with jax.set_mesh(mesh):
        last_logits = jax.jit(functools.partial(_logits_at, model))
        for end in range(len(prompt), len(prompt) + num_tokens):
            inputs_BT = jax.make_array_from_callback(buffer_BT.shape, sharding, lambda index: buffer_BT[index])
            logits_V = np.asarray(last_logits(params, inputs_BT, end - 1), np.float64)
            buffer_BT[:, end] = _draw(logits_V, temperature=temperature, generator=generator)
            if buffer_BT[0, end] == stop_id:
                return buffer_BT[0, len(prompt) : end].tolist()
    return buffer_BT[0, len(prompt) : len(prompt) + num_tokens].tolist()


def _logits_at(model: Btlm, params: dict, inputs_BT, position):
    hidden_BTD = model.apply({"params": params}, inputs_BT)
    hidden_BTD = jax.sharding.reshard(hidden_BTD, PartitionSpec(None, None, None))
    hidden_B1D = jax.lax.dynamic_slice_in_dim(hidden_BTD, position, 1, axis=1)
    table_VD = jax.sharding.reshard(params["embedding"]["embedding"], PartitionSpec(None, None))
    return logits(hidden_B1D, table_VD, output_scale=model.parametrization.output_scale)[0, 0]


def _draw(logits_V: np.ndarray, *, temperature: float, generator: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    scaled_V = logits_V / temperature
    weights_V = np.exp(scaled_V - scaled_V.max())
    return int(generator.choice(len(weights_V), p=weights_V / weights_V.sum()))
