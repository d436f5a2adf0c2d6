"""SentencePiece models: load one, or train byte pairs that give every text back. The only importer of sentencepiece."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece

from btlm_jax.storage.protobuf import read_fields
from btlm_jax.tokenizers import MAX_VOCAB_SIZE
from btlm_jax.tokenizers.sentencepiece_proto import SPACE_MARK, USER_DEFINED, parse_model

SENTENCEPIECE = "sentencepiece"
TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_BYTES = 16_000_000  # of training text; more does not change the merges that matter
UNK_ID, EOS_ID = 0, 1
MIN_VOCAB_SIZE = 300  # 256 byte pieces, the control pieces, a newline and some letters
MAX_LINE_CHARACTERS = 4096
_PRIVATE = (0x10FF00, 0x10FFFE)  # the last characters of private use, four bytes each
NEWLINE_BOUNDARY = re.compile(r"\n")  # of models in which the newline is a symbol of its own


class SentencePieceTokenizer:
    """Text to ids and back; no text is encoded as `eos_id`."""

    kind = SENTENCEPIECE
    stored_file = TOKENIZER_FILE

    def __init__(self, model: bytes):
        """Read the contents of a model file.

        Raises:
          ValueError: it is damaged, or has no end-of-text piece.
        """
        if not model:  # the library takes it for no model yet
            raise ValueError("this is no SentencePiece model: it is empty")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"this is no SentencePiece model: {error}") from error
        self.contents = model
        self.unk_id, self.bos_id = self._processor.unk_id(), self._processor.bos_id()  # -1 where there is none
        self.eos_id = self._processor.eos_id()
        self.vocab_size = self._processor.vocab_size()
        self.boundary = NEWLINE_BOUNDARY if _encodes_by_lines(model) else None
        self._has_bytes = parse_model(model).byte_fallback
        if self.eos_id < 0:
            raise ValueError("this SentencePiece model has no end-of-text piece; train it with an eos_id of 0 or more")

    @property
    def pieces(self) -> list[str]:
        """The pieces by id."""
        return [self._processor.id_to_piece(number) for number in range(self.vocab_size)]

    @property
    def spare_token(self) -> str:
        """The unknown piece, which no text has where there is byte fallback."""
        return self._processor.id_to_piece(self.unk_id)

    def token_id(self, token: str) -> int | None:
        """Return the id of a piece, or None."""
        number = self._processor.piece_to_id(token)
        return number if self._processor.id_to_piece(number) == token else None

    def token(self, number: int) -> str:
        """Return the piece of an id."""
        return self._processor.id_to_piece(number)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._processor.encode(text, out_type=int)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text in which the name of a control piece stands for its id."""
        pieces = (
            [self.special_tokens[part]] if number % 2 else self.encode(part)
            for number, part in enumerate(self._split_at_special_names(text))
        )
        return [token for piece in pieces for token in piece]

    def encode_prompt_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of `encode_prompt`, and of each the (begin, end) of its characters in the text."""
        ids, offsets, begin = [], [], 0
        for number, part in enumerate(self._split_at_special_names(text)):
            if number % 2:
                ids.append(self.special_tokens[part])
                offsets.append((begin, begin + len(part)))
            else:
                found = list(_pieces(self._processor.encode(part, out_type="serialized_proto"), text=part))
                ids += [piece for piece, _, _ in found]
                offsets += _whole([(begin + first, begin + last) for _, first, last in found])
            begin += len(part)
        return ids, offsets

    def _split_at_special_names(self, text: str) -> list[str]:
        """Return a text in parts, of which every second one is the name of a special token."""
        names = "|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True)))
        return re.split(f"({names})", text) if names else [text]

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids that encoding a text never gives, by name: of control pieces, and of unknown characters."""
        return self._special_tokens

    @functools.cached_property
    def _special_tokens(self) -> dict[str, int]:
        special = (
            number
            for number in range(self.vocab_size)
            if self._processor.is_control(number) or self._processor.is_unknown(number)
        )
        return {name: number for number in special if (name := self._processor.id_to_piece(number))}

    def encode_exactly(self, text: str) -> list[int]:
        """Return the ids of a text, with the three bytes of U+2581 where it has that.

        SentencePiece writes a space as U+2581, so `encode` takes one in a text for a space, as all clients do. Here a
        character that is neither in the text nor in the vocabulary takes its place, and gives its place to the bytes.
        """
        if SPACE_MARK not in text or not self._has_bytes:
            return self.encode(text)
        for number in range(*_PRIVATE):
            substitute = chr(number)
            bytes_of_it = self._byte_ids(substitute)
            if substitute not in text and self._processor.encode(f"{substitute}{substitute}")[-8:] == 2 * bytes_of_it:
                break
        else:  # the model changes these characters too
            return self.encode(text)
        ids, mark = self._processor.encode(text.replace(SPACE_MARK, substitute)), self._byte_ids(SPACE_MARK)
        exact, place = [], 0
        while place < len(ids):
            is_mark = ids[place : place + 4] == bytes_of_it
            exact += mark if is_mark else ids[place : place + 1]
            place += 4 if is_mark else 1
        return exact

    def _byte_ids(self, character: str) -> list[int]:
        return [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode()]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int) -> list[list[int]]:
        """Return the ids of each text; the same for any number of threads."""
        return self._processor.encode(list(texts), out_type=int, num_threads=num_threads)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; control ids give nothing."""
        return self._processor.decode(list(ids))


def train_sentencepiece(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Train a byte-pair model with byte fallback and no normalisation; return the model file's contents.

    It has a piece for the space, which SentencePiece writes as U+2581 and in bytes could not tell from that character:
    where the texts have none, or so few that its rare characters are left out, it is trained once more to have it.

    Raises:
      ValueError: the vocabulary is too small, or too large for these texts.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for a byte-fallback tokenizer: {MIN_VOCAB_SIZE} or more"
        )
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size} is too large: {MAX_VOCAB_SIZE:,} or less")
    lines = list(_lines(texts))
    contents = _train(lines, vocab_size=vocab_size, required_chars="")
    if SPACE_MARK in parse_model(contents).pieces:
        return contents
    return _train(lines, vocab_size=vocab_size, required_chars=SPACE_MARK)


def _train(lines: list[str], *, vocab_size: int, required_chars: str) -> bytes:
    options: dict[str, Any] = {"required_chars": required_chars} if required_chars else {}  # a model records even ""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            unk_id=UNK_ID,
            eos_id=EOS_ID,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            max_sentence_length=4 * MAX_LINE_CHARACTERS,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} pieces can be trained on this text: {error}") from error
    return model.getvalue()


def _pieces(message: bytes, *, text: str) -> Iterator[tuple[int, int, int]]:
    """Yield (id, begin, end in characters) of the pieces in a SentencePieceText, whose offsets are those of bytes.

    https://github.com/google/sentencepiece/blob/master/src/sentencepiece.proto
    """
    character_of = [number for number, character in enumerate(text) for _ in character.encode()] + [len(text)]
    for field, piece in read_fields(message):
        if field == 2 and isinstance(piece, bytes):
            values = {number: value for number, value in read_fields(piece) if isinstance(value, int)}
            yield values.get(2, 0), character_of[values.get(4, 0)], character_of[values.get(5, 0)]


def _whole(offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return offsets in which each of the bytes of a character has the whole, not the last alone."""
    for number in range(len(offsets) - 2, -1, -1):
        (begin, end), (next_begin, next_end) = offsets[number : number + 2]
        if begin == end == next_begin:
            offsets[number] = (begin, next_end)
    return offsets


def _encodes_by_lines(contents: bytes) -> bool:
    """Return whether neither a piece of the model nor any of its rules crosses a newline, as in those trained here."""
    model = parse_model(contents)
    rules = (model.add_dummy_prefix, model.remove_extra_whitespaces, model.rewrites_characters)
    symbols = [model.pieces[number] for number in model.ids_of_type(USER_DEFINED)]
    return symbols == ["\n"] and not any(rules) and not model.whitespace_as_suffix


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Yield pieces of lines: SentencePiece trains on lines, and the newline is a symbol of its own."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), MAX_LINE_CHARACTERS):
                yield line[start : start + MAX_LINE_CHARACTERS]
