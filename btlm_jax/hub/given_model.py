"""A model that a training run begins with: what it is, and its weights laid out as the run's state.

Its facts are read first, from which the run's config follows; its arrays later, when the run's mesh is made. Those of a
checkpoint go straight to where the run has them, those of other forms through this machine's memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btlm_jax.hub import tensor_names
from btlm_jax.hub.native import (
    AVERAGE,
    OLD_PARAMS,
    ModelMetadata,
    is_model_directory,
    is_run,
    one_device_mesh,
    read_metadata,
    read_model_directory,
    read_run_checkpoint,
    read_tokenizer,
    read_weights,
    split_average,
    split_average_of_url,
)
from btlm_jax.hub.safetensors_files import hash_contents
from btlm_jax.hub.source import HuggingFaceSource, is_hugging_face, no_model
from btlm_jax.model import freeze, parameter_table
from btlm_jax.recipe.config import TrainConfig
from btlm_jax.recipe.optimizer import make_optimizer
from btlm_jax.storage.files import hash_file
from btlm_jax.storage.location import check_names, list_files, open_binary, with_sizes
from btlm_jax.storage.owner import OWNER_FILE
from btlm_jax.tokenizers.tokenizer import Tokenizer
from btlm_jax.train import CHECKPOINTS, KEPT_TOKENIZER, METRICS_FILE
from btlm_jax.train.checkpoint import DIGESTS, CheckpointReader
from btlm_jax.train.setup import Run
from btlm_jax.train.step import TrainState, abstract_state, make_state

RUN, NATIVE, HUGGING_FACE = "run", "model directory", "Hugging Face directory"
_READ_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt")  # of the files of a model's directory
_HASHED_BYTES = 1 << 16  # of each file of a checkpoint that has the hashes of its arrays in one of them
_EMBEDDING = "embedding"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenModel:
    """A model of any form without its arrays."""

    directory: Path
    form: str  # RUN, NATIVE or HUGGING_FACE
    step: int  # of a run's checkpoint; otherwise 0
    fingerprint: str  # hash of the files' names and contents
    metadata: ModelMetadata
    tokenizer: Tokenizer | None
    config: TrainConfig | None  # of a run

    @property
    def longest(self) -> int:
        """The length up to which a run computes what the model does, and the model was trained."""
        return min(self.metadata.max_length, self.metadata.alibi_train_len or self.metadata.max_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewRows:
    """Rows first..end - 1 of the table of embeddings that are new: each is the mean of the rows before `first`."""

    first: int
    end: int

    @property
    def num_rows(self) -> int:
        return self.end - self.first


def split_step(name: str) -> tuple[str, int]:
    """Return the workdir and the step of the name of a checkpoint, RUN/checkpoints/400; of any other name it and 0."""
    parts = name.rstrip("/").rsplit("/", 2)
    if len(parts) == 3 and parts[1] == CHECKPOINTS and parts[2].isdecimal():
        return parts[0], int(parts[2])
    return name, 0


def fetch_model(url: str, *, step: int, directory: Path, log: Callable[[str], None]) -> Path:
    """Copy a model behind a URL into a folder; of a run the checkpoint `step`, or the last one if that is 0.

    Returns the path that names the model here: the folder, or its `average` of URL/average.

    Raises:
      FileNotFoundError: there is none.
      ValueError: a file's name is no path below the folder; nothing is written then.
      OSError: it cannot be reached, or a file ends too early.
    """
    from btlm_jax.storage.bucket import COMMIT, SESSION, join_databases  # only where something is behind a URL

    url, is_average = split_average_of_url(url)
    files = list_files(url, left_out=lambda name, names: "")
    names = {name for name, _, _ in files}
    check_names(names, root=url)
    folders = {parts[1] for name in names if (parts := name.split("/"))[0] == CHECKPOINTS and len(parts) > 2}
    steps = [int(name) for name in folders if name.isdecimal()]  # others are of others, or of saves that were killed
    if SESSION in names:  # of a run in a bucket, whose checkpoints count once they are committed
        steps = [each for each in steps if f"{CHECKPOINTS}/{each}/{COMMIT}" in names]
        if step and step not in steps:
            raise FileNotFoundError(f"{url} has no checkpoint of step {step:,}")
    wanted = f"{CHECKPOINTS}/{step or max(steps, default=0)}/"
    growing = (METRICS_FILE, OWNER_FILE)  # which a run that goes on writes again and again, and no model needs
    chosen = with_sizes(
        file
        for file in files
        if file[0].startswith((wanted, f"{KEPT_TOKENIZER}/")) or ("/" not in file[0] and file[0] not in growing)
    )
    log(f"Fetching {len(chosen):,} files, {sum(size for _, _, size in chosen):,} bytes, of {url}")
    for name, location, size in chosen:
        path = directory / PurePosixPath(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_binary(location) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        if path.stat().st_size != size:
            raise OSError(f"{location} ended after {path.stat().st_size:,} of {size:,} bytes; give the command again")
    of_checkpoint = {name.removeprefix(wanted) for name, _, _ in chosen if name.startswith(wanted)}
    join_databases(directory / wanted, of_checkpoint)
    return directory / AVERAGE if is_average else directory


def open_given_model(directory: Path, *, step: int) -> GivenModel:
    """Read the facts of a model; `step` chooses a checkpoint of a run, 0 its last one.

    Raises:
      FileNotFoundError: there is no model, or a file of it is missing.
      ValueError: it is damaged, of an architecture that is not implemented here, or of a form without full weights.
    """
    if directory.is_file():
        what = "a GGUF file, of which btlm reads no weights" if directory.suffix == ".gguf" else "a file"
        raise ValueError(f"{directory} is {what}; give a run, a model directory or a Hugging Face directory")
    if not directory.exists() and not is_run(directory):
        raise FileNotFoundError(
            f"there is no {directory}; give a run, a model's directory or a URL (a model of the Hugging Face Hub is "
            "fetched first: hf download OWNER/NAME --local-dir=DIR)"
        )
    if is_run(directory):
        return _open_run(directory, step=step)
    config = None
    if is_model_directory(directory):
        form, metadata = NATIVE, read_metadata(directory)
        tokenizer = read_tokenizer(directory, metadata)
    elif is_hugging_face(directory):
        source = HuggingFaceSource(directory)
        form, metadata, tokenizer = HUGGING_FACE, source.metadata(), source.tokenizer
    else:
        raise FileNotFoundError(no_model(directory))
    return GivenModel(
        directory=directory, form=form, step=0, fingerprint=fingerprint_of_model(directory), metadata=metadata,
        tokenizer=tokenizer, config=config,
    )  # fmt: skip


def _open_run(workdir: Path, *, step: int) -> GivenModel:
    reader = CheckpointReader(split_average(workdir)[0])
    steps = reader.steps()
    if step and step not in steps:
        raise FileNotFoundError(f"{workdir} has no checkpoint of step {step:,}; there are {', '.join(map(str, steps))}")
    checkpoint = read_run_checkpoint(reader, step or steps[-1], workdir=workdir)
    step = checkpoint.position.step
    return GivenModel(
        directory=workdir, form=RUN, step=step, fingerprint=fingerprint_of_checkpoint(workdir, step),
        metadata=checkpoint.metadata, tokenizer=checkpoint.tokenizer, config=checkpoint.config,
    )  # fmt: skip


def fingerprint_of_checkpoint(workdir: Path, step: int) -> str:
    """Return a hash of the names and contents of the files of a run's checkpoint; another of its average.

    Files are read whole only in a checkpoint of before arrays had hashes.
    """
    run, is_average = split_average(workdir)
    folder = run / CHECKPOINTS / str(step)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hash_of = _hash_beginning if (folder / DIGESTS).is_dir() else hash_file
    return _fingerprint(folder, files, hash_of=hash_of) + f"-{AVERAGE}" * is_average


def fingerprint_of_model(directory: Path) -> str:
    """Return a hash of the names and contents of the files of a model's directory; `hash_contents` of safetensors."""
    files = [path for path in directory.iterdir() if path.is_file() and path.suffix in _READ_SUFFIXES]
    files += [path for path in (directory / OLD_PARAMS).rglob("*") if path.is_file()]
    return _fingerprint(directory, sorted(files), hash_of=_hash_of_model_file)


