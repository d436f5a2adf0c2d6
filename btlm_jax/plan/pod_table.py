"""The committed table of layouts compiled for slices, and the refusal of layouts that do not fit according to it.

Read before anything touches a device, on a pod and on the machine that rents it; make_table.py writes it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from btlm_jax.parallel.make_mesh import num_slices
from btlm_jax.plan.chips import CHIPS, GIB, chip_of_device, usual_topology
from btlm_jax.plan.layout import MeshLayout, layout_of
from btlm_jax.recipe.config import LATER_KEYS, MeshConfig, TrainConfig, config_from
from btlm_jax.recipe.curriculum import Curriculum
from btlm_jax.storage.files import parse_json_object, read_json_object

TABLE_FILE = "table.json"
POD_FOLDER, FAMILY_FOLDER = "pods", "family"  # of configs/, with a table each
# Besides model and batches; a row says nothing of those that are as usual.
_DECIDES_PROGRAM = (("optimizer", "average"), ("optimizer", "hidden_optimizer"), ("optimizer", "freeze"))
_DECIDES_PROGRAM += (("data", "document_mask"), ("bad_numbers", "recompute_every"))
_NO_EFFECT_ON_MEMORY = ("layer_norm_eps", "alibi_scaling", "remat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One layout of one model and curriculum on one slice, and the result of compiling it."""

    name: str  # of the config file
    topology: str
    chip: str
    num_chips: int
    trains: dict  # see training_fields
    layout: MeshLayout
    fits: bool
    needed: int  # bytes of a chip, in the phase that needs the most
    available: int
    step_seconds: tuple[float, ...]  # predicted, of each phase; none in rows without a central value
    step_ranges: tuple[tuple[float, float], ...]  # the same, (low end, high end); none of a phase that does not fit

    def run_seconds(self, curriculum: Curriculum) -> tuple[float, float]:
        """Return the predicted seconds of a run of these phases, which may have other steps: (low end, high end)."""
        low, high = (
            sum(phase.num_steps * each[end] for phase, each in zip(curriculum.phases, self.step_ranges, strict=True))
            for end in (0, 1)
        )
        return low, high

    def __str__(self) -> str:
        return f"{self.layout.flags} ({self.needed / GIB:.2f} of {self.available / GIB:.2f} GiB)"


def table_beside(config_file: Path) -> Path:
    """Return the path of the table for a config file: in its folder if that has one, else in pods/ beside it."""
    folder = config_file.parent
    return (folder if folder.name in (POD_FOLDER, FAMILY_FOLDER) else folder / POD_FOLDER) / TABLE_FILE


def read_table(path: Path) -> list[Row]:
    """Return the rows of a table; none if there is no such file.

    Raises:
      ValueError: it is damaged, or of another version of this code.
    """
    if not path.is_file():
        return []
    try:
        return [_row(values) for values in parse_json_object(path.read_bytes(), name=path)["rows"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}); make it again: btlm plan --table={path}"
        ) from error


def read_versions(path: Path) -> dict[str, str]:
    """Return the versions of the compiler that a table was made with.

    Raises:
      ValueError: it has none.
      OSError: it cannot be read.
    """
    versions = read_json_object(path).get("versions")
    if not isinstance(versions, dict):
        raise ValueError(f"{path} does not say which compiler made it; make it again: btlm plan --table={path}")
    return {str(name): str(version) for name, version in versions.items()}


def training_fields(config: TrainConfig) -> dict:
    """Return the fields of a config, besides its layout, on which the compiled program and its memory depend."""
    model = dataclasses.asdict(config.model)
    phases = [[phase.batch_size, phase.seq_len] for phase in config.curriculum.table.phases]
    unusual: dict[str, dict] = {}
    for section, name in _DECIDES_PROGRAM:
        if (value := getattr(getattr(config, section), name)) != LATER_KEYS[section][name]:
            unusual.setdefault(section, {})[name] = value
    return {
        "model": {
            name: value
            for name, value in model.items()
            if name not in _NO_EFFECT_ON_MEMORY and (name, value) != ("qk_norm", "none")  # older tables lack this key
        },
        "batch_x_seq_len": phases,
        **unusual,
    }


