"""What a SentencePiece model file says, read without protobuf, whose versions quarrel.

The file is a protocol buffer, `ModelProto` of
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
"""

from __future__ import annotations

import dataclasses
import struct

from btlm_jax.storage.protobuf import read_fields

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType; 3 is word, 4 is char
SPACE_MARK = "\u2581"  # stands for a space, so a text that has it would not come back
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5  # numbers of ModelProto's fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """A model file; see the defaults of the .proto."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    model_type: int
    byte_fallback: bool
    whitespace_as_suffix: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    rewrites_characters: bool  # it has a table of characters to replace, such as nmt_nfkc's

    def ids_of(self, kind: int) -> list[int]:
        """Return the ids of the pieces of a type."""
        return [number for number, found in enumerate(self.types) if found == kind]


def parse_model(contents: bytes) -> SentencePieceModel:
    """Parse a model file.

    Raises:
      ValueError: it is damaged.
    """
    try:
        model = list(read_fields(contents))
        pieces = [dict(read_fields(value)) for number, value in model if number == _PIECES]
        only = {
            number: dict(read_fields(value))
            for number, value in model
            if number != _PIECES and isinstance(value, bytes)
        }
        trainer, normalizer = only.get(_TRAINER, {}), only.get(_NORMALIZER, {})
        return SentencePieceModel(
            pieces=tuple(piece.get(1, b"").decode() for piece in pieces),
            scores=tuple(struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces),
            types=tuple(piece.get(3, NORMAL) for piece in pieces),
            model_type=trainer.get(3, UNIGRAM),
            byte_fallback=bool(trainer.get(35, 0)),
            whitespace_as_suffix=bool(trainer.get(24, 0)),
            add_dummy_prefix=bool(normalizer.get(3, 1)),
            remove_extra_whitespaces=bool(normalizer.get(4, 1)),
            escape_whitespaces=bool(normalizer.get(5, 1)),
            rewrites_characters=bool(normalizer.get(2, b"") or only.get(_DENORMALIZER, {}).get(2, b"")),
        )
    except (ValueError, struct.error) as error:
        raise ValueError(f"this is no SentencePiece model: {error!r}") from error
