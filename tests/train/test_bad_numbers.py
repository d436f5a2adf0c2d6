"""Updates from bad numbers are not made, a run goes back from many of them, and every start of it does the same."""

import contextlib
import dataclasses
import math
import shutil
import statistics
import threading
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.loop_run import StopAt
from support.tiny import tiny_config

from btlm_jax import notices
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.recipe.config import UpdateRule, with_later_keys
from btlm_jax.train import loop
from btlm_jax.train.checkpoint import (
    Checkpointer,
    Position,
    SettingChange,
    kept_steps,
    last_position,
    restore_last,
)
from btlm_jax.train.metric_writer import GoodputLedger
from btlm_jax.train.setup import Beginning
from btlm_jax.train.step import WINDOW, History, TrainState, judge

NUM_STEPS, EVERY = 24, 4
PHASES = {"curriculum__num_tokens": (14 * 384, 10 * 384), "checkpoint__every_steps": EVERY, "checkpoint__keep_last": 1}
BAD = {"bad_numbers__max_skips": 3, "bad_numbers__max_rollbacks": 2}


def empty_history() -> History:
    zero = jnp.zeros((), jnp.int32)
    return History(values_SW=jnp.zeros((3, WINDOW)), count=zero, first_step=zero, skips=zero)


def judged_in_python(rows, rules, *, watched_from: int) -> list[bool]:
    """The definition in `judge`, with lists; rows of (phase's first step, three values)."""
    made, window, phase, skips = [], [], 0, 0
    for step, (first_step, values) in enumerate(rows):
        if first_step != phase:
            window, phase = [], first_step
        is_spike = False
        if len(window) == WINDOW and step >= watched_from and rules.spike_score:
            for index, value in enumerate(values):
                past = [row[index] for row in window]
                median = statistics.median(past)
                deviation = max(1.4826 * statistics.median(abs(x - median) for x in past), 0.01 * median)
                is_spike |= value > median + rules.spike_score * deviation
        made.append(all(map(math.isfinite, values)) and not is_spike and skips < rules.max_skips)
        skips = 0 if made[-1] else skips + 1
        if made[-1]:
            window = [*window, values][-WINDOW:]
    return made


@pytest.mark.parametrize("watched_from", [0, 130])
def test_updates_are_judged_as_the_definition_says(watched_from):
    rng, rows = np.random.default_rng(3), []
    for step in range(320):
        values = rng.normal((5.0, 1.0, 0.1), (0.2, 0.1, 0.01)).tolist()
        if step in (20, 100, 111, 112, 113, 150, 190, 260, 300):  # spikes of one value or of two
            values[step % 3] *= 20
            values[(step + 1) % 3] *= 1 if step % 2 else 9
        if step in (5, 150, 151):
            values[1] = (math.nan, math.inf)[step % 2]
        rows.append((0 if step < 180 else 180, np.float32(values).tolist()))
    rules = {
        first_step: UpdateRule(spike_score=8.0, max_skips=4, first_step=first_step, watched_from=watched_from)
        for first_step in (0, 180)
    }
    steps = {
        first: jax.jit(lambda h, v, step, rule=rule: judge(h, v, jnp.bool_(True), step=step, rule=rule))
        for first, rule in rules.items()
    }
    history, found = empty_history(), []
    for step, (first, values) in enumerate(rows):
        is_made, history = steps[first](history, jnp.asarray(values), step)
        found.append(bool(is_made))
    assert found == judged_in_python(rows, rules[0], watched_from=watched_from)
    skipped = {step for step, is_made in enumerate(found) if not is_made}
    assert {5, 150, 151, 300} <= skipped and not {20, 190} & skipped  # 20, 190: no full window of the phase yet
    assert (111 in skipped) == (watched_from == 0)


