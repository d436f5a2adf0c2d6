"""Pack examples whole into windows, by a rule that is a pure function of their lengths and the order given."""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import ArrayLike


def pack_windows(lengths: ArrayLike, *, window: int, most: int) -> np.ndarray:
    """Return the number of the window of each example, int64, by best fit of the longest first.

    Examples of equal length are taken in the order given. Each goes into the window with the least room that suffices,
    of those the one opened last, or else into a new one. A window has at most `most` examples.
    """
    lengths_N = np.asarray(lengths, np.int64)
    assert len(lengths_N) == 0 or 0 < lengths_N.min() <= lengths_N.max() <= window, "examples are to fit a window"
    window_N = np.zeros(len(lengths_N), np.int64)
    rooms: list[int] = []  # of windows that may take more, each size once, ascending
    open_windows: dict[int, list[int]] = {}  # by their room
    counts: list[int] = []  # of examples, by window
    for number in np.argsort(-lengths_N, kind="stable").tolist():
        length = int(lengths_N[number])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            chosen, room = len(counts), window
            counts.append(0)
        else:
            room = rooms[place]
            chosen = open_windows[room].pop()
            if not open_windows[room]:
                del open_windows[room], rooms[place]
        window_N[number] = chosen
        counts[chosen] += 1
        left = room - length
        if left and counts[chosen] < most:
            if left not in open_windows:
                bisect.insort(rooms, left)
            open_windows.setdefault(left, []).append(chosen)
    return window_N
