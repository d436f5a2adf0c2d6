"""The command line, `btlm <verb> ...`: parse, build the config, call one function, return an exit code.

Exit codes are in HELP.
A verb is the file of that name; only the chosen one is imported, and it imports what it calls after its flags are
parsed, so that `--help` answers at once.
"""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence

from btlm_jax import __version__, interrupted_line, notices, stopping
from btlm_jax.stopping import ERROR, INTERRUPTED, PEER_GONE, PREEMPTED, Stopped

DONE, USAGE, FAULT, BAD_NUMBERS, PIPE_CLOSED = 0, 2, 70, 76, 141


class UsageError(Exception):
    """The command line was wrong; the message says how and what would be right."""


HELP = f"""btlm {__version__}: train BTLM-3B-8K style language models in JAX.

usage: btlm <verb> [flags]        (btlm <verb> --help explains a verb)

  new              write a config for so many parameters, every value with its rule
  train            train from a config, or resume what is in the workdir
  generate         continue texts with a trained model
  evaluate         measure a trained model: loss by source and by position, retrieval, tasks; compare two
  lm-eval          the command line of lm-evaluation-harness, with models of these forms
  convert          make a model of another form: Hugging Face both ways, GGUF, Jais, 4 bits
  corpus build     make the token store that a config names, without training
  corpus clean     make a corpus out of raw files, stage by stage (btlm corpus --help)
  corpus verify    read a token store again and compare every byte with its manifest
  status           what runs do or how they ended: step, loss, speed, time left, where the time went
  report           write a run as one HTML page: curves, where the time went, config; two runs beside each other
  checkpoints      list, verify, prune and copy the checkpoints of a run
  tune             prove that the parametrization is right; learning-rate sweeps, searches, scaling laws
  plan             compile the train steps for TPUs or GPUs that are not there: fits? how fast? how much?
  configs          list the configs that --config takes by name
  build-kernels    compile the C++ kernels for CPUs ahead of their first use
  completion       print a script that completes verbs, flags and keys in bash, zsh or fish

first:  btlm train --config=local_cpu --workdir=runs/local

exit codes:  0 done    1 an error, named in one line    2 a wrong command line    70 a fault of btlm, please report it
             {PREEMPTED} preempted and saved: the same command goes on    76 stopped on bad numbers
             {PEER_GONE} another process of the run is gone, or the run stands still: the same command goes on
             {INTERRUPTED} Ctrl-C (of train the second one; the first saves and ends with {PREEMPTED})
             141 whoever read the output has left
"""


def _train(arguments: Sequence[str]) -> int:
    from btlm_jax.cli.train import train

    return train(arguments)


def _new(arguments: Sequence[str]) -> int:
    from btlm_jax.cli.new import new

    return new(arguments)


def _generate(arguments: Sequence[str]) -> int:
    from btlm_jax.cli.generate import generate

    return generate(arguments)


def _evaluate(arguments: Sequence[str]) -> int:
    from btlm_jax.cli.evaluate import evaluate

    return evaluate(arguments)


def _lm_eval(arguments: Sequence[str]) -> int:
    from btlm_jax.cli.lm_eval import lm_eval

    return lm_eval(arguments)


def _convert(arguments: Sequence[str]) -> int:
    from btlm_jax.cli.convert import convert

    return convert(arguments)


def _corpus(arguments: Sequence[str]) -> int:
    from btlm_jax.cli.corpus import corpus

    return corpus(arguments)


def _status(arguments: Sequence[str]) -> int:
    from btlm_jax.cli.status import status

    return status(arguments)


def _report(arguments: Sequence[str]) -> int:
    from btlm_jax.cli.report import report

    return report(arguments)


def _checkpoints(arguments: Sequence[str]) -> int:
    from btlm_jax.cli.checkpoints import checkpoints

    return checkpoints(arguments)


def _tune(arguments: Sequence[str]) -> int:
    from btlm_jax.cli.tune import tune

    return tune(arguments)


def _plan(arguments: Sequence[str]) -> int:
    from btlm_jax.cli.plan import plan

    return plan(arguments)


def _configs(arguments: Sequence[str]) -> int:
    from btlm_jax.cli.configs import configs

    return configs(arguments)


def _build_kernels(arguments: Sequence[str]) -> int:
    from btlm_jax.cli.build_kernels import build_kernels

    return build_kernels(arguments)


def _completion(arguments: Sequence[str]) -> int:
    from btlm_jax.cli.completion import completion

    return completion(arguments)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "new": _new,
    "train": _train,
    "generate": _generate,
    "evaluate": _evaluate,
    "lm-eval": _lm_eval,
    "convert": _convert,
    "corpus": _corpus,
    "status": _status,
    "report": _report,
    "checkpoints": _checkpoints,
    "tune": _tune,
    "plan": _plan,
    "configs": _configs,
    "build-kernels": _build_kernels,
    "completion": _completion,
}


