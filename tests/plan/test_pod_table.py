"""The table of layouts: what it is made of, what it says, and that train and the launcher listen to it."""

import dataclasses
import json
import shlex
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import jax
import pytest
from support.imagined_plan import imagined
from support.tiny import REPOSITORY

from btlm_jax.cli import main
from btlm_jax.plan import make_table as making
from btlm_jax.plan.chips import CHIPS, chip_of_device
from btlm_jax.plan.compiling import CompileCache
from btlm_jax.plan.layout import layout_of
from btlm_jax.plan.pod_table import (
    check_devices,
    check_layout_fits,
    predicted_seconds,
    read_table,
    table_beside,
)
from btlm_jax.recipe.config import TrainConfig
from btlm_jax.train.flops import peak_flops

CONFIG = """import runpy

TOPOLOGY = "v5e:4x8"
OTHERS = (dict(accumulation=3, remat="matmuls_saved"), dict(remat="attention_saved"))


def get_config():
    config = runpy.run_path({base!r})["get_config"]()
    config.mesh.accumulation = 15
    return config
"""

UNFITTING = ["--config.mesh.accumulation=3", "--config.model.remat=matmuls_saved"]


@pytest.fixture
def pods(tmp_path):
    """A folder with one config, BTLM-3B on v5e:4x8: with 15 micro-batches all fits, with 3 the saved matmuls do not."""
    folder = tmp_path / "pods"
    folder.mkdir()
    (folder / "v5e_32.py").write_text(CONFIG.format(base=str(REPOSITORY / "configs" / "btlm_3b_8k.py")))
    assert make(folder) == []
    return folder


def make(folder: Path, *, only: Sequence[str] = ()) -> list[str]:
    cache = CompileCache(directory=folder, max_compiles=0)
    with mock.patch.object(making, "plan_fitting_phases", side_effect=imagined):
        return making.make_table(folder / "table.json", cache=cache, report_progress=lambda line: None, only=only)


def config_of(folder: Path, **changes) -> TrainConfig:
    """Return the folder's config with changes to mesh.accumulation or model.remat."""
    config = making.read_pod_configs(folder / "v5e_32.py")[0].config
    layout = layout_of(config)
    mesh = dataclasses.replace(layout.mesh, accumulation=changes.get("accumulation", layout.mesh.accumulation))
    return dataclasses.replace(layout, mesh=mesh, remat=changes.get("remat", layout.remat)).applied_to(config)


def check(folder: Path, config, *, chip: str = "v5e", num_chips: int = 32) -> str:
    return check_layout_fits(config, config_file=folder / "v5e_32.py", changes={}, chip=chip, num_chips=num_chips)


def test_the_table_has_a_row_for_each_layout_with_what_it_needs_and_takes(pods):
    table = json.loads((pods / "table.json").read_text())
    assert [(row["is_config"], row["layout"]["mesh"]["accumulation"], row["fits"]) for row in table["rows"]] == [
        (True, 15, True), (False, 3, False), (False, 15, True)
    ]  # fmt: skip
    first, second, _ = table["rows"]
    assert [(phase["batch_size"], phase["seq_len"]) for phase in first["phases"]] == [(1920, 2048), (480, 8192)]
    # 33 s +- a quarter; 40 FLOPs executed and 30 counted, 5 of them skipped with windows, at a peak of 2.
    assert first["phases"][1]["step_seconds"] == pytest.approx([33 / 1.25, 33 * 1.25])
    assert first["phases"][1]["mfu"] == pytest.approx([15 / 33 / 1.25, 15 / 33 * 1.25])
    assert first["phases"][1]["hfu"] == pytest.approx(20 / 33)
    assert first["phases"][1]["mfu_with_windows"] == pytest.approx(12.5 / 33)
    (gathers,) = first["phases"][0]["collectives"]
    assert (gathers["kind"], gathers["count"], gathers["bytes"]) == ("all-gather", 5, 5 * 3 * 2**30)
    assert second["phases"] == [
        {"batch_size": 1920, "seq_len": 2048, "program": "hash", "fits": False, "needed_bytes": second["needed_bytes"]}
    ]
    assert table["versions"]["jax"] == jax.__version__
    text = (pods / "table.md").read_text()
    mesh = "v5e:4x8 | tensor 1, context 1"
    assert f"| `v5e_32` | {mesh}, accumulation 15, remat full | 1,920 x 2,048 | 2.63 of 15.75 " in text
    assert f"| &nbsp;&nbsp;v5e_32 | {mesh}, accumulation 3, remat matmuls_saved | 1,920 x 2,048 |" in text
    assert text.count("| **no** |") == 1 and "all-gather 0.0 / 15.0" in text


