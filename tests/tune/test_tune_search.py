"""Search: points, rungs and ranks follow from made-up losses; importance finds what was made to matter."""

import dataclasses
import json
import math

import numpy as np
import pytest
from support.real_store import write_config
from support.tiny import tiny_config

from btlm_jax import notices
from btlm_jax.cli import main
from btlm_jax.recipe.config import AUTO
from btlm_jax.tune import search
from btlm_jax.tune.search import BATCH, LINEAR, LOG, LOG2_WHOLE, SOBOL, WARMUP, Dimension, Search, importance
from btlm_jax.tune.trials import Result

SPACE = (
    Dimension(key="optimizer.peak_learning_rate", low=2**-10, high=2**-4, scale=LOG),
    Dimension(key="mup.init_std", low=0.01, high=0.2, scale=LINEAR),
    Dimension(key="optimizer.weight_decay", low=0.01, high=1.0, scale=LOG),
)


def made(**changes) -> Search:
    values = {"config": tiny_config(), "space": SPACE, "num_points": 27, "num_rungs": 3, "num_seeds": 2, "num_fresh": 3}
    return Search(**{**values, "method": SOBOL, "seed": 1, **changes})


def loss(values: dict) -> float:
    """The rate matters most, sigma a little, decay not at all; the config itself has 3.2."""
    if not values:
        return 3.2
    rate, std, _ = values.values()
    return 3.0 + 0.1 * (math.log2(rate) + 6) ** 2 + 0.8 * abs(std - 0.1)


def finish(tried: Search) -> dict[str, Result]:
    results = {}
    while names := [trial.name for trial in tried.choose(results) if trial.name not in results]:
        for name in names:
            number, seed = int(name.split("-")[1]), int(name[-1])
            results[name] = Result(loss=loss(tried.values_of(number)) + 0.01 * seed, seconds=1.0)
    return results


def test_of_each_rung_the_best_third_goes_on_and_the_config_beside_them():
    tried = made()
    results = finish(tried)
    rungs = tried.rungs(results)
    assert [len(set(rung) - {0}) for rung in rungs] == [27, 9, 3] and all(0 in rung for rung in rungs)
    truth = sorted(range(1, 28), key=lambda number: loss(tried.values_of(number)))
    assert [sorted(set(rung) - {0}) for rung in rungs[1:]] == [sorted(truth[:9]), sorted(truth[:3])]
    assert len(results) == 28 + 10 + 2 * 4 + 2 * 3
    values = search.report(tried, results)
    assert {key: values["constants"][key] for key in tried.values_of(1)} == tried.values_of(truth[0])
    assert (
        values["constants"]["mup.output_multiplier"] == tried.config.mup.output_multiplier
    )  # not searched: the proxy's
    gain = 3.2 - loss(tried.values_of(truth[0]))
    assert values["gain"]["nats"] == pytest.approx(gain)
    assert values["gain"]["low"] <= gain <= values["gain"]["high"] < gain + 0.015
    assert values["own"] == {dimension.key: search._value_of(tried.config, dimension.key) for dimension in SPACE}
    assert [each["loss"] for each in values["first_rung"]] == pytest.approx(
        [loss(tried.values_of(n)) for n in range(1, 28)]
    )
    assert values["fresh"]["config"] == pytest.approx([3.22, 3.23, 3.24])  # seeds 2 to 4, which chose nothing
    assert values["fresh"]["gain"]["nats"] == pytest.approx(gain)
    assert "With 3 seeds that it was not chosen by: +" in search.format_report(values)
    assert "Best of 27 points, of which 4 had all tokens" in (text := search.format_report(values))
    assert text.index("optimizer.peak_learning_rate  ") < text.index("mup.init_std  ")


def test_a_point_that_fresh_seeds_show_to_be_worse_leaves_the_configs_constants():
    tried = made(num_points=2, num_rungs=1, num_seeds=1, num_fresh=2)
    losses = {"000-rung-0-s0": 3.2, "001-rung-0-s0": 3.1, "002-rung-0-s0": 3.3}
    results = {f"point-{name}": Result(loss=each, seconds=1.0) for name, each in losses.items()}
    left = [trial.name for trial in tried.choose(results) if trial.name not in results]
    assert left == [f"point-{number}-rung-0-s{seed}" for seed in (1, 2) for number in ("000", "001")]
    results |= {name: Result(loss=3.5 if "001" in name else 3.2, seconds=1.0) for name in left}
    values = search.report(tried, results)
    assert values["gain"]["nats"] == pytest.approx(0.1) and values["fresh"]["gain"]["nats"] == pytest.approx(-0.3)
    assert values["constants"]["mup.init_std"] == tried.config.mup.init_std
    assert "No point is better than the config" in search.format_report(values)


