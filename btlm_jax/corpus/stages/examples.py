"""The stage `examples`: prompts and completions, or conversations -> a token store with a loss on completions only.

    work/tokenizer-HASH  a copy of the tokenizer and its settings, which the tasks read
    work/encoded         a task per group of files: ids of each example and which are trained, and a table of the
                         examples; a line that is no example goes to quarantine/
    work/windows         one task: exact duplicates dropped, examples held out by prompt, both packed into windows
    work/shards          a task per shard of the store

Examples are of one source each, `source` of the line, or else the folder inside the input, or else DEFAULT_SOURCE, and
are packed and held out by source, so that training can weight sources. Which are held out: those of the smallest
hashes of seed and prompt, the ids before the first trained one, so examples of one prompt are on one side; where
prompts are too few for that, those of the smallest hashes of all of an example.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from btlm_jax import notices
from btlm_jax.corpus.engine.inputs import make_tasks, raw_inputs_of
from btlm_jax.corpus.engine.stage import PLAN_FILE, QUARANTINE_FOLDER, Stage, accept_all, only_command, run_stage
from btlm_jax.corpus.engine.tasks import Heartbeat, Input, LocalTask, Task
from btlm_jax.corpus.engine.workers import Workers
from btlm_jax.corpus.example_encoding import EncodedExample, ExampleEncoder, make_encoder
from btlm_jax.corpus.example_packing import pack_windows
from btlm_jax.corpus.pack import cut_into_blocks, write_shard, write_tfds_metadata
from btlm_jax.corpus.readers.examples import parse_example, source_of
from btlm_jax.corpus.readers.raw import TEXT_SUFFIXES, BadFileError, Defect, has_suffix, read_objects
from btlm_jax.corpus.readers.records import load_array, save_array
from btlm_jax.corpus.stages.clean import Quarantine, check_not_inside, first_defect
from btlm_jax.corpus.stages.tokenize import PROBES, copy_tokenizer, describe_loss
from btlm_jax.data import store
from btlm_jax.data.store import TokenBlock
from btlm_jax.display.progress import Log
from btlm_jax.storage.files import hash_json, read_json_object, renamed_at_end, write_atomically
from btlm_jax.storage.location import PathOrUrl
from btlm_jax.tokenizers.chat_template import ASKS_TIME
from btlm_jax.tokenizers.special_tokens import NAMES
from btlm_jax.tokenizers.tokenizer import tokenizer_info

RECIPE = 1  # raise when the steps change
DEFAULT_SOURCE = "examples"
WORK_FOLDER = "work"  # in the store, of the steps before it
_OTHER_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")
_ENCODED = "encoded"  # the first of them
_DATE = "date"  # the setting that keeps it for a template that asks for it
TRUNCATE, DROP = "truncate", "drop"
TOO_LONG = (TRUNCATE, DROP)  # what to do with an example that is longer than a window
_TABLE = np.dtype(
    [
        ("start", "<i8"),  # of the example in the task's ids
        ("length", "<i8"),
        ("num_trained", "<i8"),
        ("num_bytes", "<i8"),  # of what is trained
        ("whole", "<u8"),  # hashes
        ("whole_2", "<u8"),
        ("prompt", "<u8"),
        ("source", "<i4"),  # index into the task's names
    ]
)
_CUT, _TOO_LONG, _UNENDED, _NAMED = "cut", "too long", "without end token", "naming special tokens"  # counts of a task


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExamplesConfig:
    """How to encode, hold out and pack."""

    inputs: tuple[PathOrUrl, ...]
    tokenizer: Path
    template: str  # source of a chat template; "" for none
    template_name: str  # what errors call it
    block_len: int
    window: int  # the shortest sequence length of training, a divisor of block_len
    too_long: str
    most_examples: int  # of a window; 0: any number
    heldout: float  # share of the examples
    seed: int  # of what is held out, and of the order of windows
    max_bad_rate: float  # share of bad lines that is accepted
    allow_lossy: bool  # take a tokenizer that does not give every text back

    def __post_init__(self):
        if not 0 < self.block_len < 2**31:
            raise ValueError(f"block_len={self.block_len} must be 1 or more, and below 2**31")
        if self.window < 2 or self.block_len % self.window:
            raise ValueError(f"window={self.window} must be 2 or more and divide block_len={self.block_len}")
        if self.too_long not in TOO_LONG:
            raise ValueError(f"too_long={self.too_long!r} is not known; it may be {' or '.join(TOO_LONG)}")
        if self.most_examples < 0:
            raise ValueError(f"most_examples={self.most_examples} must be 1 or more, or 0 for any number")
        if not 0 < self.heldout <= 0.5:
            raise ValueError(f"heldout={self.heldout} must be above 0 and at most 0.5")
        if not 0 <= self.max_bad_rate <= 1:
            raise ValueError(f"max_bad_rate={self.max_bad_rate} must be between 0 and 1")


def make_example_store(config: ExamplesConfig, *, output: Path, workers: Workers, log: Log) -> store.Manifest:
    """Make a token store of examples and return its manifest.

    Raises:
      FileNotFoundError: there are no files, or there is no tokenizer.
      ValueError: a file or the template is bad, too many lines are, nothing is left to train on or to hold out, the
        tokenizer does not give texts back, or `output` has other settings or inputs.
    """
    check_not_inside(output, config.inputs)
    with only_command(output, inputs=[]):
        return _make(config, output=output, workers=workers, log=log)


def _make(config: ExamplesConfig, *, output: Path, workers: Workers, log: Log) -> store.Manifest:
    now = begun_at(output)
    encoder = _encoder(config, now)  # refuses the tokenizer or the template before the work begins
    tokenizer = encoder.tokenizer
    info = tokenizer_info(tokenizer)
    dtype = store.token_dtype(info.vocab_size)
    settings = {"recipe": RECIPE, "tokenizer": info.sha256, "eos_id": info.eos_id, "template": config.template}
    begun, variables = _settings_begun_with(output), encoder.variables
    earlier = begun.get("variables", variables)
    known = {name: text for name, text in earlier.items() if tokenizer.token_id(text) is not None}
    if (output / store.MANIFEST_FILE).is_file() and known.items() <= variables.items():
        variables = earlier  # of an earlier version, which left names out, and took texts that are no tokens
    settings |= {"variables": variables}
    if ASKS_TIME in config.template and (_DATE in begun or not begun):  # earlier versions did not keep it
        settings[_DATE] = now.date().isoformat()
    settings |= {"bos_id": encoder.bos_id, "window": config.window, "too_long": config.too_long, "seed": config.seed}
    if loss := describe_loss(tokenizer, PROBES):
        if not config.allow_lossy:
            raise ValueError(f"the tokenizer in {config.tokenizer} {loss}; --allow_lossy takes it nevertheless")
        notices.report("tokenizer-lossy", f"the tokenizer in {config.tokenizer} {loss}")
        settings["lossy"] = loss
    work = {step: output / WORK_FOLDER / step for step in (_ENCODED, "windows", "shards")}
    copied = output / WORK_FOLDER / f"tokenizer-{hash_json(settings)[:12]}"
    kept = dict.fromkeys(NAMES) | variables | {store.PROMPT_BOS: encoder.bos_id}
    copy_tokenizer(tokenizer, copied, config=json.dumps(kept, indent=1))
    run = functools.partial(run_stage, workers=workers, log=log)
    encoding = Stage(
        name="examples encode",
        settings=settings,
        tasks=make_tasks(_inputs(config.inputs)),
        run=functools.partial(_encode_task, config=dataclasses.replace(config, tokenizer=copied), now=now, dtype=dtype),
    )
    check = functools.partial(_check_encoded, config=config, quarantine=work[_ENCODED] / QUARANTINE_FOLDER)
    encoded = run(encoding, work[_ENCODED], check=check)
    _report(encoded["totals"], config=config, quarantine=work[_ENCODED] / QUARANTINE_FOLDER)
    settings = settings | {"input": encoded["fingerprint"], "most_examples": config.most_examples}
    settings |= {"heldout": config.heldout, "block_len": config.block_len}
    packing = Stage(
        name="examples pack",
        settings=settings,
        tasks=[Task(index=0, inputs=(), weight=1)],
        run=functools.partial(
            _windows_task, config=config, encoded=work[_ENCODED], sources=[task["sources"] for task in _tasks(encoded)]
        ),
    )
    windows = run(packing, work["windows"], check=accept_all)
    streams = _streams(windows, block_len=config.block_len)
    shards = _shards(streams)
    writing = Stage(
        name="examples shards",
        settings=settings | {"windows": windows["fingerprint"]},
        tasks=[Task(index=index, inputs=(), weight=1) for index in range(len(shards))],
        run=functools.partial(
            _shard_task, shards=shards, streams=streams, work=work, target=output, config=config, eos_id=info.eos_id,
            dtype=dtype,
        ),
        output_folder="../..",
    )  # fmt: skip
    written = run(writing, work["shards"], check=accept_all)
    if (output / store.MANIFEST_FILE).is_file() and (output / info.file).is_file():
        return store.read_manifest(output)
    write_atomically(output / info.file, tokenizer.contents)
    splits = _store_splits(streams, shards, written)
    write_tfds_metadata(output, splits, block_len=config.block_len, dtype=dtype, has_marks=True)
    manifest = store.Manifest(
        block_len=config.block_len,
        dtype=dtype,
        tokenizer=info,
        splits=splits,
        features=(store.EXAMPLES, store.SOURCES),
        window=config.window,
        made_by={"stage": "examples", **settings, "counts": encoded["totals"]["examples"] | windows["totals"]},
    )
    store.write_manifest(output, manifest)
    return manifest


def _inputs(locations: Sequence[PathOrUrl]) -> list[Input]:
    """Return the files with lines of JSON; if there are some, others beside them are left out, which is said."""
    inputs = raw_inputs_of(locations)
    others = [item.name for item in inputs if has_suffix(item.name, _OTHER_SUFFIXES)]
    if not others or len(others) == len(inputs):
        return inputs
    notices.report(
        "file-not-read", f"{len(others):,} files are not lines of JSON, {others[0]} for one", count=len(others)
    )
    return [item for item in inputs if item.name not in others]


def begun_at(output: Path) -> datetime:
    """Return the day on which a store was begun, at midnight, which templates are told that ask for it; or today.

    Raises:
      ValueError: its plan is damaged.
    """
    day = _settings_begun_with(output).get(_DATE, datetime.now().date().isoformat())
    try:
        return datetime.fromisoformat(day)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_plan_path(output)} is damaged: {_DATE} is {day!r}; delete {output}") from error


def _settings_begun_with(output: Path) -> dict:
    """Return the settings with which a store was begun; none if it was not, or has no readable ones."""
    path = _plan_path(output)
    settings = read_json_object(path).get("settings") if path.is_file() else None
    return settings if isinstance(settings, dict) else {}


def _plan_path(output: Path) -> Path:
    return output / WORK_FOLDER / _ENCODED / PLAN_FILE


def _encoder(config: ExamplesConfig, now: datetime) -> ExampleEncoder:
    template = config.template, config.template_name
    return make_encoder(config.tokenizer, template=template, now=now, allow_lossy=config.allow_lossy)


def _tasks(encoded: dict) -> list[dict]:
    """Return the manifest entries of the tables, one a task, which name the task's sources."""
    return [output for output in encoded["outputs"] if "sources" in output]


