"""What a run on TPUs or GPUs says of its steps' times before the first one, and holds them against."""

import dataclasses
import json
import re
import statistics

import jax
import pytest
from support.real_store import write_config
from support.run_command import ONE_PHASE, TOKENS_PER_STEP, train_arguments
from support.run_here import run_here
from support.tiny import tiny_config

from btlm_jax.cli import main
from btlm_jax.cli import train as train_command
from btlm_jax.plan import run_prediction
from btlm_jax.plan.calibration import Parts, Point, keep_points
from btlm_jax.plan.chips import slice_devices
from btlm_jax.plan.gpus import GPUS, StandIn, answering_for
from btlm_jax.plan.run_prediction import predict_steps
from btlm_jax.plan.slice_plan import program_on
from btlm_jax.train import METRICS_FILE, SUMMARY_FILE
from btlm_jax.train.metric_writer import read_metrics
from btlm_jax.train.setup import StepPrediction

CONFIG = tiny_config(model__dtype="bfloat16", mesh__accumulation=2)


@pytest.fixture(autouse=True)
def without_the_plugin(monkeypatch):
    for module in ("gpus", "slice_plan", "compiling"):
        monkeypatch.setattr(f"btlm_jax.plan.{module}.has_cuda_plugin", lambda: False)


def predicted(devices: list, tmp_path, *, config=CONFIG) -> StepPrediction:
    with answering_for(GPUS["h100"]):
        program = program_on(config, devices)
        traced = [program.trace_train_step(phase) for phase in config.curriculum.table.phases]
    return predict_steps(program, traced, config_file=tmp_path / "config.py", measured=tmp_path / "measured")


def test_gpus_are_predicted_as_btlm_plan_does(tmp_path, capsys):
    changes = dict(model__dtype="bfloat16", model__vocab_size=300, mesh__accumulation=2)
    config = write_config(tmp_path / "config.py", store="store", **changes)
    plan = tmp_path / "plan.json"
    assert main(["plan", f"--config={config}", "--topology=h200-4", f"--json={plan}", f"--cache={tmp_path}"]) == 0
    capsys.readouterr()
    found = predicted(slice_devices("h200:4"), tmp_path)
    phases = json.loads(plan.read_text())["phases"]
    assert found.seconds == pytest.approx([phase["step_central"] for phase in phases])
    assert found.topology == "h200-4"
    first, rest = found.said.split("\n")
    values = [float(value) for value in re.findall(r"([\d.e-]+) s \(([\d.e-]+) to ([\d.e-]+)\)", first)[0]]
    assert values == pytest.approx([phases[0]["step_central"], *phases[0]["step_seconds"]], rel=6e-3)
    assert first.startswith("Predicted, not measured, on 4 x h200: ") and " a step of 16 x 24, MFU " in first
    assert "over NVLink in machines of 8" in rest and rest.endswith("of 8 in all, none of this model")


def test_steps_of_ones_own_take_the_place_of_published_runs(tmp_path):
    devices = slice_devices("h100:1")
    before = predicted(devices, tmp_path)
    factor = float(re.search(r"x ([\d.]+) by 4 published runs", before.said)[1])
    roofline = before.seconds[0] / factor
    parts = Parts(**{field.name: roofline * (field.name == "slowest") for field in dataclasses.fields(Parts)})
    mine = Point(name="mine", chip="h100", measured=3 * roofline, parts=parts, hfu=0.1)
    keep_points([mine], directory=tmp_path / "measured")
    after = predicted(devices, tmp_path)
    assert "x 3.00 by steps measured here (1 of about this length)" in after.said and "NVLink" not in after.said
    ratios = [b / a for a, b in zip(before.seconds, after.seconds, strict=True)]
    assert ratios == pytest.approx([3 / factor] * 2, rel=4e-3)


def test_gpus_without_figures_or_a_name_are_said(tmp_path):
    other = [StandIn(id=0, device_kind="NVIDIA H100 PCIe", core_count=114)]
    found = predicted(other, tmp_path)
    assert found.said.startswith("The steps' times are not predicted: NVIDIA H100 PCIe is none of NVIDIA H100 80GB")
    assert found.seconds == () and found.topology == ""
    three = [StandIn(id=at, device_kind=GPUS["a100"].kind, core_count=108) for at in range(3)]
    sizes = dict(curriculum__batch_size=(12, 6), curriculum__num_tokens=(1728, 576), model__d_model=48)
    found = predicted(three, tmp_path, config=tiny_config(**sizes))
    assert found.seconds and found.topology == ""  # btlm plan has no machine of three


def test_a_prediction_that_fails_ends_no_run(tmp_path, monkeypatch):
    def fail(program, traced, **named):
        raise KeyError("a primitive")

    monkeypatch.setattr(run_prediction, "predict_steps", fail)
    with answering_for(GPUS["h100"]):
        program = program_on(CONFIG, slice_devices("h100:1"))
    found = train_command._predict_steps(program, [], config_file=tmp_path / "config.py")
    assert found == StepPrediction(said="The steps' times are not predicted: KeyError: 'a primitive'")


def test_the_cpu_in_place_of_an_accelerator_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    with pytest.raises(ValueError, match="JAX_PLATFORMS=cuda,cpu asks for cuda; JAX could not start it"):
        train_command._check_devices(CONFIG, jax.devices(), config_file=tmp_path / "config.py", changes={})
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert train_command._check_devices(CONFIG, jax.devices(), config_file=tmp_path / "config.py", changes={}) == ""


@pytest.mark.slow
def test_a_run_holds_its_steps_against_what_was_predicted(token_store, tmp_path, monkeypatch, capsys):
    one_phase = ONE_PHASE | {"curriculum__num_tokens": (14 * TOKENS_PER_STEP,), "checkpoint__every_steps": 14}
    config, workdir = write_config(tmp_path / "config.py", store=token_store, **one_phase), tmp_path / "run"
    given = StepPrediction(said="Predicted: 0.5 s", seconds=(0.5,), topology="h100-8")
    monkeypatch.setattr(train_command, "_predict_steps", lambda program, traced, config_file: given)
    assert run_here(*train_arguments(config, workdir)) == 0
    said = capsys.readouterr().out
    assert said.index("Predicted: 0.5 s") < said.index("Compiled 1 phases")
    rows = [row for row in read_metrics(workdir / METRICS_FILE) if row["kind"] == "train"]
    assert [row["seconds_over_predicted"] for row in rows] == [row["seconds"] / 0.5 for row in rows]
    median = statistics.median(row["seconds"] for row in rows[3:])
    (step,) = json.loads((workdir / SUMMARY_FILE).read_text())["steps"]["phases"]
    assert step == {"phase": 1, "seconds": median, "seconds_over_predicted": median / 0.5}
    assert f"A step took {median:.3g} s in phase 1, {median / 0.5:.2f} times what was predicted" in said
    assert f"btlm plan --measured={workdir} --topology=h100-8" in said
