"""The coordinate check: right parametrizations are flat, and every broken one is caught."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from support.tiny import tiny_config

from btlm_jax.cli import main
from btlm_jax.parallel.make_mesh import make_run_mesh
from btlm_jax.parallel.mesh import batch_sharding
from btlm_jax.recipe.mup import make_parametrization
from btlm_jax.train.program import Program, make_program
from btlm_jax.tune.coord_check import (
    DEPTH,
    DEPTH_LIMITS,
    FULL,
    JUDGED_OVER_DEPTHS,
    LIMITS,
    CaseResult,
    Design,
    _Checked,
    at_width,
    config_at,
    coord_check,
    design_for,
    make_batch,
)
from btlm_jax.tune.coord_report import format_table, report_coord_check, to_json, write_plot
from btlm_jax.tune.mutations import BROKEN, BTLM, CASES, NO_OUTPUT_SCALE, OWN, Case
from btlm_jax.tune.optimizer_check import forward_error, optimizer_error

HIDDEN = BROKEN[-1]  # of those that only the optimizer's check sees


def result(case: Case, *, slope: float, spread: float, error: float = 0.0, design: Design = FULL) -> CaseResult:
    """A made-up measurement of two seeds with this slope and spread."""
    x = np.log2(design.sizes)
    rows = {"flat one": 0 * x, "tilted one": 3 + slope * x, "change of logits at step 3": 9 * x}
    statistics = {name: tuple((v - 0.1, v + 0.1) for v in values.tolist()) for name, values in rows.items()}
    losses = (4.0 + spread, *[4.0] * (len(x) - 1))
    return CaseResult(case=case, design=design, statistics=statistics, losses=losses, exact_error=error)


@pytest.mark.parametrize(
    ("case", "slope", "spread", "error", "expected"),
    [
        (BTLM, 0.11, 0.1, 0.0, True),
        (BTLM, -0.13, 0.1, 0.0, False),
        (BTLM, 0.0, 0.13, 0.0, False),
        (BTLM, 0.0, 0.0, 0.01, False),
        (BTLM, np.nan, 0.0, 0.0, False),
        (BTLM, 0.0, np.nan, 0.0, False),
        (NO_OUTPUT_SCALE, 0.24, 0.29, 0.0, False),
        (NO_OUTPUT_SCALE, 0.24, 0.29, 1.0, False),  # the activations and losses must show it
        (NO_OUTPUT_SCALE, -0.26, 0.0, 0.0, True),
        (NO_OUTPUT_SCALE, 0.0, 0.31, 0.0, True),
        (NO_OUTPUT_SCALE, np.nan, 0.0, 0.0, True),
        (HIDDEN, 0.0, 0.0, 0.01, True),
        (HIDDEN, 0.0, 0.0, 0.0, False),
    ],
)
def test_verdict(case, slope, spread, error, expected):
    found = result(case, slope=slope, spread=spread, error=error)
    assert found.is_as_expected == expected
    if np.isfinite(slope):
        assert found.slopes == pytest.approx({"flat one": 0.0, "tilted one": slope, "change of logits at step 3": 9.0})
        assert found.errors == pytest.approx(dict.fromkeys(found.slopes, 0.0), abs=1e-12)


@pytest.mark.parametrize(("slope", "expected"), [(-0.08, True), (0.73, False), (np.nan, False)])
def test_over_depths_the_last_layers_residual_is_judged_and_no_mean_over_layers(slope, expected):
    design = dataclasses.replace(FULL, ladder=DEPTH, sizes=(2, 4, 8), limits=DEPTH_LIMITS)
    found = result(OWN, slope=9.0, spread=0.05, design=design)
    judged = tuple((slope * value,) for value in np.log2(design.sizes))
    found = dataclasses.replace(found, statistics={**found.statistics, JUDGED_OVER_DEPTHS: judged})
    assert found.is_as_expected == expected and found.worst == JUDGED_OVER_DEPTHS
    assert not found.is_judged("tilted one") and "tilted one" in found.slopes


def test_updates_by_muon_are_shown_and_not_judged():
    found = result(BTLM, slope=0.05, spread=0.0)
    statistics = {**found.statistics, "update of mlp_in at step 1": found.statistics["change of logits at step 3"]}
    found = dataclasses.replace(found, statistics=statistics)
    optimizer = dataclasses.replace(FULL.config.optimizer, hidden_optimizer="muon")
    muon = dataclasses.replace(FULL, config=dataclasses.replace(FULL.config, optimizer=optimizer))
    assert not found.is_as_expected and dataclasses.replace(found, design=muon).is_as_expected


def test_the_error_of_a_slope_is_that_of_its_seeds():
    steep = tuple((value, 3 * value) for value in np.log2(FULL.sizes).tolist())
    found = CaseResult(case=BTLM, design=FULL, statistics={"one": steep}, losses=(1.0,) * 3, exact_error=0.0)
    assert found.slopes == pytest.approx({"one": 2.0})
    assert found.errors == pytest.approx({"one": math.sqrt(2) / math.sqrt(2)})


def test_one_seed_has_no_standard_error():
    design = dataclasses.replace(FULL, seeds=(0,))
    steep = tuple((0.13 * value,) for value in np.log2(FULL.sizes).tolist())
    found = CaseResult(case=BTLM, design=design, statistics={"one": steep}, losses=(1.0,) * 3, exact_error=0.0)
    assert found.errors == {"one": None} and not found.is_undecided and not found.is_flat
    text = format_table([found])
    assert "of one seed: no standard error:\n" in text and "+-" not in text
    assert to_json([found])["cases"][0]["standard_errors"] == {"one": None}


def test_a_wrong_case_fails_the_table_by_name():
    right, wrong = result(BTLM, slope=0.0, spread=0.0), result(NO_OUTPUT_SCALE, slope=0.1, spread=0.0)
    hidden = result(HIDDEN, slope=0.0, spread=0.0, error=0.1)
    assert format_table([right]).endswith("passed: all 1 cases are as expected")
    assert format_table([right, wrong]).endswith("failed: logits unscaled")
    assert "not by activations or loss: Adam eps / m\n" in format_table([right, hidden])


def test_plot_is_a_png(tmp_path):
    write_plot([result(case, slope=0.1, spread=0.0) for case in CASES[:3]], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


@pytest.mark.parametrize(
    "change",
    [{"sizes": (64,)}, {"sizes": (64, 100)}, {"sizes": (64, 64)}, {"cases": ()}, {"seeds": ()}, {"num_steps": 0}],
)
def test_a_senseless_design_is_refused(change):
    with pytest.raises(ValueError):
        dataclasses.replace(FULL, **change)


def program_at(case: Case, size: int, design: Design = FULL, *, num_devices: int = 1) -> Program:
    config = config_at(design, case, size)
    devices = jax.devices("cpu")[:num_devices]
    return make_program(config, make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=devices))


@pytest.mark.slow
def test_the_optimizer_check_tells_wrong_rates_decays_and_epsilons():
    """Of every case; the initialization and the forward multipliers are not the optimizer's."""
    blind = {"hidden init unscaled", "logits unscaled", "logits / sqrt(m)", "embedding init / sqrt(m)"}
    programs = {}
    for case in CASES:
        if case.wide_heads:
            continue
        program = programs.setdefault(case.preset, None) or program_at(case, 256)
        programs[case.preset] = program
        error = optimizer_error(program.config, _Checked.make(case, program, num_steps=1).rules)
        is_right = case.is_flat or case.name in (*blind, "sp")
        assert (error < 1e-6) if is_right else (error > 0.01), (case.name, error)


