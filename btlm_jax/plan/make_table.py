"""Make the table of layouts compiled for the slices of configs/pods/: table.json, and table.md to read.

Beside get_config(), a config file there has TOPOLOGY, its slice, and OTHERS, further layouts for the table: each a dict
of the differences to the config's mesh and model.remat, and to its slice as `topology`. A file others.json in the
folder has more of them by the name of the config, for config files that a command writes. A file whose get_config takes
an argument has TOPOLOGIES instead of both: the slice of each argument that the table has.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Callable, Collection
from pathlib import Path

from btlm_jax.plan.calibration import calibration_hash
from btlm_jax.plan.chips import topology_named
from btlm_jax.plan.compiling import CompileCache, compiler_versions
from btlm_jax.plan.estimate import ASSUMPTIONS, PhasePlan
from btlm_jax.plan.layout import MeshLayout, layout_of
from btlm_jax.plan.plan_report import collectives_by_kind, time_to_json
from btlm_jax.plan.pod_table import read_versions, training_fields
from btlm_jax.plan.slice_plan import DoesNotFit, SlicePlan, plan_fitting_phases
from btlm_jax.plan.table_text import format_table_markdown
from btlm_jax.recipe.config import TrainConfig, train_config_from
from btlm_jax.storage.files import read_json_object, write_atomically
from btlm_jax.train.flops import FLOPS_CONVENTION

OTHERS_FILE = "others.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PodConfig:
    """A config of the folder: of a file, or of a file and an argument."""

    name: str  # of the file, and ":" and the argument
    topology: str
    config: TrainConfig
    others: tuple[tuple[str, MeshLayout], ...]  # slice, layout

    @property
    def file(self) -> str:
        """The name of its file."""
        return self.name.partition(":")[0]

    @property
    def layouts(self) -> tuple[tuple[str, MeshLayout], ...]:
        """The config's own slice and layout, and the others."""
        return ((self.topology, layout_of(self.config)), *self.others)


def read_pod_configs(path: Path) -> list[PodConfig]:
    """Load a config file of the folder: one config, or one for each of its TOPOLOGIES.

    Raises:
      ValueError: it lacks TOPOLOGY or OTHERS, it or others.json names no known slice, or a config refuses its values.
    """
    module = runpy.run_path(str(path))
    if topologies := module.get("TOPOLOGIES"):
        return [
            PodConfig(
                name=f"{path.stem}:{argument}",
                topology=topology_named(topology),
                config=train_config_from(module["get_config"](argument).to_dict()),
                others=(),
            )
            for argument, topology in topologies.items()
        ]
    if missing := {"TOPOLOGY", "OTHERS", "get_config"} - module.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; see another file of its folder")
    config = train_config_from(module["get_config"]().to_dict())
    own = layout_of(config)
    others = []
    for change in (*module["OTHERS"], *_more_others(path)):
        mesh = {name: value for name, value in change.items() if name not in ("remat", "topology")}
        if unknown := mesh.keys() - dataclasses.asdict(own.mesh).keys():
            raise ValueError(
                f"{path}: OTHERS has {change}; keys are those of mesh, remat and topology, and not "
                f"{', '.join(sorted(unknown))}"
            )
        layout = MeshLayout(mesh=dataclasses.replace(own.mesh, **mesh), remat=change.get("remat", own.remat))
        others.append((topology_named(change.get("topology", module["TOPOLOGY"])), layout))
    return [PodConfig(name=path.stem, topology=topology_named(module["TOPOLOGY"]), config=config, others=tuple(others))]


def _more_others(path: Path) -> list[dict]:
    """Return the further layouts that others.json beside a config file has for it.

    Raises:
      ValueError: it is damaged.
    """
    file = path.with_name(OTHERS_FILE)
    found = read_json_object(file).get(path.stem, []) if file.is_file() else []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ValueError(f"{file}: {path.stem} has {found!r}, and not a list of objects as OTHERS of the config files")
    return found


