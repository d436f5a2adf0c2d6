"""Time to quality: seconds from the start of a process to so many bits per byte of held-out text, ours and PyTorch's.

Command: python benchmarks/time_to_loss.py --folder=DIR [--trials=5] [--seconds=300] [--short=150]
         python benchmarks/time_to_loss.py --folder=DIR --quick      all parts in miniature: its figures say nothing

Trainers, on the token store that the local config makes (corpus, tokenizer of 4,096 pieces), with models of about its
4.2 M parameters:

  btlm_jax, default      btlm train --config=local_cpu, as it is
  btlm_jax, best flags   the same command with flags, its steps sized to --seconds
  nanoGPT style          torch_trainers.py: GPT-2's block, AdamW, cosine
  nanochat style         torch_trainers.py: RoPE, squared ReLU, untied, Muon and AdamW, linear end

What is the same for all: the cores, a process of its own for each run, glibc's huge pages, the text, and how settings
are chosen, by the final bits per byte of --trials runs: first the published ones, then one change after another of the
best so far (MOVES: learning rate x 2 and / 2, the batch; ours also other constants, Muon, short sequences alone). Peers
have 2 trials more (--peer_trials): our second constants were found before by `python -m experiments.search`, in 40 runs
of 67 steps, 13 of them gone on with to 200, on another text. The default has one run, as its settings were found before
(LOG.md, 2026-11-23). Peers run in the form (torch.compile or not, precision) that makes most steps within the budget,
as measured here. All schedules end with the budget, the default's with its 600 steps.

Counted time begins with the process and has imports, compilation with empty caches, reading, steps and, ours, saves of
checkpoints; it stands still in evaluations, for all. What is made before, once, and counted for nobody: the token
store, our C++ kernels (PyTorch's come compiled), steps measured to size our runs and to choose the peers' form.

Bits per byte are nats / ln 2 / bytes over the first blocks of 512 tokens of each held-out source, every token with what
precedes it in its block; the bytes are those of the text that the target tokens stand for. The time to a level is read
off the straight line between the evaluations on both sides of it, in the run that is there first: that of --seconds or
that of the same settings sized to --short. "after" is the last evaluation, or the line at --seconds.

A run that is in DIR is not made again, so that the same command goes on after Ctrl-C; the report is written after every
run. --gather writes it alone. Give the machine nothing else to do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(ROOT)]

import loss_curves  # noqa: E402  beside this file
import numpy as np  # noqa: E402
from machine import has_bfloat16, machine  # noqa: E402

from btlm_jax.storage.files import write_atomically  # noqa: E402

DEFAULT, FLAGS = "btlm_jax, default", "btlm_jax, best flags"
GPT, CHAT = "nanoGPT style", "nanochat style"  # torch_trainers' names; it is imported by the processes that train
TRAINERS = (DEFAULT, FLAGS, GPT, CHAT)
SEARCHED = (FLAGS, GPT, CHAT)
# What is compiled ("compile": Muon's update too, which only one peer has), and the precision; as in torch_trainers.py.
FORMS = (
    *("compile, float32", "compile, medium", "compile, bfloat16"),
    *("compile model, bfloat16", "eager, bfloat16"),
)
EVALUATIONS = 20  # of a run
EXPECTED_OVER = 90.0  # seconds that a run takes beyond its budget: evaluations, sizing; until it is measured
END_SHARE = 1.0198e-4 / 0.006  # of the peak learning rate, as in the config
OVERHEAD = 0.03  # of a step of ours, for saves: what sizing a run allows for
BLOCK_LEN = 512  # of the token store, and of what is evaluated
RESULT, CURVE, DONE, LOG = "result.json", "curve.jsonl", "done.json", "log.txt"

Setting = dict[str, object]
Move = tuple[str, object]  # a key of a setting, and its new value; a float is a factor
# "rate" is a factor of the published learning rates, "batch" are tokens a step; "constants" are keys of CONSTANTS.
CONSTANTS: dict[str, dict[str, float]] = {
    "btlm": {"optimizer.peak_learning_rate": 0.006, "mup.output_multiplier": 2.22},
    "searched": {
        "optimizer.peak_learning_rate": 0.0085,
        "optimizer.weight_decay": 0.053,
        "mup.init_std": 0.12,
        "mup.output_multiplier": 0.6,
    },
}
FIRST: dict[str, Setting] = {
    FLAGS: {"rate": 1.0, "batch": 1024, "lengths": "128, 512", "constants": "btlm", "optimizer": "adamw"},
    GPT: {"rate": 1.0, "batch": 1024},
    CHAT: {"rate": 1.0, "batch": 1024},
}
MOVES: dict[str, tuple[Move, ...]] = {
    FLAGS: (
        *(("constants", "searched"), ("optimizer", "muon"), ("lengths", "128")),
        *(("rate", 2.0), ("rate", 0.5), ("batch", 2.0), ("batch", 0.5)),
    ),
    GPT: (("rate", 2.0), ("rate", 0.5), ("batch", 2.0), ("batch", 0.5)),
    # Its rates are published for batches of 2^19 tokens, from which they are scaled far down.
    CHAT: (("rate", 4.0), ("rate", 2.0), ("rate", 0.5), ("batch", 2.0), ("batch", 0.5)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What --quick makes smaller."""

    peers: dict[str, dict[str, int]]  # shape of torch_trainers.Shape
    flags: tuple[str, ...]  # of btlm, for the model
    default_steps: tuple[int, int]  # of the two phases
    corpus_flags: tuple[str, ...]
    blocks_per_source: int
    forms: tuple[str, ...]
    calibration_steps: int


