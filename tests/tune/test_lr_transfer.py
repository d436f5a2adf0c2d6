"""Learning-rate transfer: optima are where the losses were made to have them, trials are the config's runs."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from support.real_store import write_config
from support.tiny import tiny_config

from btlm_jax.cli import main
from btlm_jax.cli.tune import _rates, _without_workers, lr_transfer_flags
from btlm_jax.tune import lr_transfer
from btlm_jax.tune.lr_transfer import Curve, Sweep, optimum_of
from btlm_jax.tune.trials import Result


def sweep(**changes) -> Sweep:
    values = {
        "config": tiny_config(model__num_heads=2),
        "presets": ("btlm", "sp"),
        "widths": (20, 40, 80),
        "depths": (2,),
        "batches": (1.0,),
        "tokens": (1.0,),
        "log2_rates": (-9.0, -8.0, -7.0, -6.0),
        "num_seeds": 2,
    }
    return Sweep(**{**values, **changes})


def made_up_loss(curve: Curve, rate: float, seed: int) -> float:
    """The optimum of btlm is at -7.3 at every width, that of sp falls by an octave a doubling; seeds scatter."""
    best = -7.3 if curve.preset == "btlm" else -6.3 - math.log2(curve.width / 20)
    return 3 - 0.1 * math.log2(curve.width) + 0.05 * (rate - best) ** 2 + 0.002 * math.sin(99 * rate + 7 * seed)


def finish(tried: Sweep) -> dict[str, Result]:
    """Make up results until nothing more is to be tried."""
    results = {}
    for _ in range(20):
        new = {}
        for curve in tried.curves:
            for rate in tried.rates_of(curve, results):
                for seed in range(tried.num_seeds):
                    new[tried.name_of(curve, rate=rate, seed=seed)] = Result(
                        loss=made_up_loss(curve, rate, seed), seconds=1.0
                    )
        if set(new) == set(results):
            return results
        results = new
    raise AssertionError("it does not end")


def test_optima_are_found_with_intervals_and_rates_are_added_at_the_ends(tmp_path):
    tried = sweep()
    results = finish(tried)
    values = lr_transfer.report(tried, results)
    for curve in values["curves"]:
        best = -7.3 if curve["preset"] == "btlm" else -6.3 - math.log2(curve["width"] / 20)
        optimum = curve["optimum"]
        assert optimum["rate"] == pytest.approx(best, abs=0.05) and optimum["is_bracketed"]
        assert optimum["low"] - 0.02 <= best <= optimum["high"] + 0.02 and optimum["high"] - optimum["low"] < 0.2
    ends = {(curve["preset"], curve["width"]): curve["log2_rates"][-1] for curve in values["curves"]}
    assert ends["btlm", 20] == -6 and ends["sp", 20] == -5  # of which the least loss was at -6, the last one asked for
    transfers = {each["preset"]: each for each in values["transfers"]}
    assert transfers["btlm"]["range_of_optima"] < 0.1
    assert transfers["sp"]["range_of_optima"] == pytest.approx(2, abs=0.1)
    cost = transfers["sp"]["loss_with_first_optimum"] - transfers["sp"]["loss_with_own_optimum"]
    assert cost == pytest.approx(0.05 * 2**2, abs=0.02)
    text = lr_transfer.format_report(values)
    assert "sp-d80-l2" in text and "not an optimum" not in text
    lr_transfer.plot(values, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_an_optimum_at_the_end_is_said_to_be_none_and_divergence_is_left_out():
    rates = [-9.0, -8.0, -7.0, -6.0]
    falling = optimum_of(rates, [[4.0], [3.5], [3.2], [3.0]])
    assert not falling.is_bracketed
    diverged = optimum_of(rates, [[3.3], [3.0], [3.4], [math.inf]])
    assert diverged.is_bracketed and diverged.rate == pytest.approx(-8 - 1 / 14)  # of the parabola through the three
    of_two = optimum_of(rates, [[3.3, 3.3], [3.0, 3.0], [3.4, 3.4], [2.0, math.inf]])
    assert of_two.rate == pytest.approx(diverged.rate)  # one seed of the best rate diverged: it is not the best
    with pytest.raises(ValueError, match="2 of 4 learning rates have a finite loss"):
        optimum_of(rates, [[3.3], [3.0], [math.inf], [math.nan]])


def test_a_loss_beyond_the_edge_of_stability_bends_no_parabola():
    """Measured losses of a width of 64: at 2^-4 training is unstable, and with it -6.26 came out."""
    rates = [-8.0, -7.0, -6.0, -5.0, -4.0]
    found = optimum_of(rates, [[4.5329], [4.2018], [4.0461], [4.0593], [5.1886]])
    without = optimum_of(rates[:-1], [[4.5329], [4.2018], [4.0461], [4.0593]])
    assert found == without and -5.7 < found.rate < -5.3 and found.is_bracketed
    few = optimum_of([-7.0, -6.0, -5.0], [[9.0], [4.0], [9.0]])  # three are needed, so all are taken
    assert few.rate == pytest.approx(-6)


def test_three_rates_of_one_seed_have_no_interval(tmp_path):
    """A parabola meets them exactly, and has no residuals; and the last rate, which diverged, costs nothing."""
    tried = sweep(presets=("btlm",), num_seeds=1)
    losses = dict(zip(tried.log2_rates, (3.3, 3.1, 3.0, math.inf), strict=True))
    results = {
        tried.name_of(curve, rate=rate, seed=0): Result(loss=loss, seconds=1.0)
        for curve in tried.curves
        for rate, loss in losses.items()
    }
    values = lr_transfer.report(tried, results)
    assert all((each["optimum"]["low"], each["optimum"]["high"]) == (None, None) for each in values["curves"])
    assert json.loads(json.dumps(values, allow_nan=False)) == json.loads(json.dumps(values))
    assert "unknown" in (text := lr_transfer.format_report(values)) and "curve costs +0.0000 nats" in text
    lr_transfer.plot(values, tmp_path / "plot.png")


def test_an_interval_is_the_scatter_times_students_factor():
    """Five rates and one seed: two degrees of freedom; residuals of (-1, 2, 0, -2, 1) / 10, which have no parabola."""
    rates, residuals = np.arange(-9.0, -4.0), np.array([-1, 2, 0, -2, 1]) / 10
    found = optimum_of(rates.tolist(), [[x] for x in 500 + 10 * (rates + 7) ** 2 + residuals])
    assert found.rate == pytest.approx(-7)
    deviation = math.sqrt(np.sum(residuals**2) / 2 / 10) / 20  # of b, the slope; the vertex is -b / 2a
    expected = 2.9200 * deviation  # t of 95 % and two degrees of freedom, of a table
    assert [found.rate - found.low, found.high - found.rate] == pytest.approx([expected] * 2, rel=0.12)


def test_the_degrees_of_freedom_of_seeds_lie_between_one_rates_and_all():
    x = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    equal = [[3 + d, 3 - d] for d in [0.1] * 5]
    # The vertex of x^2 moves with b alone, whose weights are x / 10: parts of 4, 1, 0, 1 and 4.
    assert lr_transfer._dof_of_seeds(x, equal, a=1.0, b=0.0) == pytest.approx(10**2 / (16 + 1 + 1 + 16))
    one = [[3.0, 3.0]] * 4 + [[3.0, 3.2, 3.1]]
    assert lr_transfer._dof_of_seeds(x, one, a=1.0, b=0.0) == pytest.approx(2)
    assert lr_transfer._dof_of_seeds(x, equal, a=-1.0, b=0.0) == 1
    assert lr_transfer._dof_of_seeds(x, [[3.0, 3.0]] * 5, a=1.0, b=0.0) == 1


def test_a_rate_beyond_those_of_the_last_curve_is_said_to_be_untried():
    """And a preset of one curve alone has no transfer."""
    rates = (-9.0, -8.0, -7.0)
    curves = []
    for width, best, tried in ((20, -5.5, (-7.0, -6.0, -5.0)), (40, -8.2, rates)):
        losses = [[3 + (rate - best) ** 2] for rate in tried]
        optimum = dataclasses.asdict(optimum_of(tried, losses))
        curves.append(
            {
                **dataclasses.asdict(Curve(preset="sp", width=width, depth=2, batch=1.0, tokens=1.0)),
                "log2_rates": tried,
                "losses": losses,
                "optimum": optimum,
            }
        )
    (transfer,) = lr_transfer._transfers(curves)
    assert transfer["loss_with_first_optimum"] is None and transfer["loss_with_own_optimum"] == pytest.approx(3)
    text = lr_transfer.format_report({"curves": curves, "transfers": [transfer]})
    assert "moves over 2.70 octaves; the first curve's optimum at the last curve was not tried there" in text
    (back,) = lr_transfer._transfers([{**curves[1], "optimum": curves[0]["optimum"]}, curves[0]])
    assert back["loss_with_first_optimum"] == pytest.approx(3)
    diverged = {**curves[1], "losses": [[3.64], [3.04], [4.44], [None]], "log2_rates": (*rates, -6.0)}
    (transfer,) = lr_transfer._transfers([{**curves[0], "optimum": {**optimum, "rate": -6.3}}, diverged])
    assert lr_transfer.describe_cost(transfer) == "diverges"
    assert lr_transfer._transfers(curves[:1]) == []


def test_an_interval_of_one_seed_grows_with_the_scatter_about_the_parabola():
    rates = np.arange(-10, -4.9)
    rng = np.random.default_rng(0)
    widths = []
    for noise in (0.001, 0.02):
        losses = [[3 + 0.05 * (rate + 7.3) ** 2 + noise * rng.standard_normal()] for rate in rates]
        found = optimum_of(rates.tolist(), losses)
        widths.append(found.high - found.low)
        assert found.low - 0.1 < -7.3 < found.high + 0.1
    assert 5 * widths[0] < widths[1]


def test_a_trial_is_the_config_with_its_sizes_and_rate():
    tried = sweep(batches=(0.5, 2.0), tokens=(1.0, 3.0))
    base, curve = tried.config, Curve(preset="sp", width=80, depth=3, batch=2.0, tokens=3.0)
    config = tried.config_of(curve, rate=-7.0, seed=1)
    assert (config.model.d_model, config.model.num_heads, config.model.num_layers) == (80, 4, 3)
    assert config.model.head_dim == base.model.head_dim and config.model.d_ff == 2 * base.model.d_ff
    assert config.mup.preset == "sp" and config.mup.base_d_model == base.mup.base_d_model
    assert config.curriculum.batch_size == (32, 16)
    assert config.curriculum.table.num_tokens == 3 * base.curriculum.table.num_tokens
    long = sweep(config=tiny_config(model__num_heads=2, optimizer__schedule_tokens=8 * 384), tokens=(3.0,))
    assert long.config_of(curve, rate=-7.0, seed=0).optimizer.schedule_tokens == 3 * 8 * 384
    shares = [c.optimizer.warmup_tokens / c.curriculum.table.num_tokens for c in (base, config)]
    assert shares[0] == pytest.approx(shares[1], rel=0.1)
    assert config.optimizer.peak_learning_rate == 2**-7
    ends = [c.optimizer.end_learning_rate / c.optimizer.peak_learning_rate for c in (base, config)]
    assert ends[0] == pytest.approx(ends[1])
    assert (config.seed, config.data.seed) == (base.seed + 1, base.data.seed + 1)
    assert len({trial.name for trial in tried.choose({})}) == 2 * 3 * 2 * 2 * 4 * 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"log2_rates": (-9.0, -8.0)}, "three or more"),
        ({"log2_rates": (-9.0, -8.0, -6.0)}, "equal distances"),
        ({"widths": (30,)}, "heads are 20 wide"),
        ({"batches": (0.05,)}, "gives 0.8 sequences a step"),
        ({"num_seeds": 0}, "seeds=0 must be at least 1"),
        ({"widths": (20, 20)}, "is given twice"),
        ({"log2_rates": (-9.0, -8.9999, -8.9998)}, "equal distances"),
        ({"tokens": (1.0, 1e308)}, "factors are at most 1e"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_at_once(change, said):
    with pytest.raises(ValueError, match=said):
        sweep(**change)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--tokens=1,1000", "trials of --widths=40 --depths=2 --batches=1 --tokens=1000 cannot be run: .*max_epochs"),
        ("--batches=1,0.5", "trials of .* --batches=0.5 --tokens=1 cannot be run: .*does not divide on 8 devices"),
    ],
)
def test_a_trial_that_cannot_run_is_refused_before_the_others_are_made(token_store, tmp_path, capsys, flag, said):
    config = write_config(tmp_path / "config.py", store=token_store)
    command = ["tune", "lr-transfer", f"--directory={tmp_path / 'study'}", f"--config={config}", "--rates=-9:-7"]
    assert main([*command, flag]) == 1
    assert re.search(said, capsys.readouterr().err) and not (tmp_path / "study/trials").exists()


@pytest.mark.slow
def test_a_sweep_goes_on_and_trains_what_is_left(token_store, tmp_path, capsys):
    """Two of its three trials are finished, by a made-up loss; the third is an ordinary run."""
    one_phase = {"seq_len": (48,), "batch_size": (8,), "num_tokens": (3 * 384,)}
    changes = {f"curriculum__{name}": value for name, value in one_phase.items()}
    config = write_config(tmp_path / "config.py", store=token_store, **changes)
    directory = tmp_path / "study"
    for rate, loss in ((-9, 9.0), (-7, 9.5)):
        (directory / "trials" / f"btlm-d40-l2-lr{rate}-s0").mkdir(parents=True)
        values = {"loss": loss, "seconds": 1.0, "outcome": "done"}
        (directory / "trials" / f"btlm-d40-l2-lr{rate}-s0" / "result.json").write_text(json.dumps(values))
    command = ["tune", "lr-transfer", f"--directory={directory}", f"--config={config}", "--rates=-9:-7"]
    command += ["--config.optimizer.warmup_tokens=384"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "Resuming" not in said and "octaves" not in said  # one curve has nothing to move against
    (curve,) = json.loads((directory / "lr_transfer.json").read_text())["curves"]
    loss = float(said.partition("btlm-d40-l2-lr-8-s0: loss ")[2].partition(",")[0])
    summary = json.loads((directory / "trials" / "btlm-d40-l2-lr-8-s0" / "summary.json").read_text())
    assert curve["losses"] == [[9.0], [summary["heldout"]["loss"]], [9.5]] and summary["num_steps"] == 3
    assert loss == pytest.approx(summary["heldout"]["loss"], abs=1e-4) and loss < 8
    assert not (directory / "trials" / "btlm-d40-l2-lr-8-s0" / "checkpoints").exists()
    assert main([*command[:-1], "--config.optimizer.warmup_tokens=768"]) == 1
    assert "holds another study, of config.optimizer.warmup_tokens=384, not 768" in capsys.readouterr().err


def test_flags_that_cannot_be_are_refused(tmp_path, capsys):
    for arguments, said in (
        (["--rates=-5:-9"], "must rise"),
        (["--rates=a:b"], "must be FIRST:LAST"),
        (["--rates=-9:-5:1e-9"], "in steps of 0.001 or more"),
        (["--rates=2000,3000,4000"], "must be between -40 and 10"),
        (["--rates=-9:-8:0.3"], "steps of 0.3 from -9; the nearest step that fits is 0.333333"),
        (["--rates=-9:-7:0.9"], "the nearest step that fits is 1\n"),
        (["--tokens=1,0"], "--tokens=1,0 must be numbers"),
        (["--presets=mup"], "--presets=mup is not known; allowed are btlm"),
        (["--workers=0"], "--workers=0 must be at least 1"),
    ):
        assert main(["tune", "lr-transfer", f"--directory={tmp_path / 'd'}", "--config=local_cpu", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert dataclasses.is_dataclass(Sweep) and not (tmp_path / "d").exists()


def test_rates_are_whole_steps_from_the_first_to_the_last():
    for text, expected in (
        ("-9:-5:2", [-9, -7, -5]),
        ("-9:-8:0.333333", [-9, -26 / 3, -25 / 3, -8]),
        ("-7:-5", [-7, -6, -5]),
    ):
        flags = lr_transfer_flags()
        assert flags.parse(["--directory=d", f"--rates={text}"])
        assert _rates(flags) == pytest.approx(expected)


def test_workers_are_given_the_same_command_without_workers():
    arguments = [
        "tune",
        "search",
        "--workers",
        "2",
        "--points=3",
        "--workers=4",
        "-workers=4",
        "-workers",
        "3",
        "--seed=1",
    ]
    assert _without_workers(arguments) == ["tune", "search", "--points=3", "--seed=1"]
