"""What to run first on a machine with a GPU: is everything right, and how fast is it beside PyTorch? One table.

Command: python benchmarks/gpu_first_day.py [--minutes=12] [--folder=runs/gpu_first_day] [--output=FILE.md]
         python benchmarks/gpu_first_day.py --miniature      # the same in small on a CPU: it shows that the script runs
Needs pip install -e '.[cuda]', for the comparison '.[bench]' too. The first GPU of CUDA_VISIBLE_DEVICES is used, or the
first of all. Sections, each a process of its own, so that one that fails, or aborts, leaves the others:

  machine     what is here: GPU, driver, CUDA, cuDNN, JAX
  attention   each form, forward and backward, at the head dims it takes, with and without documents, against float64
  losses      of some steps of the local model, against the same steps on the CPU: in float32, and in the GPU's bfloat16
  resume      btlm train back to a checkpoint in the middle, in another process: every number must have the same bits
  generation  btlm generate, greedy, against the CPU's text
  times       steps of 125M to 1.3B parameters beside what btlm_jax predicts of them, attention, then the same without
              XLA's deterministic kernels, and PyTorch compiled with SDPA, with cuDNN's SDPA and with FlexAttention

What is done is said as it comes, and kept in --folder. After Ctrl-C, a lost connection, or where the minutes were not
enough the same command goes on: it measures nothing twice, and tries again what failed. One table at the end has all,
with what was not run and why.

Exit code 0, 1 if a check failed or a section broke off, 2 if nothing can be run here, 130 after Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
OK, FAILED, MEASURED, NOT_RUN = "ok", "FAILED", "measured", "not run"
# Seconds that a section may take on a GPU, so that one that hangs leaves time for the others; `times` has all the rest.
SECTIONS = {"machine": 90.0, "attention": 200.0, "losses": 180.0, "resume": 180.0, "generation": 120.0, "times": None}
BFLOAT16_ERROR, FLOAT32_ERROR, TF32_ERROR = 8e-3, 2e-5, 4e-3  # of norms: of two roundings; of sums; of ten-bit products
GRACE_SECONDS = 60.0  # after the minutes, for what has begun
LEAST_SECONDS, OVER = 20.0, "the minutes were over"  # what begins needs about so many
WORK = "gpu_first_day_work"  # in the folder: what the section that runs writes
LEAST_DISK = 2**30  # bytes: stores, checkpoints, compiled steps
OLDEST_DRIVERS = {"jax_cuda13_plugin": 580, "jax_cuda12_plugin": 525}  # as launch/gpu.sh has it
BUSY_BYTES = 2**30  # of a GPU's memory, in use by others
HALF = 5  # steps of the runs that are made here
PROMPT = "the"
HEADING = "| section | case | figure | at most | |\n|---|---|---|---|---|"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    section: str
    case: str
    figure: str
    verdict: str  # OK, FAILED, MEASURED or NOT_RUN
    limit: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.section, self.case

    @property
    def is_kept(self) -> bool:
        """Whether the same command does not do it again."""
        return self.verdict in (OK, MEASURED)

    def __str__(self) -> str:
        verdict = "" if self.verdict == MEASURED else self.verdict
        cells = (self.section, self.case, self.figure, self.limit, verdict)
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doing:
    """What a section does next; `case` is that of the row which comes of it, if it can be left out when it aborts."""

    text: str
    case: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How a section runs."""

    is_miniature: bool
    folder: Path  # for what it writes
    until: float  # time.time() at which the minutes are over
    skipped: frozenset[str]  # cases that are done, or that ended the process

    @property
    def seconds_left(self) -> float:
        return self.until - time.time()


Progress = Iterator[Row | Doing]


def checked(section: str, case: str, value: float, limit: float) -> Row:
    """Return the row of a value that must not be above a limit; one that is not finite is."""
    return Row(
        section=section, case=case, figure=f"{value:.2g}", limit=f"{limit:.2g}",
        verdict=OK if value <= limit else FAILED,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- sections


def machine(setting: Setting) -> Progress:
    """Say what is here."""
    import jax

    report = functools.partial(Row, section="machine", verdict=MEASURED)
    device = jax.devices()[0]
    is_gpu = device.platform == "gpu"
    yield Row(
        section="machine", case="platform", figure=f"{len(jax.devices())} x {device.device_kind}",
        limit="cpu" if setting.is_miniature else "gpu",
        verdict=OK if is_gpu != setting.is_miniature else FAILED,
    )  # fmt: skip
    if is_gpu:
        memory = (device.memory_stats() or {}).get("bytes_limit", 0) / 2**30
        yield report(case="memory that JAX takes", figure=f"{memory:.1f} GiB")
        yield report(case="compute capability", figure=device.compute_capability)
        fields = ("name", "driver_version", "memory.total", "memory.used", "clocks.max.sm")
        (values,) = query_gpus(*fields, gpu=os.environ["CUDA_VISIBLE_DEVICES"])
        yield report(case="nvidia-smi", figure=", ".join(values))
        from jax._src.lib import cuda_versions

        if cuda_versions is not None:
            yield report(case="cuDNN's version", figure=str(cuda_versions.cudnn_get_version()))
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "torch")
    installed = {each.metadata["Name"] for each in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if name in installed)
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    commit = git(["git", "describe", "--always", "--exclude=*"]).stdout.strip() or "not a checkout"
    changed = git(["git", "status", "--porcelain", "--", "btlm_jax", "benchmarks/*.py"]).stdout.strip()
    yield report(case="commit", figure=commit + ", with changes" * bool(changed))
    yield report(case="versions", figure=f"Python {sys.version.split()[0]}, {versions}")


