"""Mutated inputs for every reader of files and texts, and what counts as a fault.

A target has a valid input, which is mutated by bytes or, where it is JSON, by values too; and a function that reads it.
A reader may accept what it is given, or end with an error that `cli.errors.is_named` knows; else it has a fault.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import gzip
import io
import json
import random
import shutil
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import numpy as np

from btlm_jax.cli import UsageError, errors

VALUES = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63), 10**25, 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    "x", "1", "../..", "/etc/passwd", "\ud800", "\u0000", "é∞", "float32", [], [1], [[]], ["x"], {}, {"x": 1}, [0] * 50,
]  # fmt: skip
MOST_SECONDS = 10.0  # of one input: a reader that takes longer has a loop that the input controls
TOKENS = [
    b"\xff" * 8, b"\0" * 8, b"\x7f" * 8, b"\0\0\0\x80\0\0\0\0", b"[" * 300, b"{}", b"null", b"1e999", b'"', b"\n",
    b"-1",
]  # fmt: skip
WHOLE = [
    b"[" * 100_000, b'{"a":' * 100_000, b"", b"\xef\xbb\xbf", b"null", b"[]", b"{}", b'"x"', b"0", b"NaN",
    b"\xff\xfe[\0]\0",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One reader."""

    name: str
    valid: bytes
    read: Callable[[bytes], object]
    is_json: bool
    head: int = 0  # bytes that are mutated; 0: all


@dataclasses.dataclass(kw_only=True)
class Result:
    """What came of many inputs."""

    accepted: int = 0
    named: int = 0
    seconds: float = 0.0
    faults: dict[str, tuple[bytes, BaseException]] = dataclasses.field(default_factory=dict)  # by kind: one input each
    num_faults: int = 0

    @property
    def tried(self) -> int:
        return self.accepted + self.named + self.num_faults


def run(target: Target, *, count: int, seed: int) -> Result:
    """Read `count` mutated inputs; the same ones for the same seed."""
    signal.signal(signal.SIGALRM, _on_alarm)
    rng, result, start = random.Random(f"{target.name} {seed}"), Result(), time.perf_counter()
    for data in (target.valid, *(mutated(target, rng) for _ in range(count))):
        try:
            signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.read(data)
            result.accepted += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            if is_expected(error):
                result.named += 1
            else:
                result.num_faults += 1
                result.faults.setdefault(where(error), (data, error))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    result.seconds = time.perf_counter() - start
    return result


class TooLongError(BaseException):
    """A reader took longer than MOST_SECONDS."""


def _on_alarm(signum, frame) -> None:
    raise TooLongError


def is_expected(error: BaseException) -> bool:
    """Return whether the user is told what is wrong: our code named it, or the operating system did."""
    of_system = isinstance(error, OSError) and error.errno in (
        errno.ENOENT,
        errno.ENAMETOOLONG,
        errno.EISDIR,
        errno.EACCES,
    )
    return isinstance(error, UsageError) or errors.is_named(error) or of_system


def where(error: BaseException) -> str:
    """Return the type of an error and the last line of ours that it came through."""
    at, place = error.__traceback__, ""
    while at is not None:
        file = at.tb_frame.f_code.co_filename
        if "/btlm_jax/" in file:
            place = f"{file.rpartition('/btlm_jax/')[2]}:{at.tb_lineno}"
        at = at.tb_next
    return f"{type(error).__name__} at {place}"


def mutated(target: Target, rng: random.Random) -> bytes:
    """Return one mutated input."""
    if target.is_json and rng.random() < 0.6:
        return _mutated_json(target.valid, rng)
    if rng.random() < 0.03:
        return rng.choice(WHOLE)
    head = target.head or len(target.valid)
    return _mutated_bytes(target.valid[:head], rng) + target.valid[head:]


def _mutated_bytes(valid: bytes, rng: random.Random) -> bytes:
    data = bytearray(valid)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                token = rng.choice(TOKENS)
                data[at : at + len(token)] = token
            case 2:
                data[at:at] = rng.choice(TOKENS)
            case 3:
                del data[at : at + rng.randrange(1, 40)]
            case 4:
                del data[at:]
            case _:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(data)