_STUDIES = (["tune", "lr-transfer"], ["tune", "search"])  # train as `btlm train` does, and stop as it does


def entry() -> None:
    """Run the command line of this process and exit with its code."""
    _open_closed_streams()
    if sys.argv[1:2] == ["train"] or [word.replace("_", "-") for word in sys.argv[1:3]] in _STUDIES:
        stopping.begin()
    else:
        signal.signal(signal.SIGINT, _on_interrupt)
    sys.unraisablehook = _report_unraisable
    if len(sys.argv) > 2:
        quiet_orbax()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that is not UTF-8 gets \\u2502 in place of what it lacks
            stream.reconfigure(errors="backslashreplace")
    asks = {"-h", "--help", "help", "--version", "-V", "version"}.intersection(sys.argv)
    code = DONE if asks else PIPE_CLOSED
    try:
        code = main(sys.argv[1:])
        if sys.stdout is not None:  # it is closed: btlm ... >&-
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output (head, less) has seen enough
        _discard_output()
    except OSError as error:
        _discard_output()
        print(f"btlm: error: standard output cannot be written: {error}", file=sys.stderr)
        code = ERROR
    # Threads of libraries are at work: Python's end would wait for them, or crash in one.
    if stopping.leave(code) or code == INTERRUPTED:
        if sys.stderr is not None:
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _open_closed_streams() -> None:
    """Have what is written to a standard stream that is closed (btlm ... 2>&-) go nowhere.

    Python would print errors to the output in its place, and libraries write to the file that is opened next.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


# Interrupts, with the frames they passed: to free what JAX had half built there crashed 9 of 116 runs that a signal met
# in compilation, and then 0 of 197 (2 vCPU Intel Xeon, 2026-11-29). `entry` ends the process at once after one.
_not_freed: list[KeyboardInterrupt] = []


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code.

    Raises:
      BrokenPipeError: nobody reads the output any more.
    """
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return DONE if arguments else USAGE
    if arguments[0] in ("--version", "-V", "version"):
        print(f"btlm {__version__}")
        return DONE
    verb, rest = arguments[0].replace("_", "-"), arguments[1:]
    notices.begin(strict=())
    try:
        if verb not in VERBS:
            from btlm_jax.cli.parse import did_you_mean

            hint = did_you_mean(verb, list(VERBS))
            raise UsageError(f"unknown verb {arguments[0]!r}; verbs are {', '.join(VERBS)} (btlm --help){hint}")
        return VERBS[verb](rest)
    except UsageError as error:
        print(f"btlm: usage: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt as interrupt:
        _not_freed.append(interrupt)
        if isinstance(interrupt, Stopped):
            print(f"btlm {verb}: {stopping.current().said()}", file=sys.stderr)
            return PREEMPTED
        print(interrupted_line(verb), file=sys.stderr)
        return INTERRUPTED
    except SystemExit:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if isinstance(error, BrokenPipeError) and is_reader_gone():
            raise
        from btlm_jax.cli import errors

        return errors.report(error, verb=verb, arguments=arguments)
    finally:
        notices.finish()


def _discard_output() -> None:
    """Let what is still to be written go nowhere: Python writes it, and complains, once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_reader_gone() -> bool:
    """Return whether nobody reads standard output any more; a broken pipe to a worker process is another thing."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # it is closed, or no file at all
        return False


def _on_interrupt(signum, frame) -> None:
    """Raise KeyboardInterrupt, but end at once during an import, where libraries turn it into other errors."""
    del signum
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            if files := sys.modules.get("btlm_jax.storage.files"):
                files.delete_unfinished()
            os.write(2, f"{interrupted_line(' '.join(sys.argv[1:2]))}\n".encode())
            os._exit(INTERRUPTED)
        frame = frame.f_back
    stopping.interrupt()


def _report_unraisable(unraisable) -> None:
    """Interrupt once more if the interrupt was raised where Python drops it: in a destructor or a weak reference."""
    if unraisable.exc_type is KeyboardInterrupt:
        import _thread
        import threading

        threading.Timer(0.01, _thread.interrupt_main).start()
    elif unraisable.exc_type is not Stopped and str(unraisable.exc_value) != "Event loop is closed":  # see quiet_orbax
        sys.__unraisablehook__(unraisable)


def quiet_orbax() -> None:
    """Report a failed checkpoint in the one line that `main` prints.

    Orbax logs the same error from each of its threads, and writes in flight complain to an event loop that is closed by
    then, or are dropped with their errors unread: hundreds of lines of traceback about one full disk.
    """
    import logging
    import re
    import warnings

    from absl import logging as absl_logging

    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    absl_logging.get_absl_logger().addFilter(
        lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
    )
    absl_logging.get_absl_logger().addFilter(  # TensorStore warns of checkpoints that it opens for reading
        lambda record: not re.search("read_only=True|is read only|size logging disabled", record.getMessage())
    )
