"""Summaries of long documents, in the manner of QMSum and GovReport: ROUGE-1, -2 and -L of what a model writes.

A prompt is the document, the question about it where there is one, and "Summary:". A document that does not fit is cut
in its middle, as its beginning and its end tell most of what it is about. ROUGE is the F1 of the package rouge_score,
with its stemmer (Lin 2004); of several references the one that is nearest counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from btlm_jax.decode.sampling import GREEDY
from btlm_jax.evaluate.bootstrap import interval_of, resampled_sums
from btlm_jax.evaluate.results import Work
from btlm_jax.evaluate.texts import Job, TextWriter
from btlm_jax.storage.files import parse_json_object
from btlm_jax.tokenizers.tokenizer import Tokenizer

MEASURES = ("rouge1", "rouge2", "rougeL")
TOKENS_OF_ANSWER = 256  # to write about a question (QMSum)
TOKENS_OF_SUMMARY = 512  # to write of a whole document (GovReport)
# Names that data sets have for a document, a question and the references: ours, LongBench's, GovReport's, SCROLLS'
_FORMS = (
    ("document", ("question", "query"), "summary"),
    ("context", ("input",), "answers"),
    ("report", ("question",), "summary"),
    ("input", ("question",), "output"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A document, a question about it ("" for a summary of the whole), and what people wrote."""

    document: str
    question: str
    references: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        """Return how many tokens to write at most."""
        return TOKENS_OF_ANSWER if self.question else TOKENS_OF_SUMMARY


def read_files(paths: Sequence[Path]) -> dict[str, list[Case]]:
    """Return what `read_cases` reads of each file by its name; files of one name are named by their paths."""
    names = [path.name for path in dict.fromkeys(paths)]
    return {path.name if names.count(path.name) == 1 else str(path): read_cases(path) for path in paths}


def read_cases(path: Path) -> list[Case]:
    """Read documents and their summaries from JSON lines.

    Raises:
      FileNotFoundError: there is no file.
      ValueError: a line is no JSON object, lacks a key, or has an empty text; or there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"summaries={path} is no file; give JSON lines with document, summary and question")
    cases = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            cases.append(_case(parse_json_object(line, name=where), where))
    if not cases:
        raise ValueError(f"{path} has no documents")
    return cases


def _case(row: dict[str, Any], where: str) -> Case:
    form = next((form for form in _FORMS if form[0] in row and form[2] in row), None)
    if form is None:
        allowed = ", ".join(f"{document} with {summary}" for document, _, summary in _FORMS)
        raise ValueError(f"{where} has the keys {', '.join(row)}; needed are a document and its summary: {allowed}")
    of_document, of_questions, of_summary = form
    document, summary = row[of_document], row[of_summary]
    question = next((row[name] for name in of_questions if row.get(name)), "")
    references = summary if isinstance(summary, list) else [summary]
    if not references:
        raise ValueError(f"{where}: {of_summary} is empty")
    for name, text in ((of_document, document), *((of_summary, each) for each in references)):
        if not _is_text(text) or not text.strip():
            raise ValueError(f"{where}: {name} must be text, and not empty")
    if not _is_text(question):
        raise ValueError(f"{where}: the question must be text")
    return Case(document=document, question=question, references=tuple(references))


def _is_text(value: object) -> bool:
    """Return whether a value is text that UTF-8 has: JSON can name halves of pairs of surrogates."""
    return isinstance(value, str) and value.encode(errors="replace") == value.encode(errors="surrogatepass")


def prompt_of(case: Case, tokenizer: Tokenizer, *, length: int, bos_id: int | None = None) -> tuple[list[int], int]:
    """Return the ids of a prompt that leaves room in `length` tokens for the summary, and how many ids were cut out.

    Raises:
      ValueError: there is no room for any of the document.
    """
    instruction = f"\n\nQuestion: {case.question}\nSummary:" if case.question else "\n\nSummary:"
    before = [] if bos_id is None else [bos_id]
    after = tokenizer.encode(instruction)
    room = length - case.num_tokens - len(before) - len(after)
    if room < 2:
        raise ValueError(
            f"length={length:,} leaves no room for a document: the summary takes {case.num_tokens:,} tokens and the "
            f"question {len(after):,}"
        )
    document = tokenizer.encode(case.document)
    return [*before, *cut_middle(document, room), *after], max(0, len(document) - room)


def cut_middle(ids: Sequence[int], room: int) -> list[int]:
    """Return all ids, or the first and the last of them, half of the room each; the first half has the odd one."""
    if len(ids) <= room:
        return list(ids)
    return [*ids[: (room + 1) // 2], *ids[len(ids) - room // 2 :]]


def rouge(summary: str, references: Sequence[str]) -> list[float]:
    """Return the F1 of ROUGE-1, -2 and -L with the reference that is nearest, each by itself; from 0 to 1."""
    scorer = RougeScorer(list(MEASURES), use_stemmer=True)
    scores = [scorer.score(reference, summary) for reference in references]
    return [max(score[measure].fmeasure for score in scores) for measure in MEASURES]


def measure_summaries(
    writer: TextWriter, tokenizer: Tokenizer, cases: Sequence[Case], *, length: int, bos_id: int | None, work: Work
) -> dict[str, Any]:
    """Return the mean ROUGE of the summaries of `length` tokens of prompt and summary, and its intervals.

    Raises:
      ValueError: the length leaves no room for a document.
    """
    prompts = [prompt_of(case, tokenizer, length=length, bos_id=bos_id) for case in cases]
    work.begin([len(ids) + case.num_tokens for (ids, _), case in zip(prompts, cases, strict=True)], unit_name="tokens")
    jobs = [
        Job(number=number, ids=ids, stops=(), num_tokens=case.num_tokens, sample=0, sampling=GREEDY)
        for number, ((ids, _), case) in enumerate(zip(prompts, cases, strict=True))
        if work.done(number) is None
    ]
    for number, text in writer.write(jobs):
        work.add(number, text)
    texts = [work.done(number) for number in range(len(cases))]
    scores = np.array([rouge(text, case.references) for text, case in zip(texts, cases, strict=True)])
    cut = [num_cut for _, num_cut in prompts]
    return {
        "length": length, "documents": len(cases), "cut_documents": sum(map(bool, cut)),
        **_means(scores),
        "of_cases": [
            {"summary": text, "cut": num_cut, **dict(zip(MEASURES, its.tolist(), strict=True))}
            for text, num_cut, its in zip(texts, cut, scores, strict=True)
        ],
    }  # fmt: skip


def _means(scores: np.ndarray) -> dict[str, Any]:
    """Return the mean of each measure and its interval, None for a single document."""
    number = len(scores)
    resampled = resampled_sums([scores])[:, 0] / number
    found: dict[str, Any] = {}
    for column, measure in enumerate(MEASURES):
        found[measure] = float(scores[:, column].mean())
        found[f"{measure}_interval"] = interval_of(resampled[:, column]).to_json() if number > 1 else None
    return found


def digest_of(cases: Sequence[Case]) -> str:
    """Return a hash of documents, questions and references."""
    text = json.dumps([dataclasses.astuple(case) for case in cases])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
