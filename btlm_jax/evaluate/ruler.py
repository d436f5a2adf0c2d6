"""RULER's tasks of lm-evaluation-harness, which make their texts: lengths for which that can be done."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

SYNTHETIC = ("ruler", "niah_")  # beginnings of the names of tasks that make their texts with a tokenizer
LENGTHS = "max_seq_lengths"  # of a task's metadata
_DRAWS = 20  # of the shortest text of a task, which are about as long
_EXAMPLE_TOKENS = 500  # that ruler_vt's example may have, with its answer
_TASKS = ("ruler_vt", "ruler_cwe")


def makes_texts(names: Sequence[str]) -> bool:
    """Return whether one of these tasks makes its texts with a tokenizer of transformers."""
    return any(name.startswith(SYNTHETIC) for name in names)


def check_lengths(names: Sequence[str], metadata: dict[str, Any]) -> None:
    """Check that the shortest texts of RULER's tasks fit into the lengths that `metadata` asks for.

    Where they do not, ruler_vt draws texts without an end, and takes Ctrl-C for one that is too long, and texts of
    ruler_cwe have no words. `metadata` has the tokenizer that is counted with; without one nothing is checked.

    Raises:
      ValueError: they do not, or the lengths are no list of whole numbers.
    """
    lengths = metadata.get(LENGTHS)
    if lengths is None:
        return
    if not isinstance(lengths, list) or not lengths or not all(type(each) is int and each > 0 for each in lengths):
        raise ValueError(f"task_metadata has {LENGTHS}={lengths!r}; it must be a list of lengths, such as [2048, 4096]")
    wanted = [task for task in _TASKS if any(fnmatch.fnmatch(task, name) or name == "ruler" for name in names)]
    if not wanted or "tokenizer" not in metadata:
        return
    try:
        from lm_eval.tasks.ruler import cwe_utils, vt_utils
        from lm_eval.tasks.ruler.common_utils import get_tokenizer
    except ImportError:  # the error of loading the task says which package is missing
        return

    tokenizer = get_tokenizer(metadata["tokenizer"])

    def longest(make: Callable[[], str]) -> int:
        return max(len(tokenizer(make()).input_ids) for _ in range(_DRAWS))

    def tracked(num_noises: int, *, is_example: bool) -> str:
        text, names = vt_utils.generate_input_output(num_noises, 1, 4, is_icl=is_example)
        return f"{text} {names}"

    def counted(length: int) -> str:
        example, text, words = cwe_utils.generate_input_output(10, length)
        return "\n".join([example, text, *(f"{number}. {word}" for number, word in enumerate(words, start=1))])

    if "ruler_vt" in wanted:
        needed = longest(lambda: tracked(5, is_example=True)) + 30
        if needed > _EXAMPLE_TOKENS:
            raise ValueError(
                f"task ruler_vt is not for this tokenizer: its example may have {_EXAMPLE_TOKENS} tokens, and takes "
                f"{needed:,}"
            )
    for length in lengths:
        needs = {"ruler_vt": _EXAMPLE_TOKENS + longest(lambda: tracked(10, is_example=False)) + 30}
        state = cwe_utils.RNG.getstate()
        needs["ruler_cwe"] = longest(lambda length=length: counted(length)) + 120
        cwe_utils.RNG.setstate(state)
        for task in wanted:
            if needs[task] > length:
                raise ValueError(
                    f"task {task} has no texts of {length:,} tokens: the shortest take up to {needs[task]:,}; give "
                    f"longer --task_metadata='{{\"{LENGTHS}\": [...]}}'"
                )
