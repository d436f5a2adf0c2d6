"""Our own forms of a model: a training run's last checkpoint, and a model directory that holds only the parameters.

A model directory is `model.json` (config, parametrization, metadata), `params/` (orbax) and the tokenizer's files.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
from jax.sharding import Mesh

from btlm_jax.data import store
from btlm_jax.kernels.weights import Weights
from btlm_jax.model import Btlm, make_model, parameter_table
from btlm_jax.parallel.mesh import make_mesh
from btlm_jax.recipe.config import ModelConfig, MupConfig, config_from
from btlm_jax.recipe.mup import make_parametrization
from btlm_jax.storage.files import write_atomically
from btlm_jax.storage.location import PathOrUrl, resolve_location
from btlm_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from btlm_jax.train import CHECKPOINTS, SUMMARY_FILE
from btlm_jax.train.checkpoint import CheckpointReader, read_params, write_params

MODEL_FILE, PARAMS = "model.json", "params"
FORMAT = "btlm_jax model 1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """What `model.json` says of a model besides its weights."""

    model: ModelConfig
    mup: MupConfig
    max_length: int  # longest trained length
    eos_id: int  # the token between documents
    tokenizer: store.TokenizerInfo | None  # None: it came without one
    notes: dict[str, str]  # how it was made, for a reader

    def network(self) -> Btlm:
        """Return the network; it holds no arrays."""
        return make_model(self.model, make_parametrization(self.mup, self.model))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeModel:
    """A model with its parameters on one device."""

    metadata: ModelMetadata
    params: dict | Weights  # in tiles where a CPU generates
    mesh: Mesh
    tokenizer: Tokenizer | None


def is_run(directory: Path) -> bool:
    """Whether this is a training run's workdir with a checkpoint."""
    return (directory / CHECKPOINTS).is_dir()


def is_model_directory(directory: Path) -> bool:
    """Whether this is a directory that `write_model_directory` wrote."""
    return (directory / MODEL_FILE).is_file()


def read_run(workdir: Path) -> NativeModel:
    """Read the parameters of a run's last checkpoint, also while the run goes on.

    Raises:
      FileNotFoundError: there is no checkpoint, or the run's token store is not there.
      ValueError: the checkpoint or the store's manifest is damaged.
    """
    reader = CheckpointReader(workdir)
    try:
        step = reader.steps()[-1]
        position, config = reader.read_metadata(step)
        notes = {"steps": f"{step:,}", "tokens": f"{position.tokens_seen:,}"} | _heldout_notes(workdir, step)
        directory = resolve_location(workdir, config.data.store)
        recorded = store.read_manifest(directory).tokenizer
        metadata = ModelMetadata(
            model=config.model,
            mup=config.mup,
            max_length=max(config.curriculum.seq_len),
            eos_id=recorded.eos_id,
            tokenizer=recorded,
            notes=notes,
        )
        mesh = one_device_mesh()
        params = reader.restore_params(step, abstract=abstract_params(metadata, mesh))
    finally:
        reader.close()
    return NativeModel(metadata=metadata, params=params, mesh=mesh, tokenizer=load_tokenizer(directory, recorded))


def store_of_run(workdir: Path) -> PathOrUrl:
    """Return where the token store of a run is.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: it is damaged.
    """
    reader = CheckpointReader(workdir)
    try:
        _, config = reader.read_metadata(reader.steps()[-1])
    finally:
        reader.close()
    return resolve_location(workdir, config.data.store)


def read_model_directory(directory: Path) -> NativeModel:
    """Read what `write_model_directory` wrote.

    Raises:
      ValueError: `model.json` or the parameters are damaged.
    """
    metadata, mesh = read_metadata(directory), one_device_mesh()
    params = read_params(directory / PARAMS, abstract=abstract_params(metadata, mesh))
    return NativeModel(metadata=metadata, params=params, mesh=mesh, tokenizer=read_tokenizer(directory, metadata))


def read_tokenizer(directory: Path, metadata: ModelMetadata) -> Tokenizer | None:
    """Load the tokenizer of a model directory.

    Raises:
      FileNotFoundError: its file is missing.
      ValueError: its contents are not the ones recorded.
    """
    return None if metadata.tokenizer is None else load_tokenizer(directory, metadata.tokenizer)


def read_metadata(directory: Path, *, format: str = FORMAT) -> ModelMetadata:
    """Read the `model.json` of a model directory of a format.

    Raises:
      ValueError: it is damaged, or of another format.
    """
    path = directory / MODEL_FILE
    try:
        values = json.loads(path.read_text())
        if values["format"] != format:
            found, is_int4 = values["format"], "int4" in values["format"]
            hint = "; a 4-bit model is only for btlm generate: give the one it was made of" if is_int4 else ""
            raise ValueError(f"its format is {found!r}, not {format!r}{hint}")
        return ModelMetadata(
            model=config_from(ModelConfig, values["model"], path="model"),
            mup=config_from(MupConfig, values["mup"], path="mup"),
            max_length=int(values["max_length"]),
            eos_id=int(values["eos_id"]),
            tokenizer=None if values["tokenizer"] is None else store.TokenizerInfo(**values["tokenizer"]),
            notes=values["notes"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def write_model_directory(
    directory: Path, *, metadata: ModelMetadata, params: dict, tokenizer: Tokenizer | None
) -> None:
    """Write the parameters, the tokenizer and `model.json`; `metadata` are those of this tokenizer."""
    write_params(directory / PARAMS, params)
    write_metadata(directory, metadata, tokenizer=tokenizer)


def write_metadata(
    directory: Path, metadata: ModelMetadata, *, tokenizer: Tokenizer | None, format: str = FORMAT
) -> None:
    """Write `model.json` and the tokenizer's file."""
    if tokenizer is not None:
        write_atomically(directory / tokenizer.stored_file, tokenizer.contents)
    write_atomically(
        directory / MODEL_FILE, json.dumps({"format": format} | dataclasses.asdict(metadata), indent=2, sort_keys=True)
    )


def abstract_params(metadata: ModelMetadata, mesh: Mesh) -> dict:
    """Return the parameters' tree of shapes, dtypes and shardings."""
    return jax.tree.map(lambda info: info.abstract, parameter_table(metadata.network(), mesh))


def one_device_mesh() -> Mesh:
    """Return the mesh of this process's first device."""
    return make_mesh(devices=jax.local_devices()[:1], tensor=1)


def _heldout_notes(workdir: Path, step: int) -> dict[str, str]:
    path = workdir / SUMMARY_FILE
    summary = json.loads(path.read_text()) if path.is_file() else {"num_steps": -1}
    if summary["num_steps"] != step:
        return {}
    sources = summary["heldout"]["sources"].items()
    return {f"held-out bits/byte, {name}": f"{source['bits_per_byte']:.4f}" for name, source in sources}
