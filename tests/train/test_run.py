"""The real command, undisturbed: everything happens at the steps that the config names, and is where it should be."""

import json
import os
import sys
from pathlib import Path

import pytest
from support import tensorboard
from support.real_store import BLOCK_LEN
from support.run_command import (
    NUM_STEPS,
    PHASE_STEPS,
    TOKENS_PER_STEP,
    checkpoint_steps,
    recorded,
    train_arguments,
)
from support.run_here import run_here
from support.tensorboard import tensorboard_scalars

from btlm_jax.cli import main
from btlm_jax.data.store import read_manifest
from btlm_jax.recipe.config import train_config_from
from btlm_jax.train import COMPILE_CACHE, CONFIG_FILE, LOSS_PLOT, POSITION_PLOT, PROFILE, SUMMARY_FILE, TRACKERS
from btlm_jax.train.starts import read_starts

pytestmark = pytest.mark.slow


def test_a_run_logs_evaluates_and_saves_when_its_config_says(tiny_run):
    _, workdir = tiny_run
    config = train_config_from(json.loads((workdir / CONFIG_FILE).read_text()))
    every = (config.log.every_steps, config.evaluation.every_steps, config.checkpoint.every_steps)
    assert every == (3, 4, 3) and PHASE_STEPS == (6, 4)
    assert [row["step"] for row in recorded(workdir, "train")] == list(range(1, NUM_STEPS + 1))
    # The first step, the ends of phases, and what log.every_steps divides.
    assert {step for tag, step in tensorboard_scalars(workdir) if tag == "train/loss"} == {1, 3, 6, 9, 10}
    assert [row["step"] for row in recorded(workdir, "eval")] == [0, 4, 6, 8, 10]
    assert checkpoint_steps(workdir) == [3, 6, 9, 10]


def test_a_run_says_at_its_end_what_it_did(tiny_run, token_store):
    _, workdir = tiny_run
    summary = json.loads((workdir / SUMMARY_FILE).read_text())
    assert (summary["num_steps"], summary["num_tokens"]) == (NUM_STEPS, NUM_STEPS * TOKENS_PER_STEP)
    per_epoch = read_manifest(token_store).splits["train"].num_blocks * BLOCK_LEN
    assert summary["data"] == {"epochs": summary["num_tokens"] / per_epoch, "tokens_per_epoch": per_epoch}
    rows = recorded(workdir, "train")
    assert [round(row["epochs"] * per_epoch) for row in rows] == [row["tokens"] for row in rows]
    last = recorded(workdir, "eval")[-1]
    assert summary["heldout"] == {name: last[name] for name in summary["heldout"]}
    assert summary["sample"]["prompt"] == "Return the number of" and summary["sample"]["continuation"]
    assert {"step", "compile", "checkpoint", "evaluation", "total"} <= summary["seconds"].keys()
    for picture in (LOSS_PLOT, POSITION_PLOT):
        assert (workdir / picture).read_bytes().startswith(b"\x89PNG")
    assert any((workdir / COMPILE_CACHE).iterdir())


def test_a_run_keeps_a_record_of_its_start(tiny_run):
    _, workdir = tiny_run
    problems = []
    (start,) = read_starts(workdir, problems)
    assert problems == [] and (start.code, start.first_step, start.step) == (0, 1, NUM_STEPS)
    assert {"step", "compile", "checkpoint", "evaluation", "sample", "total"} <= start.seconds.keys()
    assert start.command[1] == "train" and start.facts["processes"] == "1"
    assert start.facts["token store"] and start.facts["jax"]


def test_a_resume_says_what_changed_traces_steps_and_gives_a_tracker_all_of_them(unfinished_run, monkeypatch, capsys):
    config, workdir = unfinished_run
    folders = os.pathsep.join([str(Path(tensorboard.__file__).parent / "services"), *sys.path])
    values = {"optimizer.peak_learning_rate": 0.005, "log.every_steps": 5, "log.sample_tokens": 2}
    changes = [f"--config.{key}={value}" for key, value in values.items()]
    command = [*train_arguments(config, workdir), *changes]
    options = ["--config.log.profile_steps=5:6", "--config.log.trackers=wandb"]
    monkeypatch.setenv("PYTHONPATH", folders)  # of the tracker's process
    monkeypatch.syspath_prepend(Path(tensorboard.__file__).parent / "services")
    assert run_here(*command, *options) == 0
    done = capsys.readouterr()

    said = "note: optimizer.peak_learning_rate was 0.006, is now 0.005 (from step 3 on) (setting-changed)"
    assert said in done.err
    assert "ETA 0:00:0" in done.out and " + sample" in done.out
    events = [row for row in recorded(workdir, "event") if "setting" in row]
    assert f"{len(events)} setting-changed" in done.err.splitlines()[-1]
    for name, old in (("optimizer.peak_learning_rate", 0.006), ("log.every_steps", 3), ("log.sample_tokens", 3)):
        (row,) = (row for row in events if row["setting"] == name)
        assert (row["step"], row["old"], row["new"]) == (3, old, values[name])

    (trace,) = (workdir / PROFILE / "steps_5_6").rglob("*.xplane.pb")
    assert f"Traced the steps up to 6: {trace.parents[3]}" in done.out and "not-traced" not in done.err
    assert json.loads((workdir / SUMMARY_FILE).read_text())["seconds"]["profile"] > 0
    (start,) = (workdir / TRACKERS / "wandb").iterdir()
    rows = [json.loads(line) for line in start.read_text().splitlines()]
    heldout = {row["step"] for row in rows if "heldout/all" in row.get("values", ())}
    assert {row["step"] for row in rows if "train/loss" in row.get("values", ())} == {1, 5, 6, 10}
    assert heldout == {0, 4, 6, 8, 10} and any("sample" in row.get("values", ()) for row in rows)
    assert rows[-1] == {"exit": 0} and "tracker-" not in done.err

    assert run_here(*command, *options, "--strict=setting-changed") == 0
    assert run_here(*train_arguments(config, workdir), "--strict=setting-changed") == 1
    assert "an error because of --strict" in capsys.readouterr().err


def test_a_tracker_whose_package_is_missing_is_refused_before_anything_is_made(tiny_run, tmp_path, monkeypatch, capsys):
    config, _ = tiny_run
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for more in ([], ["--dry_run"]):
        arguments = [*train_arguments(config, tmp_path / "new"), "--config.log.trackers=mlflow", *more]
        assert main(arguments) == 1
        assert "log.trackers=mlflow needs the package mlflow" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
