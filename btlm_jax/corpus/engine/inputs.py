"""Find a stage's input files (raw files, or the output of another stage) and divide them into tasks."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from btlm_jax import notices
from btlm_jax.corpus.engine.stage import FORMAT, MANIFEST_FILE, PLAN_FILE, STAGE_FILES, fingerprint_of
from btlm_jax.corpus.engine.tasks import Input, Task, is_output
from btlm_jax.corpus.readers.raw import SUFFIXES, are_plain_lines, has_suffix, is_metadata, is_raw
from btlm_jax.corpus.readers.tables import TFDS_SHARD
from btlm_jax.storage.files import hash_file, parse_json_object, read_json_object
from btlm_jax.storage.location import PathOrUrl, list_files, open_binary, with_sizes

TASK_BYTES = 64_000_000  # small input files share a task up to this size
PIECE_BYTES = 128_000_000  # larger files of plain lines are read in pieces
_CHUNK = 1 << 16
_KINDS_SAID = 8
# In the workdir of a training run, whose code is above this folder's: what could be taken for text, and what tells it.
_RUN_FILES = ("checkpoints", "corpus", "store", "tokenizer", "evaluation", "metrics.jsonl", "bad_numbers", "replaced")
_MARKS_OF_A_RUN = frozenset(("own_text.json", "checkpoints"))


def raw_inputs(root: PathOrUrl) -> list[Input]:
    """Return the raw text files below a folder, or a single file, in the order of their names; large ones in pieces.

    Hidden files and folders, those of a stage's work and of a training run, and links to what is read already are left
    out; a notice says so.

    Raises:
      FileNotFoundError: there is no raw file, or shards of a dataset are missing.
    """
    files = list_files(root, left_out=_left_out)
    if len(files) > 1 or files and files[0][1] != root:
        stale = _stale_tables(files)
        others = [name for name, _, _ in files if name in stale or not is_raw(name) and not is_metadata(name)]
        files = [file for file in files if is_raw(file[0]) and file[0] not in stale]
        _check_shards([name for name, _, _ in files])
        files = _without_links(files)
        if others and files:
            notices.report(
                "file-not-read",
                f"{root}: {len(others):,} files of other kinds are not read, {others[0]} for one{_kinds(others)}",
                count=len(others),
            )
    if not files:
        raise FileNotFoundError(f"{root} holds no file that ends in {', '.join(SUFFIXES)}")
    inputs = [
        Input(name=name.lstrip("/"), location=at, num_bytes=num_bytes, sha256="")  # of gs://bucket/folder//file: file
        for name, at, num_bytes in with_sizes(files)
    ]
    return [piece for item in inputs for piece in (_pieces(item) if _is_divisible(item) else [item])]


def _kinds(names: Sequence[str]) -> str:
    """Return how many files end in what, the commonest first; "" if all end alike."""
    counts = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in sorted(names))
    said = ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(_KINDS_SAID))
    return f" ({said}{', ...' if len(counts) > _KINDS_SAID else ''})" if len(counts) > 1 else ""


def raw_inputs_of(roots: Sequence[PathOrUrl]) -> list[Input]:
    """Return the raw text files of several folders and files, those of a folder under its name; each is read once.

    Of folders or files of one name the names begin with as many of the folders above as tell them apart.

    Raises:
      FileNotFoundError: a root has no raw file.
    """
    if len(roots) == 1:
        return raw_inputs(roots[0])
    found: dict[object, Input] = {}
    names: Counter = Counter()
    for root, root_name in zip(roots, _short_names(roots), strict=True):
        inputs = raw_inputs(root)
        is_folder = any(item.location != root for item in inputs)
        prefix = f"{root_name}/" if is_folder else root_name[: root_name.rfind("/") + 1]
        for item in inputs:
            key = (item.location.resolve() if isinstance(item.location, Path) else item.location, item.begin)
            if key in found:
                notices.report("file-read-once", f"{item.location} is given more than once and read once")
                continue
            name = prefix + item.name
            names[name] += 1
            if names[name] > 1:  # of a folder and of what lies in another one
                name = f"{names[name]}/{name}"
            found[key] = dataclasses.replace(item, name=name)
    return list(found.values())


def _short_names(roots: Sequence[PathOrUrl]) -> list[str]:
    """Return the end of each path or URL: as few of its parts as differ from those of the others."""
    paths = [PurePosixPath(os.path.abspath(root) if isinstance(root, Path) else root).parts for root in roots]
    sizes = dict.fromkeys(paths, 1)
    while True:
        counts = Counter(path[-size:] for path, size in sizes.items())
        longer = {path: min(size + (counts[path[-size:]] > 1), len(path)) for path, size in sizes.items()}
        if longer == sizes:
            return ["/".join(path[-sizes[path] :]).replace("//", "/") for path in paths]
        sizes = longer


def _left_out(name: str, beside: Collection[str]) -> str:
    """Return why a file or folder is not read, "" if it is."""
    if name.startswith("."):
        return "it is hidden"
    if name in STAGE_FILES and PLAN_FILE in beside:
        return "it is of a stage's work"
    is_of_run = name in _RUN_FILES and "starts" in beside and not _MARKS_OF_A_RUN.isdisjoint(beside)
    return "it is of a training run" if is_of_run else ""


def _stale_tables(files: list[tuple[str, PathOrUrl, int | None]]) -> set[str]:
    """Return the .arrow files in the folder of a Hugging Face dataset that are not part of it: old ones, and caches.

    Raises:
      FileNotFoundError: a part of the dataset is missing.
    """
    tables = {name for name, _, _ in files if has_suffix(name, ".arrow")}
    stale = {name for name in tables if PurePosixPath(name).name.startswith("cache-")}
    for name, location, _ in files:
        folder = PurePosixPath(name).parent
        if PurePosixPath(name).name == "state.json" and any(PurePosixPath(table).parent == folder for table in tables):
            with open_binary(location) as file:
                state = parse_json_object(file.read(), name=location)
            listed = state.get("_data_files")
            if not isinstance(listed, list) or not all(
                isinstance(part, dict) and isinstance(part.get("filename"), str) for part in listed
            ):
                raise ValueError(
                    f"{location} does not say which .arrow files its dataset has; give the files themselves"
                )
            parts = {str(folder / part["filename"]) for part in listed}
            if missing := sorted(parts - tables):
                raise FileNotFoundError(f"{location} names {missing[0]}, which is not there; fetch the dataset again")
            stale |= {table for table in tables if PurePosixPath(table).parent == folder} - parts
    return stale


def _without_links(files: list[tuple[str, PathOrUrl, int | None]]) -> list[tuple[str, PathOrUrl, int | None]]:
    """Return the files without those that are links to another one of them."""
    links = {at for _, at, _ in files if isinstance(at, Path) and at.is_symlink()}
    if not links:
        return files
    targets = {at.resolve() for _, at, _ in files if isinstance(at, Path) and at not in links}
    kept = []
    for name, at, num_bytes in files:
        if at in links and isinstance(at, Path):
            target = at.resolve()
            if target in targets:
                notices.report("file-read-once", f"{at} links to {target}, which is read already")
                continue
            targets.add(target)
        kept.append((name, at, num_bytes))
    return kept


def _check_shards(names: list[str]) -> None:
    """Check that no shard of a TFDS dataset is missing.

    Raises:
      FileNotFoundError: one is.
    """
    shards = [match for match in map(TFDS_SHARD.fullmatch, names) if match]
    for (stem, count), num_found in Counter((match[1], match[2]) for match in shards).items():
        if num_found != int(count):
            raise FileNotFoundError(
                f"of {stem} only {num_found} of {int(count)} shards are there; fetch the dataset again"
            )


def _is_divisible(item: Input) -> bool:
    if item.num_bytes <= PIECE_BYTES or not has_suffix(item.name, ".jsonl"):
        return False
    with open_binary(item.location) as file:
        return are_plain_lines(file.read(64))


def _pieces(item: Input) -> list[Input]:
    """Divide a file at ends of lines. A piece is named by its offset, and its lines are counted from there."""
    begins = [0]
    with open_binary(item.location) as file:
        while begins[-1] + PIECE_BYTES < item.num_bytes:
            begins.append(_end_of_line(file, begins[-1] + PIECE_BYTES - 1))
    return [
        dataclasses.replace(
            item,
            name=f"{item.name}@{begin}" if begin else item.name,
            num_bytes=end - begin,
            begin=begin,
            is_piece=True,
        )
        for begin, end in itertools.pairwise([*begins, item.num_bytes])
        if begin < end
    ]


def _end_of_line(file: BinaryIO, offset: int) -> int:
    """Return the end, newline included, of the line that contains the byte at `offset`."""
    file.seek(offset)
    while chunk := file.read(_CHUNK):
        if (newline := chunk.find(b"\n")) >= 0:
            return offset + newline + 1
        offset += len(chunk)
    return offset


def read_stage(directory: Path) -> dict:
    """Return the manifest of a finished stage.

    Raises:
      FileNotFoundError: there is no finished stage in `directory`.
      ValueError: the manifest is damaged.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        is_started = (directory / PLAN_FILE).is_file()
        contents = "an unfinished stage; give its command again" if is_started else "no stage's work"
        raise FileNotFoundError(f"{directory} holds {contents}: it has no {MANIFEST_FILE}")
    try:
        manifest = read_json_object(path)
        if manifest.get("format") != FORMAT:
            raise ValueError(f"its format is {manifest.get('format')!r}")
        if fingerprint_of(manifest) != manifest.get("fingerprint"):
            raise ValueError("its contents do not give its fingerprint")
        match manifest:
            case {"stage": str(), "outputs": list(outputs), "totals": dict(totals)} if all(map(is_output, outputs)):
                _check_totals(totals)
                return manifest
        raise ValueError("it lacks its stage, outputs or totals")
    except ValueError as error:
        raise ValueError(f"{path} is not the manifest of a stage, or damaged: {error}") from error


