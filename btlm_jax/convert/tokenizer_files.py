"""Write a tokenizer for Hugging Face, and prove before the files get their names that they give the same ids.

Byte-level BPE is written as it is; SentencePiece as its model file and a tokenizer.json made from it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from btlm_jax import install_command, notices
from btlm_jax.convert.sentencepiece_to_hf import to_hf_tokenizer
from btlm_jax.hub.client_files import NO_SETTINGS, ClientSettings
from btlm_jax.storage.files import write_atomically
from btlm_jax.tokenizers.byte_level import (
    MERGES_FILE,
    VOCAB_FILE,
    ByteLevelTokenizer,
    JsonTokenizer,
    read_byte_level,
)
from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer
from btlm_jax.tokenizers.sentencepiece_json import SentencePieceJsonTokenizer
from btlm_jax.tokenizers.sentencepiece_proto import CONTROL, UNKNOWN, USER_DEFINED, parse_model
from btlm_jax.tokenizers.special_tokens import client_tokens
from btlm_jax.tokenizers.template_files import TEMPLATE_KEY, template_value
from btlm_jax.tokenizers.tokenizer import Tokenizer

# There is no special_tokens_map.json: it would only repeat the tokens of tokenizer_config.json, which it overrides.
TOKENIZER_JSON, CONFIG_JSON = "tokenizer.json", "tokenizer_config.json"
GPT2_CLASS, PLAIN_CLASS = "GPT2Tokenizer", "PreTrainedTokenizerFast"
PROBES = (
    "",
    " ",
    "   ",
    "\n",
    "\n\n \n",
    "Hello world",
    " a space in front, two behind  ",
    "It's what we've said: they'll come at 10:45, I'd guess (or 1,234.5%)... won't they?!",
    "def area(radius):\n    if radius < 0:\n        raise ValueError(radius)\n\treturn 3.14 * radius ** 2  # tab\n",
    '{"key": [1, 2.5e-3, null], "path": "C:\\\\dir"}\r\n<a href="x">b</a>',
    "\u00c9t\u00e9, na\u00efve, Stra\u00dfe, \u0141\u00f3d\u017a, \u0130stanbul; e\u0301 in two parts",
    "\u0413\u0434\u0435 \u043a\u043d\u0438\u0433\u0430? \u03a0\u03bf\u03cd \u03b5\u03af\u03bd\u03b1\u03b9;",
    "\u6570\u5b66\u306f\u3001\u7f8e\u3057\u3044\u3002 \uc218\ud559 \u0917\u0923\u093f\u0924",
    "\u0627\u0644\u0631\u064a\u0627\u0636\u064a\u0627\u062a \u05de\u05ea\u05de\u05d8\u05d9\u05e7\u05d4",
    "\U0001f600\U0001f469\u200d\U0001f4bb\U0001f1e8\U0001f1ed\u2764\ufe0f",
    "\x00\x01\x07\x0b\x1f\x7f\x85\xa0\u2028\ufeff\ufffd\ufffe",
    "\uff21\ufb01\u00bd\u2460\u00b2",
    "a" * 70 + " " * 33 + "=" * 65 + "\n" * 17 + "ab" * 40 + "0" * 50,
    "<0x41><0x0A><s></s><unk><pad><|endoftext|>",
)
_NUM_RANDOM = 200  # texts of random tokens, which cover the whole vocabulary
_MAX_NAMES = 32  # added tokens, each of which is tried before and after each other


def write_tokenizer_files(
    directory: Path,
    tokenizer: Tokenizer,
    *,
    model_max_length: int,
    prompt_bos_id: int | None = None,
    clients: ClientSettings = NO_SETTINGS,
    more_probes: Sequence[str] = (),
) -> list[Path]:
    """Write the files with which `AutoTokenizer.from_pretrained(directory)` gives the same ids offline; return them.

    `prompt_bos_id` is the id that clients put in front of every prompt, or None for nothing.

    Raises:
      ValueError: the tokenizer cannot be expressed, or the files give other ids or other text; none is kept.
    """
    if model_max_length < 1:
        raise ValueError(f"model_max_length={model_max_length} must be at least 1")
    with tempfile.TemporaryDirectory(dir=directory, prefix=".tokenizer-") as partial:
        files = _files(tokenizer, model_max_length=model_max_length, prompt_bos_id=prompt_bos_id, clients=clients)
        for name, contents in files.items():
            write_atomically(Path(partial) / name, contents)
        prove_tokenizer_files(Path(partial), tokenizer, prompt_bos_id=prompt_bos_id, more_probes=more_probes)
        paths = [directory / path.name for path in sorted(Path(partial).iterdir())]
        for path in paths:
            os.replace(Path(partial) / path.name, path)
    return paths


def prove_tokenizer_files(
    directory: Path, tokenizer: Tokenizer, *, prompt_bos_id: int | None = None, more_probes: Sequence[str] = ()
) -> None:
    """Compare the files in `directory` with the tokenizer, ids and decoded text, in every library that reads them here.

    Raises:
      ValueError: they differ; it names the text and the first ids that do.
    """
    probes = [*probe_texts(tokenizer), *more_probes]
    eos_token, unk_id = tokenizer.token(tokenizer.eos_id), _unk_id(tokenizer)
    for client, (encode, decode) in _clients(directory, tokenizer):
        for text in probes:
            expected, actual = tokenizer.encode(text), encode(text)
            if expected != actual:
                raise ValueError(
                    f"{client} makes other ids than the tokenizer: {first_difference(text, expected, actual)}"
                )
            # an unknown character decodes to nothing in one library and to a replacement in the other
            if unk_id not in expected and decode(expected) != tokenizer.decode(expected):
                raise ValueError(
                    f"{client} turns the ids of {_shorten(text)} into {_shorten(decode(expected))}, "
                    f"not {_shorten(tokenizer.decode(expected))}"
                )
    plain = _tokenizer_json(directory)
    eos_ids, eos_text = plain.encode(eos_token, add_special_tokens=False).ids, plain.decode([tokenizer.eos_id])
    if eos_ids != [tokenizer.eos_id] or eos_text:
        raise ValueError(
            f"{TOKENIZER_JSON} reads {eos_token!r} as the ids {eos_ids}, and writes its id as {eos_text!r}; "
            f"it must be [{tokenizer.eos_id}] and nothing"
        )
    if _has_transformers():
        auto = _auto_tokenizer(directory)
        eos_ids = auto(eos_token, add_special_tokens=False)["input_ids"]
        if eos_ids != [tokenizer.eos_id] or auto.eos_token_id != tokenizer.eos_id or len(auto) != tokenizer.vocab_size:
            raise ValueError(
                f"AutoTokenizer has eos_token_id={auto.eos_token_id}, {eos_token!r} -> {eos_ids}, "
                f"{len(auto)} tokens; the tokenizer has eos_id={tokenizer.eos_id}, {tokenizer.vocab_size} tokens"
            )
    else:
        notices.report(
            "code-not-run",
            f"transformers is not installed ({install_command('hf')}), so its tokenizer was not asked for ids",
        )
    for client, encode in _prompt_clients(directory):
        for text in _prompts(tokenizer):
            expected = [*([] if prompt_bos_id is None else [prompt_bos_id]), *tokenizer.encode_prompt(text)]
            if encode(text) != expected:
                raise ValueError(
                    f"{client} makes other ids of a prompt: {first_difference(text, expected, encode(text))}"
                )


def probe_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield difficult texts, texts of random tokens, and texts with the names of special and user-defined pieces."""
    yield from PROBES
    generator = random.Random(0)
    for _ in range(_NUM_RANDOM):
        yield tokenizer.decode([generator.randrange(tokenizer.vocab_size) for _ in range(30)])
    names = _special_names(tokenizer)
    if isinstance(tokenizer, JsonTokenizer):
        names += [token.content for token in tokenizer.added_tokens.values()][:_MAX_NAMES]
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = parse_model(tokenizer.contents)
        names += [
            model.pieces[number] for kind in (CONTROL, UNKNOWN, USER_DEFINED) for number in model.ids_of_type(kind)
        ]
    for name in names:
        yield f"{name}a{name} {name}{name} b {name}"
        yield from (f"{name}{other}" for other in names)  # a match may overlap both