def test_forward_multipliers_are_held_to_the_papers_tables():
    """Of every preset where head width, depth and width differ from the base's; a broken one is off by its factor."""
    for preset in ("btlm", "completep", "sp"):
        config = tiny_config(model__num_layers=6, mup__preset=preset, mup__base_d_model=10.0)  # m = 4, heads 10 wide
        right = make_parametrization(config.mup, config.model)
        assert forward_error(config, right) < 1e-12
        wrong = [case for case in BROKEN if case.forward(right) != right]
        errors = {case.name: forward_error(config, case.forward(right)) for case in wrong}
        root = config.model.head_dim ** (0.25 if preset == "sp" else 0.5)
        expected = {"attention / sqrt(d)": root - 1}
        if preset != "sp":  # whose m is 1
            expected |= {"logits unscaled": 3.0, "logits / sqrt(m)": 1.0}
        assert errors == pytest.approx(expected, rel=1e-9)


def test_a_config_s_heads_stay_and_scores_are_checked_exactly():
    design = design_for(tiny_config(), num_devices=1, mutate=True)
    assert not any(case.wide_heads for case in design.cases)
    (scores,) = (case for case in design.cases if case.name == "attention / sqrt(d)")
    assert not result(scores, slope=0.3, spread=0.0, error=0.5).is_as_expected  # not by a slope: heads do not grow
    assert result(scores, slope=0.0, spread=0.0, error=0.5).caught_by == "exact check"
    assert result(scores, slope=0.0, spread=0.0, error=0.5).is_as_expected


