"""The special tokens that clients know by name, as bos_token: those of a directory's files, and those of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btlm_jax import notices
from btlm_jax.tokenizers.byte_level import read_tokenizer_config
from btlm_jax.tokenizers.tokenizer import Tokenizer

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")  # of tokens without a name; the latter may be an object


def client_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], *, prompt_bos_id: int | None) -> dict[str, Any]:
    """Return the special tokens of a model's export by name: as in a tokenizer_config.json, null for none.

    Those of `config`, the model's own tokenizer_config.json, and for what it does not name: the end of text for
    bos_token, where a tokenizer has nothing else, and the spare token for unk_token and pad_token. eos_token is always
    the tokenizer's, and bos_token what stands in front of every prompt, if something does.
    """
    bos_id = getattr(tokenizer, "bos_id", -1)  # of SentencePiece
    tokens: dict[str, Any] = {
        "bos_token": tokenizer.token(bos_id if bos_id >= 0 else tokenizer.eos_id),
        "unk_token": tokenizer.spare_token,
        **{name: config[name] for name in NAMES if name in config},
    }
    if tokens.get("pad_token") is None:
        tokens["pad_token"] = tokenizer.spare_token
    if prompt_bos_id is not None:
        tokens["bos_token"] = tokenizer.token(prompt_bos_id)
    return tokens | {"eos_token": tokenizer.token(tokenizer.eos_id)}


def known_tokens(config: Mapping[str, Any], tokenizer: Tokenizer, *, directory: Path) -> dict[str, Any]:
    """Return the special tokens of a tokenizer_config.json, named or in lists; say which its tokenizer has not.

    Raises:
      ValueError: one is neither a text nor an object with a text.
    """
    named = {name: config[name] for name in NAMES if name in config}
    for name, token in named.items():
        if token is not None and text_of(token) is None:
            raise ValueError(f"{directory}: {name}={token!r} of its files must be a token's text")
    lists = {name: config[name] for name in _LISTS if isinstance(config.get(name), list)}
    every = [*named.items(), *((name, token) for name, tokens in lists.items() for token in tokens)]
    unknown = [(name, token) for name, token in every if token is not None and id_of(token, tokenizer) is None]
    if unknown:
        notices.report(
            "config-keys-dropped",
            f"{directory} names tokens that its tokenizer has not, which are dropped: "
            + ", ".join(f"{name} {text_of(token)!r}" for name, token in unknown),
            count=len(unknown),
        )
    kept = {name: [token for token in tokens if (name, token) not in unknown] for name, tokens in lists.items()}
    return {name: token for name, token in named.items() if (name, token) not in unknown} | kept


def read_variables(directory: Path, tokenizer: Tokenizer, *, prompt_bos_id: int | None) -> dict[str, str]:
    """Return the names of special tokens by which templates call them, and the tokens' texts.

    They are those of an export of a model with a directory's tokenizer; a name that stands for none is left out.

    Raises:
      ValueError: a file is damaged.
    """
    known = known_tokens(read_tokenizer_config(directory), tokenizer, directory=directory)
    texts = {
        name: text_of(token) for name, token in client_tokens(tokenizer, known, prompt_bos_id=prompt_bos_id).items()
    }
    return {name: text for name, text in texts.items() if text}


def text_of(token: Any) -> str | None:
    """Return the text of a token of tokenizer_config.json, or None."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def id_of(token: Any, tokenizer: Tokenizer) -> int | None:
    """Return the id of a token of tokenizer_config.json, or None."""
    text = text_of(token)
    return None if text is None else tokenizer.token_id(text)
