"""Trace what some steps do on the devices: `log.profile_steps`. Imported for runs that have it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax

from btlm_jax import notices
from btlm_jax.train import PROFILE
from btlm_jax.train.setup import Run, log
from btlm_jax.train.step import TrainState


class StepTrace:
    """JAX's profiler around steps; `before` and `after` are called at each one.

    Process 0 traces, its own devices: all run the same program. The trace begins when the devices have finished the
    step before, and ends when they have finished the last one, so it has these steps and nothing else.
    """

    def __init__(self, run: Run, *, first_step: int):
        """Say what will not be traced in a run whose next step is `first_step`."""
        window = run.config.log.profile_window
        self._window = window
        self._folder = run.workdir / PROFILE / f"steps_{window[0]}_{window[-1]}"
        self._ledger = run.ledger
        self._open: contextlib.ExitStack | None = None
        self._step = contextlib.ExitStack()
        if window[0] < first_step and not _is_trace(self._folder):
            last = min(first_step - 1, window[-1])
            notices.report(
                "not-traced",
                f"log.profile_steps={run.config.log.profile_steps}: the next step is {first_step:,}, so steps "
                f"{window[0]:,} to {last:,} are not traced",
            )

    def before(self, step: int, state: TrainState) -> None:
        """Begin the trace, if this is its first step."""
        if step not in self._window:
            return
        if self._open is None:
            jax.block_until_ready(state)
            log(f"Tracing steps {step:,} to {self._window[-1]:,} into {self._folder}")
            self._open = contextlib.ExitStack()
            with self._ledger.measure("profile"):
                self._open.enter_context(jax.profiler.trace(str(self._folder)))
        self._step.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step))

    def after(self, step: int, state: TrainState) -> None:
        """End the trace, if this is its last step."""
        self._step.close()
        if self._open and step == self._window[-1]:
            jax.block_until_ready(state)
            self.close(step)

    def close(self, step: int) -> None:
        """Write a trace that is open, up to `step`."""
        if self._open is None:
            return
        self._step.close()
        open_trace, self._open = self._open, None
        with self._ledger.measure("profile"):
            open_trace.close()
        log(f"Traced the steps up to {step:,}: {self._folder} (open it with tensorboard and its plugin, or xprof)")


def _is_trace(folder: Path) -> bool:
    return any(folder.glob("plugins/profile/*/*.xplane.pb"))
