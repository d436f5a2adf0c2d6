"""Find a stage's input files: raw ones, or what another stage wrote; share them out to tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from btlm_jax.corpus.reading import SUFFIXES
from btlm_jax.corpus.stage import FORMAT, MANIFEST_FILE, PLAN_FILE, TASK_BYTES, Input, Task, fingerprint_of, hash_file


def raw_inputs(root: Path) -> list[Input]:
    """Return the raw text files under a folder, or the one file, in the order of their names.

    Raises:
      FileNotFoundError: there is nothing.
    """
    if root.is_file():
        return [Input(name=root.name, path=root, num_bytes=root.stat().st_size, sha256="")]
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and path.name.endswith(SUFFIXES) and not path.name.startswith(".")
    )
    if not names:
        raise FileNotFoundError(f"{root} holds no file that ends in {', '.join(SUFFIXES)}")
    return [Input(name=name, path=root / name, num_bytes=(root / name).stat().st_size, sha256="") for name in names]


def read_stage(directory: Path) -> dict:
    """Return the manifest of a finished stage.

    Raises:
      FileNotFoundError: there is no finished stage in `directory`.
      ValueError: the manifest is damaged.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        is_begun = (directory / PLAN_FILE).is_file()
        found = "an unfinished stage; give its command again" if is_begun else "no stage's work"
        raise FileNotFoundError(f"{directory} holds {found}: it has no {MANIFEST_FILE}")
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}")
        if fingerprint_of(manifest) != manifest["fingerprint"]:
            raise ValueError("its contents do not give its fingerprint")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the manifest of a stage, or damaged: {error}") from error
    return manifest


def stage_inputs(directory: Path, manifest: dict) -> list[Input]:
    """Return the files that a finished stage wrote."""
    return [
        Input(
            name=output["file"],
            path=directory / output["file"],
            num_bytes=output["num_bytes"],
            sha256=output["sha256"],
        )
        for output in manifest["outputs"]
    ]


def verify_stage(directory: Path) -> dict:
    """Hash every file that a finished stage wrote, compare with its manifest, and return that.

    Raises:
      FileNotFoundError: it is not finished, or a file is missing.
      ValueError: files are damaged; names them all.
    """
    manifest = read_stage(directory)
    inputs = stage_inputs(directory, manifest)
    damaged = [item.name for item in inputs if hash_file(item.path) != item.sha256]
    if damaged:
        raise ValueError(
            f"{directory} is damaged: the contents of {', '.join(damaged)} do not hash to what {MANIFEST_FILE} records;"
            " delete them and their records under done/, and give the stage's command again"
        )
    return manifest


def make_tasks(inputs: Sequence[Input]) -> list[Task]:
    """Share files out in order: each task takes files until it has TASK_BYTES."""
    groups: list[list[Input]] = []
    size = TASK_BYTES
    for item in inputs:
        if size + item.num_bytes > TASK_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.num_bytes
    return [
        Task(index=index, inputs=tuple(group), weight=1 + sum(item.num_bytes for item in group))
        for index, group in enumerate(groups)
    ]