def _encode_task(
    task: LocalTask,
    directory: Path,
    heartbeat: Heartbeat,
    *,
    config: ExamplesConfig,
    now: datetime,
    dtype: str,
) -> dict:
    encoder = _encoder(config, now)
    counts, repairs, sources = Counter(), Counter(), {}
    ids, marks, table = bytearray(), bytearray(), bytearray()  # of NumPy arrays, which so take no more memory
    start = 0
    with Quarantine(directory, task=task) as quarantine:
        for item in task.inputs:
            folder, slash, _ = item.name.partition("/")
            default = folder if slash else DEFAULT_SOURCE
            try:
                for found in read_objects(item.path, name=item.name, is_piece=item.is_piece, repairs=repairs):
                    if isinstance(found, Defect):
                        quarantine.add(found)
                        continue
                    try:
                        example = parse_example(found.value)
                        encoded = encoder.encode(example)
                    except ValueError as error:
                        quarantine.add(found.defect(str(error)))
                        continue
                    counts["read"] += 1
                    counts[_NAMED] += encoder.names_special_token(example)
                    counts[_UNENDED] += not encoder.is_ended(encoded)
                    if len(encoded.ids) > config.window:
                        encoded = encoded.cut(config.window)
                        if config.too_long == DROP or not encoded.is_trained.any():
                            counts[_TOO_LONG] += 1
                            continue
                        counts[_CUT] += 1
                    source = sources.setdefault(source_of(found.value, default=default), len(sources))
                    num_bytes = encoder.num_trained_bytes(encoded)
                    heartbeat(1, num_bytes)
                    row = _row(encoded, start=start, num_bytes=num_bytes, source=source, seed=config.seed)
                    table += np.array(row, _TABLE).tobytes()
                    ids += encoded.ids.astype(dtype).tobytes()
                    marks += _marks(encoded).tobytes()
                    start += len(encoded.ids)
            except BadFileError as error:
                raise ValueError(f"{item.name} cannot be used: {error}") from error
    outputs = [
        save_array(directory, f"{name}-{task.index:05d}", np.frombuffer(data, kind))
        for name, data, kind in (("ids", ids, dtype), ("marks", marks, np.uint8), ("table", table, _TABLE))
    ]
    outputs[-1]["sources"] = list(sources)
    first = quarantine.first
    example = f"{first.file}, line {first.line}: {first.reason}" if first else ""
    return {
        "totals": {"examples": dict(counts) | {"bad": quarantine.num_defects}, "changed values": dict(repairs)},
        "outputs": outputs,
        "example": example,
    }


