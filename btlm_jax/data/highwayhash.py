"""HighwayHash-64, the hash in the chunks of Riegeli files, and so of ArrayRecord files. No Python package computes it.

https://arxiv.org/abs/1612.06257, https://github.com/google/highwayhash/blob/master/c/highwayhash.c
"""

from __future__ import annotations

import struct

_LOW, _ALL = (1 << 32) - 1, (1 << 64) - 1
_MUL0 = (0xDBE6D5D5FE4CCE2F, 0xA4093822299F31D0, 0x13198A2E03707344, 0x243F6A8885A308D3)
_MUL1 = (0x3BD39E10CB0EF593, 0xC0ACF169B5F18A8C, 0xBE5466CF34E90C6C, 0x452821E638D01377)
_PACKET = struct.Struct("<4Q")
Key = tuple[int, int, int, int]


def highway_hash_64(data: bytes | memoryview, *, key: Key) -> int:
    """Return HighwayHash-64 of `data`."""
    state = _initial_state(key)
    whole = len(data) & ~31
    state = _update(state, _PACKET.iter_unpack(data[:whole]))
    if len(data) > whole:
        state = _update_remainder(state, bytes(data[whole:]))
    for _ in range(4):
        v0 = state[:4]
        state = _update(state, [tuple(_swap_halves(v0[lane]) for lane in (2, 3, 0, 1))])
    return (state[0] + state[4] + state[8] + state[12]) & _ALL


def _initial_state(key: Key) -> tuple[int, ...]:
    """Return the initial state: v0, v1, mul0 and mul1, four lanes each."""
    v0 = [mul ^ part for mul, part in zip(_MUL0, key, strict=True)]
    v1 = [mul ^ _swap_halves(part) for mul, part in zip(_MUL1, key, strict=True)]
    return (*v0, *v1, *_MUL0, *_MUL1)


def _update(state, packets):
    """Update the state with packets of four lanes. Unrolled by lane, because this loop sees every byte."""
    a0, a1, a2, a3, b0, b1, b2, b3, m0, m1, m2, m3, n0, n1, n2, n3 = state
    for p0, p1, p2, p3 in packets:
        b0 = (b0 + m0 + p0) & _ALL
        b1 = (b1 + m1 + p1) & _ALL
        b2 = (b2 + m2 + p2) & _ALL
        b3 = (b3 + m3 + p3) & _ALL
        m0 ^= (b0 & _LOW) * (a0 >> 32)
        m1 ^= (b1 & _LOW) * (a1 >> 32)
        m2 ^= (b2 & _LOW) * (a2 >> 32)
        m3 ^= (b3 & _LOW) * (a3 >> 32)
        a0 = (a0 + n0) & _ALL
        a1 = (a1 + n1) & _ALL
        a2 = (a2 + n2) & _ALL
        a3 = (a3 + n3) & _ALL
        n0 ^= (a0 & _LOW) * (b0 >> 32)
        n1 ^= (a1 & _LOW) * (b1 >> 32)
        n2 ^= (a2 & _LOW) * (b2 >> 32)
        n3 ^= (a3 & _LOW) * (b3 >> 32)
        a0 = (a0 + _zip_even(b0, b1)) & _ALL
        a1 = (a1 + _zip_odd(b0, b1)) & _ALL
        a2 = (a2 + _zip_even(b2, b3)) & _ALL
        a3 = (a3 + _zip_odd(b2, b3)) & _ALL
        b0 = (b0 + _zip_even(a0, a1)) & _ALL
        b1 = (b1 + _zip_odd(a0, a1)) & _ALL
        b2 = (b2 + _zip_even(a2, a3)) & _ALL
        b3 = (b3 + _zip_odd(a2, a3)) & _ALL
    return a0, a1, a2, a3, b0, b1, b2, b3, m0, m1, m2, m3, n0, n1, n2, n3


def _zip_even(even: int, odd: int) -> int:
    """Return what ZipperMergeAndAdd adds to the even lane: bytes of a pair of lanes, permuted."""
    return (
        ((even & 0xFF000000) | (odd & 0xFF00000000)) >> 24
        | ((even & 0xFF0000000000) | (odd & 0xFF000000000000)) >> 16
        | even & 0xFF0000
        | (even & 0xFF00) << 32
        | (odd & 0xFF00000000000000) >> 8
        | (even & 0xFF) << 56
    )


def _zip_odd(even: int, odd: int) -> int:
    """Return what ZipperMergeAndAdd adds to the odd lane: bytes of a pair of lanes, permuted."""
    return (
        ((odd & 0xFF000000) | (even & 0xFF00000000)) >> 24
        | odd & 0xFF0000
        | (odd & 0xFF0000000000) >> 16
        | (odd & 0xFF00) << 24
        | (even & 0xFF000000000000) >> 8
        | (odd & 0xFF) << 48
        | even & 0xFF00000000000000
    )


def _update_remainder(state: tuple[int, ...], remainder: bytes) -> tuple[int, ...]:
    """Update the state with the last 1 to 31 bytes."""
    size, words = len(remainder), len(remainder) & ~3
    tail, packet = remainder[words:], bytearray(32)
    v0 = [(lane + (size << 32) + size) & _ALL for lane in state[:4]]
    v1 = [_rotate_halves(lane, size) for lane in state[4:8]]
    packet[:words] = remainder[:words]
    if size & 16:
        packet[28:] = remainder[-4:]
    elif tail:
        packet[16:19] = bytes((tail[0], tail[len(tail) >> 1], tail[-1]))
    return _update((*v0, *v1, *state[8:]), [_PACKET.unpack(packet)])


def _rotate_halves(lane: int, count: int) -> int:
    low, high = lane & _LOW, lane >> 32
    low, high = ((half << count | half >> (32 - count)) & _LOW for half in (low, high))
    return high << 32 | low


def _swap_halves(lane: int) -> int:
    return (lane >> 32) | (lane & _LOW) << 32
