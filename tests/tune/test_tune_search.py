"""Search: points, rungs and ranks follow from made-up losses; importance finds what was made to matter."""

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats
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


LONG = {"curriculum__num_tokens": (27 * 384, 18 * 384)}  # of which a ninth has steps in both phases


def made(**changes) -> Search:
    values = {
        "config": tiny_config(**LONG),
        "space": SPACE,
        "num_points": 27,
        "num_rungs": 3,
        "num_seeds": 2,
        "num_fresh": 3,
    }
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
    assert values["gain"]["low"] == pytest.approx(gain) == values["gain"]["high"]  # the seeds differ by the same
    config = tried.config
    own = (config.optimizer.peak_learning_rate, config.mup.init_std, config.optimizer.weight_decay)
    assert values["own"] == dict(zip([dimension.key for dimension in SPACE], own, strict=True))
    assert [each["loss"] for each in values["first_rung"]] == pytest.approx(
        [loss(tried.values_of(n)) for n in range(1, 28)]
    )
    assert values["fresh"]["config"] == pytest.approx([3.22, 3.23, 3.24])  # seeds 2 to 4, which chose nothing
    assert values["fresh"]["gain"]["nats"] == pytest.approx(gain)
    assert "With 3 seeds that it was not chosen by: +" in search.format_report(values)
    assert "Best of 27 points, of which 3 and the config had all tokens" in (text := search.format_report(values))
    assert text.index("optimizer.peak_learning_rate  ") < text.index("mup.init_std  ")


@pytest.mark.parametrize(
    ("own", "best", "gain", "is_better", "said"),
    [
        ((3.2, 3.2), (3.1, 3.2), 0.05, True, "by: +0.0500 nats better, 90 % from -0.2657 to +0.3657 over seeds"),
        ((3.2, 3.2), (3.5, 3.5), -0.3, False, "by: -0.3000 nats better"),
        ((3.2, 3.2), (math.inf, 3.0), None, False, "by: the best diverged in 1 of 2 runs, the config in 0"),
        ((math.inf, 3.2), (math.inf, 3.3), None, False, "by: the best diverged in 1 of 2 runs, the config in 1"),
        ((math.inf, 3.2), (9.0, 9.0), None, True, "by: the best diverged in 0 of 2 runs, the config in 1"),
    ],
)
def test_a_point_that_fresh_seeds_show_to_be_worse_leaves_the_configs_constants(own, best, gain, is_better, said):
    tried = made(num_points=2, num_rungs=1, num_seeds=1, num_fresh=2)
    losses = {"000-rung-0-s0": 3.2, "001-rung-0-s0": 3.1, "002-rung-0-s0": 3.3}
    results = {f"point-{name}": Result(loss=each, seconds=1.0) for name, each in losses.items()}
    left = [trial.name for trial in tried.choose(results) if trial.name not in results]
    assert left == [f"point-{number}-rung-0-s{seed}" for seed in (1, 2) for number in ("000", "001")]
    fresh = [loss for pair in zip(own, best, strict=True) for loss in pair]
    values = search.report(
        tried, results | {name: Result(loss=loss, seconds=1.0) for name, loss in zip(left, fresh, strict=True)}
    )
    assert values["gain"]["nats"] == pytest.approx(0.1)
    assert values["fresh"]["gain"]["nats"] == (gain if gain is None else pytest.approx(gain))
    std = tried.values_of(1)["mup.init_std"] if is_better else tried.config.mup.init_std
    assert values["is_best_better"] is is_better and values["constants"]["mup.init_std"] == std
    text = search.format_report(values)
    assert said in text and ("No point is better than the config" in text) is not is_better


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
    assert tried.rungs(results)[1] == [0, 2, 5]


def test_a_config_that_beats_every_point_is_compared_with_the_best_of_them():
    """It takes no point's place, though one goes on from three."""
    tried, results = made(num_points=5, num_rungs=2, num_seeds=1), {}
    while names := [trial.name for trial in tried.choose(results) if trial.name not in results]:
        results |= {name: Result(loss=3.0 + int(name.split("-")[1]), seconds=1.0) for name in names}
    values = search.report(tried, results)
    assert values["rungs"][1] == [0, 1] and values["gain"]["nats"] == -1.0 and not values["is_best_better"]


def test_the_gains_interval_is_students_of_the_differences():
    own, best = [3.0, 3.3, 3.1, 3.6], [2.9, 3.1, 3.1, 3.3]
    found = scipy.stats.ttest_rel(own, best)
    low, high = found.confidence_interval(0.9)
    assert search.gain_of(own, best) == pytest.approx({"nats": 0.15, "low": low, "high": high})
    assert search.gain_of([3.0], [2.5]) == {"nats": 0.5, "low": None, "high": None}


