"""Write a Jais directory of Hugging Face: the same network under the name that vLLM and llama.cpp's converter know."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from btlm_jax.convert.fold import FoldedTensors
from btlm_jax.convert.to_hf import cast_tensor, hf_config, write_generation_config
from btlm_jax.hub.published import CONFIG_FILE, EMBEDDING, HEAD, JAIS, PublishedConfig, Tensors
from btlm_jax.hub.safetensors_files import write_safetensors
from btlm_jax.storage.files import write_atomically


def write_jais(
    directory: Path,
    *,
    config: PublishedConfig,
    tensors: Tensors,
    dtype: str,
    pad_ffn: int,
    max_shard_bytes: int,
    generation_config: Mapping[str, Any],
    pad_token_id: int | None,
    report: Callable[[str], None],
) -> None:
    """Write weights and configs into `directory`; the tokenizer's files are not written here.

    n_inner is zero-padded to a multiple of `pad_ffn`. There is an lm_head.weight equal to the embedding, which
    llama.cpp needs, and no relative_pe.slopes, with which its converter fails; all clients compute them from n_head.

    Raises:
      ValueError: the model cannot be expressed, or a value is not finite or too large for `dtype`.
      OSError: it cannot be written.
    """
    folded = FoldedTensors(tensors, config, pad_ffn=pad_ffn)
    to_write = [cast_tensor(folded, name, shape, dtype, report) for name, shape in folded.shapes.items()]
    head = cast_tensor(folded, EMBEDDING, folded.shapes[EMBEDDING], dtype, report)
    to_write.append(dataclasses.replace(head, name=HEAD))
    write_safetensors(directory, to_write, max_shard_bytes=max_shard_bytes, metadata={"format": "pt"})
    values = json.dumps(
        jais_config(folded.config, dtype=dtype) | {"pad_token_id": pad_token_id}, indent=2, sort_keys=True
    )
    write_atomically(directory / CONFIG_FILE, values + "\n")
    write_generation_config(directory, generation_config, config=folded.config, pad_token_id=pad_token_id)


def jais_config(config: PublishedConfig, *, dtype: str) -> dict:
    """Return the contents of config.json for a folded model: the keys that the clients read, without model code."""
    values = hf_config(config, dtype=dtype)
    for key in ("auto_map", "alibi_scaling"):
        del values[key]
    return values | {"architectures": ["JAISLMHeadModel"], "model_type": JAIS}
