"""What Hugging Face's clients read beside weights and tokenizer, kept from one form of a model to the next.

That is tokenizer_config.json with its pad token and special tokens, the chat template, generation_config.json, and
which id ends a text: files name it in up to four places, and one of them counts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btlm_jax import notices
from btlm_jax.data.store import PROMPT_BOS, TOKENIZER_CONFIG_FILE
from btlm_jax.hub.published import CONFIG_FILE, PublishedConfig, token_ids
from btlm_jax.storage.files import read_json_object, write_atomically
from btlm_jax.tokenizers.byte_level import read_tokenizer_config
from btlm_jax.tokenizers.special_tokens import NAMES, client_tokens, id_of, known_tokens
from btlm_jax.tokenizers.template_files import TEMPLATE_KEY, read_chat_templates, template_value
from btlm_jax.tokenizers.tokenizer import Tokenizer

GENERATION_CONFIG = "generation_config.json"
# Keys of tokenizer_config.json that follow from the tokenizer and from who writes the file; all others are kept.
_NOT_KEPT = frozenset((
    "add_bos_token", "add_prefix_space", "added_tokens_decoder", "auto_map", "backend", "bos_token_id",
    "clean_up_tokenization_spaces", "eos_token", "errors", "is_local", "legacy", "local_files_only", "merges_file",
    "model_max_length", "name_or_path", "processor_class", "sp_model_kwargs", "special_tokens_map_file",
    "tokenizer_class", "tokenizer_file", "transformers_version", "trust_remote_code", "use_fast", "vocab_file",
    PROMPT_BOS, TEMPLATE_KEY,
))  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """JSON values by key; empty for a model that comes without."""

    tokenizer_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # without what is _NOT_KEPT
    generation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chat_templates: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by name; "default" is the usual one
    bos_id: int = -1  # of config.json; -1: the end-of-text id

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ClientSettings:
        """Return what `dataclasses.asdict` gave.

        Raises:
          TypeError: it is something else.
        """
        settings = cls(**values)
        for field in dataclasses.fields(cls):
            value = getattr(settings, field.name)
            if not isinstance(value, int if field.name == "bos_id" else dict):
                raise TypeError(f"clients.{field.name} is a {type(value).__name__}")
        for name, template in settings.chat_templates.items():
            if not isinstance(template, str):
                raise TypeError(f"the chat template {name!r} is a {type(template).__name__}")
        return settings


NO_SETTINGS = ClientSettings()


def read_client_settings(directory: Path, *, config: Mapping[str, Any], tokenizer: Tokenizer | None) -> ClientSettings:
    """Read the settings of a Hugging Face directory; `config` is the contents of its config.json.

    Of a folder in which a run keeps its tokenizer `config` is its tokenizer_config.json, which has that of both.

    Raises:
      ValueError: a file is damaged.
    """
    kept, bos = read_tokenizer_config(directory), config.get("bos_token_id")
    if tokenizer is not None:
        known = known_tokens(kept, tokenizer, directory=directory)
        kept = {key: value for key, value in kept.items() if key not in NAMES and value is not None} | known
        bos = id_of(known.get("bos_token"), tokenizer) if bos is None else bos
    return ClientSettings(
        tokenizer_config={key: value for key, value in kept.items() if key not in _NOT_KEPT},
        generation_config=_generation_config(_read(directory / GENERATION_CONFIG)),
        chat_templates=read_chat_templates(directory),
        bos_id=bos[0] if isinstance(bos, list) and bos else bos if isinstance(bos, int) else -1,
    )


def keep_client_settings(
    directory: Path, settings: ClientSettings, *, tokenizer: Tokenizer, prompt_bos_id: int | None
) -> None:
    """Write a model's settings beside its tokenizer, where a run keeps it, as `read_client_settings` reads them there.

    `prompt_bos_id` stands in front of every prompt; None: nothing does.

    Raises:
      OSError: they cannot be written.
    """
    values = {**settings.tokenizer_config, PROMPT_BOS: prompt_bos_id}
    values |= client_tokens(tokenizer, settings.tokenizer_config, prompt_bos_id=prompt_bos_id)
    if settings.bos_id >= 0:
        values["bos_token_id"] = settings.bos_id
    if settings.chat_templates:
        values[TEMPLATE_KEY] = template_value(settings.chat_templates)
    directory.mkdir(exist_ok=True)
    for name, contents in ((TOKENIZER_CONFIG_FILE, values), (GENERATION_CONFIG, settings.generation_config)):
        write_atomically(directory / name, json.dumps(contents, indent=1))


def end_of_text_id(
    directory: Path,
    config: PublishedConfig,
    values: Mapping[str, Any],
    *,
    settings: ClientSettings,
    tokenizer: Tokenizer | None,
) -> int:
    """Return the one id that ends a text; `values` is the contents of config.json.

    That is where transformers stops: at an id of generation_config.json, or else at config.json's, or else at the
    tokenizer's. Of several ids it is the tokenizer's, or config.json's, or the first. What contradicts is said.

    Raises:
      ValueError: an id is outside the vocabulary, or there is none.
    """
    size = config.vocab_size
    named = {
        GENERATION_CONFIG: token_ids(
            settings.generation_config.get("eos_token_id"),
            name=f"{directory / GENERATION_CONFIG}: eos_token_id",
            vocab_size=size,
        ),
        CONFIG_FILE: token_ids(values.get("eos_token_id"), name="eos_token_id", vocab_size=size),
        TOKENIZER_CONFIG_FILE: _eos_of_tokenizer_config(directory, tokenizer),
        "its tokenizer": () if tokenizer is None else (tokenizer.eos_id,),
    }
    named = {place: ids for place, ids in named.items() if ids}
    if not named:
        if config.eos_token_id < size:  # the published default
            return config.eos_token_id
        raise ValueError(
            f"{directory / CONFIG_FILE} names no eos_token_id, and its default {config.eos_token_id} is outside of "
            f"vocab_size={size}; add the id that ends a text"
        )
    counting = next(iter(named.values()))
    wanted = [ids[0] for place, ids in reversed(named.items()) if ids[0] in counting]
    eos_id = wanted[0] if wanted else counting[0]
    if any(ids != (eos_id,) for ids in named.values()):
        said = ", ".join(f"{place} {', '.join(map(str, ids))}" for place, ids in named.items())
        notices.report(
            "eos-contradicts",
            f"{directory} names different end-of-text ids ({said}): {eos_id} is the one that ends a text here and in "
            "what is written; generation_config.json is kept as it is",
        )
    return eos_id


def _eos_of_tokenizer_config(directory: Path, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Return the id of the eos_token of tokenizer_config.json, if it is a token; a SentencePiece model has its own."""
    token = read_tokenizer_config(directory).get("eos_token")
    number = None if tokenizer is None else id_of(token, tokenizer)
    return () if number is None else (number,)


def pad_token_id(tokenizer: Tokenizer | None, settings: ClientSettings) -> int | None:
    """Return the id that fills up batches: of the model's own token, or else of one that no text has.

    None without a tokenizer.
    """
    if tokenizer is None:
        return None
    return id_of(client_tokens(tokenizer, settings.tokenizer_config, prompt_bos_id=None)["pad_token"], tokenizer)


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _generation_config(values: dict[str, Any]) -> dict[str, Any]:
    """Return what of a generation_config.json does not follow from config.json."""
    follows = {"_from_model_config", "transformers_version"}
    if values.get("_from_model_config"):
        follows |= {"bos_token_id", "eos_token_id", "pad_token_id"}
    return {key: value for key, value in values.items() if key not in follows}
