"""The stages of `btlm corpus`: clean, dedup, split, tokenizer, tokenize."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from btlm_jax.cli.corpus_workers import HELP as WORKERS_HELP
from btlm_jax.cli.corpus_workers import check_worker_flags, chosen_workers, define_worker_flags
from btlm_jax.cli.parse import DONE, UsageError, parse_flags
from btlm_jax.data.store import Manifest
from btlm_jax.storage.location import parse_location

CLEAN_HELP = """btlm corpus clean: read raw text, repair its Unicode as SlimPajama did, drop short documents.

example:  btlm corpus clean --input=RAW --output=corpus/clean --workers=8

RAW is a file or a folder of .jsonl, .jsonl.zst, .jsonl.gz, .parquet, .txt, .md or .rst files, a Hugging Face
dataset on disk, a local TFDS dataset in ArrayRecord, or a URL such as gs://bucket/folder or s3://bucket/folder. A line
of JSON is {"text": ..., "meta": {"redpajama_set_name": ...}}, or has "source" and "id". A bad line costs that line: it
goes to quarantine/ with its file, line, offset and the reason. Exit code 1 if more lines are bad than --max_bad_rate
allows.
"""

DEDUP_HELP = """btlm corpus dedup: find near-duplicates over the whole corpus and keep one document of each cluster.

example:  btlm corpus dedup --input=corpus/clean --output=corpus/dedup --preset=strict --workers=8

Both presets are MinHash of character 13-grams. slimpajama is as published: 9 bands of 13 of 128 permutations, nothing
verified; it finds 0.4 of the pairs at a Jaccard similarity of 0.8. strict finds 0.96: 32 bands of 8 of 256 bins,
verified by the share of equal bins (0.75). Of a cluster the longest document stays; among equally long ones a hash of
the text, then of the id, decides.
"""

SPLIT_HELP = """btlm corpus split: part documents into train, validation and test; shuffle them.

example:  btlm corpus split --input=corpus/dedup --output=corpus/split --evaluation=EVAL --weight=RedPajamaWikipedia=2

A hash of the normalised text and the seed decides, so equal texts are never on both sides. Training documents that are
near-duplicates of held-out ones (the strict rule of dedup) are dropped, and all documents that have a run of 13 words
with the --evaluation texts. A weight takes a source's training documents so many times; fractions by hash.
"""

TOKENIZER_HELP = """btlm corpus tokenizer: train a tokenizer that gives every text back.

examples:  btlm corpus tokenizer --input=corpus/split --output=corpus/tokenizer --vocab_size=32000
           btlm corpus tokenizer --input=corpus/split --output=corpus/tokenizer --kind=byte_level_bpe --vocab_size=50257

sentencepiece: byte pairs with byte fallback and no normalisation. byte_level_bpe: as GPT-2's, its pattern of words and
its end-of-text token, which becomes the last id; it encodes several times faster, through tiktoken. Both learn from the
first 16 MB of the shuffled training documents, and the same documents give the same bytes.
"""

TOKENIZE_HELP = """btlm corpus tokenize: encode the documents of btlm corpus split and pack them into a token store.

example:  btlm corpus tokenize --input=corpus/split --output=store --tokenizer=GPT2 --workers=8

