"""Tasks of lm-evaluation-harness on one model: found by name, loaded, measured one by one, and their scores kept.

A finished task is not measured again, and an unfinished one goes on from its last answer. Scores are in the harness's
own form, in one file, which its other tools read.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets.exceptions import DatasetsError
from lm_eval import evaluator_utils
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.manager import TaskDict
from lm_eval.utils import handle_non_serializable

from btlm_jax import notices
from btlm_jax.convert.tokenizer_files import write_tokenizer_files
from btlm_jax.evaluate.harness import BtlmLM, report_cut
from btlm_jax.evaluate.processes import is_first, say
from btlm_jax.evaluate.report import Table
from btlm_jax.evaluate.results import Results, Work
from btlm_jax.evaluate.ruler import check_lengths, makes_texts
from btlm_jax.evaluate.task_identity import config_of, digest_of
from btlm_jax.evaluate.task_settings import PAPER, PAPER_TASKS, PaperTask, TaskSettings
from btlm_jax.hub.native import ModelMetadata
from btlm_jax.notices import is_named
from btlm_jax.storage.files import write_atomically
from btlm_jax.tokenizers.tokenizer import Tokenizer

RESULTS_FILE = "lm_eval.json"
CUT = "contexts_cut"  # in the harness's form of results, by task
SEED, NUMPY_SEED, FEWSHOT_SEED = 0, 1234, 1234  # the harness's own
NUM_RESAMPLES = 1000  # of documents, for standard errors that have no formula
_LOADING_ERRORS = (
    DatasetsError, OSError, ImportError, ValueError, LookupError, AssertionError, RuntimeError, TypeError,
    AttributeError,
)  # fmt: skip


def measure_tasks(lm: BtlmLM, settings: TaskSettings, results: Results) -> dict[str, Any]:
    """Measure every task, keep its scores, and return them in the harness's form (that of lm_eval.evaluate).

    Raises:
      ValueError: a task is not known, its data cannot be had, or it does not fit the model.
      OSError: results cannot be written.
    """
    fork_nothing()
    with _tokenizer_for_tasks(lm, settings) as metadata:
        check_lengths(settings.names, metadata)
        found = load_tasks(settings, metadata=metadata)
    groups = [item for item in found if isinstance(item, Group)]
    groups += [inner for group in groups for inner in group.get_all_groups()]
    tasks = _each_once(
        [task for item in found for task in (item.get_all_tasks() if isinstance(item, Group) else [item])]
    )
    _check_can_run(tasks, settings)
    of_cases: dict[str, list[float]] = {}
    cut: dict[str, int] = {}
    accumulated = evaluator_utils.EvalAcc(groups={group.name: group for group in groups})
    for number, task in enumerate(tasks):
        say(f"task {number + 1} of {len(tasks)}: {task.task_name}")
        _seed()
        facts = _facts(task, settings, lm)
        kept = results.measure(f"task-{task.task_name}".replace("/", "-"), facts, _measuring(lm, task, settings))
        name = task.task_name
        cut[name] = kept["contexts_cut"]
        report_cut(cut[name], of=f"task {name}: ", max_length=lm.max_length)
        of_cases |= _scores_of_documents(name, facts["documents"], kept["of_cases"])
        accumulated.metrics[name] = kept["metrics"]
        accumulated.configs[name] = kept["config"]
        accumulated.versions[name], accumulated.num_fewshot[name] = kept["version"], kept["n-shot"]
        accumulated.higher_is_better[name] = kept["higher_is_better"]
        accumulated.n_samples[name] = kept["n-samples"]
    report = cast(dict[str, Any], evaluator_utils.aggregate_groups(accumulated)._to_eval_results())
    report["config"] = {
        "model": "btlm", "model_args": {"checkpoint": lm.name}, **lm.get_model_info(),
        "batch_size": lm.settings.batch_size, "limit": settings.limit or None, "num_fewshot": settings.num_fewshot,
        "random_seed": SEED, "numpy_seed": NUMPY_SEED, "fewshot_seed": FEWSHOT_SEED,
    }  # fmt: skip
    report |= {"lm_eval_version": importlib.metadata.version("lm_eval"), "date": time.time(), CUT: cut}
    if is_first():
        write_atomically(results.folder / RESULTS_FILE, _json(report))
    return report | {"of_cases": of_cases}


def _scores_of_documents(name: str, digest: str, samples: list[dict]) -> dict[str, list[float]]:
    """Return the scores of each document that are numbers, by the name of metric and documents to compare models by."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if isinstance(sample[metric], (bool, int, float)) and not _is_unmeasured(metric, sample[metric]):
                key = f"{name} {metric}, {sample['filter']} [{digest[:6]}]"
                found.setdefault(key, []).append(float(sample[metric]))
    return {key: values for key, values in found.items() if len(values) == len({each["doc_id"] for each in samples})}