def _fingerprint(folder: Path, files: list[Path], *, hash_of: Callable[[Path], str]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size} {hash_of(path)}\n".encode())
    return digest.hexdigest()


def _hash_beginning(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(_HASHED_BYTES)).hexdigest()


def _hash_of_model_file(path: Path) -> str:
    return hash_contents(path) if path.suffix == ".safetensors" else hash_file(path)


def check_has_moments(model: GivenModel, config: TrainConfig, *, name: str) -> None:
    """Check that a model comes with what the optimizer of a run with `config` keeps; `name` is what errors call it.

    Raises:
      ValueError: it does not.
    """
    if model.config is None:
        raise ValueError(
            f"--init_optimizer=kept: {name} is a {model.form}, which has no optimizer state; only a run's "
            "checkpoint has. Leave it out, to begin with a fresh optimizer"
        )
    if "muon" in (model.config.optimizer.hidden_optimizer, config.optimizer.hidden_optimizer):
        raise ValueError(
            f"--init_optimizer=kept: {name} was trained with optimizer.hidden_optimizer="
            f"{model.config.optimizer.hidden_optimizer} and the run has {config.optimizer.hidden_optimizer}; only "
            "AdamW's moments are kept: leave --init_optimizer=kept out"
        )
    if split_average(model.directory)[1]:
        raise ValueError(
            f"--init_optimizer=kept: {name} is the average of a run's weights, and the moments are those of its last "
            f"weights: give {model.directory.parent}, or leave --init_optimizer=kept out"
        )
    table = parameter_table(model.metadata.network(), one_device_mesh())
    then, now = (
        {info.path for info in jax.tree.leaves(freeze(table, each.optimizer.frozen_patterns)) if info.rule.is_frozen}
        for each in (model.config, config)
    )
    if then - now:
        raise ValueError(
            f"--init_optimizer=kept: {name} was trained with optimizer.freeze={model.config.optimizer.freeze}, so its "
            f"checkpoint has no moments of {', '.join(sorted(then - now))}; give --config.optimizer.freeze="
            f"{model.config.optimizer.freeze}, or leave --init_optimizer=kept out"
        )