def test_a_run_is_told_the_seconds_of_its_layout(pods):
    where = dict(config_file=pods / "v5e_32.py", chip="v5e", num_chips=32)
    first, *_ = json.loads((pods / "table.json").read_text())["rows"]
    found = predicted_seconds(config_of(pods), **where)
    assert found == tuple(phase["step_central"] for phase in first["phases"]) and found[1] == pytest.approx(33)
    assert f"{found[1]:.3f} s a step of 480 x 8,192" in check(pods, config_of(pods))
    unfitting = config_of(pods, accumulation=3, remat="matmuls_saved")
    assert predicted_seconds(unfitting, **where) == predicted_seconds(config_of(pods, accumulation=5), **where) == ()


def test_a_table_of_another_compiler_is_said_and_not_added_to(pods):
    assert "compiled with" not in check(pods, config_of(pods))
    table = pods / "table.json"
    table.write_text(json.dumps(json.loads(table.read_text()) | {"versions": {"jax": "0.1", "no-such-package": "3"}}))
    assert f"(compiled with jax 0.1, not {jax.__version__} as here)" in check(pods, config_of(pods))
    with pytest.raises(ValueError, match=r"does not fit .*, by .*table.json \(compiled with jax 0.1, not "):
        check(pods, config_of(pods, accumulation=3, remat="matmuls_saved"))
    with pytest.raises(ValueError, match="was made with jax 0.1, no-such-package 3, and here are jax .*whole, without"):
        make(pods, only=["v5e_32"])


def test_a_layout_of_another_program_is_another_layout(pods):
    config = config_of(pods)
    masked = dataclasses.replace(config, data=dataclasses.replace(config.data, document_mask=True))
    frozen = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, freeze="embedding"))
    twice = dataclasses.replace(config, bad_numbers=dataclasses.replace(config.bad_numbers, recompute_every=1000))
    for other in (masked, frozen, twice):
        assert "table.json does not have" in check(pods, other)


def test_what_is_wrong_with_a_folder_is_named(pods):
    text = (pods / "v5e_32.py").read_text()
    (pods / "v5e_32.py").write_text(text.replace("accumulation = 15", "accumulation = 1"))
    (problem,) = make(pods)
    assert problem.startswith(f"v5e_32, {layout_of(config_of(pods))}: phase 1 (1,920 x 2,048) does not fit")
    for old, new, said in (
        ("OTHERS", "OTHER", "lacks OTHERS; see another file"),
        (
            "accumulation=3,",
            "micro=3,",
            "OTHERS has {'micro': 3, 'remat': .*}; keys are .* remat and topology, and not micro",
        ),
        ("v5e:4x8", "v5e-33", "is not known; allowed are .*; did you mean v5e-32?"),
    ):
        (pods / "v5e_32.py").write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=said):
            make(pods)
    with pytest.raises(ValueError, match="has no config files"):
        make(pods.parent)


def test_further_slices_and_a_table_of_one_config_alone(pods):
    (pods / "another.py").write_text((pods / "v5e_32.py").read_text())
    (pods / "others.json").write_text(json.dumps({"another": [{"topology": "v6e-64", "accumulation": 5}]}))
    table = json.loads((pods / "table.json").read_text())
    before = table["rows"]
    before[0]["days"] = [1.0, 2.0]
    (pods / "table.json").write_text(json.dumps(table))
    assert make(pods, only=["another"]) == []
    rows = json.loads((pods / "table.json").read_text())["rows"]
    assert rows[-3:] == before  # of the config that was not asked for
    made = [
        (row["name"], row["topology"], row["is_config"], row["layout"]["mesh"]["accumulation"]) for row in rows[:-3]
    ]
    assert made == [
        ("another", "v5e:4x8", True, 15), ("another", "v5e:4x8", False, 3), ("another", "v5e:4x8", False, 15),
        ("another", "v6e:8x8", False, 5),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="has no config of the name other"):
        make(pods, only=["other"])
    (pods / "table.json").write_text("{}")
    with pytest.raises(ValueError, match="has no rows to keep; make it whole"):
        make(pods, only=["another"])
    (pods / "others.json").write_text('{"another": [5]}')
    with pytest.raises(ValueError, match=r"others.json: another has \[5\], and not a list of objects"):
        make(pods)