@pytest.mark.slow
def test_after_as_many_as_are_allowed_no_update_is_made_before_the_run_goes_back():
    rule = UpdateRule(spike_score=0.0, max_skips=2, first_step=0, watched_from=0)
    history, found = empty_history(), []
    for value in (1.0, math.nan, math.inf, 1.0, 1.0):
        is_made, history = judge(history, jnp.full(3, value), jnp.bool_(True), step=jnp.int32(0), rule=rule)
        found.append((bool(is_made), int(history.skips)))
    assert found == [(True, 0), (False, 1), (False, 2), (False, 3), (False, 4)]


def test_a_step_without_targets_is_neither_made_nor_counted():
    history = dataclasses.replace(empty_history(), skips=jnp.int32(2), count=jnp.int32(9))
    rule = UpdateRule(spike_score=0.0, max_skips=4, first_step=0, watched_from=0)
    is_made, after = judge(history, jnp.zeros(3), jnp.bool_(False), step=jnp.int32(9), rule=rule)
    assert not is_made and jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), after, history))


def test_updates_of_another_learning_rate_are_no_spikes():
    """With the rate three times as large, as a resume may set it, norms of updates are too."""
    rule = UpdateRule(spike_score=8.0, max_skips=4, first_step=0, watched_from=0)
    step = jax.jit(lambda h, v: judge(h, v, jnp.bool_(True), step=jnp.int32(500), rule=rule))
    history = empty_history()
    for number in range(80):
        _, history = step(history, jnp.array([5.0, 1.0, 0.1 + 0.001 * (number % 3)]))
    state = TrainState(step=jnp.int32(500), params={}, opt_state=(), history=history)
    raised = jnp.array([5.0, 1.0, 0.3])
    for key, expected in (("optimizer.average_share", False), ("optimizer.peak_learning_rate", True)):
        begun = loop._begin_history(state, [SettingChange(key, 1, 3)], spike_score=8.0)
        assert bool(step(begun.history, raised)[0]) == expected
        assert bool(step(begun.history, raised)[1].count == 1) == expected


@dataclasses.dataclass
class Recorder:
    """A MetricWriter that keeps what a resumed run would not write again."""

    losses: dict[int, str] = dataclasses.field(default_factory=dict)
    events: dict[tuple[int, str], None] = dataclasses.field(default_factory=dict)
    last_step: int = 0
    passed_over: tuple[tuple[int, int], ...] = ()  # that the ledger knows of

    def train(self, step, *, learning_rate, metrics):
        assert learning_rate == step
        self.losses[step] = repr(metrics["loss"])

    def record_event(self, step, message, *, is_repeated=False):
        assert is_repeated != ("is damaged" in message)
        self.events[step, message] = None

    def event(self, step, message):
        self.events[step, message] = None

    def evaluation(self, step, result):
        assert result == "evaluated"

    def evaluation_follows(self):
        pass


class Loader:
    """The number of each step, from 1, as its batch; nan for a bad one."""

    use, order = "", types.SimpleNamespace(epochs_seen=lambda step: {})

    def __init__(self, bad):
        self._bad = bad

    def batches(self, *, first_step):
        for index in range(first_step, NUM_STEPS):
            yield index, jnp.float32(math.nan if index + 1 in self._bad else index + 1)


def fake_train_step(rule):
    """A step whose parameters tell which steps were taken, in their order."""

    @jax.jit
    def train_step(state, batch, learning_rate):
        is_made, history = judge(state.history, batch * jnp.ones(3), jnp.bool_(True), step=state.step, rule=rule)
        params = {"w": jnp.where(is_made, (3 * state.params["w"] + batch) % 4093, state.params["w"])}
        metrics = {"loss": batch, "weight": jnp.float32(1), "grad_norm": batch, "skips": history.skips}
        return TrainState(step=state.step + 1, params=params, opt_state=(), history=history), metrics

    return train_step


def parameters_after(steps) -> float:
    """What the parameters are when just these steps were taken."""
    w = 1
    for step in steps:
        w = (3 * w + step) % 4093
    return float(w)


