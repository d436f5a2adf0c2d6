"""btlm checkpoints: the list, and what --verify, --copy and --prune do."""

import shutil

import jax
import numpy as np
import pytest
from support.tiny import tiny_config

from btlm_jax.cli import main
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.train.checkpoint import Checkpointer, CheckpointReader, Position
from btlm_jax.train.program import make_program

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
    assert rows[4:] == ["3: the run has deleted it meanwhile; it is not copied", f"copied 1 checkpoints to {copy}"]
    assert steps_of(copy) == [5]


def test_a_damaged_checkpoint_is_named_left_and_not_copied(workdir, capsys):
    folder = workdir / "checkpoints" / "5"
    (folder / "position" / "metadata").write_text("{}")
    assert main(["checkpoints", str(workdir), f"--copy={workdir.with_name('copy')}"]) == 1
    assert "DAMAGED: its position is not as it was written" in capsys.readouterr().out
    assert steps_of(workdir.with_name("copy")) == [2, 3]
    assert main(["checkpoints", str(workdir), "--prune"]) == 1
    assert steps_of(workdir) == [3, 5]
