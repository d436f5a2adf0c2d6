"""The search for a layout: it finds what trying everything finds, with fewer compilations, and can be interrupted."""

import ast
import dataclasses
import json
import math
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import pytest
from support.imagined_plan import KEPT, imagined
from support.tiny import REPOSITORY, config_dict
from support.tpu import needs_libtpu, quickly_compiled  # noqa: F401

from btlm_jax.cli import main
from btlm_jax.plan import search
from btlm_jax.plan.chips import CHIPS, GIB
from btlm_jax.plan.compiling import CompileCache, NoCompilationsLeftError
from btlm_jax.plan.layout import MeshLayout
from btlm_jax.plan.search_report import format_search
from btlm_jax.plan.slice_plan import DoesNotFit
from btlm_jax.recipe.config import REMATS, MeshConfig, train_config_from
from btlm_jax.train.memory import whole_state_bytes
from btlm_jax.train.program import Program

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CONFIG = train_config_from(config_dict("btlm_3b_8k"))
CHIP = CHIPS["v5e"]
DEVICES = [types.SimpleNamespace(device_kind="TPU v5 lite")] * 32


def search_imagined(config=CONFIG, *, compiling=imagined):
    said = []
    with (
        mock.patch.object(search, "slice_devices", return_value=DEVICES),
        mock.patch.object(search, "plan_fitting_phases", side_effect=compiling) as compiled,
    ):
        found = search.search_layouts(
            config,
            topology="v5e:4x8",
            cache=CompileCache(directory=Path(), max_compiles=math.inf),
            report_progress=said.append,
        )
    return found, compiled.call_count, said


def test_it_finds_what_trying_everything_finds_with_fewer_compilations():
    found, num_compiled, said = search_imagined()
    every = [guess.layout for guess in search.promising_layouts(CONFIG, chip=CHIP, devices=DEVICES)]
    plans = [imagined(layout.applied_to(CONFIG), topology="v5e:4x8") for layout in every]
    roomy = [plan for plan in plans if plan.works and plan.spare >= search.SPARE]
    assert found.best == min(roomy, key=lambda plan: sum(plan.seconds))
    assert found.best.layout.flags in format_search(found).splitlines()[-1]
    assert len(found.tried) == num_compiled < len(every) / 30
    assert {plan.layout for plan in found.tried} | {skip.layout for skip in found.skipped} == set(every)
    assert any(plan.misfits for plan in found.tried)
    assert said[0].startswith("1. mesh.tensor=1 ") and "compilations to go" in said[0]
    # What was held to be too large is, and what was held to be slower is.
    for skip in found.skipped:
        plan = imagined(skip.layout.applied_to(CONFIG), topology="v5e:4x8")
        slower = plan.misfits or sum(plan.seconds) > sum(found.best.seconds)
        assert plan.misfits if skip.reason == "too large" else slower


@pytest.mark.slow
def test_the_best_leaves_a_tenth_if_any_does_and_otherwise_that_is_said():
    def tight(config, **options):
        plan = imagined(config, **options)
        for phase in plan.phases:
            object.__setattr__(phase.memory, "temporaries", int(CHIP.hbm_bytes * 0.95))
        return plan

    found, *_ = search_imagined(compiling=tight)
    assert found.best.spare == pytest.approx(0.05) and "None leaves 10% of a chip's memory" in format_search(found)
    assert all(skip.reason != "slower" for skip in found.skipped)


def test_what_does_not_compile_is_no_layout_but_ends_nothing():
    def broken(config, **options):
        if len(calls) == 6:
            raise NoCompilationsLeftError("that was enough")
        calls.append(config)
        return dataclasses.replace(imagined(config, **options), phases=(), misfits=(), obstacles=("Mosaic failed",))

    calls = []
    found, *_ = search_imagined(compiling=broken)
    assert found.best is None and len(found.tried) == 6
    assert format_search(found).count("Mosaic failed") == 6 and "None of these fits" in format_search(found)


def test_out_of_compilations_the_rest_is_named():
    calls = []

    def limited(config, **options):
        calls.append(config)
        if len(calls) > 2:
            raise NoCompilationsLeftError("--max_compiles=2 compilations have been made")
        return imagined(config, **options)

    found, *_ = search_imagined(compiling=limited)
    assert len(found.tried) == 2
    assert "not reached" in {skip.reason for skip in found.skipped}
    assert "(--max_compiles=2 compilations have been made)" in format_search(found)


