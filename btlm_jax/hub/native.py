"""Our own forms of a model: the last checkpoint of a training run, and a model directory, which has only parameters.

A model directory is `model.json` (a ModelMetadata), `model.safetensors` (our parameters by path, such as
`blocks/mlp/up/kernel`, float32, with their hashes) and the tokenizer's file. Those written before have `params/`, by
orbax, without hashes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from btlm_jax import notices
from btlm_jax.data import store
from btlm_jax.hub.client_files import NO_SETTINGS, ClientSettings, read_client_settings
from btlm_jax.hub.safetensors_files import SINGLE_FILE, SafetensorsFile, TensorToWrite, write_safetensors
from btlm_jax.model import Btlm, make_model, parameter_table
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.recipe.config import LATER_KEYS, ModelConfig, MupConfig, TrainConfig, config_from
from btlm_jax.recipe.mup import make_parametrization
from btlm_jax.storage.files import hash_json, read_json_object, write_atomically
from btlm_jax.storage.location import PathOrUrl, resolve_location
from btlm_jax.tokenizers.byte_level import read_tokenizer_config
from btlm_jax.tokenizers.prompt_bos import read_prompt_bos
from btlm_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from btlm_jax.train import CHECKPOINTS, KEPT_TOKENIZER, SUMMARY_FILE
from btlm_jax.train.checkpoint import CheckpointReader, Position, read_params

AVERAGE = "average"  # WORKDIR/average names a run's averaged weights
MODEL_FILE, OLD_PARAMS = "model.json", "params"  # the latter of model directories of before safetensors
FORMAT = "btlm_jax model 2"
FORMATS = (FORMAT, "btlm_jax model 1")  # that are read
_OF_A_MODEL = (CHECKPOINTS, MODEL_FILE, "config.json")  # one of which is in a folder of a run or a model
_SHA256 = "sha256"  # of model.json without this key


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """A model without its weights: the contents of `model.json`."""

    model: ModelConfig
    mup: MupConfig
    max_length: int  # longest trained length, in tokens
    eos_id: int  # the token between documents
    tokenizer: store.TokenizerInfo | None  # None: the model has none
    prompt_bos_id: int | None  # stands in front of every prompt; None: nothing does, as in a model trained on text here
    notes: dict[str, str]  # how it was trained and converted, for a reader
    alibi_train_len: int = 0  # of dynamic scaling, see model/transformer.py; 0: model.alibi_scaling alone
    clients: ClientSettings = NO_SETTINGS  # what Hugging Face's clients read besides

    def network(self) -> Btlm:
        """Return the network; it holds no arrays."""
        parametrization = make_parametrization(self.mup, self.model)
        return make_model(self.model, parametrization, alibi_train_len=self.alibi_train_len)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeModel:
    """A model with its parameters on one device."""

    metadata: ModelMetadata
    params: dict
    mesh: Mesh
    tokenizer: Tokenizer | None
    step: int = 0  # of a run's checkpoint; otherwise 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunCheckpoint:
    """A checkpoint of a training run without its arrays."""

    metadata: ModelMetadata
    tokenizer: Tokenizer
    position: Position
    config: TrainConfig


def is_run(directory: Path) -> bool:
    """Whether this is a training run's workdir with a checkpoint, or the average of its weights (`split_average`)."""
    return (split_average(directory)[0] / CHECKPOINTS).is_dir()


def split_average(directory: Path) -> tuple[Path, bool]:
    """Return the workdir of a run, and whether the average of its weights is meant: WORKDIR/average, if no model."""
    is_in_run = directory.name == AVERAGE and (directory.parent / CHECKPOINTS).is_dir()
    is_average = is_in_run and not any((directory / name).exists() for name in _OF_A_MODEL)
    return (directory.parent, True) if is_average else (directory, False)


def split_average_of_url(url: str) -> tuple[str, bool]:
    """Return the same of URL/average, and of any other URL that URL.

    Raises:
      OSError: it cannot be reached.
    """
    from btlm_jax.storage.bucket import RemoteFolder  # only where something is behind a URL

    url = url.rstrip("/")
    run = url.removesuffix(f"/{AVERAGE}")
    if run == url or any(name.split("/")[0] in _OF_A_MODEL for name in RemoteFolder(url).list()):
        return url, False
    return run, True


