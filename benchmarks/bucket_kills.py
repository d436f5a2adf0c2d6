"""Kill training runs whose workdir is in a bucket, go on elsewhere or here, and compare every bit with a local run.

Command: python benchmarks/bucket_kills.py --config=FILE --folder=DIR --kills=20 --processes=one

The bucket is tests/support/fake_gcs.py, slow enough that SIGKILL mostly comes in the middle of an upload. A run is one
process; two of a device each, with --processes=two; or with --processes=elastic, at each start, one of two devices or
two of one. Of two, one or both are killed: the other must end with 77. After half of the kills the local folders are
deleted, as if the next start were on other machines. A run that ends must have, in the bucket, the hashes of arrays of
an undisturbed local run at its last step, and every number that it logged, each step once; no object of a checkpoint
without its commit may be left. Prints a row for each kill; exits with 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

SERVER = Path(__file__).parents[1] / "tests" / "support" / "fake_gcs.py"
CLOCK = ("tokens_per_second", "mfu", "seconds")
WRITE_SECONDS = 0.05
LEFT = "left to end"


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", choices=("one", "two", "elastic"), default="one")
    flags = parser.parse_args()
    rng = random.Random(flags.seed)
    flags.folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    environment = {
        **os.environ,
        "BTLM_STAGING": str(flags.folder / "staging"),
        "FSSPEC_GS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "FSSPEC_GS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "JAX_COMPILATION_CACHE_DIR": str(flags.folder / "compiled"),
    }
    local = flags.folder / "local"
    num_devices = 1 if flags.processes == "one" else 2
    finish(start(flags.config, str(local), environment, num_devices=num_devices, count=1))
    expected = numbers((local / "metrics.jsonl").read_bytes()), arrays_of_last(local)
    server = subprocess.Popen([sys.executable, SERVER, str(port), str(WRITE_SECONDS)])
    num_wrong = num_kills = num_runs = 0
    try:
        while num_kills < flags.kills:
            workdir, num_runs = f"run-{num_runs}", num_runs + 1
            while True:
                count = rng.choice((1, 2)) if flags.processes == "elastic" else num_devices
                url = f"gs://bucket/{workdir}"
                processes = start(flags.config, url, environment, num_devices=num_devices, count=count)
                moment = wait_for_upload(processes[0], port, workdir, rng) if num_kills < flags.kills else LEFT
                if processes[0].poll() is not None or moment == LEFT:
                    break
                codes = kill(processes, rng.sample(range(count), rng.randint(1, count)))
                if any(code not in (-9, 77) for code in codes):
                    print(f"{workdir}: ended with {codes}")
                    num_wrong += 1
                num_kills += 1
                is_elsewhere = rng.random() < 0.5
                if is_elsewhere:
                    shutil.rmtree(flags.folder / "staging", ignore_errors=True)
                where = "elsewhere" if is_elsewhere else "here"
                print(f"{num_kills:4}  {workdir:8}  {moment:40}  {str(codes):10}  next start {where}")
                sys.stdout.flush()
            finish(processes)
            objects = contents(port, workdir)
            found = numbers(objects["metrics.jsonl"]), arrays_of_objects(objects)
            left = [name for name in objects if name.startswith("checkpoints/") and not is_committed(name, objects)]
            is_right = found == expected and not left
            num_wrong += not is_right
            print(f"{workdir}: {'every bit as undisturbed' if is_right else f'DIFFERS, left over: {left}'}", flush=True)
    finally:
        server.kill()
        server.wait()
    print(f"{num_kills} kills, {num_runs} runs, {num_wrong} wrong")
    return int(num_wrong > 0)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(
    config: str, workdir: str, environment: dict[str, str], *, num_devices: int, count: int
) -> list[subprocess.Popen]:
    """Start the real command in `count` processes; what they say goes to a file of the local folder."""
    command = [sys.executable, "-m", "btlm_jax", "train", f"--config={config}", f"--workdir={workdir}"]
    environment = environment | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices // count)}
    flags = [[f"--process_id={index}"] for index in range(count)] if count > 1 else [[]]
    if count > 1:
        command += [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    with open(Path(environment["BTLM_STAGING"]).parent / "output.txt", "ab") as output:
        return [subprocess.Popen([*command, *own], env=environment, stdout=output, stderr=output) for own in flags]


def kill(processes: list[subprocess.Popen], victims: list[int]) -> list[int]:
    """Kill some processes of a run, and return with which code each of all ends."""
    for index in victims:
        processes[index].kill()
    return [process.wait(timeout=300) for process in processes]


def finish(processes: list[subprocess.Popen]) -> None:
    """Wait for the end of a run, which must be its end."""
    if any(codes := [process.wait() for process in processes]):
        raise SystemExit(f"the run ended with {codes}: see output.txt")


def wait_for_upload(process: subprocess.Popen, port: int, workdir: str, rng: random.Random) -> str:
    """Return what is going on when it is time to kill the run: up to half a second after a new object is seen."""
    before = len(names(port, workdir))
    num_new = rng.randrange(1, 60)
    while process.poll() is None:
        found = names(port, workdir)
        if len(found) >= before + num_new:
            time.sleep(rng.random() / 2)
            open_ones = {name.split("/")[1] for name in names(port, workdir) if not is_committed(name, found)}
            return f"uploading checkpoint {', '.join(sorted(open_ones))}" if open_ones else "between checkpoints"
        time.sleep(0.02)
    return LEFT


def is_committed(name: str, objects) -> bool:
    parts = name.split("/")
    return parts[0] != "checkpoints" or f"checkpoints/{parts[1]}/commit.json" in objects


def names(port: int, workdir: str) -> set[str]:
    prefix = f"{workdir}/"
    url = f"http://127.0.0.1:{port}/storage/v1/b/bucket/o?prefix={prefix}"
    try:
        with urllib.request.urlopen(url) as answer:
            return {item["name"].removeprefix(prefix) for item in json.load(answer)["items"]}
    except OSError:  # the server has just been started
        return set()


def contents(port: int, workdir: str) -> dict[str, bytes]:
    found = {}
    for name in names(port, workdir):
        quoted = urllib.parse.quote(f"{workdir}/{name}", safe="")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/storage/v1/b/bucket/o/{quoted}?alt=media") as answer:
            found[name] = answer.read()
    return found


def numbers(metrics: bytes) -> list[dict]:
    """Return the train and eval lines without what a clock decides."""
    rows = [json.loads(line) for line in metrics.splitlines()]
    kept = [row for row in rows if row["kind"] in ("train", "eval", "sample")]
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in kept]


def arrays_of_last(workdir: Path) -> dict[str, str]:
    """Return the hash of each array of a local run's last checkpoint."""
    step = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    return json.loads((workdir / "checkpoints" / str(step) / "digests" / "metadata").read_bytes())["arrays"]


def arrays_of_objects(objects: dict[str, bytes]) -> dict[str, str]:
    step = max(int(name.split("/")[1]) for name in objects if name.startswith("checkpoints/"))
    return json.loads(objects[f"checkpoints/{step}/digests/metadata"])["arrays"]


if __name__ == "__main__":
    sys.exit(main())
