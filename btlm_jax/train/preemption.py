"""Noticing that the machine wants to be left: SIGTERM, or a pod's preemption notice, agreed between processes."""

from __future__ import annotations

import signal

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Whether somebody asked the run to stop.

    In a single process this is a SIGTERM handler. With several, JAX's preemption service catches the SIGTERM of any of
    them and makes all agree on one step, so that they save the same checkpoint.
    """

    def __init__(self):
        self._asked = False
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._on_signal)

    def agreed(self, step: int) -> bool:
        """Return whether to stop after `step`; every process gets the same answer for the same step."""
        if jax.process_count() == 1:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)

    def _on_signal(self, signum, frame):
        del signum, frame
        self._asked = True