def test_values_are_reported_as_they_were_realised():
    """Of 16 and 8 rows a batch has eighths; 2 steps of warm-up of 10 are half the run at a factor of 2.5."""
    space = (
        Dimension(key=BATCH, low=0.3, high=1.5, scale=LINEAR),
        Dimension(key=WARMUP, low=2.6, high=4.0, scale=LOG),
    )
    tried = made(config=tiny_config(), space=space, num_points=16, num_rungs=1, num_seeds=1, num_fresh=0)
    asked = [tried.values_of(number) for number in range(1, 17)]
    results = {
        trial.name: Result(loss=4.0 - tried.values_of(number).get(WARMUP, 0.0) / 4, seconds=1.0)
        for number, trial in enumerate(tried.choose({}))
    }
    values = search.report(tried, results)
    realised = [each["values"] for each in values["first_rung"]]
    assert [each[BATCH] for each in realised] == [round(8 * each[BATCH]) / 8 for each in asked]
    assert {each[WARMUP] for each in realised} == {2.5}
    assert {each["point"]: each["values"] for each in values["final"]} == {0: {}} | dict(enumerate(realised, start=1))
    shares = {each["key"]: each["share"] for each in values["importance"]}
    assert shares[WARMUP] == 0.0  # the same in all points, though what was asked decides the loss
    for dimension in (*SPACE, Dimension(key=BATCH, low=0.5, high=4.0, scale=LOG2_WHOLE)):
        assert [dimension.share(dimension.value(share)) for share in (0.125, 0.625, 0.875)] == pytest.approx(
            [0.125, 0.625, 0.875]
        )


def test_importance_finds_what_was_made_to_matter():
    rng = np.random.default_rng(0)
    shares = rng.random((96, 3))
    losses = 10 * (shares[:, 0] - 0.6) ** 2 + 0.9 * shares[:, 1] + 0.05 * rng.standard_normal(96)
    losses[losses > np.quantile(losses, 0.95)] = np.inf  # diverged
    assert (search._ranks(losses) == scipy.stats.rankdata(losses) - 1).all()
    first, second, third = importance(SPACE, shares, losses)
    assert (first["key"], second["key"]) == ("optimizer.peak_learning_rate", "mup.init_std")
    assert first["low"] > second["high"] and second["low"] > 0 and third["share"] < 0.05
    # Eight ranks, two in each quarter: 40 of 42 squares between them, the other 2 with 4 degrees of freedom.
    eight = np.array([[0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9]]).T
    assert importance(SPACE[:1], eight, eight[:, 0])[0]["share"] == pytest.approx((40 - 3 * 0.5) / (42 + 0.5))
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
    assert search.with_values(base, {WARMUP: 4.0}, tokens=1, seed=0).optimizer.warmup_tokens == 5 * 384  # of 10 steps


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_points": 1}, "points=1, .*two points or more"),
        ({"space": SPACE + SPACE[:1]}, "each once"),
        ({"space": ()}, "one or more"),
        ({"num_points": 40, "num_rungs": 5}, "of 40 points 40, 13, 4, 1 are on its rungs.*give at most 4"),
        ({"num_points": 5, "num_rungs": 50}, "give at most 2"),
        ({"config": tiny_config()}, "has the share 0.111, in a phase less than a step of 384 tokens; give fewer rungs"),
        (
            {"config": tiny_config(optimizer__warmup_tokens=0), "num_rungs": 1, "space": search.DEFAULT_SPACE},
            "warmup, a factor of optimizer.warmup_tokens=0; leave it out",
        ),
        *(
            ({"space": (Dimension(key=key, low=0.1, high=0.4, scale=LOG),)}, said)
            for key, said in (
                ("optimizer.decay_share", "which optimizer.schedule=linear does not read; .* or give the config wsd"),
                ("optimizer.average_share", "which does not change a point's loss"),
                ("corpus.heldout_fraction", "which does not change a point's loss"),
            )
        ),
    ],
)
def test_a_search_that_cannot_be_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        made(**change)


def test_a_batch_is_of_whole_rows_of_each_micro_batch():
    space = (Dimension(key=BATCH, low=0.4, high=1.6, scale=LOG), SPACE[0])
    tried = made(config=tiny_config(**LONG, mesh__accumulation=4), space=space, num_points=8, num_rungs=1)
    sizes = {config.curriculum.batch_size for _, config in tried.shapes()}
    assert sizes == {(8, 4), (16, 8), (24, 12)}
    wsd = tiny_config(**LONG, optimizer__schedule="wsd")
    made(config=wsd, space=(Dimension(key="optimizer.decay_share", low=0.1, high=0.4, scale=LOG),))


