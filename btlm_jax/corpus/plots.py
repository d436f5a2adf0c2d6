"""What a stage or a token store holds, as pictures: lengths of documents, sizes of clusters, shares of the sources."""

from __future__ import annotations

import io
from pathlib import Path

from btlm_jax import store
from btlm_jax.corpus.inputs import read_stage
from btlm_jax.corpus.stage import PLAN_FILE
from btlm_jax.files import write_atomically

SIZE, DPI = (8.0, 4.5), 100


def plot(directory: Path, *, target: Path) -> list[Path]:
    """Write the pictures of a finished stage or of a token store as PNG and return their paths.

    Raises:
      FileNotFoundError: there is neither.
    """
    target.mkdir(parents=True, exist_ok=True)
    if not (directory / PLAN_FILE).is_file():
        return [
            _bars(
                target / f"tokens-{name}.png",
                {source: part.num_tokens for source, part in split.sources.items()},
                label=f"tokens of {name}",
            )
            for name, split in store.read_manifest(directory).splits.items()
        ]
    totals = read_stage(directory)["totals"]
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
    figure, axes = _new_figure()
    total = max(sum(values.values()), 1)
    bars = axes.barh(list(values), list(values.values()))
    axes.bar_label(bars, [f"{value:,} ({100 * value / total:.1f} %)" for value in values.values()], padding=4)
    axes.set_xlabel(label)
    axes.margins(x=0.3)
    axes.invert_yaxis()
    return _write(figure, path)


def _histogram(path: Path, counts: dict[str, int], *, label: str) -> Path:
    """Draw counts of what is at most a power of two; the counts may differ by orders of magnitude."""
    figure, axes = _new_figure()
    sizes = sorted(map(int, counts))
    bars = axes.bar([f"{size:,}" for size in sizes], [counts[str(size)] for size in sizes])
    axes.bar_label(bars, [f"{counts[str(size)]:,}" for size in sizes], fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("count")
    axes.tick_params(axis="x", rotation=45)
    return _write(figure, path)


def _new_figure():
    """Return a figure with its own Agg canvas and its axes: no pyplot, so no state shared with the caller."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    return figure, axes


def _write(figure, path: Path) -> Path:
    """Write the figure as PNG; the same data gives the same bytes: no software version inside."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_atomically(path, picture.getvalue())
    return path
