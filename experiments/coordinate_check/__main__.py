"""The coordinate check of the trainer as users run it: btlm, completep, sp and Muon over widths, presets over depths.

    python -m experiments.coordinate_check --folder=DIR [--quick]

Each check is `btlm tune coord-check --config=...` in a folder of DIR/trials; those that are there are not made again,
and another size needs another DIR. The last one breaks the config in every known way, and each must be caught. Numbers
and figure are of all checks in DIR; they go beside config.py, or to DIR with another size or while a check is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.machine import machine
from btlm_jax.cli import DONE, ERROR, UsageError
from btlm_jax.cli.parse import Flags, load_config
from btlm_jax.display.plotting import new_panels, write_figure
from btlm_jax.recipe.config import train_config_from
from btlm_jax.storage.files import read_json_object
from btlm_jax.tune import trials
from experiments.study import config_of_size, define_sizes, run_command, run_verb, size_of, write_results

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
    """Return the flags of a check of a size of the config, but for --config itself."""
    found = [f"--seeds={SEEDS[size]}", *CHECKS[name][0]]
    if "depths" in name:
        return [*found, DEPTHS[size]]
    return [*found, "--widths=64,256"] if size == "quick" else found


def study_of(size: str) -> dict:
    """Return what all checks of a folder are of."""
    config = train_config_from(load_config(FOLDER / "config.py", argument=size, changes={}))
    checks = {name: arguments_of(name, size) for name in CHECKS}
    return {"kind": FOLDER.name, "argument": size, "checks": checks, "config": dataclasses.asdict(config)}


def folder_of(name: str, folder: Path) -> Path:
    """Return the folder of a check."""
    return folder / trials.TRIALS / name.replace(" ", "_").replace(",", "")


def gather(folder: Path) -> dict[str, dict]:
    """Return what the finished checks say: of each the first case, and of the broken ones who caught them."""
    found = {}
    for name in CHECKS:
        path = folder_of(name, folder) / "coord_check.json"
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
        slope, error = each["slope"], each["standard_error"]
        shown = "not finite" if slope is None else f"{slope:+.2f}" + (f" ± {error:.2f}" if error is not None else "")
        spread = "not finite" if each["loss_spread"] is None else f"{each['loss_spread']:.2f}"
        lines.append(
            f"| {name} | {', '.join(map(str, each['sizes']))} | {shown} | {each['steepest']} | {spread} | {said} |"
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


def conduct(arguments: Sequence[str]) -> int:
    """Make the checks that are missing; write the numbers and the figure of all; return an exit code.

    Raises:
      UsageError, ValueError, OSError: as `btlm tune coord-check`; the folder is another size's.
    """
    flags = Flags(f"python -m experiments.{FOLDER.name}: {__doc__}")
    define_sizes(flags)
    flags.define_string("only", "", "names of checks to make, with a semicolon between them")
    if not flags.parse(arguments):
        return DONE
    folder, size = flags.path("folder"), size_of(flags)
    chosen = [name.strip() for name in flags.string("only").split(";")] if flags.is_given("only") else list(CHECKS)
    for name in chosen:
        if name not in CHECKS:
            raise UsageError(f"--only={name}: there are {'; '.join(CHECKS)}")
    trials.begin_study(folder, study_of(size))
    for name in chosen:
        directory = folder_of(name, folder)
        if not (directory / "coord_check.json").is_file():
            print(f"{name}:", flush=True)
            command = ["tune", "coord-check", f"--directory={directory}", f"--config={config_of_size(FOLDER, size)}"]
            code = run_verb([*command, *arguments_of(name, size)])
            if code not in (DONE, ERROR) or not (directory / "coord_check.json").is_file():
                return code or ERROR
    checks = gather(folder)
    left_out = [name for name in CHECKS if name not in checks]
    values = {
        "experiment": FOLDER.name,
        "command": f"python -m experiments.{FOLDER.name} --folder=DIR" + (f" --{size}" if size else ""),
        "checks_left_out": left_out,
        "machine": machine("jax", "numpy"),
        "checks": checks,
    }
    output = folder if size or left_out else FOLDER
    write_results(values, output, plot=lambda values, path: plot(values["checks"], path), text=describe(checks))
    return DONE if all(is_as_expected(name, each) for name, each in checks.items()) else ERROR


if __name__ == "__main__":
    run_command(FOLDER.name, conduct)
