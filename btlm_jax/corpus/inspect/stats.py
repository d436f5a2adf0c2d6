"""Tables of what a stage or a token store contains. Reads only manifests, so it takes no time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from btlm_jax.corpus.engine.inputs import read_stage
from btlm_jax.corpus.engine.stage import PLAN_FILE
from btlm_jax.data import store
from btlm_jax.storage.location import PathOrUrl

_BAR_WIDTH = 40  # characters of the longest bar


def describe(directory: PathOrUrl) -> str:
    """Return the tables of a finished stage, or of a token store (or its URL).

    Raises:
      FileNotFoundError: `directory` is neither.
      ValueError: its manifest is damaged.
    """
    if isinstance(directory, Path) and (directory / PLAN_FILE).is_file():
        return _describe_stage(directory)
    return _describe_store(store.read_manifest(directory))


def _describe_stage(directory: Path) -> str:
    manifest = read_stage(directory)
    totals = manifest["totals"]
    parts = [f"stage {manifest['stage']}, {len(manifest['outputs'])} files"]
    if "written" not in totals:  # its files are no documents
        files = [("file", "bytes"), *((output["file"], f"{output['num_bytes']:,}") for output in manifest["outputs"])]
        counts = [("counted", "number"), *((name, f"{count:,}") for name, count in sorted(_flat(totals)))]
        return "\n\n".join([*parts, _table(files), *([_table(counts)] if len(counts) > 1 else [])])
    parts.append(_sources(totals["read"], totals["written"]))
    for name, written in totals.get("splits", {}).items():
        parts.append(f"split {name}\n" + _sources(written, written))
    parts.append("documents by length in characters, up to\n" + _bars(totals["lengths"]))
    clusters = directory / "work" / "clusters"
    if clusters.is_dir():
        parts.append("clusters by number of documents, up to\n" + _bars(read_stage(clusters)["totals"]["sizes"]))
    reasons = {"changed": totals["changed"], **totals["dropped"], **totals["bad"]}
    parts.append("\n".join(f"{reason}: {count:,} documents" for reason, count in reasons.items()))
    if changes := totals.get("changed values"):
        parts.append("\n".join(f"{change}: {count:,}" for change, count in sorted(changes.items())))
    return "\n\n".join(parts)


def _flat(counts: dict, *, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield the names and the numbers of nested counts."""
    for name, value in counts.items():
        if isinstance(value, dict):
            yield from _flat(value, prefix=f"{prefix}{name}: ")
        else:
            yield f"{prefix}{name}", value


def _sources(read: dict, written: dict) -> str:
    rows = [("source", "documents in", "MB in", "documents out", "MB out", "share", "kept")]
    total = max(sum(count["bytes"] for count in written.values()), 1)
    for source in sorted(read):
        before, after = read[source], written.get(source, {"documents": 0, "bytes": 0})
        rows.append(
            (
                source,
                f"{before['documents']:,}",
                f"{before['bytes'] / 1e6:,.2f}",
                f"{after['documents']:,}",
                f"{after['bytes'] / 1e6:,.2f}",
                f"{100 * after['bytes'] / total:.1f} %",
                f"{100 * after['bytes'] / max(before['bytes'], 1):.1f} %",
            )
        )
    return _table(rows)


def _describe_store(manifest: store.Manifest) -> str:
    parts = [
        f"token store, blocks of {manifest.block_len:,} tokens, {manifest.dtype}, {manifest.tokenizer.kind} of "
        f"{manifest.tokenizer.vocab_size:,} ids, format {manifest.format_version}"
        + (", a stream of training blocks for each source" if store.SOURCES in manifest.features else "")
    ]
    if store.EXAMPLES in manifest.features:
        whole = f"whole in windows of {manifest.window:,} tokens"
        parts[0] += f"; documents are examples, {whole}; MB and tokens are those that are trained"
    for name, split in manifest.splits.items():
        rows = [("source", "documents", "MB", "tokens", "share", "bytes/token")]
        for source, part in split.sources.items():
            rows.append(
                (
                    source,
                    f"{part.num_documents:,}",
                    f"{part.num_bytes / 1e6:,.2f}",
                    f"{part.num_tokens:,}",
                    f"{100 * part.num_tokens / split.num_tokens:.1f} %",
                    f"{part.num_bytes / part.num_tokens:.2f}",
                )
            )
        parts.append(f"split {name}, {split.num_blocks:,} blocks, {split.num_tokens:,} tokens\n" + _table(rows))
    return "\n\n".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _bars(counts: dict[str, int]) -> str:
    largest = max(counts.values(), default=1)
    rows = sorted(counts.items(), key=lambda item: int(item[0]))
    return "\n".join(f"{int(size):>13,} {count:>13,} {'#' * -(-_BAR_WIDTH * count // largest)}" for size, count in rows)