def test_flags_that_cannot_be_are_refused(tmp_path, capsys):
    for space, code, said in (
        ("mup.init_std=1", 2, "must be KEY=LOW:HIGH"),
        ("mup.init_std=1:2:square", 2, "the scale must be one of linear, log, log2_whole"),
        ("mup.init_std=2:1", 1, "is no range that rises"),
        ("mup.init_std=0:1", 1, "must be positive for the scale log"),
        ("batch=5:7:log2_whole", 1, "has no power of two"),
        ("warmup=1:1e308", 1, "factors are at most 1e"),
        ("model.d_model=64:128", 1, "no key of the config whose value is a number with a fraction"),
    ):
        arguments = [f"--directory={tmp_path / 'd'}", "--config=local_cpu", "--space", space]
        assert main(["tune", "search", *arguments]) == code
        assert said in capsys.readouterr().err
    assert main(["tune", "search", f"--directory={tmp_path / 'd'}", "--config=local_cpu", "--seed=-1"]) == 2
    assert "--seed=-1 must be 0 or more" in capsys.readouterr().err


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


def new_config(values, directory, *flags):
    """The config that `btlm new` writes with a search's report, and its text."""
    from btlm_jax.cli.parse import load_config
    from btlm_jax.recipe.config import train_config_from

    (directory / "search.json").write_text(json.dumps(values))
    output = directory / "large.py"
    command = ["new", "--params=40M", f"--constants={directory / 'search.json'}", f"--output={output}", "--replace"]
    assert main([*command, *flags]) == 0
    return train_config_from(load_config(output, argument="", changes={})), output.read_text()


@pytest.mark.parametrize("preset", ["btlm", "completep"])
def test_the_weight_decay_by_tau_is_of_the_constants_that_were_found(tmp_path, preset):
    values = {
        "constants": {"optimizer.peak_learning_rate": 0.004, "mup.init_std": 0.1},
        "base": {"d_model": 64.0, "num_layers": 2, "preset": preset},  # as a file of before hidden_optimizer has it
    }
    config, text = new_config(values, tmp_path, "--weight_decay=tau")
    optimizer, num_steps = config.optimizer, config.curriculum.table.num_steps
    assert (config.mup.preset, optimizer.peak_learning_rate) == (preset, 0.004)
    rate = 0.004 / (config.model.d_model / 64 if preset == "btlm" else 1)
    assert 1 / (rate * optimizer.weight_decay * num_steps) == pytest.approx(0.21, rel=0.01)  # 20 tokens a parameter
    formula = "m / (peak decay steps)" if preset == "btlm" else "1 / (peak decay steps)"
    assert f"tau = {formula} = 0.2" in " ".join(text.replace("#", "").split())
    assert f'preset="{preset}",  # of the proxy that was searched on' in text
    coupled = '"preset",  # coupled to the learning rate' if preset == "btlm" else '"preset",  # independent of the'
    assert f"weight_decay_convention={coupled}" in text


def test_constants_of_muon_make_a_model_of_muon(tmp_path, capsys):
    config = tiny_config(**LONG, optimizer__hidden_optimizer="muon", optimizer__muon_learning_rate=0.03)
    rate = Dimension(key="optimizer.muon_learning_rate", low=0.005, high=0.08, scale=LOG)
    searched = made(config=config, space=(*SPACE[:2], rate), num_points=9, num_rungs=1)
    values = search.report(searched, finish(searched))
    large, text = new_config(values, tmp_path)
    assert large.optimizer.hidden_optimizer == "muon"
    assert large.optimizer.muon_learning_rate == values["final"][0]["values"]["optimizer.muon_learning_rate"]
    assert 'hidden_optimizer="muon",  # of the proxy' in text and "Muon remembers tau = 1 / (muon_learning_rate" in text
    as_given = search.report(made(config=config, num_points=9, num_rungs=1), finish(made(num_points=9, num_rungs=1)))
    assert new_config(as_given, tmp_path)[0].optimizer.muon_learning_rate == 0.03  # not searched: the proxy's
    command = ["new", "--params=40M", f"--constants={tmp_path / 'search.json'}", f"--output={tmp_path / 'b.py'}"]
    assert main([*command, "--weight_decay=tau"]) == 2
    assert "--weight_decay=tau is a law of AdamW" in capsys.readouterr().err
    del values["base"]["hidden_optimizer"]
    (tmp_path / "search.json").write_text(json.dumps(values))
    assert main(command) == 1
    assert "did not keep which optimizer it is of; run the search's command again" in capsys.readouterr().err
    with pytest.raises(ValueError, match="muon_learning_rate, which optimizer.hidden_optimizer=adamw does not read"):
        made(space=(*SPACE, rate))


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
    assert values["base"] == {"d_model": 20.0, "num_layers": 2, "preset": "btlm", "hidden_optimizer": "adamw"}
    assert main([*command, "--space", "mup.init_std=0.02:0.3"]) == 1
    assert "holds another study, of space[0].high=0.2, not 0.3; give" in capsys.readouterr().err
