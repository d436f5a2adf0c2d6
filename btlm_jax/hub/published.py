"""The published form of a model: the fields of Hugging Face's config.json, and the names and shapes of its tensors.

Every format goes through this form: readers return it, writers take it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

CONFIG_FILE = "config.json"
BTLM, JAIS = "btlm", "jais"  # model_type: two names of one architecture; llama.cpp and vLLM know it as Jais

EMBEDDING, FINAL_NORM = "transformer.wte.weight", "transformer.ln_f"
HEAD = "lm_head.weight"  # tied: equal to the embedding, and absent from most files
SLOPES = "transformer.relative_pe.slopes"  # ALiBi's, which follow from n_head
BLOCKS = "transformer.h."

# Config keys of the first upload -> their names since 2023-07-21.
_OLD_KEYS = {"embeddings_scale": "mup_embeddings_scale", "scale_qk_dot_by_d": "mup_scale_qk_dot_by_d"}

# The published code's defaults for keys that config.json leaves out: those of GPT-2 and of standard parametrization.
_DEFAULTS = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02, "bos_token_id": 50256, "eos_token_id": 50256, "mup_embeddings_scale": 1.0,
    "mup_output_alpha": 1.0, "mup_width_scale": 1.0, "mup_scale_qk_dot_by_d": False,
}  # fmt: skip

# Options of the published code of which one value is implemented here: key -> (that value, the published default).
_FIXED = {
    "activation_function": ("swiglu", "gelu_new"),
    "position_embedding_type": ("alibi", "learned"),
    "scale_attn_weights": (True, True),
    "scale_attn_by_inverse_layer_idx": (False, False),
    "add_cross_attention": (False, False),
    "tie_word_embeddings": (True, True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedConfig:
    """A BTLM config.json under its newer keys."""

    vocab_size: int
    n_positions: int  # longest trained length
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    layer_norm_epsilon: float
    initializer_range: float
    mup_embeddings_scale: float  # factor of the embedding lookup
    mup_output_alpha: float  # the logits are multiplied by mup_output_alpha * mup_width_scale
    mup_width_scale: float
    mup_scale_qk_dot_by_d: bool  # scores q.k/head_dim; otherwise q.k/sqrt(head_dim)
    alibi_scaling: float  # ALiBi slopes are divided by it; 1.0 as trained
    bos_token_id: int
    eos_token_id: int

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def output_scale(self) -> float:
        """The factor of the logits."""
        return self.mup_output_alpha * self.mup_width_scale


class Tensors(Protocol):
    """The tensors of a model by published name, read one at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in the published layout and in the dtype it is stored in: float32, float16 or bfloat16."""
        ...


def block_prefix(layer: int) -> str:
    """Return what the names of a layer's tensors begin with."""
    return f"{BLOCKS}{layer}."


def block_shapes(config: PublishedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one block's tensors, named without `block_prefix`; matrices are [in, out] (Conv1D)."""
    D, F = config.n_embd, config.n_inner
    return {
        "ln_1.weight": (D,),
        "ln_1.bias": (D,),
        "attn.c_attn.weight": (D, 3 * D),  # columns q, k, v; each of N heads * H
        "attn.c_attn.bias": (3 * D,),
        "attn.c_proj.weight": (D, D),
        "attn.c_proj.bias": (D,),
        "ln_2.weight": (D,),
        "ln_2.bias": (D,),
        "mlp.c_fc.weight": (D, F),
        "mlp.c_fc.bias": (F,),
        "mlp.c_fc2.weight": (D, F),  # the gate: c_proj(c_fc(x) * silu(c_fc2(x)))
        "mlp.c_fc2.bias": (F,),
        "mlp.c_proj.weight": (F, D),
        "mlp.c_proj.bias": (D,),
    }


def tensor_shapes(config: PublishedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a model, in the order of the network; without the head, which is tied."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.n_embd)}
    for layer in range(config.n_layer):
        shapes |= {block_prefix(layer) + name: shape for name, shape in block_shapes(config).items()}
    return shapes | {f"{FINAL_NORM}.weight": (config.n_embd,), f"{FINAL_NORM}.bias": (config.n_embd,)}


def read_published_config(path: Path, *, model_type: str = BTLM) -> PublishedConfig:
    """Read a config.json of either generation of keys.

    As Jais, read only files written by this package: in others `width_scale` is the whole factor of the logits.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a JSON object, of another architecture, or has an option that is not implemented here.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a Hugging Face checkpoint is a directory with a config.json")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(values).__name__}")
    if values.get("model_type") != model_type:
        raise ValueError(
            f"{path} describes model_type={values.get('model_type')!r}, architectures={values.get('architectures')}; "
            f"only model_type {model_type!r} can be read here"
        )
    try:
        return _published_config(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _published_config(values: dict) -> PublishedConfig:
    for key, (implemented, default) in _FIXED.items():
        if values.get(key, default) != implemented:
            raise ValueError(f"{key}={values.get(key, default)!r} cannot be computed here; only {implemented!r} can")
    values = _with_new_keys(values)
    fields = {key: values.get(key, default) for key, default in _DEFAULTS.items()}
    fields["n_inner"] = values.get("n_inner") or 4 * fields["n_embd"]
    config = PublishedConfig(**fields, alibi_scaling=_alibi_factor(values.get("alibi_scaling")))
    for field in dataclasses.fields(config):
        value, type_name = getattr(config, field.name), str(field.type)
        allowed = {"int": (int,), "float": (int, float), "bool": (bool,)}[type_name]
        if type(value) not in allowed or (type_name != "bool" and value < 0):
            raise ValueError(f"{field.name}={value!r} must be a {type_name} of 0 or more")
    if config.n_head == 0 or config.n_embd % config.n_head:
        raise ValueError(f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}")
    return config


def _with_new_keys(values: dict) -> dict:
    """Return the values under the newer keys.

    Raises:
      ValueError: an older key and its newer one are both present and differ.
    """
    renamed = {new: values[old] for old, new in _OLD_KEYS.items() if old in values}
    if "width_scale" in values:
        renamed["mup_width_scale"] = values["width_scale"]
    if "output_logits_scale" in values:  # the whole factor of the logits; the newer keys split it in two
        renamed["mup_output_alpha"] = values["output_logits_scale"] / renamed.get("mup_width_scale", 1.0)
    for key, value in renamed.items():
        if key in values and values[key] != value:
            raise ValueError(f"{key}={values[key]!r} contradicts the older key's {value!r}")
    return {**values, **renamed}


def _alibi_factor(scaling: Mapping | None) -> float:
    if scaling is None:
        return 1.0
    if scaling.get("type") != "linear" or type(scaling.get("factor")) not in (int, float):
        raise ValueError(
            f"alibi_scaling={scaling!r} cannot be computed here; only a fixed factor can: "
            '{"type": "linear", "factor": 4.0}'
        )
    return float(scaling["factor"])
