"""Do to real training runs what happens to runs of weeks, and see that each ends as documented.

Command: python benchmarks/injected_faults.py --folder=DIR [--only 3 4]           (root, for disks that are full)

Every fault meets `btlm train` on a tiny model, in one process or in two on loopback. Bad numbers, and a clock that
jumps, are put in by a wrapper around the same command, and so is what one process has otherwise than the other one:
a mount, a package's version. All else happens outside of it: signals, flipped bits, a truncated shard, a small disk
that is filled or that fails, a limit on the size of one process's files. A row has what the command said, its exit
codes, the seconds from the fault to the end, the last step that was logged, and what the same command did afterwards,
whose end is compared with a run that nothing happened to. Starts are those of kill_resume.py. Rows are kept in
DIR/rows.jsonl: the same command goes on. Exits with 1 if anything differs from what is expected here.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import importlib.metadata
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "tests")]

import kill_resume  # noqa: E402  beside this file

PER_STEP = 16 * 24
STEPS, EVERY = (84, 16), 12  # of the two phases; a spike needs 64 updates of its phase before it
CHANGES = {
    "curriculum__num_tokens": tuple(steps * PER_STEP for steps in STEPS),
    "evaluation__every_steps": 30,
    "checkpoint__every_steps": EVERY,
    "checkpoint__keep_last": 2,
    "bad_numbers__max_skips": 3,
    "bad_numbers__max_rollbacks": 1,
}
WAIT_SECONDS = 400.0
NO_END = -99  # in place of an exit code


class Case:
    """The runs of one fault in a workdir of its own."""

    def __init__(self, folder: Path, config: Path, *, processes: int, runs: kill_resume.Runs):
        self._runs = runs
        self.folder, self.config, self.processes = folder, config, processes
        self.workdir, self.outputs = folder / "run", folder / "outputs"
        self.started: kill_resume.Started
        self.waited_for: list[subprocess.Popen | kill_resume.Fork] = []
        self.struck = self.ended = 0.0
        self.last_step = 0

    def start(self, *, bad: dict | None = None, changes: Sequence[Sequence[str]] = ((), ())) -> None:
        """Start the command; `bad` goes to the wrapper, `changes` are flags of each process."""
        shutil.rmtree(self.outputs, ignore_errors=True)
        self.started = kill_resume.start_run(
            self.config,
            self.workdir,
            outputs=self.outputs,
            num_processes=self.processes,
            num_devices=self.processes,
            changes=changes,
            command=[sys.executable, str(HERE), f"--child={json.dumps(bad)}"],
            forks=None if bad else self._runs.forks_of(1),
        )
        self.waited_for = list(self.started.processes)

    def wait_for_step(self, step: int) -> None:
        """Wait until a step's line is in the metrics."""
        self._wait(lambda: last_step(self.workdir) >= step)

    def wait_for_save(self, step: int) -> None:
        """Wait until a checkpoint is complete."""
        self._wait(lambda: (self.workdir / "checkpoints" / str(step)).is_dir())

    def _wait(self, is_so: Callable[[], bool]) -> None:
        until = time.monotonic() + WAIT_SECONDS
        while not is_so():
            if time.monotonic() > until or not self.started.is_running():
                raise RuntimeError(f"it did not come so far:\n{self.output()[-3000:]}")
            time.sleep(0.002)

    def strike(self) -> None:
        """Note that the fault happens now."""
        self.struck = time.monotonic()

    def finish(self) -> list[int]:
        """Wait for the end of all that shall end by themselves; return their codes."""
        until = time.monotonic() + WAIT_SECONDS
        codes = []
        for process in self.waited_for:
            try:
                codes.append(process.wait(timeout=max(1.0, until - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(NO_END)
        self.ended = time.monotonic()
        for process in self.started.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
        self.last_step = last_step(self.workdir)
        return codes

    def output(self) -> str:
        """Return what all processes have said since the last start."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.outputs.glob("output-*.txt")))


def last_step(workdir: Path) -> int:
    """Return the last step in the metrics."""
    return max([row["step"] for row in kill_resume.rows_of(workdir) if row["kind"] == "train"], default=0)


# What happens. Each function starts the command, or more, and has the fault happen.


def bad_steps(kind: str, *steps: int) -> Callable[[Case], None]:
    return lambda case: case.start(bad={kind: list(steps)})


def clock_jumps(case: Case) -> None:
    case.start(bad={"clock": {20: 36_000, 60: -72_000}})


def signal_at(step: int, number: signal.Signals, *, victim: int = 0, is_waited_for: bool = True) -> Callable:
    def meet(case: Case) -> None:
        case.start()
        case.wait_for_step(step)
        case.strike()
        process = case.started.processes[victim]
        process.send_signal(number)
        if not is_waited_for:
            case.waited_for.remove(process)

    return meet


def preempt(case: Case) -> list[Path]:
    """Leave the workdir of a run that was preempted; return its two checkpoints, the older one first."""
    case.start()
    case.wait_for_save(3 * EVERY)
    case.started.processes[0].send_signal(signal.SIGTERM)
    if set(codes := case.finish()) != {75}:
        raise RuntimeError(f"{codes}:\n{case.output()[-3000:]}")
    steps = [path for path in (case.workdir / "checkpoints").iterdir() if path.name.isdecimal()]
    return sorted(steps, key=lambda path: int(path.name))


def flip(checkpoint: Path) -> None:
    """Flip a bit of a checkpoint's largest file, in its middle."""
    path = max((path for path in (checkpoint / "state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def newest_is_damaged(case: Case) -> None:
    flip(preempt(case)[-1])
    case.start()


def all_are_damaged(case: Case) -> None:
    for checkpoint in preempt(case):
        flip(checkpoint)
    case.start()


def newest_lacks_a_part(case: Case) -> None:
    shutil.rmtree(preempt(case)[-1] / "state" / "ocdbt.process_1" / "d")
    case.start()


def copy_store(case: Case) -> Path:
    """Give the run a store of its own; return its folder."""
    store, original = case.folder / "store", case.config
    shutil.copytree(original.parent / "store", store)
    case.config = case.folder / "config.py"
    case.config.write_text(original.read_text().replace(str(original.parent / "store"), str(store)))
    return store


def rewrite_manifest(store: Path, *, vocab_size: int) -> None:
    """Have a store's manifest say that its tokenizer has so many ids."""
    from btlm_jax.data.store import read_manifest, write_manifest

    manifest = read_manifest(store)
    tokenizer = dataclasses.replace(manifest.tokenizer, vocab_size=vocab_size)
    write_manifest(store, dataclasses.replace(manifest, tokenizer=tokenizer))


def ids_are_bad(case: Case) -> None:
    store = copy_store(case)
    rewrite_manifest(store, vocab_size=300)  # the tokens go to 399
    case.start()


def tmpdir_is_full(case: Case) -> None:
    disk = case.folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)], check=True)
    (disk / "other").write_bytes(bytes(4096))
    case.start(bad={"TMPDIR": str(disk)})


def shard_is_cut(case: Case) -> None:
    """The run has a store of its own, of which a shard is cut in half while it is preempted."""
    store = copy_store(case)
    preempt(case)
    shard = max(store.glob("*train*"), key=lambda path: path.stat().st_size)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    case.start()
    case.finish()
    shard.write_bytes(whole)


def on_disk(then: Callable[[Case, Path], None], *, is_ext4: bool = False) -> Callable[[Case], None]:
    """Have the workdir on a disk of 24 MB, tmpfs or ext4, and something happen to it after the first save."""

    def meet(case: Case) -> None:
        disk, image = case.folder / "disk", case.folder / "image"
        disk.mkdir()
        if is_ext4:
            image.write_bytes(bytes(24 << 20))
            subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
            subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=True)
        else:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
        shutil.copytree(case.workdir, disk / "run")
        case.workdir = disk / "run"
        case.start()
        case.wait_for_save(EVERY)
        case.strike()
        then(case, disk)

    return meet


def filled(*, but: int) -> Callable[[Case, Path], None]:
    """Fill the disk but for so many bytes, until the command has ended."""

    def then(case: Case, disk: Path) -> None:
        other = disk / "other"
        with open(other, "wb", buffering=0) as file:
            left = shutil.disk_usage(disk).free - but
            file.write(bytes(max(left, 0)))
        case.finish()
        other.unlink()

    return then


def made_read_only(case: Case, disk: Path) -> None:
    """Have the kernel make the disk read-only, as after an input/output error; then mend it and mount it again."""
    os.sync()  # the last checkpoint is on the disk
    subprocess.run(["mount", "-o", "remount,abort", str(disk)], check=True)
    case.finish()
    subprocess.run(["umount", str(disk)], check=True)
    subprocess.run(["e2fsck", "-p", str(case.folder / "image")], check=False, stdout=subprocess.DEVNULL)
    subprocess.run(["mount", "-o", "loop", str(case.folder / "image"), str(disk)], check=True)


def workdir_is_deleted(case: Case) -> None:
    case.start(bad={"seconds of a batch": 0.2})
    case.wait_for_save(EVERY)
    case.strike()
    shutil.rmtree(case.workdir, ignore_errors=True)


def files_are_limited(victim: int, *, until_step: int | None) -> Callable[[Case], None]:
    """One process cannot write files as large as its part of a checkpoint; with `until_step` for a while only."""

    def meet(case: Case) -> None:
        case.start()
        case.wait_for_save(EVERY)
        case.strike()
        pid = case.started.processes[victim].pid
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        if until_step:
            case.wait_for_step(until_step)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    return meet


def owner_lives(case: Case) -> None:
    """Another command owns the workdir; the two processes of this one meet at another port."""
    case.processes = 1
    case.start()
    case.wait_for_step(1)
    (first,) = case.started.processes
    first.send_signal(signal.SIGSTOP)  # it lives, and does not come to its end meanwhile
    case.processes = 2
    case.start()
    case.finish()
    first.kill()
    first.wait()


def configs_differ(case: Case) -> None:
    case.start(changes=[["--config.optimizer.peak_learning_rate=0.001"], []])


def stores_differ(case: Case) -> None:
    """Process 1 sees another store at the path of the config: a folder mounted over it, for this process alone."""
    store = copy_store(case)
    shutil.copytree(store, other := case.folder / "other")
    rewrite_manifest(other, vocab_size=399)
    case.start(bad={"process 1 mounts": [str(other), str(store)]})


def versions_differ(case: Case) -> None:
    case.start(bad={"process 1 has": ["optax", "0.0.1"]})


def workdirs_differ(case: Case) -> None:
    case.start(changes=[[], [f"--workdir={case.folder / 'other'}"]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """What is done, and what is expected."""

    name: str
    meets: Callable[[Case], None]
    said: str  # a pattern in what they say
    codes: set[int]  # of the processes that are not killed or stopped
    processes: int = 1
    is_repeated: bool = True  # the same command afterwards ends with the bits of a run that nothing happened to
    seconds: float = 90.0  # from the fault to the end, at most


def fault(name: str, meets: Callable[[Case], None], code: int, said: str, **more) -> Fault:
    return Fault(name=name, meets=meets, codes={code}, said=said, **more)


NOT_WRITTEN = "a checkpoint could not be written to .*?: "
PASSED = "went back to step 24; steps 25 to 32 are passed over"
STOPPED = "Stopped on bad numbers at step .*has gone back 1 times"
SET_ASIDE = r"is damaged and set aside as .*going on from step \d+"
AT = EVERY + 5  # a step after the first save
PAIR = {"processes": 2}
OTHER = {"is_repeated": False}  # what ends is another run, or none
GONE = PAIR | {"codes": {77}}
TERM, INT, KILL, STOP = signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGSTOP
FAULTS = [
    fault("a step's numbers are NaN", bad_steps("nan", 20), 0, "step 20: no update: loss=nan", **OTHER),
    fault("a step's gradient is a spike", bad_steps("spike", 75), 0, "step 75: no update: a spike", **OTHER),
    fault("NaN in 3 steps, as many as may be skipped", bad_steps("nan", 30, 31, 32), 0, PASSED, **OTHER),
    fault("the same, two processes", bad_steps("nan", 30, 31, 32), 0, PASSED, **PAIR, **OTHER),
    fault("NaN from step 30 on", bad_steps("nan", *range(30, 101)), 76, STOPPED, **OTHER),
    fault("NaN from step 30 on, two processes", bad_steps("nan", *range(30, 101)), 76, STOPPED, **PAIR, **OTHER),
    fault("a bit of the newest checkpoint is flipped", newest_is_damaged, 0, SET_ASIDE),
    fault("a bit of the newest checkpoint is flipped, two processes", newest_is_damaged, 0, SET_ASIDE, **PAIR),
    fault("process 1's part of the newest checkpoint is missing", newest_lacks_a_part, 0, SET_ASIDE, **PAIR),
    fault("a bit of every checkpoint is flipped", all_are_damaged, 1, "no checkpoint in .* can be used", **OTHER),
    fault("a shard of the store is cut in half", shard_is_cut, 1, "error: "),
    fault("disk full at a save", on_disk(filled(but=100_000)), 1, f"{NOT_WRITTEN}No space left"),
    fault(
        "disk full at a save, two processes", on_disk(filled(but=100_000)), 1, f"{NOT_WRITTEN}.*No space left", **PAIR
    ),
    fault("disk full at a line of metrics", on_disk(filled(but=0)), 1, "No space left on device"),
    fault("disk read-only", on_disk(made_read_only, is_ext4=True), 1, "Read-only file system"),
    fault("workdir deleted", workdir_is_deleted, 1, "was deleted or moved: this run is ended"),
    fault("TMPDIR is full", tmpdir_is_full, 0, ""),
    fault("the store has ids that its tokenizer has not", ids_are_bad, 1, "the tokenizer's ids end at 299", **OTHER),
    fault(
        "process 1 of two cannot write its part (a limit on its files)",
        files_are_limited(1, until_step=None),
        1,
        f"{NOT_WRITTEN}process 1: File too large",
        **PAIR,
    ),
    fault(
        "process 0 of two cannot write its part",
        files_are_limited(0, until_step=None),
        1,
        f"{NOT_WRITTEN}process 0: File too large",
        **PAIR,
    ),
    fault(
        "process 1 of two cannot write its part, once",
        files_are_limited(1, until_step=2 * EVERY + 1),
        0,
        f"{NOT_WRITTEN}process 1: File too large; training goes on",
        **PAIR,
    ),
    fault("SIGTERM", signal_at(AT, TERM), 75, r"Preempted \(SIGTERM\): saved at step"),
    fault(
        "SIGTERM to process 1 of two", signal_at(AT, TERM, victim=1), 75, r"Preempted \(SIGTERM of process 1", **PAIR
    ),
    fault("the first Ctrl-C", signal_at(AT, INT), 75, r"Preempted \(SIGINT\): saved at step"),
    fault("SIGKILL", signal_at(AT, KILL), -9, ""),
    fault("SIGSTOP of process 1 of two", signal_at(AT, STOP, victim=1, is_waited_for=False), 77, "heard of", **PAIR),
    fault("SIGKILL of process 1 of two", signal_at(AT, KILL, victim=1, is_waited_for=False), 77, "gone", **PAIR),
    fault("SIGKILL of process 0 of two", signal_at(AT, KILL, is_waited_for=False), 77, "gone", **PAIR),
    fault("the clock jumps 10 hours ahead, then 20 back", clock_jumps, 0, ""),
    Fault(
        name="the workdir has an owner, two processes",
        meets=owner_lives,
        said="cannot take part: .* belongs to process",
        codes={1, 2},
        **PAIR,
        **OTHER,
    ),
    fault("two processes with other configs", configs_differ, 2, "peak_learning_rate: process 0 ", **PAIR, **OTHER),
    fault("two processes with other stores at one path", stores_differ, 2, "store", **PAIR, **OTHER),
    fault("two processes with other versions of a package", versions_differ, 2, "optax: process 0 ", **PAIR, **OTHER),
    fault("two processes with other workdirs", workdirs_differ, 2, "is not one for all processes", **PAIR, **OTHER),
]


def run(fault: Fault, folder: Path, config: Path, *, runs: kill_resume.Runs) -> dict:
    """Have a fault happen; return its row, with "problem" if it is not as expected."""
    unmount(folder)
    shutil.rmtree(folder, ignore_errors=True)
    expected = runs.undisturbed(fault.processes)
    case = Case(folder, config, processes=fault.processes, runs=runs)
    shutil.copytree(expected / "compile_cache", case.workdir / "compile_cache")
    began = time.monotonic()
    fault.meets(case)
    codes, output = case.finish(), case.output()
    found = [line for line in output.splitlines() if re.search(fault.said, line)] if fault.said else [""]
    problems = [] if set(codes) <= fault.codes else [f"codes {codes}"]
    problems += [] if found else [f"{fault.said!r} is not said"]
    seconds = round(case.ended - (case.struck or began), 1)
    is_ended_by_it = codes != [0] * len(codes) and (case.struck or 2 in fault.codes)
    if is_ended_by_it and seconds > fault.seconds:
        problems.append(f"after {seconds} s")
    row = {"name": fault.name, "codes": codes, "seconds": seconds if is_ended_by_it else ""}
    row |= {"said": shorten(found[0] if found else output[-1000:], folder), "step": case.last_step, "again": ""}
    if fault.is_repeated and set(codes) != {0}:
        case.outputs.rename(case.outputs.with_name("outputs-of-the-first"))
        case.start()
        if set(codes := case.finish()) != {0}:
            problems.append(f"the same command ended with {codes}: {case.output()[-1000:]}")
        begins = re.findall(r"Resuming from step ([\d,]+)", case.output())
        row["again"] = f"from step {begins[0]} to the end, same bits" if begins else "from the beginning, same bits"
    if fault.is_repeated and not problems:
        problems += kill_resume.differences(case.workdir, expected)[:3]
    row["problem"] = "; ".join(problems)
    unmount(folder)
    return row


def unmount(folder: Path) -> None:
    if (folder / "disk").is_mount():
        subprocess.run(["umount", "--lazy", str(folder / "disk")], check=True)


def shorten(line: str, folder: Path) -> str:
    """Return a line without what differs between machines."""
    line = line.replace(str(folder), "DIR").replace("|", "/")
    return re.sub(r"^btlm( train)?: | \([\w.-]+\)", "", line).strip()[:300]


def table(rows: Sequence[dict]) -> str:
    """Return a row a fault."""
    lines = ["| what happened | exit codes | after, s | what is said | last step | the same command afterwards |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        codes = ", ".join(map(str, row["codes"]))
        cells = [row["name"], codes, row["seconds"], row["said"], row["step"], row["again"] or "(not run)"]
        lines.append(
            f"| {' | '.join(map(str, cells))} |" + f" **not as expected: {row['problem']}**" * bool(row["problem"])
        )
    return "\n".join(lines)


def child(bad: dict) -> None:
    """Run the command of the arguments with bad numbers, a clock that jumps, or surroundings of its own."""
    if "TMPDIR" in bad:
        os.environ["TMPDIR"] = bad["TMPDIR"]
    if "--process_id=1" in sys.argv and (mounted := bad.get("process 1 mounts")):
        if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS: what is mounted from here on is this process's alone
            raise OSError("unshare")
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "--bind", *mounted], check=True)
    import jax
    import jax.numpy as jnp

    from btlm_jax import cli
    from btlm_jax.data import loader

    batches, real_time, shift = loader.TrainLoader.batches, time.time, [0.0]

    def spoil(weights_BT, factor):
        is_even_T = jnp.arange(weights_BT.shape[-1]) % 2 == 0
        return jnp.where(weights_BT > 0, weights_BT * jnp.where(is_even_T, 1.0, factor), weights_BT)

    def spoiled(self, *, first_step):
        for index, batch in batches(self, first_step=first_step):
            step = index + 1
            time.sleep(bad.get("seconds of a batch", 0.0))
            shift[0] += bad.get("clock", {}).get(str(step), 0.0)
            factor = jnp.inf if step in bad.get("nan", ()) else -0.98 if step in bad.get("spike", ()) else None
            if factor is not None:
                weights = batch["weights_BT"]
                batch = {**batch, "weights_BT": jax.jit(spoil, out_shardings=weights.sharding)(weights, factor)}
            yield index, batch

    if "--process_id=1" in sys.argv and (said := bad.get("process 1 has")):
        version = importlib.metadata.version
        importlib.metadata.version = lambda name: said[1] if name == said[0] else version(name)
    loader.TrainLoader.batches = spoiled
    time.time = lambda: real_time() + shift[0]
    cli.entry()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keeps rows.jsonl, and runs that ended otherwise")
    parser.add_argument("--only", nargs="+", default=(), help="the faults of these numbers, from 1")
    arguments = parser.parse_args()
    from support.real_store import build_real_store, write_config

    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log, config = folder / "rows.jsonl", folder / "config.py"
    if not config.exists():
        build_real_store(folder / "store")
        write_config(config, store=folder / "store", **CHANGES)
    runs = kill_resume.Runs(config, folder, switch=STEPS[0], changes=())
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    failed = []
    for number, each in enumerate(FAULTS, 1):
        is_chosen = not arguments.only or str(number) in arguments.only
        if not is_chosen or each.name in [row["name"] for row in rows]:
            continue
        row = run(each, folder / "case", config, runs=runs)
        print(json.dumps(row), flush=True)
        if row["problem"]:
            (folder / "case").rename(folder / f"failed-{len(list(folder.glob('failed-*')))}")
            failed.append(row)
            continue
        rows.append(row)
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    rows.sort(key=lambda row: [each.name for each in FAULTS].index(row["name"]))
    print(table([*rows, *failed]))
    return int(bool(failed))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("--child="):
        wrapped = json.loads(sys.argv.pop(1).partition("=")[2])
        child(wrapped)
    sys.exit(main())