def _marks(encoded: EncodedExample) -> np.ndarray:
    marks = encoded.is_trained.astype(np.uint8) * store.TRAINED
    marks[0] |= store.BEGINS
    return marks


def _row(encoded: EncodedExample, *, start: int, num_bytes: int, source: int, seed: int) -> tuple:
    """Return the row of an example in _TABLE."""
    data = encoded.ids.astype("<i8").tobytes() + encoded.is_trained.tobytes()
    whole = _hash("whole", seed, data)
    return (
        start, len(encoded.ids), int(encoded.is_trained.sum()), num_bytes, whole,
        _hash("whole 2", seed, data), _hash("prompt", seed, encoded.prompt.astype("<i8").tobytes()), source,
    )  # fmt: skip


def _hash(purpose: str, seed: int, data: bytes) -> int:
    """Return 64 bits of a hash that differs by purpose and seed."""
    digest = hashlib.blake2b(data, digest_size=8, key=f"{purpose} {seed}".encode())
    return int.from_bytes(digest.digest(), "big")


def _check_encoded(results: list[dict], *, config: ExamplesConfig, quarantine: Path) -> None:
    """Refuse input of which too many lines are bad, or of which no example can be trained."""
    totals = Counter()
    for result in results:
        totals.update(result["totals"]["examples"])
    lines, bad = totals["read"] + totals["bad"], totals["bad"]
    if bad > config.max_bad_rate * lines:
        example = next(text for result in results if (text := result["example"]))
        example = example.removesuffix(".")
        if not totals["read"]:
            raise ValueError(f"{example}. None of {lines:,} lines is an example; {quarantine} says of each why")
        raise ValueError(
            f"{example}. {bad:,} of {lines:,} lines are bad, more than max_bad_rate={config.max_bad_rate}; "
            f"{quarantine} says which and why. Mend or remove them; btlm corpus examples --max_bad_rate=RATE leaves "
            "them out"
        )
    if not lines:
        raise ValueError("there is no line in the files given")
    if not totals["read"]:
        raise ValueError(f"no line of {lines:,} is an example; {quarantine} says why")
    if totals[_TOO_LONG] == totals["read"]:
        raise ValueError(
            f"all {lines:,} examples are longer than the window of {config.window:,} tokens"
            + ("" if config.too_long == DROP else ", and their completions lie beyond it")
            + "; a longer --window of btlm corpus examples holds them, for a model that is trained at such lengths"
        )


