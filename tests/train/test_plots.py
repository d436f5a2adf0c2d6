"""The plots: valid, repeatable, without global state, and with what matters inside their axes."""

import subprocess
import sys

import numpy as np
import pytest

from btlm_jax.recipe.curriculum import make_curriculum
from btlm_jax.train import plots
from btlm_jax.train.heldout import HeldoutResult, SourceLoss

CURRICULUM = make_curriculum(seq_len=(8, 32), batch_size=(12, 3), num_tokens=(96 * 30, 96 * 10))
SWITCH = 96 * 30
SOURCES = {"code": -0.4, "prose": 0.2}


def run_metrics() -> list[dict]:
    """Return what 40 steps write: a transient that starts at 27 nats, three evaluations, and an event."""
    rows = [{"kind": "event", "step": 0, "message": "started"}]
    for step in range(1, 41):
        loss = 3.0 + 24.0 * 0.2 ** (step - 1)
        rows.append({"kind": "train", "step": step, "tokens": 96 * step, "loss": loss, "learning_rate": 0.01 / step})
        if step in (10, 25, 40):
            sources = {name: {"loss": loss + offset} for name, offset in SOURCES.items()}
            rows.append({"kind": "eval", "step": step, "tokens": 96 * step, "loss": loss, "sources": sources})
    return rows


def heldout(num_positions: int) -> HeldoutResult:
    mean_T = 3.0 + 2.0 / np.arange(1, num_positions + 1)
    total = SourceLoss(nats=float(mean_T.sum()), num_tokens=num_positions, num_bytes=99.0)
    return HeldoutResult(sources={"code": total}, loss_T=mean_T * 4, weight_T=np.full(num_positions, 4.0))


DRAW = {
    "loss": lambda path: plots.plot_loss(run_metrics(), CURRICULUM, path),
    "loss, nothing written yet": lambda path: plots.plot_loss([], CURRICULUM, path),
    "loss, one step": lambda path: plots.plot_loss(run_metrics()[:2], CURRICULUM, path),
    "position": lambda path: plots.plot_position(heldout(32), path, seq_lens=(8, 32), document_mask=False),
    "position, masked": lambda path: plots.plot_position(heldout(32), path, seq_lens=(8, 32), document_mask=True),
    "position, one": lambda path: plots.plot_position(heldout(1), path, seq_lens=(1,), document_mask=False),
}


@pytest.mark.parametrize("name", DRAW)
def test_a_plot_is_a_png_and_the_same_every_time(name, tmp_path):
    for file in ("first.png", "second.png"):
        DRAW[name](tmp_path / file)
    first = (tmp_path / "first.png").read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n" and first[-8:-4] == b"IEND"
    assert first == (tmp_path / "second.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.png", "second.png"]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Return a function that draws a plot of DRAW and returns its matplotlib figure."""
    figures = []
    write = plots._write
    monkeypatch.setattr(plots, "_write", lambda figure, path: (figures.append(figure), write(figure, path)))

    def draw(name: str):
        DRAW[name](tmp_path / "plot.png")
        return figures[-1]

    return draw


def test_the_loss_plot_shows_the_run(drawn):
    axes, rate_axes = drawn("loss").axes
    lines = {line.get_label(): line for line in axes.lines}
    train = [row for row in run_metrics() if row["kind"] == "train"]
    np.testing.assert_array_equal(lines["train"].get_xdata(), [row["tokens"] for row in train])
    np.testing.assert_array_equal(lines["train"].get_ydata(), [row["loss"] for row in train])
    np.testing.assert_array_equal(rate_axes.lines[0].get_ydata(), [row["learning_rate"] for row in train])
    np.testing.assert_array_equal(lines["held-out, all"].get_xdata(), [960, 2400, 3840])
    for name, offset in SOURCES.items():
        np.testing.assert_allclose(lines[f"held-out {name}"].get_ydata(), lines["held-out, all"].get_ydata() + offset)
    assert [text.get_text() for text in axes.texts] == ["length 8 \u2192 32"]
    assert SWITCH in [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]


def test_the_transient_does_not_squash_the_curve(drawn):
    axes = drawn("loss").axes[0]
    bottom, top = axes.get_ylim()
    assert top < 5 and f"losses above {top:.1f} are off the top, up to 27.0" in axes.get_xlabel()
    for line in axes.lines:
        if line.get_label().startswith("held-out"):
            assert bottom < min(line.get_ydata()) and max(line.get_ydata()) < top


@pytest.mark.parametrize("bad", [np.inf, np.nan, 1e30])
def test_a_bad_loss_changes_the_smoothed_curve_only_around_it(monkeypatch, tmp_path, bad):
    figures, losses = [], 3.0 + np.random.default_rng(0).normal(size=600)
    monkeypatch.setattr(plots, "_write", lambda figure, path: figures.append(figure))
    losses[300] = bad
    rows = [
        {"kind": "train", "tokens": 2 * step, "loss": float(loss), "learning_rate": 0.1}
        for step, loss in enumerate(losses)
    ]
    plots.plot_loss(rows, CURRICULUM, tmp_path / "loss.png")
    lines = {line.get_label(): line for line in figures[0].axes[0].lines}
    smoothed = lines["train, smoothed"].get_ydata()
    assert np.isfinite(smoothed).all() and len(smoothed) == 599 + (bad == 1e30)
    half = len(smoothed) // 100
    np.testing.assert_allclose(smoothed[-200], np.mean(losses[-200 - half : -199 + half]))


def test_the_position_plot_marks_the_training_lengths(drawn):
    axes = drawn("position").axes[0]
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.texts] == ["trained at 8", "trained at 32"]
    steps = next(patch for patch in axes.patches if hasattr(patch, "get_data")).get_data()
    np.testing.assert_allclose(steps.edges, [0.5, 1.5, 2.5, 4.5, 8.5, 16.5, 32.5])
    np.testing.assert_allclose(steps.values[:3], [5.0, 4.0, 3.0 + (2 / 3 + 2 / 4) / 2])
    assert "does not rise" in axes.get_title()


@pytest.mark.parametrize("num_values", [0, 1, 49, 260])
def test_smooth_by_enumeration(num_values):
    values = np.random.default_rng(0).normal(size=num_values)
    half = num_values // 100
    expected = []
    for index in range(num_values):
        if index + half < num_values:
            reach = min(half, index)
            window = values[index - reach : index + reach + 1]
        else:  # the window stops at the last value, and its start no later than a whole window before
            window = values[min(index - half, num_values - 1 - 2 * half) :]
        expected.append(np.mean(window))
    np.testing.assert_allclose(plots.smooth(values), expected)


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never(tmp_path):
    program = (
        "import sys, numpy, pathlib, btlm_jax.train.plots as plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from btlm_jax.recipe.curriculum import make_curriculum\n"
        "table = make_curriculum(seq_len=(8,), batch_size=(2,), num_tokens=(32,))\n"
        "plots.plot_loss([], table, pathlib.Path(sys.argv[1]))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "plot.png")], check=True, timeout=300)


@pytest.mark.parametrize(("name", "where"), [("position", "in the sequence"), ("position, masked", "in its document")])
def test_the_position_plot_says_from_where_positions_count(drawn, name, where):
    assert f"position {where}" in drawn(name).axes[0].get_xlabel()