def test_a_slice_that_nothing_divides_has_its_problems_said():
    values = config_dict("btlm_3b_8k")
    values["evaluation"]["batch_size"] = 7
    values["model"]["num_heads"] = 20
    found, num_compiled, _ = search_imagined(train_config_from(values))
    assert num_compiled == 0 and found.best is None
    assert "PROBLEM: evaluation.batch_size=7 is not divisible by 32" in format_search(found)


def test_meshes_that_only_an_evaluation_does_not_divide_are_said():
    for rows, said in ((480, False), (16, True)):
        evaluation = dataclasses.replace(CONFIG.evaluation, batch_size=rows)
        _, _, lines = search_imagined(dataclasses.replace(CONFIG, evaluation=evaluation))
        assert lines[0].endswith("to try them, --config.evaluation.batch_size=480") == said


def layout(accumulation: int, remat: str, *, tensor: int = 1, context: int = 2) -> MeshLayout:
    return MeshLayout(mesh=MeshConfig(tensor=tensor, context=context, accumulation=accumulation), remat=remat)


def test_memory_grows_with_the_micro_batch_with_what_is_kept_and_with_copies_of_the_state():
    base = layout(3, "matmuls_saved")
    for other in (layout(1, "matmuls_saved"), layout(3, "none"), layout(3, "matmuls_saved", context=4), base):
        assert other.relative_memory(base) == 1
    assert layout(15, "none").relative_memory(base) == 3 / 15
    for other in (layout(5, "full"), layout(1, "full"), layout(1, "none", tensor=2), layout(1, "none", context=1)):
        assert other.relative_memory(base) == 0


def test_time_grows_with_micro_batches_with_recomputing_and_with_positions_split():
    base = layout(3, "matmuls_saved")
    for other in (layout(5, "matmuls_saved"), layout(3, "full"), layout(3, "matmuls_saved", context=4), base):
        assert other.trades_speed_for_memory(base)
    for other in (layout(1, "full"), layout(5, "none"), layout(3, "full", tensor=2), layout(3, "full", context=1)):
        assert not other.trades_speed_for_memory(base)


@pytest.mark.parametrize("needed, is_skipped", [(48, True), (46, False)])
def test_more_micro_batches_divide_what_is_needed_at_best(needed, is_skipped):
    """With 5 of them what needs 48 GiB needs at least 16 of 15.75 GiB with 15."""

    tried = imagined(layout(5, "full").applied_to(CONFIG), topology="v5e:4x8")
    too_large = DoesNotFit(phase=CONFIG.curriculum.table.phases[0], program="", needed=needed * GIB, available=0)
    tried = dataclasses.replace(tried, phases=(), misfits=(too_large,))
    now, then = (search.Guess(layout=layout(number, "full"), seconds=1.0) for number in (5, 15))
    assert (search._skip_after(now, tried, then) is not None) == is_skipped


@pytest.mark.parametrize(
    ("changes", "gib"),  # of 2.65e9 parameters in float32: two moments, one for 2.5e9 of them, none
    [({}, 29.57), ({"hidden_optimizer": "muon"}, 20.20), ({"freeze": "attention_*,mlp_*"}, 10.83)],
)
def test_the_least_of_a_chip_is_below_its_state_and_activations(changes, gib):
    model = dataclasses.replace(CONFIG.model, attention="gpu")  # of no device here
    config = dataclasses.replace(CONFIG, model=model, optimizer=dataclasses.replace(CONFIG.optimizer, **changes))
    state = whole_state_bytes(config, jax.devices()[0])
    assert state / GIB == pytest.approx(gib, abs=0.01)
    kept = 480 * 8192 // 15 * CONFIG.model.num_layers * CONFIG.model.d_model * 2  # what comes into each layer
    least = search.least_bytes(config, layout(15, "full", context=1), state=state, num_chips=32)
    assert 32 * least == pytest.approx(state + kept * ("freeze" not in changes), abs=32)