def first_difference(text: str, expected: list[int], actual: list[int]) -> str:
    """Describe the first difference of two lists of ids of a text."""
    pairs = enumerate(zip(expected, actual, strict=False))
    at = next((at for at, (a, b) in pairs if a != b), min(len(expected), len(actual)))
    return f"for {_shorten(text)} from the id at {at} on {actual[at : at + 5]}, not {expected[at : at + 5]}"


def _files(
    tokenizer: Tokenizer, *, model_max_length: int, prompt_bos_id: int | None, clients: ClientSettings
) -> dict[str, str | bytes]:
    tokens = client_tokens(tokenizer, clients.tokenizer_config, prompt_bos_id=prompt_bos_id)
    config: dict[str, Any] = {
        **tokens,
        **{key: value for key, value in clients.tokenizer_config.items() if key not in tokens},
        "add_bos_token": prompt_bos_id is not None,
        "model_max_length": model_max_length,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": PLAIN_CLASS,
    }
    if templates := clients.chat_templates:
        config[TEMPLATE_KEY] = template_value(templates)
    files: dict[str, str | bytes] = {}
    bos = {} if prompt_bos_id is None else {tokens["bos_token"]: prompt_bos_id}
    if isinstance(tokenizer, SentencePieceTokenizer):
        converted = to_hf_tokenizer(parse_model(tokenizer.contents), unk_id=_unk_id(tokenizer))
        files |= {
            TOKENIZER_JSON: _tokenizer_json_for_clients(converted.to_str(), bos),
            tokenizer.stored_file: tokenizer.contents,
        }
    elif isinstance(tokenizer, JsonTokenizer):
        files[TOKENIZER_JSON] = _tokenizer_json_for_clients(tokenizer.json, bos)
        # vocab.json and merges.txt cannot hold another pattern, nor added tokens
        if isinstance(tokenizer, ByteLevelTokenizer) and tokenizer.has_gpt2_rules:
            config["tokenizer_class"] = GPT2_CLASS
            files[VOCAB_FILE] = json.dumps({token: number for number, token in enumerate(tokenizer.tokens)})
            files[MERGES_FILE] = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in tokenizer.merges)
    else:
        raise ValueError(f"a tokenizer of kind {tokenizer.kind!r} cannot be written for Hugging Face")
    return files | {CONFIG_JSON: _json(config)}