def _report(totals: dict, *, config: ExamplesConfig, quarantine: Path) -> None:
    """Say what is not as it was in the files."""
    counts = Counter(totals["examples"])
    of, window = f"of {counts['read'] + counts['bad']:,}", f"the window of {config.window:,} tokens"
    if count := counts["bad"]:
        message = f"{count:,} {of} lines are bad and left out, {first_defect(quarantine)}"
        notices.report("line-quarantined", message, count=count)
    if count := counts[_CUT]:
        message = f"{count:,} {of} examples are longer than {window}, and are cut at its end"
        notices.report("example-cut", message, count=count)
    if count := counts[_TOO_LONG]:
        why = "" if config.too_long == DROP else ", have no completion inside,"
        message = f"{count:,} {of} examples are longer than {window}{why} and are left out"
        notices.report("example-too-long", message, count=count)
    if count := counts[_UNENDED]:
        message = f"{count:,} {of} examples have completions that end with no special token"
        notices.report("no-end-token", f"{message}: a model does not learn from them where to stop", count=count)
    if count := counts[_NAMED]:
        message = f"{count:,} {of} examples have a special token's name in a text, which stands for the token"
        notices.report("special-token-named", message, count=count)
    for change, count in sorted(totals["changed values"].items()):
        notices.report("value-changed", f"{change}: {count:,}", count=count)