def check_layout_fits(
    config: TrainConfig, *, config_file: Path, changes: Mapping[str, str], chip: str, num_chips: int
) -> str:
    """Check a config on so many chips against the table; return a sentence: it fits, or how to find out.

    `config_file` is as --config takes it, with ":" and an argument where it has one; `changes` are the texts of the
    keys that the command line changes in it, as `Flags.changes` has them.

    Raises:
      ValueError: it does not fit, or needs at least as much as a layout that does not; names layouts that fit.
    """
    table, layout = table_beside(config_file), layout_of(config)
    rows = _rows_of(config, table=table, chip=chip, num_chips=num_chips)
    topology = usual_topology(CHIPS[chip], count=num_chips) or f"{chip}:AxBxC"
    others = [f"--config.{key}={text}" for key, text in changes.items() if key not in layout.keys]
    command = shlex.join(["btlm", "plan", f"--config={config_file}", f"--topology={topology}", *others])
    for row in rows:
        if not row.fits and layout.relative_memory(row.layout) == 1:
            raise ValueError(
                f"{layout} does not fit on {num_chips} chips of {chip}: {_compared(layout, row)}, by {table}"
                f"{_other_versions(table)}. "
                f"{_fitting_layouts(rows)}; or look for others: {command} --search"
            )
    for row in rows:
        if row.layout == layout:
            steps = ", ".join(
                f"{seconds:.3f} s a step of {phase.batch_size:,} x {phase.seq_len:,}"
                for seconds, phase in zip(row.step_seconds, config.curriculum.table.phases, strict=False)
            )
            predicted = f"; predicted, not measured: {steps}" if steps else ""
            return f"{layout} fits on {num_chips} chips of {chip}, by {table}{_other_versions(table)}{predicted}"
    return (
        f"{table} does not have {layout} on {num_chips} chips of {chip}, so whether it fits is not known; to see: "
        f"{command} {layout.flags}"
    )


def predicted_seconds(config: TrainConfig, *, config_file: Path, chip: str, num_chips: int) -> tuple[float, ...]:
    """Return the seconds of a step of each phase by the table; none where it does not have the layout, or no times.

    Raises:
      ValueError: the table is damaged.
    """
    rows = _rows_of(config, table=table_beside(config_file), chip=chip, num_chips=num_chips)
    return next((row.step_seconds for row in rows if row.fits and row.layout == layout_of(config)), ())


def check_devices(
    config: TrainConfig, devices: Sequence[jax.Device], *, config_file: Path, changes: Mapping[str, str]
) -> str:
    """Check as `check_layout_fits` does for the devices of this run; return "" where they are no TPUs.

    Raises:
      ValueError: as `check_layout_fits`.
    """
    chip = chip_of_device(devices[0])
    if chip and (slices := num_slices(devices)) > 1:
        return f"the table has layouts of one slice; for {slices} see btlm plan --slices={slices}"
    if not chip:
        return ""
    return check_layout_fits(config, config_file=config_file, changes=changes, chip=chip.name, num_chips=len(devices))


def _rows_of(config: TrainConfig, *, table: Path, chip: str, num_chips: int) -> list[Row]:
    """Return the rows of a config, with its and other layouts, on so many chips."""
    wanted = (chip, num_chips, training_fields(config))
    return [row for row in read_table(table) if (row.chip, row.num_chips, row.trains) == wanted]


def _other_versions(table: Path) -> str:
    """Return which packages a table was compiled with that are installed here in another version, in brackets."""
    said = []
    for name, version in read_versions(table).items():
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # as libtpu beside a pod
            continue
        if here != version:
            said.append(f"{name} {version}, not {here} as here")
    return f" (compiled with {'; '.join(said)})" if said else ""


def _row(values: dict) -> Row:
    layout, ranges = values["layout"], (phase["step_seconds"] for phase in values["phases"] if phase["fits"])
    return Row(
        name=values["name"],
        topology=values["topology"],
        chip=values["chip"],
        num_chips=values["num_chips"],
        trains=values["trains"],
        layout=MeshLayout(
            mesh=config_from(MeshConfig, LATER_KEYS["mesh"] | layout["mesh"], path="mesh"), remat=layout["remat"]
        ),
        fits=values["fits"],
        needed=values["needed_bytes"],
        available=values["available_bytes"],
        step_seconds=tuple(phase["step_central"] for phase in values["phases"] if "step_central" in phase),
        step_ranges=tuple((low, high) for low, high in ranges),
    )


def _compared(layout: MeshLayout, row: Row) -> str:
    needs = f"{row.needed / GIB:.2f} GiB of a chip's {row.available / GIB:.2f} GiB"
    return f"it needs {needs}" if layout == row.layout else f"it needs no less than {row.layout}, which needs {needs}"


def _fitting_layouts(rows: Sequence[Row]) -> str:
    fitting = [str(row) for row in rows if row.fits]
    return f"What fits there: {'; '.join(fitting)}" if fitting else "The table has no layout of it that fits there"
