"""Long-range retrieval: whether a model finds what stands far back in a text, by length and depth.

A case is right if every token of its answer is the likeliest one given the tokens before it, so if greedy decoding
begins with the answer: one pass tells, and nothing is generated. The same answer in other tokens counts as wrong. The
loss of the answer is told too: it falls long before accuracy leaves 0.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from btlm_jax.evaluate.bootstrap import interval_of, interval_of_proportion, resampled_sums
from btlm_jax.evaluate.results import Work
from btlm_jax.evaluate.retrieval_cases import LARGEST_NUMBER, Case, Task, make_case
from btlm_jax.evaluate.scorer import Row, Scorer
from btlm_jax.tokenizers.prompt_bos import prompt_ids
from btlm_jax.tokenizers.tokenizer import Tokenizer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS = (512, 1024, 2048, 4096, 8192)
CHANCE_NATS = math.log(LARGEST_NUMBER)  # of a number guessed at random
_UNIT_TOKENS = 1 << 16
_MOST_ITEMS = 4096
_NATS, _TOKENS, _RIGHT = range(3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """The cases of one task and length."""

    task: Task
    length: int
    rows: tuple[Row, ...]
    depths: tuple[float, ...]  # of each case, out of DEPTHS; of topics always 0
    num_items: float  # lines, topics or pieces of filler of a case, on average


def make_group(
    task: Task, *, length: int, num_cases: int, seed: int, tokenizer: Tokenizer, bos_id: int | None
) -> Group | None:
    """Return cases that have as many items as fit into `length` tokens, or None if not even two items do.

    Cases take the depths in turn.
    """
    depths = (0.0,) if task == Task.TOPICS else DEPTHS
    rows, its_depths, counts = [], [], []
    for number, depth in zip(range(num_cases), itertools.cycle(depths), strict=False):

        def row_of(num_items: int, depth: float = depth, number: int = number) -> Row:
            case = make_case(task, num_items=num_items, depth=depth, seed=seed * 1_000_000 + number)
            return encode_case(case, tokenizer=tokenizer, bos_id=bos_id)

        num_items = _most_items(row_of, length, guess=counts[-1] if counts else 0, most=_most_of(task))
        if not num_items:
            return None
        rows.append(row_of(num_items))
        its_depths.append(depth)
        counts.append(num_items)
    return Group(task=task, length=length, rows=tuple(rows), depths=tuple(its_depths), num_items=float(np.mean(counts)))


def encode_case(case: Case, *, tokenizer: Tokenizer, bos_id: int | None) -> Row:
    """Return a case as a row whose answer is scored; a token that the answer shares with the prompt is scored too."""
    prompt = prompt_ids(case.prompt, tokenizer=tokenizer, bos_id=bos_id)
    whole = prompt_ids(case.prompt + case.answer, tokenizer=tokenizer, bos_id=bos_id)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
    return Row(tokens=whole, first=sum(1 for _ in same))


def measure_retrieval(scorer: Scorer, group: Group, *, work: Work) -> dict:
    """Return the accuracy and the loss of a group's cases as JSON's numbers, lists and dicts.

    Raises:
      FloatingPointError: a loss is not finite.
    """
    units = _units([len(row.tokens) for row in group.rows])
    work.begin([sum(len(group.rows[index].tokens) for index in unit) for unit in units], unit_name="tokens")
    found: list[list[float]] = []
    for number, unit in enumerate(units):
        if (done := work.done(number)) is None:
            rows = [group.rows[index] for index in unit]
            scores = scorer.log_likelihoods(rows, on_scored=lambda row: work.advance(len(row.tokens)))
            done = [[-float(s.log_p_T.sum()), len(s.log_p_T), int(s.is_greedy_T.all())] for s in scores]
            if not np.isfinite(done).all():
                raise FloatingPointError(
                    f"a loss of retrieval of {group.task} at {group.length:,} tokens is not finite"
                )
            work.add(number, done)
        found += done
    return _group_json(group, np.array(found))


def _group_json(group: Group, values: np.ndarray) -> dict:
    depths = np.array(group.depths)
    resamples = resampled_sums([values])[:, 0] / len(values)
    return {
        "task": str(group.task),
        "length": group.length,
        "items": group.num_items,
        "cases": len(values),
        "accuracy": float(values[:, _RIGHT].mean()),
        "accuracy_interval": interval_of_proportion(int(values[:, _RIGHT].sum()), len(values)).to_json(),
        "answer_nats": float(values[:, _NATS].mean()),
        "answer_nats_interval": interval_of(resamples[:, _NATS]).to_json() if len(values) > 1 else None,
        "answer_tokens": float(values[:, _TOKENS].mean()),
        "depths": [
            {
                "depth": depth,
                "cases": int((depths == depth).sum()),
                "accuracy": float(values[depths == depth, _RIGHT].mean()),
                "answer_nats": float(values[depths == depth, _NATS].mean()),
            }
            for depth in sorted(set(group.depths))
        ],
        "of_cases": {
            "depth": depths.tolist(),
            "nats": values[:, _NATS].tolist(),
            "tokens": values[:, _TOKENS].astype(int).tolist(),
            "right": values[:, _RIGHT].astype(int).tolist(),
        },
    }


def _units(sizes: Sequence[int]) -> list[list[int]]:
    """Return the numbers of rows, in order, in groups of about _UNIT_TOKENS tokens."""
    units, size = [[]], 0
    for index, its_size in enumerate(sizes):
        if size >= _UNIT_TOKENS:
            units.append([])
            size = 0
        units[-1].append(index)
        size += its_size
    return units


def _most_of(task: Task) -> int:
    """Return how many items a case may have: there are only so many topics."""
    return 300 if task == Task.TOPICS else _MOST_ITEMS


def _most_items(row_of, length: int, *, guess: int, most: int) -> int:
    """Return the largest number of items whose row has at most `length` tokens; 0 if that is below 2."""

    def fits(num_items: int) -> bool:
        return len(row_of(num_items).tokens) <= length

    if not fits(2):
        return 0
    low, high = 2, most + 1  # low fits, high does not
    near = guess or 2
    step = max(1, near // 64)
    while low + 1 < high:  # gallop around the guess, then halve
        middle = near if low < near < high else (low + high) // 2
        if fits(middle):
            low, near = middle, middle + step
        else:
            high, near = middle, middle - step
        step *= 2
    return low
