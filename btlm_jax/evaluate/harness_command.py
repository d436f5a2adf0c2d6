"""The harness's own command line, with our models in it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from unittest import mock

import lm_eval.utils
from lm_eval._cli import HarnessCLI

from btlm_jax.display.progress import print_error_line
from btlm_jax.evaluate.checkpoint import opened_checkpoint
from btlm_jax.evaluate.harness import MODEL_NAME
from btlm_jax.evaluate.ruler import check_lengths, makes_texts
from btlm_jax.evaluate.tasks import fork_nothing, table, tokenizer_folder
from btlm_jax.notices import StrictError, is_named

_COMMANDS = ("run", "ls", "validate")


def run(arguments: Sequence[str]) -> None:
    """Run the harness's command line with these arguments.

    Raises:
      SystemExit: its parser ended: with help, or with an error.
      ValueError: the harness refuses something, or a task fails.
    """
    lm_eval.utils.setup_logging()
    fork_nothing()
    sys.argv[1:] = arguments if arguments[0] in _COMMANDS else ["run", *arguments]
    command_line = HarnessCLI()
    parsed = command_line.parse_args()
    with contextlib.ExitStack() as stack:
        if parsed.command == "run":
            if parsed.model is None and parsed.config is None:
                parsed.model = MODEL_NAME
            if parsed.model == MODEL_NAME:
                _add_tokenizer(parsed, stack)
        # Its own table forks processes, which can deadlock: JAX has threads in this one
        stack.enter_context(mock.patch.object(lm_eval.utils, "make_table", table))
        try:
            command_line.execute(parsed)
        except (ValueError, OSError, LookupError, AssertionError, ImportError, TypeError) as error:
            if is_named(error) or isinstance(error, StrictError):
                raise
            raise ValueError(f"lm-evaluation-harness: {type(error).__name__}: {error}") from error


def _add_tokenizer(parsed: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    """Give tasks that make their texts the model's tokenizer, unless the command line names one.

    Raises:
      ValueError: they cannot be made of the lengths in --metadata.
    """
    arguments, metadata = parsed.model_args or {}, parsed.metadata or {}
    names = [name for names in parsed.tasks or () for name in names.split(",")]
    if not makes_texts(names):
        return
    name = str(arguments.get("checkpoint") or arguments.get("pretrained") or "")
    if "tokenizer" not in arguments and "tokenizer" not in metadata and name:
        checkpoint = stack.enter_context(opened_checkpoint(name, log=print_error_line))
        folder = stack.enter_context(tokenizer_folder(checkpoint.metadata, checkpoint.tokenizer))
        parsed.metadata = metadata = {"tokenizer": str(folder)} | metadata
    if tokenizer := arguments.get("tokenizer") or metadata.get("tokenizer"):
        check_lengths(names, metadata | {"tokenizer": str(tokenizer)})
