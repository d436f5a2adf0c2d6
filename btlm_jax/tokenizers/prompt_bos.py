"""The ids of a prompt, and what a Hugging Face directory's tokenizer files put in front of it: nothing, or one id."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from btlm_jax import notices
from btlm_jax.data.store import PROMPT_BOS
from btlm_jax.data.store import TOKENIZER_CONFIG_FILE as CONFIG_FILE
from btlm_jax.tokenizers.byte_level import END_OF_TEXT, STORED_FILE, naming_library_errors, read_tokenizer_config
from btlm_jax.tokenizers.tokenizer import Tokenizer


def read_prompt_bos(directory: Path, tokenizer: Tokenizer) -> int | None:
    """Return the id that a directory's files put in front of every text, or None for nothing.

    As transformers 5 reads them: the post-processor of tokenizer.json decides where there is that file, whatever
    tokenizer_config.json says; otherwise add_bos_token of the latter does, false if it is missing. Where a run keeps
    a tokenizer, PROMPT_BOS beside it decides, which runs of earlier versions lack: the tokenizer's file may be as
    somebody else wrote it.

    Raises:
      ValueError: a file is damaged, or several ids would be put there.
    """
    config = read_tokenizer_config(directory)
    if PROMPT_BOS in config:
        return _kept_id(config[PROMPT_BOS], tokenizer, path=directory / CONFIG_FILE)
    says_bos = config.get("add_bos_token", False)
    if not isinstance(says_bos, bool):
        raise ValueError(f"{directory / CONFIG_FILE}: add_bos_token={says_bos!r} is not true or false")
    path = directory / STORED_FILE
    if not path.is_file():
        return _bos_id(directory / CONFIG_FILE, config, tokenizer) if says_bos else None
    before, after = _ids_around(path)
    if len(before) > 1 or any(token >= tokenizer.vocab_size for token in before):
        raise ValueError(
            f"{path} puts the ids {before} in front of every text; only one id of the vocabulary can be kept here: "
            "change its post_processor"
        )
    if after:
        notices.report("prompt-end-ignored", f"{path} puts the ids {after} after every text; here they are left out")
    if "add_bos_token" in config and says_bos != bool(before):
        notices.report(
            "add-bos-token-ignored",
            f"{directory / CONFIG_FILE} says add_bos_token={json.dumps(says_bos)}, but {path.name} puts "
            f"{before or 'nothing'} in front of a text, and that counts",
        )
    return before[0] if before else None


def prompt_ids(text: str, *, tokenizer: Tokenizer, bos_id: int | None) -> list[int]:
    """Return the ids that a model continues; clients of its exports make the same ones.

    Nothing is put in front of a text but `bos_id`, where the model's tokenizer files ask for one; those of models
    trained here on text do not. Without any id the end-of-text id stands alone: it precedes every document in
    training. The name of a special token in a text stands for its id.
    """
    ids = tokenizer.encode_prompt(text)
    return ([] if bos_id is None else [bos_id]) + ids or [tokenizer.eos_id]


def _ids_around(path: Path) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer.json puts before and after a text."""
    contents = path.read_bytes()
    with naming_library_errors(path):
        tokenizer = tokenizers.Tokenizer.from_str(contents.decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        inner, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    for start in range(len(whole) - len(inner) + 1):
        if inner and whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    raise ValueError(f"{path} makes the ids {inner} of the text 'a', and {whole} with its post_processor")


def _kept_id(value: object, tokenizer: Tokenizer, *, path: Path) -> int | None:
    if value is not None and not (type(value) is int and 0 <= value < tokenizer.vocab_size):
        raise ValueError(f"{path} is damaged: {PROMPT_BOS}={value!r} is none of the {tokenizer.vocab_size:,} ids")
    return value


def _bos_id(path: Path, config: dict, tokenizer: Tokenizer) -> int:
    """Return the id of the bos_token of tokenizer_config.json; GPT-2's is its default."""
    token = config.get("bos_token") or END_OF_TEXT
    name = token.get("content") if isinstance(token, dict) else token
    ids = tokenizer.encode_prompt(name) if isinstance(name, str) else []
    if len(ids) != 1:
        raise ValueError(f"{path} says add_bos_token=true, but its bos_token={token!r} is no token of the vocabulary")
    return ids[0]