def read_documents(directory: Path, *, of: Sequence[str], also: Sequence[str] = (), purpose: str) -> dict:
    """Return the manifest of a finished stage of documents, one of the verbs `of` or of `also`, to do `purpose` with.

    Raises:
      FileNotFoundError: there is no finished stage in `directory`.
      ValueError: it is another one, or its manifest is damaged.
    """
    manifest = read_stage(directory)
    if manifest["stage"] not in (*of, *also):
        raise ValueError(
            f"{directory} holds the stage {manifest['stage']}; {purpose} what btlm corpus {' or '.join(of)} wrote"
        )
    return manifest


def _check_totals(totals: dict) -> None:
    """Check the counts by source and by reason.

    Raises:
      ValueError: some are not counts.
    """
    if totals.get("read") and "written" not in totals:
        raise ValueError("totals.written are missing")
    for name in ("read", "written"):
        by_source = totals.get(name, {})
        if not isinstance(by_source, dict) or not all(
            isinstance(counts, dict) and all(type(counts.get(key)) is int for key in ("documents", "bytes"))
            for counts in by_source.values()
        ):
            raise ValueError(f"totals.{name} are not documents and bytes by source")
    for name in ("dropped", "bad"):
        reasons = totals.get(name, {})
        if not isinstance(reasons, dict) or not all(type(count) is int for count in reasons.values()):
            raise ValueError(f"totals.{name} are not counts by reason")


