"""Decode and prefill speed and peak memory: ours against transformers and llama.cpp, small and full size.

Command: python benchmarks/generation.py [--models=/tmp/full] [--output=benchmarks/results/NAME.md]
Needs pip install -e '.[hf,bench]' and xllamacpp (llama.cpp's C library), and 20 GB under --models, where random models
are made once. Every measurement is a process of its own; the engines of a row take turns, round by round (small: three
rounds, full: one). An interval of a quarter of a second or more counts if other processes took less than a tenth of the
machine's CPU time in it; a figure is the median of those, or, marked ~, of all where none was so quiet. The best of an
engine's variants (cache, flash attention, 16-bit type) is its figure, for decode and prefill by themselves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from engines import Interval, Stopwatch, Timing, Work, run_llama_cpp, run_ours, run_transformers
from machine import has_bfloat16, machine

THREADS = 2
ROUNDS = {"small": 3, "full": 1}
QUIET = 0.1  # share of the machine that other processes may take in an interval that counts
OURS, TRANSFORMERS, LLAMA_CPP = "btlm_jax", "transformers", "llama.cpp"
CONTEXTS = {("full", "4 bits"): (512, 2048, 8192)}
USUAL_CONTEXTS = (512, 2048)
NOT_MEASURED = ("full", "float32")  # 10.6 GB of weights: nobody runs it on such a machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """An engine with one variant of its settings, on one model."""

    engine: str
    model: str  # under --models
    variant: str = ""
    is_slow: bool = False  # so slow that a few tokens once have to do

    def run(self, models: Path, work: Work) -> Timing:
        """Measure in this process."""
        if self.engine == TRANSFORMERS:
            return run_transformers(models / self.model, work, cache=self.variant.removesuffix(" cache"))
        if self.engine == LLAMA_CPP:
            flash = self.variant.endswith("flash attention")
            return run_llama_cpp(models / self.model, work, flash_attention=flash, num_prompt_batch=512)
        return run_ours(models / self.model, work, cache=self.variant.removesuffix(" cache"))


def contenders(shape: str, precision: str) -> list[Contender]:
    """Return who is compared on a shape at a precision; transformers has no 4 bits on a CPU."""
    ggufs = {"float32": ("F32",), "bfloat16": ("BF16", "F16") if shape == "small" else ("BF16",), "4 bits": ("Q4_0",)}
    found = [
        Contender(engine=LLAMA_CPP, model=f"{shape}-{type_name}.gguf", variant=f"{type_name}{flash}")
        for type_name in ggufs[precision]
        for flash in ("", ", flash attention")
    ]
    if precision == "4 bits":
        return [*found, Contender(engine=OURS, model=f"{shape}-int4", variant="int8 cache")]
    directory = f"{shape}-{precision}"
    is_slow = precision == "bfloat16" and not has_bfloat16()
    for variant in ("dynamic cache", "static cache") if shape == "small" else ("dynamic cache",):
        found.append(Contender(engine=TRANSFORMERS, model=directory, variant=variant, is_slow=is_slow))
    return [*found, Contender(engine=OURS, model=directory, variant=f"{precision} cache")]


def work_of(contender: Contender, *, shape: str, context: int) -> Work:
    """Return what is measured: decoding at the end of the context, and a prompt that is read in some seconds."""
    num_decoded = {"small": 96, "full": 24}[shape]
    num_prompt = {"small": context, "full": 256}[shape]
    if contender.is_slow:
        num_decoded, num_prompt = {"small": (8, 32), "full": (2, 8)}[shape]
    return Work(
        num_prompt=min(num_prompt, context - 128),
        num_cached=context - 128,
        num_decoded=num_decoded,
        num_prefills=1 if shape == "full" or contender.is_slow else 3,
        num_threads=THREADS,
    )


def measure(contender: Contender, models: Path, work: Work, *, patience: float) -> Timing:
    """Measure in a process of its own, when the machine is quiet or patience ends.

    Raises:
      RuntimeError: it failed.
    """
    wait_for_quiet(patience)
    request = json.dumps({"contender": dataclasses.asdict(contender), "work": dataclasses.asdict(work)})
    done = subprocess.run(
        [sys.executable, __file__, f"--models={models}", f"--one={request}"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(THREADS)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{contender} failed:\n{done.stderr[-3000:]}")
    values = json.loads(done.stdout.splitlines()[-1])
    for name in ("prefill", "decode"):
        values[name] = [Interval(**interval) for interval in values[name]]
    return Timing(**values)


def wait_for_quiet(patience: float) -> None:
    """Return when other processes take little of the machine, or after `patience` seconds."""
    give_up = time.monotonic() + patience
    while time.monotonic() < give_up:
        stopwatch = Stopwatch()
        time.sleep(3)
        if stopwatch.interval(0).others < QUIET:
            return


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """Tokens a second, and whether the machine was quiet in some of the time."""

    tokens_per_second: float
    is_quiet: bool

    def __str__(self) -> str:
        digits = 0 if self.tokens_per_second >= 100 else 1 if self.tokens_per_second >= 10 else 2
        return f"{'' if self.is_quiet else '~'}{self.tokens_per_second:,.{digits}f}"


def rate_of(intervals: Sequence[Interval]) -> Rate:
    """Return the median over quiet intervals, or over all."""
    quiet = [interval for interval in intervals if interval.others < QUIET]
    counted = quiet or intervals
    return Rate(
        tokens_per_second=statistics.median(interval.num_tokens / interval.seconds for interval in counted),
        is_quiet=bool(quiet),
    )


def rows_of(shape: str, precision: str, context: int, *, models: Path, patience: float) -> Iterator[str]:
    """Measure one model at one context; yield table rows."""
    timings: dict[Contender, list[Timing]] = {contender: [] for contender in contenders(shape, precision)}
    for number in range(ROUNDS[shape]):
        for contender, found in timings.items():
            if number and contender.is_slow:
                continue
            work = work_of(contender, shape=shape, context=context)
            found.append(measure(contender, models, work, patience=patience))
            print(
                f"{shape} {precision} {context} round {number + 1} {contender.engine} {contender.variant}: "
                f"decode {rate_of(found[-1].decode)}, prefill {rate_of(found[-1].prefill)}, "
                f"{found[-1].peak_bytes / 1e9:.2f} GB, load average {os.getloadavg()[0]:.1f}",
                file=sys.stderr,
                flush=True,
            )
    rates = {
        contender: {
            kind: rate_of([interval for timing in found for interval in getattr(timing, kind)])
            for kind in ("decode", "prefill")
        }
        for contender, found in timings.items()
    }
    for contender, found in timings.items():
        prompt = work_of(contender, shape=shape, context=context).num_prompt
        cells = [str(rates[contender]["decode"]), f"{rates[contender]['prefill']} ({prompt})"]
        for kind in ("decode", "prefill"):
            ours = [rates[other][kind] for other in rates if other.engine == OURS]
            cells += [f"{our.tokens_per_second / rates[contender][kind].tokens_per_second:.2f}" for our in ours] or [""]
        peak = max(timing.peak_bytes for timing in found) / 1e9
        warm_up = statistics.median(timing.warm_up_seconds for timing in found)
        load = statistics.median(timing.load_seconds for timing in found)
        yield " | ".join(
            (
                f"| {shape}, {precision} | {context:,}",
                " ".join((contender.engine, contender.variant)).strip(),
                *cells,
                f"{peak:.2f}",
                f"{load:.1f}",
                f"{warm_up:.1f} |",
            )
        )


COLUMNS = (
    "model", "context", "engine", "decode tokens/s", "prefill tokens/s (prompt)", "ours / it, decode",
    "ours / it, prefill", "peak RSS, 1e9 bytes", "load s", "warm-up s",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def make_models(models: Path, shapes: Sequence[str], precisions: Sequence[str]) -> None:
    """Make the random models that are not there yet, by the commands a user has."""
    here = Path(__file__).parent
    for shape in shapes:
        for dtype in ("float32", "bfloat16") if shape == "small" else ("bfloat16",):
            directory = models / f"{shape}-{dtype}"
            if not directory.exists():
                subprocess.run([sys.executable, here / "random_model.py", shape, dtype, directory], check=True)
        source = models / f"{shape}-{'float32' if shape == 'small' else 'bfloat16'}"
        for precision in precisions:
            for contender in contenders(shape, precision) if (shape, precision) != NOT_MEASURED else ():
                target = models / contender.model
                if not target.exists():
                    file_type = target.stem.split("-")[1]
                    flags = ["--format=int4", "--method=rtn"]
                    if target.suffix == ".gguf":
                        flags = ["--format=gguf", f"--file_type={file_type}"]
                    command = [sys.executable, "-m", "btlm_jax", "convert", f"--from={source}", f"--to={target}"]
                    subprocess.run([*command, *flags], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("/tmp/full"))
    parser.add_argument("--shapes", nargs="*", default=["small", "full"])
    parser.add_argument("--precisions", nargs="*", default=["float32", "bfloat16", "4 bits"])
    parser.add_argument("--contexts", nargs="*", type=int, help="only these of the usual ones")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for a quiet machine, each time")
    parser.add_argument("--output", type=Path, help="write the table there too")
    parser.add_argument("--one", help="one measurement, as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        request = json.loads(arguments.one)
        timing = Contender(**request["contender"]).run(arguments.models, Work(**request["work"]))
        print(json.dumps(dataclasses.asdict(timing)))
        return
    make_models(arguments.models, arguments.shapes, arguments.precisions)
    print(f"{setting()}\n\n{HEADER}", flush=True)
    rows = []
    for shape in arguments.shapes:
        for precision in arguments.precisions:
            if (shape, precision) == NOT_MEASURED:
                continue
            for context in CONTEXTS.get((shape, precision), USUAL_CONTEXTS):
                if arguments.contexts and context not in arguments.contexts:
                    continue
                for row in rows_of(shape, precision, context, models=arguments.models, patience=arguments.patience):
                    print(row, flush=True)
                    rows.append(row)
                if arguments.output:  # again after every model and context: it takes an hour
                    arguments.output.write_text(report(rows))


def setting() -> str:
    """Return what was measured on, and with how many threads."""
    threads = f"{THREADS} threads (torch.set_num_threads, llama.cpp's n_threads; ours takes the machine's)"
    return f"{machine('jax', 'torch', 'transformers', 'xllamacpp')}; {threads}"


def report(rows: Sequence[str]) -> str:
    """Return the table with what it was measured by."""
    notes = __doc__.split("made once. ")[1]
    table = "\n".join((HEADER, *rows))
    return f"# Generating on a CPU\n\n`python benchmarks/generation.py`\n\n{setting()}\n\n{notes}\n{table}\n"


if __name__ == "__main__":
    main()
