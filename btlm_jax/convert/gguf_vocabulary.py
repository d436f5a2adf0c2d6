"""Tokenizers in the form that GGUF stores, such that llama.cpp encodes texts to the same ids."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from btlm_jax.convert.sentencepiece_to_hf import model_symbols
from btlm_jax.tokenizers.byte_level import ByteLevelTokenizer, JsonTokenizer
from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer
from btlm_jax.tokenizers.sentencepiece_json import SentencePieceJsonTokenizer
from btlm_jax.tokenizers.sentencepiece_proto import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    parse_model,
)
from btlm_jax.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

_PADDING_SCORE = -10000.0
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteLevelVocabulary:
    """Byte-level BPE with GPT-2's pattern of words."""

    tokens: tuple[str, ...]  # by id, in GPT-2's printable characters for bytes
    merges: tuple[tuple[str, str], ...]  # in order of priority
    special_ids: frozenset[int]  # ids that encoding a text never gives
    symbol_ids: frozenset[int]  # of tokens at which texts are split before words are
    bos_id: int
    add_bos: bool  # bos_id is put in front of every text
    eos_id: int

    def __post_init__(self):
        _check_ids(self, num_tokens=len(self.tokens))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePieceVocabulary:
    """A SentencePiece byte-pair model with byte fallback and without normalization."""

    pieces: tuple[str, ...]  # by id
    scores: tuple[float, ...]
    types: tuple[int, ...]  # SentencePiece's numbers, which GGUF uses too
    add_dummy_prefix: bool  # a space is put before the text
    bos_id: int
    add_bos: bool  # bos_id is put in front of every text
    eos_id: int
    unk_id: int

    def __post_init__(self):
        _check_ids(self, num_tokens=len(self.pieces))
        if not len(self.pieces) == len(self.scores) == len(self.types):
            raise ValueError(
                f"{len(self.pieces)} pieces, {len(self.scores)} scores and {len(self.types)} types must be as many"
            )
        if self.types.count(BYTE) != 256:
            raise ValueError(
                f"this SentencePiece model has {self.types.count(BYTE)} byte pieces, not 256; llama.cpp stops at "
                "characters that it does not know, so a model without byte fallback cannot be written as GGUF"
            )


Vocabulary = ByteLevelVocabulary | SentencePieceVocabulary


def vocabulary_of(tokenizer: Tokenizer, *, prompt_bos_id: int | None = None) -> Vocabulary:
    """Return a tokenizer as GGUF stores it; without a begin-of-text token, bos_id is the end-of-text token's id.

    `prompt_bos_id` is the id that stands in front of every prompt, or None for nothing.

    Raises:
      ValueError: llama.cpp would encode some texts to other ids.
    """
    if isinstance(tokenizer, ByteLevelTokenizer):
        if not tokenizer.has_gpt2_pattern:
            raise ValueError(
                "this tokenizer cuts words by another pattern than GPT-2's; llama.cpp would make other ids, so it "
                "cannot be written as GGUF"
            )
        if not tokenizer.merges:
            raise ValueError(
                "this tokenizer has no merges, without which llama.cpp reads no byte-level tokenizer; it cannot be "
                "written as GGUF"
            )
        return ByteLevelVocabulary(
            tokens=tuple(tokenizer.tokens),
            merges=tuple(tokenizer.merges),
            special_ids=frozenset(tokenizer.special_ids),
            symbol_ids=frozenset(_symbol_ids(tokenizer)),
            bos_id=tokenizer.eos_id if prompt_bos_id is None else prompt_bos_id,
            add_bos=prompt_bos_id is not None,
            eos_id=tokenizer.eos_id,
        )
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece_vocabulary(tokenizer, prompt_bos_id=prompt_bos_id)
    if isinstance(tokenizer, SentencePieceJsonTokenizer):
        return _sentencepiece_json_vocabulary(tokenizer, prompt_bos_id=prompt_bos_id)
    raise ValueError(f"a tokenizer of kind {tokenizer.kind!r} cannot be written as GGUF")


def _symbol_ids(tokenizer: JsonTokenizer) -> list[int]:
    """Return the ids of added tokens that texts contain; llama.cpp finds them anywhere in a text."""
    symbols = {number: token for number, token in tokenizer.added_tokens.items() if not token.special}
    for token in symbols.values():
        if token.single_word or token.lstrip or token.rstrip:
            raise ValueError(
                f"the added token {token.content!r} is found only between words or takes spaces with it, which "
                "llama.cpp does not do; it cannot be written as GGUF"
            )
    return sorted(symbols)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary | None, *, vocab_size: int) -> None:
    """Add the tokenizer's keys; ids without a token are named [PADi], or [[PADi]]. None is a model without a tokenizer.

    Raises:
      ValueError: there are more tokens than rows of the embedding.
    """
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    tokens = vocabulary.tokens if isinstance(vocabulary, ByteLevelVocabulary) else vocabulary.pieces
    missing = vocab_size - len(tokens)
    if missing < 0:
        raise ValueError(f"the tokenizer has {len(tokens)} tokens, but the model only {vocab_size} embeddings")
    names = set(tokens)
    padding = [f"[PAD{number}]" for number in range(len(tokens), vocab_size)]
    while any(name in names for name in padding):  # llama.cpp reads no file with two equal names
        padding = [f"[{name}]" for name in padding]
    types: Sequence[int]
    if isinstance(vocabulary, ByteLevelVocabulary):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        kinds = dict.fromkeys(vocabulary.symbol_ids, USER_DEFINED) | dict.fromkeys(vocabulary.special_ids, CONTROL)
        types = [kinds.get(number, NORMAL) for number in range(len(tokens))]
        writer.add_token_merges([" ".join(pair) for pair in vocabulary.merges])
    else:
        writer.add_tokenizer_model("llama")
        types = vocabulary.types
        writer.add_token_scores([*vocabulary.scores, *[_PADDING_SCORE] * missing])
        writer.add_unk_token_id(vocabulary.unk_id)
        writer.add_add_space_prefix(vocabulary.add_dummy_prefix)
    writer.add_token_list([*tokens, *padding])
    writer.add_token_types([*types, *[UNUSED] * missing])
    writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_eos_token_id(vocabulary.eos_id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)


