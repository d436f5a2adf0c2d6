"""The format of a token store, which corpus/ writes and training reads: the manifest, its fingerprint, its checks; and
how much of a store a run reads.

A token store is a directory; one that is only read may be a folder behind a URL:

    manifest.json                                      written and read by this module
    tokenizer.model or tokenizer.json                  the tokenizer (`Manifest.tokenizer.file`)
    features.json, dataset_info.json                   TFDS metadata, so that TFDS opens it without TensorFlow
    tokens-<split>.array_record-00000-of-00003         shards, `group_size:1`, at most 8,192 blocks each

Block b of a split is `stream[b*T : b*T + T + 1]` (T = block_len) of one packed token stream
`EOS document EOS document ... EOS`, so each document token is a target exactly once. Each record is a TFDS example
`{"tokens": uint16 or uint32 [T + 1] stored as bytes, "num_targets": int32}`; num_targets is T but in the last block
of a stream, which is padded with EOS. `train` is one stream over all sources, documents shuffled; `heldout` is one
stream a source, its blocks contiguous. That is format 1. Format 2 has one thing more or several, its `features`: with
"sources" `train` too is one stream a source; with "examples" a stream is not `EOS document EOS ...` but windows of
`window` tokens, in each of which some examples are whole, padding with EOS after them, and a record has "marks" too, a
uint8 [T + 1] stored as bytes: bits TRAINED, BEGINS and PADDING of each token. A source's counts are then of the trained
targets and their text. A store with none of them is written in format 1, byte for byte as ever. Nothing here uses JAX,
TFDS or Grain.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from btlm_jax.recipe.config import config_from
from btlm_jax.storage.files import hash_json, parse_json_object, write_atomically
from btlm_jax.storage.location import PathOrUrl, join_location, list_sizes, read_bytes

MANIFEST_FILE = "manifest.json"
TOKENIZER_INFO_FILE = "tokenizer_info.json"  # beside a tokenizer that a run keeps
# Beside it too, where examples were rendered by a chat template, and in Hugging Face directories.
TEMPLATE_FILE, TOKENIZER_CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
PROMPT_BOS = "prompt_bos_id"  # key of the latter, beside a tokenizer that is kept: what stands before every prompt
DATASET_NAME = "tokens"
FORMAT = "btlm-token-store"
SOURCES = "sources"  # `train` is one stream a source, its blocks contiguous
EXAMPLES = "examples"  # prompts and completions: marks say what is trained, and where an example begins
FEATURES = (EXAMPLES, SOURCES)  # that a store of format 2 may have
MOST_DOCUMENTS = "most documents in a block"  # of examples and paddings, a count in `made_by`
TRAINED, BEGINS, PADDING = 1, 2, 4  # bits of a token's mark; padding begins as an example does
TRAIN, HELDOUT = "train", "heldout"
BLOCKS_PER_SHARD = 8192
_WORTH_EPOCHS = 4  # arXiv 2305.16264: up to so many are about as good as new text


class TokenBlock(NamedTuple):
    """One record of a store: block_len + 1 tokens, of which the first `num_targets` after the first are targets."""

    tokens: np.ndarray  # [block_len + 1], of the store's dtype
    num_targets: int  # block_len, but less in the last block of a stream, which is padded
    marks: np.ndarray | None = None  # uint8 [block_len + 1], of a store of examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """Which tokenizer made the ids."""

    kind: str  # "sentencepiece" or "byte_level_bpe"
    file: str  # inside the store
    sha256: str
    vocab_size: int
    eos_id: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One ArrayRecord file of a split."""

    file: str
    num_blocks: int
    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The share of one source in a split; first_block and num_blocks are 0 in a split that is one stream of all."""

    num_documents: int
    num_bytes: int  # UTF-8 bytes of the documents' text; of examples, of what is trained
    num_tokens: int  # targets, end-of-document tokens included; of examples, those that are trained
    first_block: int
    num_blocks: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The shards of a split, in order, and its sources."""

    num_blocks: int
    num_tokens: int  # targets in all, as of the sources
    shards: tuple[Shard, ...]
    sources: dict[str, Source]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that identifies a token store."""

    block_len: int
    dtype: str  # "uint16" up to 65,536 ids, else "uint32"
    tokenizer: TokenizerInfo
    splits: dict[str, Split]
    features: tuple[str, ...]  # some of FEATURES, sorted; none in format 1
    window: int = 0  # tokens in which examples are whole, a divisor of block_len; 0 without EXAMPLES
    made_by: dict  # settings, versions and inputs of the build; no times, so that the same input gives the same bytes

    @property
    def prompt_bos_id(self) -> int | None:
        """The id that stands in front of the prompts of examples; None: nothing does, nor in front of documents."""
        return self.made_by.get("bos_id") if EXAMPLES in self.features else None

    @property
    def fingerprint(self) -> str:
        """Return a sha256 over every field of the manifest: with the shards' hashes in it, over the whole store."""
        return hash_json(self.to_json())

    @property
    def format_version(self) -> int:
        return 2 if self.features else 1

    def to_json(self) -> dict:
        """Return what `config_from` reads back; format 1 has no key `features`."""
        body = dataclasses.asdict(self)
        if not self.features:
            del body["features"]
        if EXAMPLES not in self.features:
            del body["window"]
        return body