def test_remats_are_ordered_by_what_they_keep():
    assert KEPT.keys() == search.KEPT.keys() == search._COMPUTED_AGAIN.keys() == set(REMATS)
    assert sorted(REMATS, key=KEPT.get) == list(REMATS)


SIZES = {
    "model.num_layers": 1, "model.loss_chunk": 512, "model.vocab_size": 50257, "curriculum.seq_len": "(512,)",
    "curriculum.batch_size": "(2048,)", "curriculum.num_tokens": "(1048576,)",
}  # fmt: skip


SIZE_FLAGS = [f"--config.{name}={value}" for name, value in SIZES.items()]


def search_command(folder, *arguments) -> tuple[int, dict]:
    """Run the command; return its exit code and its JSON."""
    words = ["plan", f"--config={REPOSITORY / 'configs' / 'local_cpu.py'}", "--topology=v5e:2x2", "--search"]
    words += SIZE_FLAGS
    words += [f"--json={folder / 'search.json'}", f"--cache={folder / 'cache'}", *arguments]
    with mock.patch.object(sys, "argv", ["btlm", *words]):  # config_flags looks there for what to change
        code = main(words)
    return code, json.loads((folder / "search.json").read_text())


def test_the_outlook_is_of_the_compilations_allowed_and_of_those_made():
    cache = CompileCache(directory=Path(), max_compiles=12)
    assert cache.outlook(layouts=4, phases=2) == "at most 8 compilations to go"
    cache.num_compiled, cache.seconds = 3, 360.0
    assert cache.outlook(layouts=40, phases=2) == "3 compilations made, at most 9 to go, about 18 min"


@needs_libtpu
@pytest.mark.slow
def test_interrupted_it_goes_on_with_what_did_not_fit(capsys, tmp_path):
    code, found = search_command(tmp_path, "--max-compiles=1")
    assert "at most 1 compilations to go" in capsys.readouterr().err and len(found["tried"]) == 1
    misfits = [plan for plan in found["tried"] if plan["misfits"]]
    assert misfits and all(plan["problems"][0].startswith("phase 1 (2,048 x 512) does not fit") for plan in misfits)
    values = config_dict("local_cpu")
    for name, value in SIZES.items():
        section, key = name.split(".")
        values[section][key] = ast.literal_eval(value) if str(value).startswith("(") else value
    for plan in misfits:  # the bound is one, and not an empty one
        layout = MeshLayout(mesh=MeshConfig(**plan["mesh"]), remat=plan["remat"])
        config = train_config_from(values)
        state = whole_state_bytes(config, jax.devices()[0])
        least = search.least_bytes(config, layout, state=state, num_chips=4)
        assert least < plan["misfits"][0]["needed"] < 10 * least
    with mock.patch.object(Program, "compile", side_effect=AssertionError("the cache has it")):
        again_code, again = search_command(tmp_path, "--max-compiles=0")
    assert again_code == code and again["tried"] == found["tried"]
    assert "not reached" in {skip["reason"] for skip in again["skipped"]} <= {"not reached", "too large"}
    capsys.readouterr()
    words = ["plan", f"--config={REPOSITORY / 'configs' / 'local_cpu.py'}", "--topology=v5litepod-4", *SIZE_FLAGS]
    words += [*flags_of(misfits[0]).split(), f"--cache={tmp_path / 'cache'}"]
    with (
        mock.patch.object(sys, "argv", ["btlm", *words]),
        mock.patch.object(Program, "compile", side_effect=AssertionError("the cache has it")),
    ):
        assert main(words) == 1
    said = capsys.readouterr().out
    assert "PROBLEM: phase 1 (2,048 x 512) does not fit: it needs" in said and "GiB too much; try more" in said


@needs_libtpu
def test_the_command_prints_flags_that_fit(capsys, tmp_path):
    with mock.patch.object(search, "plan_fitting_phases", side_effect=imagined):
        code, found = search_command(tmp_path)
    assert code == 0 and capsys.readouterr().out.endswith(found["best_flags"] + "\n")
    (plan,) = (plan for plan in found["tried"] if found["best_flags"] == flags_of(plan))
    assert plan["works"] and plan["run"]["days"] and not plan["misfits"]


def flags_of(plan: dict) -> str:
    return MeshLayout(mesh=MeshConfig(**plan["mesh"]), remat=plan["remat"]).flags
