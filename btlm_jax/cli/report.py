"""`btlm report`: a run as one HTML page, from the records in its workdir."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from btlm_jax.cli import DONE, UsageError
from btlm_jax.cli.parse import Flags, find_config, load_config, packaged_folder

if TYPE_CHECKING:
    from btlm_jax.runs.report import RunRecords

REPORT_HELP = """btlm report WORKDIR: write a run as one HTML page: report.html in the workdir, or --output.

examples:  btlm report runs/local
           btlm report runs/local --compare=runs/other --output=both.html
           btlm report runs/local --base=btlm_3b_8k

The page needs no network and no other file. It has the curves of the loss by tokens and by time with phases and
restarts, held-out loss by source, norms, speed, where the wall time of all starts went, notices, checkpoints, samples,
what btlm evaluate left, the config against the one that the run was started with, machine, versions and data. It is
made from the records of the run alone, which may be going on. --compare draws a second run beside it, and says where
configs differ.
"""
_DEFAULT_BASE = "btlm_3b_8k"  # where the run's own is not known


def report(arguments: Sequence[str]) -> int:
    """Run `btlm report`; return the exit code."""
    flags = report_flags()
    given = [argument for argument in arguments[:1] if not argument.startswith("-")]
    if not flags.parse([*(f"--workdir={name}" for name in given), *arguments[len(given) :]]):
        return DONE
    texts = [os.path.expanduser(flags.string(name)) for name in ("workdir", "compare") if flags.is_given(name)]
    if not flags.string("workdir") or not all(texts):
        raise UsageError("btlm report needs the workdir of a run: btlm report runs/local")
    output = flags.optional_path("output")
    if output is None and "://" in texts[0]:
        raise UsageError(f"--output=FILE is needed: nothing is written to {texts[0]}")
    from btlm_jax.runs.report import read_run, report_html
    from btlm_jax.storage.files import write_atomically

    runs = [read_run(text) for text in texts]
    output = output or runs[0].workdir.path / "report.html"
    if output.is_dir():
        raise UsageError(f"--output={output} is a folder; give the name of a file")
    if not os.access(output.parent, os.W_OK):
        raise UsageError(f"{output} cannot be written; give --output=FILE in a folder that is there and yours")
    write_atomically(output, report_html(runs, base=_base(flags, runs[0])))
    print(output)
    return DONE


def report_flags() -> Flags:
    """Define the flags of `btlm report`."""
    flags = Flags(REPORT_HELP)
    flags.define_string("workdir", "", "the run; may be given without the flag, first")
    flags.define_string("compare", "", "workdir of a second run, drawn beside the first")
    flags.define_string("output", "", "the file; by default report.html in the workdir")
    flags.define_string("base", "", "config to compare the run's with; by default the one that its command names")
    return flags


def _base(flags: Flags, run: RunRecords) -> tuple[str, dict[str, Any]]:
    """Return the config to compare with, and its name. Of the run's command only installed ones are run."""
    name = flags.string("base") or _name_in_command(run) or _DEFAULT_BASE
    given, _, argument = (name, "", "") if "://" in name else name.partition(":")
    return name, load_config(find_config(given), argument=argument, changes={})


def _name_in_command(run: RunRecords) -> str:
    """Return the config that the last start was given, "" if it was none of those that are installed."""
    starts = run.workdir.starts
    words = starts[-1].command if starts else ()
    for word, following in itertools.pairwise((*words, "")):
        key, _, value = word.partition("=")
        if key.lstrip("-") == "config" and key.startswith("-"):
            given = value or following
            return given if _is_packaged(given) else ""
    return ""


def _is_packaged(given: str) -> bool:
    """Return whether a value of --config names a config that is installed; a URL is not fetched."""
    if "://" in given:
        return False
    try:
        file = find_config(given.partition(":")[0])
    except UsageError:
        return False
    return file.resolve().is_relative_to(packaged_folder("configs").resolve())