def token_dtype(vocab_size: int) -> str:
    """Return the smallest of the two stored dtypes that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def shard_name(*, split: str, index: int, num_shards: int) -> str:
    """Return the TFDS file name of a shard."""
    return f"{DATASET_NAME}-{split}.array_record-{index:05d}-of-{num_shards:05d}"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json atomically, as the last file of a store: where it is, the store is complete."""
    body = {
        "format": FORMAT,
        "format_version": manifest.format_version,
        "fingerprint": manifest.fingerprint,
        **manifest.to_json(),
    }
    write_atomically(directory / MANIFEST_FILE, json.dumps(body, indent=2, sort_keys=True))


def read_manifest(directory: PathOrUrl) -> Manifest:
    """Read and check a store's manifest.

    Raises:
      FileNotFoundError: there is no manifest in `directory`.
      OSError: it cannot be reached.
      ValueError: it is not valid JSON, not of this format, lacks a field, or its contents do not give its fingerprint.
    """
    path = join_location(directory, MANIFEST_FILE)
    try:
        contents = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{directory} is not a token store: it has no {MANIFEST_FILE}") from error
    try:
        body = parse_json_object(contents, name=MANIFEST_FILE)
        found = {key: body.pop(key, None) for key in ("format", "format_version", "fingerprint")}
        version = found["format_version"]
        if found["format"] != FORMAT or version not in (1, 2) or type(version) is not int:
            raise ValueError(f"its format is {found['format']}, {version}; this version reads {FORMAT}, 1 and 2")
        manifest = config_from(Manifest, {"features": [], "window": 0} | body, path=MANIFEST_FILE)
        if manifest.format_version != version:
            raise ValueError(f"its format is {version}, and its features are {list(manifest.features)}")
        if manifest.fingerprint != found["fingerprint"]:
            raise ValueError(
                f"its contents hash to {manifest.fingerprint[:12]} but it says {str(found['fingerprint'])[:12]}"
            )
        _check(manifest)
    except RecursionError:
        raise ValueError(f"{path} is corrupt: it is nested too deeply; rebuild the store") from None
    except ValueError as error:
        raise ValueError(f"{path} is corrupt: {error}; rebuild the store") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Check what the types do not say.

    Raises:
      ValueError: a value that no store has.
    """
    tokenizer = manifest.tokenizer
    if manifest.block_len < 1 or manifest.dtype not in ("uint16", "uint32"):
        raise ValueError(f"block_len={manifest.block_len} or dtype={manifest.dtype!r} is not possible")
    _check_tokenizer_info(tokenizer)
    if unknown := set(manifest.features) - set(FEATURES):
        raise ValueError(
            f"its features are {list(manifest.features)}, and this version does not know {', '.join(sorted(unknown))}, "
            f"only {', '.join(FEATURES)}"
        )
    if list(manifest.features) != sorted(set(manifest.features)):
        raise ValueError(f"its features {list(manifest.features)} are not in order, each once")
    window, has_examples = manifest.window, EXAMPLES in manifest.features
    if not (window > 0 and manifest.block_len % window == 0 if has_examples else window == 0):
        raise ValueError(f"window={window} is not possible with block_len={manifest.block_len}")
    if SOURCES in manifest.features and TRAIN in manifest.splits:
        _check_streams(manifest.splits[TRAIN])
    for name, split in manifest.splits.items():
        numbers = [split.num_tokens, *(shard.num_blocks for shard in split.shards)]
        numbers += [value for source in split.sources.values() for value in dataclasses.astuple(source)]
        if min(numbers) < 0 or sum(shard.num_blocks for shard in split.shards) != split.num_blocks:
            raise ValueError(f"split {name} has {split.num_blocks} blocks, its shards have others, or a count below 0")
    for file in (shard.file for split in manifest.splits.values() for shard in split.shards):
        if file in ("", ".", "..") or Path(file).name != file:
            raise ValueError(f"{file!r} is not the name of a file in the store's directory")


def _check_streams(split: Split) -> None:
    end = 0
    for name, source in streams_of(split):
        if source.first_block != end or not source.num_blocks:
            raise ValueError(
                f"source {name!r} has {source.num_blocks} blocks of split {TRAIN} from {source.first_block} on, where "
                f"those before it end at {end}"
            )
        end += source.num_blocks
    if end != split.num_blocks:
        raise ValueError(f"the sources have {end} of the {split.num_blocks} blocks of split {TRAIN}")


def streams_of(split: Split) -> list[tuple[str, Source]]:
    """Return the sources of a split with one stream a source, in the order of their blocks."""
    return sorted(split.sources.items(), key=lambda item: item[1].first_block)


def keep_tokenizer(tokenizer: TokenizerInfo, *, store: PathOrUrl, directory: Path) -> None:
    """Copy a store's tokenizer, with what identifies it, into a directory of its own.

    Raises:
      OSError: it cannot be read or written.
      ValueError: it is not the one the manifest records.
    """
    contents = read_bytes(join_location(store, tokenizer.file))
    if hashlib.sha256(contents).hexdigest() != tokenizer.sha256:
        raise ValueError(
            f"tokenizer {tokenizer.file} of {store} is not the one its manifest records; rebuild the store"
        )
    write_tokenizer(tokenizer, contents, directory=directory)


def keep_settings(manifest: Manifest, *, directory: Path) -> None:
    """Write beside a tokenizer what a store was made with, over what of a model is there already.

    That is the id in front of prompts, and of examples the chat template, and the special tokens that it has.

    Raises:
      OSError: it cannot be read or written.
      ValueError: what is there is damaged.
    """
    path, made_by = directory / TOKENIZER_CONFIG_FILE, manifest.made_by
    kept = parse_json_object(path.read_bytes(), name=path) if path.is_file() else {}
    kept[PROMPT_BOS] = manifest.prompt_bos_id
    if EXAMPLES in manifest.features and made_by.get("template"):
        write_atomically(directory / TEMPLATE_FILE, made_by["template"])
        kept |= {"bos_token": None, "unk_token": None} | made_by.get("variables", {})  # null: the template had none
    write_atomically(path, json.dumps(kept, indent=1))


def write_tokenizer(tokenizer: TokenizerInfo, contents: bytes, *, directory: Path) -> None:
    """Write a tokenizer's file, with what identifies it, into a directory of its own."""
    directory.mkdir(exist_ok=True)
    write_atomically(directory / tokenizer.file, contents)
    write_atomically(directory / TOKENIZER_INFO_FILE, json.dumps(dataclasses.asdict(tokenizer), indent=2))


