"""Write a GGUF file of llama.cpp's architecture "jais", which is BTLM under another name."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from btlm_jax import notices
from btlm_jax.convert.fold import FoldedTensors
from btlm_jax.convert.ggml import FILE_TYPES, encode, num_bytes, row_encoder, tensor_type
from btlm_jax.convert.gguf_vocabulary import Vocabulary, add_vocabulary
from btlm_jax.hub.client_files import GENERATION_CONFIG, ClientSettings
from btlm_jax.hub.gguf import import_gguf
from btlm_jax.hub.published import EMBEDDING, FINAL_NORM, PublishedConfig, Tensors, block_prefix, block_shapes
from btlm_jax.storage.files import naming
from btlm_jax.tokenizers.template_files import template_value

if TYPE_CHECKING:
    from gguf import GGUFWriter

_MAX_ALIBI_BIAS = 8.0  # slopes 2**(-8 i / n_head)
_QUANTIZATION_VERSION = 2  # of GGML's block formats
_TOKEN_EMBD, _OUTPUT = "token_embd.weight", "output.weight"

# Key of generation_config.json -> the writer's method and the type that it takes
_SAMPLING_KEYS = {
    "temperature": ("add_sampling_temp", float),
    "top_k": ("add_sampling_top_k", int),
    "top_p": ("add_sampling_top_p", float),
    "min_p": ("add_sampling_min_p", float),
    "repetition_penalty": ("add_sampling_penalty_repeat", float),
}

# Published name, after `block_prefix` -> GGUF name, after "blk.<layer>."; weight or bias follows.
_BLOCK_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_fc2": "ffn_gate",
    "mlp.c_proj": "ffn_down",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """A tensor of the file: `scale` times a published one, transposed if that is a Conv1D matrix [in, out]."""

    name: str
    published: str
    shape: tuple[int, ...]  # row-major; GGUF stores it reversed
    type_name: str
    transposed: bool
    scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFSettings:
    """What a file tells its readers beside the network and the vocabulary."""

    name: str
    context_length: int  # llama.cpp's server does not go beyond it, though ALiBi does
    pad_token_id: int | None
    clients: ClientSettings


def write_gguf(
    path: Path,
    *,
    config: PublishedConfig,
    tensors: Tensors,
    tokenizer: Vocabulary | None,
    settings: GGUFSettings,
    file_type: str,
    pad_ffn: int,
    report: Callable[[str], None],
) -> None:
    """Write a model to `path`, one tensor in memory at a time; `tokenizer` is None for a model without one.

    n_inner is zero-padded to a multiple of `pad_ffn`, which must be a multiple of the file type's block size.

    The multipliers are folded into the weights: mup_embeddings_scale into token_embd, mup_output_alpha *
    mup_width_scale into output (which is then untied), sqrt(head_dim) into q where the scores are divided by it.
    `report` gets each tensor's GGUF name before it is written.

    Raises:
      ValueError: the model cannot be expressed, a value is not finite or too large, or a library is missing.
      OSError: the file cannot be written; it may be incomplete then, so `path` is a temporary name of the caller.
    """
    folded = FoldedTensors(tensors, config, pad_ffn=pad_ffn)
    entries = list(gguf_tensors(folded.config, file_type=file_type))
    for type_name in {entry.type_name for entry in entries}:
        row_encoder(type_name)  # raises for a missing library now, not after an hour
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, "jais")
    with naming(path), contextlib.closing(writer):  # on a full disk closing fails too
        _add_keys(writer, folded.config, file_type=file_type)
        add_vocabulary(writer, tokenizer, vocab_size=config.vocab_size)
        _add_settings(writer, settings, eos_id=config.eos_token_id, has_tokenizer=tokenizer is not None)
        for entry in entries:
            writer.add_tensor_info(
                entry.name, entry.shape, np.dtype(np.float32), num_bytes(entry.shape, entry.type_name),
                raw_dtype=gguf.GGMLQuantizationType[entry.type_name],
            )  # fmt: skip
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            report(entry.name)
            writer.write_tensor_data(_encoded(folded, entry))
    _sync(path)


def gguf_tensors(config: PublishedConfig, *, file_type: str) -> Iterator[GGUFTensor]:
    """Yield the tensors of a file in their order, for a folded model."""
    D, V = config.n_embd, config.vocab_size

    def entry(name: str, published: str, shape: tuple[int, ...], scale: float) -> GGUFTensor:
        transposed = len(shape) == 2 and published != EMBEDDING
        shape = shape[::-1] if transposed else shape
        type_name = tensor_type(name, shape, file_type=file_type, num_layers=config.n_layer)
        return GGUFTensor(
            name=name, published=published, shape=shape, type_name=type_name, transposed=transposed, scale=scale
        )

    yield entry(_TOKEN_EMBD, EMBEDDING, (V, D), config.mup_embeddings_scale)
    for layer in range(config.n_layer):
        for published, shape in block_shapes(config).items():
            module, kind = published.rsplit(".", 1)
            yield entry(f"blk.{layer}.{_BLOCK_NAMES[module]}.{kind}", block_prefix(layer) + published, shape, 1.0)
    for kind in ("weight", "bias"):
        yield entry(f"output_norm.{kind}", f"{FINAL_NORM}.{kind}", (D,), 1.0)
    yield entry(_OUTPUT, EMBEDDING, (V, D), config.output_scale)


def _encoded(folded: FoldedTensors, entry: GGUFTensor) -> np.ndarray:
    array = folded.read(entry.published)
    try:
        return encode(array.T if entry.transposed else array, entry.type_name, scale=entry.scale)
    except ValueError as error:
        raise ValueError(f"tensor {entry.published}: {error}") from error


def _add_keys(writer: GGUFWriter, config: PublishedConfig, *, file_type: str) -> None:
    gguf = import_gguf()
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[file_type].code])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.n_layer)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_max_alibi_bias(_MAX_ALIBI_BIAS)


def _add_settings(writer: GGUFWriter, settings: GGUFSettings, *, eos_id: int, has_tokenizer: bool) -> None:
    """Add the name, the length, and what generation_config.json and the chat template have a key for."""
    writer.add_name(settings.name)
    writer.add_context_length(settings.context_length)
    generation = settings.clients.generation_config
    for key, (add, kind) in _SAMPLING_KEYS.items():
        value = generation.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**31:
            getattr(writer, add)(kind(value))
        elif value is not None:
            notices.report(
                "config-keys-dropped", f"{key}={value!r} of {GENERATION_CONFIG} has no place in GGUF and is left out"
            )
    if not has_tokenizer:
        return
    if settings.pad_token_id is not None:
        writer.add_pad_token_id(settings.pad_token_id)
    eos_ids = generation.get("eos_token_id")
    more = [other for other in dict.fromkeys(eos_ids) if other != eos_id] if isinstance(eos_ids, list) else []
    if more:
        writer.add_eot_token_id(more[0])  # there is a place for one more
    if more[1:]:
        named = ", ".join(map(str, more[1:]))
        notices.report(
            "config-keys-dropped",
            f"eos_token_id={eos_ids} of {GENERATION_CONFIG}: GGUF has a place for two, and {named} is left out",
            count=len(more[1:]),
        )
    if templates := settings.clients.chat_templates:
        if settings.clients.tokenizer_config.get("bos_token", "") is None:  # llama.cpp has some token always
            templates = {
                name: f"{{%- set bos_token = '' %}}{text}" if "bos_token" in text else text
                for name, text in templates.items()
            }
        writer.add_chat_template(template_value(templates))


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