def begin_state(model: GivenModel, run: Run, *, keep_optimizer: bool, rows: NewRows) -> TrainState:
    """Return the state of step 0 of a run that begins with a model's weights.

    With `keep_optimizer` the moments and Adam's count of steps are those of the model's checkpoint, and zero for new
    rows. Otherwise the optimizer is fresh.

    Raises:
      FileNotFoundError, ValueError: a file is missing or damaged; an array has another shape.
      OSError: a file cannot be read.
    """
    table = _with_rows(parameter_table(run.model, run.mesh), model.metadata.model.vocab_size)
    if keep_optimizer:
        reader = CheckpointReader(model.directory)
        return _kept_state(model, run, table, reader, rows=rows)
    params = _read_params(model, table)
    params[_EMBEDDING] = _grown(params[_EMBEDDING], rows, mean=True)
    return make_state(_placed(params, run.table), run.optimizer, run.mesh)


def placed_params(model: GivenModel, mesh: Mesh) -> dict:
    """Return a model's weights, float32, laid out on a mesh as a run has them.

    Raises:
      FileNotFoundError, ValueError: a file is missing or damaged; an array has another shape.
      OSError: a file cannot be read.
    """
    table = parameter_table(model.metadata.network(), mesh)
    return _placed(_read_params(model, table), table)


