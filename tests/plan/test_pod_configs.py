"""The configs of configs/pods/ and their table as checked in; benchmarks/compile_again.py compiles one again."""

import dataclasses
import json

import pytest
from support.tiny import REPOSITORY, config_dict
from support.tpu import needs_libtpu

from btlm_jax.parallel.make_mesh import make_run_mesh
from btlm_jax.plan.chips import chip_of, num_chips, slice_devices
from btlm_jax.plan.make_table import read_pod_configs
from btlm_jax.plan.pod_table import check_layout_fits
from btlm_jax.plan.search import SPARE
from btlm_jax.plan.slice_plan import layout_problems
from btlm_jax.plan.table_text import format_table_markdown
from btlm_jax.recipe.config import train_config_from

FOLDER = REPOSITORY / "configs" / "pods"
PODS = {pod.name: pod for file in sorted(FOLDER.glob("*.py")) for pod in read_pod_configs(file)}
TABLE = json.loads((FOLDER / "table.json").read_text())


@pytest.mark.parametrize("name", PODS)
def test_every_pod_divides_and_fits_with_memory_to_spare(name):
    pod = PODS[name]
    chip, count = chip_of(pod.topology), num_chips(pod.topology.partition(":")[2])
    assert layout_problems(pod.config, num_devices=count, chip=chip) == ()
    file = FOLDER / f"{pod.file}.py"
    assert "fits on" in check_layout_fits(pod.config, config_file=file, changes={}, chip=chip.name, num_chips=count)
    (row,) = (row for row in TABLE["rows"] if row["name"] == name and row["is_config"])
    assert row["topology"] == pod.topology and row["num_chips"] == count
    assert row["needed_bytes"] < (1 - SPARE) * row["available_bytes"] == (1 - SPARE) * chip.hbm_bytes
    assert [phase["fits"] for phase in row["phases"]] == [True, True]
    assert all(phase["collectives"] and 0 < phase["mfu"][0] <= phase["mfu"][1] < 1 for phase in row["phases"])


@needs_libtpu
@pytest.mark.parametrize("name", PODS)
def test_every_pod_has_a_mesh_of_its_slice(name):
    pod = PODS[name]
    mesh = make_run_mesh(pod.config.mesh, curriculum=pod.config.curriculum.table, devices=slice_devices(pod.topology))
    ways = pod.config.mesh
    assert (
        mesh.shape["batch_or_context"] * mesh.shape["context"] == ways.context and mesh.shape["tensor"] == ways.tensor
    )


def test_every_row_is_of_a_config_or_of_its_others():
    assert len(TABLE["rows"]) == sum(1 + len(pod.others) for pod in PODS.values())
    assert {row["name"] for row in TABLE["rows"]} == PODS.keys()
    assert any(not row["fits"] for row in TABLE["rows"])


@pytest.mark.parametrize("name", PODS)
def test_every_pod_trains_the_paper_or_a_size_of_the_family(name):
    config, (file, _, dial) = PODS[name].config, name.partition(":")
    base = train_config_from(config_dict(f"family/{dial.partition('@')[0]}" if file == "family" else "btlm_3b_8k"))
    model = dataclasses.replace(config.model, remat=base.model.remat, loss_chunk=base.model.loss_chunk)
    assert dataclasses.replace(config, model=model, mesh=base.mesh, evaluation=base.evaluation) == base
    rows = config.curriculum.batch_size[-1]
    assert config.evaluation.batch_size == (rows // config.mesh.accumulation if file == "family" else rows)


def test_the_table_to_read_is_the_table():
    assert (FOLDER / "table.md").read_text() == format_table_markdown(TABLE)
