"""Flip single bits in directories that btlm convert wrote, and see which changes of numbers are named.

    python benchmarks/flip_bits.py MODEL [FLIPS] [SEED]

MODEL is what btlm convert takes. It becomes native, int4 (rtn) and hf. In each, FLIPS (300) times one random bit
of one file is flipped, half of them in the weights' file and half spread over the others, and the directory is read
again: all tensors, the config, and the ids of a text. What happens is one of
  named      an error, or a notice, which names a file of the directory
  harmless   the same numbers and ids
  silent     other numbers or ids, and no word: a fault
  unnamed    an error that names no file, or is of another kind than the readers': a fault
Exit code 1 if there is a fault.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import random
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from btlm_jax import notices
from btlm_jax.cli.errors import is_named
from btlm_jax.convert import conversion
from btlm_jax.convert.conversion import Conversion, convert
from btlm_jax.hub.native import read_metadata
from btlm_jax.hub.source import open_source
from btlm_jax.quantize.int4_directory import FORMAT, Int4Tensors, read_int4_directory

TEXT = "def area(radius):\n    return 3.14 * radius ** 2\n"
OUTCOMES = ("named", "harmless", "silent", "unnamed")


def contents_of(directory: Path, form: str) -> list:
    """Return all that a directory's reader gives: arrays, the configuration, the ids of a text."""
    if form == "int4":
        model, tensors = read_int4_directory(directory), Int4Tensors(directory)
        arrays = [tensors.read(name) for name in tensors.shapes]
        arrays += [np.asarray(leaf) for leaf in jax.tree.leaves(model.weights)]
        metadata, tokenizer = read_metadata(directory, formats=(FORMAT,)), model.tokenizer
    else:
        source = open_source(directory)
        arrays = [source.tensors.read(name) for name in source.tensors.shapes]
        metadata, tokenizer = source.metadata(), source.tokenizer
    ids = None if tokenizer is None else tokenizer.encode(TEXT)
    return [arrays, (metadata.model, metadata.mup, metadata.max_length, metadata.eos_id, metadata.alibi_train_len), ids]


def is_same(found: list, expected: list) -> bool:
    """Return whether two contents are equal to the bit."""
    pairs = zip(found[0], expected[0], strict=True)
    same_arrays = all((a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()) for a, b in pairs)
    return same_arrays and found[1:] == expected[1:]


def outcome(directory: Path, form: str, expected: list) -> tuple[str, str]:
    """Read a directory with a flipped bit; return one of OUTCOMES, and what was said."""
    said = io.StringIO()
    notices.begin(strict=())
    with contextlib.redirect_stderr(said):
        try:
            found = contents_of(directory, form)
        except (ValueError, OSError) as error:
            return ("named" if is_named(error) and str(directory) in str(error) else "unnamed"), repr(error)
        except Exception as error:  # anything else is a fault, and counted
            return "unnamed", repr(error)
    if notices.counts():
        return "named", said.getvalue()
    return ("harmless" if is_same(found, expected) else "silent"), ""


def flip_bits(directory: Path, form: str, *, flips: int, seed: int) -> collections.Counter[str]:
    """Flip `flips` bits one after the other, and put each back; return the outcomes."""
    generator, expected = random.Random(seed), contents_of(directory, form)
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.suffix not in (".md", ".py"))
    weights = [path for path in files if path.suffix == ".safetensors"]
    counts: collections.Counter[str] = collections.Counter()
    for number in range(flips):
        path = generator.choice(weights if number % 2 else [path for path in files if path not in weights])
        whole = path.read_bytes()
        bit = generator.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        kind, said = outcome(directory, form, expected)
        path.write_bytes(whole)
        counts[kind] += 1
        if kind in ("silent", "unnamed"):
            print(f"{form}: {kind}: bit {bit} of {path.name} ({whole[bit // 8 - 20 : bit // 8 + 20]!r}): {said[:300]}")
    return counts


def main(model: Path, *, flips: int, seed: int) -> int:
    """Convert, flip, print a line for each form; return the exit code."""
    conversion.has_transformers = lambda: False  # PyTorch's proof is not what this is about
    num_faults = 0
    with tempfile.TemporaryDirectory() as scratch:
        for form in ("native", "int4", "hf"):
            target = Path(scratch) / form
            options = {"dtype": "float32", "file_type": "F32", "pad_ffn": 1, "max_shard_bytes": 1 << 40}
            settings = Conversion(source=model, target=target, format=form, method="rtn", calibration=None, **options)
            convert(settings, log=lambda line: None)
            counts = flip_bits(target, form, flips=flips, seed=seed)
            print(f"{form}: {flips} flips: " + ", ".join(f"{counts[kind]} {kind}" for kind in OUTCOMES), flush=True)
            num_faults += counts["silent"] + counts["unnamed"]
    return int(num_faults > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument("flips", metavar="FLIPS", type=int, nargs="?", default=300)
    parser.add_argument("seed", metavar="SEED", type=int, nargs="?", default=0)
    options = parser.parse_args()
    sys.exit(main(options.model, flips=options.flips, seed=options.seed))