def train(workdir, monkeypatch, *, bad, preempted_at=(), last_stop=0, why_not_again="", **changes):
    """Run the loop to its end through preemptions; return (outcome, recorder, final parameters, passed over)."""
    config = tiny_config(**{**PHASES, **BAD, **changes})
    sharding = NamedSharding(make_mesh(devices=jax.devices()[:1], tensor=1), PartitionSpec())
    state0 = TrainState(
        step=jnp.zeros((), jnp.int32), params={"w": jnp.float32(1)}, opt_state=(), history=empty_history()
    )
    state0 = jax.device_put(state0, sharding)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state0)
    steps = tuple(fake_train_step(config.update_rule(phase)) for phase in config.curriculum.table.phases)
    run = types.SimpleNamespace(
        config=config, workdir=workdir, train_steps=steps, ledger=GoodputLedger(),
        learning_rates=np.arange(1.0, NUM_STEPS + 1),
        token_store=types.SimpleNamespace(manifest=types.SimpleNamespace(fingerprint="abc")),
    )  # fmt: skip
    finished = []
    monkeypatch.setattr(loop, "_make_loader", lambda run: Loader(bad))
    monkeypatch.setattr(loop, "evaluate_some", lambda run, params: "evaluated")
    monkeypatch.setattr(loop, "_write_evidence", lambda run, error, loader: f"w={float(error.state.params['w'])}")
    monkeypatch.setattr(loop, "finish_run", lambda run, params, writer, **_: finished.append(float(params["w"])))
    notices.begin(strict=())
    writer, outcome, position = Recorder(), loop.PREEMPTED, None
    for stop in (*preempted_at, last_stop):
        checkpointer = Checkpointer(workdir, config=config.checkpoint)
        position, state, _ = last_position(checkpointer, config)
        if position.step:
            position, state, _ = restore_last(checkpointer, config, abstract=abstract)
        train_from: Any = loop._train_from
        outcome = train_from(
            run, state or state0, position, checkpointer=checkpointer, writer=writer, stop=StopAt(stop),
            beginning=Beginning(make_state=lambda run: state0, why_not_again=lambda: why_not_again, events=()),
            continue_prompt=lambda run, params: "",
        )  # fmt: skip
        checkpointer.close()
        if outcome != loop.PREEMPTED:  # it passes over the others
            break
    checkpointer = Checkpointer(workdir, config=config.checkpoint)
    last = checkpointer.read_metadata(checkpointer.steps()[-1])[0] if checkpointer.steps() else None
    checkpointer.close()
    writer.passed_over = tuple(run.ledger.passed_over)
    return outcome, writer, finished, last


def test_a_bad_step_is_passed_by_and_the_rest_is_as_without_it(tmp_path, monkeypatch):
    outcome, writer, finished, last = train(tmp_path, monkeypatch, bad={5, 6, 11})
    assert outcome == loop.DONE and finished == [parameters_after(set(range(1, 25)) - {5, 6, 11})]
    assert {step for step, loss in writer.losses.items() if loss == "nan"} == {5, 6, 11}
    assert [step for step, _ in writer.events] == [5, 6, 11] and notices.counts() == {"step-skipped": 3}
    assert last is not None and last.passed_over == () and last.tokens_seen == NUM_STEPS * 384


# Of each: bad steps, the ranges that are passed over, and the steps that are trained.
ROLLBACKS = [
    ({6, 7, 8}, ((5, 8),), [*range(1, 5), *range(9, 25)]),  # step 5 is undone: the bad numbers may come from it
    ({2, 3, 4}, ((1, 4),), list(range(5, 25))),  # to the beginning
    ({13, 14, 15, 18}, ((13, 15),), [*range(1, 13), 16, 17, *range(19, 25)]),  # over the change of phases
    ({9, 10, 11, 12, 13, 14, 15}, ((9, 11), (9, 14)), [*range(1, 9), *range(16, 25)]),  # twice to the same
    ({10, 11, 12, 20, 21, 22}, ((9, 12), (17, 22)), [*range(1, 9), *range(13, 17), 23, 24]),
]