def test_a_slope_near_the_limit_is_said_to_be_undecided():
    near = result(BTLM, slope=0.13, spread=0.0)
    x = np.log2(FULL.sizes)
    scattered = {"tilted": tuple((0.03 * v, 0.23 * v) for v in x.tolist())}  # slopes 0.03 and 0.23: 0.13 +- 0.1
    found = dataclasses.replace(near, statistics=scattered)
    assert found.is_undecided and not found.is_as_expected and not near.is_undecided
    assert "not decided; give more --seeds: btlm\n" in format_table([found])


@pytest.mark.parametrize("convention", ["independent", "coupled"])
def test_the_optimizer_check_knows_conventions_of_decay(convention):
    optimizer = dataclasses.replace(FULL.config.optimizer, weight_decay_convention=convention)
    design = dataclasses.replace(FULL, config=dataclasses.replace(FULL.config, optimizer=optimizer))
    for case in CASES[:2]:  # btlm, completep
        assert optimizer_error(config_at(design, case, 128), program_at(case, 128, design).table) < 1e-6


def test_a_design_of_a_config_begins_at_the_base_width_in_whole_heads():
    config = tiny_config(model__num_heads=4, mup__base_d_model=33.0)  # heads 10 wide
    design = design_for(config, num_devices=8)
    assert design.sizes == (40, 80, 160) and design.config.model.num_layers == 2
    assert design.config.curriculum.batch_size == (8,) and design.cases == (OWN,)
    assert design_for(config, num_devices=8, ladder=DEPTH).sizes == (2, 4, 8)
    assert len(design_for(config, num_devices=1, mutate=True).cases) == len(BROKEN) + 1
    plain = design_for(tiny_config(optimizer__weight_decay=0.0), num_devices=1, mutate=True)
    assert not [case.name for case in plain.cases if "decay" in case.name]
    muon = design_for(tiny_config(optimizer__hidden_optimizer="muon"), num_devices=1, mutate=True)
    assert not [case.name for case in muon.cases if "LR unscaled" in case.name] and len(muon.cases) == len(BROKEN) - 6
    assert at_width(config.model, 80).d_ff == 108
    with pytest.raises(ValueError, match="heads are 10 wide, so give a multiple of 10"):
        at_width(config.model, 84)


