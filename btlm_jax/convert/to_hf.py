"""Write a Hugging Face BTLM directory that today's transformers loads with `trust_remote_code=True`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from btlm_jax import __version__
from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.hub.client_files import GENERATION_CONFIG
from btlm_jax.hub.evaluation_card import EvaluationCard
from btlm_jax.hub.huggingface import FILE_HASHES, file_hashes
from btlm_jax.hub.published import BTLM, CONFIG_FILE, SLOPES, PublishedConfig, Tensors, tensor_shapes
from btlm_jax.hub.safetensors_files import TensorToWrite, write_safetensors
from btlm_jax.storage.files import write_atomically

REMOTE_CODE = Path(__file__).parent / "remote_code"
MODEL_FILES = tuple(sorted(REMOTE_CODE.glob("*_btlm.py")))


def write_hf(
    directory: Path,
    *,
    config: PublishedConfig,
    tensors: Tensors,
    dtype: str,
    max_shard_bytes: int,
    notes: Mapping[str, str],
    generation_config: Mapping[str, Any],
    pad_token_id: int | None,
    evaluation: EvaluationCard,
    report: Callable[[str], None],
) -> None:
    """Write weights, configs, model code and a model card into `directory`; the tokenizer's files are there already.

    The weights' metadata has the hashes of the config and of the tokenizer's files, see `hub/huggingface.py`.

    Raises:
      ValueError: a value is not finite or too large for `dtype`, or what reading a tensor raises.
      OSError: a file cannot be written.
    """
    to_write = [cast_tensor(tensors, name, shape, dtype, report) for name, shape in tensor_shapes(config).items()]
    slopes_N1 = alibi_slopes(config.n_head, scaling=1.0)[:, None]  # float32 always: bfloat16 would round them
    to_write.append(TensorToWrite(name=SLOPES, shape=slopes_N1.shape, dtype=slopes_N1.dtype, make=lambda: slopes_N1))
    _write_json(directory / CONFIG_FILE, hf_config(config, dtype=dtype) | {"pad_token_id": pad_token_id})
    write_generation_config(directory, generation_config, config=config, pad_token_id=pad_token_id)
    metadata = {"format": "pt", FILE_HASHES: json.dumps(file_hashes(directory))}
    write_safetensors(directory, to_write, max_shard_bytes=max_shard_bytes, metadata=metadata)
    for path in MODEL_FILES:
        shutil.copyfile(path, directory / path.name)
    card = model_card(config, dtype=dtype, notes=notes)
    write_atomically(directory / "README.md", f"{card}\n{evaluation.text}" if evaluation.text else card)
    for name, contents in evaluation.plots.items():
        (directory / name).write_bytes(contents)


def write_generation_config(
    directory: Path, values: Mapping[str, Any], *, config: PublishedConfig, pad_token_id: int | None
) -> None:
    """Write generation_config.json: the model's own values, or if it has none, those that follow from the config."""
    from_config = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    from_config |= {} if pad_token_id is None else {"pad_token_id": pad_token_id}
    own = {"_from_model_config": True} | from_config
    _write_json(directory / GENERATION_CONFIG, {**from_config, **values} if values else own)


def cast_tensor(
    tensors: Tensors, name: str, shape: tuple[int, ...], dtype: str, report: Callable[[str], None]
) -> TensorToWrite:
    """Return a tensor that is read, cast and zero-padded at the end of each axis to `shape` when it is written.

    `report` gets its name then. Raises, when it is written:
      ValueError: a value is not finite, or too large for `dtype`.
    """

    def make() -> np.ndarray:
        report(name)
        stored = tensors.read(name)
        with np.errstate(over="ignore"):  # infinities are found below
            array = stored.astype(jnp.dtype(dtype))
        if not np.isfinite(array).all():
            num_bad = int((~np.isfinite(stored)).sum())
            if num_bad:
                raise ValueError(f"tensor {name} holds {num_bad:,} values that are not finite; it cannot be converted")
            largest = float(np.abs(stored.astype(np.float32)).max())
            wider = "float32" if dtype == "bfloat16" else "bfloat16"
            raise ValueError(
                f"tensor {name} has values up to {largest:.3g}, too large for {dtype}; use --dtype={wider}"
            )
        if array.shape == shape:
            return array
        return np.pad(array, [(0, after - before) for before, after in zip(array.shape, shape, strict=True)])

    return TensorToWrite(name=name, shape=shape, dtype=jnp.dtype(dtype), make=make)


def hf_config(config: PublishedConfig, *, dtype: str) -> dict:
    """Return the contents of config.json: only the newer (`mup_*`) keys, which no other family reads differently."""
    values = dataclasses.asdict(config)
    factor, train_len = values.pop("alibi_scaling"), values.pop("alibi_train_len")
    scaling = {"type": "linear", "factor": factor} if factor != 1 else None
    if train_len:
        scaling = {"type": "linear", "train_seq_len": train_len}
    return {
        **values,
        "activation_function": "swiglu",
        "alibi_scaling": scaling,
        "architectures": ["BTLMLMHeadModel"],
        "attn_pdrop": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_btlm.BTLMConfig",
            "AutoModel": "modeling_btlm.BTLMModel",
            "AutoModelForCausalLM": "modeling_btlm.BTLMLMHeadModel",
            "AutoModelForSequenceClassification": "modeling_btlm.BTLMForSequenceClassification",
        },
        "embd_pdrop": 0.0,
        "model_type": BTLM,
        "position_embedding_type": "alibi",
        "reorder_and_upcast_attn": False,
        "resid_pdrop": 0.0,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def model_card(config: PublishedConfig, *, dtype: str, notes: Mapping[str, str]) -> str:
    """Return the README.md of an exported model: what it is, how it was trained, how to load it."""
    num_parameters = sum(int(np.prod(shape)) for shape in tensor_shapes(config).values())
    rows = {
        "parameters": f"{num_parameters:,}",
        "layers, width, heads": f"{config.n_layer}, {config.n_embd:,}, {config.n_head}",
        "feed-forward width": f"{config.n_inner:,} (SwiGLU)",
        "vocabulary": f"{config.vocab_size:,}",
        "positions": f"ALiBi, trained to {config.n_positions:,} tokens",
        "dtype of the weights": dtype,
        **notes,
    }
    table = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [btlm, mup, alibi]
---

# BTLM

A decoder of the BTLM-3B-8K family (arXiv 2309.11568): ALiBi, SwiGLU, maximal update parametrization. Trained or
converted with btlm_jax {__version__}.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
inputs = tokenizer("The meaning of", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

The model code in this directory is all that is needed besides PyTorch and transformers 4.57 or 5. Nothing is known here
of the data's biases and of what the model should not be used for: whoever publishes it adds that.
"""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


def _write_json(path: Path, values: dict) -> None:
    write_atomically(path, json.dumps(values, indent=2, sort_keys=True) + "\n")