@pytest.mark.parametrize(("bad", "passed_over", "trained"), ROLLBACKS)
def test_after_bad_steps_in_a_row_a_run_goes_back_and_passes_over_them(
    tmp_path, monkeypatch, bad, passed_over, trained
):
    lost, roll_back, restore = [], loop._roll_back, Checkpointer.restore_state

    def roll_back_noting(run, error, position, **named):
        lost.extend(jax.tree.leaves(error.state))
        return roll_back(run, error, position, **named)

    def restore_beside_nothing(checkpointer, step, *, abstract):
        assert all(leaf.is_deleted() for leaf in lost)  # devices need not have memory for two states
        return restore(checkpointer, step, abstract=abstract)

    monkeypatch.setattr(loop, "_roll_back", roll_back_noting)
    monkeypatch.setattr(Checkpointer, "restore_state", restore_beside_nothing)
    outcome, writer, finished, last = train(tmp_path, monkeypatch, bad=bad)
    assert lost
    assert outcome == loop.DONE and finished == [parameters_after(trained)]
    assert last is not None and last.passed_over == passed_over and last.step == NUM_STEPS
    said = [message for _, message in writer.events if message.startswith("went back")]
    assert said == [
        f"went back to step {first - 1}; steps {first} to {end} are passed over" for first, end in passed_over
    ]
    assert sorted(writer.losses) == list(range(1, NUM_STEPS + 1)) and writer.passed_over == passed_over


def test_a_run_goes_back_past_a_checkpoint_whose_config_has_been_damaged_meanwhile(tmp_path, monkeypatch):
    roll_back = loop._roll_back

    def damage_and_roll_back(*given, **named):
        (tmp_path / "checkpoints/12/config/metadata").write_text("{}")
        return roll_back(*given, **named)

    monkeypatch.setattr(loop, "_roll_back", damage_and_roll_back)
    outcome, _, finished, last = train(tmp_path, monkeypatch, bad={13, 14, 15}, checkpoint__keep_last=3)
    assert outcome == loop.DONE and finished == [parameters_after([*range(1, 9), *range(16, 25)])]
    assert last is not None and last.passed_over == ((9, 15),)
    assert notices.counts()["checkpoint-damaged"] == 1 and (tmp_path / "damaged/checkpoints-12").is_dir()


@pytest.mark.parametrize(
    ("every_steps", "bad", "passed_over"),
    [
        ((4, 1000), {13, 14, 15}, ((9, 15),)),  # 10 is no multiple of 4: a start that was not preempted has none there
        ((10, 4), {11, 12, 13}, ((11, 13),)),
        ((1000, 4), {11, 12, 13}, ((1, 13),)),  # with 1000 none was due
    ],
)
def test_a_checkpoint_is_gone_back_to_by_the_config_that_it_was_written_with(
    tmp_path, monkeypatch, every_steps, bad, passed_over
):
    first, second = ({"checkpoint__every_steps": every} for every in every_steps)
    train(tmp_path, monkeypatch, bad=bad, last_stop=10, **first)
    outcome, _, finished, last = train(tmp_path, monkeypatch, bad=bad, **second)
    trained = [step for step in range(1, 25) if not passed_over[0][0] <= step <= passed_over[0][1]]
    assert outcome == loop.DONE and finished == [parameters_after(trained)]
    assert last is not None and last.passed_over == passed_over
    assert (tmp_path / "checkpoints" / "8").is_dir() == (every_steps == (4, 1000))  # until there is one at 1000