FULL = Size(
    peers={
        GPT: dict(vocab_size=4096, num_layers=4, d_model=256, num_heads=4, block_len=512),
        CHAT: dict(vocab_size=4096, num_layers=4, d_model=224, num_heads=4, block_len=512),
    },
    flags=(),
    default_steps=(450, 150),
    corpus_flags=(),
    blocks_per_source=24,
    forms=FORMS,
    calibration_steps=16,
)
TINY = Size(
    peers={
        GPT: dict(vocab_size=4096, num_layers=1, d_model=32, num_heads=2, block_len=512),
        CHAT: dict(vocab_size=4096, num_layers=1, d_model=32, num_heads=2, block_len=512),
    },
    flags=(
        *("model.num_layers=1", "model.d_model=32", "model.d_ff=86", "model.num_heads=2"),
        *("mup.base_num_layers=1", "mup.base_d_model=32.0", "mup.base_d_ff=86.0"),
    ),
    default_steps=(6, 2),
    corpus_flags=("corpus.max_bytes=4000000", "corpus.heldout_fraction=0.2"),
    blocks_per_source=2,
    forms=("eager, float32",),
    calibration_steps=4,
)


def next_setting(trainer: str, tried: Sequence[tuple[Setting, float]]) -> Setting | None:
    """Return the setting to try after those of (setting, bits per byte) in their order; None where no move is left.

    A move that helped is made again where it is a factor; one that did not, and the inverse of one that did, are over.
    """
    if not tried:
        return FIRST[trainer]
    (best, least), over = tried[0], set()
    for setting, bits in tried[1:]:
        (move,) = [move for move in MOVES[trainer] if _changed(best, move) == setting]
        if bits < least:
            best, least = setting, bits
            key, value = move
            over.add((key, 1 / value) if isinstance(value, float) else move)
        else:
            over.add(move)
    left = (_changed(best, move) for move in MOVES[trainer] if move not in over)
    made = [setting for setting, _ in tried]
    return next((setting for setting in left if setting["batch"] >= BLOCK_LEN and setting not in made), None)


def _changed(setting: Setting, move: Move) -> Setting:
    key, value = move
    return setting | {key: type(setting[key])(setting[key] * value) if isinstance(value, float) else value}


# ---- in the process of a run