def _read_params(model: GivenModel, table: dict) -> dict:
    """Return a model's weights; those of a run are where `table` has them already."""
    abstract = jax.tree.map(lambda info: info.abstract, table)
    if model.form == RUN:
        reader = CheckpointReader(split_average(model.directory)[0])
        return read_weights(reader, model.step, workdir=model.directory, abstract=abstract)
    if model.form == NATIVE:
        return read_model_directory(model.directory).params
    source = HuggingFaceSource(model.directory)
    return tensor_names.read_params(source.tensors, source.config, shapes=abstract, report=lambda name: None)


def _kept_state(model: GivenModel, run: Run, table: dict, reader: CheckpointReader, *, rows: NewRows) -> TrainState:
    assert model.config is not None
    frozen_then = freeze(table, model.config.optimizer.frozen_patterns)
    optimizer_then = make_optimizer(model.config.with_numbers().optimizer, frozen_then)
    before = reader.restore_state(model.step, abstract=abstract_state(frozen_then, optimizer_then, run.mesh))
    abstract = abstract_state(run.table, run.optimizer, run.mesh)

    def moments(name: str) -> dict:
        tree = optax.tree.get(before.opt_state, name)
        if not isinstance(tree[_EMBEDDING][_EMBEDDING], optax.MaskedNode):
            tree = {**tree, _EMBEDDING: _grown(tree[_EMBEDDING], rows, mean=False)}
        wanted = optax.tree.get(abstract.opt_state, name)
        return jax.tree.map(
            lambda new, old: new if isinstance(new, optax.MaskedNode) else _on_mesh(old, new.sharding), wanted, tree,
            is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
        )  # fmt: skip

    count = optax.tree.get(before.opt_state, "count")
    params = {**before.params, _EMBEDDING: _grown(before.params[_EMBEDDING], rows, mean=True)}
    fresh = make_state(_placed(params, run.table), run.optimizer, run.mesh)  # an average begins anew
    opt_state = optax.tree.set(fresh.opt_state, mu=moments("mu"), nu=moments("nu"), count=count)
    return dataclasses.replace(fresh, opt_state=opt_state)


def _with_rows(table: dict, vocab_size: int) -> dict:
    """Return a table of parameters with a table of embeddings of so many rows, which every device has whole."""

    def info(old):
        replicated = NamedSharding(old.sharding.mesh, PartitionSpec())
        return dataclasses.replace(old, shape=(vocab_size, *old.shape[1:]), sharding=replicated)

    return {**table, _EMBEDDING: {_EMBEDDING: info(table[_EMBEDDING][_EMBEDDING])}}


def _grown(embedding: dict, rows: NewRows, *, mean: bool) -> dict:
    """Return the table of embeddings, on the host, with its new rows: the mean of the others, or zero."""
    table_VD = np.asarray(embedding[_EMBEDDING])
    if rows.num_rows:
        known_VD = table_VD[: rows.first]
        new_D = known_VD.mean(0, dtype=np.float64) if mean else np.zeros(table_VD.shape[1])
        new_VD = np.broadcast_to(new_D.astype(np.float32), (rows.num_rows, table_VD.shape[1]))
        table_VD = np.concatenate([known_VD, new_VD, table_VD[rows.end :]])
    return {_EMBEDDING: table_VD}


def _placed(params: dict, table: dict) -> dict:
    return jax.tree.map(lambda info, array: _on_mesh(array, info.sharding), table, params)


def _on_mesh(array: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Return an array laid out as asked for; one that is so already is not copied.

    One of this process's own devices goes to devices of several processes by the host: each puts its part on its own.
    """
    if isinstance(array, jax.Array) and array.sharding.is_equivalent_to(sharding, array.ndim):
        return array
    if isinstance(array, jax.Array) and array.is_fully_addressable == sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