def part_of(report: dict[str, Any]) -> dict[str, Any]:
    """Return what btlm's own report has of the harness's."""
    columns = [column for column in ("results", "groups") if column in report]
    return {
        "lm_eval": report["lm_eval_version"], "file": RESULTS_FILE,
        "tables": {column: [list(row) for row in _rows(report, column)] for column in columns},
        "scores": report["results"], "of_cases": report["of_cases"],
    }  # fmt: skip


def fork_nothing() -> None:
    """Have the harness resample in this process: others that it forks can deadlock, as JAX has threads here."""
    os.environ["DISABLE_MULTIPROC"] = "1"


def table(report: dict[str, Any], column: str = "results") -> str:
    """Return the scores of tasks, or of "groups", as a table in Markdown."""
    return Table(title=column, rows=_rows(report, column)).as_markdown()


def _rows(report: dict[str, Any], column: str) -> tuple[tuple[str, ...], ...]:
    cut = report[CUT] if CUT in report and any(report[CUT].values()) else {}
    header = ("", "version", "filter", "n-shot", "metric", "value", "standard error")
    rows: list[tuple[str, ...]] = [(*header, "contexts cut") if cut else header]
    for name, scores in report[column].items():
        facts = str(report["versions"].get(name, "")), str(report["n-shot"].get(name, ""))
        for key, value in scores.items():
            metric, _, of_filter = key.partition(",")
            if of_filter and not metric.endswith("_stderr") and not _is_unmeasured(metric, value):
                error = scores.get(f"{metric}_stderr,{of_filter}", "")
                row = (name, facts[0], of_filter, facts[1], metric, _number(value), _number(error))
                rows.append((*row, f"{cut[name]:,}" if name in cut else "") if cut else row)
    return tuple(rows)


def _is_unmeasured(metric: str, value: object) -> bool:
    """Return whether this is RULER's score of a length that no text has."""
    return metric.isdecimal() and value == -1


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _each_once(tasks: list[Task]) -> list[Task]:
    """Return tasks without those that several names have.

    Raises:
      ValueError: two of one name differ.
    """
    found: dict[str, Task] = {}
    for task in tasks:
        first = found.setdefault(task.task_name, task)
        if first is not task and config_of(first) != config_of(task):
            counts = " and ".join(str(each.get_config("num_fewshot")) for each in (first, task))
            raise ValueError(
                f"tasks has {task.task_name} twice, with {counts} examples, and results have room for one of a name: "
                "give each its own command and --output"
            )
    return list(found.values())


def _check_can_run(tasks: list[Task], settings: TaskSettings) -> None:
    """Check, before any is measured, that all tasks can be.

    Raises:
      ValueError: one runs what the model writes, and that is not allowed, or shows pictures or sound.
    """
    for task in tasks:
        if getattr(task, "UNSAFE_CODE", False) and not settings.run_code:
            raise ValueError(
                f"task {task.task_name} runs what the model writes, any code, with the rights of this user: "
                "--run_code allows it"
            )
        if getattr(task, "MULTIMODAL", False):
            raise ValueError(f"task {task.task_name} has pictures or sound, which no model here takes: leave it out")


