"""Speed of scoring requests of lm-evaluation-harness: ours against its own `hf` model, on one machine in one run.

Command: python benchmarks/evaluate.py [--model=/tmp/evaluate/small] [--questions=64] [--windows=8] [--output=FILE]
Needs pip install -e '.[hf,evaluate]'. The model is made once, with random weights (random_model.py, 124 M parameters).
Requests are of random ids in three kinds: four choices of 10 to 35 tokens after 40 to 120; four one-token choices after
400 tokens that all questions share and 60 to 120 of their own (few-shot); windows of a long text. A figure is the
tokens of all requests, contexts included each time, by the seconds of the call that scores them, the same for both.
Ours is called twice, with other requests of the same kind: the first call compiles. `hf` runs at each batch size of
--batch_sizes after a warm-up, and its best counts. Log-likelihoods are compared besides.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from random_model import write_random_model

from btlm_jax.evaluate.scorer import Row
from btlm_jax.evaluate.shared_prefix import PrefixScorer
from btlm_jax.generate.loading import load_for_generation

Request = tuple[tuple[str, str], list[int], list[int]]  # as HFLM takes them: texts, context, continuation
BATCH_TOKENS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ids:
    """Random ids of a vocabulary whose last one ends a text."""

    generator: np.random.Generator
    vocab_size: int

    def draw(self, least: int, most: int) -> list[int]:
        """Return a text of `least` to `most` - 1 ids."""
        size = self.generator.integers(least, most)
        return self.generator.integers(0, self.vocab_size - 1, size).tolist()


def multiple_choice(ids: Ids, number: int) -> list[Request]:
    """Return four choices of each of `number` questions."""
    requests = []
    for _ in range(number):
        context = ids.draw(40, 120)
        requests += [(("", ""), context, ids.draw(10, 35)) for _ in range(4)]
    return requests


def few_shot_letters(ids: Ids, number: int) -> list[Request]:
    """Return four one-token choices of each of `number` questions after the same examples."""
    examples = ids.draw(400, 401)
    requests = []
    for _ in range(number):
        context = examples + ids.draw(60, 120)
        requests += [(("", ""), context, [letter]) for letter in (32, 33, 34, 35)]
    return requests


def windows(ids: Ids, number: int, *, length: int) -> list[Request]:
    """Return windows of `length` tokens, each after the end-of-text id."""
    return [(("", ""), [ids.vocab_size - 1], ids.draw(length, length + 1)) for _ in range(number)]


def ours(scorer: PrefixScorer, requests: Sequence[Request]) -> list[float]:
    """Return the log-likelihoods by our scorer."""
    rows = [Row(tokens=context + continuation, first=len(context)) for _, context, continuation in requests]
    return [float(scores.log_p_T.sum()) for scores in scorer.log_likelihoods(rows)]


def load_hf(directory: Path):
    """Return the harness's own model, with a tokenizer that nothing is encoded with."""
    import tokenizers
    import transformers
    from lm_eval.models.huggingface import HFLM

    nothing = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=nothing, eos_token="<|endoftext|>")
    make: Any = HFLM
    return make(
        pretrained=str(directory), tokenizer=tokenizer, trust_remote_code=True, dtype="float32", device="cpu",
        batch_size=1,
    )  # fmt: skip


def theirs(hf, requests: Sequence[Request], *, batch_size: int) -> list[float]:
    """Return the log-likelihoods by the harness's own model."""
    hf.batch_size_per_gpu = batch_size
    numbered = [((str(number), ""), context, its) for number, (_, context, its) in enumerate(requests)]
    return [log_p for log_p, _ in hf._loglikelihood_tokens(numbered, disable_tqdm=True)]


def timed(score: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """Return the seconds of a call, and what it gave."""
    start = time.perf_counter()
    found = score()
    return time.perf_counter() - start, found


def main() -> None:
    """Measure, print a table, and write it to --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("/tmp/evaluate/small"))
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window_length", type=int, default=1024)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if not arguments.model.exists():
        write_random_model(arguments.model, shape="small", dtype="float32")
    hf = load_hf(arguments.model)
    scorers, vocab_size = {}, hf.model.config.vocab_size
    for name, as_int4 in (("float32", False), ("4 bits", True)):
        model = load_for_generation(arguments.model, as_int4=as_int4)
        scorers[name] = PrefixScorer(model.metadata.network(), model.params, model.mesh, batch_tokens=BATCH_TOKENS)
    lines = [
        "| requests | tokens | who | tokens/s, first call | tokens/s | to the best hf | largest difference of log p |"
    ]
    lines.append("|---|---:|---|---:|---:|---:|---:|")
    kinds = {
        "multiple choice": lambda ids: multiple_choice(ids, arguments.questions),
        "few-shot letters": lambda ids: few_shot_letters(ids, arguments.questions),
        "windows": lambda ids: windows(ids, arguments.windows, length=arguments.window_length),
    }
    for kind, make in kinds.items():
        first, second = (make(Ids(generator=np.random.default_rng(seed), vocab_size=vocab_size)) for seed in (0, 1))
        num_tokens = [sum(len(context) + len(its) for _, context, its in requests) for requests in (first, second)]
        best, expected = 0.0, []
        for batch_size in arguments.batch_sizes:
            theirs(hf, first[: 2 * batch_size], batch_size=batch_size)
            seconds, expected = timed(lambda size=batch_size, requests=second: theirs(hf, requests, batch_size=size))
            best = max(best, rate := num_tokens[1] / seconds)
            lines.append(f"| {kind} | {num_tokens[1]:,} | hf, batches of {batch_size} | | {rate:,.0f} | | |")
            print(lines[-1], file=sys.stderr)
        for name, scorer in scorers.items():
            compiling, _ = timed(lambda scorer=scorer, requests=first: ours(scorer, requests))
            seconds, found = timed(lambda scorer=scorer, requests=second: ours(scorer, requests))
            rate, worst = num_tokens[1] / seconds, np.abs(np.subtract(found, expected)).max()
            lines.append(
                f"| {kind} | {num_tokens[1]:,} | ours, {name} | {num_tokens[0] / compiling:,.0f} | {rate:,.0f} | "
                f"{rate / best:.2f} | {worst:.1e} |"
            )
            print(lines[-1], file=sys.stderr)
    head = f"`python {' '.join(sys.argv)}`\n\n{machine('jax', 'torch', 'transformers', 'lm_eval')}\n"
    table = "\n".join([head, *lines])
    print(table)
    if arguments.output:
        arguments.output.write_text(f"# Scoring requests\n\n{table}\n")


if __name__ == "__main__":
    main()
