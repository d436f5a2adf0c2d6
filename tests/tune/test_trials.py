"""A directory of trials: each is made once, whoever takes part, and goes on after a stop."""

import dataclasses
import json
import math
import signal
import subprocess
import threading
import types

import numpy as np
import pytest
from support.tiny import tiny_config

from btlm_jax import notices
from btlm_jax.stopping import PEER_GONE, Stop, Stopped
from btlm_jax.storage import owner
from btlm_jax.train.loop import BAD_NUMBERS, DONE, PREEMPTED, WRONG_DEVICE
from btlm_jax.train.starts import read_sound_starts
from btlm_jax.tune import trials
from btlm_jax.tune.trials import Result, Trial, begin_study, read_result, work


def trial(number: int) -> Trial:
    return Trial(name=f"trial-{number}", config=tiny_config(seed=number))


def finish(config, workdir, outcome: str = DONE) -> str:
    """Leave what a run leaves; its loss is its seed."""
    (workdir / "checkpoints").mkdir(exist_ok=True)
    if outcome == DONE:
        (workdir / "summary.json").write_text(json.dumps({"heldout": {"loss": float(config.seed)}}))
    print(f"trained {config.seed}")
    return outcome


def run_all(directory, choose, run_trial, *, reason=""):
    stop = Stop()
    stop.reason = reason
    return work(directory, choose, run_trial, stop=stop, log=lambda line: None)


def test_each_trial_is_made_once_by_workers_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "_WAIT_SECONDS", 0.01)
    made, lock, both = [], threading.Lock(), threading.Barrier(2, timeout=30)

    def run_trial(config, workdir):
        with lock:
            made.append(config.seed)
            number = len(made)
        if number <= 2:
            both.wait()  # two are being made at one time
        return finish(config, workdir)

    found = []
    workers = [
        threading.Thread(
            target=lambda: found.append(run_all(tmp_path, lambda _: [trial(n) for n in range(5)], run_trial))
        )
        for _ in range(2)
    ]
    for each in workers:
        each.start()
    for each in workers:
        each.join(60)
    assert sorted(made) == [0, 1, 2, 3, 4]
    assert [{name: result.loss for name, result in each.items()} for each in found] == 2 * [
        {f"trial-{n}": float(n) for n in range(5)}
    ]
    assert not list(tmp_path.glob("trials/*/checkpoints")) and not list(tmp_path.glob("trials/*/owner.json"))


def test_losses_are_of_a_quarter_of_the_tokens_and_not_of_few():
    phases = {"curriculum__num_tokens": (384 * 3000, 384 * 1000), "data__max_epochs": 10**6}
    assert trials.heldout_tokens(tiny_config()) == 65_536 and trials.heldout_tokens(tiny_config(**phases)) == 384_000


def test_resampled_means_scatter_as_the_mean_does():
    """Of 0 and 1, whose standard deviation is 0.5 sqrt(2), the mean has the standard error 0.5: 2 of 4 draws differ."""
    rng = np.random.default_rng(0)
    found = {round(trials.resampled_mean([0.0, 1.0], rng), 6) for _ in range(50)}
    assert found == {round(0.5 + sign * 0.5 * math.sqrt(2), 6) for sign in (-1, 0, 1)}


def test_what_is_tried_next_follows_from_the_results(tmp_path, capsys):
    def choose(results):
        return [trial(number) for number in range(len(results) + 1) if number < 3]

    assert set(run_all(tmp_path, choose, finish)) == {"trial-0", "trial-1", "trial-2"}
    assert (tmp_path / "trials/trial-2/log.txt").read_text() == "trained 2\n"
    assert capsys.readouterr().out == ""


def test_a_stop_leaves_the_trial_to_be_gone_on_with(tmp_path):
    def stopped(config, workdir):
        return finish(config, workdir, DONE if config.seed == 0 else PREEMPTED)

    assert run_all(tmp_path, lambda _: [trial(0), trial(1)], stopped) is None
    assert read_result(tmp_path, "trial-0") is not None and read_result(tmp_path, "trial-1") is None
    assert (tmp_path / "trials/trial-1/checkpoints").is_dir()
    assert run_all(tmp_path, lambda _: [trial(1)], finish, reason="SIGTERM") is None
    assert set(run_all(tmp_path, lambda _: [trial(0), trial(1)], finish)) == {"trial-0", "trial-1"}


def test_a_run_that_diverged_has_an_infinite_loss(tmp_path):
    found = run_all(tmp_path, lambda _: [trial(1)], lambda config, workdir: finish(config, workdir, BAD_NUMBERS))
    assert found["trial-1"].loss == math.inf
    assert json.loads((tmp_path / "trials/trial-1/result.json").read_text())["outcome"] == BAD_NUMBERS
    with pytest.raises(ValueError, match="a device computes wrongly, as .*trial-2/log.txt says"):
        run_all(tmp_path, lambda _: [trial(2)], lambda config, workdir: finish(config, workdir, WRONG_DEVICE))
    assert not (tmp_path / "trials/trial-2/result.json").exists()


