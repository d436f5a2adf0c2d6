"""Open or load a model of any form, and translate between published configs and ours."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax import notices
from btlm_jax.hub.client_files import ClientSettings, end_of_text_id, read_client_settings
from btlm_jax.hub.huggingface import HuggingFaceTensors
from btlm_jax.hub.native import (
    ModelMetadata,
    NativeModel,
    abstract_params,
    accept,
    is_model_directory,
    is_run,
    one_device_mesh,
    read_metadata,
    read_model_directory,
    read_run,
)
from btlm_jax.hub.numpy_network import streamed_logits
from btlm_jax.hub.published import (
    CONFIG_FILE,
    EMBEDDING,
    PublishedConfig,
    Tensors,
    published_config_of,
    read_config_values,
)
from btlm_jax.hub.tensor_names import NativeTensors, read_params
from btlm_jax.model import Btlm
from btlm_jax.model.loss import logits
from btlm_jax.recipe.config import ModelConfig, MupConfig
from btlm_jax.recipe.mup import make_parametrization
from btlm_jax.tokenizers.byte_level import ByteLevelTokenizer
from btlm_jax.tokenizers.prompt_bos import read_prompt_bos
from btlm_jax.tokenizers.tokenizer import Tokenizer, find_tokenizer, tokenizer_info
from btlm_jax.train import CHECKPOINTS, STARTS


class HuggingFaceSource:
    """A Hugging Face BTLM directory."""

    def __init__(self, directory: Path):
        self.directory, path = directory, directory / CONFIG_FILE
        values = read_config_values(path)
        config = published_config_of(values, path=path)
        self.tensors = HuggingFaceTensors(directory, config)
        self.tokenizer = _tokenizer_of(directory, config)
        self.clients = read_client_settings(directory, config=values, tokenizer=self.tokenizer)
        eos_id = end_of_text_id(directory, config, values, settings=self.clients, tokenizer=self.tokenizer)
        bos_id = self.clients.bos_id if self.clients.bos_id >= 0 else eos_id
        self.config: PublishedConfig = dataclasses.replace(config, eos_token_id=eos_id, bos_token_id=bos_id)
        self.prompt_bos_id = None if self.tokenizer is None else read_prompt_bos(directory, self.tokenizer)
        self.notes: dict[str, str] = {}
        self.step = 0

    def metadata(self) -> ModelMetadata:
        """Return the model's metadata; it computes in bfloat16 if its weights are stored so, else in float32."""
        stored = self.tensors.read(EMBEDDING).dtype.name
        return model_metadata(
            self.config,
            dtype="bfloat16" if stored == "bfloat16" else "float32",
            tokenizer=self.tokenizer,
            prompt_bos_id=self.prompt_bos_id,
            notes=self.notes,
            clients=self.clients,
        )

    def logits(self, ids_T: np.ndarray) -> np.ndarray:
        """Return the float32 logits_TV after each token."""
        return streamed_logits(self.config, self.tensors, ids_T)


class NativeSource:
    """The last checkpoint of a training run, or a model directory of ours."""

    def __init__(self, native: NativeModel):
        self.native = native
        self.config = published_config(native.metadata)
        scale = make_parametrization(native.metadata.mup, native.metadata.model).residual_scale
        self.tensors: Tensors = NativeTensors(native.params, self.config, residual_scale=scale)
        self.tokenizer, self.prompt_bos_id = native.tokenizer, native.metadata.prompt_bos_id
        self.notes, self.step = native.metadata.notes, native.step
        self.clients = native.metadata.clients

    def metadata(self) -> ModelMetadata:
        """Return the model's metadata."""
        return self.native.metadata

    def logits(self, ids_T: np.ndarray) -> np.ndarray:
        """Return the float32 logits_TV after each token, computed by the JAX model."""
        return native_logits(self.native, ids_T)


Source = HuggingFaceSource | NativeSource


class UnpublishedError(ValueError):
    """A model has what no published form, and no kernel for them, has."""