def _mutated_json(valid: bytes, rng: random.Random) -> bytes:
    """Change values of one line of JSON (a file of one value has one line), keep it JSON."""
    is_lines = b"\n{" in valid
    lines = valid.split(b"\n") if is_lines else [valid]
    number = rng.randrange(len(lines))
    if not lines[number].strip():
        number = 0
    value = [json.loads(lines[number])]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        container, key = rng.choice(list(_places(value)))
        match rng.randrange(4):
            case 0 if isinstance(container, dict):
                del container[key]
            case 1 if isinstance(container, dict):
                container[rng.choice(["x", "", "mesh", "future"])] = rng.choice(VALUES)
            case 2:
                _, other = rng.choice([(c, k) for c, k in _places(value)])
                found = [c[k] for c, k in _places(value) if k == other]
                container[key] = copy.deepcopy(rng.choice(found))
            case _:
                container[key] = copy.deepcopy(rng.choice(VALUES))
        if not value:
            value = [None]
    lines[number] = json.dumps(value[0]).encode()
    return b"\n".join(lines)


def _places(value: object) -> Iterator[tuple[list | dict, object]]:
    """Yield (container, key) of every value inside."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, (dict, list)) and item:
            yield from _places(item)


def targets(group: str, folder: Path, *, store: Path) -> list[Target]:
    """Return the targets of one of GROUPS; `folder` is for their files, `store` is a token store."""
    return GROUPS[group](folder, store)


def _texts(folder: Path, store: Path) -> list[Target]:
    """Command lines and config files."""
    from support.tiny import REPOSITORY, config_dict

    from btlm_jax.cli.train import train_flags
    from btlm_jax.generate import output, prompts
    from btlm_jax.recipe.config import train_config_from

    config_file = REPOSITORY / "configs" / "local_cpu.py"
    values = config_dict("local_cpu")

    def overrides(data: bytes) -> None:
        flags = train_flags()
        text = data.decode("utf-8", "replace").replace("\0", "")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if flags.parse([f"--config={config_file}", *text.split("\n")]):
                flags.config()

    def config(data: bytes) -> None:
        from btlm_jax.storage.files import parse_json

        train_config_from(parse_json(data, name="config.json")).to_json()

    def prompts_of(suffix: str) -> Callable[[bytes], object]:
        path = folder / f"prompts{suffix}"

        def read(data: bytes) -> None:
            path.write_bytes(data)
            for prompt in prompts.read_prompts(path):
                prompt.text.encode()
                json.dumps(prompt.extra, ensure_ascii=False, allow_nan=False).encode()

        return read

    def texts(data: bytes) -> None:
        (folder / "texts.jsonl.partial").write_bytes(data)
        output.check_output(folder / "texts.jsonl", prompts_file=None)
        output.TextsFile(folder / "texts.jsonl", settings={"seed": 1}, num_texts=3).close()

    lines = (
        b"--config.seed=3\n--config.curriculum.seq_len=(128,512)\n--config.optimizer.peak_learning_rate=1e-3\n--dry-run"
    )
    jsonl = '{"prompt": "a b", "id": 1}\n{"prompt": "\\u00e9\\ud83d\\ude00", "x": [1, {"y": null}]}\n{"prompt": ""}\n'
    return [
        Target(name="command line", valid=lines, read=overrides, is_json=False),
        Target(name="config", valid=json.dumps(values).encode(), read=config, is_json=True),
        Target(name="prompts.jsonl", valid=jsonl.encode(), read=prompts_of(".jsonl"), is_json=True),
        Target(name="unfinished texts", valid=_unfinished_texts(folder), read=texts, is_json=False),
        Target(name="prompts.txt", valid="Hello\nwörld ∞\n".encode(), read=prompts_of(".txt"), is_json=False),
    ]


def _unfinished_texts(folder: Path) -> bytes:
    from btlm_jax.generate.output import TextsFile

    texts = TextsFile(folder / "texts.jsonl", settings={"seed": 1}, num_texts=3)
    for number in (2, 0):
        texts.add(number, '{"prompt": "a", "text": "é"}')
    texts.close()
    return texts.partial.read_bytes()


def _of_runs(folder: Path, store: Path) -> list[Target]:
    """Token stores, checkpoints, metrics and summaries."""
    import hashlib

    from support.real_store import VOCAB_SIZE
    from support.tiny import tiny_config

    from btlm_jax.data.reader import open_store
    from btlm_jax.data.store import MANIFEST_FILE, TOKENIZER_INFO_FILE, read_manifest, read_tokenizer_info
    from btlm_jax.recipe.config import train_config_from
    from btlm_jax.tokenizers.tokenizer import load_tokenizer
    from btlm_jax.train import METRICS_FILE, SUMMARY_FILE, finish, metric_writer, setup
    from btlm_jax.train.checkpoint import Checkpointer

    config = tiny_config(model__vocab_size=VOCAB_SIZE)
    other = tiny_config(corpus__source="installed_python")
    copied = Path(shutil.copytree(store, folder / "store"))
    body = json.loads((store / MANIFEST_FILE).read_bytes())

    def manifest(data: bytes) -> None:
        (copied / MANIFEST_FILE).write_bytes(data)
        read_manifest(copied)

    def sealed(data: bytes) -> None:
        """Read a manifest whose fingerprint is right, whatever it says."""
        try:
            value = json.loads(data)
            hashed = {
                key: item for key, item in value.items() if key not in ("format", "format_version", "fingerprint")
            }
            value["fingerprint"] = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
            data = json.dumps(value).encode()
        except (ValueError, AttributeError, RecursionError):
            pass
        (copied / MANIFEST_FILE).write_bytes(data)
        opened = open_store(copied, expected_fingerprint="")
        train = opened.manifest.splits.get("train")
        names = train.sources if opened.manifest.features and train else ()
        weighted = tiny_config(
            model__vocab_size=VOCAB_SIZE,
            corpus__source="prepared",
            data__weights=",".join(f"{name}={number}" for number, name in enumerate(names)),
            data__max_epochs=99,
        )
        setup.check_curriculum(weighted if names else config, opened.manifest)
        setup._other_settings(other, opened.manifest)
        opened.split("train").read(0)

    metrics, summary = folder / METRICS_FILE, folder / SUMMARY_FILE
    rows = [
        {"kind": "train", "step": 1, "tokens": 384, "seq_len": 24, "learning_rate": 0.1, "loss": "nan", "seconds": 1.5},
        {
            "kind": "eval",
            "step": 1,
            "tokens": 384,
            "loss": 4.5,
            "sources": {"code": {"loss": 4.5, "bits_per_byte": 2.0}},
        },
        {"kind": "event", "step": 1, "message": "m"},
        {"kind": "goodput", "step": 1, "seconds": {"total": 3.0}},
    ]

    def read_metrics(data: bytes) -> None:
        metrics.write_bytes(data)
        found = metric_writer.read_metrics(metrics)
        [np.float64(row["loss"]) for row in found if row["kind"] in ("train", "eval")]

    def resume_metrics(data: bytes) -> None:
        metrics.write_bytes(data)
        metric_writer._remove_replayed(metrics, first_step=2, evaluates_before=True)
        metric_writer.read_metrics(metrics)

    def read_summary(data: bytes) -> None:
        summary.write_bytes(data)
        finish.finished_report(config, workdir=folder, step=config.curriculum.table.num_steps)

    def native_summary(data: bytes) -> None:
        from btlm_jax.hub import native

        summary.write_bytes(data)
        native._heldout_notes(folder, 10, key="heldout")

    def weights(data: bytes) -> None:
        text = data.decode(errors="surrogateescape")
        values = {**dataclasses.asdict(config), "data": {**dataclasses.asdict(config.data), "weights": text}}
        train_config_from({**values, "corpus": {**values["corpus"], "source": "prepared"}})

    def kept_tokenizer(data: bytes) -> None:
        (folder / TOKENIZER_INFO_FILE).write_bytes(data)
        load_tokenizer(folder, read_tokenizer_info(folder))

    kept = body["tokenizer"]
    shutil.copy(store / kept["file"], folder)
    summary_body = {
        "num_steps": 10,
        "num_tokens": 3840,
        "data": {"sources": {"code": {"tokens": 3840, "epochs": 0.5, "tokens_per_epoch": 7680}}},
        "heldout": {"loss": 4.5, "sources": {"code": {"loss": 4.5, "bits_per_byte": 2.0}}},
        "sample": {"prompt": "a", "continuation": "b"},
        "seconds": {"total": 3.0},
    }
    workdir = folder / "run"
    step = workdir / "checkpoints" / "3"
    for item in ("position", "config", "state"):
        (step / item).mkdir(parents=True)
    (step / "_CHECKPOINT_METADATA").write_text("{}")
    position = {"step": 3, "tokens_seen": 3 * 384, "store_fingerprint": "abc"}
    contents = {"position": json.dumps(position), "config": config.to_json()}
    for item, text in contents.items():
        (step / item / "metadata").write_text(text)
    checkpointer = Checkpointer(workdir, config=config.checkpoint)

    def checkpoint(item: str) -> Callable[[bytes], object]:
        def read(data: bytes) -> None:
            (step / item / "metadata").write_bytes(data)
            try:
                checkpointer.read_metadata(3)
            finally:
                (step / item / "metadata").write_text(contents[item])

        return read

    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    valid = json.dumps(body).encode()
    by_source = {**body, "format_version": 2, "features": ["sources"]}
    by_source["splits"] = {"train": body["splits"]["heldout"], "heldout": body["splits"]["heldout"]}
    return [
        Target(name="manifest", valid=valid, read=manifest, is_json=True),
        Target(name="manifest that hashes right", valid=valid, read=sealed, is_json=True),
        Target(name="manifest of format 2", valid=json.dumps(by_source).encode(), read=sealed, is_json=True),
        Target(name="weights", valid=b"web=3,books=1.5; web=1,books=0", read=weights, is_json=False),
        Target(name="metrics", valid=lines, read=read_metrics, is_json=True),
        Target(name="metrics at a resume", valid=lines, read=resume_metrics, is_json=True),
        Target(name="kept tokenizer", valid=json.dumps(kept).encode(), read=kept_tokenizer, is_json=True),
        Target(name="summary", valid=json.dumps(summary_body).encode(), read=read_summary, is_json=True),
        Target(name="summary of a model", valid=json.dumps(summary_body).encode(), read=native_summary, is_json=True),
        *(
            Target(name=f"checkpoint's {item}", valid=text.encode(), read=checkpoint(item), is_json=True)
            for item, text in contents.items()
        ),
    ]


def _of_models(folder: Path, store: Path) -> list[Target]:
    """Published models in all forms, our own, GGUF."""
    from safetensors.numpy import save
    from support.published_files import ORACLES, oracle_weights, write_shards

    from btlm_jax.hub import huggingface, native
    from btlm_jax.hub.huggingface import HuggingFaceTensors
    from btlm_jax.hub.published import read_published_config, tensor_shapes

    directory = folder / "hf"
    directory.mkdir()
    config_text = (ORACLES / "tiny" / "config.json").read_bytes()
    weights = oracle_weights()

    def config(data: bytes) -> None:
        (directory / "config.json").write_bytes(data)
        found = read_published_config(directory / "config.json")
        assert found.head_dim and np.isfinite(found.output_scale) and tensor_shapes(found)

    def tensors_in(name: str) -> Callable[[bytes], object]:
        place = folder / f"hf {name}"
        if "index" in name:
            write_shards(place, weights)
        else:
            place.mkdir()
            (place / "config.json").write_bytes(config_text)

        def read(data: bytes) -> None:
            (place / name).unlink(missing_ok=True)  # it may be mapped, and a mapped file must not be cut short
            (place / name).write_bytes(data)
            huggingface._state_dict.cache_clear()
            opened = HuggingFaceTensors(place, read_published_config(place / "config.json"))
            for tensor in opened.shapes:
                opened.read(tensor)

        return read

    index_reader = tensors_in("model.safetensors.index.json")
    index = (folder / "hf model.safetensors.index.json" / "model.safetensors.index.json").read_bytes()
    safetensors = save(weights)
    header = 8 + int.from_bytes(safetensors[:8], "little")
    model_folder = folder / "native"
    model_folder.mkdir()

    def model_json(data: bytes) -> None:
        (model_folder / native.MODEL_FILE).write_bytes(data)
        native.read_metadata(model_folder).network()

    found = [
        Target(name="config.json of Hugging Face", valid=config_text, read=config, is_json=True),
        Target(name="safetensors", valid=safetensors, read=tensors_in("model.safetensors"), is_json=False, head=header),
        Target(name="index of shards", valid=index, read=index_reader, is_json=True),
        Target(name="model.json", valid=_native_metadata(), read=model_json, is_json=True),
    ]
    try:
        found.append(
            Target(name="pickled .bin", valid=_pickled(weights), read=tensors_in("pytorch_model.bin"), is_json=False)
        )
    except ImportError:
        pass
    try:
        found += _of_gguf(folder)
    except ImportError:
        pass
    return found


def _native_metadata() -> bytes:
    from support.tiny import tiny_config

    from btlm_jax.hub import native

    config = tiny_config()
    tokenizer = {"kind": "sentencepiece", "file": "tokenizer.model", "sha256": "0" * 64, "vocab_size": 300, "eos_id": 1}
    metadata = {"model": dataclasses.asdict(config.model), "mup": dataclasses.asdict(config.mup)}
    more = {"format": native.FORMAT, "max_length": 48, "eos_id": 1, "tokenizer": tokenizer, "notes": {"steps": "3"}}
    return json.dumps(metadata | more).encode()


def _pickled(weights: dict[str, np.ndarray]) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(array.copy()) for name, array in weights.items()}, buffer)
    return buffer.getvalue()


def _of_gguf(folder: Path) -> list[Target]:
    import gguf

    from btlm_jax.hub.gguf import GGUFFile

    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "jais")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.add_tensor("output.weight", np.ones((4, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    valid = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        file = GGUFFile(path)
        for name in file.tensors:
            file.read(name)

    return [Target(name="GGUF", valid=valid, read=read, is_json=False)]


def _of_tokenizers(folder: Path, store: Path) -> list[Target]:
    """A tokenizer in each form that a directory may have."""
    from support.tiny_tokenizers import tiny_byte_level, trained, write_gpt2_files

    from btlm_jax.tokenizers.gpt2 import fastest_tokenizer
    from btlm_jax.tokenizers.prompt_bos import read_prompt_bos
    from btlm_jax.tokenizers.tokenizer import find_tokenizer

    gpt2 = folder / "gpt2"
    write_gpt2_files(gpt2)
    vocabulary, merges = (gpt2 / "vocab.json").read_bytes(), (gpt2 / "merges.txt").read_bytes()

    def reader(name: str, beside: dict[str, bytes]) -> Callable[[bytes], object]:
        place = folder / f"tokenizer {name}"
        place.mkdir()
        for file, contents in beside.items():
            (place / file).write_bytes(contents)

        def read(data: bytes) -> None:
            (place / name).write_bytes(data)
            tokenizer = fastest_tokenizer(find_tokenizer(place))
            read_prompt_bos(place, tokenizer)
            tokenizer.decode(tokenizer.encode_prompt("eta oin é\n  shrdlu<|endoftext|> 漢</s>"))

        return read

    whole = tiny_byte_level().to_str().encode()
    config = json.dumps({"eos_token": "<|endoftext|>", "add_bos_token": False, "x": {"content": "y"}}).encode()
    return [
        Target(name="tokenizer.model", valid=trained().contents, read=reader("tokenizer.model", {}), is_json=False),
        Target(name="tokenizer.json", valid=whole, read=reader("tokenizer.json", {}), is_json=True),
        Target(name="vocab.json", valid=vocabulary, read=reader("vocab.json", {"merges.txt": merges}), is_json=True),
        Target(name="merges.txt", valid=merges, read=reader("merges.txt", {"vocab.json": vocabulary}), is_json=False),
        Target(
            name="tokenizer_config.json", valid=config, read=reader("tokenizer_config.json", {"tokenizer.json": whole}),
            is_json=True,
        ),
    ]  # fmt: skip


def _of_corpora(folder: Path, store: Path) -> list[Target]:
    """Raw files of every kind, and manifests of stages."""
    import zstandard

    from btlm_jax.cli.corpus_stages import print_stage
    from btlm_jax.corpus.engine import inputs
    from btlm_jax.corpus.engine import stage as stage_module
    from btlm_jax.corpus.engine.stage import FORMAT, fingerprint_of
    from btlm_jax.corpus.engine.tasks import Task, finished_record, record_path
    from btlm_jax.corpus.readers.raw import read_raw

    rows = [
        {"text": "eta oin shrdlu " * 20, "meta": {"redpajama_set_name": "A"}, "id": 3},
        {"text": "é\n漢字", "source": "B", "n": [1.5, None, {"deep": [True]}]},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()

    def raw(name: str) -> Callable[[bytes], object]:
        path = folder / name

        def read(data: bytes) -> None:
            path.write_bytes(data)
            for found in read_raw(path, name=name, default_source="D"):
                if hasattr(found, "text"):
                    found.text.encode("utf-8", "surrogatepass")

        return read

    task = Task(index=0, inputs=(), weight=1)
    (folder / "stage" / "done").mkdir(parents=True)

    begun = stage_module.Stage(name="clean", settings={"recipe": 1}, tasks=[task], run=_no_task)
    state = b'{"_data_files": [{"filename": "a.arrow"}]}'

    def record(data: bytes) -> None:
        record_path(folder / "stage", task).write_bytes(data)
        finished_record(task, folder / "stage", outputs=folder)

    def plan(data: bytes) -> None:
        (folder / "stage" / "plan.json").write_bytes(data)
        stage_module._check_plan(begun, folder / "stage")

    def dataset(data: bytes) -> None:
        (folder / "set").mkdir(exist_ok=True)
        (folder / "set" / "a.arrow").touch()
        (folder / "set" / "state.json").write_bytes(data)
        sizes = [(path.name, path, 0) for path in (folder / "set").iterdir()]
        inputs._stale_tables(sizes)

    def stage(data: bytes) -> None:
        """Read a stage's manifest whose fingerprint is right, whatever it says."""
        try:
            value = json.loads(data)
            data = json.dumps(value | {"fingerprint": fingerprint_of(value)}).encode()
        except (ValueError, AttributeError, TypeError, RecursionError):
            pass
        (folder / "stage" / "manifest.json").write_bytes(data)
        with contextlib.redirect_stdout(io.StringIO()):
            print_stage(inputs.read_stage(folder / "stage"))
        inputs.stage_inputs(folder / "stage", inputs.read_stage(folder / "stage"))

    compressed = zstandard.ZstdCompressor().compress(lines)
    found = [
        *_of_examples(folder),
        Target(name="raw .jsonl", valid=lines, read=raw("a.jsonl"), is_json=True),
        Target(name="raw .jsonl.gz", valid=gzip.compress(lines, mtime=0), read=raw("a.jsonl.gz"), is_json=False),
        Target(name="raw .jsonl.zst", valid=compressed, read=raw("a.jsonl.zst"), is_json=False),
        Target(name="raw .txt", valid="é\n漢字\n".encode(), read=raw("a.txt"), is_json=False),
        Target(name="record of a task", valid=_task_record(), read=record, is_json=True),
        Target(name="plan of a stage", valid=json.dumps(begun.plan).encode(), read=plan, is_json=True),
        Target(name="state of a dataset", valid=state, read=dataset, is_json=True),
        Target(name="manifest of a stage", valid=_stage_manifest(FORMAT), read=stage, is_json=True),
    ]
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return found
    table = pyarrow.table({"text": [row["text"] for row in rows], "source": ["A", "B"]})
    parquet, arrow = io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table, parquet)
    with pyarrow.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    return [
        *found,
        Target(name="raw .parquet", valid=parquet.getvalue(), read=raw("a.parquet"), is_json=False),
        Target(name="raw .arrow", valid=arrow.getvalue(), read=raw("a.arrow"), is_json=False),
    ]