def test_a_trial_of_another_owner_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "_WAIT_SECONDS", 0.01)
    workdir = tmp_path / "trials/trial-0"
    workdir.mkdir(parents=True)
    other = owner.take(workdir, steal=False)
    waited = []

    def release(_):
        waited.append(1)
        if len(waited) == 3:
            other.release()
        return [trial(0)]

    assert run_all(tmp_path, release, finish) == {"trial-0": Result(loss=0.0, seconds=pytest.approx(0, abs=5))}
    assert len(waited) >= 3


def test_trials_of_another_machine_are_passed_over_without_watching_them(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "_WAIT_SECONDS", 0.01)
    workdir = tmp_path / "trials/trial-0"
    workdir.mkdir(parents=True)
    owner.take(workdir, steal=False)
    file = workdir / owner.OWNER_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"machine": "another"}))
    monkeypatch.setattr(owner.time, "sleep", lambda seconds: pytest.fail("it is watched") if seconds > 0.1 else None)

    def choose(results):
        if "trial-1" in results:
            file.unlink(missing_ok=True)  # that command is done with it
        return [trial(0), trial(1)]

    assert list(run_all(tmp_path, choose, finish)) == ["trial-0", "trial-1"]


def test_another_study_and_damaged_results_are_refused(tmp_path):
    begin_study(tmp_path, {"kind": "a", "config": {"x": (1, 2)}})
    (tmp_path / "trials/trial-0").mkdir(parents=True)
    begin_study(tmp_path, {"kind": "a", "config": {"x": (1, 2)}})
    for other, said in (((1, 3), r"\[1\]=2, not 3"), ((1,), r"=\[1, 2\], not \[1\]")):
        with pytest.raises(ValueError, match=rf"another study, of config.x{said}; give its flags again"):
            begin_study(tmp_path, {"kind": "a", "config": {"x": other}})
    for contents, said in (
        ('{"loss": "low", "seconds": 1.0}', "has no loss and seconds"),
        ('{"lo', "is not valid JSON"),
    ):
        (tmp_path / "trials/trial-0/result.json").write_text(contents)
        with pytest.raises(ValueError, match=f"result.json {said}.*; delete .*, and the trial is made again"):
            read_result(tmp_path, "trial-0")
    (tmp_path / "study.json").write_text('{"kind"')
    with pytest.raises(ValueError, match="is not valid JSON: .*; delete .*study.json, and give the same command again"):
        begin_study(tmp_path, {"kind": "a"})


def test_a_study_from_before_a_key_of_the_config_goes_on(tmp_path):
    study = {"kind": "a", "config": dataclasses.asdict(tiny_config())}
    begin_study(tmp_path, study)
    (tmp_path / "trials/trial-0").mkdir(parents=True)
    kept = json.loads((tmp_path / "study.json").read_text())
    del kept["config"]["optimizer"]["average"], kept["config"]["log"]["reference"]
    (tmp_path / "study.json").write_text(json.dumps(kept))
    begin_study(tmp_path, study)
    averaged = {"kind": "a", "config": dataclasses.asdict(tiny_config(optimizer__average="ema"))}
    with pytest.raises(ValueError, match='of config.optimizer.average="none", not "ema"'):
        begin_study(tmp_path, averaged)


def test_a_study_is_of_one_token_store(tmp_path):
    def prepare(fingerprint):
        manifest = types.SimpleNamespace(fingerprint=fingerprint)
        return lambda config, directory: types.SimpleNamespace(directory=tmp_path / "store", manifest=manifest)

    config = tiny_config(corpus__source="installed_python")
    for _ in range(2):
        store = trials.study_store(config, tmp_path, prepare("one"))
    on_it = trials.on_store(config, store)
    assert (on_it.data.store, on_it.corpus.source) == (str(tmp_path / "store"), "prepared")
    with pytest.raises(ValueError, match="store of data.store=.* has the fingerprint two, but the losses in .* one"):
        trials.study_store(config, tmp_path, prepare("two"))


def test_a_study_that_has_made_nothing_is_replaced(tmp_path):
    begin_study(tmp_path, {"kind": "a", "config": {"path": "gone"}})
    (tmp_path / "compile_cache").mkdir()
    (tmp_path / "compile_cache/made").touch()
    (tmp_path / "store.json").write_text('{"fingerprint": "of another"}')
    (tmp_path / "trials").mkdir()
    begin_study(tmp_path, {"kind": "a", "config": {"path": "there"}})
    assert json.loads((tmp_path / "study.json").read_text())["config"] == {"path": "there"}
    assert not (tmp_path / "store.json").exists()
    assert notices.counts()["study-replaced"] == 1
    (tmp_path / "store").mkdir()
    (tmp_path / "store/manifest.json").touch()
    with pytest.raises(ValueError, match='holds another study, of kind="a", not "b"'):
        begin_study(tmp_path, {"kind": "b"})