def _seed() -> None:
    """Seed what tasks draw from, so that none depends on what was loaded and measured before it."""
    random.seed(SEED)
    np.random.seed(NUMPY_SEED)


def load_tasks(settings: TaskSettings, *, metadata: dict[str, Any]) -> list[Task | Group]:
    """Return the tasks and groups of all names, with their data.

    Raises:
      ValueError: a name is not known, or a task or its data cannot be loaded.
    """
    manager = _Manager(settings, metadata)
    found: list[Task | Group] = []
    for name in settings.names:
        if name == PAPER and PAPER not in manager.tasks.all_tasks:
            if settings.num_fewshot >= 0:
                notices.report("num-fewshot-kept", f"tasks={PAPER} have the published model's own numbers of examples")
            for paper_task in PAPER_TASKS:
                found += _loaded(manager, paper_task, num_fewshot=paper_task.num_fewshot)
            continue
        for match in _matches(name, manager.tasks):
            found += _loaded(manager, PaperTask(name=match, kind=""), num_fewshot=settings.num_fewshot)
    return found


class _Manager:
    """Finds and loads tasks; the harness's own 14,000 are read only if --include_path has not all that is needed."""

    def __init__(self, settings: TaskSettings, metadata: dict[str, Any]):
        self._include: list[str | Path] = [str(path) for path in settings.include_paths]
        self._metadata = metadata
        names = [name for name in settings.names if name != PAPER and not name.endswith(".yaml")]
        names += [task.of or task.name for task in PAPER_TASKS if PAPER in settings.names]
        self._has_defaults = True
        if self._include and not any(set(name) & set("*?[") for name in names):
            self._make(has_defaults=False)
            if all(self.tasks.match_tasks([name]) for name in names):
                return
        self._make(has_defaults=True)

    def load(self, named: PaperTask) -> TaskDict:
        """Load a task, group or tag.

        Raises:
          Exception: what the harness or the task raises.
        """
        _seed()  # some tasks make their documents when they are loaded
        try:
            return self.tasks.load([self._spec_of(named)])
        except _LOADING_ERRORS:
            if self._has_defaults:
                raise
        self._make(has_defaults=True)  # a group of --include_path may have tasks of the harness
        return self.load(named)

    def _make(self, *, has_defaults: bool) -> None:
        self._has_defaults, include = has_defaults, list(self._include) or None
        if has_defaults:
            self.tasks = TaskManager(include_path=include, metadata=self._metadata)
        else:
            self.tasks = TaskManager(include_path=include, include_defaults=False, metadata=self._metadata)

    def _spec_of(self, named: PaperTask) -> Any:
        name = named.of or named.name
        if not named.changes:
            return name
        path = self.tasks.task_index[name].yaml_path
        assert path is not None, name
        return load_yaml(path, resolve_func=True) | {"task": named.name} | named.changes