def test_a_file_with_an_argument_has_a_row_for_each(pods):
    dial = """TOPOLOGIES = {"15": "v5e-32", "5": "v6e-32"}\n\n\ndef get_config(accumulation="15"):
    config = v5e_32()
    config.mesh.accumulation = int(accumulation)
    return config
"""
    head = f"import runpy\n\nv5e_32 = runpy.run_path({str(pods / 'v5e_32.py')!r})['get_config']\n"
    (pods / "dial.py").write_text(head + dial)
    assert make(pods, only=["dial"]) == [] and make(pods, only=["dial:5"]) == []
    rows = json.loads((pods / "table.json").read_text())["rows"]
    assert [
        (row["name"], row["topology"], row["is_config"], row["layout"]["mesh"]["accumulation"]) for row in rows[:2]
    ] == [("dial:15", "v5e:4x8", True, 15), ("dial:5", "v6e:4x8", True, 5)]
    assert len(rows) == 2 + 3
    assert "| `dial:5` | v6e:4x8 |" in (pods / "table.md").read_text()
    with pytest.raises(ValueError, match="has no config of the name dial:6"):
        make(pods, only=["dial:6"])


def test_a_check_names_the_argument_of_a_config_again(capsys):
    words = ["plan", "--check", "--config=pods/family:111M@v5e-8", "--topology=v6e-16"]
    with mock.patch.object(sys, "argv", ["btlm", *words]):
        assert main(words) == 0
    assert "family.py:111M@v5e-8 --topology=v6e:4x4 --config.mesh" in capsys.readouterr().out


def test_a_check_names_what_the_command_line_changes(capsys):
    changes = ["--config.model.dtype=float32", "--config.mesh.accumulation=5", "--config.data.store=my store"]
    assert main(["plan", "--check", "--config=pods/v5e_256", "--topology=v5e-256", *changes]) == 0
    words = shlex.split(capsys.readouterr().out.partition("to see: ")[2])
    assert words[:2] == ["btlm", "plan"] and words.count("--config.mesh.accumulation=5") == 1
    assert {"--config.model.dtype=float32", "--config.data.store=my store"} < set(words)


def test_a_layout_that_fits_is_confirmed_whatever_else_is_trained(pods):
    said = check(pods, config_of(pods))
    assert "fits on 32 chips of v5e" in said
    assert said.endswith("not measured: 33.000 s a step of 1,920 x 2,048, 33.000 s a step of 480 x 8,192")
    config = config_of(pods)
    faster = dataclasses.replace(config.optimizer, peak_learning_rate=0.1)
    assert "fits on 32" in check(pods, dataclasses.replace(config, optimizer=faster, seed=7))


@pytest.mark.parametrize("accumulation, remat", [(3, "matmuls_saved"), (1, "none")])
def test_a_layout_that_does_not_fit_is_refused_and_those_that_fit_are_named(pods, accumulation, remat):
    with pytest.raises(ValueError) as refused:
        check(pods, config_of(pods, accumulation=accumulation, remat=remat))
    said = str(refused.value)
    assert f"mesh.accumulation={accumulation} model.remat={remat} does not fit on 32 chips of v5e" in said
    assert ("it needs no less than mesh.tensor=1" in said) == (remat == "none")
    assert "needs 79.20 GiB of a chip's 15.75 GiB" in said and f"by {pods / 'table.json'}" in said
    assert f"What fits there: {layout_of(config_of(pods)).flags} (2.63 of 15.75 GiB); " in said
    assert f"btlm plan --config={pods / 'v5e_32.py'} --topology=v5e:4x8 --search" in said


