"""Notices: what a command ignores, drops, replaces, prefers or falls back from, in one line each and counted.

A notice has a name out of NAMES. `--strict` turns all of them into an error, `--strict=NAME,...` those named.
Processes that help another one (workers of the corpus) return counts, and the one that waits for them reports.
"""

from __future__ import annotations

import collections
import dis
import os
import sys
from collections.abc import Callable, Collection

NAMES = {
    "attention-dropped": "the cache drops keys that have more than a trace of a head's attention",
    "batch-halved": "a batch to score does not fit into memory; half of it is scored at a time from then on",
    "code-not-run": "PyTorch or transformers is missing, and a part of a conversion's proof is left out",
    "changed-since-export": "a file is not as it was when btlm convert wrote it beside these weights",
    "evaluation-again": "a file of an evaluation's results is not as it was written, and is not used",
    "not-compared": "something was measured of two models on texts or tokens that differ, and is not compared",
    "lengths-differ": "losses of two models are compared that were measured in windows of different lengths",
    "length-left-out": "an evaluation's texts are too short for windows of a length",
    "evaluation-of-other": "an evaluation's report is of other weights: it stays out of a model card, or is replaced",
    "part-replaced": "a report had a part that was measured on other texts or tasks, or otherwise, and is replaced",
    "num-fewshot-kept": "a task of an evaluation has a number of examples that --num_fewshot does not change",
    "not-in-card": "an evaluation of 4-bit weights or of some documents alone stays out of a model card",
    "text-empty": "texts to evaluate are empty",
    "context-cut": "a context is longer than the length of the model, and its beginning is left out",
    "config-is-older": "a config file lacks keys that came later; they are as before there were such keys",
    "config-keys-dropped": "a config.json has keys that no form here keeps",
    "eos-contradicts": "files of a model name different end-of-text ids",
    "files-not-converted": "a model's directory has files that are not carried over",
    "index-contradicts": "an index of shards is wrong about where tensors are",
    "kernels-not-compiled": "C++ kernels cannot be compiled here; slower code computes the same",
    "compiler-not-found": "there is no program of the name in CXX; other C++ compilers are looked for",
    "kernels-not-kept": "the user's cache cannot be written, so C++ kernels are compiled at every start",
    "kernels-ignored": "kernels that were built ahead do not fit this installation",
    "checkpoint-damaged": "a checkpoint is not as it was written; it is set aside, and the one before it is taken",
    "checkpoint-without-hashes": "a checkpoint is too old to have hashes, so that its arrays cannot be compared",
    "stop-without-text": "a stop string has a special token in it, which has no text, and so is never found",
    "save-failed": "a checkpoint could not be written; the run goes on, and tries again",
    "step-skipped": "a step's numbers are not finite, or far above those before, and its update is not made",
    "went-back": "a run went back to a checkpoint from steps with bad numbers, and passes over them",
    "data-gone": "the text that a run's store was made of is not there any more",
    "bucket-again": "a request to a bucket failed, and is made again",
    "not-uploaded": "a run in a bucket drops a checkpoint that an earlier start of it could not upload",
    "upload-failed": "files of a run could not be copied to its bucket; the run goes on, and it is tried again",
    "upload-caught-up": "after that, a bucket has all of a run's files",
    "workdir-taken-over": "a workdir is taken from the command that owned it",
    "workdir-watched": "a workdir has an owner on another machine, which may be dead",
    "notice-before-start": "a notice that Google Cloud will halt the machine was there at a start, and stops nothing",
    "setting-changed": "a resumed run has a setting that its checkpoint has not",
    "given-twice": "a flag is given more than once, and the last one counts",
    "constants-not-taken": "btlm new --constants leaves out what a search found of values that follow a run's length",
    "study-replaced": "a directory holds another study that has made no store and no trial yet",
    "not-the-store": "data.store is also the name of something in the current directory, which is not read",
    "metrics-line-dropped": "a line of metrics.jsonl is damaged, and is removed at a resume",
    "tracker-stopped": "a tracker cannot take a run's numbers any more, and the run goes on without it",
    "tracker-begun-again": "another run begins in a tracker: steps are trained anew, or its file is damaged",
    "plan-too-fast": "a step would execute more of a chip's peak than any run known, and is predicted slower",
    "not-traced": "steps of log.profile_steps are not traced, as the run is past them",
    "summary-made-again": "the summary of a finished run is damaged, and its end is repeated",
    "documents-joined": "a window has more documents than its attention keeps apart; those beyond see each other",
    "no-targets": "a batch of training is all padding: its step changes nothing",
    "machine-changed": "a run is resumed where its numbers may differ in their last bits",
    "task-repeated": "a record of finished work of a corpus stage is damaged, and the work is repeated",
    "read-again": "a URL could not be read at once",
    "config-keys-replaced": "a config's keys are not used, because the model of --init decides them",
    "init-not-kept": "a fact of the model of --init that a run's model does not have",
    "tokenizer-unknown": "a model of --init has no tokenizer to compare the store's with",
    "vocabulary-grown": "rows are added to a model's table of embeddings",
    "add-bos-token-ignored": "tokenizer_config.json contradicts tokenizer.json on what stands in front of a text",
    "prompt-end-ignored": "a tokenizer.json puts ids after every text, which a prompt does not have here",
    "output-replaced": "the file for the texts exists already",
    "ids-without-token": "the model has more ids than its tokenizer; those without a token are never drawn",
    "left-out": "a hidden file or folder, or one of a corpus stage's work or a run, lies in a folder that is read",
    "file-not-read": "files of other kinds lie in a folder that is read",
    "not-readable": "a folder cannot be read, or a link leads nowhere",
    "file-read-once": "a file is given more than once, or by links",
    "folder-read-once": "links lead to a folder that is read already",
    "line-quarantined": "a line of a raw file is no document",
    "value-changed": "a value or a column beside documents' texts, or a character of one, is not kept as it is",
    "evaluation-without-runs": "nothing of an evaluation file can be found inside documents",
    "evaluation-short": "evaluation texts are found only as whole documents",
    "evaluation-unusable": "evaluation texts cannot be looked for",
    "many-sources": "a corpus has so many sources that they may be no such",
    "smaller-vocabulary": "a text is too small for a tokenizer of the size that was tried",
    "example-cut": "an example to fine-tune on is longer than a window of training, and its end is cut off",
    "example-too-long": "an example to fine-tune on is longer than a window of training, and is left out",
    "network-open": "programs that a model wrote are run with the network",
    "no-end-token": "a completion to fine-tune on ends with no special token, so that a model does not learn to stop",
    "special-token-named": "a text to fine-tune on has the name of a special token, which stands for the token",
    "average-not-taken": "a run keeps an average of its weights, and the last ones are taken",
    "departed-from-reference": "the loss is above the course that it had beside the run of log.reference",
    "reference-differs": "the run of log.reference was trained on another course than this one",
    "without-kernels": "a model is of a form that the CPU kernels lack, and decodes in XLA",
    "tokenizer-lossy": "a tokenizer does not give every text back: a store's by --allow_lossy, or that of a model",
    "tokenizer-preferred": "a directory has files of several tokenizers; one is read, as transformers does",
    "weights-preferred": "a directory has several files of weights; one is read, as transformers does",
}
LINES_OF_ONE_NAME = 5  # further notices of the name are counted only
# Of files in folders, which a command may list more than once, and of a tokenizer's files: the same line is neither
# said nor counted again.
_ONCE = frozenset((
    "left-out", "file-not-read", "not-readable", "file-read-once", "folder-read-once", "tokenizer-preferred",
    "prompt-end-ignored", "add-bos-token-ignored", "config-keys-dropped",
))  # fmt: skip
_EACH_SAID = frozenset(("setting-changed",))  # but of these, of which there are at most as many as keys


