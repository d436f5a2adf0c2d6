"""The stage `tokenize`: split documents -> a token store (data/store.py).

    work/tokenizer-HASH  a copy of the tokenizer, which the tasks read
    work/tokens          a task per file: its documents' ids, each document followed by EOS, and their counts
    work/shards          a task per shard of the store: its range of the stream, divided into blocks

A shard's range follows from the counts, so shards are written in any order. `train` is one stream over the files in
order, or with `by_source` one stream per source, its documents in the same order; the validation documents become the
split `heldout`, the test documents `test`, with one stream per source.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from btlm_jax import notices
from btlm_jax.corpus.engine.inputs import read_documents, stage_inputs
from btlm_jax.corpus.engine.stage import Stage, accept_all, only_command, run_stage
from btlm_jax.corpus.engine.tasks import Heartbeat, LocalTask, Task
from btlm_jax.corpus.engine.workers import Workers
from btlm_jax.corpus.pack import cut_into_blocks, write_shard, write_tfds_metadata
from btlm_jax.corpus.readers.records import load_array, read_records, save_array
from btlm_jax.corpus.stages.split import TEST, TRAIN, VALIDATION
from btlm_jax.data import store
from btlm_jax.data.store import TokenBlock
from btlm_jax.display.progress import Log
from btlm_jax.storage.files import renamed_at_end, write_atomically
from btlm_jax.tokenizers.gpt2 import fastest_tokenizer
from btlm_jax.tokenizers.tokenizer import Tokenizer, encode_document, find_tokenizer, tokenizer_info

RECIPE = 2  # raise when the steps change
# Texts that a tokenizer may change although they are in NFC and without control characters, as after `clean`.
PROBES = (
    *("a\nb", "a\n\n\nb", "a\tb", "\ta", "a  b   c", " a", "a ", "\na\n", "Ab CD", "don't 's 'll"),
    *(
        "1234567 3.14",
        "caf\u00e9 na\u00efve",
        "\u6f22\u5b57\u304b\u306a",
        "\u03b1\u03b2\u03b3",
        "\U0001f468\u200d\U0001f469",
    ),
    *("a\u2581b", "\u2581", "\u00a0\u2009", "</s><s><unk><0x41><|endoftext|>", "x\u00b2 \u2026"),
)
_SAMPLED_FILES, _SAMPLED_DOCUMENTS, _SAMPLED_CHARACTERS = 16, 128, 20_000
STORE_SPLITS = {TRAIN: store.TRAIN, VALIDATION: store.HELDOUT, TEST: "test"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stream:
    """One packed stream of a split: EOS, then the tokens of its pieces."""

    source: str | None  # None: of all sources
    pieces: tuple[int, ...]  # indices of tasks of work/tokens
    starts: tuple[int, ...]  # where in the task's tokens each piece begins
    sizes: tuple[int, ...]  # number of tokens of each piece
    first_block: int  # its number in the split
    block_len: int

    @property
    def num_blocks(self) -> int:
        return -(-sum(self.sizes) // self.block_len)

    def read(self, begin: int, end: int, *, folder: Path, eos_id: int, dtype: str) -> np.ndarray:
        """Return the tokens from `begin` up to `end` of the stream."""
        parts = [np.full(1, eos_id, dtype)] if begin == 0 else []
        start = 1
        for piece, first, size in zip(self.pieces, self.starts, self.sizes, strict=True):
            if start < end and start + size > begin:
                tokens = load_array(folder, f"tokens-{piece:05d}")[first : first + size]
                parts.append(np.array(tokens[max(begin - start, 0) : end - start]))
            start += size
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """How to encode and pack."""

    input: Path
    tokenizer: Path
    block_len: int
    by_source: bool  # one stream of training blocks for each source, which training can weight
    allow_lossy: bool  # take a tokenizer that does not give every text back


def tokenize(config: TokenizeConfig, *, output: Path, workers: Workers, log: Log) -> store.Manifest:
    """Make a token store from the output of `split` and return its manifest.

    Raises:
      FileNotFoundError: there is no finished split, or no tokenizer.
      ValueError: the input is damaged or was not split, the tokenizer cannot be used or does not give texts back, or
        `output` has other settings or inputs.
    """
    with only_command(output, inputs=[config.input]):
        return _tokenize(config, output=output, workers=workers, log=log)


def _tokenize(config: TokenizeConfig, *, output: Path, workers: Workers, log: Log) -> store.Manifest:
    source, tokenizer, block_len = config.input, config.tokenizer, config.block_len
    documents = read_documents(source, of=("split",), purpose="tokenize")
    loaded = find_tokenizer(tokenizer, allow_lossy=config.allow_lossy)
    info = tokenizer_info(loaded)
    dtype = store.token_dtype(info.vocab_size)
    settings = {"recipe": RECIPE, "input": documents["fingerprint"], "tokenizer": info.sha256, "eos_id": info.eos_id}
    inputs = stage_inputs(source, documents)
    paths = [source / item.name for item in inputs]
    if loss := describe_loss(fastest_tokenizer(loaded), [*PROBES, *_sample(paths)]):
        if not config.allow_lossy:
            raise ValueError(
                f"the tokenizer in {tokenizer} {loss}; btlm corpus tokenize --allow_lossy takes it nevertheless"
            )
        notices.report("tokenizer-lossy", f"the tokenizer in {tokenizer} {loss}")
        settings["lossy"] = loss
    tasks = [Task(index=index, inputs=(item,), weight=item.num_bytes) for index, item in enumerate(inputs)]
    run = functools.partial(run_stage, workers=workers, log=log, check=accept_all)
    tokens, copied = output / "work" / "tokens", output / "work" / f"tokenizer-{info.sha256[:12]}"
    copy_tokenizer(loaded, copied)
    if config.by_source:
        settings["by_source"] = True
    step = functools.partial(
        _tokens_task, tokenizer=copied, by_source=config.by_source, allow_lossy=config.allow_lossy, dtype=dtype
    )
    encoded = run(Stage(name="tokenize", settings=settings, tasks=tasks, run=step), tokens)
    splits = [file["split"] for file in documents["outputs"]]
    streams = _streams(encoded, splits=splits, block_len=block_len, by_source=config.by_source)
    for name, store_name in ((TRAIN, store.TRAIN), (VALIDATION, store.HELDOUT)):
        if store_name not in streams:
            raise ValueError(
                f"{source} has no {name} document that this tokenizer can encode; split with another --validation"
            )
    step = functools.partial(
        _shard_task, splits=streams, tokens=tokens, target=output, eos_id=info.eos_id, dtype=dtype, block_len=block_len
    )
    packing = Stage(
        name="pack",
        settings=settings | {"block_len": block_len},
        tasks=[
            Task(index=index, inputs=(), weight=_shard_blocks(streams, shard))
            for index, shard in enumerate(_shards(streams))
        ],
        run=step,
        output_folder="../..",
    )
    packed = run(packing, output / "work" / "shards")
    if (output / store.MANIFEST_FILE).is_file() and (output / info.file).is_file():
        return store.read_manifest(output)
    write_atomically(output / info.file, loaded.contents)
    store_splits = _store_splits(streams, encoded=encoded, packed=packed)
    write_tfds_metadata(output, store_splits, block_len=block_len, dtype=dtype)
    made_by = {"stage": "tokenize", **settings}
    manifest = store.Manifest(
        block_len=block_len,
        dtype=dtype,
        tokenizer=info,
        splits=store_splits,
        features=(store.SOURCES,) if config.by_source else (),
        made_by=made_by,
    )
    store.write_manifest(output, manifest)
    return manifest


def copy_tokenizer(tokenizer: Tokenizer, directory: Path, *, config: str = "") -> None:
    """Write a tokenizer into a directory, if it is not there, and before it the text of a tokenizer_config.json."""
    if (directory / store.TOKENIZER_INFO_FILE).is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    if config:
        write_atomically(directory / store.TOKENIZER_CONFIG_FILE, config)
    store.write_tokenizer(tokenizer_info(tokenizer), tokenizer.contents, directory=directory)


def describe_loss(tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """Return what a tokenizer loses of some texts, measured; "" if it gives all of them back."""
    given = [tokenizer.decode([i for ids in encode_document(tokenizer, text) for i in ids]) for text in texts]
    lossy = [(text, other) for text, other in zip(texts, given, strict=True) if text != other]
    if not lossy:
        return ""
    text, other = min(lossy, key=lambda pair: len(pair[0]))
    place = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    around = slice(max(place - 10, 0), place + 20)
    return (
        f"does not give every text back: {len(lossy):,} of {len(texts):,} texts come back changed, for example "
        f"{text[around]!r} as {other[around]!r}"
    )


def _sample(paths: Sequence[Path]) -> list[str]:
    """Return beginnings of documents: the first of some files at even distances."""
    count = min(len(paths), _SAMPLED_FILES)
    chosen = [paths[number * len(paths) // count] for number in range(count)]
    return [
        record.text[:_SAMPLED_CHARACTERS]
        for path in chosen
        for record in itertools.islice(read_records(path), _SAMPLED_DOCUMENTS // count)
    ]


def _streams(encoded: dict, *, splits: list[str], block_len: int, by_source: bool) -> dict[str, list[_Stream]]:
    """Return the streams of each split of the store: one per source, but one of all for `train` if not `by_source`."""
    streams: dict[str, list[_Stream]] = {}
    for name, store_name in STORE_SPLITS.items():
        is_mixed = name == TRAIN and not by_source
        pieces: dict[str | None, list[tuple[int, int, int]]] = {}  # of a source: (task, first token, number of tokens)
        for index, output in enumerate(encoded["outputs"]):
            if splits[index] != name or not output["num_tokens"]:
                continue
            sizes = {source: counts["tokens"] for source, counts in sorted(output["counts"].items())}
            start = 0
            for source, size in ({None: output["num_tokens"]} if is_mixed else sizes).items():
                pieces.setdefault(source, []).append((index, start, size))
                start += size
        first_block = 0
        for source in sorted(pieces, key=str):
            tasks, starts, sizes = zip(*pieces[source], strict=True)
            stream = _Stream(
                source=source,
                pieces=tasks,
                starts=starts,
                sizes=sizes,
                first_block=first_block,
                block_len=block_len,
            )
            first_block += stream.num_blocks
            streams.setdefault(store_name, []).append(stream)
    return streams


def _store_splits(streams: dict[str, list[_Stream]], *, encoded: dict, packed: dict) -> dict[str, store.Split]:
    """Return the splits for the store's manifest."""
    shards: dict[str, list[store.Shard]] = {}
    for (name, _, _), shard in zip(_shards(streams), packed["outputs"], strict=True):
        shards.setdefault(name, []).append(store.Shard(**shard))
    store_splits = {}
    for name, parts in streams.items():
        sources = {}
        for part in parts:
            totals: dict[str, Counter] = {}
            for piece in part.pieces:
                for source, counts in encoded["outputs"][piece]["counts"].items():
                    if part.source in (None, source):
                        totals.setdefault(source, Counter()).update(counts)
            for source, count in sorted(totals.items()):
                sources[source] = store.Source(
                    num_documents=count["documents"],
                    num_bytes=count["bytes"],
                    num_tokens=count["tokens"],
                    first_block=0 if part.source is None else part.first_block,
                    num_blocks=0 if part.source is None else part.num_blocks,
                )
        store_splits[name] = store.Split(
            num_blocks=sum(part.num_blocks for part in parts),
            num_tokens=sum(sum(part.sizes) for part in parts),
            shards=tuple(shards[name]),
            sources=sources,
        )
    return store_splits