def is_hugging_face(directory: Path) -> bool:
    """Whether this looks like a Hugging Face directory: it has a config.json, and is not one of our own forms."""
    return (directory / CONFIG_FILE).is_file() and not is_run(directory) and not is_model_directory(directory)


def open_source(directory: Path) -> Source:
    """Open a model of any form; config, names and shapes are checked here, values when they are read.

    Raises:
      FileNotFoundError: there is no model, or one of its files is missing.
      ValueError: it is damaged, contradicts itself, or is of an architecture that is not implemented here.
      UnpublishedError: before its weights are read, as `published_config`.
    """
    if is_hugging_face(directory):
        return HuggingFaceSource(directory)
    return NativeSource(read_native(directory, check=published_config))


def load_native(directory: Path) -> NativeModel:
    """Load a model of any form into memory, float32.

    Raises:
      FileNotFoundError, ValueError: as `open_source`.
    """
    if not is_hugging_face(directory):
        return read_native(directory)
    source = HuggingFaceSource(directory)
    metadata, mesh = source.metadata(), one_device_mesh()
    shapes = abstract_params(metadata, mesh)
    params = read_params(source.tensors, source.config, shapes=shapes, report=lambda name: None)
    params = jax.device_put(params, mesh.devices.item())
    return NativeModel(metadata=metadata, params=params, mesh=mesh, tokenizer=source.tokenizer)


def read_native(directory: Path, *, check: Callable[[ModelMetadata], object] = accept) -> NativeModel:
    """Read a run or a model directory; `check` gets what is known of the model before its weights are read.

    Raises:
      FileNotFoundError: it is neither.
      ValueError: it is damaged, or of `check`.
    """
    if is_run(directory):
        return read_run(directory, check=check)
    if is_model_directory(directory):
        check(read_metadata(directory))
        return read_model_directory(directory)
    if directory.parent.name == CHECKPOINTS and directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is a checkpoint of a run, of which the last is taken here: give {directory.parent.parent} "
            "(btlm evaluate and btlm train --init take any)"
        )
    raise FileNotFoundError(no_model(directory))


def no_model(directory: Path) -> str:
    """Return what to say of a directory that is no model of any form."""
    if (directory / STARTS).is_dir():
        return f"{directory} is a run without a checkpoint yet: btlm status {directory} says how far it is"
    return (
        f"{directory} holds no model: looked for {CHECKPOINTS}/ (a training run), model.json (a converted model) and "
        "config.json (a Hugging Face checkpoint)"
    )


def native_logits(native: NativeModel, ids_T: np.ndarray) -> np.ndarray:
    """Return the float32 logits_TV after each token, computed in float32 by the JAX model."""
    metadata = native.metadata
    model = dataclasses.replace(metadata, model=dataclasses.replace(metadata.model, dtype="float32")).network()
    with jax.set_mesh(native.mesh):
        return np.asarray(_logits_BTV(native.params, jnp.asarray(ids_T, jnp.int32)[None], model=model))[0]


@functools.partial(jax.jit, static_argnames="model")
def _logits_BTV(params: dict, ids_BT: jax.Array, *, model: Btlm) -> jax.Array:
    hidden_BTD = cast(jax.Array, model.apply({"params": params}, ids_BT))
    return logits(hidden_BTD, params["embedding"]["embedding"], output_scale=model.parametrization.output_scale)


