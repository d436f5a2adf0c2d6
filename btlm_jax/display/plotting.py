"""Make Matplotlib figures without pyplot, which has global state, and write them. Imports Matplotlib on first use."""

from __future__ import annotations

import io
from pathlib import Path

from btlm_jax.storage.files import write_atomically


def new_figure(*, size: tuple[float, float], dpi: int):
    """Return a figure (size in inches) with an Agg canvas of its own, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    return figure, axes


def write_figure(figure, path: Path) -> None:
    """Write the figure as PNG, without the software's version, so that the same data gives the same bytes."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_atomically(path, picture.getvalue())
