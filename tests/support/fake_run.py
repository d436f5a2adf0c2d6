"""A training run without a model: what it records is made up, and its clock moves only when told.

    python fake_run.py WORKDIR FIRST_STEP LAST_STEP TRACKER

is such a run in a process of its own, with a tracker, that evaluates after every third step; it prints a line after the
last step, and waits to be killed.
"""

import sys
import time
import types
from pathlib import Path

from support.tiny import tiny_config

from btlm_jax.recipe.config import TrainConfig
from btlm_jax.recipe.curriculum import make_curriculum
from btlm_jax.train.metric_writer import EvaluationWork, GoodputLedger, MetricWriter
from btlm_jax.train.trackers import TrackerProcess

# 4 steps of 12 x 16 and 5 steps of 4 x 48, 192 tokens each; a token costs 1e6 and 3e6 FLOP.
CURRICULUM = make_curriculum(seq_len=(16, 48), batch_size=(12, 4), num_tokens=(4 * 192, 5 * 192))
FLOPS_OF_PHASE = (1e6, 3e6)
EVALUATION = EvaluationWork(every_steps=3, flops=4e6, final_flops=90e6)
PEAK = 1e9


class Clock:
    """Seconds that pass only by assignment."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeRun:
    """A loop without a model: `step` takes its seconds in the ledger and is recorded."""

    def __init__(self, workdir, *, first_step=1, log_every=1, is_writer=True, followers=(), evaluates_before=False):
        self.clock = Clock()
        self.ledger = GoodputLedger(self.clock)
        self.writer = MetricWriter(
            workdir,
            first_step=first_step,
            evaluates_before=evaluates_before or first_step in (1, CURRICULUM.num_steps + 1),
            curriculum=CURRICULUM,
            flops_of_phase=FLOPS_OF_PHASE,
            evaluation=EVALUATION,
            peak_flops=PEAK,
            log_every=log_every,
            is_writer=is_writer,
            ledger=self.ledger,
            followers=followers,
        )

    def spend(self, name, seconds):
        with self.ledger.measure(name):
            self.clock.now += seconds

    def step(self, step, *, seconds=2.0, loss=4.5):
        self.spend("step", seconds)
        self.writer.train(step, learning_rate=0.01 / step, metrics={"loss": loss, "grad_norm": 0.5})


def result(loss=3.25):
    sources = {"code": {"loss": loss, "bits_per_byte": 1.5}, "prose": {"loss": 2 * loss, "bits_per_byte": 0.75}}
    return types.SimpleNamespace(to_json=lambda: {"loss": loss, "sources": sources})


def fake_config(**changes) -> TrainConfig:
    """Return the config of such a run; a change is written log__every_steps=2."""
    lengths = {"curriculum__seq_len": (16, 48), "curriculum__batch_size": (12, 4)}
    tokens = {"curriculum__num_tokens": (4 * 192, 5 * 192), "optimizer__warmup_tokens": 192}
    return tiny_config(**lengths, **tokens, **changes)


def record_steps(run: FakeRun, first_step: int, last_step: int) -> None:
    """Record steps, and an evaluation after every third."""
    for step in range(first_step, last_step + 1):
        run.step(step, loss=10 / step)
        if step % 3 == 0:
            run.writer.evaluation(step, result(1 / step))


def main() -> None:
    """Run until killed."""
    workdir, first_step, last_step, tracker = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    run = FakeRun(workdir, first_step=first_step, followers=[TrackerProcess(tracker, workdir, first_step=first_step)])
    with run.writer:
        record_steps(run, first_step, last_step)
        print("recorded", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main()
