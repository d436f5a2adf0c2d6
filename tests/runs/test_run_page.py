"""btlm report: one page without anything from outside, whose curves are the numbers that the run recorded."""

import hashlib
import json
import math
import re
import types
from html.parser import HTMLParser

import numpy as np
import pytest
from support.fake_run import FakeRun, fake_config, record_steps, result

from btlm_jax.cli import main
from btlm_jax.cli import report as report_module
from btlm_jax.cli.parse import packaged_folder
from btlm_jax.cli.report import report_flags
from btlm_jax.display.html_chart import MAX_POINTS, Axis, Series, binned, line_chart
from btlm_jax.runs.metrics import read_metrics_of
from btlm_jax.runs.report import read_run
from btlm_jax.train import CONFIG_FILE, METRICS_FILE
from btlm_jax.train.metric_writer import StartRecord


class Page(HTMLParser):
    """The tags of a page, checked to be closed in order, and its text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def write_run(workdir, *, config=None, last_step=9, loss=lambda step: 10 / step):
    workdir.mkdir()
    (workdir / CONFIG_FILE).write_text((config or fake_config()).to_json())
    run = FakeRun(workdir)
    record = StartRecord(workdir, run.ledger)
    with run.writer:
        for step in range(1, last_step + 1):
            run.step(step, loss=loss(step))
            if step % 3 == 0:
                run.writer.evaluation(step, result(1 / step))
        run.writer.event(2, "<script>alert(1)</script>")
        run.writer.sample(last_step, prompt="a<b", continuation="c&d \x07")
        run.writer.record_event(3, "half \ud800 of a pair")
    record.end(1, "<img src=y>")
    return workdir


NO_TOKENS = "losses are per token of different tokenizers"


def keep_tokenizer_of(workdir, contents):
    (workdir / "tokenizer").mkdir(exist_ok=True)
    facts = {
        "kind": "byte_level_bpe",
        "file": "t",
        "sha256": hashlib.sha256(contents).hexdigest(),
        "vocab_size": 9,
        "eos_id": 0,
    }
    (workdir / "tokenizer" / "tokenizer_info.json").write_text(json.dumps(facts))


def report(capsys, *arguments):
    assert main(["report", *map(str, arguments)]) == 0, capsys.readouterr().err
    with open(capsys.readouterr().out.splitlines()[-1], encoding="utf-8") as file:
        return file.read()


def points_of(source, label, number=0):
    """Return the points of a line as its chart shows them: the inverse of what the page's own script reads."""
    plots = [part for part in source.split('<div class="plot"')[1:] if f'data-label="{label}"' in part]
    low_x, high_x, _ = map(float, re.search(r'data-x="([^"]+)"', plots[number])[1].split(","))
    low_y, high_y, is_log = map(float, re.search(r'data-y="([^"]+)"', plots[number])[1].split(","))
    d = re.search(rf'd="([^"]+)" data-label="{label}"', plots[number])[1]
    found = np.array([list(map(float, pair.split(","))) for pair in re.findall(r"-?[0-9.]+,-?[0-9.]+", d)])
    y = low_y + (1 - found[:, 1] / 400) * (high_y - low_y)
    return low_x + found[:, 0] / 1000 * (high_x - low_x), 10**y if is_log else y


def test_the_page_needs_nothing_else_and_shows_what_was_recorded(tmp_path, capsys):
    workdir = write_run(tmp_path / 'r"><img src=x>', config=fake_config(log__sample_prompt="'\"><img src=z>"))
    source = report(capsys, workdir)
    page = Page(source)
    assert all(f"<img src={name}>" in page.text for name in "xyz")
    names = {tag for tag, _ in page.tags}
    assert not names & {"link", "img", "iframe", "object", "base"} and "url(" not in source and "http" not in source
    assert all(attributes["href"].startswith("#s") for tag, attributes in page.tags if tag == "a")
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]  # the page's own, not the event
    assert "<script>alert(1)</script>" in page.text and "a<b" in page.text
    assert "\x07" not in source and "half \ufffd of a pair" in page.text
    for said in ("stopped", "perplexity", "update norm by class", "goodput", "code", "prose"):
        assert said in page.text, said
    tokens, rates = points_of(source, "learning rate")
    np.testing.assert_allclose(tokens, 192 * np.arange(1, 10), atol=2)
    np.testing.assert_allclose(rates, 0.01 / np.arange(1, 10), atol=2e-5)
    tokens, bits = points_of(source, "code")
    np.testing.assert_allclose(tokens, [576, 1152, 1728], atol=2)
    np.testing.assert_allclose(bits, [1.5] * 3, atol=1e-2)
    _, losses = points_of(source, "training, each step")
    shown = losses < 9.5  # the first ones are above the top
    np.testing.assert_allclose(losses[shown], (10 / np.arange(1, 10))[shown], atol=0.02)


