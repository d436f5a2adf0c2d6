"""A model of any form to evaluate: what identifies it, and a scorer of its weights on the devices that are there."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from btlm_jax.evaluate.scorer import Scorer
from btlm_jax.hub.given_model import (
    GivenModel,
    fetch_model,
    fingerprint_of_model,
    open_given_model,
    placed_params,
    split_step,
)
from btlm_jax.hub.native import ModelMetadata, one_device_mesh, read_metadata, read_tokenizer
from btlm_jax.kernels.weights import Weights
from btlm_jax.parallel.make_mesh import make_mesh, num_slices
from btlm_jax.quantize.int4_directory import FORMAT as INT4_FORMAT
from btlm_jax.quantize.int4_directory import is_int4_directory, read_int4_directory
from btlm_jax.storage.location import absolute_location
from btlm_jax.tokenizers.tokenizer import Tokenizer

MODEL_DTYPE = "model"
DTYPES = (MODEL_DTYPE, "float32", "bfloat16")  # in which a model computes
INT4 = "4-bit directory"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model of any form without its weights."""

    name: str  # as given
    directory: Path  # of a model behind a URL: where it was fetched to
    is_fetched: bool
    form: str
    step: int  # of a run's checkpoint; otherwise 0
    identity: str  # hash of the files' names and contents
    metadata: ModelMetadata
    tokenizer: Tokenizer
    given: GivenModel | None  # None: 4 bits

    def load(self) -> tuple[dict | Weights, Mesh]:
        """Return the weights, and the mesh that they are on: all devices that divide the model's width.

        Raises:
          ValueError: weights of 4 bits in several processes, several TPU slices, or processes with devices too many.
        """
        if self.given is None:
            self.check_one_process()
            return read_int4_directory(self.directory).weights, one_device_mesh()
        width, devices = self.metadata.model.d_model, jax.devices()
        if (slices := num_slices(devices)) > 1:
            raise ValueError(
                f"{self.name}: {slices} TPU slices do not evaluate together; give the command on one of them"
            )
        number = max(n for n in range(1, len(devices) + 1) if width % n == 0)
        if number != len(devices) and jax.process_count() > 1:
            raise ValueError(f"{self.name}: d_model={width} does not divide by the {len(devices)} devices of all hosts")
        mesh = make_mesh(devices=devices[:number], tensor=1)
        return placed_params(self.given, mesh), mesh

    def check_one_process(self) -> None:
        """Check that weights of 4 bits can run here.

        Raises:
          ValueError: there are several processes.
        """
        if jax.process_count() > 1:
            raise ValueError(f"{self.name}: weights of 4 bits run in one process; leave the other processes out")

    def make_scorer(self, *, dtype: str, batch_tokens: int) -> Scorer:
        """Load the weights, and return what scores tokens with them.

        Raises:
          ValueError: 4-bit weights, which compute in float32, and another dtype.
        """
        metadata = self.metadata
        if self.given is None:
            check_int4_dtype(dtype)
        if dtype != MODEL_DTYPE:
            metadata = dataclasses.replace(metadata, model=dataclasses.replace(metadata.model, dtype=dtype))
        params, mesh = self.load()
        return Scorer(metadata.network(), params, mesh, batch_tokens=batch_tokens)


def check_int4_dtype(dtype: str) -> None:
    """Check that weights of 4 bits compute in a dtype.

    Raises:
      ValueError: they do not.
    """
    if dtype not in (MODEL_DTYPE, "float32"):
        raise ValueError(f"dtype={dtype} is not possible: 4-bit weights compute in float32; leave it out")


@contextlib.contextmanager
def opened_checkpoint(name: str, *, log: Callable[[str], None]) -> Iterator[Checkpoint]:
    """Open a model by its path or URL: a run, one of its checkpoints, a model, 4-bit or Hugging Face directory.

    What is fetched from a URL is deleted at the end of the block.

    Raises:
      FileNotFoundError: there is no model, no such checkpoint, or no tokenizer.
      ValueError: it is damaged, or of an architecture that is not implemented here.
      OSError: it cannot be reached or read.
    """
    location, step = split_step(absolute_location(name))
    with tempfile.TemporaryDirectory(prefix="btlm-evaluate-") as scratch:
        is_fetched = "://" in location
        directory = Path(scratch if is_fetched else location)
        if is_fetched:
            directory = fetch_model(location, step=step, directory=directory, log=log)
        yield _open(directory, name=name, step=step, is_fetched=is_fetched)


def _open(directory: Path, *, name: str, step: int, is_fetched: bool) -> Checkpoint:
    facts = {"name": name, "directory": directory, "is_fetched": is_fetched}
    if is_int4_directory(directory):
        metadata = read_metadata(directory, formats=(INT4_FORMAT,))
        tokenizer = _needed(read_tokenizer(directory, metadata), name)
        return Checkpoint(
            **facts, form=INT4, step=0, identity=fingerprint_of_model(directory),
            metadata=metadata, tokenizer=tokenizer, given=None,
        )  # fmt: skip
    given = open_given_model(directory, step=step)
    tokenizer = _needed(given.tokenizer, name)
    return Checkpoint(
        **facts, form=given.form, step=given.step, identity=given.fingerprint, metadata=given.metadata,
        tokenizer=tokenizer, given=given,
    )  # fmt: skip


def _needed(tokenizer: Tokenizer | None, name: str) -> Tokenizer:
    if tokenizer is None:
        raise FileNotFoundError(f"{name} holds no tokenizer, which texts need; put its files beside the weights")
    return tokenizer