def read_tokenizer_info(directory: Path) -> TokenizerInfo:
    """Read what `keep_tokenizer` wrote of the tokenizer.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: it is damaged.
    """
    path = directory / TOKENIZER_INFO_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} lacks {path.name}, which says which tokenizer it holds")
    try:
        return tokenizer_info_from(parse_json_object(path.read_bytes(), name=path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def tokenizer_info_from(values: dict) -> TokenizerInfo:
    """Return what a JSON object says of a tokenizer.

    Raises:
      ValueError: a field is missing or of another type, has a value that no tokenizer has, or names a file elsewhere.
    """
    info = config_from(TokenizerInfo, values, path="tokenizer")
    _check_tokenizer_info(info)
    return info


def _check_tokenizer_info(info: TokenizerInfo) -> None:
    if not 0 <= info.eos_id < info.vocab_size < 1 << 31:
        raise ValueError(f"eos_id={info.eos_id} is none of the tokenizer's {info.vocab_size} ids")
    if info.file in ("", ".", "..") or Path(info.file).name != info.file:
        raise ValueError(f"{info.file!r} is not the name of a file in the tokenizer's directory")


def check_shards(directory: PathOrUrl, manifest: Manifest) -> None:
    """Check that every shard and the tokenizer are present at their recorded size (contents are not re-hashed).

    Raises:
      FileNotFoundError: a shard or the tokenizer file is missing.
      OSError: the place cannot be reached.
      ValueError: a shard has another size than the manifest says, so it was truncated or replaced.
    """
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    sizes = list_sizes(directory, [manifest.tokenizer.file, *(shard.file for shard in shards)])
    if manifest.tokenizer.file not in sizes:
        raise FileNotFoundError(f"token store {directory} lacks its tokenizer file {manifest.tokenizer.file}")
    for shard in shards:
        if shard.file not in sizes:
            raise FileNotFoundError(f"token store {directory} lacks shard {shard.file}; restore or rebuild it")
        if sizes[shard.file] != shard.num_bytes:
            raise ValueError(
                f"shard {join_location(directory, shard.file)} is {sizes[shard.file]:,} bytes, its manifest says "
                f"{shard.num_bytes:,}: truncated or replaced; restore or rebuild it"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreUse:
    """How much of a store's train split a run reads, in targets; padding of the last block is counted as targets."""

    curriculum_tokens: int
    tokens_per_step: int
    tokens_per_epoch: int
    max_epochs: int

    @property
    def capacity_tokens(self) -> int:
        return self.tokens_per_epoch * self.max_epochs

    @property
    def epochs(self) -> float:
        return self.curriculum_tokens / self.tokens_per_epoch

    @property
    def unused_tokens(self) -> int:
        """Tokens of the allowed epochs that the run does not read."""
        return self.capacity_tokens - self.curriculum_tokens

    @property
    def spare_steps(self) -> int:
        """Whole steps by which the last phase could be longer."""
        return self.unused_tokens // self.tokens_per_step

    @property
    def tail_tokens(self) -> int:
        """The part of unused_tokens that fills no batch."""
        return self.unused_tokens % self.tokens_per_step

    def __str__(self) -> str:
        return (
            f"{self.curriculum_tokens:,} tokens = {self.epochs:.3f} epochs of {self.tokens_per_epoch:,} and as many of "
            f"each source{describe_repetition(self.epochs)} (data.max_epochs={self.max_epochs}); "
            f"unused {self.unused_tokens:,} = {self.spare_steps:,} steps and a tail of {self.tail_tokens:,} that fills "
            "no batch"
        )

    def to_json(self) -> dict:
        return {"epochs": self.epochs, "tokens_per_epoch": self.tokens_per_epoch}


def describe_repetition(epochs: float) -> str:
    """Return what is to be said of text that is read so many times."""
    if epochs <= 1:
        return ""
    much = f"; what is read more than about {_WORTH_EPOCHS} times is worth less than new text (arXiv 2305.16264)"
    return f", each epoch in another order{much if epochs > _WORTH_EPOCHS else ''}"