def test_a_config_that_no_point_beats_keeps_its_constants():
    tried = made(num_points=2, num_rungs=1, num_seeds=1)
    results = {trial.name: Result(loss=math.inf, seconds=1.0) for trial in tried.choose({})}
    for own in (math.inf, 4.0):
        results[tried.name_of(0, rung=0, seed=0)] = Result(loss=own, seconds=1.0)
        values = search.report(tried, results)
        assert values["constants"]["mup.init_std"] == tried.config.mup.init_std
        assert "No point is better than the config" in search.format_report(values)


def test_a_diverged_point_does_not_go_on():
    tried = made(num_points=6, num_rungs=2)
    results = {trial.name: Result(loss=math.inf, seconds=1.0) for trial in tried.choose({})}
    for number in (0, 2, 5):
        results[tried.name_of(number, rung=0, seed=0)] = Result(loss=4.0 + number, seconds=1.0)
    assert tried.rungs(results)[1] == [0, 2]


def test_importance_finds_what_was_made_to_matter():
    rng = np.random.default_rng(0)
    shares = rng.random((96, 3))
    losses = 10 * (shares[:, 0] - 0.6) ** 2 + 0.9 * shares[:, 1] + 0.05 * rng.standard_normal(96)
    losses[losses > np.quantile(losses, 0.95)] = np.inf  # diverged
    first, second, third = importance(SPACE, shares, losses)
    assert (first["key"], second["key"]) == ("optimizer.peak_learning_rate", "mup.init_std")
    assert first["low"] > second["high"] and second["low"] > 0 and third["share"] < 0.05
    # By the definition: the variance of the expected loss given a key, over the whole, of losses that are linear.
    shares = rng.random((4000, 3))
    found = {each["key"]: each["share"] for each in importance(SPACE, shares, shares @ [3.0, 4.0, 0.0])}
    assert found["optimizer.peak_learning_rate"] == pytest.approx(9 / 25, abs=0.05)
    assert found["mup.init_std"] == pytest.approx(16 / 25, abs=0.07)
    assert found["optimizer.weight_decay"] < 0.01


def test_points_cover_the_ranges_in_their_scales():
    tried = made(num_points=16)
    rates = np.log2([tried.values_of(number)["optimizer.peak_learning_rate"] for number in range(1, 17)])
    assert sorted(np.floor((rates + 10) / 6 * 16)) == list(range(16))  # one in each sixteenth: Sobol's net
    stds = [tried.values_of(number)["mup.init_std"] for number in range(1, 17)]
    assert 0.01 <= min(stds) < 0.03 and 0.18 < max(stds) <= 0.2
    batch = Dimension(key=BATCH, low=0.5, high=4.0, scale=LOG2_WHOLE)
    assert [batch.value(share) for share in (0.0, 0.24, 0.26, 0.6, 1.0)] == [0.5, 0.5, 1.0, 2.0, 4.0]
    within = Dimension(key=BATCH, low=3.0, high=9.0, scale=LOG2_WHOLE)
    assert [within.value(share) for share in (0.0, 0.49, 0.51, 1.0)] == [4.0, 4.0, 8.0, 8.0]


def test_a_points_config_has_its_values_tokens_and_shares():
    base = tiny_config()
    values = {"optimizer.peak_learning_rate": 0.02, "mup.init_std": 0.05, BATCH: 0.5, WARMUP: 2.0}
    config = search.with_values(base, values, tokens=1 / 2, seed=3)
    assert (config.mup.init_std, config.optimizer.peak_learning_rate) == (0.05, 0.02)
    assert config.curriculum.batch_size == (8, 4) and config.curriculum.num_tokens == (3 * 384, 2 * 384)
    assert config.optimizer.warmup_tokens == pytest.approx(2 * base.optimizer.warmup_tokens / 2, rel=0.01)
    ends = [each.optimizer.end_learning_rate / each.optimizer.peak_learning_rate for each in (base, config)]
    assert ends[0] == pytest.approx(ends[1])
    assert (config.seed, config.data.seed) == (base.seed + 3, base.data.seed + 3)
    assert search.with_values(base, {}, tokens=1, seed=0) == base


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_points": 1}, "two points or more"),
        ({"space": SPACE + SPACE[:1]}, "each once"),
        ({"space": ()}, "one or more"),
    ],
)
def test_a_search_that_cannot_be_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        made(**change)


