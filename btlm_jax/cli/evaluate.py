"""`btlm evaluate`: what a model is judged by."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from btlm_jax import notices, stopping
from btlm_jax.cli import DONE, UsageError
from btlm_jax.cli.parse import Flags, check_processes, define_processes, has_several, place_of

if TYPE_CHECKING:
    from btlm_jax.evaluate.evaluation import EvaluationConfig
    from btlm_jax.evaluate.report import Table
    from btlm_jax.evaluate.task_settings import CodeSettings, TaskSettings

EVALUATE_HELP = """btlm evaluate: measure a model on texts.

examples:
  btlm evaluate --checkpoint=runs/local
      the loss of all held-out documents of the run's token store, by source, with intervals
  btlm evaluate --checkpoint=runs/local/checkpoints/500 --text articles/ more.jsonl.zst
      one of its checkpoints, on other texts
  btlm evaluate --checkpoint=btlm-3b-8k-base --store=gs://bucket/store --overlap=4096 --tokens_per_source=1000000
      a Hugging Face model on a store's held-out documents, every token with at least 4,096 tokens before it
  btlm evaluate --checkpoint=runs/local --positions --position_lengths=512,2048,8192
      the loss by position, beyond the trained length too, with and without interpolated ALiBi; and its plot
  btlm evaluate --checkpoint=runs/local --retrieval --retrieval_lengths=256,512,1024
      what it finds again of lines, topics and passkeys, by length and depth, and the loss of the answers
  btlm evaluate --checkpoint=runs/local --all
      all of this; evaluation/ then has a card, which btlm convert puts into the model card
  btlm evaluate --checkpoint=runs/local --tasks=hellaswag,piqa,mmlu
      tasks of lm-evaluation-harness, which fetches their data; --tasks=btlm: those that the published model was judged
      by. btlm lm-eval has the harness's whole command line
  btlm evaluate --checkpoint=runs/local --summaries qmsum.jsonl govreport.jsonl --human_eval --run_code
      ROUGE of summaries of long documents; pass@1 of the functions that it completes, which are run
  btlm evaluate --compare runs/a runs/b --text articles/
      the differences of two models, with intervals of pairs of documents
  btlm evaluate --checkpoint=gs://bucket/run --store=gs://bucket/store --output=results --distributed
      on every host of a TPU pod slice at the same time: all its devices score, and the first host writes

Every token is counted once. A text longer than the model's length is scored in windows, each of which sees --overlap
tokens of the one before; with 1 a text's loss is what lm-evaluation-harness has for it (loglikelihood_rolling). Before
each text stands the end-of-text id, which is not counted. Intervals hold 95 % of 1,000 samples of whole documents.

Results go to evaluation/ beside the model's files or to --output: each part's own file, plots, evaluation.json and the
card evaluation.md. What is done is not measured again, and an interrupted command goes on. Progress goes to the error
stream. Of several processes, which --distributed or --coordinator joins as in training, all load the model and the
texts, and process 0 alone reads and writes results; weights of 4 bits run in one process.
"""


def evaluate(arguments: Sequence[str]) -> int:
    """Run `btlm evaluate`; return the exit code."""
    flags = evaluate_flags()
    if not flags.parse(arguments):
        return DONE
    compared = flags.strings("compare")
    if compared and (flags.is_given("checkpoint") or len(compared) != 2):
        raise UsageError("--compare A B takes two models, and no --checkpoint")
    if not compared and not flags.string("checkpoint"):
        raise UsageError("--checkpoint=MODEL is needed: a run, one of its checkpoints, a model's directory or a URL")
    from btlm_jax.evaluate import evaluation
    from btlm_jax.storage.location import expand_pattern

    check_processes(flags)
    parts = _parts(flags)
    _check_have_effect(flags, parts)
    try:
        config = evaluation.EvaluationConfig(
            parts=parts,
            texts=tuple(location for text in flags.strings("text") for location in expand_pattern(text)),
            store=flags.location("store") if flags.is_given("store") else None,
            output=flags.optional_path("output"),
            length=flags.integer("length"),
            overlap=flags.integer("overlap"),
            tokens_per_source=flags.integer("tokens_per_source"),
            position_lengths=_lengths(flags, "position_lengths"),
            position_tokens=flags.integer("position_tokens"),
            retrieval_lengths=_lengths(flags, "retrieval_lengths"),
            retrieval_cases=flags.integer("retrieval_cases"),
            seed=flags.integer("seed"),
            tasks=_tasks(flags),
            summaries=tuple(Path(os.path.expanduser(path)) for path in flags.strings("summaries")),
            summary_lengths=_lengths(flags, "summary_lengths"),
            code=_code(flags),
            batch_size=flags.integer("batch_size"),
            int4=flags.boolean("int4"),
            dtype=flags.string("dtype"),
            batch_tokens=flags.integer("batch_tokens"),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    names = tuple(compared) or (flags.string("checkpoint"),)
    tables = (_measure_with_others if has_several(flags) else _measure)(names, config, flags)
    if tables:
        print("\n\n".join(table.as_text() for table in tables))
    return DONE


def _measure(names: Sequence[str], config: EvaluationConfig, flags: Flags) -> list[Table]:
    """Evaluate one model, or compare two; return the tables."""
    from btlm_jax.evaluate import evaluation

    return (
        evaluation.evaluate_both(names, config) if flags.is_given("compare") else evaluation.evaluate(names[0], config)
    )


def _measure_with_others(names: Sequence[str], config: EvaluationConfig, flags: Flags) -> list[Table]:
    """Do what `_measure` does together with the other processes; the tables are process 0's."""
    from btlm_jax.display.progress import print_error_line
    from btlm_jax.parallel import peers

    stopping.begin()
    stop, place = stopping.current(), place_of(flags)
    stop.kept = "what is measured is kept"
    if place.index:
        notices.mute()
    settings = dataclasses.asdict(config)
    settings.pop("output")  # of process 0 alone
    facts = peers.facts_of(settings, flags={"models": " ".join(names)})
    try:
        peers.join(place, facts=facts, stop=stop, log=print_error_line if place.index == 0 else lambda line: None)
        tables = _measure(names, config, flags)
        stop.wait_for_all("evaluated")
        return tables
    except stopping.ProcessesDifferError as error:
        raise UsageError(str(error)) from error
    except Exception as error:
        from btlm_jax.cli import errors

        errors.wait_if_peer_is_gone(error)
        raise


