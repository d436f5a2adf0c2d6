"""A run that goes on with other settings: nothing of it in silence, no schedule stretched, and the advice works."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from support.run_command import NUM_STEPS, checkpoint_steps, recorded, train_arguments
from support.run_here import run_here
from support.tiny import tiny_config

from btlm_jax import notices
from btlm_jax.cli import main
from btlm_jax.recipe.config import with_later_keys
from btlm_jax.recipe.optimizer import rates_of_steps
from btlm_jax.train import loop
from btlm_jax.train.checkpoint import Position, check_schedule, go_back
from btlm_jax.train.finish import _epochs_text, _summary_text, longer_command, longer_flags
from btlm_jax.train.metric_writer import read_metrics

PER_STEP = 384


def run_of(num_steps: int, **changes):
    """A config of so many steps, warmed up in 2 of them."""
    tokens = (num_steps * PER_STEP,)
    return tiny_config(
        curriculum__seq_len=(24,), curriculum__batch_size=(16,), curriculum__num_tokens=tokens, **changes
    )  # fmt: skip


def at(step: int) -> Position:
    return Position(step=step, tokens_seen=step * PER_STEP, store_fingerprint="")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("num_steps", [25, 15])
def test_a_schedule_that_decays_is_not_stretched_nor_squeezed(schedule, num_steps):
    saved = run_of(20, optimizer__schedule=schedule, optimizer__decay_share=0.25)
    config = run_of(num_steps, optimizer__schedule=schedule, optimizer__decay_share=0.25)
    with pytest.raises(ValueError, match="Choose how to go on") as refused:
        check_schedule(saved, config, position=at(20 if num_steps > 20 else 14), steps=[1, 2, 14])
    said = str(refused.value)
    assert f"with a schedule of {num_steps * PER_STEP:,} tokens in place of 7,680" in said
    assert f"back to the checkpoint before the decay: --resume_step={14 if schedule == 'wsd' else 2}" in said
    for choice in re.findall(r": (--config\.optimizer\.\S.*)$", said, flags=re.MULTILINE):
        values = dict(flag.removeprefix("--config.optimizer.").split("=") for flag in choice.split())
        changes = {f"optimizer__{name}": json.loads(value) for name, value in values.items()}
        step = 20 if num_steps > 20 else 14
        chosen = run_of(num_steps, optimizer__schedule=schedule, optimizer__decay_share=0.25, **changes)
        check_schedule(saved, chosen, position=at(step), steps=[1, 2, 14])
        before, after = (rates_of_steps(each.optimizer, each.curriculum.table) for each in (saved, chosen))
        if "schedule_tokens" in values and values["schedule_tokens"] != "0":  # the second choice
            np.testing.assert_array_equal(after[:20], before[: len(after)])
            assert set(after[20:].tolist()) <= {saved.optimizer.end_learning_rate}
        else:
            assert np.isnan(after[:step]).all() and after[-1] == saved.optimizer.end_learning_rate
            assert after[step:].max() <= saved.optimizer.peak_learning_rate / 2


@pytest.mark.parametrize(
    "changes, step",
    [
        ({"optimizer__schedule": "constant"}, 20),
        ({"optimizer__schedule": "wsd", "optimizer__decay_share": 0.25}, 15),  # stands before the decay
        ({"optimizer__schedule_tokens": 18 * PER_STEP}, 20),
        ({}, 2),  # the warm-up alone
    ],
)
def test_a_run_may_be_longer_where_no_rate_of_the_past_changes(changes, step):
    saved, config = run_of(20, **changes), run_of(26, **changes)
    check_schedule(saved, config, position=at(step), steps=[step])
    before, after = (rates_of_steps(each.optimizer, each.curriculum.table) for each in (saved, config))
    np.testing.assert_array_equal(before[:step], after[:step])


def test_a_rate_that_the_config_names_may_change():
    check_schedule(run_of(20), run_of(20, optimizer__peak_learning_rate=0.001), position=at(9), steps=[9])


def test_a_schedule_begins_where_it_did_or_where_the_run_stands():
    config = run_of(30, optimizer__schedule_begin=7 * PER_STEP)
    with pytest.raises(ValueError, match="stands at 7,680 tokens, and its schedule began at 0; allowed are these two"):
        check_schedule(run_of(20), config, position=at(20), steps=[20])
    check_schedule(config, config, position=at(20), steps=[20])


def test_the_advice_of_a_finished_run_is_taken_and_can_be_taken_again():
    config, steps = run_of(20, optimizer__hidden_optimizer="muon"), 20
    for _ in range(3):
        _, flags = longer_flags(config)
        changes = {}
        for flag in shlex.split(flags):
            name, value = flag.removeprefix("--config.").split("=")
            changes[name.replace(".", "__")] = (
                tuple(json.loads(f"[{value[1:-2]}]")) if "(" in value else json.loads(value)
            )
        fixed = {"curriculum__seq_len": (24,), "curriculum__batch_size": (16,), "optimizer__hidden_optimizer": "muon"}
        longer = tiny_config(**{**fixed, **changes})
        check_schedule(config, longer, position=at(steps), steps=[steps])
        rates = rates_of_steps(longer.optimizer, longer.curriculum.table)[steps:]
        assert len(rates) == 100 and rates.argmax() == 9 and rates[-1] == config.optimizer.end_learning_rate
        before, after = config.optimizer, longer.optimizer  # Muon's rate goes on from where it was, too
        assert after.muon_learning_rate / before.muon_learning_rate == 0.5
        assert after.peak_learning_rate / before.peak_learning_rate == 0.5
        config, steps = longer, steps + 100
    assert "muon" not in longer_flags(run_of(20))[1]
    assert longer_flags(run_of(20, optimizer__schedule="constant"))[1].count("--config") == 1


def test_the_command_of_a_finished_run_is_of_its_workdirs_config_and_allows_the_epochs_it_takes():
    config = run_of(20)
    allowed = config.data.max_epochs
    _, command = longer_command(config, Path("a run"), data={"epochs": allowed / 6})  # 100 steps more: 6 times as many
    assert command.startswith("btlm train '--config=a run/config.json' '--workdir=a run' --config.curriculum.num_tok")
    assert "max_epochs" not in command
    sources = {"web": {"epochs": 0.1}, "books": {"epochs": allowed - 0.5}}
    _, command = longer_command(config, Path("run"), data={"sources": sources})
    assert command.endswith(f" --config.data.max_epochs={math.ceil(6 * (allowed - 0.5))}")
    assert longer_command(config, Path("run"), data=None)[1].count("max_epochs") == 0


def test_the_commands_that_the_end_prints_can_be_given_as_they_are(tmp_path, monkeypatch):
    workdir = tmp_path / "a run"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text("")
    summary = {"num_steps": 20, "num_tokens": 7680, "heldout": {"sources": {}}}
    summary |= {"sample": {"prompt": "it's", "continuation": "so"}}
    lines = _summary_text(summary, run_of(20), workdir).splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("  btlm ")]
    assert commands[-1] == ["btlm", "generate", f"--checkpoint={workdir}", "--prompt=it's"]
    assert commands[-2][:2] == ["btlm", "report"] and main(commands[-2][1:]) == 0
    monkeypatch.setattr("btlm_jax.train.finish.mirror_of", lambda workdir: mock.Mock(is_remote=True))
    assert f"btlm report '{workdir}' --output=report.html\n" in _summary_text(summary, run_of(20), workdir)


def test_a_config_from_before_schedules_and_the_mask_is_the_linear_one_without_it():
    config = json.loads(tiny_config().to_json())
    for name in ("schedule", "initial_learning_rate", "decay_share", "schedule_begin", "schedule_tokens"):
        del config["optimizer"][name]
    del config["data"]["document_mask"], config["data"]["weights"]
    assert with_later_keys(config) == json.loads(tiny_config().to_json())


def test_going_back_sets_later_checkpoints_aside_once(tmp_path):
    for step in (3, 6, 9, 10):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("rows\n")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="--resume_step=4: there is no such checkpoint .*; there are 3, 6, 9, 10"):
        go_back(tmp_path, 4)
    assert go_back(tmp_path, 10) == ""
    moved, move = [], Path.replace

    def killed_at_the_third(path: Path, target: Path) -> Path:
        moved.append(path.name)
        if len(moved) == 3:
            raise KeyboardInterrupt
        return move(path, target)

    with mock.patch.object(Path, "replace", killed_at_the_third), pytest.raises(KeyboardInterrupt):
        go_back(tmp_path, 6)
    assert moved == ["summary.json", "10", "9"] and checkpoint_steps(tmp_path) == [3, 6, 9]
    assert "what came after it is in" in go_back(tmp_path, 6)
    aside = tmp_path / "replaced" / "from-6"
    assert checkpoint_steps(tmp_path) == [3, 6] and checkpoint_steps(aside) == [9, 10]
    assert (aside / "summary.json").is_file() and not (tmp_path / "summary.json").exists()
    assert (aside / "metrics.jsonl").read_text() == (tmp_path / "metrics.jsonl").read_text() == "rows\n"
    (tmp_path / "checkpoints" / "8").mkdir()  # the run has gone on, and its command is repeated
    assert "was done before, and is not done again" in go_back(tmp_path, 6) and checkpoint_steps(tmp_path) == [3, 6, 8]
    assert loop._go_back(tmp_path, 6, mock.Mock()) == []  # nothing to record of it


def train(capsys, *arguments) -> tuple[int, str]:
    code = run_here(*arguments)
    said = capsys.readouterr()
    return code, said.out + said.err


def events_of(workdir: Path) -> list[str]:
    return [row["message"] for row in read_metrics(workdir / "metrics.jsonl") if row["kind"] == "event"]


@pytest.mark.slow
def test_other_settings_are_said_and_the_printed_advice_works(tiny_run, tmp_path, capsys):
    config, finished = tiny_run
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    command = train_arguments(config, workdir)
    code, said = train(capsys, *command, "--config.optimizer.peak_learning_rate=0.06", "--config.optimizer.beta1=0.8")
    assert code == 0 and "Already done" in said and notices.counts()["setting-changed"] == 2
    changed = {"optimizer.peak_learning_rate was 0.006, is now 0.06", "optimizer.beta1 was 0.9, is now 0.8"}
    assert changed <= set(events_of(workdir)) and all(change in said for change in changed)
    code, said = train(capsys, *command, "--config.curriculum.num_tokens=(2304, 3840)")
    assert code == 1 and "Choose how to go on" in said
    _, said = train(capsys, *command)
    (advice,) = re.findall(r"^  btlm (train --config=.* --config.curriculum.num_tokens=.*)$", said, flags=re.MULTILINE)
    # As printed it is 100 steps with a warm-up of 10; here 4 with a warm-up of 1.
    shorter = {
        f"(2304, {1536 + 100 * PER_STEP})": f"(2304, {1536 + 4 * PER_STEP})",
        f"warmup_tokens={10 * PER_STEP}": f"warmup_tokens={PER_STEP}",
    }
    for old, new in shorter.items():
        assert advice.count(old) == 1
        advice = advice.replace(old, new)
    code, said = train(capsys, *shlex.split(advice))
    assert code == 0, said
    rates = [row["learning_rate"] for row in recorded(workdir, "train")]
    assert rates[:NUM_STEPS] == [row["learning_rate"] for row in recorded(finished, "train")]
    fall = (0.003 - 1.0198e-4) / 3
    assert rates[NUM_STEPS:] == pytest.approx([0.003, 0.003 - fall, 0.003 - 2 * fall, 1.0198e-4], rel=1e-12)
    assert "optimizer.peak_learning_rate was 0.006, is now 0.003" in events_of(workdir)
    assert "curriculum.num_tokens was (2304, 1536), is now (2304, 3072)" in events_of(workdir)
    code, said = train(capsys, *shlex.split(advice))
    assert code == 0 and "Already done" in said and "schedule_begin=5376" in said


def test_a_summary_says_how_many_epochs_its_tokens_were():
    assert _epochs_text({"epochs": 1.25, "tokens_per_epoch": 9}) == ", 1.250 epochs"
    sources = {"web": {"epochs": 0.5}, "books": {"epochs": 2.0}, "code": {"epochs": 0.0}, "damaged": 3, "too": {}}
    assert _epochs_text({"sources": sources}) == ", 0.500 epochs of web, 2.000 epochs of books"
    assert _epochs_text(None) == _epochs_text({"epochs": "1"}) == ""