def _sentencepiece_vocabulary(
    tokenizer: SentencePieceTokenizer, *, prompt_bos_id: int | None
) -> SentencePieceVocabulary:
    """Return a SentencePiece model as GGUF stores it, with the `model_symbols` as ordinary pieces.

    llama.cpp splits texts at user-defined pieces, and adds the space of add_dummy_prefix after each of them, too
    (llama-vocab.cpp, is_prev_special).
    """
    model = parse_model(tokenizer.contents)
    in_model = model_symbols(model)
    reasons = {
        "it is not a byte-pair model (model_type='bpe')": model.model_type != BPE,
        "it rewrites characters (normalization_rule_name is not 'identity')": model.rewrites_characters,
        "it removes extra spaces (remove_extra_whitespaces)": model.remove_extra_whitespaces,
        "its spaces follow the word (treat_whitespace_as_suffix)": model.whitespace_as_suffix,
        "it keeps spaces as they are (escape_whitespaces=false)": not model.escape_whitespaces,
        "it puts a space in front of the text (add_dummy_prefix) and has user-defined symbols of several characters, "
        "or whose character is in other pieces; llama.cpp puts a space after each of them": (
            model.add_dummy_prefix and set(model.ids_of_type(USER_DEFINED)) - in_model
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"this SentencePiece model cannot be written as GGUF: {reason}, so llama.cpp would make other ids"
            )
    own_bos_id = tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id
    return SentencePieceVocabulary(
        pieces=model.pieces,
        scores=model.scores,
        types=tuple(NORMAL if number in in_model else kind for number, kind in enumerate(model.types)),
        add_dummy_prefix=model.add_dummy_prefix,
        bos_id=own_bos_id if prompt_bos_id is None else prompt_bos_id,
        add_bos=prompt_bos_id is not None,
        eos_id=tokenizer.eos_id,
        unk_id=tokenizer.unk_id,
    )


def _sentencepiece_json_vocabulary(
    tokenizer: SentencePieceJsonTokenizer, *, prompt_bos_id: int | None
) -> SentencePieceVocabulary:
    """Return a tokenizer.json of SentencePiece's pieces as GGUF stores it.

    A piece's score is the place of its first merge: llama.cpp merges the pair of the best score, the library the pair
    that comes first.
    """
    body = json.loads(tokenizer.json)
    symbols = set(_symbol_ids(tokenizer))
    reasons = {
        "it is not a byte-pair model": not tokenizer.is_bpe,
        "it rewrites texts by more than a space in front": _rewrites(body["normalizer"]),
        "it puts a space in front of the text and has added tokens; llama.cpp puts a space after each of them": (
            tokenizer.adds_space and symbols
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"this tokenizer cannot be written as GGUF: {reason}, so llama.cpp would make other ids")
    place: dict[str, int] = {}
    for number, (left, right) in enumerate(tokenizer.merges):
        place.setdefault(left + right, number)
    special, unk_id = set(tokenizer.special_ids), tokenizer.token_id(tokenizer.unk_token)
    assert unk_id is not None

    def kind(number: int, piece: str) -> int:
        if number == unk_id:
            return UNKNOWN
        if number in special:
            return CONTROL
        if number in symbols:
            return USER_DEFINED
        return BYTE if _BYTE_PIECE.fullmatch(piece) else NORMAL

    pieces = tokenizer.tokens
    return SentencePieceVocabulary(
        pieces=tuple(pieces),
        scores=tuple(-float(place.get(piece, len(place))) for piece in pieces),
        types=tuple(kind(number, piece) for number, piece in enumerate(pieces)),
        add_dummy_prefix=tokenizer.adds_space,
        bos_id=tokenizer.eos_id if prompt_bos_id is None else prompt_bos_id,
        add_bos=prompt_bos_id is not None,
        eos_id=tokenizer.eos_id,
        unk_id=unk_id,
    )


def _rewrites(normalizer: dict) -> bool:
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    return any(step["type"] == "Replace" and step["pattern"] != {"String": " "} for step in steps)


def _check_ids(vocabulary: Vocabulary, *, num_tokens: int) -> None:
    for field in dataclasses.fields(vocabulary):
        if field.name.endswith("_id") and not 0 <= getattr(vocabulary, field.name) < num_tokens:
            raise ValueError(f"{field.name}={getattr(vocabulary, field.name)} is none of the {num_tokens} tokens")
