"""Compile the first phase of a pod's config again and compare it with its row of configs/pods/table.json.

    python benchmarks/compile_again.py family:111M@v5e-8

With the versions of the table and the same program it is equal; exit code 1 where memory differs by more than 3 %, or
step time or a kind of exchange by more than 5 %. Step times of a row of before the calibration are not compared. A
3B takes some 200 CPU seconds (AMD EPYC (Zen 4), 2026-11-30).
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

from btlm_jax.cli.parse import packaged_folder
from btlm_jax.plan.chips import chip_of, slice_devices
from btlm_jax.plan.compiling import CompileCache
from btlm_jax.plan.estimate import plan_phase
from btlm_jax.plan.make_table import read_pod_configs
from btlm_jax.plan.plan_report import collectives_by_kind
from btlm_jax.plan.slice_plan import program_on

LIMITS = {"memory": 0.03, "time": 0.05, "exchange": 0.05}


def main() -> int:
    folder = packaged_folder("configs") / "pods"
    pods = {pod.name: pod for file in sorted(folder.glob("*.py")) for pod in read_pod_configs(file)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=pods)
    name = parser.parse_args().name
    pod = pods[name]
    rows = json.loads((folder / "table.json").read_text())["rows"]
    (row,) = (row for row in rows if row["name"] == name and row["is_config"])
    program, chip = program_on(pod.config, slice_devices(pod.topology)), chip_of(pod.topology)
    with tempfile.TemporaryDirectory() as scratch:
        cache = CompileCache(directory=Path(scratch), max_compiles=math.inf)
        phase = pod.config.curriculum.table.phases[0]
        plan = plan_phase(program, phase, topology=pod.topology, chip=chip, cache=cache)
    said, exchanged = row["phases"][0], collectives_by_kind(plan)
    pairs = [("memory", "bytes needed", said["needed_bytes"], plan.memory.needed)]
    if "step_central" in said:
        pairs += [("time", "seconds a step", said["step_central"], plan.step_time.central)]
        pairs += [("time", "seconds by the compiler", said["step_by_compiler"], plan.step_time.compiler)]
    kinds = {(each["kind"], each["is_asynchronous"]): each["bytes"] for each in said["collectives"]}
    for key in sorted(kinds.keys() | exchanged.keys()):
        label = f"bytes of {key[0]}{', asynchronous' if key[1] else ''}"
        pairs.append(("exchange", label, kinds.get(key, 0), exchanged[key][1] if key in exchanged else 0))
    is_same = True
    for limit, label, before, now in pairs:
        difference = abs(now - before) / max(before, 1e-9)
        is_same &= difference <= LIMITS[limit]
        print(f"{label:<40} table {before:>16,.6g}   now {now:>16,.6g}   {100 * difference:.2f} %")
    print("as the table says" if is_same else "not as the table says: make it again with btlm plan --table")
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