def is_model_directory(directory: Path) -> bool:
    """Whether this is a directory that `write_model_directory` wrote."""
    return (directory / MODEL_FILE).is_file()


def accept(metadata: ModelMetadata) -> None:
    """Refuse no model."""


def read_run(workdir: Path, *, check: Callable[[ModelMetadata], object] = accept) -> NativeModel:
    """Read the weights of a run's last checkpoint, which `check` may refuse before; the run may be going on.

    Of WORKDIR/average they are the average that the run keeps.

    Raises:
      FileNotFoundError: there is no checkpoint, or the run has kept no tokenizer and its token store is missing.
      ValueError: the checkpoint, the tokenizer or the store's manifest is damaged; no average is kept; or of `check`.
    """
    reader = CheckpointReader(split_average(workdir)[0])
    checkpoint = read_run_checkpoint(reader, reader.steps()[-1], workdir=workdir)
    check(checkpoint.metadata)
    mesh = one_device_mesh()
    abstract = abstract_params(checkpoint.metadata, mesh)
    step = checkpoint.position.step
    params = read_weights(reader, step, workdir=workdir, abstract=abstract)
    return NativeModel(
        metadata=checkpoint.metadata, params=params, mesh=mesh, tokenizer=checkpoint.tokenizer, step=step
    )


def read_weights(reader: CheckpointReader, step: int, *, workdir: Path, abstract: dict) -> dict:
    """Return the weights of a checkpoint, laid out as `abstract` says: of WORKDIR/average their average."""
    restore = reader.restore_average if split_average(workdir)[1] else reader.restore_params
    return restore(step, abstract=abstract)


