"""The command line, `btlm <verb> ...`: parse, build the config, call one function, return an exit code.

Exit codes: 0 done, 1 error, 2 usage, 75 preempted and saved (run the same command again), 76 stopped on bad numbers,
130 interrupted by Ctrl-C.
The only importer of absl.flags. Verbs import what they call late, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Sequence

from absl import logging as absl_logging

from btlm_jax import __version__
from btlm_jax.cli import convert, corpus, generate, plan, train, tune
from btlm_jax.cli.parse import BAD_NUMBERS, DONE, ERROR, INTERRUPTED, PREEMPTED, USAGE, UsageError

__all__ = ["BAD_NUMBERS", "DONE", "ERROR", "PREEMPTED", "USAGE", "UsageError", "entry", "main"]

HELP = f"""btlm {__version__}: train BTLM-3B-8K style language models in JAX.

usage: btlm <verb> [flags]        (btlm <verb> --help explains a verb)

  train            train from a config, or resume what is in the workdir
  generate         continue texts with a trained model
  convert          make a model of another form: Hugging Face both ways
  corpus build     make the token store that a config names, without training
  corpus clean     make a corpus out of raw files, stage by stage (btlm corpus --help)
  corpus verify    read a token store again and compare every byte with its manifest
  tune coord-check prove on a CPU that the parametrization is right, and that wrong ones are caught (2 minutes)
  plan             compile the train steps for a TPU slice that is not there: fits? how fast? how much?

first:  btlm train --config=configs/local_cpu.py --workdir=runs/local
"""

VERBS = {
    "train": train.train,
    "generate": generate.generate,
    "convert": convert.convert,
    "corpus": corpus.corpus,
    "tune": tune.tune,
    "plan": plan.plan,
}


def entry() -> None:
    """Run the command line of this process and exit with its code."""
    _quiet_orbax()
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return DONE if arguments else USAGE
    verb, *rest = arguments
    try:
        if verb not in VERBS:
            raise UsageError(f"unknown verb {verb!r}; verbs are {', '.join(VERBS)} (btlm --help)")
        return VERBS[verb](rest)
    except UsageError as error:
        print(f"btlm: usage: {error}", file=sys.stderr)
        return USAGE
    except (ValueError, OSError) as error:
        print(f"btlm {verb}: error: {error}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print(f"btlm {verb}: interrupted; the same command goes on where it can", file=sys.stderr)
        return INTERRUPTED


def _quiet_orbax() -> None:
    """Leave a failed checkpoint to the one line that `main` prints.

    Orbax logs the same error from each of its threads, and the writes still in flight complain to an event loop that is
    closed by then, or are dropped with their errors unread: hundreds of lines of traceback about one full disk.
    """

    def report_other(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report_other
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    absl_logging.get_absl_logger().addFilter(
        lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
    )
    absl_logging.get_absl_logger().addFilter(  # that a reader only reads needs no warning
        lambda record: not re.search("read_only=True|is read only", record.getMessage())
    )
