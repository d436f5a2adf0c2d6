"""What to run first on a machine with a GPU: is everything right, and how fast is it beside PyTorch? One table.

Command: python benchmarks/gpu_first_day.py [--minutes=12] [--output=benchmarks/results/NAME.md] [--folder=DIR]
         python benchmarks/gpu_first_day.py --miniature      # the same in small on a CPU: it shows that the script runs
Needs pip install -e '.[cuda]', for the comparison '.[bench]' too. One GPU is used. Sections, each a process of its own,
so that one that fails, or aborts, leaves the others; what is not done when the minutes are over is said to be so:

  machine     what is here: GPU, driver, CUDA, cuDNN, JAX
  attention   each form, forward and backward, at the head dims it takes, with and without documents, against float64
  losses      of some steps of the local model, against the same steps on the CPU: in float32, and in the GPU's bfloat16
  resume      btlm train back to a checkpoint in the middle, in another process: every number must have the same bits
  generation  btlm generate, greedy, against the CPU's text
  times       attention, then steps of 125M to 1.3B parameters: ours, ours without XLA's deterministic kernels, PyTorch
              compiled with SDPA, with cuDNN's SDPA and with FlexAttention

Exit code 1 if a check failed or a section broke off.
"""

from __future__ import annotations

import argparse
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
OK, FAILED, MEASURED, NOT_RUN = "ok", "FAILED", "", "not run"
SECTIONS = ("machine", "attention", "losses", "resume", "generation", "times")
BFLOAT16_ERROR, FLOAT32_ERROR, TF32_ERROR = 8e-3, 2e-5, 4e-3  # of norms: of two roundings; of sums; of ten-bit products
GRACE_SECONDS = 60.0  # after the minutes, for what has begun
LEAST_SECONDS, OVER = 20.0, "the minutes are over"  # what begins needs about so many
HALF = 5  # steps of the runs that are made here
PROMPT = "the"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    section: str
    case: str
    figure: str
    verdict: str  # OK, FAILED, MEASURED or NOT_RUN
    limit: str = ""

    def __str__(self) -> str:
        cells = (self.section, self.case, self.figure, self.limit, self.verdict)
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How a section runs."""

    is_miniature: bool
    folder: Path
    until: float  # time.time() at which the minutes are over

    @property
    def seconds_left(self) -> float:
        return self.until - time.time()


def checked(section: str, case: str, value: float, limit: float) -> Row:
    """Return the row of a value that must not be above a limit; one that is not finite is."""
    return Row(
        section=section, case=case, figure=f"{value:.2g}", limit=f"{limit:.2g}",
        verdict=OK if value <= limit else FAILED,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- sections


def machine(setting: Setting) -> Iterator[Row]:
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
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        yield report(case="nvidia-smi", figure=(done.stdout or done.stderr).strip().replace("\n", "; "))
        from jax._src.lib import cuda_versions

        if cuda_versions is not None:
            yield report(case="cuDNN", figure=str(cuda_versions.cudnn_get_version()))
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "torch")
    installed = {each.metadata["Name"] for each in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if name in installed)
    yield report(case="versions", figure=f"Python {sys.version.split()[0]}, {versions}")


def attention(setting: Setting) -> Iterator[Row]:
    """Compare every form with float64."""
    import jax.numpy as jnp

    from btlm_jax.attention.gpu import why_no_kernel

    length = 200 if setting.is_miniature else 1100
    for head_dim in (64, 80, 116, 128, 244):
        for has_documents in (False, True):
            case = f"gpu (cuDNN), bfloat16, heads of {head_dim}{', documents' * has_documents}"
            if setting.is_miniature:
                continue
            if reason := why_no_kernel(jnp.dtype(jnp.bfloat16), head_dim=head_dim, has_documents=has_documents):
                yield Row(section="attention", case=case, figure=reason, verdict=NOT_RUN)
                continue
            yield from _attention_rows(case, "gpu", "bfloat16", head_dim, length, has_documents, BFLOAT16_ERROR)
    if setting.is_miniature:
        yield Row(section="attention", case="gpu (cuDNN)", figure="a CPU has none of it", verdict=NOT_RUN)
    for implementation in ("chunked", "blockwise"):
        for dtype, precision, error in (
            ("bfloat16", "default", BFLOAT16_ERROR),
            ("float32", "highest", FLOAT32_ERROR),
            ("float32", "default", TF32_ERROR),
        ):
            case = f"{implementation}, {dtype}, products of {precision} precision, heads of 80, documents"
            yield from _attention_rows(case, implementation, dtype, 80, length, True, error, precision=precision)


def _attention_rows(
    case: str, implementation: str, dtype: str, head_dim: int, length: int, has_documents: bool, limit: float,
    *, precision: str = "default",
) -> Iterator[Row]:  # fmt: skip
    """Yield the largest error of output and gradients, or how it failed."""
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


def losses(setting: Setting) -> Iterator[Row]:
    """Compare the losses of some steps with those on the CPU in float32."""
    import jax
    from steps import read_config

    steps, batch, length = (3, 2, 128) if setting.is_miniature else (20, 4, 512)
    other = "chunked" if setting.is_miniature else "auto"  # in miniature both are the CPU: then in another form
    config = functools.partial(read_config, batch=batch, length=length)
    cpu = jax.devices("cpu")[0]
    expected = _losses(config(), cpu, steps)
    here = jax.devices()[0]
    for dtype, precision, limit in (
        ("float32", "highest", 1e-4),
        ("float32", "default", 1e-2),
        ("bfloat16", "default", 3e-2),
    ):
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


def resume(setting: Setting) -> Iterator[Row]:
    """Go back to a checkpoint in the middle of a run, and compare the end with the first one's."""
    dtype = "float32" if setting.is_miniature else "bfloat16"
    first = setting.folder / "resume"
    arguments = _train_arguments(setting, first, dtype=dtype)
    _btlm(*arguments, f"--workdir={first}")
    for name, is_cache_kept in (("its compiled steps kept", True), ("compiled again", False)):
        if not is_cache_kept and setting.is_miniature:
            continue
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


