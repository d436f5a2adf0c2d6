"""Which tasks are measured, and how: of lm-evaluation-harness, with the list of the model card's kinds; and of code."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

PAPER = "btlm"  # of --tasks: PAPER_TASKS


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperTask:
    """A task of the list; `changes` of the harness's task `of` make one that the harness has not."""

    name: str
    kind: str
    num_fewshot: int = 0
    of: str = ""
    changes: dict[str, str] = dataclasses.field(default_factory=dict)


# The model card says: common sense reasoning, reading comprehension, world knowledge, MMLU, code, long context; "MMLU
# 5-shot, all other tasks 0-shot". Its tables are pictures: the names here are the usual ones of each kind.
_NAMES = {
    "common sense reasoning": ("piqa", "social_iqa", "hellaswag", "winogrande", "openbookqa"),
    "reading comprehension": ("race_middle", "race", "boolq"),
    "world knowledge": ("arc_easy", "arc_challenge", "nq_open", "triviaqa"),
    "MMLU": ("mmlu",),
    "truthfulness": ("truthfulqa_mc1", "truthfulqa_mc2"),
    "bias": (
        "winogender_all", "winogender_female", "winogender_male", "winogender_neutral", "winogender_gotcha",
        "crows_pairs_english",
    ),
    "toxicity": ("toxigen",),
}  # fmt: skip
PAPER_TASKS = tuple(
    PaperTask(name=name, kind=kind, of="race", changes={"dataset_name": "middle"})
    if name == "race_middle"
    else PaperTask(name=name, kind=kind, num_fewshot=5 if name == "mmlu" else 0)
    for kind, names in _NAMES.items()
    for name in names
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Which tasks, and how. Raises ValueError for what cannot be."""

    names: tuple[str, ...]  # of tasks, groups, tags or YAML files; patterns; PAPER
    include_paths: tuple[Path, ...]  # folders with more tasks
    num_fewshot: int  # -1: each task's own
    limit: int  # of documents of each task, for a try; 0: all
    metadata: dict[str, Any]  # for tasks that make their texts: max_seq_lengths, ...
    run_code: bool  # of tasks that run what the model writes

    def __post_init__(self):
        if not all(self.names) or not self.names:
            raise ValueError("tasks has an empty name; give names of lm-evaluation-harness, or btlm for a whole list")
        for name, least in (("num_fewshot", -1), ("limit", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be {least} or more")
        for path in self.include_paths:
            if not path.is_dir():
                raise ValueError(f"include_path={path} is no folder; give one with YAML files of tasks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeSettings:
    """How problems are completed. Raises ValueError for what cannot be."""

    samples: int  # of each problem; one is the likeliest completion
    temperature: float  # of several
    num_tokens: int  # of a completion, at most
    limit: int  # of problems; 0: all
    run_code: bool

    def __post_init__(self):
        for name, least in (("samples", 1), ("num_tokens", 1), ("limit", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"code_{name}={getattr(self, name)} is not allowed; it must be {least} or more")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"code_temperature={self.temperature} is not allowed; it must be above 0")
