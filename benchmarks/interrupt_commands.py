"""Press Ctrl-C at random moments of commands, and see that each ends with one line, its code and nothing left over.

    python benchmarks/interrupt_commands.py [COUNT] [SEED]

COUNT (100) starts, in turn of generate, train, convert to Hugging Face and to GGUF, and the corpus stages with two
workers, on small inputs made here. SIGINT goes to the whole process group, as a terminal sends it, at a moment that is
uniform over the time that the command took undisturbed. A start is
  130        it ended with that code and one line; no process of it and no unfinished output is left
  75         the same of train, which saves first where there is something to save
  finished   it was done before, with 0
  early      the moment was before Python had begun to run btlm (its own start takes some hundredths of a second)
  FAULT      anything else: printed with what it said
Exit code 1 if there is a fault. Prints a line a start, and one a command with the longest time from signal to end.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}

from support.corpus_files import made_up_text, write_raw  # noqa: E402
from support.real_store import build_real_store, write_config  # noqa: E402

GIVE_UP_SECONDS = 60.0


def commands(folder: Path) -> dict[str, list[str]]:
    """Return the commands by name; OUT in them is an output that is new at every start."""
    run, stages = folder / "run", folder / "corpus"
    workers = "--workers=2"
    return {
        "train": ["train", f"--config={folder / 'config.py'}", "--workdir=OUT"],
        "generate": ["generate", f"--checkpoint={run}", "--prompt=a", "--num_tokens=300"],
        "generate to a file": ["generate", f"--checkpoint={run}", "--num_samples=40", "--output=OUT.jsonl"],
        "convert to hf": ["convert", f"--from={run}", "--to=OUT"],
        "convert to gguf": ["convert", f"--from={run}", "--to=OUT.gguf", "--format=gguf"],
        "clean": ["corpus", "clean", f"--input={folder / 'raw'}", "--output=OUT", workers],
        "dedup": ["corpus", "dedup", f"--input={stages / 'clean'}", "--output=OUT", workers],
        "split": ["corpus", "split", f"--input={stages / 'dedup'}", "--output=OUT", workers],
        "tokenizer": ["corpus", "tokenizer", f"--input={stages / 'split'}", "--output=OUT", "--vocab_size=400"],
        "tokenize": ["corpus", "tokenize", f"--input={stages / 'split'}", "--output=OUT", workers, "--block_len=64"]
        + [f"--tokenizer={stages / 'tokenizer'}"],
    }


def start(arguments: list[str], out: Path) -> subprocess.Popen:
    """Start a command as a terminal would: in a process group of its own, with Python's own handling of SIGINT."""
    words = [word.replace("OUT", str(out)) for word in arguments]
    return subprocess.Popen(
        [sys.executable, "-m", "btlm_jax", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def make_inputs(folder: Path) -> dict[str, float]:
    """Run every command once undisturbed, each on what others wrote; return the seconds that each took."""
    build_real_store(folder / "store")
    write_config(folder / "config.py", store=folder / "store")
    for number in range(6):
        texts = [made_up_text(seed=seed) for seed in range(number, 240, 6)]
        write_raw(folder / "raw" / f"{number}.jsonl", texts, source="S")
    outputs = {"train": folder / "run"} | {name: folder / "corpus" / name for name in ("clean", "dedup", "split")}
    outputs["tokenizer"] = folder / "corpus" / "tokenizer"
    (folder / "corpus").mkdir()
    seconds = {}
    for name, arguments in commands(folder).items():
        began = time.monotonic()
        process = start(arguments, outputs.get(name, folder / f"once-{len(seconds)}"))
        said = process.communicate()[1]
        if process.returncode:
            raise RuntimeError(f"{name} does not work undisturbed: {said}")
        seconds[name] = time.monotonic() - began
    return seconds


def interrupt(arguments: list[str], out: Path, *, after: float) -> tuple[str, float]:
    """Start a command and interrupt it after some seconds; return what came of it, and how long its end took."""
    process = start(arguments, out)
    time.sleep(after)
    signalled = time.monotonic()
    try:
        os.killpg(process.pid, signal.SIGINT)
    except ProcessLookupError:
        pass
    try:
        said = process.communicate(timeout=GIVE_UP_SECONDS)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"FAULT: no end within {GIVE_UP_SECONDS:.0f} s: {process.communicate()[1]}", GIVE_UP_SECONDS
    took = time.monotonic() - signalled
    if process.returncode == 0:
        return "finished", took
    lines = [line for line in said.splitlines() if not line.startswith(("config: ", "note: ", "notes: "))]
    verb = arguments[0]
    ends = [line for line in lines if line == f"btlm {verb}: interrupted; the same command resumes where it can"]
    if verb == "train":  # what it says of a stop between steps is in its output
        code, is_said = 75, not lines or lines[-1].startswith(f"btlm {verb}: preempted (SIGINT)") or len(ends) == 1
    else:
        code, is_said = 130, len(ends) == 1
    if process.returncode == code and is_said and "Traceback" not in said:
        left = _left_of(process.pid, out)
        return (str(code) if not left else f"FAULT: left {left}"), took
    if "btlm_jax/" not in said and process.returncode in (-signal.SIGINT, 130, 1):
        return "early", took
    return f"FAULT: code {process.returncode} after {after:.2f} s: {said}", took


def _left_of(group: int, out: Path) -> str:
    """Return what is left of a command: its processes, or unfinished files beside its output."""
    for _ in range(100):  # a worker that is being started ends when it sees that its parent has
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        return "processes"
    beside = [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")]
    return ", ".join(name for name in beside if name.endswith((".partial", ".tmp")))


def main(count: int, seed: int) -> int:
    """Interrupt `count` starts; return the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, children too
    generator, num_faults = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seconds = make_inputs(folder)
        outcomes = {name: Counter() for name in seconds}
        slowest = dict.fromkeys(seconds, 0.0)
        for number in range(count):
            name = list(seconds)[number % len(seconds)]
            out = folder / "outputs" / "x"
            out.parent.mkdir()
            result, took = interrupt(commands(folder)[name], out, after=generator.uniform(0, seconds[name]))
            shutil.rmtree(out.parent)
            print(f"{number + 1}/{count} {name}: {result} in {took:.1f} s", flush=True)
            num_faults += result.startswith("FAULT")
            outcomes[name][result.partition(":")[0]] += 1
            slowest[name] = max(slowest[name], took)
        for name, counts in outcomes.items():
            summary = ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))
            print(f"{name} ({seconds[name]:.1f} s): {summary}; at most {slowest[name]:.1f} s from signal to end")
    return int(num_faults > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", metavar="COUNT", type=int, nargs="?", default=100)
    parser.add_argument("seed", metavar="SEED", type=int, nargs="?", default=0)
    options = parser.parse_args()
    sys.exit(main(options.count, options.seed))