def _of_examples(folder: Path) -> list[Target]:
    """Examples to fine-tune on, and the template that renders them."""
    from support.tiny_tokenizers import tiny_byte_level

    from btlm_jax.corpus.example_encoding import make_encoder
    from btlm_jax.corpus.readers.examples import Conversation, parse_example
    from btlm_jax.corpus.readers.raw import Line, read_objects
    from btlm_jax.tokenizers.named_templates import NAMED_TEMPLATES
    from btlm_jax.tokenizers.template_files import find_template

    directory = folder / "tokenizer of examples"
    directory.mkdir()
    tiny_byte_level().save(str(directory / "tokenizer.json"))
    turns = [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "eta", "tool_calls": [{"a": 1}]}]
    rows = [{"prompt": "é", "completion": "漢"}, {"messages": turns, "tools": [{"x": None}], "source": "A"}]
    now = datetime(2026, 11, 30)
    encoder = make_encoder(directory, template=find_template("zephyr", directory=directory), now=now)

    def examples(data: bytes) -> None:
        path = folder / "examples.jsonl"
        path.write_bytes(data)
        for found in read_objects(path, name=path.name, is_piece=False, repairs=Counter()):
            if isinstance(found, Line):
                encoder.encode(parse_example(found.value))

    def template(data: bytes) -> None:
        path = folder / "own.jinja"
        path.write_bytes(data)
        own = make_encoder(directory, template=find_template(str(path), directory=directory), now=now)
        own.encode(Conversation(messages=tuple(turns), tools=None))

    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return [
        Target(name="examples .jsonl", valid=lines, read=examples, is_json=True),
        Target(name="chat template", valid=NAMED_TEMPLATES["zephyr"].encode(), read=template, is_json=False),
    ]