@pytest.mark.slow
def test_the_checked_step_is_the_trainers():
    """Losses of the check's step, sharded, are those of the step that `btlm train` compiles.

    Logits are so large that tokens which do not occur have next to no gradient: their rows are not judged.
    """
    config = tiny_config(
        model__num_layers=1, model__remat="none", model__attention="reference", mup__output_multiplier=300.0
    )
    design = design_for(config, num_devices=2)
    found = _Checked.make(OWN, program_at(OWN, 40, design, num_devices=2), num_steps=1)
    program, (phase,) = found.program, found.program.config.curriculum.table.phases
    trainers = program.compile(program.trace_train_step(phase))
    losses = {}
    with jax.set_mesh(program.mesh):
        batch = jax.device_put(
            make_batch(program.config, seed=0), batch_sharding(program.mesh, program.rules_for(phase))
        )
        for name, step in {"trainer": trainers, "check": found.step}.items():
            state = jax.device_put(
                found.begin(found.initial(found.rules, found.draw(0))),
                jax.tree.map(lambda leaf: leaf.sharding, program.state),
            )
            more = () if name == "trainer" else (found.multipliers(found.rules),)
            for _ in range(3):
                state, metrics = step(state, batch, np.float32(2.0**-7), *more)
                losses.setdefault(name, []).append(float(metrics["loss"]))
    assert losses["check"] == pytest.approx(losses["trainer"], rel=1e-6)
    assert losses["check"][2] < losses["check"][0] - 0.1
    update = found.run(found.rules, found.draw(0), seed=0, learning_rate=2.0**-7)["update"]
    assert update["embedding"] == pytest.approx(2.0**-7, rel=0.05)


def test_the_recipe_is_flat_and_a_wrong_rate_is_caught():
    """The core of `btlm tune coord-check`: one program a width serves the recipe and everything wrong in its rules."""
    cases = tuple(case for case in CASES if case.name in ("btlm", "mlp_out LR unscaled"))
    design = dataclasses.replace(FULL, cases=cases, sizes=FULL.sizes[::2])
    for found in coord_check(design, devices=jax.devices("cpu")[:1]):
        assert found.is_as_expected, format_table([found])


@pytest.mark.slow
def test_the_nearest_broken_one_is_caught(tmp_path):
    """Attention / sqrt(d), which two seeds show. Right wide heads need five: `btlm tune coord-check` judges them.

    A middle one of three widths does not enter a slope.
    """
    cases = tuple(case for case in CASES if case.name == "attention / sqrt(d)")
    design = dataclasses.replace(FULL, cases=cases, sizes=FULL.sizes[::2], seeds=FULL.seeds[:2])
    report = report_coord_check(
        design, directory=tmp_path, devices=jax.devices("cpu")[:1], report_progress=lambda line: None
    )
    assert report.passed, report.table
    assert (tmp_path / "coord_check.txt").read_text() == report.table + "\n"
    values = json.loads((tmp_path / "coord_check.json").read_text())
    assert [case["name"] for case in values["cases"]] == [case.name for case in cases]
    assert values["limits"] == dataclasses.asdict(LIMITS)


def test_flags_that_have_no_effect_are_refused(capsys, tmp_path):
    for arguments, said in (
        (["--widths=64,128"], "--widths goes with --config"),
        (["--config=local_cpu", "--widths=64,x"], "must be whole numbers"),
        (["--config=local_cpu", "--widths=64,128", "--depths=2,4"], "one of them grows"),
        (["--config=local_cpu", "--depths=2,4", "--mutate"], "--mutate has no effect with --depths"),
        (["--config=local_cpu", "--depths=2,4", "--num_layers=2"], "--num_layers has no effect with --depths"),
        (["--config=local_cpu", "--seeds=0"], "--seeds=0 must be at least 1"),
    ):
        assert main(["tune", "coord-check", f"--directory={tmp_path}", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert main(["tune", "coord-check", f"--directory={tmp_path}", "--config=local_cpu", "--widths=256,300"]) == 1
    assert "heads are 64 wide" in capsys.readouterr().err