def generation(setting: Setting) -> Iterator[Row]:
    """Continue a prompt here and on the CPU."""
    workdir = setting.folder / "generation"
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
    command = [sys.executable, "-m", "btlm_jax", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise RuntimeError(f"btlm {arguments[0]} ended with {done.returncode}: {' / '.join(last)}")
    return done.stdout


def times(setting: Setting) -> Iterator[Row]:
    """Time attention and steps, ours beside PyTorch's."""
    from train_step import OURS, Case

    has_torch = importlib.util.find_spec("torch") is not None
    if not has_torch:
        yield Row(section="times", case="PyTorch", figure="not installed: pip install torch", verdict=NOT_RUN)
    if setting.is_miniature:
        cases, peers, steps = [Case(size="4M", batch=1, length=128, device="cpu")], ("torch eager, folded",), 2
    else:
        shapes = (("125M", 16, 2048), ("540M", 8, 2048), ("1.3B", 4, 2048), ("540M", 2, 8192))
        cases = [Case(size=size, batch=batch, length=length, device="cuda") for size, batch, length in shapes]
        peers, steps = tuple(f"torch compile, {each}" for each in ("folded", "cudnn", "flex")), 10
    yield from _attention_times(setting, has_torch=has_torch)
    for case in cases:
        runs = [(OURS, OURS, {})]
        if not setting.is_miniature:  # a jaxlib without CUDA need not know the flag
            any_kernels = {"XLA_FLAGS": "--xla_gpu_exclude_nondeterministic_ops=false"}
            runs.append((f"{OURS}, not deterministic", OURS, any_kernels))
        runs += [(peer, peer, {}) for peer in peers if has_torch]
        ours = 0.0
        for label, framework, variables in runs:
            row, seconds = _time_step(case, label, framework, variables, setting, steps=steps, ours=ours)
            yield row
            ours = ours or seconds  # ours is the first


def _time_step(
    case, label: str, framework: str, variables: dict[str, str], setting: Setting, *, steps: int, ours: float
) -> tuple[Row, float]:
    """Time a framework's step in a process of its own; return the row, and the seconds, 0 if there are none."""
    row = functools.partial(
        Row, section="times", case=f"step of {case.size}, {case.batch} x {case.length:,}, {case.dtype}: {label}"
    )
    if setting.seconds_left < LEAST_SECONDS:
        return row(figure=OVER, verdict=NOT_RUN), 0.0
    sizes = [str(part) for part in dataclasses.astuple(case)]
    command = [sys.executable, str(HERE.parent / "train_step.py"), "--one", framework, *sizes, f"--steps={steps}"]
    try:
        result = _json_of(command, variables, setting.seconds_left)
    except subprocess.TimeoutExpired:
        return row(figure=OVER, verdict=NOT_RUN), 0.0
    except RuntimeError as problem:
        return row(figure=_first_line(problem), verdict=FAILED), 0.0
    seconds, tokens = result["median"], case.batch * case.length
    memory = f"; {result['peak'] / 2**30:.1f} GiB" if result["peak"] else ""
    beside = f"; {seconds / ours:.2f} of ours" if ours else ""
    figure = f"{seconds * 1e3:,.1f} ms; {tokens / seconds:,.0f} tokens/s{_mfu(case, seconds)}{memory}{beside}"
    return row(figure=f"{figure}; first step {result['first']:.0f} s", verdict=MEASURED), seconds


def _mfu(case, seconds: float) -> str:
    """Return the share of the data sheet's FLOP/s, where it is known what the GPU is."""
    if case.device == "cpu":
        return ""
    from steps import config_of_size

    from btlm_jax.train.flops import _PEAKS, flops_per_token

    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    kind = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    peak = next((flops for part, flops in _PEAKS if part in kind), None)
    config = config_of_size(case.size, batch=case.batch, length=case.length, dtype=case.dtype)
    flops = case.batch * case.length * flops_per_token(config.model, seq_len=case.length)
    return f"; MFU {flops / seconds / peak:.1%}" if peak else ""


def _attention_times(setting: Setting, *, has_torch: bool) -> Iterator[Row]:
    """Time forward and backward of attention, every contender in a process of its own."""
    from attention_contenders import BLOCKWISE, CHUNKED, CUDNN_FOLDED, FLASH_FOLDED, FLEX, NO_ALIBI, OURS

    names = [OURS, CHUNKED, BLOCKWISE if setting.is_miniature else NO_ALIBI]
    if has_torch:
        names += [FLASH_FOLDED] if setting.is_miniature else [FLASH_FOLDED, CUDNN_FOLDED, FLEX]
    shapes = ((1, 200, 2),) if setting.is_miniature else ((16, 2048, 32), (4, 8192, 32))
    device = "cpu" if setting.is_miniature else "cuda"
    for batch, length, heads in shapes:
        ours = None
        for name in names:
            case = f"attention, forward and backward, {batch} x {length:,} x {heads} heads of 80: {name}"
            if setting.seconds_left < LEAST_SECONDS:
                yield Row(section="times", case=case, figure=OVER, verdict=NOT_RUN)
                continue
            command = [sys.executable, str(HERE), "--contender", name, str(batch), str(length), str(heads), device]
            command += ["--miniature"] * setting.is_miniature
            try:
                result = _json_of(command, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, setting.seconds_left)
            except subprocess.TimeoutExpired:
                yield Row(section="times", case=case, figure=OVER, verdict=NOT_RUN)
                continue
            except RuntimeError as problem:
                yield Row(section="times", case=case, figure=_first_line(problem), verdict=FAILED)
                continue
            ours = ours or result["median"]
            figure = f"{result['median'] * 1e3:,.2f} ms; {result['median'] / ours:.2f} of ours"
            yield Row(section="times", case=case, figure=figure, verdict=MEASURED)


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
    """Return what a process prints last."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=max(1.0, seconds)
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _first_line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:200]}"


# ------------------------------------------------------------------------------------------------------- all of them

RUN: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "machine": machine,
    "attention": attention,
    "losses": losses,
    "resume": resume,
    "generation": generation,
    "times": times,
}


def run_section(name: str, setting: Setting) -> Iterator[Row]:
    """Run a section in a process of its own; yield its rows as they come, and one more if it breaks off."""
    if setting.seconds_left < LEAST_SECONDS:
        yield Row(section=name, case="all of it", figure=OVER, verdict=NOT_RUN)
        return
    command = [sys.executable, str(HERE), f"--section={name}", f"--folder={setting.folder}", f"--until={setting.until}"]
    command += ["--miniature"] * setting.is_miniature
    with tempfile.TemporaryFile("w+") as errors:
        # In a group of its own, with what it starts: one that hangs is ended.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        assert process.stdout is not None
        timer = threading.Timer(setting.seconds_left + GRACE_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        for line in process.stdout:
            if line.startswith("{"):
                yield Row(**json.loads(line))
        code = process.wait()
        timer.cancel()
        if code:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [""])[-1]
            yield Row(section=name, case="broke off", figure=f"exit code {code}: {last[:300]}", verdict=FAILED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--miniature", action="store_true", help="small, and on a CPU")
    parser.add_argument("--minutes", type=float, default=12.0, help="nothing begins after so many")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS, help="these sections")
    parser.add_argument("--folder", type=Path, help="for what is written; of nothing, one that is deleted at the end")
    parser.add_argument("--output", type=Path, help="write the table there too")
    parser.add_argument("--section", choices=SECTIONS, help="run this one here, and print its rows as JSON")
    parser.add_argument("--until", type=float, help="of a section: when the minutes are over")
    parser.add_argument("--contender", nargs=5, metavar=("NAME", "BATCH", "LENGTH", "HEADS", "DEVICE"), help="as JSON")
    arguments = parser.parse_args()
    # Without a GPU every section breaks off, and says that there is none.
    os.environ["JAX_PLATFORMS"] = "cpu" if arguments.miniature else "cuda,cpu"
    if arguments.contender:
        name, batch, length, heads, device = arguments.contender
        print(json.dumps(time_contender(name, int(batch), int(length), int(heads), device)))
        return
    until = arguments.until or time.time() + 60 * arguments.minutes
    if arguments.section:
        setting = Setting(is_miniature=arguments.miniature, folder=arguments.folder, until=until)
        for row in RUN[arguments.section](setting):
            print(json.dumps(dataclasses.asdict(row)), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="gpu_first_day-") as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        sys.exit(_all(arguments, Setting(is_miniature=arguments.miniature, folder=folder, until=until)))


def _all(arguments: argparse.Namespace, setting: Setting) -> int:
    """Run the sections, print the table, and return the exit code."""
    from machine import machine as machine_text

    began = time.time()
    heading = "| section | case | figure | at most | |\n|---|---|---|---|---|"
    print(heading, flush=True)
    rows = []
    for name in arguments.only:
        for row in run_section(name, setting):
            rows.append(row)
            print(row, flush=True)
    failed = sorted({row.section for row in rows if row.verdict == FAILED})
    end = (
        f"{sum(row.verdict == OK for row in rows)} checks hold, {sum(row.verdict == FAILED for row in rows)} failed"
        f"{' in ' + ', '.join(failed) if failed else ''}, {sum(row.verdict == NOT_RUN for row in rows)} not run; "
        f"{(time.time() - began) / 60:.1f} minutes"
    )
    print(f"\n{end}")
    if arguments.output:
        flags = " --miniature" * arguments.miniature + (
            f" --only {' '.join(arguments.only)}" if arguments.only != SECTIONS else ""
        )
        table = "\n".join([heading, *map(str, rows)])
        arguments.output.write_text(
            f"# The first day on a GPU{', in miniature on a CPU' * arguments.miniature}\n\n"
            f"`python benchmarks/gpu_first_day.py{flags}`\n\n{machine_text('jax')}\n\n{end}\n\n{table}\n"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    main()
