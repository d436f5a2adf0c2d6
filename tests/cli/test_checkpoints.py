"""btlm checkpoints: the list, and what --verify, --copy and --prune do."""

import dataclasses
import shlex
import shutil

import jax
import numpy as np
import pytest
from support.tiny import tiny_config

from btlm_jax.cli import main
from btlm_jax.data.store import MANIFEST_FILE
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.train.checkpoint import Checkpointer, CheckpointReader, Position
from btlm_jax.train.program import make_program
from btlm_jax.train.setup import locate_store

CONFIG = tiny_config(model__num_layers=1, checkpoint__keep_last=1)


@pytest.fixture(scope="module")
def program():
    return make_program(CONFIG, make_mesh(devices=jax.devices()[:1], tensor=1))


@pytest.fixture
def workdir(tmp_path, program):
    """A run that kept checkpoints 2, 3 and 5 by another rule than its config has now."""
    state = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding), program.state)
    keeping = tiny_config(model__num_layers=1, checkpoint__keep_last=9).checkpoint
    checkpointer = Checkpointer(tmp_path / "run", config=keeping)
    for step in (2, 3, 5):
        position = Position(step=step, tokens_seen=384 * step, store_fingerprint="abc")
        checkpointer.save(state, position=position, config=CONFIG)
    checkpointer.wait()
    checkpointer.close()
    (tmp_path / "run" / "config.json").write_text(CONFIG.to_json())
    return tmp_path / "run"


def steps_of(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.slow
def test_the_list_and_what_is_verified_copied_and_pruned(workdir, program, capsys):
    assert main(["checkpoints", str(workdir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["2", "768"], ["3", "1,152"], ["5", "1,920"]]
    assert all(line.endswith("not verified") for line in lines[1:])
    copy = workdir.with_name("copy")
    assert main(["checkpoints", f"--workdir={workdir}", "--verify", f"--copy={copy}"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:4]] == ["verified"] * 3
    reader = CheckpointReader(copy)
    assert reader.steps() == [2, 3, 5] and reader.restore_params(3, abstract=program.state.params)
    assert main(["checkpoints", str(workdir), f"--copy={copy}"]) == 1 and "exists" in capsys.readouterr().err
    assert main(["checkpoints", str(workdir), "--prune"]) == 0
    assert steps_of(workdir) == [3, 5]  # the last, and the last at a multiple of every_steps=3
    assert main(["checkpoints", str(workdir), "--prune"]) == 0 and "nothing is deleted" in capsys.readouterr().out
    assert (copy / "config.json").is_file() and steps_of(copy) == [2, 3, 5]


def test_what_the_run_deletes_meanwhile_is_said_and_left_out(workdir, capsys, monkeypatch):
    read, copytree = CheckpointReader.read_metadata, shutil.copytree

    def read_late(reader, step):
        if step == 2:
            shutil.rmtree(reader.directory / "2")
        return read(reader, step)

    def copy_late(source, *arguments, **named):
        if source.name == "3":
            shutil.rmtree(source)
        return copytree(source, *arguments, **named)

    monkeypatch.setattr(CheckpointReader, "read_metadata", read_late)
    monkeypatch.setattr(shutil, "copytree", copy_late)
    copy = workdir.with_name("copy")
    assert main(["checkpoints", str(workdir), f"--copy={copy}"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].split() == ["2", "the", "run", "has", "deleted", "it", "meanwhile"]
    assert [row.split()[0] for row in rows[2:4]] == ["3", "5"]
    gone, copied, on = rows[4:]
    assert gone == "3: the run has deleted it meanwhile; it is not copied"
    assert copied == f"copied 1 checkpoints to {copy}"
    assert on == f"to go on from there: btlm train --config={copy}/config.json --workdir={copy}"
    assert steps_of(copy) == [5]


def test_a_copy_names_the_store_that_it_is_not_with_and_the_command_that_goes_on(workdir, begun, capsys):
    (workdir / "store").mkdir()
    (workdir / "store" / MANIFEST_FILE).write_text("{}")
    copy = workdir.with_name("copy")
    assert main(["checkpoints", str(workdir), f"--copy={copy}"]) == 0
    on = capsys.readouterr().out.splitlines()[-1].partition("to go on from there: btlm ")[2]
    assert main(shlex.split(on)) == 0
    ((config, _),) = begun
    assert config == dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, store=str(workdir / "store")))
    assert f"--workdir={copy}" in on and locate_store(config.data, workdir=copy) == workdir / "store"
    shutil.rmtree(workdir / "store")
    (workdir / "config.json").write_text(tiny_config(corpus__source="prepared").to_json())
    assert main(["checkpoints", str(workdir), f"--copy={copy}-2"]) == 0
    assert capsys.readouterr().out.endswith(f" --workdir={copy}-2 --config.data.store=/PATH/OF/STORE\n")


def test_a_damaged_checkpoint_is_named_left_and_not_copied(workdir, capsys):
    folder = workdir / "checkpoints" / "5"
    (folder / "position" / "metadata").write_text("{}")
    assert main(["checkpoints", str(workdir), f"--copy={workdir.with_name('copy')}"]) == 1
    assert "DAMAGED: its position is not as it was written" in capsys.readouterr().out
    assert steps_of(workdir.with_name("copy")) == [2, 3]
    assert main(["checkpoints", str(workdir), "--prune"]) == 1
    assert steps_of(workdir) == [3, 5]