def test_wall_time_is_that_of_the_starts(tmp_path, capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("btlm_jax.train.metric_writer.time.time", lambda: now[0])
    workdir = write_run(tmp_path / "run", last_step=4)
    now[0] = 1100.0
    run = FakeRun(workdir, first_step=5)
    record = StartRecord(workdir, run.ledger)
    run.spend("compile", 30)
    with run.writer:
        record_steps(run, 5, 9)
    record.end(0, "")
    source = report(capsys, workdir)
    # The first start begins at 0, when its clock stands at 100, and steps take 2 s; the second 100 s later.
    minutes, _ = points_of(source, "training, each step", 1)
    np.testing.assert_allclose(60 * minutes, [2, 4, 6, 8, 132, 134, 136, 138, 140], atol=0.3)
    text = Page(source).text
    assert "2 starts" in text and "between starts" in text and "1 – 4" in text and "5 – 9" in text


def test_two_runs_are_drawn_together_and_their_configs_compared(tmp_path, capsys):
    first = write_run(tmp_path / "first")
    other = fake_config(model__vocab_size=400, optimizer__peak_learning_rate=0.5)
    second = write_run(tmp_path / "second", config=other, loss=lambda step: 3.0, last_step=7)
    compared = (first, f"--compare={second}", f"--output={tmp_path / 'both.html'}")
    source = report(capsys, *compared)
    page = Page(source)
    assert "2 keys differ; the first is model.vocab_size" in page.text
    tiles = re.findall(r'class="tile"><b>(.*?)</b><span class="other">(.*?)</span><span>(.*?)<', source)
    shown = {name: (first, second) for first, second, name in tiles}
    assert shown["steps"] == ("9 (1,728 tokens)", "7 / 9 (1,344 tokens)")
    assert [value.partition(" ")[2] for value in shown["held-out loss, nats/token"]] == ["(step 9)", "(step 6)"]
    said = [NO_TOKENS in page.text]
    for workdir, text in ((first, b"a"), (second, b"b"), (second, b"a")):  # the second's is unknown, another, the same
        keep_tokenizer_of(workdir, text)
        said.append(NO_TOKENS in Page(report(capsys, *compared)).text)
    assert said == [False, False, True, False]
    np.testing.assert_allclose(points_of(source, "second: training, each step")[1], [3.0] * 7, atol=0.02)
    assert not (first / "report.html").exists()
    assert "the configs are equal" in Page(report(capsys, first, f"--compare={first}")).text


def test_the_config_to_compare_with_is_the_installed_one_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local_cpu.py").write_text("raise RuntimeError('a file of the user')")
    for given, found in (
        ("--config=local_cpu", "local_cpu"),
        ("--config=111M", "111M"),
        ("--config=family/111M", "family/111M"),
        ("--config=pods/family:111M@v5e-8", "pods/family:111M@v5e-8"),
        (f"--config={packaged_folder('configs') / 'local_cpu.py'}", str(packaged_folder("configs") / "local_cpu.py")),
        ("--config=local_cpu.py", ""),
        ("--config=elsewhere/btlm_3b_8k.py", ""),
        ("--config=gs://bucket/config.json", ""),
    ):
        starts = [types.SimpleNamespace(command=["btlm", "train", given])]
        run = types.SimpleNamespace(workdir=types.SimpleNamespace(starts=starts))
        name, values = report_module._base(report_flags(), run)
        assert name == (found or "btlm_3b_8k") and "optimizer" in values


def test_runs_in_every_state_have_a_page(tmp_path, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / METRICS_FILE).write_bytes(b"")
    assert "nothing to draw yet" in Page(report(capsys, workdir)).text
    (workdir / METRICS_FILE).write_bytes(b'\xff\n{"kind": "train", "step": 1}\n{"kind": "tra')
    assert "2 lines of " in Page(report(capsys, workdir)).text
    values = {"kind": "train", "step": 1, "tokens": 5, "loss": "nan", "learning_rate": 0.1, "grad_norm": "inf"}
    (workdir / METRICS_FILE).write_text(json.dumps(values) + "\n")
    (workdir / CONFIG_FILE).write_text("[]")
    assert "must be a JSON object" in Page(report(capsys, workdir)).text
    for number in range(2, 200):
        with open(workdir / METRICS_FILE, "a") as file:
            file.write(
                json.dumps(values | {"step": number, "tokens": 5 * number, "loss": 4.0 if number % 7 else "inf"}) + "\n"
            )
    Page(report(capsys, workdir))


def test_wrong_folders_and_flags_are_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 1
    assert "is no workdir" in capsys.readouterr().err
    workdir = write_run(tmp_path / "run")
    assert main(["report", str(workdir), f"--compare={tmp_path / 'empty'}"]) == 1
    assert main(["report"]) == 2 and main(["report", str(workdir), "--base=none_such"]) == 2
    assert main(["report", str(workdir), f"--output={tmp_path / 'empty'}"]) == 2
    assert main(["report", str(workdir), f"--output={tmp_path / 'none' / 'page.html'}"]) == 2
    assert "none/page.html cannot be written; give --output=FILE" in capsys.readouterr().err


def test_a_longer_run_is_read_in_part(tmp_path):
    workdir = write_run(tmp_path / "run", last_step=9)
    metrics = read_metrics_of(workdir / METRICS_FILE, max_rows=4)
    assert metrics.num_train == 9 and metrics.train["step"].tolist() == [3, 6, 9]
    assert [row["step"] for row in metrics.kind("eval")] == [3, 6, 9]
    metrics = read_metrics_of(workdir / METRICS_FILE, max_rows=3)
    assert metrics.train["step"].tolist() == [3, 6, 9]
    metrics = read_metrics_of(workdir / METRICS_FILE, max_rows=8)
    assert metrics.train["step"].tolist() == [2, 4, 6, 8, 9]  # the last one too


def test_bins_keep_the_mean_the_least_and_the_greatest():
    x = np.arange(7 * MAX_POINTS, dtype=float)
    y = np.random.default_rng(1).normal(size=len(x))
    middle, low, mean, high = binned(x, y, num_bins=MAX_POINTS)
    rows = y.reshape(MAX_POINTS, 7)
    np.testing.assert_allclose(mean, rows.mean(1))
    np.testing.assert_allclose((low, high), (rows.min(1), rows.max(1)))
    np.testing.assert_allclose(middle, x.reshape(MAX_POINTS, 7).mean(1))


@pytest.mark.parametrize("y", [[1.0], [2.0, 2.0], [0.0, 0.0], [1e-300, 1e300], [-5.0, 7.0], [math.nan, 1.0]])
@pytest.mark.parametrize("is_log", [False, True])
def test_a_chart_of_few_or_extreme_points_is_drawn(y, is_log):
    series = Series(label="<i>&", x=np.arange(len(y), dtype=float), y=np.array(y), has_points=True, has_band=True)
    chart = line_chart([series], x=Axis(title="x", text=str), y=Axis(title="y", text=str, is_log=is_log))
    is_drawn = not is_log or np.nanmax(y) > 0
    assert ("<i>&" in Page(chart).text) == is_drawn
    assert "nan" not in chart and "inf" not in chart


def test_the_page_and_the_status_have_the_same_times(tmp_path, capsys):
    run = read_run(str(write_run(tmp_path / "run")))
    assert run.name == "run" and run.status.goodput == 1.0 and run.status.wall_time == run.times.seconds == {"step": 18}
    said = Page(report(capsys, tmp_path / "run")).text
    assert "wall time, 1 start" in said and "1 starts" not in said