def _special_names(tokenizer: Tokenizer) -> list[str]:
    """Return the tokenizer's own special tokens, each once."""
    return list(dict.fromkeys(client_tokens(tokenizer, {}, prompt_bos_id=None).values()))


def _unk_id(tokenizer: Tokenizer) -> int:
    if isinstance(tokenizer, SentencePieceJsonTokenizer):
        return tokenizer.token_id(tokenizer.unk_token) or 0
    return tokenizer.unk_id if isinstance(tokenizer, SentencePieceTokenizer) else -1  # byte-level BPE knows all bytes


def _tokenizer_json_for_clients(contents: str, bos: dict[str, int]) -> str:
    """Say what stands in front of a text, and write merges as "a b", as all versions of tokenizers read them."""
    body = json.loads(contents)
    body["post_processor"] = _post_processor(bos)
    merges = body["model"].get("merges", [])
    if merges and not any(" " in part for pair in merges for part in pair):
        body["model"]["merges"] = [" ".join(pair) for pair in merges]
    return json.dumps(body, ensure_ascii=False)


def _post_processor(bos: dict[str, int]) -> dict:
    """Return the tokenizers library's template that puts a token in front of a text and of each of two.

    `bos` is its id by its name, or empty.
    """
    texts = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    before = [[{"SpecialToken": {"id": name, "type_id": number}} for name in bos] for number in (0, 1)]
    return {
        "type": "TemplateProcessing",
        "single": [*before[0], texts[0]],
        "pair": [*before[0], texts[0], *before[1], texts[1]],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in bos.items()},
    }


Client = tuple[Callable[[str], list[int]], Callable[[list[int]], str]]


def _clients(directory: Path, tokenizer: Tokenizer) -> Iterator[tuple[str, Client]]:
    """Yield (name, (encode, decode)) of every library that reads the files; none parses special tokens in a text."""
    plain = _tokenizer_json(directory)
    plain.encode_special_tokens = True
    yield TOKENIZER_JSON, (lambda text: plain.encode(text, add_special_tokens=False).ids, plain.decode)
    if (directory / VOCAB_FILE).is_file():
        with tempfile.TemporaryDirectory() as without_json:
            for name in (VOCAB_FILE, MERGES_FILE, CONFIG_JSON):
                (Path(without_json) / name).symlink_to((directory / name).resolve())
            pair = read_byte_level(Path(without_json))
        yield f"{VOCAB_FILE} with {MERGES_FILE}", (pair.encode, pair.decode)
    if _has_transformers():
        auto = _auto_tokenizer(directory)
        yield (
            "AutoTokenizer",
            (
                lambda text: auto(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
                    "input_ids"
                ],
                lambda ids: auto.decode(ids, skip_special_tokens=True),
            ),
        )


def _prompt_clients(directory: Path) -> Iterator[tuple[str, Callable[[str], list[int]]]]:
    """Yield (name, encode) of every library that reads the files, with the settings that prompts are encoded with."""
    plain = _tokenizer_json(directory)
    yield TOKENIZER_JSON, lambda text: plain.encode(text).ids
    if _has_transformers():
        auto = _auto_tokenizer(directory)
        yield "AutoTokenizer", lambda text: auto(text, verbose=False)["input_ids"]


def _prompts(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield prompts, some with the names of special tokens, which clients read as their ids there."""
    yield from PROBES
    for name in _special_names(tokenizer):
        yield f"a{name} b{name}{name}\n{name}"


def _tokenizer_json(directory: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(directory / TOKENIZER_JSON))


def _has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def _auto_tokenizer(directory: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:120] + "...")


def _json(values: dict) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