@pytest.mark.parametrize("name", ["config.json", "checkpoints/3/state"])
def test_the_workdir_of_a_run_is_no_study(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match="of a training run or a model; give another directory"):
        begin_study(tmp_path, {"kind": "a"})
    assert not (tmp_path / "study.json").exists()


@pytest.mark.parametrize(("gpus", "visible", "platforms"), [(0, "", ""), (0, "4,5", "cpu"), (1, "4,5,7", "")])
def test_workers_share_the_machine(tmp_path, monkeypatch, gpus, visible, platforms):
    """Each has its own cores or GPUs, all of them are dealt out, and this process keeps the first share."""
    cores, started = {0, 1, 2, 3, 4}, []

    def set_affinity(_, share):
        cores.clear()
        cores.update(share)

    def popen(command, *, env, **files):
        started.append((command, sorted(cores), env.get("CUDA_VISIBLE_DEVICES", "")))

    monkeypatch.setattr(trials.os, "sched_getaffinity", lambda _: set(cores))
    monkeypatch.setattr(trials.os, "sched_setaffinity", set_affinity)
    monkeypatch.setattr(trials.subprocess, "Popen", popen)
    monkeypatch.setattr(trials.Path, "glob", lambda *_: [trials.Path("/dev/nvidia0")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    trials.start_workers(2, ["tune", "search"], directory=tmp_path, started=[])
    ((command, theirs, their_gpus),) = started
    assert command[1:] == ["-m", "btlm_jax", "tune", "search"]
    if gpus:
        assert (trials.os.environ["CUDA_VISIBLE_DEVICES"], their_gpus, theirs) == ("4", "5,7", [0, 1, 2, 3, 4])
    else:
        assert (sorted(cores), theirs) == ([0, 1], [2, 3, 4])
    with pytest.raises(ValueError, match="--workers=9, but there are"):
        trials.start_workers(9, [], directory=tmp_path, started=[])


def test_workers_end_with_a_command_that_is_stopped_before_its_first_trial(tmp_path, monkeypatch):
    """By an error in the main thread, and by an end at once, at which it has no say; it waits until they have saved."""
    made, codes, now = [], [], [100.0]
    stop = Stop(clock=lambda: now[0])

    class Saving(subprocess.Popen):
        def wait(self, timeout=None):
            now[0] += 60.0
            stop.tick()
            return super().wait(timeout)

    def start(count, arguments, *, directory, started):
        made.append(Saving(["bash", "-c", "trap 'sleep 0.3; exit 75' TERM; echo; while :; do sleep 0.02; done"],
                           stdout=subprocess.PIPE))  # fmt: skip
        with made[-1].stdout as said:
            said.readline()  # from here on it takes the signal
        started.append(made[-1])

    def leave(code):
        codes.append((code, [process.poll() for process in made]))

    monkeypatch.setattr(trials, "start_workers", start)
    monkeypatch.setattr("btlm_jax.stopping.os._exit", leave)
    stop.request("SIGTERM")
    with pytest.raises(Stopped), trials.workers_beside(2, [], directory=tmp_path, stop=stop, log=print):
        raise Stopped
    assert (codes, [process.poll() for process in made]) == ([], [75])
    with trials.workers_beside(2, [], directory=tmp_path, stop=stop, log=print):
        stop.end_now(75, "preempted")
    assert codes == [(75, [75, 75])]


def test_trials_of_one_process_do_not_take_over_what_was_of_others(tmp_path, monkeypatch):
    """Neither notices nor that there were steps: a stop while the second is set up is at once, and is recorded."""
    from btlm_jax.cli.tune import make_run_trial
    from btlm_jax.train import loop

    now, codes = [100.0], []
    stop = Stop(clock=lambda: now[0])
    monkeypatch.setattr("btlm_jax.stopping.os._exit", codes.append)

    def train(config, *, workdir, stop, **more):
        if config.seed == 1:
            notices.report("step-skipped", "no update", count=3)
            stop.begin_steps()
            stop.is_agreed(1)
            return BAD_NUMBERS
        assert stop.workdir == workdir
        stop.end_now(PEER_GONE, "it stands still")
        assert read_sound_starts(workdir)[0].code == PEER_GONE
        stop._on_signal(signal.SIGTERM, None)
        return DONE

    monkeypatch.setattr(loop, "train", train)
    run_trial = make_run_trial(stop)
    for number in (1, 2):
        (tmp_path / f"{number}").mkdir()
    assert run_trial(tiny_config(seed=1), tmp_path / "1") == BAD_NUMBERS
    for _ in range(8000):  # more than the hour in which a step was due
        now[0] += 0.5
        stop.tick()
    assert codes == []
    with pytest.raises(Stopped):
        run_trial(tiny_config(seed=2), tmp_path / "2")
    first, second = (read_sound_starts(tmp_path / f"{number}")[0] for number in (1, 2))
    assert (first.notices, first.code) == ({"step-skipped": 3}, 76)
    assert (second.notices, second.code, codes) == ({}, 75, [PEER_GONE])
