"""The experiments on tuning: what they run, and what they report of made-up numbers."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import pytest

from btlm_jax.cli.tune import coord_check_flags, search_flags
from btlm_jax.recipe.config import train_config_from
from btlm_jax.recipe.sizes import count_parameters
from btlm_jax.tune import scaling
from btlm_jax.tune import search as verb
from btlm_jax.tune.trials import Result
from experiments import study
from experiments.coordinate_check import __main__ as coordinate_check
from experiments.lr_transfer import __main__ as lr_transfer
from experiments.scaling_law import __main__ as scaling_law
from experiments.scaling_law.family import fitted_sizes
from experiments.search import __main__ as search

FOLDER = Path(__file__).parent.parent / "experiments"


def config_of(name, size=""):
    return train_config_from(importlib.import_module(f"experiments.{name}.config").get_config(size).to_dict())


def test_the_sweeps_find_made_up_optima_over_both_ladders(tmp_path, monkeypatch):
    monkeypatch.setattr("btlm_jax.tune.lr_transfer.NUM_SAMPLES", 20)
    config, stores = config_of("lr_transfer", "quick"), {"": tmp_path / "store"}

    def loss(name, seed):
        """The optimum is at 2^-6.3, and of sp an octave lower a doubling of the width."""
        preset, width, depth, *_ = name.split("-")
        best = -6.3 - (math.log2(int(width[1:]) / 64) if preset == "sp" else 0.0)
        return 4 + 0.1 * (float(name.partition("lr")[2]) - best) ** 2 + 0.002 * seed + 0.001 * int(depth[1:])

    first = lr_transfer.make_variants(config, {}, stores)
    assert len(first) == 4 * 7 and "sp-d64-l4-lr-6" not in first and "completep-d64-l4-lr-6" in first
    deep = first["completep-d64-l4-lr-6"]
    assert (deep.mup.preset, deep.model.num_layers, deep.model.d_model) == ("completep", 4, 64)
    assert deep.optimizer.peak_learning_rate == 2.0**-6 and deep.data.store == str(tmp_path / "store")
    measured = {name: {"loss": loss(name, 0)} for name in first}
    measured["btlm-d64-l2-lr-5"]["loss"] = None  # it diverged
    measured["sp-d128-l2-lr-8"]["loss"] = 3.0  # at the end of the rates: one more is tried
    again = lr_transfer.make_variants(config, measured, stores)
    assert again.keys() - first.keys() == {"sp-d128-l2-lr-9"}
    seeds = [{name: {"loss": loss(name, seed)} for name in first} for seed in (0, 1)]
    values = lr_transfer.report(config, seeds)
    for ladder in values.values():
        for curve in ladder["curves"]:
            best = -7.3 if curve["preset"] == "sp" and curve["width"] == 128 else -6.3
            assert curve["optimum"]["rate"] == pytest.approx(best, abs=0.01)
    text = lr_transfer.describe(values)
    assert "- sp over widths: 1.00 octaves; the smallest one's optimum at the largest costs +0.1000 nats" in text
    assert "| completep, width 64, 4 layers | -6.30 |" in text
    seeds[1]["btlm-d128-l2-lr-5"]["loss"] = None
    values = json.loads(json.dumps(lr_transfer.report(config, seeds), allow_nan=False))
    lr_transfer.plot(values, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="model.d_model=192 must be the base's 64 doubled once or more"):
        lr_transfer.sweeps_of(
            dataclasses.replace(config, model=dataclasses.replace(config.model, d_model=192, num_heads=6)), num_seeds=1
        )


@pytest.mark.slow
def test_the_target_is_predicted_before_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("btlm_jax.tune.scaling.NUM_SAMPLES", 8)
    config, stores = config_of("scaling_law"), {"": tmp_path / "store"}

    def loss(name, run):
        tokens = run.curriculum.table.num_tokens
        return 1.5 + (2e4 / count_parameters(run.model)) ** 0.4 + (1e5 / tokens) ** 0.5 + 1e-4 * (len(name) % 3)

    first = scaling_law.make_variants(config, {}, stores)
    assert len(first) == 8 and not (tmp_path / scaling_law.RECORD).exists()
    assert max(count_parameters(each.model) for each in first.values()) * 3.7 < count_parameters(config.model)
    assert {each.mup.init_std for each in first.values()} == {config.mup.init_std}
    assert all(each.model.d_ff / each.mup.base_d_ff == each.model.d_model / 64 for each in first.values())
    assert {(each.model.num_layers, each.model.num_heads) for each in first.values()} == {(4, 2)}
    measured = {name: {"loss": loss(name, run)} for name, run in first.items()}
    made = scaling_law.make_variants(config, measured, stores)
    assert list(made)[-1] == scaling_law.TARGET and made[scaling_law.TARGET].model == config.model
    recorded = (tmp_path / scaling_law.RECORD).read_text()
    scaling_law.make_variants(config, measured, stores)
    assert (tmp_path / scaling_law.RECORD).read_text() == recorded  # once
    (tmp_path / scaling_law.RECORD).write_text(recorded.splitlines(keepends=True)[0])  # stopped after the first
    scaling_law.make_variants(config, measured, stores)
    recorded = (tmp_path / scaling_law.RECORD).read_text()
    assert len(recorded.splitlines()) == 2
    workdir = tmp_path / "trials" / "target-s0"
    measured[scaling_law.TARGET] = {"loss": loss("target", config), **scaling_law.measure(config, workdir)}
    values = scaling_law.report(config, [measured])
    assert values["target"]["flops_to_largest_fitted"] > 4
    chinchilla = values["outcomes"]["chinchilla"]
    assert abs(chinchilla["errors"][0]) < 0.02 and chinchilla["sha256"] in recorded
    text = scaling_law.describe(json.loads(json.dumps(values)))
    assert f"| chinchilla | {chinchilla['predicted']['loss']:.4f} |" in text
    scaling_law.plot(values, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_widths_that_are_the_same_are_refused():
    config = config_of("scaling_law")
    narrow = dataclasses.replace(config, model=dataclasses.replace(config.model, d_model=48, num_heads=2, d_ff=128))
    with pytest.raises(ValueError, match="0.3 of the target's d_model=48 in heads of a multiple of 8 is 16"):
        fitted_sizes(narrow)


@pytest.mark.parametrize("size", ["", "quick", "large"])
def test_every_coordinate_check_is_a_command(size):
    for name in coordinate_check.CHECKS:
        flags = coord_check_flags()
        config = f"--config={study.config_of_size(coordinate_check.FOLDER, size)}"
        assert flags.parse(["--directory=d", config, *coordinate_check.arguments_of(name, size)])
        assert flags.config().model.num_layers >= 2


def case(name, slope, *, expected=True, caught_by=""):
    return {
        "name": name, "steepest": "x", "slopes": {"x": slope}, "standard_errors": {"x": 0.01}, "loss_spread": 0.02,
        "caught_by": caught_by, "is_as_expected": expected,
    }  # fmt: skip


def test_what_is_said_of_coordinate_checks(tmp_path):
    made = {
        "btlm": [case("as configured", 0.05)],
        "sp": [case("as configured", 1.5, expected=False)],
        "btlm over depths": [case("as configured", 0.1)],  # said to be steep
        "btlm, broken": [case("as configured", 0.05), case("logits unscaled", 0.1, caught_by="loss")],
    }
    head = {"ladder": "width", "sizes": [64, 128], "seeds": [0, 1], "steps": 8, "learning_rate": 2.0**-9}
    for name, cases in made.items():
        directory = coordinate_check.folder_of(name, tmp_path)
        directory.mkdir(parents=True)
        (directory / "coord_check.json").write_text(json.dumps({**head, "cases": cases}))
    checks = coordinate_check.gather(tmp_path)
    assert list(checks) == list(made)
    assert [coordinate_check.is_as_expected(name, each) for name, each in checks.items()] == [True, True, False, True]
    rows = coordinate_check.describe(checks).splitlines()[2:]
    assert rows[1].endswith("| +1.50 ± 0.01 | x | 0.02 | not flat |") and rows[2].endswith(
        "flat: **not as expected** |"
    )
    assert rows[3].endswith("flat, 1 of 1 variants as expected |")
    broken = {"btlm": {**checks["btlm"], "slope": None, "standard_error": None, "loss_spread": None, "is_flat": False}}
    row = coordinate_check.describe(broken).splitlines()[-1]
    assert row == "| btlm | 64, 128 | not finite | x | not finite | not flat: **not as expected** |"
    one_seed = {"btlm": {**checks["btlm"], "standard_error": None}}
    assert "| +0.05 | x | 0.02 | flat |" in coordinate_check.describe(one_seed)
    coordinate_check.plot({**checks, **broken}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_checks_of_another_size_are_not_taken_for_this_ones(tmp_path, monkeypatch, capsys):
    """And what a part of the checks says does not go into the repository."""
    commands = []

    def run_verb(arguments):
        commands.append(arguments)
        directory = Path(arguments[2].removeprefix("--directory="))
        directory.mkdir(parents=True)
        head = {"ladder": "width", "sizes": [64, 256], "seeds": [0], "steps": 8, "learning_rate": 0.1}
        (directory / "coord_check.json").write_text(json.dumps({**head, "cases": [case("as configured", 0.05)]}))
        return 0

    monkeypatch.setattr(coordinate_check, "run_verb", run_verb)

    def code_of(*arguments):
        return study.code_of_command("coordinate_check", coordinate_check.conduct, arguments)

    folder = f"--folder={tmp_path / 'checks'}"
    assert code_of(folder, "--quick", "--only=btlm; completep") == 0
    assert code_of(folder, "--quick", "--only=completep") == 0 and len(commands) == 2
    values = json.loads((tmp_path / "checks/results.json").read_text())
    assert list(values["checks"]) == ["btlm", "completep"] and "sp" in values["checks_left_out"]
    assert code_of(folder) == 1 and len(commands) == 2
    assert 'holds another study, of argument="quick", not ""' in capsys.readouterr().err
    committed = (FOLDER / "coordinate_check" / "results.json").read_bytes()
    assert code_of(f"--folder={tmp_path / 'own'}", "--only=btlm") == 0 and (tmp_path / "own/results.json").is_file()
    assert (FOLDER / "coordinate_check" / "results.json").read_bytes() == committed
    for wrong, said in (
        (["--quick", "--large"], "--quick and --large are both given"),
        (["--only=up"], "--only=up: there are btlm; completep"),
    ):
        assert code_of(f"--folder={tmp_path / 'other'}", *wrong) == 2
        error = capsys.readouterr().err
        assert error.startswith("coordinate_check: usage: ") and said in error and error.count("\n") == 1


def test_a_search_of_another_size_or_text_is_refused_and_errors_are_one_line(tmp_path, monkeypatch, capsys):
    def code_of(*arguments):
        return study.code_of_command("search", search.conduct, [f"--folder={tmp_path / 'D'}", *arguments])

    assert code_of("--data", str(tmp_path / "nofile"), "--quick") == 1
    error = capsys.readouterr().err
    assert error.startswith("btlm experiment search: error: ") and "nofile" in error and error.count("\n") == 1
    (tmp_path / "D" / "trials" / "a").mkdir(parents=True)  # as if there was one
    for arguments, said in (
        (["nofile"], 'argument="quick", not ""'),
        (["other", "--quick"], 'text[0]="nofile", not "other"'),
    ):
        assert code_of("--data", *arguments) == 1
        assert said in capsys.readouterr().err
    assert code_of("--quick", "--large") == 2


def test_the_search_and_its_large_config_are_commands(tmp_path):
    flags = search_flags()
    assert flags.parse(search.search_arguments(tmp_path, size="", store=tmp_path)[2:])
    assert flags.integer("points") >= 40 and flags.config().model.vocab_size == 4096
    gain = {"nats": 0.1, "low": 0.05, "high": 0.2}
    key = "mup.init_std"
    values = {
        "search": {
            "rungs": [[0, 1, 2], [0, 1]], "final": [{"values": {}}, {"values": {key: 0.1}}], "gain": gain,
            "fresh": {"seeds": 5, "gain": gain}, "own": {key: 0.073},
            "importance": [{"key": key, "share": 0.5, "low": 0.2, "high": 0.7}],
            "first_rung": [{"loss": 3.0, "values": {key: 0.1}}, {"loss": None, "values": {key: 0.2}}],
        },
        "large": {"parameters": 12_000_000, "steps": 12, "first_loss": 9.0, "last_loss": 8.0},
    }  # fmt: skip
    text = search.describe(values)
    assert text.startswith("2 points, 1 and BTLM's constants on all tokens.\n")
    assert "better than BTLM's constants by +0.1000 nats with 5 fresh seeds, 90 % from +0.0500 to +0.2000" in text
    assert "| mup.init_std | 0.073 | 0.1 | 0.50, 0.20 to 0.70 |" in text
    search.plot(values, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_the_search_that_is_committed_is_what_its_losses_give():
    folder = FOLDER / "search"
    values = json.loads((folder / "results.json").read_text())
    found, flags = values["search"], search_flags()
    assert flags.parse(search.search_arguments(folder, size="", store=folder)[2:])
    counts = {f"num_{name}": flags.integer(name) for name in ("points", "rungs", "seeds")}
    tried = verb.Search(
        config=flags.config(), space=verb.DEFAULT_SPACE, num_fresh=flags.integer("fresh_seeds"),
        method=flags.string("method"), seed=flags.integer("seed"), **counts,
    )  # fmt: skip
    best = found["final"][0]["point"]
    losses = {tried.name_of(each["point"], rung=0, seed=0): each["loss"] for each in found["first_rung"]}
    losses[tried.name_of(0, rung=0, seed=0)] = 0.0  # which is not kept, and decides nothing
    losses |= {tried.name_of(each["point"], rung=1, seed=0): each["loss"] for each in found["final"]}
    for number, name in ((0, "config"), (best, "best")):
        fresh = zip(tried.fresh_seeds, found["fresh"][name], strict=True)
        losses |= {tried.name_of(number, rung=1, seed=seed): loss for seed, loss in fresh}
    results = {name: Result(loss=math.inf if loss is None else loss, seconds=1.0) for name, loss in losses.items()}
    assert not [trial.name for trial in tried.choose(results) if trial.name not in results]
    again = verb.report(tried, results)
    assert again["rungs"] == found["rungs"] and again["is_best_better"] is found["is_best_better"]
    assert search.describe({**values, "search": again}) in (folder / "README.md").read_text()
    assert again["constants"] == pytest.approx(found["constants"])


def test_the_coordinate_checks_that_are_committed_are_in_the_text():
    folder = FOLDER / "coordinate_check"
    text = (folder / "README.md").read_text()
    if not (folder / "results.json").is_file():
        assert "not run yet" in text
        return
    values = json.loads((folder / "results.json").read_text())
    assert coordinate_check.describe(values["checks"]) in text and (folder / "figure.png").is_file()
    missed = {name for name, each in values["checks"].items() if not coordinate_check.is_as_expected(name, each)}
    assert missed == {"muon", "completep over depths"}  # which the text speaks of


def test_the_predictions_that_are_committed_are_those_of_the_results():
    folder = FOLDER / "scaling_law"
    recorded = scaling.recorded_predictions(folder / scaling_law.RECORD)
    outcomes = json.loads((folder / "results.json").read_text())["outcomes"]
    assert {line["form"]: line["sha256"] for line in recorded} == {form: x["sha256"] for form, x in outcomes.items()}
    assert all(each["was_before"] for each in outcomes.values())


def test_records_of_predictions_are_those_of_the_verb(tmp_path):
    """A changed line is refused where the experiment reads it."""
    path = tmp_path / scaling_law.RECORD
    scaling.record(path, {"form": "power", "predicted": {"loss": 3.0}})
    path.write_text(path.read_text().replace("3.0", "3.1"))
    with pytest.raises(ValueError, match="its hash differs"):
        scaling_law.measure(config_of("scaling_law"), tmp_path / "trials" / "target-s0")