class CountedTime:
    """Seconds since the process began, without those of evaluations; evaluations are written to a file."""

    def __init__(self, began: float, curve: Path, *, num_bytes: int):
        self._began, self._curve, self._num_bytes = began, curve, num_bytes
        self.paused = 0.0

    def __call__(self) -> float:
        return time.monotonic() - self._began - self.paused

    def record(self, step: int, make_nats: Callable[[], float]) -> None:
        """Evaluate, in time that is not counted."""
        seconds, began = self(), time.monotonic()
        bits = loss_curves.bits_per_byte(make_nats(), self._num_bytes)
        with open(self._curve, "a") as file:
            print(json.dumps({"step": step, "seconds": seconds, "bits_per_byte": bits}), file=file)
        self.paused += time.monotonic() - began


def run_child(spec: dict, *, began: float) -> None:
    """Make one run in this process; what was done is in its folder then."""
    folder = Path(spec["folder"])
    clock = CountedTime(began, folder / CURVE, num_bytes=spec["heldout_bytes"])
    if "command" in spec:
        _run_ours(spec, clock=clock)
        return
    import torch_trainers

    heldout = np.load(spec["heldout_file"])

    def record(step: int, nats: Callable) -> None:
        clock.record(step, lambda: nats(heldout["tokens"], heldout["num_targets"]))

    done = torch_trainers.run(spec, record=record, counted=clock)
    (folder / DONE).write_text(json.dumps(done | {"evaluating": clock.paused}))


def _run_ours(spec: dict, *, clock: CountedTime) -> None:
    """Run the command line of `btlm train`; evaluations of the loop are those of the clock, one more is at the end."""
    import jax

    from btlm_jax.train import loop

    evaluate, finish = loop.evaluate_some, loop.finish_run

    def nats_of(result) -> float:
        assert result.total.num_tokens == spec["heldout_tokens"], "not the held-out blocks that peers are measured on"
        return result.total.nats

    def evaluate_some(run, params):
        results = []
        step = run.ledger.step or 0
        clock.record(step, lambda: results.append(evaluate(run, params)) or nats_of(results[0]))
        return results[0]

    def finish_run(run, params, writer, **more):
        evaluate_some(run, params)
        seconds = run.ledger.seconds()
        parts = {
            "compile": seconds.get("compile", 0.0),
            "data": seconds.get("corpus", 0.0) + seconds.get("data wait", 0.0),
            "train": seconds.get("step", 0.0),
            "save": seconds.get("checkpoint", 0.0),
        }
        curriculum = run.config.curriculum.table
        done = {
            "parts": {"start": clock() - sum(parts.values()), **parts}, "steps": curriculum.num_steps,
            "tokens": curriculum.num_tokens, "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "evaluating": clock.paused, "step_seconds_by_length": step_seconds(run.workdir),
        }  # fmt: skip
        (Path(spec["folder"]) / DONE).write_text(json.dumps(done))
        finish(run, params, writer, **more)

    loop.evaluate_some, loop.finish_run = evaluate_some, finish_run
    sys.argv = spec["command"]
    from btlm_jax.cli import entry

    entry()


def step_seconds(workdir: Path) -> dict[str, float]:
    """Return the median seconds of a step of ours by sequence length, the first two of each left out."""
    from btlm_jax.train import METRICS_FILE
    from btlm_jax.train.metric_writer import read_metrics

    seconds: dict[str, list[float]] = {}
    for row in read_metrics(workdir / METRICS_FILE):
        if row["kind"] == "train":
            seconds.setdefault(str(row["seq_len"]), []).append(row["seconds"])
    return {length: statistics.median(each[2:] or each) for length, each in seconds.items()}


# ---- the runs


