"""Charts of a stage or a token store: lengths of documents, sizes of clusters, shares of the sources."""

from __future__ import annotations

from pathlib import Path

from btlm_jax.corpus.engine.inputs import read_stage
from btlm_jax.corpus.engine.stage import PLAN_FILE
from btlm_jax.data import store
from btlm_jax.display.plotting import new_figure, write_figure
from btlm_jax.storage.location import PathOrUrl

SIZE, DPI = (8.0, 4.5), 100


def plot(directory: PathOrUrl, *, target: Path) -> list[Path]:
    """Write charts of a finished stage, or of a token store (or its URL), as PNG and return their paths.

    Raises:
      FileNotFoundError: `directory` is neither.
      ValueError: the stage's files are no documents.
    """
    target.mkdir(parents=True, exist_ok=True)
    if not isinstance(directory, Path) or not (directory / PLAN_FILE).is_file():
        return [
            _bars(
                target / f"tokens-{name}.png",
                {source: part.num_tokens for source, part in split.sources.items()},
                label=f"tokens of {name}",
            )
            for name, split in store.read_manifest(directory).splits.items()
        ]
    manifest = read_stage(directory)
    totals = manifest["totals"]
    if "written" not in totals:
        raise ValueError(f"{directory} holds the stage {manifest['stage']}, which has no documents to draw")
    written = {source: count["bytes"] for source, count in sorted(totals["written"].items())}
    paths = [
        _bars(target / "bytes.png", written, label="bytes of text that stay"),
        _histogram(target / "lengths.png", totals["lengths"], label="characters of a document, up to"),
    ]
    clusters = directory / "work" / "clusters"
    if clusters.is_dir():
        sizes = read_stage(clusters)["totals"]["sizes"]
        paths.append(_histogram(target / "clusters.png", sizes, label="documents of a cluster, up to"))
    return paths


def _bars(path: Path, values: dict[str, int], *, label: str) -> Path:
    figure, axes = new_figure(size=SIZE, dpi=DPI)
    total = max(sum(values.values()), 1)
    bars = axes.barh(list(values), list(values.values()))
    axes.bar_label(bars, [f"{value:,} ({100 * value / total:.1f} %)" for value in values.values()], padding=4)
    axes.set_xlabel(label)
    axes.margins(x=0.3)
    axes.invert_yaxis()
    return _write(figure, path)


def _histogram(path: Path, counts: dict[str, int], *, label: str) -> Path:
    """Draw counts by upper limits, powers of two, on a log scale."""
    figure, axes = new_figure(size=SIZE, dpi=DPI)
    sizes = sorted(map(int, counts))
    bars = axes.bar([f"{size:,}" for size in sizes], [counts[str(size)] for size in sizes])
    axes.bar_label(bars, [f"{counts[str(size)]:,}" for size in sizes], fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("count")
    axes.tick_params(axis="x", rotation=45)
    return _write(figure, path)


def _write(figure, path: Path) -> Path:
    write_figure(figure, path)
    return path
