"""From prompts and completions, or conversations, to a token store in one go, with the window chosen from them."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from btlm_jax.corpus.engine.tasks import Input, local_copies
from btlm_jax.corpus.engine.workers import Workers
from btlm_jax.corpus.example_encoding import ExampleEncoder
from btlm_jax.corpus.readers.examples import is_example, not_readable_as, parse_example
from btlm_jax.corpus.readers.raw import BadFileError, Defect, first_object, read_objects
from btlm_jax.corpus.stages.examples import TRUNCATE, ExamplesConfig, make_example_store
from btlm_jax.data.reader import open_store
from btlm_jax.data.store import HELDOUT, TRAINED, Manifest
from btlm_jax.display.progress import Log
from btlm_jax.storage.location import PathOrUrl, open_binary
from btlm_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer

HELDOUT_SHARE = 0.05
FITTING_SHARE = 0.99  # of the examples, which a window holds whole
_SAMPLED_FILES, _SAMPLED_EXAMPLES = 16, 1024


def are_examples(inputs: Sequence[Input]) -> bool:
    """Return whether raw files are of examples, by the first line of each that has lines of JSON.

    Raises:
      ValueError: some are, and others are of documents; or all are of something else.
      OSError: a file cannot be read.
    """
    kinds: dict[bool, str] = {}
    unusable: list[str] = []
    num_files = 0
    for item in inputs:
        if item.begin:
            continue
        with open_binary(item.location) as file:
            first = first_object(file, name=item.name)
        num_files += 1
        if why := not_readable_as(first):
            unusable.append(f"{item.name} {why}")
        elif first is not None:
            kinds.setdefault(is_example(first), item.name)
    if len(kinds) == 2:
        raise ValueError(
            f"--data has both examples to fine-tune on ({kinds[True]}) and documents ({kinds[False]}), which are "
            "trained on in runs of their own: give the documents first, and then --init=RUN with the examples"
        )
    if unusable and len(unusable) == num_files:
        raise ValueError(f"--data cannot be read: {unusable[0]}")
    return True in kinds


def choose_window(inputs: Sequence[Input], *, encoder: ExampleEncoder, least: int, most: int, folder: Path) -> int:
    """Return the smallest power of two that holds FITTING_SHARE of the examples, from `least` to `most`.

    Of many examples some of each of a few files are looked at. Remote files are copied to `folder` meanwhile.
    """
    lengths = list(_lengths(inputs, encoder, folder=folder))
    wanted = int(np.quantile(lengths, FITTING_SHARE, method="inverted_cdf")) if lengths else 1
    return min(max(1 << (wanted - 1).bit_length(), least), most)


def _lengths(inputs: Sequence[Input], encoder: ExampleEncoder, *, folder: Path) -> Iterator[int]:
    count = min(len(inputs), _SAMPLED_FILES)
    for number in range(count):
        with local_copies([inputs[number * len(inputs) // count]], folder) as (item,):
            found = read_objects(item.path, name=item.name, is_piece=item.is_piece, repairs=Counter())
            with contextlib.suppress(BadFileError):  # which the stage names, as it does lines that are no examples
                for line in itertools.islice(found, _SAMPLED_EXAMPLES // count):
                    with contextlib.suppress(ValueError):
                        if not isinstance(line, Defect):
                            yield len(encoder.encode(parse_example(line.value)))


def make_store(
    locations: Sequence[PathOrUrl],
    *,
    tokenizer: Path,
    template: tuple[str, str],
    window: int,
    block_len: int,
    most_examples: int,
    output: Path,
    workers: Workers,
    log: Log,
) -> Manifest:
    """Make a token store of windows in blocks; `template` is the source and the name of a chat template.

    A window has at most `most_examples`, if that is not 0.
    """
    config = ExamplesConfig(
        inputs=tuple(locations),
        tokenizer=tokenizer,
        template=template[0],
        template_name=template[1],
        block_len=block_len,
        window=window,
        too_long=TRUNCATE,
        most_examples=most_examples,
        heldout=HELDOUT_SHARE,
        seed=0,
        max_bad_rate=0.001,
        allow_lossy=False,
    )
    return make_example_store(config, output=output, workers=workers, log=log)


def first_prompt(directory: Path) -> str:
    """Return the prompt of the first held-out example of a store, special tokens by their names."""
    opened = open_store(directory, expected_fingerprint="")
    tokenizer = load_tokenizer(directory, opened.manifest.tokenizer)
    block = opened.split(HELDOUT).read(0)
    assert block.marks is not None
    end = int((block.marks & TRAINED > 0).argmax())
    return _text_of(block.tokens[:end].tolist(), tokenizer)


def _text_of(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    stretches = itertools.groupby(ids, key=lambda number: names.get(number, ""))
    return "".join(name * len(list(own)) if name else tokenizer.decode(list(own)) for name, own in stretches)