def attention(setting: Setting) -> Progress:
    """Compare every form with float64."""
    import jax.numpy as jnp

    from btlm_jax.attention.gpu import why_no_kernel

    length = 200 if setting.is_miniature else 1100
    if setting.is_miniature:
        yield Row(section="attention", case="gpu (cuDNN)", figure="a CPU has none of it", verdict=NOT_RUN)
    else:
        for head_dim in (64, 80, 116, 128, 244):
            for has_documents in (False, True):
                case = f"gpu (cuDNN), bfloat16, heads of {head_dim}{', documents' * has_documents}"
                if reason := why_no_kernel(jnp.dtype(jnp.bfloat16), head_dim=head_dim, has_documents=has_documents):
                    yield Row(section="attention", case=case, figure=reason, verdict=NOT_RUN)
                    continue
                sizes = dict(head_dim=head_dim, length=length, has_documents=has_documents, limit=BFLOAT16_ERROR)
                yield from _attention_rows(setting, case, "gpu", "bfloat16", **sizes)
    for implementation in ("chunked", "blockwise"):
        for dtype, precision, limit in (
            ("bfloat16", "default", BFLOAT16_ERROR),
            ("float32", "highest", FLOAT32_ERROR),
            ("float32", "default", TF32_ERROR),
        ):
            case = f"{implementation}, {dtype}, products of {precision} precision, heads of 80, documents"
            sizes = dict(head_dim=80, length=length, has_documents=True, limit=limit)
            yield from _attention_rows(setting, case, implementation, dtype, precision=precision, **sizes)


def _attention_rows(
    setting: Setting, case: str, implementation: str, dtype: str, *, head_dim: int, length: int, has_documents: bool,
    limit: float, precision: str = "default",
) -> Progress:  # fmt: skip
    """Yield the largest error of output and gradients, or how it failed."""
    if case in setting.skipped:
        return
    yield Doing(text=case, case=case)
    try:
        error = _attention_error(implementation, dtype, head_dim, length, has_documents, precision)
    except Exception as problem:  # of whatever kind: the next form is tried all the same
        yield Row(section="attention", case=case, figure=_first_line(problem), verdict=FAILED)
        return
    yield checked("attention", case, error, limit)