def read_run_checkpoint(reader: CheckpointReader, step: int, *, workdir: Path) -> RunCheckpoint:
    """Read what belongs to a checkpoint of a run beside its arrays; raises as `read_run`."""
    (position, config), (run, is_average) = reader.read_metadata(step), split_average(workdir)
    notes = {"steps": f"{step:,}", "tokens": f"{position.tokens_seen:,}"}
    notes |= _heldout_notes(run, step, key="heldout_of_average" if is_average else "heldout")
    if is_average:
        if config.optimizer.average == "none":
            raise ValueError(f"{run} keeps no average of its weights: it was trained with optimizer.average=none")
        optimizer = config.optimizer
        notes["weights"] = f"average ({optimizer.average}, optimizer.average_share={optimizer.average_share})"
    elif config.optimizer.average != "none":
        notices.report("average-not-taken", f"{run}: its last weights are taken; those averaged are {run / AVERAGE}")
    workdir = run
    directory, tokenizer_info = _tokenizer_of_run(workdir, config)
    tokenizer, kept = load_tokenizer(directory, tokenizer_info), workdir / KEPT_TOKENIZER
    settings = read_tokenizer_config(kept)
    metadata = ModelMetadata(
        model=config.model,
        mup=config.mup,
        max_length=config.curriculum.table.longest_trained(position.step),
        eos_id=tokenizer_info.eos_id,
        tokenizer=tokenizer_info,
        prompt_bos_id=read_prompt_bos(kept, tokenizer) if store.PROMPT_BOS in settings else None,
        notes=notes,
        clients=read_client_settings(kept, config=settings, tokenizer=tokenizer),
    )
    _check_vocabulary(metadata, tokenizer, where=workdir)
    return RunCheckpoint(metadata=metadata, tokenizer=tokenizer, position=position, config=config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreOfRun:
    """The token store that a run is trained on: where it was, and which."""

    workdir: Path
    location: PathOrUrl
    fingerprint: str

    def check(self, found: str, *, instead: str) -> None:
        """Check that the store with the fingerprint `found` is the one; `instead` is what to give otherwise.

        Raises:
          ValueError: another one has been put in its place.
        """
        if found != self.fingerprint:
            raise ValueError(
                f"token store {self.location} is not the one that the run {self.workdir} was trained on: its "
                f"fingerprint is {found}, not {self.fingerprint}; {instead}"
            )


def store_of_run(workdir: Path) -> StoreOfRun:
    """Return a run's token store as its last checkpoint has it; of WORKDIR/average it is the run's.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the last checkpoint is damaged.
    """
    run, _ = split_average(workdir)
    reader = CheckpointReader(run)
    position, config = reader.read_metadata(reader.steps()[-1])
    location = resolve_location(run, config.data.store)
    return StoreOfRun(workdir=run, location=location, fingerprint=position.store_fingerprint)


def read_model_directory(directory: Path) -> NativeModel:
    """Read what `write_model_directory` wrote.

    Raises:
      FileNotFoundError: the file of the weights or of the tokenizer is missing.
      ValueError: `model.json`, the parameters or the tokenizer are damaged.
    """
    metadata, mesh = read_metadata(directory), one_device_mesh()
    tokenizer = read_tokenizer(directory, metadata)
    _check_vocabulary(metadata, tokenizer, where=directory)
    abstract = abstract_params(metadata, mesh)
    if (directory / SINGLE_FILE).is_file():
        params = _read_weights(directory / SINGLE_FILE, abstract)
    elif (directory / OLD_PARAMS).is_dir():
        params = read_params(directory / OLD_PARAMS, abstract=abstract)
    else:
        raise FileNotFoundError(f"{directory / SINGLE_FILE} is missing: the weights of the model")
    return NativeModel(metadata=metadata, params=params, mesh=mesh, tokenizer=tokenizer)


def _read_weights(path: Path, abstract: dict) -> dict:
    file = SafetensorsFile(path)

    def read(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if file.shapes.get(name) != leaf.shape:
            raise ValueError(f"{path} has {name} of shape {file.shapes.get(name)}; {MODEL_FILE} asks for {leaf.shape}")
        array = file.read(name)
        if array.dtype != leaf.dtype:
            raise ValueError(f"{name} in {path} is {array.dtype}; it must be {leaf.dtype}")
        return jax.device_put(array, leaf.sharding)

    leaves = [read(name, leaf) for name, leaf in _leaves(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _leaves(tree: dict) -> Iterator[tuple[str, Any]]:
    """Yield each leaf with its path, in the order of jax.tree."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield "/".join(key.key for key in keys), leaf


def read_tokenizer(directory: Path, metadata: ModelMetadata) -> Tokenizer | None:
    """Load the tokenizer of a model directory.

    Raises:
      FileNotFoundError: its file is missing.
      ValueError: its contents are not the ones recorded.
    """
    return None if metadata.tokenizer is None else load_tokenizer(directory, metadata.tokenizer)


def read_metadata(directory: Path, *, formats: tuple[str, ...] = FORMATS) -> ModelMetadata:
    """Read the `model.json` of a model directory of one of these formats.

    Raises:
      ValueError: it is damaged, or of another format.
    """
    path = directory / MODEL_FILE
    values = read_json_object(path)
    recorded = values.pop(_SHA256, None)
    if recorded is not None and recorded != hash_json(values):
        notices.report("changed-since-export", f"{path} is not as it was written; what it says now is used")
    try:
        if values["format"] not in formats:
            is_int4 = "int4" in str(values["format"])
            hint = "; a 4-bit model is only for btlm generate and evaluate: give the one it was made of" * is_int4
            raise ValueError(f"its format is {values['format']!r}, not {formats[0]!r}{hint}")
        return ModelMetadata(
            model=config_from(ModelConfig, {**LATER_KEYS["model"], **values["model"]}, path="model"),
            mup=config_from(MupConfig, values["mup"], path="mup"),
            max_length=_whole(values["max_length"], name="max_length"),
            eos_id=_whole(values["eos_id"], name="eos_id"),
            tokenizer=None if values["tokenizer"] is None else store.tokenizer_info_from(values["tokenizer"]),
            prompt_bos_id=_id_or_none(values.get("prompt_bos_id")),  # models from before this key have none
            notes=_texts(values["notes"], name="notes"),
            alibi_train_len=_whole(
                values.get("alibi_train_len", 0), name="alibi_train_len"
            ),  # older files have neither
            clients=ClientSettings.from_json(values.get("clients", {})),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def write_model_directory(
    directory: Path, *, metadata: ModelMetadata, params: dict, tokenizer: Tokenizer | None
) -> None:
    """Write the weights, the tokenizer's file and `model.json`; `metadata.tokenizer` describes this tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = [
        TensorToWrite(name=name, shape=leaf.shape, dtype=np.dtype(leaf.dtype), make=lambda leaf=leaf: np.asarray(leaf))
        for name, leaf in _leaves(params)
    ]
    write_safetensors(directory, tensors, max_shard_bytes=1 << 62, metadata={"format": FORMAT})
    write_metadata(directory, metadata, tokenizer=tokenizer)


def write_metadata(
    directory: Path, metadata: ModelMetadata, *, tokenizer: Tokenizer | None, format: str = FORMAT
) -> None:
    """Write `model.json` and the tokenizer's file."""
    if tokenizer is not None:
        write_atomically(directory / tokenizer.stored_file, tokenizer.contents)
    values = json.loads(json.dumps({"format": format} | dataclasses.asdict(metadata)))
    values[_SHA256] = hash_json(values)
    write_atomically(directory / MODEL_FILE, json.dumps(values, indent=2, sort_keys=True))


def abstract_params(metadata: ModelMetadata, mesh: Mesh) -> dict:
    """Return the parameters' tree of shapes, dtypes and shardings."""
    return jax.tree.map(lambda info: info.abstract, parameter_table(metadata.network(), mesh))


def one_device_mesh() -> Mesh:
    """Return the mesh of this process's first device."""
    return make_mesh(devices=jax.local_devices()[:1], tensor=1)


def _tokenizer_of_run(workdir: Path, config: TrainConfig) -> tuple[PathOrUrl, store.TokenizerInfo]:
    """Return where a run's tokenizer is, and which: the copy that the run keeps, or else that of its token store."""
    kept = workdir / KEPT_TOKENIZER
    if (kept / store.TOKENIZER_INFO_FILE).is_file():
        return kept, store.read_tokenizer_info(kept)
    directory = resolve_location(workdir, config.data.store)
    try:
        return directory, store.read_manifest(directory).tokenizer
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the tokenizer of the run {workdir} is missing: it keeps none in {kept}, as runs of this version do, and "
            f"{error}; put the store back where it was"
        ) from error


def _check_vocabulary(metadata: ModelMetadata, tokenizer: Tokenizer | None, *, where: Path) -> None:
    if tokenizer is not None and tokenizer.vocab_size > metadata.model.vocab_size:
        raise ValueError(
            f"the tokenizer of {where} has {tokenizer.vocab_size:,} ids, more than the model's "
            f"{metadata.model.vocab_size:,}"
        )


def _whole(value: object, *, name: str) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"{name}={str(value)[:40]} must be a whole number, 0 or more and below 2**31")
    return value


def _texts(value: object, *, name: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{name}={str(value)[:40]} must be a table of texts")
    return value


def _id_or_none(value: object) -> int | None:
    return None if value is None else _whole(value, name="prompt_bos_id")


def _heldout_notes(workdir: Path, step: int, *, key: str) -> dict[str, str]:
    """Return the held-out bits per byte of each source, if the run has finished at this step and measured them.

    `key` is what the run's summary calls them, of its last weights or of their average.
    """
    path = workdir / SUMMARY_FILE
    if not path.is_file():
        return {}
    summary = read_json_object(path)
    if summary.get("num_steps") != step or (key != "heldout" and key not in summary):
        return {}
    try:
        sources = summary[key]["sources"].items()
        return {f"held-out bits/byte, {name}": f"{source['bits_per_byte']:.4f}" for name, source in sources}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: it has no {key}.sources with bits_per_byte of each ({error!r}); restore or delete it"
        ) from error
