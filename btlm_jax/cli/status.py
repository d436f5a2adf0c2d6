"""`btlm status`: what runs do, or how they ended, from their workdirs alone."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence

from btlm_jax.cli import DONE, ERROR, UsageError
from btlm_jax.cli.parse import Flags

STATUS_HELP = """btlm status WORKDIR...: what a run does or how it ended, how far it is, how fast, and what it keeps.

examples:  btlm status runs/local                the run in full
           btlm status runs/*                    a line a run
           btlm status runs/local --watch        again every 5 seconds, until it does not run any more
           btlm status runs/local --json         for programs: {"runs": [...], "errors": [...]}

Files are read, nothing is written or locked, so that it can be asked at any moment, of a run that goes on too; of a
run in a bucket (gs://, s3://) what its last copy has, to the minute. Times
are of all starts of the run: goodput is the share of steps that count in the time since the first one began.
The exit code is 1 if a folder is no workdir of a run.
"""
_WATCH_SECONDS = 5.0
_CLEAR = "\033[H\033[J"  # a terminal's


def status(arguments: Sequence[str]) -> int:
    """Run `btlm status`; return the exit code."""
    flags = status_flags()
    count = next((number for number, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    given = ["--workdir", *arguments[:count]] if count else []
    if not flags.parse([*given, *arguments[count:]]):
        return DONE
    texts = [os.path.expanduser(text) for text in flags.strings("workdir")]
    if not texts or not all(texts):
        raise UsageError("btlm status needs the workdir of a run: btlm status runs/local")
    if flags.number("seconds") <= 0:
        raise UsageError(f"--seconds={flags.number('seconds'):g} must be positive")
    if flags.is_given("seconds") and not flags.boolean("watch"):
        raise UsageError("--seconds goes with --watch")
    from btlm_jax.runs.status import RUNNING

    while True:
        statuses, errors = _read(texts)
        if flags.boolean("watch") and sys.stdout.isatty():
            print(_CLEAR, end="")
        _print(statuses, errors, as_json=flags.boolean("json"), is_single=len(texts) == 1)
        if not flags.boolean("watch") or not any(each.state == RUNNING for each in statuses):
            return ERROR if errors else DONE
        sys.stdout.flush()
        time.sleep(flags.number("seconds"))


def status_flags() -> Flags:
    """Define the flags of `btlm status`."""
    flags = Flags(STATUS_HELP)
    flags.define_paths("workdir", "the runs; may be given without the flag, first")
    flags.define_boolean("json", False, "print JSON, of --watch a line each time")
    flags.define_boolean("watch", False, "print it again and again, until none of the runs is running")
    flags.define_float("seconds", _WATCH_SECONDS, "with --watch: how long to wait in between")
    return flags


def _read(texts: Sequence[str]):
    """Return the states of the runs, and what is wrong with folders that are none."""
    from btlm_jax.runs.status import status_of

    statuses, errors = [], []
    for text in texts:
        try:
            statuses.append(status_of(text))
        except (ValueError, OSError) as error:
            if len(texts) == 1:
                raise
            errors.append(str(error))
    return statuses, errors


def _print(statuses, errors: list[str], *, as_json: bool, is_single: bool) -> None:
    from btlm_jax.runs.status import ROW_TITLES, status_row, status_text, table_text

    if as_json:
        print(json.dumps({"runs": [each.to_json() for each in statuses], "errors": errors}, allow_nan=False))
        return
    if is_single:
        print(status_text(statuses[0]))
    elif statuses:
        print(table_text([ROW_TITLES, *map(status_row, statuses)]))
    for error in errors:
        print(f"btlm status: {error}", file=sys.stderr)
