"""What differs between the processes of one evaluation: the first reads and writes the results, and speaks.

All run the same program over all devices and score the same rows, so they must decide alike: what was measured before
is known to the first one alone, which tells the others, and out of memory they halve a batch together.
"""

from __future__ import annotations

import sys
from typing import Any

import jax

HALVING_SECONDS = 300.0  # for the others to be out of memory too, which compile what this one did


def is_first() -> bool:
    """Return whether this is the process that reads and writes results."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print a line to the error stream, in the first process alone."""
    if is_first():
        print(text, file=sys.stderr)


def of_first(value: Any) -> Any:
    """Return what the first process has called this with, of what JSON holds; all call it at the same place."""
    if jax.process_count() == 1:
        return value
    from btlm_jax.parallel.rendezvous import value_of_first

    return value_of_first(value)


def wait_for_halving() -> None:
    """Return when all processes have come here, out of memory with the same batch.

    Raises:
      MemoryError: this one is alone.
    """
    if jax.process_count() == 1:
        return
    from btlm_jax.parallel.rendezvous import make_rendezvous

    try:
        make_rendezvous()(key="half a batch", timeout_ms=int(1000 * HALVING_SECONDS))
    except TimeoutError as error:
        raise MemoryError(f"process {jax.process_index()} has too little, and others have not") from error
