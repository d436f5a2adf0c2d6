"""Configs are found by name and by path, listed, and unknown ones are answered with the nearest name."""

import json
import shutil

import pytest
from support.tiny import REPOSITORY, tiny_config

from btlm_jax.cli import UsageError, main
from btlm_jax.cli.parse import config_names, find_config, load_config, packaged_folder
from btlm_jax.plan.pod_table import table_beside
from btlm_jax.recipe.config import train_config_from


def test_every_file_of_the_folder_has_a_name():
    files = {
        path.relative_to(REPOSITORY / "configs").with_suffix("") for path in (REPOSITORY / "configs").rglob("*.py")
    }
    assert {"local_cpu", "btlm_3b_8k", "pods/v5e_256"} <= set(config_names()) == {path.as_posix() for path in files}


def test_a_name_a_path_and_a_file_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("pods/v5e_256") == packaged_folder("configs") / "pods" / "v5e_256.py"
    assert find_config("1.3B") == find_config("family/1.3B") == packaged_folder("configs") / "family" / "1.3B.py"
    assert find_config(str(REPOSITORY / "configs" / "local_cpu.py")) == REPOSITORY / "configs" / "local_cpu.py"
    (tmp_path / "local_cpu").mkdir()  # a directory is no config
    assert find_config("local_cpu") == packaged_folder("configs") / "local_cpu.py"
    (tmp_path / "local_cpu").rmdir()
    (tmp_path / "local_cpu").write_text("")
    assert str(find_config("local_cpu")) == "local_cpu"


@pytest.mark.parametrize("given", ["local_cp", "configs/local_cpu.py", "local-cpu"])
def test_an_unknown_name_is_answered_with_the_known_ones(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="btlm_3b_8k, .*, local_cpu, pods/.*; did you mean --config=local_cpu"):
        find_config(given)


def test_the_end_of_a_name_that_two_have_names_none(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / "configs" / folder).mkdir(parents=True)
        (tmp_path / "configs" / folder / "same.py").touch()
    (tmp_path / "configs" / "b" / "own.py").touch()
    monkeypatch.setattr("btlm_jax.cli.parse.packaged_folder", lambda name: tmp_path / name)
    assert find_config("own") == tmp_path / "configs" / "b" / "own.py"
    with pytest.raises(UsageError, match="--config=same is neither a file nor one of a/same, b/own, b/same"):
        find_config("same")
    with pytest.raises(UsageError, match="did you mean --config=own"):
        find_config("owm")


def test_the_table_of_pods_is_found_beside_a_config_taken_by_name(capsys):
    assert table_beside(find_config("btlm_3b_8k")) == table_beside(find_config("pods/v5e_256"))
    assert json.loads(table_beside(find_config("btlm_3b_8k")).read_text())["rows"]
    assert main(["plan", "--check", "--config", "pods/v5e_256", "--topology=v5litepod-256"]) == 0
    captured = capsys.readouterr()
    assert "fits on 256 chips of v5e" in captured.out
    assert f"config: {packaged_folder('configs') / 'pods' / 'v5e_256.py'}\n" in captured.err


def test_values_of_a_config_are_changed_whatever_named_it(capsys, tmp_path, monkeypatch):
    shutil.copy(REPOSITORY / "configs" / "local_cpu.py", tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    for given in ("local_cpu", "mine.py"):
        changes = ["--config.model.num-layers=3", "--config.mesh.accumulation", "2"]
        assert main(["train", "--dry-run", "--config", given, *changes]) == 0
        assert "  3 layers, d_model 256" in capsys.readouterr().out


def test_the_list_says_name_parameters_tokens_and_what_it_is(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1 : 1 + len(config_names())]}
    assert sorted(rows) == config_names()
    family = [row for row in rows if row.startswith("family/")]
    assert family == [f"family/{size}" for size in ("4M", "12M", "40M", "111M", "256M", "590M", "1.3B", "2.7B")]
    assert rows["btlm_3b_8k"][:3] == ["2,646,255,744", "627,714,293,760", "BTLM-3B-8K,"]
    assert rows["local_cpu"][:2] == ["4,207,440", "614,400"]
    assert lines[-2].split()[-1] == str(packaged_folder("configs"))
    assert (packaged_folder("launch") / "tpu.sh").is_file()


def test_a_config_file_from_before_a_key_means_what_it_meant_and_says_so(tmp_path, capsys):
    path = tmp_path / "mine.py"
    lines = (packaged_folder("configs") / "local_cpu.py").read_text()
    path.write_text(lines.replace(', gradient_dtype="float32"', ""))
    assert load_config(path, argument="", changes={}) == load_config(find_config("local_cpu"), argument="", changes={})
    assert (
        f"{path} lacks keys that came later; as before them: mesh.gradient_dtype='float32'" in capsys.readouterr().err
    )
    changed = load_config(path, argument="", changes={"mesh.gradient_dtype": "bfloat16"})
    assert changed["mesh"]["gradient_dtype"] == "bfloat16"
    path.write_text(lines.replace("accumulation=1, ", ""))
    with pytest.raises(ValueError, match="config.mesh.accumulation is missing"):
        train_config_from(load_config(path, argument="", changes={}))


def test_a_config_json_from_before_a_key_means_what_it_meant(tmp_path):
    """As the config.json of a workdir."""
    values = json.loads(tiny_config().to_json())
    del values["data"]["weights"], values["optimizer"]["schedule"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert train_config_from(load_config(path, argument="", changes={})) == tiny_config()
    del values["data"]["seed"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="config.data.seed is missing"):
        train_config_from(load_config(path, argument="", changes={}))