_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_NAMED = "_btlm_is_named"  # attribute of an error: what `is_named` said of it in another process


def is_named(error: BaseException) -> bool:
    """Return whether a `raise` of our own code made the error, so that its message was written for the user."""
    if _NAMED in getattr(error, "__dict__", {}):
        return bool(error.__dict__[_NAMED])
    if not isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)):
        return False
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    if at is None:
        return False
    code = at.tb_frame.f_code
    is_raise = code.co_code[at.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return is_raise and code.co_filename.startswith(_PACKAGE)


def note_whether_named(error: BaseException) -> None:
    """Have `is_named` say of an error that is sent to another process what it says of it here."""
    error.__dict__[_NAMED] = is_named(error)


class StrictError(Exception):
    """A notice that --strict turns into an error. No ValueError, so that no reader takes it for bad input."""


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_called: dict[str, str] = {}  # local folder -> what the user knows it as


def call_it(folder: os.PathLike, name: str) -> None:
    """Have `named` say another name for a folder of this machine: the URL that it is a copy of."""
    _called[os.fspath(folder)] = name


def named(text: str) -> str:
    """Return a text with the folders of `call_it` under their other names."""
    for folder, name in _called.items():
        text = text.replace(folder, name)
    return text


_counts: collections.Counter[str] = collections.Counter()  # name -> things it was said of
_lines: collections.Counter[str] = collections.Counter()  # name -> lines printed
_said: set[str] = set()  # texts of the names in _ONCE
_strict: frozenset[str] = frozenset()
_print: Callable[[str], None] = _print_line
_is_muted = False


def begin(*, strict: Collection[str]) -> None:
    """Start counting for a new command; notices of the names in `strict` will be errors."""
    global _strict, _is_muted
    _counts.clear()
    _lines.clear()
    _said.clear()
    _strict, _is_muted = frozenset(strict), False


def print_with(print_line: Callable[[str], None]) -> None:
    """Have lines printed by another function, such as one that knows of progress bars."""
    global _print
    _print = print_line


def mute() -> None:
    """Print nothing from now on: another process of the same run says the same."""
    global _is_muted
    _is_muted = True


def report(name: str, text: str, *, count: int = 1) -> None:
    """Print one line and count `count` things.

    Raises:
      StrictError: --strict has the name.
      KeyError: NAMES has not.
    """
    NAMES[name]
    if name in _strict:
        raise StrictError(f"{named(text)} ({name}, an error because of --strict)")
    if name in _ONCE:
        if text in _said:
            return
        _said.add(text)
    _counts[name] += count
    _lines[name] += 1
    if not _is_muted and (_lines[name] <= LINES_OF_ONE_NAME or name in _EACH_SAID):
        is_last = _lines[name] == LINES_OF_ONE_NAME and name not in _EACH_SAID
        more = "; further ones are counted only" if is_last else ""
        _print(f"note: {named(text)} ({name}{more})")


def counts() -> dict[str, int]:
    """Return name -> how many things it was reported of since `begin`."""
    return dict(_counts)


def finish() -> None:
    """Print how often each name was reported, if any was."""
    if _counts and not _is_muted:
        _print(f"notes: {', '.join(f'{count:,} {name}' for name, count in sorted(_counts.items()))}")
