"""The checked-in table of layouts that were compiled for a slice, and refusing those that it says do not fit.

Read before anything touches a device, on a pod and on the machine that rents it; making it is in make_table.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from btlm_jax.plan.chips import CHIPS, GIB, chip_of_device, usual_topology
from btlm_jax.plan.layout import Layout, layout_of
from btlm_jax.recipe.config import MeshConfig, TrainConfig, config_from

TABLE_FILE = "table.json"
POD_FOLDER = "pods"
_NO_EFFECT_ON_MEMORY = ("layer_norm_eps", "alibi_scaling", "remat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One layout of one model and curriculum on one slice, and what its compilation said."""

    name: str  # of the config file
    chip: str
    num_chips: int
    trains: dict  # what is compiled, but for the layout
    layout: Layout
    fits: bool
    needed: int  # bytes of a chip, in the phase that needs the most
    available: int

    def __str__(self) -> str:
        return f"{self.layout.flags} ({self.needed / GIB:.2f} of {self.available / GIB:.2f} GiB)"


def table_beside(config_file: Path) -> Path:
    """Return where the table for a config file is: in the folder of the pods' configs, or in that folder beside it."""
    folder = config_file.parent
    return (folder if folder.name == POD_FOLDER else folder / POD_FOLDER) / TABLE_FILE


def read_table(path: Path) -> list[Row]:
    """Return the rows of a table; none if there is no such file.

    Raises:
      ValueError: it is damaged, or its layouts are not those of this code.
    """
    if not path.is_file():
        return []
    try:
        return [_row(values) for values in json.loads(path.read_text())["rows"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}); make it again: btlm plan --table={path}"
        ) from error


def trains(config: TrainConfig) -> dict:
    """Return what of a config, besides its layout, decides what is compiled and how much memory that needs."""
    model = dataclasses.asdict(config.model)
    phases = [[phase.batch_size, phase.seq_len] for phase in config.curriculum.table.phases]
    return {
        "model": {name: value for name, value in model.items() if name not in _NO_EFFECT_ON_MEMORY},
        "batch_x_seq_len": phases,
    }


def check_fits(config: TrainConfig, *, config_file: Path, chip: str, num_chips: int) -> str:
    """Return what the table says of a config on so many chips: that it fits, or how to find out.

    Raises:
      ValueError: it does not fit, or needs no less than a layout that does not; names layouts that fit.
    """
    table, layout = table_beside(config_file), layout_of(config)
    rows = [
        row for row in read_table(table) if (row.chip, row.num_chips, row.trains) == (chip, num_chips, trains(config))
    ]
    topology = usual_topology(CHIPS[chip], count=num_chips) or f"{chip}:AxBxC"
    command = f"btlm plan --config={config_file} --topology={topology}"
    for row in rows:
        if not row.fits and layout.share_needed(row.layout) == 1:
            raise ValueError(
                f"{layout} does not fit on {num_chips} chips of {chip}: {_compared(layout, row)}, by {table}. "
                f"{_what_fits(rows)}; or look for others: {command} --search"
            )
    if any(row.layout == layout for row in rows):
        return f"{layout} fits on {num_chips} chips of {chip}, by {table}"
    return (
        f"{table} does not have {layout} on {num_chips} chips of {chip}, so whether it fits is not known; to see: "
        f"{command} {layout.flags}"
    )


def check_devices(config: TrainConfig, devices: Sequence[jax.Device], *, config_file: Path) -> str:
    """Do as `check_fits` for the devices of this run; "" when they are none that a table could have.

    Raises:
      ValueError: as `check_fits`.
    """
    chip = chip_of_device(devices[0])
    return check_fits(config, config_file=config_file, chip=chip.name, num_chips=len(devices)) if chip else ""


def _row(values: dict) -> Row:
    layout = values["layout"]
    return Row(
        name=values["name"],
        chip=values["chip"],
        num_chips=values["num_chips"],
        trains=values["trains"],
        layout=Layout(mesh=config_from(MeshConfig, layout["mesh"], path="mesh"), remat=layout["remat"]),
        fits=values["fits"],
        needed=values["needed_bytes"],
        available=values["available_bytes"],
    )


def _compared(layout: Layout, row: Row) -> str:
    needs = f"{row.needed / GIB:.2f} GiB of a chip's {row.available / GIB:.2f} GiB"
    return f"it needs {needs}" if layout == row.layout else f"it needs no less than {row.layout}, which needs {needs}"


def _what_fits(rows: Sequence[Row]) -> str:
    fitting = [str(row) for row in rows if row.fits]
    return f"What fits there: {'; '.join(fitting)}" if fitting else "The table has no layout of it that fits there"
