"""Build a token store of the installed documentation: documents -> deduplicated -> split -> tokenizer -> token store.

It is a pure function of the installed packages and the settings: the same packages give the same bytes, so the same
fingerprint. It is made in a temporary directory beside its final name and renamed when complete.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from pathlib import Path

from btlm_jax.corpus.installed.documents import (
    SOURCES,
    Document,
    describe_installation,
    drop_near_duplicates,
    drop_repeated_paragraphs,
    installed_documents,
)
from btlm_jax.corpus.pack import pack, write_shards, write_tfds_metadata
from btlm_jax.data import store
from btlm_jax.data.store import TokenBlock
from btlm_jax.display.progress import Log
from btlm_jax.recipe.config import CorpusConfig
from btlm_jax.storage.files import only_writer, scratch_directory, sync_and_hash
from btlm_jax.tokenizers import train_in_process
from btlm_jax.tokenizers.sentencepiece_bpe import (
    SENTENCEPIECE,
    TOKENIZER_BYTES,
    TOKENIZER_FILE,
    SentencePieceTokenizer,
)
from btlm_jax.tokenizers.sentencepiece_proto import SPACE_MARK

RECIPE = 2  # raise when the steps change, so that the fingerprint changes
ENCODE_THREADS = 2
ENCODE_BATCH = 256


def build_store(
    config: CorpusConfig, *, vocab_size: int, block_len: int, seed: int, directory: Path, log: Log
) -> store.Manifest:
    """Build a token store of this Python installation's documentation in `directory` and return its manifest.

    One that another process makes meanwhile is returned, which is said.

    Raises:
      FileExistsError: something is there already, or another process is making it.
      ValueError: too little text for the vocabulary or for the split.
      OSError: a file cannot be written; nothing is left under the final name.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} exists already; delete it to build the token store again")
    with only_writer(directory), scratch_directory(directory) as scratch:
        if directory.exists():
            log(f"Corpus: another process has made {directory} meanwhile, and it is used")
            return store.read_manifest(directory)
        manifest = _build(config, vocab_size=vocab_size, block_len=block_len, seed=seed, directory=scratch, log=log)
        os.replace(scratch, directory)
    return manifest


def _build(
    config: CorpusConfig, *, vocab_size: int, block_len: int, seed: int, directory: Path, log: Log
) -> store.Manifest:
    clock = _StageClock(log)
    dropped: Counter = Counter()
    documents = list(installed_documents(dropped))
    clock.done("read the installed documentation", documents)
    documents = drop_repeated_paragraphs(documents, dropped)
    documents = drop_near_duplicates(documents, dropped)
    clock.done("deduplicated", documents)
    documents = _take(documents, max_bytes=config.max_bytes, seed=seed, dropped=dropped)
    train, heldout = _split(documents, config=config, seed=seed, dropped=dropped)
    log(f"Corpus: left out: {', '.join(f'{count:,} {reason}' for reason, count in sorted(dropped.items()))}")
    clock.done(f"took at most {config.max_bytes / 1e6:.0f} MB, {len(heldout)} documents of it held out", documents)
    texts = _some_texts(train, max_bytes=TOKENIZER_BYTES)
    model = train_in_process(SENTENCEPIECE, texts, vocab_size=vocab_size)
    tokenizer = SentencePieceTokenizer(model)
    (directory / TOKENIZER_FILE).write_bytes(model)
    clock.done(f"trained a tokenizer of {tokenizer.vocab_size:,} pieces", train)
    dtype = store.token_dtype(tokenizer.vocab_size)
    splits = {
        store.TRAIN: _write_train(directory, train, tokenizer, block_len=block_len, dtype=dtype),
        store.HELDOUT: _write_heldout(directory, heldout, tokenizer, block_len=block_len, dtype=dtype),
    }
    write_tfds_metadata(directory, splits, block_len=block_len, dtype=dtype)
    heldout_text = _write_heldout_text(directory, heldout)
    clock.done(f"packed {splits[store.TRAIN].num_tokens:,} training tokens", documents)
    manifest = store.Manifest(
        block_len=block_len,
        dtype=dtype,
        tokenizer=store.TokenizerInfo(
            kind="sentencepiece",
            file=TOKENIZER_FILE,
            sha256=sync_and_hash(directory / TOKENIZER_FILE),
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
        ),
        splits=splits,
        features=(),
        made_by={
            "recipe": RECIPE,
            "corpus": {
                "source": config.source,
                "max_bytes": config.max_bytes,
                "heldout_fraction": config.heldout_fraction,
                "heldout_bytes_per_source": config.heldout_bytes_per_source,
                "seed": seed,
            },
            "installation": describe_installation(),
            "dropped": dict(sorted(dropped.items())),
            "heldout_text": heldout_text,
        },
    )
    store.write_manifest(directory, manifest)
    return manifest


class _StageClock:
    """Logs each stage's documents, size, time and rate at its end."""

    def __init__(self, log: Log):
        self._log = log
        self._start = time.monotonic()

    def done(self, what: str, documents: list[Document]) -> None:
        seconds = time.monotonic() - self._start
        self._start = time.monotonic()
        megabytes = sum(len(block) for document in documents for block in document.blocks) / 1e6
        self._log(
            f"Corpus: {what}: {len(documents):,} documents, {megabytes:.1f} M characters, {seconds:.1f} s, "
            f"{megabytes / max(seconds, 1e-9):.1f} M characters/s"
        )


