"""Convert a model: read any form, write another, prove that both compute the same, and only then rename the target."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from btlm_jax import install_command, notices
from btlm_jax.convert.fold import FoldedTensors, padded_config
from btlm_jax.convert.ggml import FILE_TYPES
from btlm_jax.convert.gguf_vocabulary import Vocabulary, vocabulary_of
from btlm_jax.convert.prove import PROBE, Proof, compare, probe_ids
from btlm_jax.convert.prove_gguf import UnfoldedTensors, prove_tensors, prove_vocabulary
from btlm_jax.convert.to_gguf import GGUFSettings, write_gguf
from btlm_jax.convert.to_hf import write_hf
from btlm_jax.convert.to_int4 import calibration_ids, prove_int4, write_int4
from btlm_jax.convert.to_jais import write_jais
from btlm_jax.convert.tokenizer_files import write_tokenizer_files
from btlm_jax.convert.transformers_logits import has_transformers, transformers_logits
from btlm_jax.data.store import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from btlm_jax.display.progress import item_bar
from btlm_jax.hub.client_files import GENERATION_CONFIG, pad_token_id
from btlm_jax.hub.evaluation_card import read_evaluation_card
from btlm_jax.hub.gguf import GGUFFile, gguf_logits, import_gguf
from btlm_jax.hub.huggingface import WEIGHT_FILES, HuggingFaceTensors
from btlm_jax.hub.native import abstract_params, one_device_mesh, read_model_directory, write_model_directory
from btlm_jax.hub.numpy_network import streamed_logits
from btlm_jax.hub.published import CONFIG_FILE, JAIS, read_published_config
from btlm_jax.hub.source import HuggingFaceSource, NativeSource, Source, native_logits, open_source
from btlm_jax.hub.tensor_names import read_params
from btlm_jax.quantize.quantize_model import Method
from btlm_jax.storage.files import only_writer, scratch_directory
from btlm_jax.tokenizers.byte_level import ADDED_TOKENS_FILE, MERGES_FILE, SPECIAL_TOKENS_FILE, STORED_FILE, VOCAB_FILE
from btlm_jax.tokenizers.sentencepiece_bpe import TOKENIZER_FILE
from btlm_jax.tokenizers.special_tokens import client_tokens, id_of

_ADAPTER = "adapter_config.json"
# Files of a Hugging Face directory beside its weights that are read; model code, *.py, is written anew.
_READ = frozenset((
    CONFIG_FILE, GENERATION_CONFIG, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, STORED_FILE, TOKENIZER_FILE, VOCAB_FILE,
    MERGES_FILE, ADDED_TOKENS_FILE, TEMPLATE_FILE, *WEIGHT_FILES,
))  # fmt: skip

FORMATS = ("hf", "native", "jais", "gguf", "int4")
GGUF_SUFFIX = ".gguf"
DTYPES = ("float32", "bfloat16", "float16")
# The default of `pad_ffn` by format; 256 is the largest block size of llama.cpp.
_LARGEST_PADDING = 1 << 16
PAD_FFN = {"hf": 1, "native": 1, "jais": 256, "gguf": 256, "int4": 1}
# The largest difference of logits allowed, relative to the largest logit: the rounding of weights to the dtype.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}
# Tokens compared in transformers at 16 bits: PyTorch on a CPU without 16-bit arithmetic takes 10 s per token at 3B.
_CLIENT_TOKENS = 12
# The same for GGUF: of the two networks with the file's values, and of file and source, whose values were compared one
# by one before. Rounding to blocks changes a random model's logits by this much; unrelated models differ by 1.4.
SAME_VALUES_TOLERANCE = 1e-5
GGUF_TOLERANCE = {
    "F32": 1e-5, "F16": 4e-3, "BF16": 3e-2, "Q8_0": 0.1, "Q6_K": 0.2, "Q5_K_M": 0.4, "Q4_K_M": 0.8, "Q4_0": 1.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion: source, target and options. Raises ValueError for options that do not fit together."""

    source: Path
    target: Path  # a directory, or a .gguf file
    format: str
    dtype: str  # of the weights; for hf and jais
    file_type: str  # for gguf
    pad_ffn: int  # n_inner is zero-padded to a multiple of it; 1 leaves it
    max_shard_bytes: int  # for hf and jais
    method: str  # for int4
    calibration: Path | None  # a text for the calibrated methods of int4; None: the training data of a run
    context_length: int = 0  # that a GGUF file tells its readers; 0: the trained one
    name: str = ""  # of the model, in a GGUF file; "": the target's

    @property
    def model_name(self) -> str:
        """The name in a GGUF file."""
        return self.name or self.target.stem

    def __post_init__(self):
        for name, allowed in (
            ("format", FORMATS),
            ("dtype", DTYPES),
            ("file_type", FILE_TYPES),
            ("method", tuple(Method)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; allowed are {', '.join(allowed)}")
        if not 0 <= self.context_length < 2**32:
            raise ValueError(f"context_length={self.context_length} must be from 1 to {2**32 - 1}")
        for name in ("pad_ffn", "max_shard_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.pad_ffn > _LARGEST_PADDING:
            raise ValueError(f"pad_ffn={self.pad_ffn} must be at most {_LARGEST_PADDING:,}")
        if self.calibration is not None:
            calibrated = [method for method in Method if method.is_calibrated]
            if self.format != "int4" or self.method not in calibrated:
                raise ValueError(
                    f"calibration={self.calibration} says nothing about method={self.method}; it is for "
                    f"{', '.join(calibrated)}"
                )
            if not self.calibration.is_file():
                raise ValueError(f"calibration={self.calibration} is no file; give a text")
        try:
            self.model_name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"name={self.model_name!a} is not valid Unicode; give another --name") from error
        is_gguf = self.target.suffix == GGUF_SUFFIX
        if is_gguf != (self.format == "gguf"):
            fault = f"a directory, not a {GGUF_SUFFIX} file" if is_gguf else f"a file that ends in {GGUF_SUFFIX}"
            raise ValueError(f"--to={self.target} must be {fault}, as format={self.format}")


def convert(conversion: Conversion, *, log: Callable[[str], None]) -> list[Proof]:
    """Convert, prove, and rename into place; if anything fails, nothing remains.

    Writers write into a directory beside the target; only this function renames it. `log` gets lines for the user.

    Raises:
      FileExistsError: the target exists.
      FileNotFoundError, ValueError: the source is missing, damaged, or cannot be expressed in the target's format, or
        the proof failed.
      OSError: the target cannot be written.
    """
    started, target = time.perf_counter(), conversion.target
    _check_is_free(target)
    with _folder_of(target), only_writer(target):
        _check_is_free(target)
        with scratch_directory(target) as partial:
            proofs = _write_and_prove(conversion, partial, log=log)
            failed = [str(proof) for proof in proofs if not proof.holds]
            if failed:
                raise ValueError(f"what was written does not compute the same, so it was not kept: {'; '.join(failed)}")
            os.replace(partial / target.name if conversion.format == "gguf" else partial, target)
    files = [path for path in (target, *target.rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    log(f"Done: {target}, {size / 1e6:,.1f} MB, in {time.perf_counter() - started:.1f} s.")
    return proofs


@contextlib.contextmanager
def _folder_of(target: Path) -> Iterator[None]:
    """Make the folders that a target is to be in; those made here are deleted if it is not there at the end."""
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FileExistsError(f"there is a file where --to={target} needs a folder: {error.filename}") from error
    try:
        yield
    finally:
        if not target.exists():
            for folder in made:
                with contextlib.suppress(OSError):  # something else is in it by now
                    folder.rmdir()


def _check_is_free(target: Path) -> None:
    if os.path.lexists(target):  # a link that leads nowhere, too
        raise FileExistsError(f"{target} exists; delete it or give another --to")


def _write_and_prove(conversion: Conversion, partial: Path, *, log: Callable[[str], None]) -> list[Proof]:
    if conversion.format == "gguf":
        import_gguf()  # a missing package is an error before the source is read
    source = open_source(conversion.source)
    if isinstance(source, HuggingFaceSource):
        _report_files_left(source.directory, weights=source.tensors.files)
    config, tokenizer = source.config, source.tokenizer
    num_parameters = sum(int(np.prod(shape)) for shape in source.tensors.shapes.values())
    log(f"{conversion.source}: {num_parameters:,} parameters, {config.n_layer} layers, d {config.n_embd}")
    if tokenizer is None:
        log("it comes without a tokenizer, so none is written, and the proof is on tokens drawn at random")
    text_ids = () if tokenizer is None else tokenizer.encode(PROBE)
    ids_T = probe_ids(text_ids, vocab_size=config.vocab_size)
    # Write before computing logits: writers refuse what cannot be expressed before the first tensor is read.
    match conversion.format:
        case "native":
            _write_native(source, partial)
            expected_TV = source.logits(ids_T)
            del source  # so that only one model is in memory
            proofs = _prove_native(partial, ids_T, expected_TV)
        case "hf":
            _write_hf(source, partial, conversion)
            expected_TV = source.logits(ids_T)
            del source
            proofs = _prove_hf(partial, ids_T, expected_TV, dtype=conversion.dtype)
        case "jais":
            _write_jais(source, partial, conversion)
            expected_TV = source.logits(ids_T)
            del source
            proofs = _prove_jais(partial, ids_T, expected_TV, dtype=conversion.dtype)
        case "int4":
            proofs = prove_int4(source, partial, ids_T, hashes=_write_int4(source, partial, conversion, log=log))
        case "gguf":
            path = partial / conversion.target.name
            _write_gguf(source, path, conversion)
            proofs = _prove_gguf(source, path, ids_T, conversion, log=log)
        case _:
            raise AssertionError(conversion.format)
    done = []
    for proof in proofs:
        log(str(proof))
        done.append(proof)
    return done


def _report_files_left(directory: Path, *, weights: set[str]) -> None:
    """Say which files of a Hugging Face directory are neither read nor kept, such as its model card."""
    names = {path.name for path in directory.iterdir() if path.is_file() and not path.name.startswith(".")}
    left = {name for name in names - _READ - weights if not name.endswith(".py")}
    if left:
        said = f"{', '.join(sorted(left))} of {directory} are not carried over"
        said += f"; what {_ADAPTER} adds to the weights, where peft is installed, is not in them" * (_ADAPTER in left)
        notices.report("files-not-converted", said, count=len(left))


def _write_native(source: Source, directory: Path) -> None:
    metadata = source.metadata()
    if isinstance(source, NativeSource):  # its own parameters: a residual multiplier is folded into its tensors
        params = source.native.params
    else:
        shapes = abstract_params(metadata, one_device_mesh())
        with item_bar(len(source.tensors.shapes), unit="tensor") as report:
            params = read_params(source.tensors, source.config, shapes=shapes, report=report)
    write_model_directory(directory, metadata=metadata, params=params, tokenizer=source.tokenizer)


def _write_hf(source: Source, directory: Path, conversion: Conversion) -> None:
    _write_tokenizer(source, directory)
    with item_bar(len(source.tensors.shapes), unit="tensor") as report:
        write_hf(
            directory,
            config=padded_config(source.config, multiple=conversion.pad_ffn),
            tensors=source.tensors,
            dtype=conversion.dtype,
            max_shard_bytes=conversion.max_shard_bytes,
            notes=source.notes,
            generation_config=source.clients.generation_config,
            pad_token_id=pad_token_id(source.tokenizer, source.clients),
            evaluation=read_evaluation_card(conversion.source, step=source.step),
            report=report,
        )


def _write_jais(source: Source, directory: Path, conversion: Conversion) -> None:
    _write_tokenizer(source, directory)
    with item_bar(len(source.tensors.shapes) + 1, unit="tensor") as report:
        write_jais(
            directory,
            config=source.config,
            tensors=source.tensors,
            dtype=conversion.dtype,
            pad_ffn=conversion.pad_ffn,
            max_shard_bytes=conversion.max_shard_bytes,
            generation_config=source.clients.generation_config,
            pad_token_id=pad_token_id(source.tokenizer, source.clients),
            report=report,
        )


def _write_tokenizer(source: Source, directory: Path) -> None:
    if source.tokenizer is not None:
        write_tokenizer_files(
            directory,
            source.tokenizer,
            model_max_length=source.config.n_positions,
            prompt_bos_id=source.prompt_bos_id,
            clients=source.clients,
        )


def _write_int4(
    source: Source, directory: Path, conversion: Conversion, *, log: Callable[[str], None]
) -> dict[str, str]:
    method, ids_BT = Method(conversion.method), None
    if method.is_calibrated:
        ids_BT = calibration_ids(conversion.source, source.tokenizer, text=conversion.calibration)
        text = conversion.calibration or "the run's training data"
        log(f"calibrating on {ids_BT.size:,} tokens of {text}, in rows of {ids_BT.shape[1]:,}")
    with item_bar(len(source.tensors.shapes), unit="tensor") as report:
        return write_int4(source, directory, method=method, calibration_BT=ids_BT, report=report)


def _write_gguf(source: Source, path: Path, conversion: Conversion) -> None:
    with item_bar(len(source.tensors.shapes) + 1, unit="tensor") as report:
        write_gguf(
            path,
            config=source.config,
            tensors=source.tensors,
            tokenizer=_vocabulary(source),
            settings=GGUFSettings(
                name=conversion.model_name,
                context_length=conversion.context_length or source.config.n_positions,
                pad_token_id=pad_token_id(source.tokenizer, source.clients),
                clients=source.clients,
            ),
            file_type=conversion.file_type,
            pad_ffn=conversion.pad_ffn,
            report=report,
        )


def _vocabulary(source: Source) -> Vocabulary | None:
    if source.tokenizer is None:
        return None
    vocabulary = vocabulary_of(source.tokenizer, prompt_bos_id=source.prompt_bos_id)
    tokens = client_tokens(source.tokenizer, source.clients.tokenizer_config, prompt_bos_id=source.prompt_bos_id)
    bos_id = id_of(tokens["bos_token"], source.tokenizer)  # as in chat templates of transformers
    bos_id = source.config.bos_token_id if bos_id is None else bos_id
    return dataclasses.replace(vocabulary, bos_id=bos_id, eos_id=source.config.eos_token_id)


def _prove_native(directory: Path, ids_T: np.ndarray, expected_TV: np.ndarray) -> Iterator[Proof]:
    actual_TV = native_logits(read_model_directory(directory), ids_T)
    yield compare("the written parameters in JAX", expected_TV, actual_TV, tolerance=TOLERANCE["float32"])


def _prove_hf(directory: Path, ids_T: np.ndarray, expected_TV: np.ndarray, *, dtype: str) -> Iterator[Proof]:
    config = read_published_config(directory / CONFIG_FILE)
    read_back_TV = streamed_logits(config, HuggingFaceTensors(directory, config), ids_T)
    yield compare("the written files", expected_TV, read_back_TV, tolerance=TOLERANCE[dtype])
    if not has_transformers():
        notices.report(
            "code-not-run",
            f"PyTorch and transformers are not installed ({install_command('hf')}), so the model code was not run",
        )
        return
    num_tokens = len(ids_T) if dtype == "float32" else _CLIENT_TOKENS
    client_TV = transformers_logits(directory, ids_T[:num_tokens])
    # transformers also computes in the dtype of the weights, which adds about as much rounding again
    yield compare("transformers", expected_TV[:num_tokens], client_TV, tolerance=2 * TOLERANCE[dtype])


def _prove_jais(directory: Path, ids_T: np.ndarray, expected_TV: np.ndarray, *, dtype: str) -> Iterator[Proof]:
    config = read_published_config(directory / CONFIG_FILE, model_type=JAIS)
    tensors = HuggingFaceTensors(directory, config)
    if not tensors.has_head:
        raise ValueError("the written files lack lm_head.weight, without which llama.cpp cannot load a Jais model")
    # Clients divide the scores by head_dim always (llama.cpp) or if the config says so; both must give the same
    client_config = dataclasses.replace(config, mup_scale_qk_dot_by_d=True, alibi_scaling=1.0, alibi_train_len=0)
    actual_TV = streamed_logits(client_config, tensors, ids_T)
    yield compare("the written files", expected_TV, actual_TV, tolerance=TOLERANCE[dtype])


def _prove_gguf(
    source: Source,
    path: Path,
    ids_T: np.ndarray,
    conversion: Conversion,
    *,
    log: Callable[[str], None],
) -> Iterator[Proof]:
    file, file_type = GGUFFile(path), conversion.file_type
    folded = FoldedTensors(source.tensors, source.config, pad_ffn=conversion.pad_ffn)
    with item_bar(len(file.tensors), unit="tensor") as report:
        errors = prove_tensors(file, folded, file_type=file_type, report=report)
    rounding = ", ".join(f"{name} {100 * error:.0f} %" for name, error in errors.items())
    log(f"all {len(file.tensors)} tensors read back; largest error, of what the type may round: {rounding}")
    if source.tokenizer is not None:
        prove_vocabulary(
            file,
            source.tokenizer,
            prompt_bos_id=source.prompt_bos_id,
            vocab_size=source.config.vocab_size,
            eos_id=source.config.eos_token_id,
        )
        log("the file's tokenizer makes the same ids of all probe texts")
    actual_TV = gguf_logits(file, ids_T)
    unfolded = UnfoldedTensors(file, source.config, folded.config, file_type=file_type)
    same_values_TV = streamed_logits(source.config, unfolded, ids_T)
    yield compare(
        "the file's values in the source's model and as llama.cpp computes them",
        same_values_TV,
        actual_TV,
        tolerance=SAME_VALUES_TOLERANCE,
    )
    yield compare("the written file", source.logits(ids_T), actual_TV, tolerance=GGUF_TOLERANCE[file_type])
