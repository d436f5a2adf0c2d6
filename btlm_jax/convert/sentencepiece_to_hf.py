"""A SentencePiece model said in the terms of the tokenizers library."""

from __future__ import annotations

import itertools
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from btlm_jax.tokenizers.sentencepiece_proto import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE_MARK,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
)


def to_hf_tokenizer(model: SentencePieceModel, *, unk_id: int) -> Tokenizer:
    """Return the same tokenizer for the tokenizers library.

    Raises:
      ValueError: it cannot be expressed there.
    """
    _check_expressible(model)
    inside = symbols_inside(model)
    tokenizer = Tokenizer(_unigram(model, unk_id) if model.model_type == UNIGRAM else _bpe(model, unk_id))
    if model.model_type == UNIGRAM:
        tokenizer.pre_tokenizer = _cut_names(model)
    steps = []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE_MARK))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE_MARK)])
    back = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix or model.remove_extra_whitespaces:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    for number in model.ids_of_type(CONTROL) + model.ids_of_type(UNKNOWN):
        tokenizer.add_special_tokens([AddedToken(model.pieces[number], special=True, normalized=False)])
    for number in set(model.ids_of_type(USER_DEFINED)) - inside:
        piece = model.pieces[number]
        tokenizer.add_tokens([AddedToken(piece, special=False, normalized=SPACE_MARK in piece)])
    return tokenizer


def symbols_inside(model: SentencePieceModel) -> set[int]:
    """Return the ids of the user-defined symbols that the model itself finds, as it finds any piece.

    Unigram finds them by their score. BPE finds a single character that no other piece has, as nothing merges with it.
    The others become added tokens, which cut the text before the normalizer sees it.
    """
    symbols = model.ids_of_type(USER_DEFINED)
    if model.model_type == UNIGRAM:
        return set(symbols)
    in_pieces = {letter for number in model.ids_of_type(NORMAL) for letter in model.pieces[number]}
    return {number for number in symbols if len(model.pieces[number]) == 1 and model.pieces[number] not in in_pieces}


def _check_expressible(model: SentencePieceModel) -> None:
    reasons = {
        "it rewrites characters, such as nmt_nfkc does, which the tokenizers library does by whole graphemes, "
        "so some texts get other ids; train with normalization_rule_name='identity'": model.rewrites_characters,
        "it is of words or characters, not unigram or BPE": model.model_type not in (UNIGRAM, BPE),
        "its spaces follow the word (treat_whitespace_as_suffix)": model.whitespace_as_suffix,
        "it keeps spaces as they are (escape_whitespaces=false)": not model.escape_whitespaces,
        "it has unused pieces": bool(model.ids_of_type(UNUSED)),
        "a user-defined symbol of several characters after a dummy prefix cannot be told apart from one at the "
        "start": model.add_dummy_prefix and set(model.ids_of_type(USER_DEFINED)) - symbols_inside(model),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"this SentencePiece model cannot be written for Hugging Face: {reason}")


def _bpe(model: SentencePieceModel, unk_id: int) -> models.BPE:
    """Return merges in the order of the merged pieces' scores, of one piece those with the longest left part first.

    SentencePiece takes the leftmost of several splits instead, which differs only in runs of one repeated piece, and
    there the longest left part is the leftmost.
    """
    normal = {model.pieces[number]: number for number in model.ids_of_type(NORMAL)}
    merges = []
    for piece in sorted(normal, key=lambda piece: -model.scores[normal[piece]]):
        for at in range(len(piece) - 1, 0, -1):
            if piece[:at] in normal and piece[at:] in normal:
                merges.append((piece[:at], piece[at:]))
    vocabulary = {piece: number for number, piece in enumerate(model.pieces)}
    return models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=model.pieces[unk_id],
        fuse_unk=True,  # SentencePiece joins unknown characters into one id
        byte_fallback=model.byte_fallback,
    )


def _unigram(model: SentencePieceModel, unk_id: int) -> models.Unigram:
    """Return pieces and scores; those that are no text get one that changes no other's.

    A user-defined symbol scores (its bytes) * (the best score) - 0.1 (unigram_model.cc, EncodeOptimized).
    """
    normal = [model.scores[number] for number in model.ids_of_type(NORMAL)]
    lowest, best = min(normal), max(normal)
    vocabulary = []
    for piece, score, kind in zip(model.pieces, model.scores, model.types, strict=True):
        if kind == USER_DEFINED:
            score = len(piece.encode()) * best - 0.1
        elif kind != NORMAL:
            score = lowest
        vocabulary.append((piece, score))
    return models.Unigram(vocabulary, unk_id=unk_id, byte_fallback=model.byte_fallback)


def _cut_names(model: SentencePieceModel) -> pre_tokenizers.Split:
    """Return what cuts the name of a control or byte piece in a text, which the library's Unigram would take for it.

    The cut is between two characters that no piece has side by side, where there are such, so it changes nothing else.
    """
    pairs = {a + b for number in model.ids_of_type(NORMAL) for a, b in itertools.pairwise(model.pieces[number])}
    cuts = set()
    for number in model.ids_of_type(CONTROL) + model.ids_of_type(UNKNOWN) + model.ids_of_type(BYTE):
        name = model.pieces[number]
        free = [at for at in range(1, len(name)) if name[at - 1 : at + 1] not in pairs]
        at = free[0] if free else 1
        cuts.add(f"(?<={re.escape(name[:at])})(?={re.escape(name[at:])})")
    return pre_tokenizers.Split(Regex("|".join(sorted(cuts))), "isolated")