def _take(documents: list[Document], *, max_bytes: int, seed: int, dropped: Counter) -> list[Document]:
    """Return a representative sample of up to max_bytes, in the order of a hash of `seed` and the document's id."""
    sample, size = [], 0
    for document in sorted(documents, key=lambda document: _hash_text("order", seed, document.id)):
        num_bytes = len(document.text.encode("utf-8", "replace"))
        if SPACE_MARK in document.text:
            dropped["has SentencePiece's space mark"] += 1
        elif size + num_bytes > max_bytes:
            dropped["over corpus.max_bytes"] += 1
        else:
            sample.append(document)
            size += num_bytes
    return sample


def _split(
    documents: list[Document], *, config: CorpusConfig, seed: int, dropped: Counter
) -> tuple[list[Document], list[Document]]:
    """Split by a hash of the text; documents above a source's held-out limit are in neither part."""
    train, heldout = [], []
    size = Counter()
    for document in documents:
        if _hash_text("heldout", seed, document.text) / 2**64 >= config.heldout_fraction:
            train.append(document)
            continue
        size[document.source] += len(document.text.encode())
        if size[document.source] > config.heldout_bytes_per_source:
            size[document.source] -= len(document.text.encode())
            dropped["over corpus.heldout_bytes_per_source"] += 1
        else:
            heldout.append(document)
    missing = set(SOURCES) - {document.source for document in heldout}
    if missing or not train:
        raise ValueError(
            f"corpus.max_bytes={config.max_bytes} and corpus.heldout_fraction={config.heldout_fraction} leave no "
            f"{'held-out text of ' + ', '.join(sorted(missing)) if missing else 'training text'}; raise them"
        )
    return train, heldout


def _hash_text(purpose: str, seed: int, text: str) -> int:
    """Return 64 bits of a hash that differs by purpose and seed."""
    digest = hashlib.blake2b(f"{purpose} {seed} {text}".encode("utf-8", "replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def _some_texts(documents: list[Document], *, max_bytes: int) -> list[str]:
    texts, size = [], 0
    for document in documents:
        if size > max_bytes:
            break
        texts.append(document.text)
        size += len(document.text)
    return texts


def _write_train(
    directory: Path, documents: list[Document], tokenizer: SentencePieceTokenizer, *, block_len: int, dtype: str
) -> store.Split:
    """Write one stream of all sources, in the documents' shuffled order."""
    ids = _encode(documents, tokenizer)
    blocks = list(pack(ids, block_len=block_len, eos_id=tokenizer.eos_id, dtype=dtype))
    by_source = {
        source: _source_of(documents, ids, source=source, first_block=0, num_blocks=0)
        for source in SOURCES
        if any(document.source == source for document in documents)
    }
    return _split_of(directory, store.TRAIN, blocks, by_source)


def _write_heldout(
    directory: Path, documents: list[Document], tokenizer: SentencePieceTokenizer, *, block_len: int, dtype: str
) -> store.Split:
    """Write one stream per source, each in contiguous blocks."""
    ids = _encode(documents, tokenizer)
    blocks: list[TokenBlock] = []
    by_source = {}
    for source in SOURCES:
        own = [row for document, row in zip(documents, ids, strict=True) if document.source == source]
        packed = list(pack(own, block_len=block_len, eos_id=tokenizer.eos_id, dtype=dtype))
        by_source[source] = _source_of(documents, ids, source=source, first_block=len(blocks), num_blocks=len(packed))
        blocks += packed
    return _split_of(directory, store.HELDOUT, blocks, by_source)


def _encode(documents: list[Document], tokenizer: SentencePieceTokenizer) -> list[list[int]]:
    return [
        ids
        for start in range(0, len(documents), ENCODE_BATCH)
        for ids in tokenizer.encode_batch(
            [document.text for document in documents[start : start + ENCODE_BATCH]], num_threads=ENCODE_THREADS
        )
    ]


def _source_of(
    documents: list[Document], ids: list[list[int]], *, source: str, first_block: int, num_blocks: int
) -> store.Source:
    own = [(document, row) for document, row in zip(documents, ids, strict=True) if document.source == source]
    return store.Source(
        num_documents=len(own),
        num_bytes=sum(len(document.text.encode()) for document, _ in own),
        num_tokens=sum(len(row) + 1 for _, row in own),
        first_block=first_block,
        num_blocks=num_blocks,
    )


def _split_of(directory: Path, name: str, blocks: list[TokenBlock], sources: dict[str, store.Source]) -> store.Split:
    return store.Split(
        num_blocks=len(blocks),
        num_tokens=sum(block.num_targets for block in blocks),
        shards=tuple(write_shards(directory, split=name, blocks=blocks)),
        sources=sources,
    )


def _write_heldout_text(directory: Path, documents: list[Document]) -> dict[str, str]:
    """Write the held-out text, to compare bits per byte with other compressors; return the sha256 of each file."""
    folder = directory / "heldout"
    folder.mkdir()
    hashes = {}
    for source in SOURCES:
        path = folder / f"{source}.txt"
        path.write_bytes(b"\n".join(document.text.encode() for document in documents if document.source == source))
        hashes[f"heldout/{path.name}"] = sync_and_hash(path)
    return hashes