def export_tokens(store: Path, folder: Path, *, blocks_per_source: int) -> dict:
    """Write what peers read, the stream of training tokens and the held-out blocks; return where, and their sizes."""
    from btlm_jax.data.reader import open_store
    from btlm_jax.data.store import HELDOUT, TRAIN
    from btlm_jax.train.finish import heldout_blocks

    opened = open_store(store, expected_fingerprint="")
    train, heldout = opened.split(TRAIN), opened.split(HELDOUT)
    stream = np.concatenate([block.tokens[: block.num_targets] for block in train.read_many(range(len(train)))])
    np.save(folder / "train.npy", stream)
    numbers = [number for _, number in heldout_blocks(heldout.split, blocks_per_source=blocks_per_source)]
    blocks = heldout.read_many(numbers)
    lengths = loss_curves.piece_bytes((store / opened.manifest.tokenizer.file).read_bytes())
    np.savez(
        folder / "heldout.npz",
        tokens=np.stack([block.tokens for block in blocks]),
        num_targets=np.array([block.num_targets for block in blocks]),
    )
    return {
        "tokens_file": str(folder / "train.npy"),
        "heldout_file": str(folder / "heldout.npz"),
        "train_tokens": len(stream),
        "heldout_tokens": sum(block.num_targets for block in blocks),
        "heldout_bytes": int(sum(lengths[block.tokens[1 : block.num_targets + 1]].sum() for block in blocks)),
        "fingerprint": opened.manifest.fingerprint,
    }


