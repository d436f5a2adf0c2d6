"""One command from text to a model: its wall clock against what it said, and held-out bits a byte against `xz -9`.

Command:  python benchmarks/own_text.py --minutes=5 --directory=runs/own_text TEXT [TEXT ...] [--shapes=2x128,4x256]

Each TEXT (a file, a folder, anything that --data takes) is trained by `btlm train --data=TEXT --minutes=N` in a process
and a workdir of its own. `said` and `took` are of the whole process, `text` of it up to the finished token store; the
load is the machine's in the last minute, before and after: on 2 cores well above 2 means that other work ran beside it.
--shapes trains each text once with every shape of (layers x width) in place of the one that train/sizing.py chooses.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path

# The command, with the shapes to choose from changed if there is an argument before its own.
PROGRAM = """
import sys
from btlm_jax.cli import main
from btlm_jax.train import sizing
if sys.argv[1]:
    layers, width = sys.argv[1].split("x")
    sizing.SHAPES = ((int(layers), int(width)),)
sys.exit(main(sys.argv[2:]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--directory", type=Path, required=True, help="of the workdirs, one a text and shape")
    parser.add_argument("--shapes", default="", help="LAYERSxWIDTH, separated by commas")
    arguments = parser.parse_args()
    print(
        f"{'text':<24} {'model':<26} {'steps':>7} {'epochs':>7} {'said':>7} {'took':>7} {'text':>6} {'loss':>6} "
        f"{'bits/B':>7} {'xz -9':>7} {'load':>11}"
    )
    for text in arguments.texts:
        for shape in arguments.shapes.split(","):
            name = f"{Path(text.rstrip('/')).name}{f'-{shape}' if shape else ''}"
            print(row(text, shape=shape, minutes=arguments.minutes, workdir=arguments.directory / name), flush=True)


def row(text: str, *, shape: str, minutes: float, workdir: Path) -> str:
    """Train a text and return its row of the table.

    Raises:
      SystemExit: the command failed.
    """
    if workdir.exists():
        raise SystemExit(f"{workdir} exists; give another --directory")
    workdir.mkdir(parents=True)
    before, began = os.getloadavg()[0], time.monotonic()
    command = [sys.executable, "-c", PROGRAM, shape, "train", f"--data={text}", f"--workdir={workdir}"]
    with open(workdir.with_suffix(".log"), "w") as log:
        code = subprocess.run([*command, f"--minutes={minutes:g}"], stdout=log, stderr=subprocess.STDOUT).returncode
    took, after = time.monotonic() - began, os.getloadavg()[0]
    if code:
        raise SystemExit(f"{text}: exit code {code}; {workdir.with_suffix('.log')} says why")
    record = json.loads((workdir / "own_text.json").read_text())
    summary = json.loads((workdir / "summary.json").read_text())
    said = {line.partition(":")[0]: line.partition(": ")[2] for line in record["lines"]}
    of_text = (workdir / "store" / "manifest.json").stat().st_mtime - (time.time() - took)  # a store was there
    heldout = (workdir / "corpus" / "heldout.txt").read_bytes()
    xz = 8 * len(lzma.compress(heldout, preset=9)) / len(heldout)
    return (
        f"{Path(text).name[:24]:<24} {said['Model'].partition(':')[0][:26]:<26} {summary['num_steps']:>7,} "
        f"{said['Run'].split(' tokens, ')[1].split(' ')[0]:>7} {said['Time'].split(' for')[0][6:]:>7} "
        f"{took / 60:>6.1f}m {of_text:>5.0f}s {summary['heldout']['loss']:>6.3f} "
        f"{summary['heldout']['bits_per_byte']:>7.3f} {xz:>7.3f} {before:>5.1f} {after:>5.1f}"
    )


if __name__ == "__main__":
    main()