def test_flags_that_cannot_be_are_refused(tmp_path, capsys):
    for space, code, said in (
        ("mup.init_std=1", 2, "must be KEY=LOW:HIGH"),
        ("mup.init_std=1:2:square", 2, "the scale must be one of linear, log, log2_whole"),
        ("mup.init_std=2:1", 1, "is no range that rises"),
        ("mup.init_std=0:1", 1, "must be positive for the scale log"),
        ("batch=5:7:log2_whole", 1, "has no power of two"),
        ("model.d_model=64:128", 1, "no key of the config whose value is a number with a fraction"),
    ):
        arguments = [f"--directory={tmp_path / 'd'}", "--config=local_cpu", "--space", space]
        assert main(["tune", "search", *arguments]) == code
        assert said in capsys.readouterr().err


def test_a_large_config_is_written_with_what_was_found(tmp_path, capsys):
    values = search.report(made(num_points=9, num_rungs=1), finish(made(num_points=9, num_rungs=1)))
    (tmp_path / "search.json").write_text(json.dumps(values))
    output = tmp_path / "large.py"
    assert main(["new", "--params=40M", f"--constants={tmp_path / 'search.json'}", f"--output={output}"]) == 0
    assert "optimizer.weight_decay depend on the length of the run" in capsys.readouterr().err
    assert notices.counts() == {"constants-not-taken": 1}
    from btlm_jax.cli.parse import load_config
    from btlm_jax.recipe.config import train_config_from

    config = train_config_from(load_config(output, argument="", changes={}))
    best = values["constants"]
    assert config.optimizer.peak_learning_rate == best["optimizer.peak_learning_rate"]
    assert config.mup.init_std == best["mup.init_std"] and config.mup.output_multiplier == 2.22
    assert (config.mup.base_d_model, config.mup.base_num_layers) == (20.0, 2)  # of the tiny proxy
    assert config.model.d_ff / config.mup.base_d_ff == config.model.d_model / 20.0
    assert config.optimizer.weight_decay in (0.1, AUTO)
    assert "of search.json, btlm tune search at base width 20" in output.read_text()
    (tmp_path / "search.json").write_text(json.dumps({"constants": {"warmup": 2.0}, **{"base": values["base"]}}))
    assert main(["new", "--params=40M", f"--constants={tmp_path / 'search.json'}", f"--output={output}x.py"]) == 1
    assert "has none of optimizer.peak_learning_rate, " in capsys.readouterr().err
    assert dataclasses.is_dataclass(Search)


def test_a_finished_search_is_reported_by_its_command(token_store, tmp_path, capsys):
    config = write_config(tmp_path / "config.py", store=token_store)
    for number, value in enumerate((5.5, 5.25, None)):
        trial = tmp_path / f"study/trials/point-00{number}-rung-0-s0"
        trial.mkdir(parents=True)
        (trial / "result.json").write_text(json.dumps({"loss": value, "seconds": 1.0, "outcome": ""}))
    command = ["tune", "search", f"--directory={tmp_path / 'study'}", f"--config={config}", "--points=2", "--rungs=1"]
    command += ["--fresh_seeds=0"]
    assert main([*command, "--space", "mup.init_std=0.02:0.2"]) == 0
    said = capsys.readouterr().out
    assert "  5.2500  init_std 0." in said and "  5.5000  the config as it is" in said and "  diverged  init" in said
    assert "Against the config as it is: +0.2500 nats better\n" in said
    values = json.loads((tmp_path / "study/search.json").read_text())
    assert [each["loss"] for each in values["final"]] == [5.25, 5.5, None]
    assert values["constants"]["mup.init_std"] == values["final"][0]["values"]["mup.init_std"]
    assert values["base"] == {"d_model": 20.0, "num_layers": 2, "preset": "btlm"}
    assert main([*command, "--space", "mup.init_std=0.02:0.3"]) == 1
    assert "holds another study, of space=" in capsys.readouterr().err
