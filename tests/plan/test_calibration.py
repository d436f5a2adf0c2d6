"""The calibration of plans: its arithmetic by hand, the published runs as checked in, and runs of one's own."""

import dataclasses
import json
import math
import re
import runpy

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.imagined_plan import imagined, parts_of
from support.measured_run import write_run
from support.tiny import REPOSITORY
from support.tpu import needs_libtpu

from btlm_jax.plan import calibration, own_runs
from btlm_jax.plan.calibration import (
    Correction,
    Point,
    best_published_hfu,
    correction_of,
    keep_points,
    kept_points,
    left_out,
)
from btlm_jax.plan.chips import CHIPS, slice_devices
from btlm_jax.plan.estimate import StepTime
from btlm_jax.plan.executable import ELEMENTWISE, PRODUCT, read_executable
from btlm_jax.storage.files import read_json_object

CONTENT = read_json_object(calibration.CALIBRATION_FILE)
FROZEN, MOST_ERROR = "6a811c56ab91", 0.1  # its hash; nats
KINDS = {PRODUCT: 34_140, ELEMENTWISE: 52_369}  # cycles, libtpu 0.0.42.1
POD_TABLE = json.loads((REPOSITORY / "configs" / "pods" / "table.json").read_text())


def point(chip: str, measured: float, **parts: float) -> Point:
    return Point(name=f"{chip} {measured}", chip=chip, measured=measured, parts=parts_of(1.0, **parts), hfu=0.5)


@pytest.fixture
def three_runs(monkeypatch):
    """Two runs on one chip, 1.2 and 1.5 times their roofline of 1 s, and one on another, 2 times after 1 s alone."""
    runs = (point("v5e", 1.2), point("v5e", 1.5), point("v5p", 3.0, exposed=1.0))
    monkeypatch.setattr(calibration, "published_points", lambda: runs)
    return runs


def test_the_factor_is_the_mean_of_a_chips_runs_and_the_error_that_of_leaving_one_out(three_runs):
    found, of_all = correction_of("v5e"), (1.2 * 1.5 * 2.0) ** (1 / 3)
    assert found.factor == pytest.approx((1.2 * 1.5 * of_all) ** (1 / 3))
    assert correction_of("v5p").factor == pytest.approx(math.sqrt(2.0 * of_all))
    # Each by the others: its chip's and the mean of all; and the one of the other chip by that mean, after its second.
    by_others = [math.sqrt(1.5 * math.sqrt(1.5 * 2)), math.sqrt(1.2 * math.sqrt(1.2 * 2)), 1 + math.sqrt(1.2 * 1.5)]
    assert [predicted for _, predicted in left_out(three_runs)] == pytest.approx(by_others)
    logs = [math.log(run.measured / seconds) for run, seconds in zip(three_runs, by_others, strict=True)]
    assert found.error == pytest.approx(math.expm1(math.sqrt(sum(each**2 for each in logs) / 3)))
    assert correction_of("v5p").error == found.error


def test_a_chip_without_runs_has_the_error_of_leaving_out_a_chip(three_runs):
    found = correction_of("v4")
    assert found.factor == pytest.approx((1.2 * 1.5 * 2.0) ** (1 / 3)) and "other chips" in found.source
    logs = [math.log(1.2 / 2), math.log(1.5 / 2), math.log(2 / math.sqrt(1.8))]
    assert found.error == pytest.approx(math.expm1(math.sqrt(sum(each**2 for each in logs) / 3)))
    assert found.error > correction_of("v5e").error


def test_a_step_is_the_corrected_roofline_and_what_nothing_hides():
    parts = parts_of(2.0, attention=1.0, negligible=0.5, unestimated=0.25, exposed=0.125, asynchronous=4.0)
    step = StepTime(parts=parts, correction=Correction(factor=2.0, error=0.25, source=""))
    waited = 4.0 - (2.0 + 1.0 + 0.25)
    assert step.central == pytest.approx(2.0 * 3.25 + 0.125 + waited)
    assert step.windowed == pytest.approx(2.0 * 2.75 + 0.125 + waited)
    assert (step.low, step.high) == pytest.approx((step.central / 1.25, step.central * 1.25))
    assert step.compiler == pytest.approx(3.25 + 0.125 + waited)
    held = dataclasses.replace(step, at_best_hfu=10.0)
    assert (held.central, held.windowed) == (10.0, pytest.approx(10.0 - 2.0 * 0.5))
    assert dataclasses.replace(step, at_best_hfu=step.central / 2).central == step.central


def test_the_best_hfu_known_is_the_published_one_or_a_greater_one_of_ones_own(monkeypatch):
    monkeypatch.setattr(calibration, "best_published_hfu", {"v5e": 0.6}.get)
    own = [dataclasses.replace(point("v5e", 1.0), hfu=hfu) for hfu in (0.5, 0.7)]
    assert [calibration.best_known_hfu("v5e", own=own[:count]) for count in range(3)] == [0.6, 0.6, 0.7]
    assert calibration.best_known_hfu("v4", own=[]) is None and calibration.best_known_hfu("v4", own=own[:1]) == 0.5