def _windows_task(
    task: LocalTask,
    directory: Path,
    heartbeat: Heartbeat,
    *,
    config: ExamplesConfig,
    encoded: Path,
    sources: Sequence[Sequence[str]],
) -> dict:
    names = sorted({name for of_task in sources for name in of_task})
    tables, tasks, sources_of = [], [], []
    for number, of_task in enumerate(sources):
        table = np.array(load_array(encoded, f"table-{number:05d}"))
        tables.append(table)
        tasks.append(np.full(len(table), number))
        sources_of.append(np.array([names.index(name) for name in of_task], np.int64)[table["source"]])
    table_N, task_N, source_N = (np.concatenate(parts) for parts in (tables, tasks, sources_of))
    is_first_N = first_of_equal(table_N["whole"], table_N["whole_2"])
    num_duplicates = int((~is_first_N).sum())
    table_N, task_N, source_N = table_N[is_first_N], task_N[is_first_N], source_N[is_first_N]
    is_heldout_N, by_prompt = hold_out(table_N["prompt"], table_N["whole"], share=config.heldout)
    outputs = []
    for split, is_in_N in ((store.TRAIN, ~is_heldout_N), (store.HELDOUT, is_heldout_N)):
        for number, name in enumerate(names):
            own_N = np.flatnonzero(is_in_N & (source_N == number))
            if not len(own_N):
                continue
            own_N = own_N[np.argsort(table_N["whole"][own_N], kind="stable")]
            rows = np.stack(
                [_windows_of(table_N[own_N], config=config), task_N[own_N],
                 table_N["start"][own_N], table_N["length"][own_N]], axis=1,
            )  # fmt: skip
            rows = rows[np.argsort(rows[:, 0], kind="stable")]
            heartbeat(len(rows), 0)
            outputs.append(
                {
                    **save_array(directory, f"{split}-{number:05d}", rows),
                    "split": split,
                    "source": name,
                    "num_windows": int(rows[-1, 0]) + 1,
                    "num_documents": len(rows),
                    "num_ids": int(rows[:, 3].sum()),
                    "most_documents": _most_documents(rows[:, 0], rows[:, 3], config=config),
                    "num_tokens": int(table_N["num_trained"][own_N].sum()),
                    "num_text_bytes": int(table_N["num_bytes"][own_N].sum()),
                }
            )
    totals = {"duplicates": num_duplicates, "held out": int(is_heldout_N.sum()), "held out by prompt": int(by_prompt)}
    totals |= {
        name: sum(output[key] for output in outputs)
        for name, key in (("windows", "num_windows"), ("ids", "num_ids"), ("trained", "num_tokens"))
    }
    totals[store.MOST_DOCUMENTS] = max(output["most_documents"] for output in outputs)
    return {"totals": totals, "outputs": outputs}


