"""The coordinate check of the trainer as users run it: btlm, completep, sp and Muon over widths, presets over depths.

    python -m experiments.coordinate_check --folder=DIR [--quick]

Each check is `btlm tune coord-check --config=...` in a folder of DIR; those that are there are not made again. The last
one breaks the config in every known way, and each must be caught.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.machine import machine
from btlm_jax.cli import DONE, ERROR, main
from btlm_jax.display.plotting import new_panels, write_figure
from btlm_jax.storage.files import read_json_object
from experiments.study import write_results

FOLDER = Path(__file__).parent
DEPTHS = {"": "--depths=2,4,8", "quick": "--depths=2,4", "large": "--depths=2,4,8,16"}
SEEDS = {"": 5, "quick": 5, "large": 5}
# What is checked, and whether it must be flat; None: it is broken in known ways, and each must be as expected.
CHECKS = {
    "btlm": (["--config.mup.preset=btlm"], True),
    "completep": (["--config.mup.preset=completep"], True),
    "sp": (["--config.mup.preset=sp"], False),
    "muon": (["--config.optimizer.hidden_optimizer=muon"], True),
    "completep over depths": (["--config.mup.preset=completep"], True),
    "btlm over depths": (["--config.mup.preset=btlm"], False),
    "btlm, broken": (["--config.mup.preset=btlm", "--mutate"], None),
}


def arguments_of(name: str, size: str) -> list[str]:
    """Return the flags of a check of a size of the config."""
    config = FOLDER / "config.py"
    found = [f"--config={config}:{size}" if size else f"--config={config}", f"--seeds={SEEDS[size]}", *CHECKS[name][0]]
    if "depths" in name:
        return [*found, DEPTHS[size]]
    return [*found, "--widths=64,256"] if size == "quick" else found


def gather(folder: Path, names: list[str]) -> dict[str, dict]:
    """Return what the finished checks say: of each the first case, and of the broken ones who caught them."""
    found = {}
    for name in names:
        path = folder / name.replace(" ", "_").replace(",", "") / "coord_check.json"
        if not path.is_file():
            continue
        values = read_json_object(path)
        first = values["cases"][0]
        found[name] = {
            "ladder": values["ladder"],
            "sizes": values["sizes"],
            "seeds": len(values["seeds"]),
            "steps": values["steps"],
            "learning_rate": values["learning_rate"],
            "steepest": first["steepest"],
            "slope": first["slopes"][first["steepest"]],
            "standard_error": first["standard_errors"][first["steepest"]],
            "loss_spread": first["loss_spread"],
            "is_flat": first["is_as_expected"],
            "cases": {
                case["name"]: {
                    "slope": case["slopes"][case["steepest"]], "loss_spread": case["loss_spread"],
                    "caught_by": case["caught_by"], "is_as_expected": case["is_as_expected"],
                }
                for case in values["cases"][1:]
            },
        }  # fmt: skip
    return found


def is_as_expected(name: str, found: Mapping) -> bool:
    """Return whether a check came out as its parametrization says."""
    expected = CHECKS[name][1]
    if expected is None:
        return found["is_flat"] and all(case["is_as_expected"] for case in found["cases"].values())
    return found["is_flat"] == expected


def describe(checks: Mapping[str, dict]) -> str:
    """Return a table: a row a check."""
    lines = ["| check | sizes | steepest slope | of | loss spread, nats | came out |", "|---|---|---|---|---|---|"]
    for name, each in checks.items():
        said = "flat" if each["is_flat"] else "not flat"
        if each["cases"]:
            caught = sum(case["is_as_expected"] for case in each["cases"].values())
            said += f", {caught} of {len(each['cases'])} variants as expected"
        said += "" if is_as_expected(name, each) else ": **not as expected**"
        slope = "not finite" if each["slope"] is None else f"{each['slope']:+.2f} ± {each['standard_error']:.2f}"
        lines.append(
            f"| {name} | {', '.join(map(str, each['sizes']))} | {slope} | {each['steepest']} | "
            f"{each['loss_spread']:.2f} | {said} |"
        )
    return "\n".join(lines)


def plot(checks: Mapping[str, dict], path: Path) -> None:
    """Draw the steepest slope and the spread of losses of every check and broken variant."""
    rows = []
    for name, each in checks.items():
        rows.append((name, each["slope"], each["loss_spread"], "tab:blue"))
        rows += [(f"  {case}", x["slope"], x["loss_spread"], "tab:orange") for case, x in each["cases"].items()]
    figure, panels = new_panels(size=(11.0, 1.5 + 0.25 * len(rows)), dpi=110, columns=2)
    for panel, column, limit, label in ((panels[0], 1, 0.12, "|slope|"), (panels[1], 2, 0.12, "loss spread, nats")):
        values = [abs(row[column]) if row[column] is not None else 0.0 for row in rows]
        panel.barh(range(len(rows)), values, color=[row[3] for row in rows])
        panel.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize="x-small")
        panel.invert_yaxis()
        panel.axvline(limit, color="black", linewidth=0.8)
        panel.set_xlabel(f"steepest {label}" if column == 1 else label)
    write_figure(figure, path)


def run(folder: Path, *, size: str, names: list[str]) -> int:
    """Make the checks that are missing; write their numbers and figure; return an exit code."""
    for name in names:
        directory = folder / name.replace(" ", "_").replace(",", "")
        if not (directory / "coord_check.json").is_file():
            print(f"{name}:", flush=True)
            code = main(["tune", "coord-check", f"--directory={directory}", *arguments_of(name, size)])
            if code not in (DONE, ERROR) or not (directory / "coord_check.json").is_file():
                return code or ERROR
    checks = gather(folder, names)
    values = {
        "experiment": FOLDER.name,
        "command": f"python -m experiments.{FOLDER.name} --folder=DIR" + (f" --{size}" if size else ""),
        "checks_left_out": [name for name in CHECKS if name not in checks],
        "machine": machine("jax", "numpy"),
        "checks": checks,
    }
    output = folder if size else FOLDER
    write_results(values, output, plot=lambda values, path: plot(values["checks"], path), text=describe(checks))
    return DONE if all(is_as_expected(name, each) for name, each in checks.items()) else ERROR


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the checks, outside of the repository")
    parser.add_argument("--quick", action="store_true", help="config.py:quick: some minutes")
    parser.add_argument("--large", action="store_true", help="config.py:large: for a GPU")
    parser.add_argument("--only", default="", help="names of checks, with a semicolon between them")
    options = parser.parse_args()
    chosen = [name.strip() for name in options.only.split(";")] if options.only else list(CHECKS)
    for each in chosen:
        if each not in CHECKS:
            parser.error(f"--only={each}: there are {'; '.join(CHECKS)}")
    sys.exit(run(options.folder, size="quick" if options.quick else "large" if options.large else "", names=chosen))