def test_a_run_does_not_begin_again_where_a_checkpoint_to_go_back_to_is_missing(tmp_path, monkeypatch, capsys):
    train(tmp_path, monkeypatch, bad={}, last_stop=10)
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    outcome, *_ = train(tmp_path, monkeypatch, bad={13, 14, 15}, checkpoint__every_steps=1000)
    assert outcome == loop.BAD_NUMBERS and "there is no checkpoint to go back to" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["10"]


def test_a_run_whose_beginning_is_gone_stops_there(tmp_path, monkeypatch, capsys):
    outcome, *_ = train(tmp_path, monkeypatch, bad={3, 4, 5}, preempted_at=(2,), why_not_again="the model is gone")
    assert outcome == loop.BAD_NUMBERS and "nor the run's beginning: the model is gone" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "bad, preemptions",
    [
        ({6, 7, 8}, [(3, 7, 9), (5, 6, 8, 10, 11)]),
        ({9, 10, 11, 12, 13, 14, 15}, [(12, 14, 16, 17), (9, 13, 15)]),
    ],
)
def test_a_run_that_is_preempted_goes_back_to_the_same_and_ends_with_the_same_bits(
    tmp_path, monkeypatch, bad, preemptions
):
    _, expected, finished, last = train(tmp_path / "whole", monkeypatch, bad=bad)
    for number, preempted_at in enumerate(preemptions):
        found = train(tmp_path / str(number), monkeypatch, bad=bad, preempted_at=preempted_at)
        assert found[0] == loop.DONE and found[2] == finished and found[3] == last
        assert found[1].losses == expected.losses and set(found[1].events) == set(expected.events)


@pytest.mark.parametrize(
    ("bad", "said", "trained"),
    [
        (range(5, 25), "has gone back 2 times (bad_numbers.max_rollbacks)", range(1, 5)),
        ({22, 23, 24}, "and no step is left", range(1, 22)),
    ],
)
def test_a_run_stops_where_going_back_does_not_help(tmp_path, monkeypatch, capsys, bad, said, trained):
    outcome, writer, finished, _ = train(tmp_path, monkeypatch, bad=set(bad))
    assert outcome == loop.BAD_NUMBERS and not finished
    output = capsys.readouterr().out
    assert said in output and "the updates of 3 steps in a row were not made" in output
    assert f"w={parameters_after(trained)}" in output  # the evidence is of the state before the bad steps
    assert any(message.startswith("stopped on bad numbers at step") for _, message in writer.events)


def test_old_configs_get_the_rules_of_the_files():
    values = dataclasses.asdict(tiny_config())
    del values["bad_numbers"], values["checkpoint"]["keep_hours"]
    assert with_later_keys(values) == dataclasses.asdict(tiny_config())


def test_the_rules_of_what_is_kept():
    config = dataclasses.replace(tiny_config().checkpoint, every_steps=10, keep_last=2, keep_every=50)
    tens = dict.fromkeys(range(200), 10)
    hourly = [(step, 360.0 * step) for step in (*range(10, 120, 10), 123, 124)]  # an hour each
    assert kept_steps(hourly, config, every_steps=tens) == {50, 100, 110, 123, 124}  # 110: the run can go back to it
    assert kept_steps(hourly, config, every_steps=tens | {110: 100}) == {50, 100, 123, 124}
    of_hours = dataclasses.replace(config, keep_hours=3.0)
    assert kept_steps(hourly, of_hours, every_steps=tens) == {10, 40, 50, 70, 100, 110, 123, 124}
    assert kept_steps([], config, every_steps={}) == set()


class FullDisk:
    """Let the saves of these numbers fail, from 0; in the background or at once."""

    def __init__(self, monkeypatch, failing):
        self.numbers, real = iter(range(99)), Checkpointer.save

        def save(checkpointer, state, *, position, config):
            if next(self.numbers) in failing:
                raise OSError("No space left on device")
            real(checkpointer, state, position=position, config=config)

        monkeypatch.setattr(Checkpointer, "save", save)