def first_of_equal(*keys_N: np.ndarray) -> np.ndarray:
    """Return which rows, bool [N], are the first with their values of all keys."""
    order_N = np.lexsort(keys_N)  # stable
    is_new_N = np.zeros(len(order_N), bool)
    is_new_N[:1] = True
    for key_N in keys_N:
        is_new_N[1:] |= key_N[order_N][1:] != key_N[order_N][:-1]
    is_first_N = np.empty_like(is_new_N)
    is_first_N[order_N] = is_new_N
    return is_first_N


def hold_out(prompt_N: np.ndarray, whole_N: np.ndarray, *, share: float) -> tuple[np.ndarray, bool]:
    """Return which examples are held out, bool [N], and whether examples of one prompt are always on one side.

    They are hashes of prompts and of whole examples. As many of the smallest are held out as reach `share` of the
    examples, if that leaves half of them.

    Raises:
      ValueError: there are too few examples.
    """
    target = max(1, round(share * len(whole_N)))
    for hash_N in (prompt_N, whole_N):
        values, counts = np.unique(hash_N, return_counts=True)
        taken = counts.cumsum()
        last = int(np.searchsorted(taken, target))
        if 2 * taken[last] <= len(hash_N):
            return hash_N <= values[last], hash_N is prompt_N
    raise ValueError(f"{len(whole_N)} different examples are too few: one is to be held out, and one to be trained on")