def _shards(splits: dict[str, list[_Stream]]) -> list[tuple[str, int, int]]:
    """Return (split, index, number of shards) of every shard of the store."""
    shards = []
    for name, streams in splits.items():
        count = -(-sum(stream.num_blocks for stream in streams) // store.BLOCKS_PER_SHARD)
        shards += [(name, index, count) for index in range(count)]
    return shards


def _shard_blocks(splits: dict[str, list[_Stream]], shard: tuple[str, int, int]) -> int:
    """Return the number of blocks of a shard that `_shards` names."""
    name, index, _ = shard
    num_blocks = sum(stream.num_blocks for stream in splits[name])
    return min(store.BLOCKS_PER_SHARD, num_blocks - index * store.BLOCKS_PER_SHARD)


def _tokens_task(
    task: LocalTask,
    directory: Path,
    heartbeat: Heartbeat,
    *,
    tokenizer: Path,
    by_source: bool,
    allow_lossy: bool,
    dtype: str,
) -> dict:
    encoder = fastest_tokenizer(find_tokenizer(tokenizer, allow_lossy=allow_lossy))
    counts: dict[str, Counter] = {}
    parts: dict[str, list[np.ndarray]] = {}  # of each source, or all of them as ""
    for record in read_records(task.inputs[0].path):
        heartbeat(1, record.num_bytes)
        ids = [np.array(piece, dtype) for piece in encode_document(encoder, record.text)]
        ids.append(np.array([encoder.eos_id], dtype))
        num_tokens = sum(map(len, ids))
        counts.setdefault(record.source, Counter()).update(documents=1, bytes=record.num_bytes, tokens=num_tokens)
        parts.setdefault(record.source if by_source else "", []).extend(ids)
        del record  # so that a long one is not held while the next is read
    stream = np.concatenate([np.empty(0, dtype), *(ids for _, own in sorted(parts.items()) for ids in own)])
    output = save_array(directory, f"tokens-{task.index:05d}", stream)
    return {
        "totals": {},
        "outputs": [{**output, "num_tokens": len(stream), "counts": counts}],
    }


def _shard_task(
    task: LocalTask,
    directory: Path,
    heartbeat: Heartbeat,
    *,
    splits: dict[str, list[_Stream]],
    tokens: Path,
    target: Path,
    eos_id: int,
    dtype: str,
    block_len: int,
) -> dict:
    name, index, count = _shards(splits)[task.index]

    def blocks() -> Iterator[TokenBlock]:
        begin, end = index * store.BLOCKS_PER_SHARD, (index + 1) * store.BLOCKS_PER_SHARD
        for stream in splits[name]:
            first = max(begin - stream.first_block, 0)
            last = min(end - stream.first_block, stream.num_blocks)
            if first < last:
                piece = stream.read(first * block_len, last * block_len + 1, folder=tokens, eos_id=eos_id, dtype=dtype)
                yield from cut_into_blocks(piece, block_len=block_len, eos_id=eos_id)

    path = target / store.shard_name(split=name, index=index, num_shards=count)
    with renamed_at_end(path) as temporary:
        shard = write_shard(temporary, blocks=blocks())
    heartbeat(0, shard.num_bytes)
    return {"totals": {}, "outputs": [dataclasses.asdict(dataclasses.replace(shard, file=path.name))]}