def stage_inputs(directory: Path, manifest: dict) -> list[Input]:
    """Return the files that a finished stage wrote."""
    return [
        Input(
            name=output["file"],
            location=directory / output["file"],
            num_bytes=output["num_bytes"],
            sha256=output["sha256"],
        )
        for output in manifest["outputs"]
    ]


def verify_stage(directory: Path) -> dict:
    """Compare the hash of every file that a finished stage wrote with its manifest; return the manifest.

    Raises:
      FileNotFoundError: it is not finished, or a file is missing.
      ValueError: files are damaged; names them all.
    """
    manifest = read_stage(directory)
    outputs = manifest["outputs"]
    damaged = [output["file"] for output in outputs if hash_file(directory / output["file"]) != output["sha256"]]
    if damaged:
        raise ValueError(
            f"{directory} is damaged: the contents of {', '.join(damaged)} do not hash to what {MANIFEST_FILE} records;"
            " delete them and their records under done/, and give the stage's command again"
        )
    return manifest


def make_tasks(inputs: Sequence[Input]) -> list[Task]:
    """Divide files into tasks in order: each task gets consecutive files up to TASK_BYTES, but at least one."""
    groups: list[list[Input]] = []
    size = 0
    for item in inputs:
        if not groups or size + item.num_bytes > TASK_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.num_bytes
    return [
        Task(index=index, inputs=tuple(group), weight=1 + sum(item.num_bytes for item in group))
        for index, group in enumerate(groups)
    ]
