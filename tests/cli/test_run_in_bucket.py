"""Checkpoints of a run in a bucket: what the run and the commands that read it do with them."""

import shutil
import types

import jax
import numpy as np
import pytest
from support import fake_gcs
from support.made_up_run import run_config, write_run

from btlm_jax import notices
from btlm_jax.cli import generate, main, train
from btlm_jax.hub.given_model import fetch_model
from btlm_jax.hub.native import read_run, split_average_of_url
from btlm_jax.storage import bucket
from btlm_jax.train.checkpoint import Checkpointer, CheckpointReader, last_position

URL = f"gs://{fake_gcs.BUCKET}/run"


@pytest.fixture
def objects(monkeypatch, tmp_path):
    monkeypatch.setenv(bucket.STAGING_VARIABLE, str(tmp_path / "staging"))
    stored = {}
    with fake_gcs.connected(stored, monkeypatch):
        yield stored
        bucket._kept_open.close()


def steps_of(objects, folder="run/checkpoints"):
    return {name.split("/")[-2] for name in objects if name.startswith(f"{folder}/") and name.endswith("/commit.json")}


def test_a_checkpoint_that_is_deleted_is_moved_away_first(objects, token_store, monkeypatch):
    """Deleted in place, it would be one that is not in the bucket, once its file .origin is gone."""
    config = run_config(token_store, checkpoint__keep_last=1)
    with bucket.opened_for_run(URL) as mirror:
        purge = mirror._purge
        monkeypatch.setattr(mirror, "_purge", lambda: None)
        mirror.begin()
        write_run(mirror.folder, config, steps=(3, 6))
        moved = mirror.folder / "checkpoints" / ".deleted"
        assert [path.name for path in moved.iterdir()] == ["3"] and mirror._waiting() in ([], [6])
        purge()
        mirror.close()
        assert not [*moved.iterdir()]
    assert steps_of(objects) == {"6"} and not [name for name in objects if "/checkpoints/3/" in name]


@pytest.mark.slow
def test_checkpoints_in_a_bucket(objects, token_store, tmp_path, capsys):
    config = run_config(token_store)
    with bucket.opened_for_run(URL) as mirror:
        mirror.begin()
        write_run(mirror.folder, config, steps=(3, 6, 9))
        (mirror.folder / "metrics.jsonl").write_text('{"kind": "event", "step": 9, "message": "x"}\n')
        mirror.close()
    assert steps_of(objects) == {"6", "9"}  # as many as the config keeps

    assert main(["checkpoints", URL, "--verify"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["step", "6", "9"] and all(row.endswith(" verified") for row in rows[1:])
    assert not [*(tmp_path / "staging").glob("run-*-reader/run/checkpoints/*/state")]  # what was verified is not kept
    assert main(["checkpoints", URL, f"--copy={tmp_path / 'copy'}"]) == 0
    assert not [*(tmp_path / "staging").glob("run-*-reader/run/checkpoints/*/state")]  # nor what was copied
    assert main(["checkpoints", str(tmp_path / "copy"), f"--copy={URL}-2"]) == 0
    assert steps_of(objects, "run-2/checkpoints") == {"6", "9"}
    assert main(["checkpoints", f"{URL}-2", f"--copy={URL}-2"]) == 1 and "exists" in capsys.readouterr().err
    assert main(["checkpoints", f"{URL}-2", "--verify"]) == 0

    del objects["run-2/checkpoints/9/commit.json"]  # as while it is uploaded
    fetch_model(f"{URL}-2", step=0, directory=tmp_path / "init", log=lambda line: None)
    assert [path.name for path in (tmp_path / "init/checkpoints").iterdir()] == ["6"]
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 9"):
        fetch_model(f"{URL}-2", step=9, directory=tmp_path / "init", log=lambda line: None)

    # A damaged newest one is set aside there too, by a start elsewhere.
    shutil.rmtree(tmp_path / "staging")
    bucket._kept_open.close()
    (arrays,) = [name for name in objects if name.startswith("run/checkpoints/9/state/d/")][:1]
    objects[arrays] = objects[arrays][:-1] + bytes([objects[arrays][-1] ^ 1])
    assert main(["checkpoints", URL, "--verify"]) == 1 and "is not as it was written" in capsys.readouterr().out
    with bucket.opened_for_run(URL) as mirror:
        mirror.begin()
        checkpointer = Checkpointer(mirror.folder, config=config.checkpoint)
        assert last_position(checkpointer, config).position.step == 9  # its JSON is whole
        step, said = checkpointer.newest(lambda step: checkpointer.complete(step) or step, steps=checkpointer.steps())
        assert step == 6 and len(said) == 1
        checkpointer.close()
        mirror.close()
    assert steps_of(objects) == {"6"} and steps_of(objects, "run/damaged") == {"checkpoints-9"}
    assert f"checkpoint 9 is damaged and set aside as {URL}/damaged/checkpoints-9" in capsys.readouterr().err
    assert arrays.replace("run/checkpoints/9", "run/damaged/checkpoints-9") in objects

    # A bucket that cannot be reached damages nothing.
    reader = CheckpointReader(bucket.open_for_reading(URL))
    bucket.release(reader.directory / "6")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket, "_WAITS", ())
        patch.setattr(bucket.RemoteFolder, "_call", lambda *_, **__: (_ for _ in ()).throw(TimeoutError()))
        with pytest.raises(OSError, match=r"cannot be reached \(1 attempt\): no answer in time"):
            reader.complete(6)


@pytest.mark.slow
def test_the_average_of_a_run_in_a_bucket(objects, token_store, tmp_path):
    """By generate and convert, whose arrays are fetched when they are read, and by evaluate and --init."""
    with bucket.opened_for_run(URL) as mirror:
        mirror.begin()
        state = write_run(mirror.folder, run_config(token_store, optimizer__average="ema"), steps=(3,))
        mirror.close()
    average = jax.device_get(state.opt_state.average)
    flags = generate.generate_flags()
    flags.parse([f"--checkpoint={URL}/average/"])
    fetched = fetch_model(f"{URL}/average", step=0, directory=tmp_path / "fetched", log=lambda line: None)
    for directory in (flags.run_path("checkpoint"), fetched):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(read_run(directory).params), average)
    objects["run/average/model.json"] = b"{}"  # a model of that name
    assert split_average_of_url(f"{URL}/average") == (f"{URL}/average", False)


def test_a_dry_run_of_a_new_workdir_reads_nothing_and_writes_nothing(objects):
    flags = train.train_flags()
    flags.parse([f"--workdir={URL}"])
    folder = train._workdir_of_dry_run(flags)
    assert not [path for path in folder.iterdir() if not path.name.startswith(".")] and not objects
    assert notices.named(f"{folder}/store") == f"{URL}/store"


def test_what_cannot_be_copied_at_the_end_is_said_beside_the_error_that_ends_a_run(capsys):
    def close():
        raise OSError("what is not uploaded is kept")

    mirror = types.SimpleNamespace(begin=lambda: None, close=close, is_remote=False)
    with pytest.raises(ValueError, match="^the reason$"), train._copied(mirror, train.train_flags()):
        raise ValueError("the reason")
    assert "what is not uploaded is kept" in capsys.readouterr().err