def make_table(
    path: Path, *, cache: CompileCache, report_progress: Callable[[str], None], only: Collection[str] = ()
) -> list[str]:
    """Compile every layout of the folder of `path`, write the table there, and return its problems.

    With `only`, names of configs or of files, rows of others stay as they are.

    Raises:
      ValueError: the folder has no config, none of a name in `only`, or one that does not load; the table has no rows
        to keep, or rows of another compiler.
      NoCompilationsLeftError: `cache` may compile no more; finished results stay in it.
    """
    files = sorted(path.parent.glob("*.py"))
    if not files:
        raise ValueError(f"{path.parent} has no config files to make a table of; see configs/pods/")
    pods = [pod for file in files if _has_slice(file, report_progress) for pod in read_pod_configs(file)]
    chosen = [pod for pod in pods if not only or {pod.name, pod.file} & set(only)]
    if unknown := set(only) - {name for pod in chosen for name in (pod.name, pod.file)}:
        raise ValueError(f"{path.parent} has no config of the name {', '.join(sorted(unknown))}")
    kept = _rows_by_config(path) if only else {}
    if only and (before := read_versions(path)) != (now := compiler_versions()):
        said = [", ".join(f"{name} {version}" for name, version in each.items()) for each in (before, now)]
        raise ValueError(
            f"{path} was made with {said[0]}, and here are {said[1]}: rows of one table are by one compiler; make it "
            "whole, without --only"
        )
    layouts = [(pod, topology, layout) for pod in chosen for topology, layout in pod.layouts]
    made, problems = {}, []
    for number, (pod, topology, layout) in enumerate(layouts, start=1):
        outlook = cache.outlook(layouts=len(layouts) - number + 1, phases=len(pod.config.curriculum.table.phases))
        report_progress(f"{number} of {len(layouts)}: {pod.name} on {topology}, {layout}; {outlook}")
        config, is_config = layout.applied_to(pod.config), (topology, layout) == pod.layouts[0]
        plan = plan_fitting_phases(config, topology=topology, cache=cache, report_progress=report_progress)
        if plan.obstacles or (not plan.works and is_config):
            problems += [f"{pod.name}, {layout}: {problem}" for problem in plan.problems]
        if not plan.obstacles:
            made.setdefault(pod.name, []).append(table_row(plan, config, name=pod.name, is_config=is_config))
    rows = [row for pod in pods for row in made.get(pod.name, kept.get(pod.name, []))]
    table = {
        "made_by": f"btlm plan --table=configs/{path.resolve().parent.name}/{path.name}",
        "versions": compiler_versions(),
        "flops_convention": FLOPS_CONVENTION,
        "assumptions": list(ASSUMPTIONS),
        "rows": rows,
    }
    write_atomically(path, json.dumps(table, indent=1) + "\n")
    write_atomically(path.with_suffix(".md"), format_table_markdown(table))
    return problems


def _rows_by_config(path: Path) -> dict[str, list[dict]]:
    """Return a table's rows by the name of their config.

    Raises:
      ValueError: it is damaged.
      OSError: there is none.
    """
    rows = read_json_object(path).get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        raise ValueError(f"{path} has no rows to keep; make it whole: btlm plan --table={path}, without --only")
    found = {}
    for row in rows:
        found.setdefault(row["name"], []).append(row)
    return found


def _has_slice(file: Path, report_progress: Callable[[str], None]) -> bool:
    """Return whether a config file is for slices; one that has none of TOPOLOGY, OTHERS and TOPOLOGIES is not."""
    has = not {"TOPOLOGY", "OTHERS", "TOPOLOGIES"}.isdisjoint(runpy.run_path(str(file)))
    if not has:
        report_progress(f"{file} has no TOPOLOGY: it is not for a slice, and not in the table")
    return has


def table_row(plan: SlicePlan, config: TrainConfig, *, name: str, is_config: bool) -> dict:
    """Return the table's row of one layout; bytes of one chip, seconds of one step."""
    return {
        "name": name,
        "is_config": is_config,  # the file's own layout, not one of its OTHERS
        "topology": plan.topology,
        "chip": plan.chip.name,
        "num_chips": plan.num_chips,
        "layout": {"mesh": dataclasses.asdict(plan.layout.mesh), "remat": plan.layout.remat},
        "trains": training_fields(config),
        "fits": plan.works,
        "needed_bytes": plan.needed,
        "available_bytes": plan.chip.hbm_bytes,
        "days": [seconds / 86_400 for seconds in plan.seconds] if plan.works else None,
        "days_central": plan.central_seconds / 86_400 if plan.works else None,
        "calibration": calibration_hash(),
        "phases": [_phase(each) for each in (*plan.phases, *plan.misfits)],
    }


def _phase(each: PhasePlan | DoesNotFit) -> dict:
    phase = {"batch_size": each.phase.batch_size, "seq_len": each.phase.seq_len, "program": each.program}
    if isinstance(each, DoesNotFit):
        return {**phase, "fits": False, "needed_bytes": each.needed}
    return {
        **phase,
        "fits": True,
        "needed_bytes": each.memory.needed,
        "memory": dataclasses.asdict(each.memory),
        "collectives": [
            {"kind": kind, "is_asynchronous": asynchronous, "count": count, "bytes": num_bytes, "seconds": seconds}
            for (kind, asynchronous), (count, num_bytes, seconds) in collectives_by_kind(each).items()
        ],
        "executed_flops": each.executed_flops,
        **time_to_json(each),
    }
