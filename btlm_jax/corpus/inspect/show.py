"""Print documents of a stage: by number, by id, or by the clusters that dedup found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from btlm_jax.corpus.engine.inputs import read_stage
from btlm_jax.corpus.near_duplicates.lsh import Clusters
from btlm_jax.corpus.readers.records import Record, join_arrays, load_array, read_records

_RULE = "-" * 80
_MAX_MEMBERS = 5  # of a cluster that are shown


def by_number(directory: Path, *, number: int, count: int) -> Iterator[str]:
    """Yield `count` documents starting at `number`, counted from 0 over the stage's files.

    Raises:
      ValueError: there is no such document.
    """
    manifest = read_stage(directory)
    _check_documents(directory, manifest)
    total = sum(output["num_documents"] for output in manifest["outputs"])
    if not 0 <= number < total:
        raise ValueError(f"{directory} has the documents 0 to {total - 1:,}, not {number:,}")
    for index, record in _documents(directory, manifest, range(number, min(number + count, total))):
        yield _text(record, title=f"document {index:,}")


def by_id(directory: Path, *, document: str) -> Iterator[str]:
    """Yield the documents with that id; more than one if ids repeat.

    Raises:
      ValueError: there is none.
    """
    manifest = read_stage(directory)
    _check_documents(directory, manifest)
    total = sum(output["num_documents"] for output in manifest["outputs"])
    num_shown = 0
    for number, record in _documents(directory, manifest, range(total)):
        if record.id == document:
            num_shown += 1
            yield _text(record, title=f"document {number:,}")
    if not num_shown:
        raise ValueError(f"{directory} has no document of id {document!r}")


def clusters(directory: Path, *, documents: Path, count: int, characters: int) -> Iterator[str]:
    """Yield the largest clusters that dedup found in the stage `documents`, with the beginnings of some documents.

    Raises:
      ValueError: `directory` is not the output of dedup, or not of these documents.
    """
    manifest, source = read_stage(directory), read_stage(documents)
    if manifest["stage"] != "dedup":
        raise ValueError(f"{directory} holds the stage {manifest['stage']}; clusters are what dedup finds")
    if manifest["settings"]["input"] != source["fingerprint"]:
        pieces = directory.parent / "pieces"  # of btlm train --data, where documents were divided before dedup
        is_of_pieces = pieces.is_dir() and read_stage(pieces)["fingerprint"] == manifest["settings"]["input"]
        right = str(pieces) if is_of_pieces else "the folder of the stage that dedup read"
        raise ValueError(f"{directory} was not made of {documents}: give --documents={right}")
    counts = [output["num_documents"] for output in source["outputs"]]
    components = Clusters(sum(counts))
    for output in read_stage(directory / "work" / "pairs")["outputs"]:
        components.join(np.array(load_array(directory / "work" / "pairs", output["file"].removesuffix(".npy"))))
    roots = components.roots(np.arange(sum(counts)))
    work = directory / "work" / "clusters"
    is_kept = join_arrays(work, [f"kept-{shard:05d}" for shard in range(len(counts))])
    sizes = np.bincount(roots, minlength=len(roots))
    largest = np.argsort(-sizes, kind="stable")[:count]
    for root in largest[sizes[largest] > 1]:
        members = np.flatnonzero(roots == root)
        shown = sorted({*members[:_MAX_MEMBERS].tolist(), *members[is_kept[members]].tolist()})
        yield f"{_RULE}\ncluster of {len(members):,} documents"
        for number, record in _documents(documents, source, shown):
            yield _text(record, title="stays" if is_kept[number] else "goes", characters=characters)


def _check_documents(directory: Path, manifest: dict) -> None:
    if "written" not in manifest["totals"]:
        raise ValueError(f"{directory} holds the stage {manifest['stage']}, whose files are no documents")


def _documents(directory: Path, manifest: dict, numbers: range | list[int]) -> Iterator[tuple[int, Record]]:
    """Yield (number, document) for ascending numbers, opening only the files that contain them."""
    all_numbers, first = np.asarray(numbers), 0
    for output in manifest["outputs"]:
        end = first + output["num_documents"]
        own = all_numbers[np.searchsorted(all_numbers, first) : np.searchsorted(all_numbers, end)]
        if len(own):
            in_file = set(own.tolist())
            for number, record in enumerate(read_records(directory / output["file"]), start=first):
                if number in in_file:
                    yield number, record
                if number >= own[-1]:
                    break
        first = end


def _text(record: Record, *, title: str, characters: int = 1 << 62) -> str:
    remainder = f"\n... {len(record.text) - characters:,} more" if len(record.text) > characters else ""
    head = f"{title}: {record.id}, source {record.source}, {len(record.text):,} characters"
    return f"{_RULE}\n{head}\n{record.text[:characters]}{remainder}"
