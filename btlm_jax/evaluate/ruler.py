"""RULER's tasks of lm-evaluation-harness, which make their texts: lengths for which that can be done."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

SYNTHETIC = ("ruler", "niah_")  # beginnings of the names of tasks that make their texts with a tokenizer
LENGTHS = "max_seq_lengths"  # of a task's metadata
_DRAWS = 20  # of the shortest text of a task
_EXAMPLE_TOKENS = 500  # of ruler_vt's example, with its answer
_ANSWER_TOKENS = {"ruler_vt": 30, "ruler_cwe": 120}
_WORDS, _NOISES, _EXAMPLE_NOISES = 10, 10, 5  # the fewest of a text


def makes_texts(names: Sequence[str]) -> bool:
    """Return whether one of these tasks makes its texts with a tokenizer of transformers."""
    return any(name.startswith(SYNTHETIC) for name in names)


def check_lengths(names: Sequence[str], metadata: dict[str, Any]) -> None:
    """Check that the shortest texts of RULER's tasks fit into the lengths that `metadata` asks for.

    Their code draws texts again and again until one fits, and takes Ctrl-C for one that does not. `metadata` has the
    tokenizer that it counts with; without one nothing is checked.

    Raises:
      ValueError: they do not, or the lengths are no list of whole numbers.
    """
    lengths = metadata.get(LENGTHS)
    if lengths is None:
        return
    if not isinstance(lengths, list) or not lengths or not all(type(each) is int and each > 0 for each in lengths):
        raise ValueError(f"task_metadata has {LENGTHS}={lengths!r}; it must be a list of lengths, such as [2048, 4096]")
    wanted = [task for task in _ANSWER_TOKENS if any(fnmatch.fnmatch(task, name) or name == "ruler" for name in names)]
    if not wanted or "tokenizer" not in metadata:
        return
    try:
        from lm_eval.tasks.ruler import cwe_utils, vt_utils
        from lm_eval.tasks.ruler.common_utils import get_tokenizer
    except ImportError:  # the error of loading the task says which package is missing
        return

    tokenizer = get_tokenizer(metadata["tokenizer"])

    def shortest(make) -> int:
        return min(len(tokenizer(make()).input_ids) for _ in range(_DRAWS))

    for length in lengths:
        for task in wanted:
            least = _ANSWER_TOKENS[task]
            if task == "ruler_vt":
                example = shortest(lambda: vt_utils.generate_input_output(_EXAMPLE_NOISES, 1, 4, is_icl=True)[0])
                if example + least > _EXAMPLE_TOKENS:
                    raise ValueError(
                        f"task {task} is not for this tokenizer: its example may have {_EXAMPLE_TOKENS} tokens, and "
                        f"takes at least {example + least:,}"
                    )
                least += example + shortest(lambda: vt_utils.generate_input_output(_NOISES, 1, 4)[0])
            else:
                state = cwe_utils.RNG.getstate()
                least += shortest(lambda length=length: cwe_utils.generate_input_output(_WORDS, length)[1])
                cwe_utils.RNG.setstate(state)
            if least > length:
                raise ValueError(
                    f"task {task} has no texts of {length:,} tokens: the shortest take {least:,}; give longer "
                    f"--task_metadata='{{\"{LENGTHS}\": [...]}}'"
                )
