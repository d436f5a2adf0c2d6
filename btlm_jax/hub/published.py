"""The published form of a model: the fields of Hugging Face's config.json, and the names and shapes of its tensors.

Every format goes through this form: readers return it, writers take it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from btlm_jax.storage.files import read_json_object

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
    "initializer_range": 0.02, "mup_embeddings_scale": 1.0, "mup_output_alpha": 1.0, "mup_width_scale": 1.0,
    "mup_scale_qk_dot_by_d": False,
}  # fmt: skip
_DEFAULT_ID = 50256  # of bos_token_id and eos_token_id: GPT-2's end of text
_LARGEST_SIZE = 2**31 - 1  # of any dim; files of other formats hold 32 bits
_LARGEST_NUMBER = 1e30  # float32 holds it

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
    alibi_train_len: int = 0  # > 0: they are also divided by keys / this where there are more keys; 0: they are not
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
    return published_config_of(read_config_values(path, model_type=model_type), path=path)


def read_config_values(path: Path, *, model_type: str = BTLM) -> dict[str, Any]:
    """Return what a config.json of this type holds; raises as `read_published_config`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a Hugging Face checkpoint is a directory with a config.json")
    values = read_json_object(path)
    if values.get("model_type") != model_type:
        raise ValueError(
            f"{path} describes model_type={values.get('model_type')!r}, architectures={values.get('architectures')}; "
            f"only model_type {model_type!r} can be read here"
        )
    return values


def published_config_of(values: Mapping[str, Any], *, path: Path) -> PublishedConfig:
    """Return the contents of a config.json as a config; raises as `read_published_config`."""
    try:
        return _published_config(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def token_ids(value: Any, *, name: str, vocab_size: int) -> tuple[int, ...]:
    """Return an id of a config, such as eos_token_id, as the ids that it names: a number, a list of them, or null.

    Raises:
      ValueError: it is none of these, or an id is outside the vocabulary.
    """
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    for number in ids:
        if type(number) is not int or not 0 <= number < vocab_size:
            raise ValueError(f"{name}={value!r} must be an id from 0 to {vocab_size - 1}, as vocab_size={vocab_size}")
    return ids


def _published_config(values: Mapping[str, Any]) -> PublishedConfig:
    for key, (implemented, default) in _FIXED.items():
        if values.get(key, default) != implemented:
            raise ValueError(f"{key}={values.get(key, default)!r} cannot be computed here; only {implemented!r} can")
    values = _with_new_keys(values)
    fields = {key: values.get(key, default) for key, default in _DEFAULTS.items()}
    for key, value in fields.items():
        _check_value(key, value, type(_DEFAULTS[key]))
    fields["n_inner"] = values.get("n_inner") or 4 * fields["n_embd"]
    _check_value("n_inner", fields["n_inner"], int)
    factor, train_len = _alibi_scaling(values.get("alibi_scaling"))
    for key in ("bos_token_id", "eos_token_id"):
        ids = token_ids(values.get(key), name=key, vocab_size=fields["vocab_size"])
        fields[key] = ids[0] if ids else _DEFAULT_ID
    config = PublishedConfig(**fields, alibi_scaling=factor, alibi_train_len=train_len)
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}")
    return config


def _check_value(key: str, value: object, kind: type) -> None:
    if kind is bool:
        is_allowed, allowed = type(value) is bool, "true or false"
    elif kind is int:
        is_allowed = type(value) is int and 0 < value <= _LARGEST_SIZE
        allowed = f"a whole number from 1 to {_LARGEST_SIZE}"
    else:
        is_allowed, allowed = _is_positive(value), "a number above 0"
    if not is_allowed:
        raise ValueError(f"{key}={value!r} must be {allowed}")


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _LARGEST_NUMBER


def _with_new_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values under the newer keys.

    Raises:
      ValueError: an older key and its newer one are both present and differ, or an older one is no number.
    """
    renamed = {new: values[old] for old, new in _OLD_KEYS.items() if old in values}
    for key in ("width_scale", "output_logits_scale"):
        if key in values:
            _check_value(key, values[key], float)
    if "width_scale" in values:
        renamed["mup_width_scale"] = values["width_scale"]
    if "output_logits_scale" in values:  # the whole factor of the logits; the newer keys split it in two
        width = renamed.get("mup_width_scale", values.get("mup_width_scale", 1.0))
        _check_value("mup_width_scale", width, float)
        renamed["mup_output_alpha"] = values["output_logits_scale"] / width
    for key, value in renamed.items():
        if key in values and not _is_same(values[key], value):
            raise ValueError(f"{key}={values[key]!r} contradicts the older key's {value!r}")
    return {**values, **renamed}


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values of a config are equal, or are numbers that differ by the rounding of a quotient."""
    return one == other or (_is_positive(one) and _is_positive(other) and math.isclose(one, other, rel_tol=1e-12))


def _alibi_scaling(scaling: object) -> tuple[float, int]:
    """Return (factor, train_seq_len) of an alibi_scaling, of which the published code allows one."""
    if scaling is None:
        return 1.0, 0
    if isinstance(scaling, dict) and scaling.get("type") == "linear" and len(scaling) == 2:
        factor, train_len = scaling.get("factor"), scaling.get("train_seq_len")
        if isinstance(factor, (int, float)) and _is_positive(factor) and factor >= 1:
            return float(factor), 0
        if type(train_len) is int and 0 < train_len <= _LARGEST_SIZE:
            return 1.0, train_len
    raise ValueError(
        f"alibi_scaling={scaling!r} cannot be computed here; only null, a fixed factor of 1 or more, "
        '{"type": "linear", "factor": 4.0}, and the trained length, beyond which slopes are divided by '
        'keys / length, {"type": "linear", "train_seq_len": 8192}, can'
    )
