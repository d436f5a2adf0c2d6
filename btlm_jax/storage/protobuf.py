"""Read protocol buffer messages without their schema or the protobuf library: fields by their numbers.

https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value): an int of a varint field, the bytes of any other.

    Raises:
      ValueError: the message is cut short, or has a wire type that is no longer in use.
    """
    offset = 0
    while offset < len(message):
        key, offset = read_varint(message, offset)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, offset = read_varint(message, offset)
        else:
            if wire_type == _BYTES:
                size, offset = read_varint(message, offset)
            elif wire_type in (_FIXED32, _FIXED64):
                size = 4 if wire_type == _FIXED32 else 8
            else:
                raise ValueError(f"wire type {wire_type} at byte {offset}")
            value, offset = message[offset : offset + size], offset + size
            if offset > len(message):
                raise ValueError(f"it ends inside field {number}")
        yield number, value


def read_varints(data: bytes) -> Iterator[int]:
    """Yield the numbers of a sequence of varints, such as a packed repeated field.

    Raises:
      ValueError: the last one is cut short.
    """
    offset = 0
    while offset < len(data):
        value, offset = read_varint(data, offset)
        yield value


def read_varint(data: bytes | memoryview, offset: int) -> tuple[int, int]:
    """Return the number at an offset, seven bits a byte from the lowest on, and the offset after it.

    Raises:
      ValueError: it is cut short.
    """
    value = shift = 0
    while offset < len(data):
        byte = data[offset]
        value |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 0x80:
            return value, offset
    raise ValueError("it ends inside a number")
