"""What users see of progress: lines at most so often, and on a terminal one line that replaces itself."""

import io
import sys
import time
from types import SimpleNamespace

import pytest

from btlm_jax.display import progress
from btlm_jax.display.progress import RateLimit, StatusLine, StepBar, item_bar, report_while_running


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock whose `now` the test sets."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_rate_limit_counts_from_its_last_restart(clock):
    limit, at_start = RateLimit(5.0, is_due_at_start=False), RateLimit(5.0, is_due_at_start=True)
    assert not limit.is_due() and at_start.is_due()
    clock.now += 4.9
    assert not limit.is_due()
    clock.now += 0.2
    assert limit.is_due() and limit.is_due()
    limit.restart()
    assert not limit.is_due()
    clock.now += 5.0
    assert limit.is_due()


def test_steps_are_lines_where_there_is_no_terminal(clock, capsys):
    bar = StepBar(total=2_000, first_step=1, line_seconds=2.0)
    for step, is_notable, is_due in ((1, True, False), (2, False, True), (3, True, False), (1_004, False, True)):
        bar.update(step, bar_text="unseen", line_text=f"loss {step}", is_notable=is_notable, is_due=is_due)
        clock.now += 1.1
    bar.close()
    assert capsys.readouterr().out.splitlines() == ["step 1/2,000 | loss 1", "step 3/2,000 | loss 3"]


def test_a_status_line_replaces_itself_on_a_terminal_and_leaves_nothing():
    terminal = Terminal()
    line = StatusLine(terminal)
    line.show("first and long")
    line.show("second")
    line.clear()
    shown = terminal.getvalue()
    assert "first and long" in shown and "second" in shown and "\n" not in shown
    assert shown.split("\r")[-2].strip() == "" and shown.endswith("\r")
    line.show("third")
    line.clear()
    assert "third" in terminal.getvalue()


def test_a_status_line_is_lines_elsewhere():
    stream = io.StringIO()
    line = StatusLine(stream)
    line.show("first")
    line.show("second")
    line.clear()
    assert stream.getvalue() == "first\nsecond\n"


def test_an_item_bar_names_the_item_on_a_terminal_only(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with item_bar(3, unit="tensor") as report:
        report("ln_f.weight")
        report("wte.weight")
        time.sleep(0.15)  # tqdm draws ten times a second
        report("last.weight")
    assert "last.weight" in sys.stderr.getvalue() and "3/3" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with item_bar(3, unit="tensor") as report:
        report("ln_f.weight")
    assert sys.stderr.getvalue() == ""


def test_what_takes_long_is_reported_while_it_runs():
    lines = []
    with report_while_running("compiling", seconds=0.01, say=lines.append):
        time.sleep(0.1)
    assert len(lines) >= 3 and lines[0] == "compiling: 0 s" and lines[-1] == "compiling: done in 0 s"
    lines.clear()
    with pytest.raises(KeyError), report_while_running("compiling", seconds=60.0, say=lines.append):
        raise KeyError
    assert lines == []
