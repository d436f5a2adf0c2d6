"""Express a SentencePiece model in Hugging Face's tokenizers library."""

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
    """Return a tokenizer of the tokenizers library that gives the same ids and text.

    Raises:
      ValueError: it cannot be expressed there.
    """
    _check_expressible(model)
    in_model = model_symbols(model)
    tokenizer = Tokenizer(_unigram(model, unk_id) if model.model_type == UNIGRAM else _bpe(model, unk_id))
    if model.model_type == UNIGRAM:
        tokenizer.pre_tokenizer = _split_special_names(model)
    normalizer_steps = []
    if model.remove_extra_whitespaces:
        normalizer_steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        normalizer_steps.append(normalizers.Prepend(SPACE_MARK))
    tokenizer.normalizer = normalizers.Sequence([*normalizer_steps, normalizers.Replace(" ", SPACE_MARK)])
    decoder_steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix or model.remove_extra_whitespaces:
        decoder_steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoder_steps)
    for number in model.ids_of_type(CONTROL) + model.ids_of_type(UNKNOWN):
        tokenizer.add_special_tokens([AddedToken(model.pieces[number], special=True, normalized=False)])
    for number in set(model.ids_of_type(USER_DEFINED)) - in_model:
        piece = model.pieces[number]
        tokenizer.add_tokens([AddedToken(piece, special=False, normalized=SPACE_MARK in piece)])
    return tokenizer


def model_symbols(model: SentencePieceModel) -> set[int]:
    """Return the ids of the user-defined symbols that can stay ordinary pieces of the model.

    Unigram finds every symbol by its score. BPE finds a symbol of one character that is in no other piece, as nothing
    merges with it. The others become added tokens, at which the text is split before it is normalized.
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
        "start": model.add_dummy_prefix and set(model.ids_of_type(USER_DEFINED)) - model_symbols(model),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"this SentencePiece model cannot be written for Hugging Face: {reason}")


def _bpe(model: SentencePieceModel, unk_id: int) -> models.BPE:
    """Return merges ordered by the score of the merged piece; merges of the same piece by longest left part first.

    Among merges of the same piece SentencePiece takes the leftmost in the text. The order matters only in runs of one
    repeated piece, and there the longest left part is the leftmost.
    """
    normal = {model.pieces[number]: number for number in model.ids_of_type(NORMAL)}
    merges = []
    for piece in sorted(normal, key=lambda piece: -model.scores[normal[piece]]):
        for split in range(len(piece) - 1, 0, -1):
            if piece[:split] in normal and piece[split:] in normal:
                merges.append((piece[:split], piece[split:]))
    vocabulary = {piece: number for number, piece in enumerate(model.pieces)}
    return models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=model.pieces[unk_id],
        fuse_unk=True,  # SentencePiece gives a run of unknown characters one id
        byte_fallback=model.byte_fallback,
    )


def _unigram(model: SentencePieceModel, unk_id: int) -> models.Unigram:
    """Return pieces and scores; pieces that are not text get the lowest score, so that no other encoding changes.

    The score of a user-defined symbol is (its bytes) * (the best score) - 0.1 (unigram_model.cc, EncodeOptimized).
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


def _split_special_names(model: SentencePieceModel) -> pre_tokenizers.Split:
    """Return a split inside the names of control and byte pieces, which the library's Unigram would take for the piece.

    The split is between two characters that are adjacent in no piece, if there are such, so it has no other effect.
    """
    pairs = {a + b for number in model.ids_of_type(NORMAL) for a, b in itertools.pairwise(model.pieces[number])}
    splits = set()
    for number in model.ids_of_type(CONTROL) + model.ids_of_type(UNKNOWN) + model.ids_of_type(BYTE):
        name = model.pieces[number]
        split = next((at for at in range(1, len(name)) if name[at - 1 : at + 1] not in pairs), 1)
        splits.add(f"(?<={re.escape(name[:split])})(?={re.escape(name[split:])})")
    return pre_tokenizers.Split(Regex("|".join(sorted(splits))), "isolated")