def _parts(flags: Flags) -> tuple[str, ...]:
    """Return the parts that are asked for; held-out loss if there is none."""
    from btlm_jax.evaluate import evaluation

    given = {part: flags.boolean(part) or flags.boolean("all") for part in evaluation.MEASURED_ALWAYS}
    given |= {part: flags.is_given(part) for part in (evaluation.TASKS, evaluation.SUMMARIES)}
    given[evaluation.CODE] = flags.boolean(evaluation.CODE)
    return tuple(part for part in evaluation.PARTS if given[part]) or (evaluation.HELDOUT,)


_ONLY_FOR = {  # flags, and the parts of an evaluation that read them
    ("text", "store", "tokens_per_source"): ("heldout", "positions"),
    ("overlap",): ("heldout",),
    ("length",): ("heldout", "tasks", "human_eval"),
    ("position_lengths", "position_tokens"): ("positions",),
    ("retrieval_lengths", "retrieval_cases"): ("retrieval",),
    ("seed",): ("retrieval", "tasks", "human_eval"),
    ("include_path", "num_fewshot", "task_metadata"): ("tasks",),
    ("limit", "run_code"): ("tasks", "human_eval"),
    ("summary_lengths",): ("summaries",),
    ("code_samples", "code_temperature", "code_num_tokens"): ("human_eval",),
    ("int4", "batch_size"): ("tasks", "summaries", "human_eval"),
    ("batch_tokens",): ("heldout", "positions", "retrieval", "tasks"),
}


def _check_have_effect(flags: Flags, parts: Sequence[str]) -> None:
    """Check that some part reads each flag that is given.

    Raises:
      UsageError: none does.
    """
    for names, readers in _ONLY_FOR.items():
        for name in names:
            if flags.is_given(name) and not flags.is_off(name) and not set(readers) & set(parts):
                those = " or ".join(f"--{part}" for part in readers)
                raise UsageError(f"--{name} is for {those}, which {'are' if len(readers) > 1 else 'is'} not given")
    if flags.is_given("code_temperature") and flags.integer("code_samples") == 1:
        raise UsageError("--code_temperature is for --code_samples of 2 and more: a single one is the likeliest")


def _code(flags: Flags) -> CodeSettings | None:
    """Return what --human_eval and its flags say, or None without it."""
    from btlm_jax.evaluate.task_settings import CodeSettings

    if not flags.boolean("human_eval"):
        return None
    return CodeSettings(
        samples=flags.integer("code_samples"),
        temperature=flags.number("code_temperature"),
        num_tokens=flags.integer("code_num_tokens"),
        limit=flags.integer("limit"),
        run_code=flags.boolean("run_code"),
    )