class Study:
    """The folder of all runs: what is there, and how to make what is not."""

    def __init__(self, folder: Path, *, seconds: float, cores: Sequence[int], size: Size, is_gathering: bool):
        self.folder, self.seconds, self.cores, self.size = folder, seconds, cores, size
        self._is_gathering = is_gathering
        self.over: list[float] = []  # what runs made now took beyond their budget

    def prepare(self) -> dict:
        """Make the token store, the kernels and the peers' files, once; return what they are."""
        path = self.folder / "prepared.json"
        if path.exists():
            return json.loads(path.read_text())
        began = time.monotonic()
        flags = [*self.size.corpus_flags, *self.size.flags]
        say("the token store, as btlm train makes it")
        command = [sys.executable, "-m", "btlm_jax", "corpus", "build", "--config=local_cpu"]
        command += [f"--workdir={self.folder / 'corpus'}", *(f"--config.{flag}" for flag in flags)]
        with open(self.folder / "corpus.txt", "w") as log:
            self._call(command, log=log, what="the token store")
        made = time.monotonic()
        say("the C++ kernels, if this machine has not compiled them yet")
        code = "from btlm_jax.kernels.build import has_training_kernels as f; print(f())"
        self._call([sys.executable, "-c", code], log=subprocess.DEVNULL, what="the kernels")
        kernels = time.monotonic()
        values = {
            "store_seconds": made - began,
            "kernel_seconds": kernels - made,
            **export_tokens(self.store, self.folder, blocks_per_source=self.size.blocks_per_source),
        }
        write_atomically(path, json.dumps(values, indent=1))
        return values

    @property
    def store(self) -> Path:
        return self.folder / "corpus" / "store"

    def run(self, name: str, spec: dict) -> dict:
        """Return the result of a run, which is made if it is not there.

        Raises:
          SystemExit: it failed; says where its output is.
          NotMadeError: it is not there, and results are gathered only.
        """
        folder = self.folder / "runs" / name
        if (folder / RESULT).exists():
            return json.loads((folder / RESULT).read_text())
        if self._is_gathering:
            raise NotMadeError(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        prepared = self.prepare()
        spec = spec | prepared | {"folder": str(folder)}
        (folder / "spec.json").write_text(json.dumps(spec, indent=1))
        began = time.monotonic()
        command = [sys.executable, str(HERE), "--child", str(folder / "spec.json"), "--began", repr(began)]
        with open(folder / LOG, "w") as log:
            code = self._call(command, log=log, what=name, caches=folder / "caches", may_end_with=(0, 76))
        curve = []
        if (folder / CURVE).exists():
            curve = [json.loads(line) for line in (folder / CURVE).read_text().splitlines()]
        done = json.loads((folder / DONE).read_text()) if code == 0 else {"diverged": f"exit code {code}"}
        result = {"name": name, "spec": spec, "curve": curve, "wall_seconds": time.monotonic() - began, **done}
        if "diverged" not in done:
            result["bits_per_byte"] = loss_curves.value_after(
                spec.get("seconds", math.inf), loss_curves.curve_of(result)
            )
        for part in ("caches", "run"):  # checkpoints and compiled code
            shutil.rmtree(folder / part, ignore_errors=True)
        write_atomically(folder / RESULT, json.dumps(result, indent=1))
        return result

    def _call(self, command, *, log, what: str, caches: Path | None = None, may_end_with=(0,)) -> int:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(len(self.cores)),
        }  # fmt: skip
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        if self.size is TINY:  # whose times say nothing: runs share what is compiled
            environment["JAX_COMPILATION_CACHE_DIR"] = str(self.folder / "compiled")
        if caches:
            environment |= {"TORCHINDUCTOR_CACHE_DIR": str(caches)}
        started = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, self.cores),
        )  # fmt: skip
        try:
            code = started.wait()
        except KeyboardInterrupt:
            started.terminate()
            started.wait()
            raise SystemExit(f"{what} is interrupted; the same command makes it anew and goes on") from None
        if code not in may_end_with:
            raise SystemExit(f"{what} ended with exit code {code}; see {getattr(log, 'name', 'its output')}")
        return code

    # -- ours

    def ours(self, name: str, setting: Setting | None, *, seconds: float, seed: int) -> dict:
        """Return the result of a run of ours: of the default config without a setting, else sized to the budget."""
        if (self.folder / "runs" / name / RESULT).exists():
            return self.run(name, {})
        changes: dict[str, object] = {"seed": 1 + seed, "data.seed": 1 + seed}
        if setting is None:
            steps = list(self.size.default_steps)
            if self.size is not FULL:
                changes |= _curriculum((128, 512), (8, 2), steps) | {"optimizer.warmup_tokens": 1024}
            setting_of_run = {"setting": None}
        else:
            lengths, rows = _lengths_and_rows(setting)
            steps = self.steps_within(seconds, setting)
            changes |= _flags_of(setting) | _curriculum(lengths, rows, steps)
            warmup = max(1, round(sum(steps) / 15)) * setting["batch"]  # the config's share
            changes |= {"optimizer.warmup_tokens": warmup}
            setting_of_run = {"setting": setting, "seconds": seconds, "form": _dtype()}
        every = max(1, sum(steps) // EVALUATIONS)
        return self.run(name, {"command": self._command(name, changes, every=every), **setting_of_run})

    def _command(self, name: str, changes: dict[str, object], *, every: int) -> list[str]:
        changes = changes | {
            "data.store": self.store.resolve(), "corpus.source": "prepared", "evaluation.every_steps": every,
            "evaluation.blocks_per_source": self.size.blocks_per_source,
        }  # fmt: skip
        flags = [*(f"--config.{key}={value}" for key, value in changes.items())]
        flags += [f"--config.{flag}" for flag in self.size.flags]
        return ["btlm", "train", "--config=local_cpu", f"--workdir={self.folder / 'runs' / name / 'run'}", *flags]

    def steps_within(self, seconds: float, setting: Setting) -> list[int]:
        """Return how many steps of each phase take so many seconds, as measured in a run of some steps of each."""
        lengths, rows = _lengths_and_rows(setting)
        steps = [self.size.calibration_steps] * len(lengths)
        relevant = {key: value for key, value in setting.items() if key != "rate"}
        name = slug("step of ours " + " ".join(f"{key} {value}" for key, value in relevant.items()))
        changes = _flags_of(setting) | _curriculum(lengths, rows, steps) | {"optimizer.warmup_tokens": 1024}
        measured = self.run(name, {"command": self._command(name, changes, every=10_000)})
        per_step = measured["step_seconds_by_length"]
        first = measured["curve"][0]["seconds"]
        shares = (1.0,) if len(lengths) == 1 else (0.75, 0.25)
        mean = sum(share * per_step[str(length)] for share, length in zip(shares, lengths, strict=True))
        total = max(4, (seconds - first) / (mean * (1 + OVERHEAD)))
        return [max(2, int(total * share)) for share in shares]

    # -- peers

    def peer(self, name: str, setting: Setting, *, trainer: str, form: str, seconds: float, seed: int) -> dict:
        """Return the result of a run of a peer."""
        per_step = self.measured_form(trainer, form, batch=setting["batch"])
        tokens = int(seconds / per_step["step_seconds"]) * setting["batch"]
        return self.run(
            name,
            self._peer_spec(trainer, form, setting, seconds=seconds, seed=seed) | {"expected_tokens": max(tokens, 1)},
        )

    def _peer_spec(self, trainer: str, form: str, setting: Setting, *, seconds: float, seed: int) -> dict:
        return {
            "peer": trainer,
            "form": form,
            "shape": self.size.peers[trainer],
            "setting": setting,
            "rate": setting["rate"],
            "rows": setting["batch"] // BLOCK_LEN,
            "seconds": seconds,
            "seed": seed,
            "evaluations": EVALUATIONS,
            "expected_tokens": 10**6,
        }

    def measured_form(self, trainer: str, form: str, *, batch: int) -> dict:
        """Return the result of a run of some steps of a peer."""
        setting = {"rate": 1.0, "batch": batch}
        spec = self._peer_spec(trainer, form, setting, seconds=10_000.0, seed=0)
        steps = {"max_steps": self.size.calibration_steps, "evaluations": 1}
        return self.run(self._form_name(trainer, form, batch=batch), spec | steps)

    def best_form(self, trainer: str) -> str:
        """Return the form in which a peer makes most steps within the budget."""

        def steps(form: str) -> float:
            measured = self.measured_form(trainer, form, batch=FIRST[trainer]["batch"])
            started = measured["parts"]["start"] + measured["parts"]["compile"]
            return (self.seconds - started) / measured["step_seconds"]

        forms = [form for form in self.size.forms if "bfloat16" not in form or has_bfloat16()]
        return max((form for form in forms if trainer == CHAT or "model" not in form), key=steps)

    def measured_forms(self) -> dict[str, float]:
        """Return the seconds of a step of each peer in each form that was measured, at the first batch."""
        found = {}
        for trainer in (GPT, CHAT):
            for form in self.size.forms:
                path = self.folder / "runs" / self._form_name(trainer, form, batch=FIRST[trainer]["batch"]) / RESULT
                if path.exists():
                    found[f"{trainer}, {form}"] = json.loads(path.read_text())["step_seconds"]
        return found

    @staticmethod
    def _form_name(trainer: str, form: str, *, batch: int) -> str:
        return slug(f"step of {trainer} {form} batch {batch}")

    def make(self, trainer: str, name: str, setting: Setting | None, *, seconds: float, seed: int) -> dict:
        """Return the result of a run of any trainer."""
        if trainer in (DEFAULT, FLAGS):
            return self.ours(name, setting, seconds=seconds, seed=seed)
        form = self.best_form(trainer)
        return self.peer(name, setting, trainer=trainer, form=form, seconds=seconds, seed=seed)


def _lengths_and_rows(setting: Setting) -> tuple[tuple[int, ...], tuple[int, ...]]:
    lengths = tuple(map(int, setting["lengths"].split(", ")))
    return lengths, tuple(setting["batch"] // length for length in lengths)


def _flags_of(setting: Setting) -> dict[str, object]:
    """Return the keys of the config that a setting changes, but those of the curriculum."""
    flags: dict[str, object] = dict(CONSTANTS[setting["constants"]])
    peak = flags["optimizer.peak_learning_rate"] * setting["rate"]
    flags |= {"optimizer.peak_learning_rate": peak, "optimizer.end_learning_rate": END_SHARE * peak}
    if setting["optimizer"] == "muon":
        flags |= {"optimizer.hidden_optimizer": "muon", "optimizer.muon_learning_rate": 0.02 * setting["rate"]}
    return flags | {"model.dtype": _dtype()}


def _dtype() -> str:
    """Return the faster dtype of ours on this processor."""
    return "bfloat16" if has_bfloat16() else "float32"


def _curriculum(lengths: Sequence[int], rows: Sequence[int], steps: Sequence[int]) -> dict[str, object]:
    units = [math.lcm(BLOCK_LEN, n * t) for n, t in zip(rows, lengths, strict=True)]  # whole blocks, whole steps
    tokens = [-(-s * n * t // unit) * unit for s, n, t, unit in zip(steps, rows, lengths, units, strict=True)]
    values = {"seq_len": lengths, "batch_size": rows, "num_tokens": tokens}
    return {f"curriculum.{key}": f"({', '.join(map(str, value))},)" for key, value in values.items()}


# ---- the whole


class NotMadeError(Exception):
    """A run is not there, and none is to be made."""


def conduct(
    study: Study,
    trainers: Sequence[str],
    *,
    trials: dict[str, int],
    short: float,
    seeds: int,
    report: Callable[[dict], None],
) -> None:
    """Make all runs, so many trials of each trainer in turns first; `report` gets the results by trainer after each."""
    found: dict = {trainer: {"trials": [], "short": [], "seeds": []} for trainer in trainers}
    searched = [trainer for trainer in trainers if trainer in SEARCHED]
    left = [study.seconds] * sum(trials[trainer] for trainer in trainers) + [short] * len(searched) * bool(short)
    left += [study.seconds] * len(trainers) * (seeds - 1)

    def make(trainer: str, kind: str, setting: Setting | None, *, seconds: float, seed: int = 0) -> dict:
        rest = sum(left) + len(left) * statistics.fmean(study.over or [EXPECTED_OVER])
        left.pop(0)
        about = time.strftime("%H:%M", time.localtime(time.time() + rest))
        say(f"{trainer}, {kind}: {setting or 'as it is'}; about {rest / 60:.0f} min are left, until {about}")
        began = time.monotonic()
        result = study.make(trainer, slug(f"{trainer} {kind}"), setting, seconds=seconds, seed=seed)
        if (took := time.monotonic() - began) > 1:  # it was not there yet
            study.over.append(took - seconds)
        say(f"  {result['bits_per_byte']:.4f} bits/byte" if "diverged" not in result else f"  {result['diverged']}")
        return result

    for number in range(max(trials[trainer] for trainer in trainers)):
        for trainer in trainers:
            if number >= trials[trainer]:
                continue
            tried = [(result["spec"]["setting"], loss_curves.end_of(result)) for result in found[trainer]["trials"]]
            setting = next_setting(trainer, tried) if trainer in SEARCHED else None
            if setting is None and trainer in SEARCHED:
                left.pop(0)
                continue
            found[trainer]["trials"].append(make(trainer, f"trial {number + 1}", setting, seconds=study.seconds))
            report(found)
    for trainer in trainers:
        setting = loss_curves.best_of(found[trainer])["spec"]["setting"]
        if short and trainer in SEARCHED:
            found[trainer]["short"].append(make(trainer, "short", setting, seconds=short))
            report(found)
    for seed in range(1, seeds):
        for trainer in trainers:
            setting = loss_curves.best_of(found[trainer])["spec"]["setting"]
            kind = f"seed {seed + 1}"
            found[trainer]["seeds"].append(make(trainer, kind, setting, seconds=study.seconds, seed=seed))
            report(found)


def slug(text: str) -> str:
    """Return a name that is one of a folder."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in text).split())


def write_report(found: dict, study: Study, output: Path, *, command: str) -> str:
    """Write the table, the numbers as JSON and the figure; return the table."""
    rows = [
        loss_curves.row_of(trainer, runs, seconds=study.seconds)
        for trainer, runs in found.items()
        if loss_curves.has_result(runs)
    ]
    table = loss_curves.table_of(rows, seconds=study.seconds, reference=FLAGS)
    prepared = study.prepare()
    setting = (
        f"{machine('jax', 'torch')}; on cores {', '.join(map(str, study.cores))}. Held-out text of "
        f"{prepared['heldout_bytes']:,} bytes, {prepared['heldout_tokens']:,} tokens; to train on "
        f"{prepared['train_tokens']:,} tokens. Not counted: the store, {prepared['store_seconds']:.0f} s, and our "
        f"kernels, {prepared['kernel_seconds']:.0f} s."
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    picture = output.with_suffix(".png")
    loss_curves.draw(found, picture, seconds=study.seconds)
    runs = {
        trainer: {kind: [loss_curves.facts_of(result) for result in results] for kind, results in each.items()}
        for trainer, each in found.items()
    }
    forms = study.measured_forms()
    numbers = {"command": command, "setting": setting, "rows": rows, "forms": forms, "runs": runs}
    write_atomically(output.with_suffix(".json"), json.dumps(numbers) + "\n")
    write_atomically(
        output,
        f"# Time to quality\n\n`{command}`\n\n{setting}\n\n{table}\n\n![bits per byte]({picture.name})\n\n"
        f"{loss_curves.trials_table(found)}\n\nMilliseconds a step of {FIRST[GPT]['batch']:,} tokens: "
        + "; ".join(f"{name} {1e3 * seconds:.0f}" for name, seconds in forms.items())
        + ".\n",
    )
    return table


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


SHORT_NAMES = dict(zip(("default", "flags", "nanogpt", "nanochat"), TRAINERS, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of all runs; some 300 MB")
    parser.add_argument("--trials", type=int, default=5, help="runs to choose our flags by; may grow later")
    parser.add_argument("--peer_trials", type=int, help="runs to choose a peer's settings by (default: 2 more)")
    parser.add_argument("--seconds", type=float, default=300.0, help="the budget of a run")
    parser.add_argument("--short", type=float, default=150.0, help="budget of one more run of the best; 0: none")
    parser.add_argument("--seeds", type=int, default=1, help="runs of the best settings, the trial included")
    parser.add_argument("--trainers", nargs="+", choices=SHORT_NAMES, default=list(SHORT_NAMES))
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--quick", action="store_true", help="all parts in miniature, in under two minutes")
    parser.add_argument("--gather", action="store_true", help="make no run: report those that are there")
    parser.add_argument("--output", type=Path, help="of the table; .json and .png are beside it (default: in --folder)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(json.loads(arguments.child.read_text()), began=arguments.began)
        return
    if not arguments.folder:
        parser.error("--folder=DIR is needed: the runs go there, and the same command goes on there")
    if arguments.quick:
        arguments.seconds, arguments.short, arguments.seeds = 6.0, 0.0, 1
        arguments.trials = arguments.peer_trials = 1
    if arguments.peer_trials is None:
        arguments.peer_trials = arguments.trials + 2
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"seconds": arguments.seconds, "short": arguments.short, "quick": arguments.quick, "cores": arguments.cores}
    if (folder / "study.json").exists() and (there := json.loads((folder / "study.json").read_text())) != facts:
        parser.error(f"{folder} has runs of {there}, this is {facts}; give another --folder")
    write_atomically(folder / "study.json", json.dumps(facts))
    study = Study(
        folder, seconds=arguments.seconds, cores=arguments.cores, size=TINY if arguments.quick else FULL,
        is_gathering=arguments.gather,
    )  # fmt: skip
    output = arguments.output or folder / "time_to_loss.md"
    names = ("trials", "peer_trials", "seconds", "short", "seeds")
    flags = [f"--{name}={getattr(arguments, name):g}" for name in names] if not arguments.quick else ["--quick"]
    command = " ".join(["python benchmarks/time_to_loss.py --folder=DIR", *flags])
    tables = [""]

    def report(found: dict) -> None:
        tables.append(write_report(found, study, output, command=command))

    trainers = [SHORT_NAMES[name] for name in arguments.trainers]
    trials = {DEFAULT: 1, FLAGS: arguments.trials, GPT: arguments.peer_trials, CHAT: arguments.peer_trials}
    try:
        conduct(study, trainers, trials=trials, short=arguments.short, seeds=arguments.seeds, report=report)
    except NotMadeError as missing:
        say(f"not there yet: {missing}")
    print(f"{tables[-1]}\nwrote {output}, and .json and .png beside it")


if __name__ == "__main__":
    main()