def _matches(name: str, manager: TaskManager) -> list[str]:
    if name.endswith(".yaml"):
        if not Path(name).is_file():
            raise ValueError(f"tasks={name} is no file; give a YAML file of a task, or a task's name")
        return [name]
    matches = manager.match_tasks([name])
    if not matches:
        near = difflib.get_close_matches(name, [*manager.all_tasks, PAPER], n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(
            f"tasks={name} is no task, group or tag of lm-evaluation-harness nor of --include_path{hint} "
            "(btlm lm-eval ls tasks lists all)"
        )
    return matches


def _loaded(manager: _Manager, named: PaperTask, *, num_fewshot: int) -> list[Task | Group]:
    try:
        loaded = manager.load(named)
    except _LOADING_ERRORS as error:
        raise ValueError(
            f"task {named.name} cannot be loaded: {type(error).__name__}: {str(error)[:500]}. Data of the harness's "
            "tasks are fetched from huggingface.co; what is offline needs them in its cache (HF_HOME), or a copy and a "
            "task file that names it (docs/guide/lm-eval.md)"
        ) from error
    for task in loaded["tasks"].values():
        given = task.get_config("num_fewshot")
        if given is None or (num_fewshot >= 0 and given != 0):  # a task that has 0 cannot have others
            task.set_config(key="num_fewshot", value=max(0, num_fewshot))
        elif num_fewshot > 0:
            text = f"task {task.task_name} is without examples, as it says itself, and not with {num_fewshot}"
            notices.report("num-fewshot-kept", text)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    groups = loaded.get("groups", {})
    inner = {child.name for group in groups.values() for child in group.get_all_groups()}
    in_groups = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    return [
        *(group for group in groups.values() if group.name not in inner),
        *(task for task in loaded["tasks"].values() if task.task_name not in in_groups),
    ]


@contextlib.contextmanager
def _tokenizer_for_tasks(lm: BtlmLM, settings: TaskSettings) -> Iterator[dict[str, Any]]:
    """Yield the metadata for tasks; those that make texts of given lengths get the model's tokenizer in a folder."""
    if "tokenizer" in settings.metadata or not makes_texts(settings.names):
        yield settings.metadata
        return
    with tokenizer_folder(lm.model.metadata, lm.model_tokenizer) as folder:
        yield {"tokenizer": str(folder)} | settings.metadata


@contextlib.contextmanager
def tokenizer_folder(metadata: ModelMetadata, tokenizer: Tokenizer) -> Iterator[Path]:
    """Yield a folder with a model's tokenizer as transformers reads it, which is deleted at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="btlm-tokenizer-") as name:
        write_tokenizer_files(
            Path(name), tokenizer, model_max_length=metadata.max_length, prompt_bos_id=metadata.prompt_bos_id,
            clients=metadata.clients,
        )  # fmt: skip
        yield Path(name)


def _facts(task: Task, settings: TaskSettings, lm: BtlmLM) -> dict[str, Any]:
    """Return all that a task's scores depend on besides the model."""
    facts = {
        "config": config_of(task), "version": task.VERSION, "limit": settings.limit, "max_length": lm.max_length,
        "metadata": {key: value for key, value in settings.metadata.items() if key != "tokenizer"},
        "seed": lm.settings.seed, "lm_eval": importlib.metadata.version("lm_eval"),
        "documents": digest_of(task.eval_docs, limit=settings.limit),
    }  # fmt: skip
    if task.get_config("num_fewshot"):
        facts["examples"] = digest_of(task.fewshot_docs(), limit=0)
    return facts


def _measuring(lm: BtlmLM, task: Task, settings: TaskSettings) -> Callable[[Work], dict]:
    def measure(work: Work) -> dict:
        _seed()
        with lm.answers_kept(work):
            try:
                found = evaluate(
                    lm, {"tasks": {task.task_name: task}}, limit=settings.limit or None, log_samples=True,
                    bootstrap_iters=NUM_RESAMPLES, confirm_run_unsafe_code=settings.run_code,
                )  # fmt: skip
            except (ValueError, LookupError, AssertionError, TypeError, AttributeError) as error:  # of the task's code
                if is_named(error):
                    raise
                raise ValueError(
                    f"task {task.task_name} does not fit its documents: {type(error).__name__}: {error}"
                ) from error
        found, name = cast(dict[str, Any], found), task.task_name
        parts = {
            "metrics": found["results"][name],
            "config": found["configs"][name],
            "version": found["versions"][name],
            "n-shot": found["n-shot"][name],
            "higher_is_better": found["higher_is_better"][name],
            "n-samples": found["n-samples"][name],
            "contexts_cut": lm.num_cut,
            "of_cases": found["samples"][name],
        }
        return json.loads(_json(parts))

    return measure


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, default=handle_non_serializable, ensure_ascii=False)
