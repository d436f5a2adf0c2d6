"""Documents of a stage for people to read: by number, by id, or as the clusters that dedup found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from btlm_jax.corpus.engine.arrays import load_array
from btlm_jax.corpus.engine.inputs import read_stage
from btlm_jax.corpus.near_duplicates.lsh import Clusters
from btlm_jax.corpus.readers.records import Record, read_records

_RULE = "-" * 80
_SHOWN = 5  # documents of a cluster


def by_number(directory: Path, *, number: int, count: int) -> Iterator[str]:
    """Yield `count` documents from the one of that number on, counted from 0 over the stage's files.

    Raises:
      ValueError: there is no such document.
    """
    manifest = read_stage(directory)
    total = sum(output["num_documents"] for output in manifest["outputs"])
    if not 0 <= number < total:
        raise ValueError(f"{directory} has the documents 0 to {total - 1:,}, not {number:,}")
    for place, record in _documents(directory, manifest, range(number, min(number + count, total))):
        yield _text(record, place=f"document {place:,}")


def by_id(directory: Path, *, document: str) -> Iterator[str]:
    """Yield the documents of that id; more than one if ids repeat.

    Raises:
      ValueError: there is none.
    """
    manifest = read_stage(directory)
    total = sum(output["num_documents"] for output in manifest["outputs"])
    is_found = False
    for place, record in _documents(directory, manifest, range(total)):
        if record.id == document:
            is_found = True
            yield _text(record, place=f"document {place:,}")
    if not is_found:
        raise ValueError(f"{directory} has no document of id {document!r}")


def clusters(directory: Path, *, documents: Path, count: int, characters: int) -> Iterator[str]:
    """Yield the largest clusters that dedup found in the stage `documents`, with the beginnings of some documents.

    Raises:
      ValueError: `directory` is no work of dedup, or of other documents.
    """
    manifest, source = read_stage(directory), read_stage(documents)
    if manifest["stage"] != "dedup":
        raise ValueError(f"{directory} holds the stage {manifest['stage']}; clusters are what dedup finds")
    if manifest["settings"]["input"] != source["fingerprint"]:
        raise ValueError(f"{directory} was not made of {documents}")
    counts = [output["num_documents"] for output in source["outputs"]]
    found = Clusters(sum(counts))
    for output in read_stage(directory / "work" / "pairs")["outputs"]:
        found.join(np.array(load_array(directory / "work" / "pairs", output["file"].removesuffix(".npy"))))
    roots = found.roots(np.arange(sum(counts)))
    work = directory / "work" / "clusters"
    kept = np.concatenate([load_array(work, f"kept-{shard:05d}") for shard in range(len(counts))])
    sizes = np.bincount(roots, minlength=len(roots))
    largest = np.argsort(-sizes, kind="stable")[:count]
    for root in largest[sizes[largest] > 1]:
        members = np.flatnonzero(roots == root)
        shown = sorted({*members[:_SHOWN].tolist(), *members[kept[members]].tolist()})
        yield f"{_RULE}\ncluster of {len(members):,} documents"
        for place, record in _documents(documents, source, shown):
            yield _text(record, place="stays" if kept[place] else "goes", characters=characters)


def _documents(directory: Path, manifest: dict, numbers: range | list[int]) -> Iterator[tuple[int, Record]]:
    """Yield the documents of some ascending numbers; opens only the files that have some."""
    wanted, first = np.asarray(numbers), 0
    for output in manifest["outputs"]:
        end = first + output["num_documents"]
        own = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, end)]
        if len(own):
            chosen = set(own.tolist())
            for place, record in enumerate(read_records(directory / output["file"]), start=first):
                if place in chosen:
                    yield place, record
                if place >= own[-1]:
                    break
        first = end


def _text(record: Record, *, place: str, characters: int = 1 << 62) -> str:
    rest = f"\n... {len(record.text) - characters:,} more" if len(record.text) > characters else ""
    head = f"{place}: {record.id}, source {record.source}, {len(record.text):,} characters"
    return f"{_RULE}\n{head}\n{record.text[:characters]}{rest}"
