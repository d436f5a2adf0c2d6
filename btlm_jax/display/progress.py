"""Progress for people: bars and a status line on a terminal, log lines elsewhere. The only importer of tqdm."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import TextIO

from tqdm import tqdm

from btlm_jax import notices

Log = Callable[[str], None]  # prints or writes one line


def print_line(text: str) -> None:
    """Print a line to standard output, above the progress bar if one is shown."""
    tqdm.write(notices.named(text), file=sys.stdout)
    sys.stdout.flush()


def print_error_line(text: str) -> None:
    """Print a line to standard error, above the progress bar if one is shown."""
    tqdm.write(notices.named(text), file=sys.stderr)
    sys.stderr.flush()


notices.print_with(print_error_line)


def printable(text: str) -> str:
    """Return the text with control characters replaced, as generated ones would act on the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" or _is_space(c) else "\N{REPLACEMENT CHARACTER}" for c in text)


def _is_space(character: str) -> bool:
    """Return whether it is a space of some width, as French and Japanese texts have them."""
    return unicodedata.category(character) == "Zs"


def minutes_and_seconds(seconds: float) -> str:
    """Return a time as text: "83:05"."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02}"


class RateLimit:
    """Limits how often something is reported: at most once in `seconds`."""

    def __init__(self, seconds: float, *, is_due_at_start: bool):
        self._seconds = seconds
        self._next = 0.0 if is_due_at_start else time.monotonic() + seconds

    def is_due(self) -> bool:
        """Return whether `seconds` have passed since the last report."""
        return time.monotonic() >= self._next

    def restart(self) -> None:
        """Count from now: something has been reported."""
        self._next = time.monotonic() + self._seconds


class StepBar:
    """The steps of a training run: a bar on a terminal; elsewhere lines, at most one in `line_seconds`."""

    def __init__(self, *, total: int, first_step: int, line_seconds: float):
        self._total = total
        self._lines = RateLimit(line_seconds, is_due_at_start=True)
        self._is_terminal = sys.stdout.isatty()
        self._bar = tqdm(
            total=total,
            initial=first_step - 1,
            file=sys.stdout,
            disable=not self._is_terminal,
            bar_format="step {n_fmt}/{total_fmt} {bar} {desc}",
            dynamic_ncols=True,
            miniters=1,
        )

    def update(self, step: int, *, bar_text: str, line_text: str, is_notable: bool, is_due: bool) -> None:
        """Advance by one step. Without a terminal, print notable steps, and due ones not too often."""
        if self._is_terminal:
            self._bar.set_description_str(bar_text, refresh=False)
            self._bar.update()
        elif is_notable or (is_due and self._lines.is_due()):
            self._lines.restart()
            print_line(f"step {step:,}/{self._total:,} | {line_text}")

    def close(self) -> None:
        """Leave the bar as it is; what is printed next comes below it."""
        self._bar.close()


@contextlib.contextmanager
def item_bar(total: int, *, unit: str) -> Iterator[Callable[[str], None]]:
    """Show a bar on a terminal; yield a function that takes the name of the item whose processing begins."""
    with tqdm(total=total, unit=unit, disable=None, leave=False) as bar:

        def report(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        yield report


class StatusLine:
    """One line of text that replaces itself on a terminal; elsewhere every text is a line of its own."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._bar: tqdm | None = None

    def show(self, text: str) -> None:
        """Replace the line."""
        if not self._stream.isatty():
            print(text, file=self._stream, flush=True)
        elif self._bar is None:
            self._bar = tqdm(desc=text, file=self._stream, bar_format="{desc}", leave=False, miniters=1)
        else:
            self._bar.set_description_str(text)

    def clear(self) -> None:
        """Delete the line from a terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextlib.contextmanager
def report_while_running(what: str, *, seconds: float, say: Callable[[str], None]) -> Iterator[None]:
    """Report every `seconds` how long `what` has been running, and at the end how long it took."""
    start, is_over = time.monotonic(), threading.Event()

    def elapsed() -> str:
        return f"{time.monotonic() - start:.0f} s"

    def report() -> None:
        while not is_over.wait(seconds):
            say(f"{what}: {elapsed()}")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    say(f"{what}: done in {elapsed()}")
