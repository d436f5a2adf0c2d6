"""How one tokenizer differs from another: whether the ids of a model are those of a token store."""

from __future__ import annotations

import dataclasses

from btlm_jax.tokenizers.byte_level import JsonTokenizer
from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer
from btlm_jax.tokenizers.tokenizer import PROBES, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """What another tokenizer has otherwise than a first one."""

    texts: tuple[str, ...]  # a difference each, for the user; empty if they make the same ids
    num_new_ids: int  # ids beyond those of the first, where all of its ids are the same tokens in the other; else 0

    def __str__(self) -> str:
        return "; ".join(self.texts)


def difference(first: Tokenizer, other: Tokenizer) -> Difference:
    """Compare the vocabularies, the ends of texts, and the ids of texts that break careless tokenizers."""
    if (first.kind, first.contents, first.eos_id) == (other.kind, other.contents, other.eos_id):
        return Difference(texts=(), num_new_ids=0)
    tokens, others = _tokens(first), _tokens(other)
    texts = []
    if len(tokens) != len(others):
        texts.append(f"{len(others):,} ids in place of {len(tokens):,}")
    changed = [number for number, pair in enumerate(zip(tokens, others, strict=False)) if pair[0] != pair[1]]
    if changed:
        at = changed[0]
        texts.append(
            f"{len(changed):,} ids are other tokens, the first is {at}: {others[at]!r} in place of {tokens[at]!r}"
        )
    if first.eos_id != other.eos_id:
        texts.append(f"a text ends with id {other.eos_id} in place of {first.eos_id}")
    is_extension = not changed and first.eos_id == other.eos_id and len(others) > len(tokens)
    for text in PROBES:
        if first.encode(text) != other.encode(text):
            texts.append(f"{text!r} gets other ids")
            break
    return Difference(texts=tuple(texts), num_new_ids=len(others) - len(tokens) if is_extension else 0)


def _tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the tokens by id."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.pieces
    assert isinstance(tokenizer, JsonTokenizer), tokenizer
    return tokenizer.tokens