def test_a_run_that_was_faster_than_its_planned_exchanges_has_a_ratio_too():
    assert point("v5e", 3.0, exposed=1.0).ratio == 2.0 and point("v5e", 3.0, exposed=5.0).ratio == 1.5


def test_ones_own_steps_replace_the_published_ones(three_runs, tmp_path):
    own = [point("v5e", 1.1), point("v5e", 1.3)]
    keep_points([*own, point("v5p", 9.0)], directory=tmp_path)
    keep_points(own, directory=tmp_path)
    kept = kept_points("v5e", directory=tmp_path)
    assert sorted(kept, key=lambda each: each.measured) == own
    found = correction_of("v5e", own=kept, roofline=3.9)
    assert (
        found.factor == pytest.approx(math.sqrt(1.1 * 1.3))
        and found.source == "steps measured here (2 of about this length)"
    )
    assert found.error == pytest.approx(math.sqrt(1.3 / 1.1) - 1)
    assert correction_of("v5e", own=own[:1], roofline=0.26).error == 0.05
    for roofline in (0.24, 4.1):
        unlike = correction_of("v5e", own=own, roofline=roofline)
        assert (unlike.factor, unlike.error) == (correction_of("v5e").factor, correction_of("v5e").error)
        assert unlike.source.endswith("; of 2 measured here none is of about this length")
    path = next(tmp_path.glob("v5e-*"))
    path.write_text(path.read_text().replace('"measured"', '"took"'))
    with pytest.raises(ValueError, match=re.escape(f"{path} is no measured step that this version wrote")):
        kept_points("v5e", directory=tmp_path)


def test_a_run_is_measured_by_its_workdir(tmp_path):
    write_run(tmp_path / "run", steps=20 + 12)  # of the second phase one too few
    run = own_runs.read_own_run(tmp_path / "run")
    assert (run.chip.name, run.num_chips, run.seconds) == ("v5e", 4, {0: 2.0})
    own_runs.check_slice(run, topology="v5e:2x2")
    with pytest.raises(ValueError, match="ran on 4 chips of v5e; --topology=v5e:2x4 has 8 of v5e"):
        own_runs.check_slice(run, topology="v5e:2x4")
    plan = imagined(run.config, topology="v5e:2x2")
    if not plan.works:
        pytest.fail("the imagined plan is too large")
    (found,) = own_runs.measured_points(run, plan)
    assert (found.measured, found.chip, found.hfu) == (2.0, "v5e", 40 / 2 / 2)
    assert f"2.000 s a step, {2.0 / plan.phases[0].step_time.central:.2f} times the" in own_runs.format_measured(
        [found], plan
    )


@pytest.mark.parametrize(
    "event", [{"setting": "mesh.accumulation", "message": "it was 1"}, {"message": "this machine: jax was '0.9'"}]
)
def test_steps_before_the_last_change_of_layout_or_machine_are_not_measured(tmp_path, event):
    write_run(tmp_path / "run", steps=20 + 13)
    metrics = tmp_path / "run" / "metrics.jsonl"

    def change(step: int) -> None:
        metrics.write_text(metrics.read_text() + json.dumps({"kind": "event", "step": step, **event}) + "\n")

    assert own_runs.read_own_run(tmp_path / "run").seconds == {0: 2.0, 1: 3.0}
    change(33)  # of a start of the run when it was done
    change(3)
    assert own_runs.read_own_run(tmp_path / "run").seconds == {0: 2.0, 1: 3.0}
    change(10)
    assert own_runs.read_own_run(tmp_path / "run").seconds == {1: 3.0}


@pytest.mark.parametrize(
    "steps, devices, said",
    [
        (8, "4 x TPU v5 lite", "has 8 steps in all; 13 of a phase are needed"),
        (8, "1 x cpu", "ran on 1 x cpu; plans are made for TPU v4, "),
    ],
)
def test_what_is_no_measured_run_is_refused(tmp_path, steps, devices, said):
    write_run(tmp_path / "run", steps=steps, devices=devices)
    with pytest.raises(ValueError, match=said):
        own_runs.read_own_run(tmp_path / "run")
    (tmp_path / "run" / "starts" / "1.json").write_text("{}")
    with pytest.raises(ValueError, match="starts/1.json, is not read: it lacks a part of a start's record"):
        own_runs.read_own_run(tmp_path / "run")


