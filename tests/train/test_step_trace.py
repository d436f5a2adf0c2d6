"""The profiler's trace has the steps that were asked for, and nothing else."""

import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData
from support.fake_run import fake_config

from btlm_jax import notices
from btlm_jax.train import PROFILE
from btlm_jax.train.metric_writer import GoodputLedger
from btlm_jax.train.step_trace import StepTrace


def traced_step(x):
    return jnp.tanh(x @ x)


STEP = jax.jit(traced_step)


def run_steps(workdir: Path, first_step: int, last_step: int, *, window: str) -> GoodputLedger:
    """Run steps of a loop that has nothing but them."""
    state, ledger = STEP(jnp.ones((40, 40))), GoodputLedger()
    run = types.SimpleNamespace(config=fake_config(log__profile_steps=window), workdir=workdir, ledger=ledger)
    trace = StepTrace(run, first_step=first_step)
    for number in range(first_step, last_step + 1):
        trace.before(number, state)
        state = STEP(state)
        trace.after(number, state)
    trace.close(last_step)
    return ledger


def traces(folder: Path) -> list[tuple[list[int], int]]:
    """Of each trace: the numbers of its steps, and how many events are calls of the program."""
    if jax.__version_info__ >= (0, 11):
        pytest.skip("ProfileData of JAX 0.11.2 ends the process where it reads what an event has besides its name")
    found = []
    for path in sorted(folder.rglob("*.xplane.pb")):
        data = ProfileData.from_file(str(path))  # its parts are read while it is there: they do not keep it
        steps, num_calls = [], 0
        for plane in data.planes:
            for line in plane.lines:
                for event in line.events:
                    num_calls += traced_step.__name__ in event.name
                    if event.name == "train":
                        steps.append(dict(event.stats)["step_num"])
        found.append((sorted(steps), num_calls))
    return found


@pytest.fixture(scope="module")
def events_of_a_call(tmp_path_factory):
    """How many events of a trace one call of the program is."""
    folder, state = tmp_path_factory.mktemp("one"), STEP(jnp.ones((40, 40))).block_until_ready()
    with jax.profiler.trace(str(folder)):
        STEP(state).block_until_ready()
    ((_, count),) = traces(folder)
    assert count
    return count


def test_a_trace_has_the_steps_of_its_window(tmp_path, events_of_a_call, capsys):
    notices.begin(strict=())
    ledger = run_steps(tmp_path, 1, 6, window="3:4")
    assert traces(tmp_path) == [([3, 4], 2 * events_of_a_call)]
    said = capsys.readouterr().out
    assert (
        f"Tracing steps 3 to 4 into {tmp_path / PROFILE / 'steps_3_4'}" in said and "Traced the steps up to 4" in said
    )
    assert 0 < ledger.seconds()["profile"] < ledger.seconds()["total"]
    run_steps(tmp_path, 5, 6, window="3:4")  # a resume after it
    assert len(traces(tmp_path)) == 1 and notices.counts() == {}


@pytest.mark.parametrize(
    ("first", "last", "traced", "missing"), [(4, 6, [4], "3 to 3"), (5, 6, None, "3 to 4"), (1, 3, [3], None)]
)
def test_steps_that_a_resume_is_past_are_said_and_a_run_that_ends_writes_its_trace(
    tmp_path, first, last, traced, missing, events_of_a_call, capsys
):
    notices.begin(strict=())
    run_steps(tmp_path, first, last, window="3:4")
    assert traces(tmp_path) == ([] if traced is None else [(traced, len(traced) * events_of_a_call)])
    assert notices.counts() == ({"not-traced": 1} if missing else {})
    if missing:
        assert f"the next step is {first}, so steps {missing} are not traced" in capsys.readouterr().err