def _most_documents(window_N: np.ndarray, length_N: np.ndarray, *, config: ExamplesConfig) -> int:
    """Return how many documents the block with the most of them has, paddings counted."""
    counts = np.bincount(window_N) + (np.bincount(window_N, weights=length_N) < config.window)
    return int(np.add.reduceat(counts, np.arange(0, len(counts), config.block_len // config.window)).max())


def _windows_of(table_N: np.ndarray, *, config: ExamplesConfig) -> np.ndarray:
    """Return the number of the window of each example, windows in the order of a hash of their first example."""
    most = config.most_examples or config.window
    window_N = pack_windows(table_N["length"], window=config.window, most=most)
    first_N = np.unique(window_N, return_index=True)[1]
    keys = [_hash("order", config.seed, int(whole).to_bytes(8, "big")) for whole in table_N["whole"][first_N]]
    place_of_window = np.empty(len(first_N), np.int64)
    place_of_window[np.argsort(np.array(keys, np.uint64), kind="stable")] = np.arange(len(first_N))
    return place_of_window[window_N]


def _streams(windows: dict, *, block_len: int) -> list[dict]:
    """Return the manifest entries of the streams with `first_block` and `num_blocks`, by split in order."""
    window = windows["settings"]["window"]
    streams, ends = [], Counter()
    for output in windows["outputs"]:
        num_blocks = -(-output["num_windows"] * window // block_len)
        stream = output | {"first_block": ends[output["split"]], "num_blocks": num_blocks}
        ends[output["split"]] += num_blocks
        streams.append(stream)
    return streams


def _shards(streams: Sequence[dict]) -> list[tuple[str, int, int]]:
    """Return (split, index, number of shards) of every shard of the store."""
    shards = []
    for name in (store.TRAIN, store.HELDOUT):
        num_blocks = sum(stream["num_blocks"] for stream in streams if stream["split"] == name)
        count = -(-num_blocks // store.BLOCKS_PER_SHARD)
        shards += [(name, index, count) for index in range(count)]
    return shards


def _store_splits(
    streams: Sequence[dict], shards: Sequence[tuple[str, int, int]], written: dict
) -> dict[str, store.Split]:
    """Return the splits for the store's manifest."""
    splits = {}
    for name in (store.TRAIN, store.HELDOUT):
        own = [stream for stream in streams if stream["split"] == name]
        entries = [entry for (split, _, _), entry in zip(shards, written["outputs"], strict=True) if split == name]
        splits[name] = store.Split(
            num_blocks=sum(stream["num_blocks"] for stream in own),
            num_tokens=sum(stream["num_tokens"] for stream in own),
            shards=tuple(store.Shard(**entry) for entry in entries),
            sources={
                stream["source"]: store.Source(
                    num_documents=stream["num_documents"],
                    num_bytes=stream["num_text_bytes"],
                    num_tokens=stream["num_tokens"],
                    first_block=stream["first_block"],
                    num_blocks=stream["num_blocks"],
                )
                for stream in own
            },
        )
    return splits


def _shard_task(
    task: LocalTask,
    directory: Path,
    heartbeat: Heartbeat,
    *,
    shards: Sequence[tuple[str, int, int]],
    streams: Sequence[dict],
    work: dict[str, Path],
    target: Path,
    config: ExamplesConfig,
    eos_id: int,
    dtype: str,
) -> dict:
    name, index, count = shards[task.index]

    def blocks() -> Iterator[TokenBlock]:
        begin, end = index * store.BLOCKS_PER_SHARD, (index + 1) * store.BLOCKS_PER_SHARD
        for stream in (stream for stream in streams if stream["split"] == name):
            first = max(begin - stream["first_block"], 0)
            last = min(end - stream["first_block"], stream["num_blocks"])
            if first < last:
                yield from _blocks_of(stream, first, last, work=work, config=config, eos_id=eos_id, dtype=dtype)

    path = target / store.shard_name(split=name, index=index, num_shards=count)
    with renamed_at_end(path) as temporary:
        shard = write_shard(temporary, blocks=blocks())
    heartbeat(0, shard.num_bytes)
    return {"totals": {}, "outputs": [dataclasses.asdict(dataclasses.replace(shard, file=path.name))]}


def _blocks_of(
    stream: dict, first: int, last: int, *, work: dict[str, Path], config: ExamplesConfig, eos_id: int, dtype: str
) -> Iterator[TokenBlock]:
    """Yield the blocks of a stream from `first` to before `last`."""
    window, per_block = config.window, config.block_len // config.window
    begin, end = first * per_block, min(last * per_block, stream["num_windows"])
    rows = load_array(work["windows"], Path(stream["file"]).stem)
    rows = rows[np.searchsorted(rows[:, 0], begin) : np.searchsorted(rows[:, 0], end, side="right")]
    # The windows, and one token more: the first of the next window, or padding.
    ids = np.full((end - begin) * window + 1, eos_id, dtype)
    marks = np.full(len(ids), store.PADDING, np.uint8)
    ends = {number: 0 for number in range(begin, end + 1)}
    places: dict[int, list[tuple[int, int, int]]] = {}  # of each task's examples: place here, begin and length there
    for number, task, start, length in rows.tolist():
        place = (number - begin) * window + ends[number]
        places.setdefault(task, []).append((place, start, min(length, len(ids) - place)))
        ends[number] += length
        if number == end:  # of which the first token is the stream's next
            break
    for task, own in places.items():  # one task's files open at a time
        own_ids, own_marks = (load_array(work[_ENCODED], f"{name}-{task:05d}") for name in ("ids", "marks"))
        for place, start, length in own:
            ids[place : place + length] = own_ids[start : start + length]
            marks[place : place + length] = own_marks[start : start + length]
    for number, length in ends.items():
        place = (number - begin) * window + length
        if length < window and place < len(ids):
            marks[place] |= store.BEGINS
    tokens = cut_into_blocks(ids, block_len=config.block_len, eos_id=eos_id)
    marked = cut_into_blocks(marks, block_len=config.block_len, eos_id=store.PADDING)
    for block, mark in zip(tokens, marked, strict=True):
        yield block._replace(marks=mark.tokens)


def describe(manifest: store.Manifest) -> str:
    """Return in a line what became of the examples of which a store was made."""
    counts = Counter(manifest.made_by["counts"])
    window_tokens = counts["windows"] * manifest.window
    return (
        f"{counts['read']:,} read, {counts['duplicates']:,} exact duplicates dropped; {counts['held out']:,} held out "
        f"by {'prompt' if counts['held out by prompt'] else 'example'}; {counts['windows']:,} windows of "
        f"{manifest.window:,} tokens: {counts['trained'] / window_tokens:.1%} trained (completions), "
        f"{1 - counts['ids'] / window_tokens:.1%} padding"
    )