@pytest.mark.parametrize("values", CONTENT["points"], ids=lambda values: values["name"])
def test_a_published_run_says_where_it_is_from_and_its_step_follows(values):
    """MaxText's count: 6 FLOPs a parameter and token, and attention of every key, 12 L T and the width of all heads."""
    assert values["source"] and values["published"] and values["assumed"]
    model, peak = values["model"], {"v5e": 197e12, "v5p": 459e12, "v6e": 918e12}[values["topology"][:3]]
    heads = model["num_heads"] * model["head_dim"]
    block = 2 * model["d_model"] * heads + 2 * model["d_model"] * model["num_kv_heads"] * model["head_dim"]
    block += 3 * model["d_model"] * model["d_ff"]
    tables = model["vocab_size"] * model["d_model"] * (1 if model["is_tied"] else 2)
    flops = 6 * (model["num_layers"] * block + tables) + 12 * model["num_layers"] * heads * values["seq_len"]
    tokens = values["batch_per_chip"] * values["seq_len"]
    number, unit = re.match(r"([\d.]+) (TFLOP/s a chip|tokens/s a chip|s a step|% MFU)$", values["published"]).groups()
    seconds = {
        "TFLOP/s a chip": tokens * flops / (float(number) * 1e12),
        "tokens/s a chip": tokens / float(number),
        "s a step": float(number),
        "% MFU": tokens * flops / (float(number) / 100 * peak),
    }[unit]
    assert values["step_seconds"] == pytest.approx(seconds, rel=2e-3)


def test_the_published_runs_are_predicted_by_one_another():
    points = calibration.published_points()
    assert {each.chip for each in points} == {"v5e", "v5p", "v6e"}
    assert all(abs(math.log(each.measured / predicted)) < MOST_ERROR for each, predicted in left_out(points))
    assert all(each.ratio > 1 for each in points), "faster than its roofline"
    assert 0.1 == correction_of("v5e").error <= correction_of("v4").error < 0.2
    for name in ("v5e", "v5p", "v6e"):
        hfus = [each.hfu for each in points if each.chip == name]
        assert best_published_hfu(name) == max(hfus) < 1
    assert best_published_hfu("v4") is None and set(CONTENT["best_hfu"]) < set(CHIPS)


@needs_libtpu
def test_a_small_step_is_estimated_as_when_the_calibration_was_made():
    """Another libtpu that fuses or estimates otherwise is seen here: then all runs are to be compiled again.

    Three layers silu(x w), x of [8, 128, 256] and w of [256, 256] split over four chips, after a table of 1,024 rows.
    """
    mesh = jax.make_mesh((4,), ("fsdp",), devices=slice_devices("v5e:2x2"), axis_types=(AxisType.Explicit,))

    def layer(x_BTD, w_DD):
        w_DD = jax.sharding.reshard(w_DD.astype(jnp.bfloat16), P())
        return jax.nn.silu(jnp.einsum("BTD,DE->BTE", x_BTD, w_DD)), None

    def loss(table_VD, w_LDD, tokens_BT):
        x_BTD = table_VD.at[tokens_BT].get(out_sharding=P("fsdp", None, None)).astype(jnp.bfloat16)
        x_BTD, _ = jax.lax.scan(jax.checkpoint(layer), x_BTD, w_LDD)
        return (x_BTD.astype(jnp.float32) ** 2).sum()

    def abstract(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    arrays = abstract((1024, 256), jnp.float32), abstract((3, 256, 256), jnp.float32, None, "fsdp")
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays, abstract((8, 128), jnp.int32, "fsdp"))
    read = read_executable(lowered.compile().as_text() or "", num_devices=4)
    # Forward, again, and two products backward, of 2 x 128 rows a chip.
    assert sum(each.count * each.flops for each in read.operations) == 3 * 4 * (2 * 256 * 256 * 256)
    gathered = sum(each.count * each.num_bytes for each in read.collectives if each.kind == "all-gather")
    assert gathered == 3 * 2 * (2 * 256 * 256) and len(read.collectives) == 4
    cycles = {kind: sum(each.count * each.cycles for each in read.operations if each.kind == kind) for kind in KINDS}
    assert cycles == {kind: pytest.approx(value, rel=0.03) for kind, value in KINDS.items()}


def test_the_calibration_is_frozen_and_the_pods_table_is_by_it():
    assert calibration.calibration_hash() == FROZEN
    assert {row["calibration"] for row in POD_TABLE["rows"] if row.get("calibration")} <= {FROZEN}


@pytest.mark.parametrize("folder", ["pods", "family"])
def test_no_prediction_executes_more_of_the_peak_than_any_published_run(folder):
    table = json.loads((REPOSITORY / "configs" / folder / "table.json").read_text())
    for row in table["rows"]:
        for phase in row["phases"]:
            if "hfu" in phase and (best := best_published_hfu(row["chip"])) is not None:
                assert phase["hfu"] <= best, (row["name"], phase["seq_len"])


def test_the_report_of_the_benchmark_has_every_run_and_both_errors():
    script = runpy.run_path(str(REPOSITORY / "benchmarks" / "plan_calibration.py"))
    text = script["make_report"](list(calibration.published_points()))
    assert script["REPORT"].read_text() == text + "\n"
    assert text.count("\n| v") == len(calibration.published_points())
    assert re.search(r"Root mean square error: \d+% leaving one out, \d+% of the old estimate", text)