def _attention_error(
    implementation: str, dtype: str, head_dim: int, length: int, has_documents: bool, precision: str
) -> float:
    """Return the largest of the norms of o, dq, dk and dv minus float64's, relative to float64's."""
    import jax
    import jax.numpy as jnp

    from btlm_jax.attention import attend
    from btlm_jax.attention.alibi import alibi_slopes

    B, N, scale = 2, 4, 1 / head_dim
    rng = np.random.default_rng(0)
    # Rounded here, so that the oracle has the same inputs.
    arrays = [
        jnp.asarray(rng.standard_normal((B, length, N, head_dim)), np.float32).astype(dtype) * size
        for size in (3, 3, 1, 1)
    ]
    slopes_N = alibi_slopes(N, scaling=1.0)
    bounds = (0, length // 7, length // 7 + 1, length // 2, length) if has_documents else (0, length)
    starts_T = np.zeros(length, np.int32)
    for bound in bounds[1:-1]:
        starts_T[bound:] = bound
    starts_BT = jnp.asarray(np.stack([starts_T] * B)) if has_documents else None

    @jax.jit
    def run(q, k, v, do):
        def function(q, k, v):
            return attend(q, k, v, slopes_N, scale=scale, implementation=implementation, starts_BT=starts_BT)

        o, vjp = jax.vjp(function, q, k, v)
        return o, *vjp(do)

    with jax.default_matmul_precision(precision):
        results = [np.asarray(x, np.float64) for x in run(*arrays)]
    expected = _attend_float64(*(np.asarray(x, np.float64) for x in arrays), slopes_N, starts_T, scale)
    pairs = zip(results, expected, strict=True)
    return max(float(np.linalg.norm(found - value) / np.linalg.norm(value)) for found, value in pairs)


def _attend_float64(q, k, v, do, slopes_N, starts_T, scale):
    """Return o, dq, dk, dv by the definition, in NumPy."""
    results = [np.zeros(q.shape) for _ in range(4)]
    position_T = np.arange(q.shape[1])
    offset_TS = position_T[None, :] - position_T[:, None]
    is_seen_TS = (offset_TS <= 0) & (position_T[None, :] >= starts_T[:, None])
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            own = np.s_[b, :, n]
            scores = np.where(is_seen_TS, scale * q[own] @ k[own].T + float(slopes_N[n]) * offset_TS, -np.inf)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            dweights = do[own] @ v[own].T
            dscores = weights * (dweights - (weights * dweights).sum(1, keepdims=True))
            results[0][own], results[3][own] = weights @ v[own], weights.T @ do[own]
            results[1][own], results[2][own] = scale * dscores @ k[own], scale * dscores.T @ q[own]
    return results


def losses(setting: Setting) -> Progress:
    """Compare the losses of some steps with those on the CPU in float32."""
    import jax
    from steps import read_config

    steps, batch, length = (3, 2, 128) if setting.is_miniature else (20, 4, 512)
    other = "chunked" if setting.is_miniature else "auto"  # in miniature both are the CPU: then in another form
    config = functools.partial(read_config, batch=batch, length=length)
    cpu = jax.devices("cpu")[0]
    yield Doing(text=f"{steps} steps on the CPU, compiled first: a minute or so")
    expected = _losses(config(), cpu, steps)
    here = jax.devices()[0]
    for dtype, precision, limit in (
        ("float32", "highest", 1e-4),
        ("float32", "default", 1e-2),
        ("bfloat16", "default", 3e-2),
    ):
        yield Doing(text=f"{steps} steps, {dtype}, products of {precision} precision")
        with jax.default_matmul_precision(precision):
            found = _losses(config(dtype=dtype, attention=other), here, steps)
        case = f"{steps} steps, {dtype}, products of {precision} precision: largest difference, relative"
        yield checked("losses", case, max(abs(a - b) / b for a, b in zip(found, expected, strict=True)), limit)
    fell = expected[0] - found[-1]
    yield Row(
        section="losses", case="the last of these runs learns: nats its loss fell", figure=f"{fell:.2f}", limit="> 0",
        verdict=OK if fell > 0 else FAILED,
    )  # fmt: skip


def _losses(config, device, steps: int) -> list[float]:
    """Return the losses of steps on one batch, on a device, compiled as `btlm train` compiles them."""
    import jax

    from btlm_jax.parallel.make_mesh import make_mesh
    from btlm_jax.parallel.mesh import batch_sharding
    from btlm_jax.train.program import make_program
    from btlm_jax.train.step import init_state

    program = make_program(config, make_mesh(devices=[device], tensor=1))
    (phase,) = config.curriculum.table.phases
    compiled = program.compile(program.trace_train_step(phase))
    state = init_state(program.model, program.optimizer, program.mesh, seed=1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (1, phase.batch_size, phase.seq_len + 1))
    rows = {"inputs_BT": tokens[..., :-1].astype(np.int32), "targets_BT": tokens[..., 1:].astype(np.int32)}
    rows["weights_BT"] = np.ones(rows["inputs_BT"].shape, np.float32)
    arrays = jax.device_put(rows, batch_sharding(program.mesh, program.rules_for(phase)))
    found = []
    for _ in range(steps):
        state, metrics = compiled(state, arrays, np.float32(1e-3))
        found.append(float(metrics["loss"]))
    return found


def resume(setting: Setting) -> Progress:
    """Go back to a checkpoint in the middle of a run, and compare the end with the first one's."""
    dtype = "float32" if setting.is_miniature else "bfloat16"
    first = setting.folder / "resume"
    yield Doing(text=f"btlm train, {2 * HALF} steps on a store that is made")
    arguments = _train_arguments(setting, first, dtype=dtype)
    _btlm(*arguments, f"--workdir={first}")
    for name, is_cache_kept in (("its compiled steps kept", True), ("compiled again", False)):
        if not is_cache_kept and setting.is_miniature:
            continue
        yield Doing(text=f"btlm train --resume_step={HALF}, {name}")
        second = setting.folder / f"resume-{is_cache_kept}"
        shutil.copytree(first, second)
        if not is_cache_kept:
            shutil.rmtree(second / "compile_cache")
        _btlm(*arguments, f"--workdir={second}", f"--resume_step={HALF}")
        differing = _different_rows(first, second, after=HALF)
        # Without the compiled steps other kernels may be the fastest this time: that is known, and only measured.
        yield Row(
            section="resume", case=f"{dtype}, back to step {HALF} of {2 * HALF}, {name}: numbers that differ",
            figure=str(differing), limit="0" if is_cache_kept else "",
            verdict=(OK if differing == 0 else FAILED) if is_cache_kept else MEASURED,
        )  # fmt: skip


def _train_arguments(setting: Setting, workdir: Path, *, dtype: str) -> tuple[str, str]:
    """Return the arguments of `btlm train` for a run of 2 HALF steps on a small store, which both are made here."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.real_store import build_real_store, write_config

    store = workdir.with_name(f"{workdir.name}-store")
    build_real_store(store)
    sizes = {} if setting.is_miniature else dict(model__d_model=256, model__num_heads=4, model__d_ff=682)
    config = write_config(
        workdir.with_name(f"{workdir.name}-config.py"), store=store, model__dtype=dtype, log__every_steps=1,
        checkpoint__every_steps=HALF, checkpoint__keep_last=9, **sizes,
    )  # fmt: skip
    return "train", f"--config={config}"


def _different_rows(first: Path, second: Path, *, after: int) -> int:
    """Return how many logged numbers of the steps after one differ, or are missing, times aside."""

    from btlm_jax.train.metric_writer import OF_CLOCK

    def rows(workdir: Path) -> dict:
        found = {}
        for line in (workdir / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row.get("kind") in ("train", "eval") and row["step"] > after:
                for name, value in row.items():
                    if name not in OF_CLOCK:
                        found[row["kind"], row["step"], name] = value  # a later line of a step is the one that counts
        return found

    one, other = rows(first), rows(second)
    assert one, f"{first} has no steps after {after}"
    return sum(one.get(key) != other.get(key) for key in one.keys() | other.keys())


def generation(setting: Setting) -> Progress:
    """Continue a prompt here and on the CPU."""
    workdir = setting.folder / "generation"
    yield Doing(text="btlm train, then btlm generate here and on the CPU")
    _btlm(*_train_arguments(setting, workdir, dtype="float32"), f"--workdir={workdir}")
    arguments = ("generate", f"--checkpoint={workdir}", f"--prompt={PROMPT}", "--temperature=0", "--num_tokens=48")
    here = _btlm(*arguments, JAX_DEFAULT_MATMUL_PRECISION="highest")
    there = _btlm(*arguments, JAX_PLATFORMS="cpu")
    same = sum(a == b for a, b in zip(here, there, strict=False))
    yield Row(
        section="generation", case="characters as on the CPU, greedy, float32", figure=f"{same} of {len(there)}",
        limit=str(len(there)), verdict=OK if here == there and PROMPT in here else FAILED,
    )  # fmt: skip


def _btlm(*arguments: str, **variables: str) -> str:
    """Run the command of this checkout; return its output."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # what is compiled is kept in each workdir
    command = [sys.executable, "-m", "btlm_jax", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise RuntimeError(f"btlm {arguments[0]} ended with {done.returncode}: {' / '.join(last)}")
    return done.stdout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A process that times something; `of` has the same name for all that are compared with ours."""

    of: str
    name: str
    command: tuple[str, ...]
    variables: dict[str, str]
    num_tokens: int = 0  # of a step
    flops: float = 0.0  # of a step

    @property
    def case(self) -> str:
        return f"{self.of}: {self.name}"

    @property
    def is_peer(self) -> bool:
        return self.name.startswith("torch")


def jobs_of(*, is_miniature: bool) -> list[Job]:
    """Return what is timed, what tells the most first: the minutes may be over before the end."""
    from train_step import GPU_OURS, GPU_PEERS, Case

    if is_miniature:
        cases = [Case(size="4M", batch=1, length=128, device="cpu")]
        return [
            *_step_jobs(cases, "btlm_jax, float32", steps=2),
            *_attention_jobs(((1, 200, 2),), "cpu"),
            *_step_jobs(cases, "torch eager, folded, float32", steps=2),
        ]
    shapes = (("125M", 16, 2048), ("540M", 8, 2048), ("1.3B", 4, 2048), ("540M", 2, 8192))
    cases = [Case(size=size, batch=batch, length=length, device="cuda") for size, batch, length in shapes]
    (ours,), any_kernels = GPU_OURS, {"XLA_FLAGS": "--xla_gpu_exclude_nondeterministic_ops=false"}
    best, *others = GPU_PEERS
    jobs = _step_jobs(cases, ours) + _attention_jobs(((16, 2048, 32), (4, 8192, 32)), "cuda") + _step_jobs(cases, best)
    jobs += _step_jobs(cases, ours, name=f"{ours}, not deterministic", variables=any_kernels)
    return jobs + [job for other in others for job in _step_jobs(cases, other)]


def _step_jobs(
    cases, framework: str, *, name: str = "", variables: dict[str, str] | None = None, steps: int = 10
) -> list[Job]:  # fmt: skip
    """Return the jobs of a framework, named otherwise where a `name` is given, with these environment variables."""
    from steps import config_of_size

    from btlm_jax.train.flops import flops_per_token

    jobs = []
    for case in cases:
        sizes = [str(part) for part in dataclasses.astuple(case)]
        config = config_of_size(case.size, batch=case.batch, length=case.length, dtype="float32")
        num_tokens = case.batch * case.length
        jobs.append(
            Job(
                of=f"step of {case.size}, {case.batch} x {case.length:,}",
                name=name or framework,
                command=(str(HERE.parent / "train_step.py"), "--one", framework, *sizes, f"--steps={steps}"),
                # A peer makes ALiBi's lanes by JAX, which would take most of the GPU's memory.
                variables={"JAX_PLATFORMS": "cpu"} if framework.startswith("torch") else variables or {},
                num_tokens=num_tokens,
                flops=num_tokens * flops_per_token(config.model, seq_len=case.length),
            )
        )
    return jobs


def _attention_jobs(shapes, device: str) -> list[Job]:
    from attention_contenders import BLOCKWISE, CHUNKED, CUDNN_FOLDED, FLASH_FOLDED, FLEX, NO_ALIBI, OURS

    of_cpu = (OURS, CHUNKED, BLOCKWISE, FLASH_FOLDED)
    names = of_cpu if device == "cpu" else (OURS, CHUNKED, NO_ALIBI, FLASH_FOLDED, CUDNN_FOLDED, FLEX)
    return [
        Job(
            of=f"attention, forward and backward, {batch} x {length:,} x {heads} heads of 80",
            name=name,
            command=(str(HERE), "--contender", name, str(batch), str(length), str(heads), device),
            variables={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        for name in names
        for batch, length, heads in shapes
    ]


def times(setting: Setting) -> Progress:
    """Time steps and attention, ours beside PyTorch's. A contender that fails is no fault of ours, and said."""
    why_no_torch, peak = _why_no_torch(setting), _peak(setting)
    ours = _read_ours(setting)
    jobs = jobs_of(is_miniature=setting.is_miniature)
    first_of = {job.of: job.case for job in reversed(jobs)}  # which is ours
    for job in jobs:
        if job.case in setting.skipped:
            continue
        row = functools.partial(Row, section="times", case=job.case)
        if job.is_peer and why_no_torch:
            yield row(figure=why_no_torch, verdict=NOT_RUN)
            continue
        if setting.seconds_left < LEAST_SECONDS:
            yield row(figure=OVER, verdict=NOT_RUN)
            continue
        yield Doing(text=job.case, case=job.case)
        try:
            result = _json_of([sys.executable, *job.command], job.variables, setting.seconds_left)
        except subprocess.TimeoutExpired:
            yield row(figure=OVER, verdict=NOT_RUN)
        except RuntimeError as problem:
            yield row(figure=str(problem)[:300], verdict=NOT_RUN if job.is_peer else FAILED)
        else:
            if job.case == first_of[job.of]:
                ours[job.of] = result["median"]
                _write_ours(setting, ours)
            yield row(figure=_time_figure(job, result, ours=ours.get(job.of), peak=peak), verdict=MEASURED)


def _time_figure(job: Job, result: dict, *, ours: float | None, peak: float) -> str:
    """Return what a process measured: its time, beside ours where that is known, and of a step what else is known."""
    seconds = result["median"]
    parts = [f"{seconds * 1e3:,.2f} ms", *([f"{seconds / ours:.2f} of ours"] if ours else [])]
    if job.num_tokens:
        parts += [f"{job.num_tokens / seconds:,.0f} tokens/s"]
        parts += [f"MFU {job.flops / seconds / peak:.1%}"] if peak else []
        parts += [f"{result['peak'] / 2**30:.1f} GiB"] if result["peak"] else []
        if predicted := result.get("predicted"):
            parts.append(f"{seconds / predicted:.2f} of the {predicted * 1e3:,.0f} ms predicted")
        parts.append(f"first step {result['first']:.0f} s")
    return "; ".join(parts)


def _read_ours(setting: Setting) -> dict[str, float]:
    """Return our seconds by what was timed, of this start and those before it."""
    path = setting.folder.parent / "ours.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _write_ours(setting: Setting, ours: dict[str, float]) -> None:
    (setting.folder.parent / "ours.json").write_text(json.dumps(ours))


def _why_no_torch(setting: Setting) -> str:
    """Return why PyTorch is not timed here, "" if it is."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed: pip install -e '.[bench]'"
    import torch

    if not setting.is_miniature and not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no GPU: a build for CUDA is needed"
    return ""


def _peak(setting: Setting) -> float:
    """Return the FLOP/s of the data sheet; 0 on a CPU, and where it is not known what the GPU is."""
    if setting.is_miniature:
        return 0.0
    from btlm_jax.train.flops import peak_of_kind

    ((name,),) = query_gpus("name", gpu=os.environ["CUDA_VISIBLE_DEVICES"])
    try:
        return peak_of_kind(name)
    except StopIteration:
        return 0.0


def time_contender(name: str, batch: int, length: int, heads: int, device: str) -> dict:
    """Return the median seconds of a contender's call, in this process."""
    from attention_contenders import Shape, make_contender

    contender = make_contender(name, Shape(batch=batch, length=length, heads=heads, device=device))
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        contender.wait(contender.call())
        seconds.append(time.perf_counter() - began)
    return {"median": statistics.median(seconds[2:])}


def _json_of(command: list[str], variables: dict[str, str], seconds: float) -> dict:
    """Return what a process prints last.

    Raises:
      RuntimeError: it ends with another code than 0; says with which, and its last line.
      subprocess.TimeoutExpired: it takes longer.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=max(1.0, seconds)
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _first_line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:200]}"


RUN: dict[str, Callable[[Setting], Progress]] = {
    "machine": machine,
    "attention": attention,
    "losses": losses,
    "resume": resume,
    "generation": generation,
    "times": times,
}


# ------------------------------------------------------------------------------------------------------- all of them


class CannotRunError(Exception):
    """Nothing can be run here; says why, and what to do."""


def query_gpus(*fields: str, gpu: str = "") -> list[tuple[str, ...]]:
    """Return the fields of each GPU, or of one, as nvidia-smi has them.

    Raises:
      CannotRunError: it cannot be asked, or names no GPU.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command + [f"--id={gpu}"] * bool(gpu), capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotRunError(
            f"there is no GPU here, or no driver: nvidia-smi cannot be run ({error.strerror}); --miniature runs the "
            "same in small on a CPU"
        ) from error
    rows = [tuple(part.strip() for part in line.split(",")) for line in done.stdout.strip().splitlines()]
    if done.returncode or not rows or any(len(row) != len(fields) for row in rows):
        raise CannotRunError(f"nvidia-smi finds no GPU: {(done.stdout + done.stderr).strip() or 'it says nothing'}")
    return rows


def choose_gpu() -> str:
    """Return the number of the GPU to use, after checking its driver and JAX's plugin, and say which it is.

    Raises:
      CannotRunError: it cannot be used.
    """
    gpus = query_gpus("index", "uuid", "name", "driver_version", "memory.used")
    given = os.environ.get("CUDA_VISIBLE_DEVICES", gpus[0][0]).partition(",")[0].strip()
    found = next((row for row in gpus if given == row[0] or (given and row[1].startswith(given))), None)
    if found is None:
        there = ", ".join(row[0] for row in gpus)
        raise CannotRunError(f"CUDA_VISIBLE_DEVICES={given} names no GPU; there are {there}")
    plugin = next((name for name in OLDEST_DRIVERS if importlib.util.find_spec(name)), "")
    if not plugin:
        raise CannotRunError(
            "JAX has no plugin for CUDA here: pip install -e '.[cuda]', or '.[cuda12]' for a driver older than 580"
        )
    index, _, name, driver, used = found
    major, least = driver.partition(".")[0], OLDEST_DRIVERS[plugin]
    if not major.isdigit() or int(major) < least:
        other = "; pip install -e '.[cuda12]' takes 525" if least > 525 else ""
        raise CannotRunError(f"the driver is {driver}, and {plugin} needs {least} or newer{other}")
    say(f"GPU {index} of {len(gpus)}, {name}, driver {driver}" + ("; the others are not used" * (len(gpus) > 1)))
    if used.isdigit() and int(used) * 2**20 > BUSY_BYTES:
        say(f"WARNING: others use {used} MiB of it: times will not be those of a quiet GPU, and memory may not do")
    return index


def say(text: str) -> None:
    """Print a line of progress; the table alone goes to the standard output."""
    with contextlib.suppress(OSError):  # of a connection that is lost
        print(text, file=sys.stderr, flush=True)


class Kept:
    """The rows of this start and of those before it, in files of a folder."""

    def __init__(self, folder: Path) -> None:
        """Read what is there.

        Raises:
          CannotRunError: the folder cannot be written, or has too little room.
        """
        self._path, self.rows = folder / "rows.jsonl", {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a", encoding="utf-8")
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise CannotRunError(f"--folder={folder} cannot be written: {error.strerror}; give another") from error
        if free < LEAST_DISK:
            raise CannotRunError(
                f"--folder={folder} has {free / 2**20:,.0f} MiB of room, and a GiB is needed: give one on another disk"
            )
        for line in self._path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line that a full disk, or the end of a machine, cut off
                row = Row(**json.loads(line))
                self.rows[row.key] = row

    def add(self, row: Row) -> None:
        """Keep a row in place of an earlier one of the same case; a full disk is said, and ends nothing."""
        self.rows[row.key] = row
        try:
            self._file.write(json.dumps(dataclasses.asdict(row)) + "\n")
            self._file.flush()
        except OSError as error:
            say(f"WARNING: {self._path} cannot be written, so the same command would do this again: {error.strerror}")

    def of(self, section: str) -> list[Row]:
        return [row for row in self.rows.values() if row.section == section]

    def is_finished(self, section: str) -> bool:
        """Whether nothing of a section is left to do: its last row says so."""
        rows = self.of(section)
        return any(row.case == ALL for row in rows) and all(row.is_kept for row in rows)

    def drop(self, section: str) -> None:
        """Forget a section's rows that are to be done again: of `times` and attention's only those that failed."""
        for row in self.of(section):
            if not row.is_kept or section not in IN_PARTS or row.case == ALL:
                del self.rows[row.key]


ALL = "all of it"  # the case of the row that a section ends with
IN_PARTS = ("attention", "times")  # whose cases can be done apart


def run_section(name: str, kept: Kept, setting: Setting, *, clock: Callable[[], str]) -> None:
    """Run a section in a process of its own and keep its rows; one that aborts in a case goes on after it."""
    began = time.time()
    kept.drop(name)
    while True:
        longest = None if setting.is_miniature else SECTIONS[name]
        own_left = longest - (time.time() - began) if longest else float("inf")
        if setting.seconds_left < LEAST_SECONDS or own_left < LEAST_SECONDS:
            reason = OVER if setting.seconds_left < LEAST_SECONDS else f"the section's {longest:.0f} s were over"
            kept.add(Row(section=name, case=ALL, figure=reason, verdict=NOT_RUN))
            return
        skipped = [row.case for row in kept.of(name)] if name in IN_PARTS else []
        shutil.rmtree(setting.folder, ignore_errors=True)
        setting.folder.mkdir()
        (setting.folder / "skipped.json").write_text(json.dumps(skipped))
        most = min(setting.seconds_left + GRACE_SECONDS, own_left)
        case, problem = _run_process(name, kept, setting, seconds=most, clock=clock)
        if not problem:
            if all(row.is_kept for row in kept.of(name)):
                kept.add(Row(section=name, case=ALL, figure=f"{time.time() - began:.0f} s", verdict=MEASURED))
            shutil.rmtree(setting.folder, ignore_errors=True)
            return
        verdict = FAILED
        if setting.seconds_left < 0:  # it was ended because of that, and not for what it did
            problem, verdict = f"{OVER} before it ended", NOT_RUN
        row = Row(section=name, case=case or "broke off", figure=problem, verdict=verdict)
        kept.add(row)
        say(f"{clock()} {row.verdict}: {name}: {row.case}: {problem}")
        if not case:
            return


def _run_process(
    name: str, kept: Kept, setting: Setting, *, seconds: float, clock: Callable[[], str]
) -> tuple[str, str]:
    """Run what is left of a section; return the case that it was in, and how it broke off, or two empty strings."""
    command = [sys.executable, str(HERE), f"--section={name}", f"--folder={setting.folder}", f"--until={setting.until}"]
    command += ["--miniature"] * setting.is_miniature
    case, is_late = "", threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        # In a group of its own, with what it starts, all of which is ended with it.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def kill_late() -> None:
            is_late.set()
            kill()

        timer = threading.Timer(seconds, kill_late)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"text"'):
                    doing = Doing(**json.loads(line))
                    case = doing.case
                    say(f"{clock()} {name}: {doing.text}")
                elif line.startswith('{"section"'):
                    row = Row(**json.loads(line))
                    kept.add(row)
                    limit = f" (at most {row.limit})" if row.limit else ""
                    say(f"{clock()} {row.verdict}: {name}: {row.case}: {row.figure}{limit}")
            code = process.wait()
        finally:
            timer.cancel()
            kill()
        if not code:
            return "", ""
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1][:300]
    how = f"ended after {seconds:.0f} s" if is_late.is_set() else f"exit code {code}"
    return case, f"{how}: {last}"


def identity(kept: Kept) -> dict[str, str]:
    """Return what of the machine must be the same for rows to stand in one table."""
    return {row.case: row.figure for row in kept.of("machine") if row.case in ("platform", "versions", "commit")}


def run_all(kept: Kept, setting: Setting, only: list[str], *, clock: Callable[[], str]) -> None:
    """Run the sections that are asked for and are not finished.

    Raises:
      CannotRunError: what is kept is of another machine, or this one is not what was asked for.
    """
    before = identity(kept)
    run_section("machine", kept, setting, clock=clock)
    now = identity(kept)
    changed = [f"{name} was {old}, is {now[name]}" for name, old in before.items() if now.get(name, old) != old]
    if changed:
        for name, old in before.items():
            kept.add(Row(section="machine", case=name, figure=old, verdict=MEASURED))
        raise CannotRunError(
            f"what is kept in {setting.folder.parent} is of another machine or code: {'; '.join(changed)}; give "
            "another --folder"
        )
    if bad := [row for row in kept.of("machine") if row.verdict == FAILED]:
        raise CannotRunError(f"JAX does not run on the GPU: {bad[0].case}: {bad[0].figure}")
    for name in only:
        if name == "machine":
            continue
        if kept.is_finished(name):
            say(f"{clock()} {name}: done before, {len(kept.of(name)) - 1} rows")
        else:
            run_section(name, kept, setting, clock=clock)


def table_of(kept: Kept, only: list[str], *, ending: str) -> str:
    """Return one table of all rows, how many checks hold, and what was not run, with the reasons."""
    sections = [name for name in SECTIONS if name in ("machine", *only) or kept.of(name)]
    rows = [row for name in sections for row in kept.of(name) if row.case != ALL or not row.is_kept]
    missing = [name for name in sections if not kept.of(name)]
    counts = collections.Counter(row.verdict for row in rows)
    failed = sorted({row.section for row in rows if row.verdict == FAILED})
    lines = [HEADING, *map(str, rows), ""]
    lines.append(
        f"{counts[OK]} checks hold, {counts[FAILED]} failed{' in ' + ', '.join(failed) if failed else ''}; "
        f"{counts[MEASURED]} figures; {counts[NOT_RUN]} not run; {ending}"
    )
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.verdict == NOT_RUN:
            reasons.setdefault(row.figure, []).append(f"{row.section}: {row.case}")
    lines += [f"Not run, {reason}: {'; '.join(cases)}" for reason, cases in reasons.items()]
    lines += [f"Not begun: {', '.join(missing)}"] * bool(missing)
    return "\n".join(lines)


def main() -> int:
    """Run from the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--miniature", action="store_true", help="small, and on a CPU")
    parser.add_argument("--minutes", type=float, default=12.0, help="nothing begins after so many")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these sections")
    parser.add_argument("--folder", type=Path, help="where rows are kept; runs/gpu_first_day of the checkout")
    parser.add_argument("--output", type=Path, help="write the table there too")
    parser.add_argument("--section", choices=SECTIONS, help="run this one here, and print its rows as JSON")
    parser.add_argument("--until", type=float, help="of a section: when the minutes are over")
    parser.add_argument("--contender", nargs=5, metavar=("NAME", "BATCH", "LENGTH", "HEADS", "DEVICE"), help="as JSON")
    arguments = parser.parse_args()
    if arguments.contender:
        name, batch, length, heads, device = arguments.contender
        print(json.dumps(time_contender(name, int(batch), int(length), int(heads), device)))
        return 0
    if arguments.section:
        skipped = frozenset(json.loads((arguments.folder / "skipped.json").read_text()))
        setting = Setting(
            is_miniature=arguments.miniature, folder=arguments.folder, until=arguments.until, skipped=skipped
        )
        for each in RUN[arguments.section](setting):
            print(json.dumps(dataclasses.asdict(each)), flush=True)
        return 0
    try:
        return _all(arguments)
    except CannotRunError as error:
        say(f"gpu_first_day: {error}")
        return 2


def _all(arguments: argparse.Namespace) -> int:
    """Run the sections, print the table, and return the exit code.

    Raises:
      CannotRunError: nothing can be run here.
    """
    began, name = time.time(), "gpu_first_day" + "_miniature" * arguments.miniature
    if not arguments.minutes > 0:
        raise CannotRunError(f"--minutes={arguments.minutes:g} must be positive")
    if arguments.output and not arguments.output.resolve().parent.is_dir():
        raise CannotRunError(f"--output={arguments.output}: there is no such folder")
    if arguments.miniature:
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:
        # Without the order CUDA numbers the fastest GPU 0, and not as nvidia-smi does.
        os.environ |= {"CUDA_VISIBLE_DEVICES": choose_gpu(), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        os.environ["JAX_PLATFORMS"] = "cuda,cpu"
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # as launch/gpu.sh
    folder = (arguments.folder or ROOT / "runs" / name).resolve()
    kept = Kept(folder)
    until = began + 60 * arguments.minutes
    setting = Setting(is_miniature=arguments.miniature, folder=folder / WORK, until=until, skipped=frozenset())

    def clock() -> str:
        now = time.time() - began
        return f"[{int(now // 60):2}:{int(now % 60):02} of {arguments.minutes:g} min]"

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    is_stopped = False
    try:
        run_all(kept, setting, arguments.only, clock=clock)
    except KeyboardInterrupt:
        is_stopped = True
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what follows takes no time
    ending = f"{(time.time() - began) / 60:.1f} minutes{', stopped before the end' * is_stopped}"
    table = table_of(kept, arguments.only, ending=ending)
    _write(table, arguments, folder)
    rows = kept.rows.values()
    if is_stopped or not all(row.is_kept for row in rows):
        say(f"The same command goes on with what failed or was not run; what is done is kept in {folder}")
    return 130 if is_stopped else 1 if any(row.verdict == FAILED for row in rows) else 0


def _write(table: str, arguments: argparse.Namespace, folder: Path) -> None:
    """Print the table, and write it to --output and to the folder; one that cannot be written is said."""
    from machine import machine as machine_text

    with contextlib.suppress(OSError):
        print(table, flush=True)
    flags = " --miniature" * arguments.miniature
    flags += f" --only {' '.join(arguments.only)}" * (arguments.only != list(SECTIONS))
    text = (
        f"# The first day on a GPU{', in miniature on a CPU' * arguments.miniature}\n\n"
        f"`python benchmarks/gpu_first_day.py{flags}`\n\n{machine_text('jax')}\n\n{table}\n"
    )
    for path in (folder / "table.md", *([arguments.output] if arguments.output else [])):
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            say(f"{path} cannot be written: {error.strerror}")


if __name__ == "__main__":
    sys.exit(main())
