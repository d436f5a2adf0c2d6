"""Parse a SentencePiece model file without the protobuf library, whose versions conflict.

The file is a protocol buffer, `ModelProto` of
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
"""

from __future__ import annotations

import dataclasses
import struct

from btlm_jax.storage.protobuf import read_fields

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType; 3 is word, 4 is char
SPACE_MARK = "\u2581"  # stands for a space
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5  # numbers of ModelProto's fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """The fields of a model file; what it lacks has the default of the .proto."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    model_type: int
    byte_fallback: bool
    whitespace_as_suffix: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    rewrites_characters: bool  # a normalisation table such as nmt_nfkc's

    def ids_of_type(self, piece_type: int) -> list[int]:
        """Return the ids of the pieces of a type."""
        return [number for number, type_ in enumerate(self.types) if type_ == piece_type]


def parse_model(contents: bytes) -> SentencePieceModel:
    """Parse a model file.

    Raises:
      ValueError: it is damaged.
    """
    try:
        fields = list(read_fields(contents))
        pieces = [_Message(value) for number, value in fields if number == _PIECES]
        last = dict(fields)  # of a field that is given twice, the last counts
        trainer, normalizer, denormalizer = (
            _Message(last.get(number, b"")) for number in (_TRAINER, _NORMALIZER, _DENORMALIZER)
        )
        return SentencePieceModel(
            pieces=tuple(piece.data(1).decode() for piece in pieces),
            scores=tuple(struct.unpack("<f", piece.data(2, default=bytes(4)))[0] for piece in pieces),
            types=tuple(piece.number(3, default=NORMAL) for piece in pieces),
            model_type=trainer.number(3, default=UNIGRAM),
            byte_fallback=bool(trainer.number(35, default=0)),
            whitespace_as_suffix=bool(trainer.number(24, default=0)),
            add_dummy_prefix=bool(normalizer.number(3, default=1)),
            remove_extra_whitespaces=bool(normalizer.number(4, default=1)),
            escape_whitespaces=bool(normalizer.number(5, default=1)),
            rewrites_characters=bool(normalizer.data(2) or denormalizer.data(2)),
        )
    except (ValueError, struct.error) as error:
        raise ValueError(f"this is no SentencePiece model: {error!r}") from error


class _Message:
    """A submessage; its fields by number and type."""

    def __init__(self, value: int | bytes):
        if isinstance(value, int):
            raise ValueError(f"a number ({value}) stands for a message")
        self._fields = dict(read_fields(value))

    def number(self, field: int, *, default: int) -> int:
        value = self._fields.get(field, default)
        if not isinstance(value, int):
            raise ValueError(f"field {field} is not a number")
        return value

    def data(self, field: int, *, default: bytes = b"") -> bytes:
        value = self._fields.get(field, default)
        if isinstance(value, int):
            raise ValueError(f"field {field} is a number, {value}")
        return value
