"""Make Matplotlib figures without pyplot, which has global state, and write them. Imports Matplotlib on first use."""

from __future__ import annotations

import io
from pathlib import Path

from btlm_jax.storage.files import write_atomically


def new_figure(*, size: tuple[float, float], dpi: int):
    """Return a figure (size in inches) with an Agg canvas of its own, and its axes."""
    figure, (axes,) = new_panels(size=size, dpi=dpi, columns=1)
    return figure, axes


def new_panels(*, size: tuple[float, float], dpi: int, columns: int):
    """Return such a figure with so many axes side by side, and a list of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(1, columns, number + 1) for number in range(columns)]
    for axes in panels:
        axes.grid(alpha=0.25)
    return figure, panels


def write_figure(figure, path: Path) -> None:
    """Write the figure as PNG, without the software's version, so that the same data gives the same bytes."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_atomically(path, picture.getvalue())
