"""Convert a model: read any form, write another, prove that both compute the same, and only then give it its name."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from btlm_jax.convert.names import read_params
from btlm_jax.convert.native import abstract_params, one_device_mesh, read_model_directory, write_model_directory
from btlm_jax.convert.prove import PROBE, Proof, compare, probe_ids, streamed_logits
from btlm_jax.convert.published import read_published_config
from btlm_jax.convert.read_hf import HuggingFaceTensors
from btlm_jax.convert.source import CONFIG_FILE, Source, native_logits, open_source
from btlm_jax.convert.to_hf import padded, write_hf
from btlm_jax.convert.tokenizer_files import write_tokenizer_files
from btlm_jax.convert.transformers_logits import has_transformers, transformers_logits

FORMATS = ("hf", "native")
DTYPES = ("float32", "bfloat16", "float16")
# The largest difference of logits allowed, relative to the largest logit: rounding of weights to the dtype, or none.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to convert, and how."""

    source: Path
    target: Path
    format: str
    dtype: str  # of the written weights
    pad_ffn: int  # n_inner is zero-padded to a multiple of it; 1 leaves it
    max_shard_bytes: int

    def __post_init__(self):
        for name, allowed in (("format", FORMATS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; allowed are {', '.join(allowed)}")
        for name in ("pad_ffn", "max_shard_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def convert(conversion: Conversion, *, say: Callable[[str], None]) -> list[Proof]:
    """Convert, prove, and rename into place; whatever fails, nothing stays under the target's name.

    Raises:
      FileExistsError: the target exists.
      FileNotFoundError, ValueError: the source is not there, damaged, or cannot be expressed in the target's format; or
        the proof failed.
      OSError: the target cannot be written.
    """
    started, target = time.perf_counter(), conversion.target
    if target.exists():
        raise FileExistsError(f"{target} exists; delete it or give another --to")
    partial = target.with_name(f".{target.name}.partial")
    _remove(partial)  # of a conversion that was killed
    try:
        partial.mkdir(parents=True)
        proofs = _write_and_prove(conversion, partial, say=say)
        failed = [str(proof) for proof in proofs if not proof.holds]
        if failed:
            raise ValueError(f"what was written does not compute the same, so it was not kept: {'; '.join(failed)}")
        os.replace(partial, target)
    finally:
        _remove(partial)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    say(f"Done: {target}, {size / 1e6:,.1f} MB, in {time.perf_counter() - started:.1f} s.")
    return proofs


def _write_and_prove(conversion: Conversion, directory: Path, *, say: Callable[[str], None]) -> list[Proof]:
    source = open_source(conversion.source)
    config, tokenizer = source.config, source.tokenizer
    num_parameters = sum(int(np.prod(shape)) for shape in source.tensors.shapes.values())
    say(f"{conversion.source}: {num_parameters:,} parameters, {config.n_layer} layers, d {config.n_embd}")
    if tokenizer is None:
        say("it comes without a tokenizer, so none is written, and the proof is on tokens drawn at random")
    text_ids = () if tokenizer is None else tokenizer.encode(PROBE)
    ids_T = probe_ids(text_ids, vocab_size=config.vocab_size)
    expected_TV = source.logits(ids_T)
    if conversion.format == "native":
        _write_native(source, directory)
        del source
        return [_said(_prove_native(directory, ids_T, expected_TV), say)]
    with _progress(len(source.tensors.shapes)) as report:
        write_hf(
            directory,
            config=padded(config, multiple=conversion.pad_ffn),
            tensors=source.tensors,
            dtype=conversion.dtype,
            max_shard_bytes=conversion.max_shard_bytes,
            notes=source.notes,
            report=report,
        )
    if tokenizer is not None:
        write_tokenizer_files(directory, tokenizer, model_max_length=config.n_positions)
    del source
    return list(_prove_hf(directory, ids_T, expected_TV, dtype=conversion.dtype, say=say))


def _write_native(source: Source, directory: Path) -> None:
    facts = source.facts()
    shapes = abstract_params(facts, one_device_mesh())
    with _progress(len(source.tensors.shapes)) as report:
        params = read_params(source.tensors, source.config, shapes=shapes, report=report)
    write_model_directory(directory, facts=facts, params=params, tokenizer=source.tokenizer)


def _prove_native(directory: Path, ids_T: np.ndarray, expected_TV: np.ndarray) -> Proof:
    found_TV = native_logits(read_model_directory(directory), ids_T)
    return compare("the written parameters in JAX", expected_TV, found_TV, tolerance=TOLERANCE["float32"])


def _prove_hf(
    directory: Path, ids_T: np.ndarray, expected_TV: np.ndarray, *, dtype: str, say: Callable[[str], None]
) -> Iterator[Proof]:
    config = read_published_config(directory / CONFIG_FILE)
    read_back_TV = streamed_logits(config, HuggingFaceTensors(directory, config), ids_T)
    yield _said(compare("the written files", expected_TV, read_back_TV, tolerance=TOLERANCE[dtype]), say)
    if not has_transformers():
        say("PyTorch and transformers are not installed (pip install 'btlm_jax[hf]'), so the model code was not run")
        return
    client_TV = transformers_logits(directory, ids_T)
    # transformers computes in the dtype of the weights as well, which adds about as much rounding again
    yield _said(compare("transformers", expected_TV, client_TV, tolerance=2 * TOLERANCE[dtype]), say)


def _said(proof: Proof, say: Callable[[str], None]) -> Proof:
    say(str(proof))
    return proof


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar of tensors on a terminal; yield what reports that the next one is being worked on."""
    with tqdm(total=total, unit="tensor", disable=None, leave=False) as bar:

        def report(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        yield report


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
