"""Scaling laws: known laws are found again, published points are met, predictions are recorded and held."""

import dataclasses
import datetime
import json
import math
import os
import shutil

import numpy as np
import pytest
from support import fake_gcs
from support.measured_run import write_start
from support.tiny import tiny_config

from btlm_jax.cli import main
from btlm_jax.storage import bucket
from btlm_jax.storage.files import only_writer
from btlm_jax.tune import scaling
from btlm_jax.tune.scaling import CHINCHILLA, POWER, Point, fit, loss_of, predict

# Cerebras-GPT, arXiv 2304.03208, table 8: FLOPs and Pile test loss of its 7 models; equation 1.
FLOPS = (2.6e18, 1.3e19, 6.1e19, 2.8e20, 1.1e21, 6.3e21, 2.3e22)
PUBLISHED = tuple(zip(FLOPS, (2.608, 2.349, 2.181, 1.997, 1.834, 1.704, 1.572), strict=True))
EQUATION = {"scale": 5.984e22, "exponent": 0.0737, "floor": 0.5066}


def chinchilla(n: float, d: float) -> float:
    """The formula itself, with the coefficients of arXiv 2203.15556."""
    return 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28


def point(n: float, d: float, loss: float, flops: float = 0.0) -> Point:
    return Point(name=f"{n:g}", num_parameters=n, num_tokens=d, flops=flops or 6 * n * d, loss=loss)


def grid(noise: float = 0.0) -> list[Point]:
    rng = np.random.default_rng(3)
    sizes = [(n, ratio * n) for n in (4e6, 1.2e7, 4e7, 1.1e8) for ratio in (5, 20, 80)]
    return [point(n, d, chinchilla(n, d) * np.exp(noise * rng.standard_normal())) for n, d in sizes]


@pytest.fixture(autouse=True, scope="module")
def few_samples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "NUM_SAMPLES", 20)
        yield


def test_a_known_law_of_parameters_and_tokens_is_found_again():
    law = fit(grid(), form=CHINCHILLA)
    found = {name: value for name, (value, _, _) in law.named().items()}
    expected = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}
    assert found == pytest.approx(expected, rel=0.02)
    far = point(1e9, 8e9, 1.0)
    assert loss_of(law, far) == pytest.approx(chinchilla(1e9, 8e9), rel=1e-3)


@pytest.mark.slow
def test_intervals_hold_the_truth_and_grow_with_the_scatter():
    laws = [fit(grid(noise), form=CHINCHILLA) for noise in (0.002, 0.01)]
    found = [predict(law, num_parameters=4e8, num_tokens=8e9, flops=2e19) for law in laws]
    truth = chinchilla(4e8, 8e9)
    assert all(each.low < truth < each.high for each in found)
    narrow, wide = ((each.high - each.low) / truth for each in found)
    assert 0.004 < narrow < 0.6 * wide


def test_a_single_run_scatters_around_a_law_as_the_fitted_ones_do():
    """Samples without scatter of their own leave a run's: its residuals' deviation, widened for 3 coefficients."""
    points = [point(n, 20 * n, (120 * n * n / 1e30) ** -0.05) for n in np.geomspace(1e6, 1e8, 40)]
    law = fit(points, form=POWER)
    residuals = np.resize([0.01, -0.01], 40)
    law = dataclasses.replace(law, residuals=tuple(residuals.tolist()), samples=(law.coefficients,) * 20)
    found = predict(law, num_parameters=1e8, num_tokens=2e9, flops=1.2e18)
    half = 0.01 * math.sqrt(40 / 37)
    assert np.log([found.low / found.loss, found.high / found.loss]) == pytest.approx([-half, half], rel=1e-6)


def test_one_run_far_off_does_not_bend_the_law():
    points = grid()
    points[4] = dataclasses.replace(points[4], loss=1.2 * points[4].loss)
    far = point(4e8, 8e9, 1.0)
    assert loss_of(fit(points, form=CHINCHILLA), far) == pytest.approx(chinchilla(4e8, 8e9), rel=5e-3)


def test_the_published_law_is_within_a_hundredth_of_its_points():
    for flops, loss in PUBLISHED:
        assert scaling.power_law(flops, **EQUATION) == pytest.approx(loss, rel=0.01)


def test_a_fit_to_the_published_points_meets_them_and_foretells_the_largest():
    points = [point(1e9, 1e9, loss, flops) for flops, loss in PUBLISHED]
    law = fit(points, form=POWER)
    assert [loss_of(law, each) for each in points] == pytest.approx([each.loss for each in points], rel=0.012)
    value, low, high = law.named()["gamma"]
    assert low < value < high
    smaller = fit(points[:-1], form=POWER)
    assert loss_of(smaller, points[-1]) == pytest.approx(points[-1].loss, rel=0.025)


