"""What converting a full-size BTLM-3B takes: time, peak memory against the size of the file, by the real command.

Command: python benchmarks/convert_full_size.py [--models=/tmp/full] [--output=benchmarks/results/NAME.md]
Needs pip install -e '.[hf]', and about 30 GB under --models; what it makes there is deleted, but for the source: random
bfloat16 weights in Hugging Face's form, made once. Peak memory is the kernel's ru_maxrss of the command: its proof and
the pages of mapped files count.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from machine import machine

GOAL = 1.3  # peak memory over size of the file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A conversion: directory or file names under --models, and the flags of the command."""

    source: str
    target: str
    flags: tuple[str, ...]
    kept: bool  # because a later case reads it

    @property
    def command(self) -> str:
        return " ".join(("btlm convert", f"--from={self.source}", f"--to={self.target}", *self.flags))


SOURCE = "full-bfloat16"
CASES = (
    Case(source=SOURCE, target="hf", flags=("--format=hf", "--dtype=bfloat16"), kept=False),
    Case(source=SOURCE, target="padded", flags=("--format=hf", "--dtype=bfloat16", "--pad_ffn=256"), kept=False),
    Case(source=SOURCE, target="jais", flags=("--format=jais", "--dtype=bfloat16"), kept=False),
    Case(source=SOURCE, target="Q4_0.gguf", flags=("--format=gguf", "--file_type=Q4_0"), kept=False),
    Case(source=SOURCE, target="BF16.gguf", flags=("--format=gguf", "--file_type=BF16"), kept=False),
    Case(source=SOURCE, target="int4", flags=("--format=int4", "--method=rtn"), kept=False),
    Case(source=SOURCE, target="native", flags=("--format=native",), kept=True),
    Case(source="native", target="back", flags=("--format=hf", "--dtype=bfloat16"), kept=False),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a command took; bytes."""

    seconds: float
    cpu_seconds: float
    peak: int
    written: int
    said: str


def measure(case: Case, models: Path) -> Result:
    """Run one conversion as a process.

    Raises:
      RuntimeError: it failed.
    """
    target = models / case.target
    _delete(target)
    command = [sys.executable, "-m", "btlm_jax", "convert", f"--from={models / case.source}", f"--to={target}"]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, *case.flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode, seconds = status, time.perf_counter() - began
    if status:
        raise RuntimeError(f"{case.command} failed with status {status}:\n{said[-3000:]}")
    return Result(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak=usage.ru_maxrss * 1024,
        written=_size(target),
        said=said,
    )


def row_of(case: Case, result: Result) -> str:
    """Return a row of the table."""
    return (
        f"| `{case.command}` | {result.seconds:,.0f} | {result.cpu_seconds:,.0f} | {result.peak / 1e9:.2f} | "
        f"{result.written / 1e9:.2f} | {result.peak / result.written:.2f} |"
    )


HEADER = """| command | seconds | CPU seconds | peak, 1e9 bytes | written, 1e9 bytes | peak / written |
|---|---|---|---|---|---|"""


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("/tmp/full"))
    parser.add_argument("--only", nargs="*", default=[case.target for case in CASES], help="targets to make")
    parser.add_argument("--output", type=Path, help="write the table there too")
    arguments = parser.parse_args()
    source = arguments.models / SOURCE
    if not source.exists():  # in a process of its own: what this one ever held counts for the ones it starts
        maker = Path(__file__).with_name("random_model.py")
        subprocess.run([sys.executable, maker, "full", "bfloat16", source], check=True)
    rows, proofs, load = [], [], []
    for case in CASES:
        if case.target not in arguments.only:
            continue
        result = measure(case, arguments.models)
        if not case.kept:
            _delete(arguments.models / case.target)
        rows.append(row_of(case, result))
        proofs.append(f"`{case.command}`\n\n```\n{result.said.strip()}\n```")
        load.append(f"{os.getloadavg()[0]:.1f}")
        print(f"{rows[-1]}\n{result.said}", file=sys.stderr, flush=True)
    table = "\n".join((HEADER, *rows))
    notes = f"{machine()}; load average after each: {', '.join(load)}"
    print(f"{notes}\n\n{table}")
    if arguments.output:
        title = "# Converting BTLM-3B\n\n`python benchmarks/convert_full_size.py`"
        what_was_said = "\n\n".join(("What the commands said:", *proofs))
        arguments.output.write_text(f"{title}\n\n{notes}\n\n{table}\n\n{what_was_said}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