def test_a_save_that_fails_is_tried_again_and_training_goes_on(tmp_path, monkeypatch):
    FullDisk(monkeypatch, {1, 4})
    outcome, _, finished, last = train(tmp_path, monkeypatch, bad=(), checkpoint__keep_last=50)
    assert outcome == loop.DONE and finished == [parameters_after(range(1, 25))]
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert steps == [4, 10, 12, 18, 20, 24]  # 8 and 16 failed, and were made up for two steps later
    assert notices.counts() == {"save-failed": 2}


def test_a_save_that_still_writes_when_it_has_failed_does_not_fail_the_next_one(tmp_path, monkeypatch):
    """As one that orbax waits for no longer, be it that the storage is slow or that the clock has jumped."""
    left = tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
    threads, real = [], Checkpointer.save

    def write_on():
        until = time.monotonic() + 0.7
        while time.monotonic() < until:
            with contextlib.suppress(FileNotFoundError):  # what is left is deleted meanwhile
                left.mkdir(parents=True, exist_ok=True)
                (left / f"{time.monotonic_ns()}").touch()

    def save(checkpointer, state, *, position, config):
        if position.step == 8:
            threads.append(threading.Thread(target=write_on))
            threads[-1].start()
            while not left.is_dir() and threads[-1].is_alive():
                time.sleep(0.001)
            raise OSError("ChainedFuture completed 6/7 futures but timed out after 36000.21 seconds.")
        real(checkpointer, state, position=position, config=config)

    monkeypatch.setattr(Checkpointer, "save", save)
    outcome, _, finished, _ = train(tmp_path, monkeypatch, bad=(), checkpoint__keep_last=50)
    assert outcome == loop.DONE and finished == [parameters_after(range(1, 25))] and len(threads) == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "12", "16", "20", "24", "4"]


class FailingManager:
    """Orbax's manager whose save seems to go on in the background until someone waits for it."""

    def __init__(self, manager):
        self._manager = manager

    def __getattr__(self, name):
        return getattr(self._manager, name)

    def is_saving_in_progress(self):
        return True

    def wait_until_finished(self):
        raise OSError("No space left on device")


@pytest.mark.parametrize(
    ("failing", "bad", "last_stop", "expected", "noticed"),
    [
        (12, {13, 14, 15}, 0, loop.DONE, "went-back"),
        (8, {12}, 12, loop.PREEMPTED, "step-skipped"),
        (20, {22, 23, 24}, 0, loop.BAD_NUMBERS, "step-skipped"),
    ],
)
def test_a_save_that_failed_in_the_background_does_not_decide_how_bad_numbers_end(
    tmp_path, monkeypatch, failing, bad, last_stop, expected, noticed
):
    real = Checkpointer.save

    def save(checkpointer, state, *, position, config):
        if position.step == failing:
            checkpointer._manager = FailingManager(checkpointer._manager)
        else:
            real(checkpointer, state, position=position, config=config)

    monkeypatch.setattr(Checkpointer, "save", save)
    outcome, writer, *_ = train(tmp_path, monkeypatch, bad=bad, last_stop=last_stop)
    assert outcome == expected and notices.counts()["save-failed"] == 1 and notices.counts()[noticed]
    assert writer.passed_over == (((9, 15),) if expected == loop.DONE else ())  # 8 is the last that is complete


def test_two_failed_saves_in_a_row_end_the_run_with_the_reason(tmp_path, monkeypatch):
    FullDisk(monkeypatch, {1, 2, 3})
    with pytest.raises(OSError, match="No space left on device"):
        train(tmp_path, monkeypatch, bad=())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_the_last_save_is_tried_twice(tmp_path, monkeypatch):
    FullDisk(monkeypatch, {5})
    outcome, _, _, last = train(tmp_path, monkeypatch, bad=())
    assert outcome == loop.DONE and last == Position(step=24, tokens_seen=24 * 384, store_fingerprint="abc")