def test_what_cannot_be_fitted_or_foretold_is_refused():
    with pytest.raises(ValueError, match="needs 6 runs or more of different sizes; 5 given"):
        fit(grid()[:5], form=CHINCHILLA)
    with pytest.raises(ValueError, match="about the same tokens a parameter"):
        fit([point(n, 20 * n, chinchilla(n, 20 * n)) for n in np.geomspace(1e6, 1e8, 7)], form=CHINCHILLA)
    sizes = np.geomspace(1e6, 1e8, 7)
    for same, said in (
        ([(n, 1e9) for n in sizes], "about the same tokens,"),
        ([(1e7, 1e3 * d) for d in sizes], "about the same parameters,"),
        ([(n, n**1.5) for n in sizes], "tokens that follow from the parameters"),
        ([(n, n**1.5 * (1.4 if number % 2 else 1)) for number, n in enumerate(sizes)], "tokens that follow"),
    ):
        points = [point(n, d, chinchilla(n, d)) for n, d in same]
        assert scaling.choose_form(points) == (POWER, scaling.why_not(CHINCHILLA, points))
        with pytest.raises(ValueError, match=said):
            fit(points, form=CHINCHILLA)
    with pytest.raises(ValueError, match="needs 4 runs or more of different sizes; 6 of 3 different sizes given"):
        fit(2 * grid()[:3], form=POWER)
    points = [point(n, n**1.5 * (1.6 if number % 2 else 1), 3.0) for number, n in enumerate(sizes)]
    assert scaling.choose_form(points) == (CHINCHILLA, "")
    law = fit(grid()[:4], form=POWER)
    with pytest.raises(ValueError, match=r"1e\+12 parameters are more than 10 times away .* have 4e\+06 to 1.2e\+07"):
        predict(law, num_parameters=1e12, num_tokens=1e9, flops=1e16)
    with pytest.raises(ValueError, match="loss=-1.0 must be positive"):
        point(1e6, 1e6, -1.0)


def write_run(workdir, config, loss: float, *, ends: tuple[float, ...] = ()) -> None:
    """Write a finished run, of which a start made the last step at each of some times."""
    workdir.mkdir(parents=True)
    for number, end in enumerate(ends):
        write_start(workdir, number=number, written=end, step=config.curriculum.table.num_steps)
    (workdir / "config.json").write_text(config.to_json())
    summary = {"num_tokens": config.curriculum.table.num_tokens, "heldout": {"loss": loss, "heldout_tokens": 999}}
    (workdir / "summary.json").write_text(json.dumps(summary))