def test_what_the_table_does_not_have_is_said_with_the_command_that_finds_out(pods):
    config = config_of(pods)
    longer = dataclasses.replace(config, model=dataclasses.replace(config.model, loss_chunk=1024))
    averaged = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, average="ema"))
    for asked, where in (
        (config_of(pods, accumulation=5), {}),
        (longer, {}),
        (averaged, {}),
        (config_of(pods, accumulation=3, remat="matmuls_saved"), {"chip": "v5p"}),
        (config_of(pods, accumulation=3, remat="matmuls_saved"), {"num_chips": 16}),
    ):
        said = check(pods, asked, **where)
        assert "so whether it fits is not known" in said
        assert f"btlm plan --config={pods / 'v5e_32.py'} --topology={where.get('chip', 'v5e')}:" in said
        assert f"--config.mesh.accumulation={asked.mesh.accumulation}" in said


def test_the_table_is_in_the_folder_pods_of_or_beside_the_config():
    assert table_beside(Path("configs/btlm_3b_8k.py")) == Path("configs/pods/table.json")
    assert table_beside(Path("configs/pods/v5e_256.py")) == Path("configs/pods/table.json")
    assert table_beside(Path("configs/family/111M.py")) == Path("configs/family/table.json")


@pytest.mark.parametrize("damage", [lambda text: text[:100], lambda text: text.replace("tensor", "tensors")])
def test_a_damaged_table_is_an_error_that_says_how_to_make_it_again(pods, damage):
    table = pods / "table.json"
    table.write_text(damage(table.read_text()))
    with pytest.raises(ValueError, match=f"btlm plan --table={table}"):
        read_table(table)


def test_every_kind_of_device_is_one_chip_with_a_peak():
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds)
    for chip in CHIPS.values():
        for kind in chip.kinds:
            device = types.SimpleNamespace(device_kind=kind)
            assert chip_of_device(device) is chip and peak_flops(device).source.startswith("data sheet")
    assert chip_of_device(jax.devices()[0]) is None


def train(capsys, *arguments) -> tuple[int, str]:
    words = ["train", *map(str, arguments)]
    with mock.patch.object(sys, "argv", ["btlm", *words]):  # config_flags looks there for what to change
        code = main(words)
    return code, capsys.readouterr().err


def test_train_refuses_before_it_makes_anything(pods, capsys):
    devices = [types.SimpleNamespace(device_kind="TPU v5 lite", platform="tpu")] * 32
    workdir = pods / "run"
    arguments = [f"--config={pods / 'v5e_32.py'}", f"--workdir={workdir}", *UNFITTING]
    with mock.patch.object(jax, "devices", return_value=devices):
        code, said = train(capsys, *arguments)
    assert code == 1 and "does not fit on 32 chips of v5e" in said and "What fits there: " in said
    assert not workdir.exists()
    assert "fits on 32" in check_devices(config_of(pods), devices, config_file=pods / "v5e_32.py", changes={})
    too_large = config_of(pods, accumulation=3, remat="matmuls_saved")
    assert check_devices(too_large, jax.devices(), config_file=pods / "v5e_32.py", changes={}) == ""


@pytest.mark.slow
def test_the_launcher_refuses_by_the_same_table(pods, capsys):
    stand_in = pods / "btlm"
    stand_in.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m btlm_jax "$@"\n')
    stand_in.chmod(0o755)
    settings = {"NAME": "pod", "ZONE": "z", "TYPE": "v5litepod-32", "CONFIG": str(pods / "v5e_32.py"), "WORKDIR": "/w"}

    def launch(**more: str) -> subprocess.CompletedProcess:
        environment = {"PATH": f"{pods}:/usr/bin:/bin", "DRY_RUN": "1", **settings, **more}
        command = [REPOSITORY / "launch" / "tpu.sh", "up"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    done = launch()
    assert done.returncode == 0 and "fits on 32 chips of v5e" in done.stdout and "resources create" in done.stdout
    done = launch(FLAGS=" ".join(UNFITTING))
    assert done.returncode == 1 and "does not fit on 32 chips of v5e" in done.stderr and "create" not in done.stdout
    words = ["plan", "--check", f"--topology={settings['TYPE']}", f"--config={settings['CONFIG']}"]  # as it runs
    words += ["--config.mesh.accumulation=2"]
    with mock.patch.object(sys, "argv", ["btlm", *words]):
        assert main(words) == 1
    assert "curriculum.batch_size of phase 2=480 is not divisible by 64" in capsys.readouterr().err
