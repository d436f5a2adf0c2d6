"""The documents whose loss is asked for: of raw text files, or of the held-out split of a token store."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from btlm_jax import notices
from btlm_jax.corpus.engine.inputs import raw_inputs_of
from btlm_jax.corpus.readers.frames import BadFileError
from btlm_jax.corpus.readers.raw import Defect, read_raw
from btlm_jax.data.reader import TokenStore, open_store
from btlm_jax.data.store import BEGINS, EXAMPLES, HELDOUT, TRAINED, streams_of
from btlm_jax.storage.location import PathOrUrl, open_binary
from btlm_jax.tokenizers.compare import difference
from btlm_jax.tokenizers.tokenizer import Tokenizer, encode_document, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Document:
    """One document as a model is asked for it."""

    source: str
    tokens: np.ndarray  # int32 [n + 1]; the first is context alone
    is_counted: np.ndarray  # bool [n]: of tokens[1:], those whose loss counts
    num_bytes: int  # UTF-8 bytes of the text that counts

    @property
    def num_targets(self) -> int:
        """Return how many tokens are counted."""
        return int(self.is_counted.sum())


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Documents to evaluate, those of a source together."""

    documents: tuple[Document, ...]
    identity: str  # hash of the texts, or of the store: equal for equal documents, whatever the tokenizer
    description: str  # for a reader

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the names of the sources, each once, in order."""
        return tuple(dict.fromkeys(document.source for document in self.documents))

    def of_source(self, source: str) -> list[Document]:
        """Return the documents of a source, in order."""
        return [document for document in self.documents if document.source == source]

    @property
    def num_targets(self) -> int:
        """Return how many tokens are counted."""
        return sum(document.num_targets for document in self.documents)


def read_texts(locations: Sequence[PathOrUrl], tokenizer: Tokenizer) -> Corpus:
    """Read raw text files (JSON lines, Parquet, plain text and what else `btlm corpus` reads) as documents.

    Before each stands the end-of-text id, which opens every document in training, and is not counted. The source is
    what the document says, or else the folder or, without one, the name of its file.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it cannot be read.
      ValueError: a file is damaged or has no text.
    """
    documents, digest, num_bad, num_empty, first_bad = [], hashlib.sha256(), 0, 0, ""
    for name, location in _files(locations):
        with _local(location) as path:
            try:
                for item in read_raw(path, name=name, default_source=_default_source(name)):
                    if isinstance(item, Defect):
                        num_bad += 1
                        first_bad = first_bad or f"{item.file}, line {item.line}: {item.reason}"
                        continue
                    ids = [token for piece in encode_document(tokenizer, item.text) for token in piece]
                    if not ids:  # a tokenizer that changes texts can leave nothing of one
                        num_empty += 1
                        continue
                    digest.update(hashlib.sha256(f"{item.source}\0{item.text}".encode()).digest())
                    documents.append(_document(item.source, [tokenizer.eos_id, *ids], num_bytes=item.num_bytes))
            except BadFileError as error:
                raise ValueError(f"{location} cannot be read to its end: {error}") from error
    if num_bad:
        message = f"lines that are no documents: {num_bad:,}, the first is {first_bad}"
        notices.report("line-quarantined", message, count=num_bad)
    if num_empty:
        notices.report("text-empty", f"texts that are empty, and so have no loss: {num_empty:,}", count=num_empty)
    if not documents:
        raise ValueError(f"there is no text in {', '.join(map(str, locations))}: give files with documents")
    documents.sort(key=lambda document: document.source)
    number = f"{len(documents):,} documents" if len(documents) > 1 else "1 document"
    return Corpus(
        documents=tuple(documents),
        identity=digest.hexdigest(),
        description=f"{number} of {', '.join(map(str, locations))}",
    )


def read_store(location: PathOrUrl, tokenizer: Tokenizer, *, name: str) -> Corpus:
    """Read the held-out documents of a token store; `name` is the model's, for errors.

    The end-of-text id that closes a document is counted too, so that the counted tokens are those of the split.

    Raises:
      FileNotFoundError, OSError: the store is missing or cannot be read.
      ValueError: it is damaged, has no held-out documents, or has other ids than the model.
    """
    store = open_store(location, expected_fingerprint="")
    manifest = store.manifest
    if changes := str(difference(tokenizer, load_tokenizer(location, manifest.tokenizer))):
        raise ValueError(f"token store {location} has another tokenizer than {name}: {changes}; give --text")
    if HELDOUT not in manifest.splits or not manifest.splits[HELDOUT].num_blocks:
        raise ValueError(f"token store {location} has no held-out documents; give --text")
    has_examples = EXAMPLES in manifest.features
    read = _examples_of if has_examples else _documents_of
    documents = tuple(document for document in read(store, tokenizer) if document.num_targets)
    num_bytes = sum(document.num_bytes for document in documents)
    of_text = sum(source.num_bytes for source in manifest.splits[HELDOUT].sources.values())
    if not has_examples and num_bytes != of_text:
        notices.report(
            "tokenizer-lossy",
            f"the held-out tokens of {location} give {num_bytes:,} bytes back of the {of_text:,} of their text: bits a "
            "byte are of the former, and those of training of the latter",
        )
    return Corpus(
        documents=documents,
        identity=manifest.fingerprint,
        description=f"{len(documents):,} held-out documents of {location}",
    )


def limited(corpus: Corpus, *, tokens_per_source: int) -> Corpus:
    """Return a corpus with the first documents of each source, up to so many tokens, but at least one; 0: all."""
    if not tokens_per_source:
        return corpus
    kept = []
    for source in corpus.sources:
        left = tokens_per_source
        for number, document in enumerate(corpus.of_source(source)):
            left -= document.num_targets
            if number and left < 0:
                break
            kept.append(document)
    if len(kept) == len(corpus.documents):
        return corpus
    description = f"the first {len(kept):,} of {corpus.description}"
    return dataclasses.replace(corpus, documents=tuple(kept), description=description)


def _document(source: str, tokens: Sequence[int] | np.ndarray, *, num_bytes: int) -> Document:
    return Document(
        source=source,
        tokens=np.asarray(tokens, np.int32),
        is_counted=np.ones(len(tokens) - 1, bool),
        num_bytes=num_bytes,
    )


def _documents_of(store: TokenStore, tokenizer: Tokenizer) -> Iterator[Document]:
    reader = store.split(HELDOUT)
    for name, source in streams_of(reader.split):
        blocks = reader.read_many(range(source.first_block, source.first_block + source.num_blocks))
        parts = [blocks[0].tokens[:1], *(block.tokens[1 : block.num_targets + 1] for block in blocks)]
        stream = np.concatenate(parts).astype(np.int32)
        ends = np.flatnonzero(stream == reader.eos_id)
        for begin, end in zip(ends, ends[1:], strict=False):
            tokens = stream[begin : end + 1]
            yield _document(name, tokens, num_bytes=len(tokenizer.decode(tokens[1:-1].tolist()).encode()))


def _examples_of(store: TokenStore, tokenizer: Tokenizer) -> Iterator[Document]:
    """Yield the examples of a store of prompts and completions; what is trained is counted."""
    reader, window = store.split(HELDOUT), store.manifest.window
    for name, source in streams_of(reader.split):
        for block in reader.read_many(range(source.first_block, source.first_block + source.num_blocks)):
            assert block.marks is not None
            for first in range(0, reader.block_len, window):
                marks = block.marks[first : first + window + 1]
                begins = [0, *(np.flatnonzero(marks[1:] & BEGINS) + 1).tolist(), window + 1]
                for begin, end in zip(begins, begins[1:], strict=False):
                    tokens = block.tokens[first + begin : first + end].astype(np.int32)
                    is_trained = marks[begin:end] & TRAINED > 0
                    if begin:  # its first token has none of its own before it
                        tokens = np.concatenate([[reader.eos_id], tokens]).astype(np.int32)
                    else:
                        is_trained = is_trained[1:]
                    if is_trained.any():
                        text = tokenizer.decode(tokens[1:][is_trained].tolist())
                        yield Document(source=name, tokens=tokens, is_counted=is_trained, num_bytes=len(text.encode()))


def _files(locations: Sequence[PathOrUrl]) -> Iterator[tuple[str, PathOrUrl]]:
    """Yield (name, location) of each file; a large one is not read in pieces here."""
    found: dict[PathOrUrl, str] = {}
    for item in raw_inputs_of(locations):
        found.setdefault(item.location, item.name)
    for location, name in found.items():
        yield name, location


@contextlib.contextmanager
def _local(location: PathOrUrl) -> Iterator[Path]:
    """Yield the path of a file, which is fetched if it is behind a URL."""
    if isinstance(location, Path):
        yield location
        return
    with tempfile.NamedTemporaryFile(prefix="btlm-evaluate-") as copy:
        with open_binary(location) as source:
            shutil.copyfileobj(source, copy, 1 << 20)
        copy.flush()
        yield Path(copy.name)


def _default_source(name: str) -> str:
    path = PurePosixPath(name)
    return path.parts[0] if len(path.parts) > 1 else path.name.partition(".")[0] or path.name