The tokenizer is a folder with GPT-2's vocab.json and merges.txt, with a tokenizer.json of byte-level BPE, or with a
SentencePiece tokenizer.model. Training takes the store with --config.data.store=store --config.corpus.source=prepared;
copied to a bucket, as --config.data.store=gs://bucket/store: it is read there, block by block, and not fetched first.
"""


def clean(arguments: Sequence[str]) -> int:
    """Run `btlm corpus clean`; return the exit code."""
    values = _flags_with_workers()
    flags.DEFINE_string("source", "unnamed", "source of documents that do not say theirs", flag_values=values)
    flags.DEFINE_string(
        "on_bad_file", "fail", "of one cut short or damaged: fail, or keep-prefix, its beginning", flag_values=values
    )
    flags.DEFINE_float("max_bad_rate", 0.001, "share of bad lines that is accepted", flag_values=values)
    if not _parse_stage(values, arguments, help_text=CLEAN_HELP):
        return DONE
    cleaning = importlib.import_module("btlm_jax.corpus.stages.clean")
    try:
        config = cleaning.CleanConfig(
            input=parse_location(values["input"].value),
            default_source=values["source"].value,
            on_bad_file=values["on_bad_file"].value,
            max_bad_rate=values["max_bad_rate"].value,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    with _common(values) as common:
        print_stage(cleaning.clean(config, **common))
    return DONE


def dedup(arguments: Sequence[str]) -> int:
    """Run `btlm corpus dedup`; return the exit code."""
    values = _flags_with_workers()
    flags.DEFINE_string("preset", "strict", "strict, or slimpajama as published", flag_values=values)
    if not _parse_stage(values, arguments, help_text=DEDUP_HELP):
        return DONE
    presets = importlib.import_module("btlm_jax.corpus.near_duplicates.lsh").PRESETS
    if values["preset"].value not in presets:
        raise UsageError(f"--preset={values['preset'].value} is not known; it may be {' or '.join(presets)}")
    deduplicate = importlib.import_module("btlm_jax.corpus.stages.dedup").deduplicate
    source = Path(values["input"].value)
    with _common(values) as common:
        print_stage(deduplicate(source, preset=values["preset"].value, **common))
    return DONE


def split(arguments: Sequence[str]) -> int:
    """Run `btlm corpus split`; return the exit code."""
    values = _flags_with_workers()
    flags.DEFINE_float("validation", 0.0017, "share of the documents", flag_values=values)
    flags.DEFINE_float("test", 0.0017, "share of the documents", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the hashes that decide", flag_values=values)
    flags.DEFINE_multi_string("weight", [], "SOURCE=TIMES; may be given several times", flag_values=values)
    flags.DEFINE_multi_string("evaluation", [], "raw file or folder not to train on; several times", flag_values=values)
    if not _parse_stage(values, arguments, help_text=SPLIT_HELP):
        return DONE
    splitting = importlib.import_module("btlm_jax.corpus.stages.split")
    try:
        config = splitting.SplitConfig(
            input=Path(values["input"].value),
            validation=values["validation"].value,
            test=values["test"].value,
            seed=values["seed"].value,
            weights=dict(_weight(given) for given in values["weight"].value),
            evaluation=tuple(map(parse_location, values["evaluation"].value)),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    with _common(values) as common:
        print_stage(splitting.split(config, **common))
    return DONE


def tokenizer(arguments: Sequence[str]) -> int:
    """Run `btlm corpus tokenizer`; return the exit code."""
    values = _stage_flags()
    flags.DEFINE_string("kind", "sentencepiece", "sentencepiece, or byte_level_bpe as GPT-2's", flag_values=values)
    flags.DEFINE_integer("vocab_size", 32000, "tokens, the 256 bytes included", flag_values=values)
    if not _parse_stage(values, arguments, help_text=TOKENIZER_HELP):
        return DONE
    vocabulary = importlib.import_module("btlm_jax.corpus.stages.train_tokenizer")
    if values["kind"].value not in vocabulary.KINDS:
        raise UsageError(f"--kind={values['kind'].value} is not known; it may be {' or '.join(vocabulary.KINDS)}")
    manifest = vocabulary.train_tokenizer_stage(
        Path(values["input"].value),
        kind=values["kind"].value,
        vocab_size=values["vocab_size"].value,
        output=Path(values["output"].value),
        log=log,
    )
    print(f"fingerprint {manifest['fingerprint']}")
    return DONE


def tokenize(arguments: Sequence[str]) -> int:
    """Run `btlm corpus tokenize`; return the exit code."""
    values = _flags_with_workers()
    flags.DEFINE_string("tokenizer", "", "directory of a tokenizer", flag_values=values)
    flags.DEFINE_integer("block_len", 8192, "tokens of a block: the longest phase of training", flag_values=values)
    if not _parse_stage(values, arguments, help_text=TOKENIZE_HELP):
        return DONE
    if not values["tokenizer"].value:
        raise UsageError(
            "--tokenizer=DIR is needed: a folder with vocab.json and merges.txt, tokenizer.json or tokenizer.model"
        )
    if values["block_len"].value < 1:
        raise UsageError(f"--block_len={values['block_len'].value} must be 1 or more")
    tokenize = importlib.import_module("btlm_jax.corpus.stages.tokenize").tokenize
    with _common(values) as common:
        manifest = tokenize(
            Path(values["input"].value),
            tokenizer=Path(values["tokenizer"].value),
            block_len=values["block_len"].value,
            **common,
        )
        print_store(manifest)
    return DONE


def _weight(given: str) -> tuple[str, float]:
    source, _, times = given.rpartition("=")
    try:
        return source, float(times)
    except ValueError as error:
        raise UsageError(f"--weight={given} is not SOURCE=TIMES, for example --weight=RedPajamaWikipedia=2") from error


def _stage_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("input", "", "where to read from", flag_values=values)
    flags.DEFINE_string("output", "", "directory of this stage's work", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    return values


def _flags_with_workers() -> flags.FlagValues:
    values = _stage_flags()
    define_worker_flags(values)
    return values


def _parse_stage(values: flags.FlagValues, arguments: Sequence[str], *, help_text: str) -> bool:
    """Parse the flags of a stage; return False when help was asked for and printed."""
    has_workers = "workers" in values
    if not parse_flags(values, arguments, help_text=f"{help_text}\n{WORKERS_HELP}" if has_workers else help_text):
        return False
    for name in ("input", "output"):
        if not values[name].value:
            raise UsageError(f"--{name}=DIR is needed: {values[name].help}")
    if has_workers:
        check_worker_flags(values)
    return True


@contextlib.contextmanager
def _common(values: flags.FlagValues) -> Iterator[dict]:
    with chosen_workers(values, log=log) as workers:
        yield {"output": Path(values["output"].value), "workers": workers, "log": log}


def log(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def print_stage(manifest: dict) -> None:
    """Print what a stage read, wrote and dropped."""
    totals = manifest["totals"]
    for source in sorted(totals["read"]):
        came, went = totals["read"][source], totals["written"].get(source, {"documents": 0, "bytes": 0})
        share = 100 * went["bytes"] / max(came["bytes"], 1)
        print(
            f"  {source}: {came['documents']:,} documents, {came['bytes']:,} bytes -> {went['documents']:,} documents, "
            f"{went['bytes']:,} bytes ({share:.1f} %)"
        )
    for reason, count in sorted((totals["dropped"] | totals["bad"]).items()):
        print(f"  {reason}: {count:,}")
    print(f"fingerprint {manifest['fingerprint']}")


def print_store(manifest: Manifest) -> None:
    """Print what a token store holds."""
    for name, split in manifest.splits.items():
        print(f"{name}: {split.num_blocks:,} blocks, {split.num_tokens:,} tokens, {len(split.shards)} shards")
        for source, part in split.sources.items():
            print(f"  {source}: {part.num_documents:,} documents, {part.num_bytes:,} bytes, {part.num_tokens:,} tokens")
    print(f"fingerprint {manifest.fingerprint}")