def test_runs_give_a_law_that_predicts_a_config_which_is_held_against_its_run(tmp_path, monkeypatch, capsys):
    workdirs = []
    for number, width in enumerate((40, 80, 160, 320)):
        config = tiny_config(model__d_model=width, model__d_ff=2 * width, evaluation__every_steps=number + 1)
        workdirs.append(tmp_path / f"run-{width}")
        write_run(workdirs[-1], config, 5.0 - 0.3 * number)
    law, record = tmp_path / "law.json", tmp_path / "law.json.predictions.jsonl"
    assert main(["tune", "scaling", f"--law={law}", "--runs", *map(str, workdirs)]) == 0
    assert "power: L = E + (C / C0)^-gamma, fitted to 4 runs" in capsys.readouterr().out

    large = tiny_config(model__d_model=640, model__d_ff=1280)
    file = tmp_path / "large.json"
    file.write_text(large.to_json())
    assert main(["tune", "scaling", f"--law={law}", f"--config={file}"]) == 0
    (line,) = scaling.recorded_predictions(record)
    assert line["predicted"]["law_sha256"] == scaling.read_law(law).sha256
    assert main(["tune", "scaling", f"--law={law}", "--config=local_cpu"]) == 1
    assert "the law is of losses with 300 ids, the config has 4,096" in capsys.readouterr().err

    check = ["tune", "scaling", f"--law={law}", f"--check={tmp_path / 'large'}"]
    made = datetime.datetime.fromisoformat(line["predicted"]["made"]).timestamp()
    for ends, said in (
        ((made + 5, made + 9), "before the run ended"),
        ((made - 5, made + 9), "after the run had ended"),  # and its command was given again
        ((), "no record of a start in its workdir says when"),
    ):
        shutil.rmtree(tmp_path / "large", ignore_errors=True)
        write_run(tmp_path / "large", large, line["predicted"]["loss"] / 1.02, ends=ends)
        os.utime(tmp_path / "large" / "summary.json")  # as a copy has it
        assert main(check) == 0
        assert ": +2.00%, " in (shown := capsys.readouterr().out) and said in shown
    monkeypatch.setenv(bucket.STAGING_VARIABLE, str(tmp_path / "staging"))
    url = f"gs://{fake_gcs.BUCKET}/large"
    with fake_gcs.connected({}, monkeypatch):
        bucket.upload_run(tmp_path / "large", url)
        assert main([*check[:-1], f"--check={url}"]) == 0
        assert ": +2.00%, " in capsys.readouterr().out
        assert main(["tune", "scaling", f"--law={tmp_path / 'l'}", "--runs", url, url]) == 1
        assert f"{url} is given twice" in capsys.readouterr().err
        assert scaling.read_run(bucket.open_for_reading(url)).point.name == url
    assert main(["tune", "scaling", f"--law={tmp_path / 'l'}", "--runs", ""]) == 2
    assert "--runs has an empty value" in capsys.readouterr().err
    before = record.read_text()
    with only_writer(record):
        assert main(check) == 1
    assert f"{record} is being made by another process" in capsys.readouterr().err and record.read_text() == before
    (tmp_path / "large" / "starts").mkdir()
    (tmp_path / "large" / "starts" / "9.json").write_text('{"step": 1}')
    assert main(check) == 1
    assert "starts/9.json, is not read: it lacks a part of a start's record" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "large" / "starts")
    assert main(["tune", "scaling", f"--law={law}", f"--check={workdirs[0]}"]) == 1
    assert "no prediction is recorded of" in capsys.readouterr().err
    record.write_text(record.read_text().replace('"low": ', '"low": 1', 1))
    assert main(["tune", "scaling", f"--law={law}", f"--check={tmp_path / 'large'}"]) == 1
    assert "line 1: the prediction is not as it was recorded" in capsys.readouterr().err

    twice = [*workdirs, tmp_path / "large" / ".." / workdirs[0].name]
    assert main(["tune", "scaling", f"--law={law}", "--runs", *map(str, twice)]) == 1
    assert f"/{workdirs[0].name} is given twice" in capsys.readouterr().err
    values = json.loads(law.read_text())
    for wrong, said in (
        ({"vocab_size": "300"}, "vocab_size"),
        ({"coefficients": [1e9] * 3}, "beyond the bounds of a fit"),
    ):
        law.write_text(json.dumps(values | wrong))
        assert main(["tune", "scaling", f"--law={law}", "--config=local_cpu"]) == 1
        assert said in capsys.readouterr().err
    other = json.loads((workdirs[1] / "summary.json").read_text())
    other["heldout"]["heldout_tokens"] = 7
    (workdirs[1] / "summary.json").write_text(json.dumps(other))
    assert main(["tune", "scaling", f"--law={law}", "--runs", *map(str, workdirs)]) == 1
    assert "was evaluated on 7 tokens of 300 ids" in capsys.readouterr().err


def test_a_new_config_says_the_loss_that_a_law_predicts(tmp_path, capsys):
    points = [point(n, 20 * n, 8 * (120 * n * n) ** -0.03) for n in (4e6, 8e6, 1.6e7, 3.2e7, 6.4e7)]
    (tmp_path / "points.json").write_text(json.dumps({"points": [dataclasses.asdict(each) for each in points]}))
    law = f"--law={tmp_path / 'law.json'}"
    assert main(["tune", "scaling", law, f"--points={tmp_path / 'points.json'}", f"--plot={tmp_path / 'law.png'}"]) == 0
    assert "has no vocab_size: that a config's losses are of the same tokens is not checked" in capsys.readouterr().out
    assert (tmp_path / "law.png").read_bytes().startswith(b"\x89PNG")
    assert main(["new", "--params=124M", law, f"--output={tmp_path / 'my.py'}"]) == 0
    out = capsys.readouterr().out
    said = float(out.partition("\n  loss   ")[2].partition(" nats a token predicted")[0])
    assert said == pytest.approx(8 * (120 * 124e6**2) ** -0.03, rel=0.02)
    assert "Loss:       2." in (tmp_path / "my.py").read_text()
    assert main(["new", "--params=13B", law, f"--output={tmp_path / 'large.py'}"]) == 0
    assert "none is predicted: 1.3e+10 parameters are more than 10 times away" in capsys.readouterr().out
