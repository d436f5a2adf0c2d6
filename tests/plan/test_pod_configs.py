"""The configs of configs/pods/ and their table as checked in; benchmarks/compile_again.py compiles one again."""

import dataclasses
import json

import pytest
from support.tiny import REPOSITORY, config_dict
from support.tpu import needs_libtpu

from btlm_jax.parallel.make_mesh import make_run_mesh
from btlm_jax.plan.chips import chip_of, num_chips, slice_devices
from btlm_jax.plan.make_table import read_pod_config
from btlm_jax.plan.pod_table import check_layout_fits
from btlm_jax.plan.search import SPARE
from btlm_jax.plan.slice_plan import layout_problems
from btlm_jax.plan.table_text import format_table_markdown
from btlm_jax.recipe.config import train_config_from

FOLDER = REPOSITORY / "configs" / "pods"
FILES = sorted(FOLDER.glob("*.py"))
SMALLEST = FOLDER / "v5e_8_124m.py"
TABLE = json.loads((FOLDER / "table.json").read_text())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_pod_divides_and_fits_with_memory_to_spare(file):
    pod = read_pod_config(file)
    chip, count = chip_of(pod.topology), num_chips(pod.topology.partition(":")[2])
    assert layout_problems(pod.config, num_devices=count, chip=chip) == ()
    assert "fits on" in check_layout_fits(pod.config, config_file=file, chip=chip.name, num_chips=count)
    (row,) = (row for row in TABLE["rows"] if row["name"] == file.stem and row["is_config"])
    assert row["topology"] == pod.topology and row["num_chips"] == count
    assert row["needed_bytes"] < (1 - SPARE) * row["available_bytes"] == (1 - SPARE) * chip.hbm_bytes
    assert [phase["fits"] for phase in row["phases"]] == [True, True]
    assert all(phase["collectives"] and 0 < phase["mfu"][0] <= phase["mfu"][1] < 1 for phase in row["phases"])


@needs_libtpu
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_pod_has_a_mesh_of_its_slice(file):
    pod = read_pod_config(file)
    mesh = make_run_mesh(pod.config.mesh, curriculum=pod.config.curriculum.table, devices=slice_devices(pod.topology))
    ways = pod.config.mesh
    assert (
        mesh.shape["batch_or_context"] * mesh.shape["context"] == ways.context and mesh.shape["tensor"] == ways.tensor
    )


def test_every_row_is_of_a_config_or_of_its_others():
    pods = {file.stem: read_pod_config(file) for file in FILES}
    assert len(TABLE["rows"]) == sum(1 + len(pod.others) for pod in pods.values())
    assert {row["name"] for row in TABLE["rows"]} == pods.keys()
    assert any(not row["fits"] for row in TABLE["rows"])


def test_the_pods_train_the_paper():
    base = train_config_from(config_dict("btlm_3b_8k"))
    for file in FILES:
        if file != SMALLEST:
            config = read_pod_config(file).config
            model = dataclasses.replace(config.model, remat=base.model.remat, loss_chunk=base.model.loss_chunk)
            assert dataclasses.replace(config, model=model, mesh=base.mesh) == base


def test_the_table_to_read_is_the_table():
    assert (FOLDER / "table.md").read_text() == format_table_markdown(TABLE)