def _tasks(flags: Flags) -> TaskSettings | None:
    """Return what --tasks and its flags say, or None without it."""
    from btlm_jax.evaluate.task_settings import TaskSettings
    from btlm_jax.storage.files import parse_json_object

    if not flags.is_given("tasks"):
        return None
    metadata = flags.string("task_metadata")
    return TaskSettings(
        names=tuple(name.strip() for name in flags.string("tasks").split(",")),
        include_paths=tuple(Path(os.path.expanduser(path)) for path in flags.strings("include_path")),
        num_fewshot=flags.integer("num_fewshot"),
        limit=flags.integer("limit"),
        metadata=parse_json_object(metadata, name="--task_metadata") if metadata else {},
        run_code=flags.boolean("run_code"),
    )


def _lengths(flags: Flags, name: str) -> tuple[int, ...]:
    """Return the numbers of a flag that lists lengths."""
    from btlm_jax.recipe.config import whole_number

    try:
        return tuple(whole_number(f"--{name}", word.strip()) for word in flags.string(name).split(","))
    except ValueError as error:
        raise UsageError(f"{error}; lengths are separated by commas: 2048,8192") from None


def evaluate_flags() -> Flags:
    """Define the flags of `btlm evaluate`."""
    flags = Flags(EVALUATE_HELP)
    flags.define_string(
        "checkpoint",
        "",
        "a run, RUN/average, one of its checkpoints, a converted, 4-bit or Hugging Face model, or its URL",
    )
    flags.define_paths("compare", "two models, which are measured alike, and their differences")
    flags.define_paths("text", "files, folders, patterns or URLs of texts, in every form that btlm corpus reads")
    flags.define_string("store", "", "token store of whose held-out documents; by default the run's own")
    flags.define_string("output", "", "folder for the results; by default evaluation/ beside the model's files")
    flags.define_integer("length", 0, "of a window, in tokens; 0: the longest that the model was trained at")
    flags.define_integer("overlap", 1, "tokens that a window sees of the one before it, at least")
    flags.define_integer("tokens_per_source", 0, "of each source the first documents, up to so many tokens; 0: all")
    flags.define_boolean("heldout", False, "measure the loss by source; done when nothing else is asked for")
    flags.define_boolean("positions", False, "measure the loss by position, in windows beyond the trained length too")
    flags.define_boolean("retrieval", False, "measure whether it finds lines, topics and passkeys far back in a text")
    flags.define_boolean("all", False, "measure all of these; what follows is measured if it is given")
    flags.define_string("position_lengths", "2048,8192,16384,32768", "of windows for the loss by position")
    flags.define_integer("position_tokens", 1 << 20, "of a curve, at most, and one window at least; 0: all")
    flags.define_string("retrieval_lengths", "512,1024,2048,4096,8192", "of retrieval's texts, in tokens")
    flags.define_integer("retrieval_cases", 50, "of each task and length")
    flags.define_integer("seed", 0, "of retrieval's texts, and of what tasks and HumanEval sample")
    flags.define_string(
        "tasks",
        "",
        "of lm-evaluation-harness, such as hellaswag,piqa, or groups, patterns and YAML files of them; btlm: the tasks "
        "of the published model's kinds, MMLU 5-shot and the others 0-shot",
    )
    flags.define_paths("include_path", "folders with YAML files of further tasks")
    flags.define_integer("num_fewshot", -1, "examples before each question of --tasks; -1: each task's own number")
    flags.define_integer("limit", 0, "of each task, and of HumanEval, only so many documents, for a try; 0: all")
    flags.define_string("task_metadata", "", 'JSON for tasks that make texts (RULER): {"max_seq_lengths": [2048]}')
    flags.define_paths("summaries", "files of JSON lines with document, summary and perhaps question: ROUGE")
    flags.define_string("summary_lengths", "2048,4096,8192", "of a document's prompt and summary, in tokens")
    flags.define_boolean("human_eval", False, "have HumanEval's functions completed; --run_code runs and counts them")
    flags.define_integer("code_samples", 1, "of each of HumanEval's problems; one is the likeliest")
    flags.define_float("code_temperature", 0.8, "of several samples")
    flags.define_integer("code_num_tokens", 512, "of a completion, at most")
    flags.define_boolean("run_code", False, "run what the model writes: HumanEval's in a sandbox, tasks' as this user")
    flags.define_boolean("int4", False, "run tasks, summaries and HumanEval with weights of 4 bits, made on the way")
    flags.define_integer("batch_size", 16, "texts that are generated at a time; halved when out of memory")
    flags.define_string(
        "dtype", "model", "in which it computes; model: its own", choices=("model", "float32", "bfloat16")
    )
    flags.define_integer("batch_tokens", 8192, "tokens that a device scores at a time; halved when out of memory")
    define_processes(flags)
    return flags
