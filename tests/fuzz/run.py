"""Read mutated inputs of every kind for as long as one likes; print what came of them, and the faults.

    python tests/fuzz/run.py                                # 500 of each kind
    python tests/fuzz/run.py --count=20000 --seed=7         # other ones, and more
    python tests/fuzz/run.py --only=GGUF --count=100000     # of one kind

Each target runs in a process of its own: a library that crashes on an input takes no other with it. One input of each
kind of fault is kept in the folder that --faults names. Exit code 1: there were faults.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}

from fuzz import inputs  # noqa: E402
from support.real_store import build_real_store  # noqa: E402

from btlm_jax import notices  # noqa: E402


def run_one(group: str, name: str, count: int, seed: int, store: Path, faults: Path) -> None:
    """Run one target in this process; exit code 1 if there were faults."""
    notices.mute()
    with tempfile.TemporaryDirectory() as folder:
        target = next(t for t in inputs.targets(group, Path(folder), store=store) if t.name == name)
        result = inputs.run(target, count=count, seed=seed)
        print(inputs.summary_line(target, result), flush=True)
        for number, (kind, (data, error)) in enumerate(result.faults.items()):
            file = faults / f"{name.replace(' ', '_')}-{number}"
            file.write_bytes(data)
            file.with_suffix(".txt").write_text("".join(traceback.format_exception(error)), errors="backslashreplace")
            print(f"    {kind}: {str(error)[:160]!r} ({file})", flush=True)
    sys.stdout.flush()
    os._exit(bool(result.faults))


def main() -> int:
    """Run all targets; return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--faults", type=Path, default=Path(tempfile.gettempdir()) / "btlm-fuzz")
    arguments = parser.parse_args()
    arguments.faults.mkdir(parents=True, exist_ok=True)
    start, codes = time.monotonic(), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        build_real_store(store)
        names = []
        for group in inputs.GROUPS:
            (Path(folder) / group).mkdir()
            names += [(group, target.name) for target in inputs.targets(group, Path(folder) / group, store=store)]
        for group, name in names:
            if arguments.only in name:
                process = multiprocessing.get_context("spawn").Process(
                    target=run_one, args=(group, name, arguments.count, arguments.seed, store, arguments.faults)
                )
                process.start()
                process.join()
                codes[process.exitcode] += 1
                if process.exitcode not in (0, 1):
                    print(f"{name}: the process died with code {process.exitcode}", flush=True)
    print(f"{sum(codes.values())} kinds, {codes[0]} without a fault, {time.monotonic() - start:.0f} s")
    return int(codes.keys() != {0})


if __name__ == "__main__":
    sys.exit(main())
