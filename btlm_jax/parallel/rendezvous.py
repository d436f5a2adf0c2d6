"""Where the processes of a run wait for each other while they save and restore, and hear of what failed in one alone.

Imported only where a run has several processes. Orbax waits for all at a barrier that knows nothing of failures: a
process that cannot write its part never comes, and the others wait for 20 minutes.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # no public name: the key-value store
from jax.experimental import multihost_utils

from btlm_jax.stopping import OthersFailedError

OTHERS_FAILED = "another process has failed"
_PREFIX = "btlm-save/"  # of keys
_LONGEST = 512  # bytes of a text that all are told
_POLL_SECONDS = (0.02, 1.0)  # between two looks: at first, and after a long wait
_numbers = itertools.count()  # of the Rendezvous made: all processes make the same ones in the same order


class Rendezvous:
    """A barrier for orbax's background threads, which all processes pass in the same order, for the same thing.

    Orbax calls it with what it has come for. A process whose part of a save fails comes next for something else, the
    end of the save: then all go on at once, the others with an OthersFailedError, and so at all later calls.
    """

    def __init__(
        self, client: Any, *, index: int, count: int, number: int, clock: Callable[[], float] = time.monotonic
    ):
        self._client, self._index, self._count, self._clock = client, index, count, clock
        self._prefix = f"{_PREFIX}{number}/"
        self._calls = itertools.count()
        self.has_failed = False  # one has come for another thing than the others

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Wait until all processes have come for `key`.

        Raises:
          OthersFailedError: one has come for something else.
          TimeoutError: one has not come; names it.
        """
        if self.has_failed:
            raise OthersFailedError(OTHERS_FAILED)
        number, until = next(self._calls), self._clock() + timeout_ms / 1000
        self._client.key_value_set(f"{self._prefix}{number}/{self._index}", key)
        if number >= 2:  # all have come to the last one, and so have seen all of the one before it
            self._client.key_value_delete(f"{self._prefix}{number - 2}/{self._index}")
        pause = _POLL_SECONDS[0]
        while True:
            found = self._client.key_value_dir_get(f"{self._prefix}{number}/")
            keys = {int(name.rpartition("/")[2]): value for name, value in found}
            if any(value != key for value in keys.values()):
                self.has_failed = True
                raise OthersFailedError(OTHERS_FAILED)
            if len(keys) == self._count:
                return
            if self._clock() > until:
                missing = ", ".join(str(process) for process in range(self._count) if process not in keys)
                raise TimeoutError(f"process {missing} did not come to {key} in {timeout_ms / 1000:.0f} s")
            time.sleep(pause)
            pause = min(1.1 * pause, _POLL_SECONDS[1])


def make_rendezvous() -> Rendezvous:
    """Return one of all processes; each makes it at the same place of the program."""
    client, number = distributed.global_state.client, next(_numbers)
    return Rendezvous(client, index=jax.process_index(), count=jax.process_count(), number=number)


def texts_of_all(text: str) -> list[str]:
    """Return what each process has called this with, cut to 512 bytes; every process calls it at the same place."""
    data = text.encode()[:_LONGEST].ljust(_LONGEST, b"\0")
    rows = multihost_utils.process_allgather(np.frombuffer(data, np.uint8))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in np.asarray(rows)]


def value_of_first(value: Any) -> Any:
    """Return what process 0 has called this with, as JSON keeps it; every process calls it at the same place."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(1 << size.bit_length(), np.uint8)  # few sizes are compiled
    if jax.process_index() == 0:
        padded[:size] = data
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size]))


def said_of(texts: Sequence[str]) -> str:
    """Return which process said what, "" if none said anything; of those that say the same, the first.

    OTHERS_FAILED counts only where nothing else is said.
    """
    first: dict[str, int] = {}
    for number, text in enumerate(texts):
        if text:
            first.setdefault(text, number)
    if len(first) > 1:
        first.pop(OTHERS_FAILED, None)
    return "; ".join(f"process {number}: {text}" for text, number in first.items())