def published_config(metadata: ModelMetadata) -> PublishedConfig:
    """Return our configs as a published one.

    Raises:
      UnpublishedError: the model has what published models have not.
    """
    model, mup = metadata.model, metadata.mup
    if model.qk_norm != "none":
        raise UnpublishedError(
            f"the model has model.qk_norm={model.qk_norm}, which is in no published form: it cannot become a Hugging "
            "Face, GGUF, Jais, 4-bit or native directory; btlm generate and btlm evaluate take the run itself"
        )
    return PublishedConfig(
        vocab_size=model.vocab_size,
        n_positions=metadata.max_length,
        n_embd=model.d_model,
        n_layer=model.num_layers,
        n_head=model.num_heads,
        n_inner=model.d_ff,
        layer_norm_epsilon=model.layer_norm_eps,
        initializer_range=mup.init_std,
        mup_embeddings_scale=mup.embedding_multiplier,
        mup_output_alpha=mup.output_multiplier,
        mup_width_scale=_without_noise(1 / make_parametrization(mup, model).width),
        mup_scale_qk_dot_by_d=mup.preset != "sp",
        alibi_scaling=model.alibi_scaling,
        alibi_train_len=metadata.alibi_train_len,
        bos_token_id=metadata.clients.bos_id if metadata.clients.bos_id >= 0 else metadata.eos_id,
        eos_token_id=metadata.eos_id,
    )


def model_metadata(
    config: PublishedConfig,
    *,
    dtype: str,
    tokenizer: Tokenizer | None,
    prompt_bos_id: int | None,
    notes: dict[str, str],
    clients: ClientSettings,
) -> ModelMetadata:
    """Return a published config as our configs.

    Where scores are not q.k/head_dim, the preset is standard parametrization, which has no width multiplier: the width
    scale of the logits goes into the output multiplier.
    """
    is_mup = config.mup_scale_qk_dot_by_d
    return ModelMetadata(
        model=ModelConfig(
            vocab_size=config.vocab_size,
            num_layers=config.n_layer,
            d_model=config.n_embd,
            num_heads=config.n_head,
            d_ff=config.n_inner,
            layer_norm_eps=config.layer_norm_epsilon,
            qk_norm="none",
            alibi_scaling=config.alibi_scaling,
            dtype=dtype,
            attention="auto",
            remat="full",
            loss_chunk=512,
        ),
        mup=MupConfig(
            preset="btlm" if is_mup else "sp",
            base_d_model=_without_noise(config.n_embd * config.mup_width_scale),
            base_d_ff=_without_noise(config.n_inner * config.mup_width_scale),
            base_num_layers=config.n_layer,
            init_std=config.initializer_range,
            embedding_multiplier=config.mup_embeddings_scale,
            output_multiplier=config.mup_output_alpha if is_mup else _without_noise(config.output_scale),
        ),
        max_length=config.n_positions,
        eos_id=config.eos_token_id,
        tokenizer=None if tokenizer is None else tokenizer_info(tokenizer),
        prompt_bos_id=prompt_bos_id,
        notes=notes,
        alibi_train_len=config.alibi_train_len,
        clients=clients,
    )


def published_metadata(source: Source) -> ModelMetadata:
    """Return the metadata that belongs to a source's published tensors, which contain any residual multiplier."""
    metadata = source.metadata()
    return model_metadata(
        source.config,
        dtype=metadata.model.dtype,
        tokenizer=source.tokenizer,
        prompt_bos_id=source.prompt_bos_id,
        notes=metadata.notes,
        clients=metadata.clients,
    )


def _tokenizer_of(directory: Path, config: PublishedConfig) -> Tokenizer | None:
    """Return a directory's tokenizer, if it has one; whether it may change texts was decided when it was trained on."""
    try:
        tokenizer = find_tokenizer(directory, allow_lossy=True)
    except FileNotFoundError:
        return None
    if isinstance(tokenizer, ByteLevelTokenizer) and tokenizer.text_changes:
        changes = ", ".join(tokenizer.text_changes)
        notices.report("tokenizer-lossy", f"the tokenizer of {directory} does not give every text back: {changes}")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {directory} has {tokenizer.vocab_size:,} ids, but config.json has only "
            f"vocab_size={config.vocab_size:,}"
        )
    return tokenizer


def _without_noise(value: float) -> float:
    """Round to 14 significant digits, so that a conversion there and back gives the same config: 2560 * 0.1 is 256."""
    return float(f"{value:.14g}")