def _no_task(*_: object) -> dict:
    raise AssertionError


def _task_record() -> bytes:
    output = {"file": "a.jsonl", "sha256": "0" * 64, "num_bytes": 3}
    result = {"outputs": [output], "totals": {"read": {}}}
    return json.dumps({"result": result, "stamps": [], "sha256": [], "counted": {"documents": 1, "bytes": 3}}).encode()


def _stage_manifest(form: object) -> bytes:
    output = {"file": "a.jsonl.zst", "sha256": "0" * 64, "num_bytes": 3, "documents": 1}
    totals = {"read": {"A": {"documents": 1, "bytes": 3}}, "written": {}, "dropped": {}, "bad": {}}
    return json.dumps(
        {
            "format": form,
            "stage": "clean",
            "settings": {"recipe": 1},
            "fingerprint": "x",
            "outputs": [output],
            "totals": totals,
        }
    ).encode()


def summary_line(target: Target, result: Result) -> str:
    """Return one line on what came of a target."""
    rate = 60 * result.tried / max(result.seconds, 1e-9)
    return (
        f"{target.name:<32} {result.tried:>7,} tried, {result.accepted:>6,} accepted, {result.named:>7,} named, "
        f"{result.num_faults:>5,} faults, {rate:>9,.0f} a minute"
    )


GROUPS = {
    "texts": _texts,
    "runs": _of_runs,
    "models": _of_models,
    "tokenizers": _of_tokenizers,
    "corpora": _of_corpora,
}
