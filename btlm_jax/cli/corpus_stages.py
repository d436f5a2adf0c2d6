"""The stages of `btlm corpus`: clean, dedup, split, tokenizer, tokenize, examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from btlm_jax.cli import DONE, UsageError
from btlm_jax.cli.corpus_workers import HELP as WORKERS_HELP
from btlm_jax.cli.corpus_workers import check_worker_flags, chosen_workers, define_worker_flags
from btlm_jax.cli.parse import Flags

if TYPE_CHECKING:
    from btlm_jax.data.store import Manifest

CLEAN_HELP = """btlm corpus clean: read raw text, repair its Unicode as SlimPajama did, drop short documents.

example:  btlm corpus clean --input=RAW --output=corpus/clean --workers=8

RAW is a file or a folder of .jsonl, .jsonl.zst, .jsonl.gz, .parquet, .txt, .md or .rst files, a Hugging Face
dataset on disk, a local TFDS dataset in ArrayRecord, or a URL such as gs://bucket/folder or s3://bucket/folder. A line
of JSON is {"text": ..., "meta": {"redpajama_set_name": ...}}, or has "source" and "id"; --text_key and the others name
other keys. Of Parquet and Arrow tables no other columns are read. Links are followed; hidden files and folders are left
out. A bad line costs that line: it
goes to quarantine/ with its file, line, offset and the reason. Exit code 1 if more lines are bad than --max_bad_rate
allows.
"""

DEDUP_HELP = """btlm corpus dedup: find near-duplicates over the whole corpus and keep one document of each cluster.

example:  btlm corpus dedup --input=corpus/clean --output=corpus/dedup --preset=strict --workers=8

Both presets are MinHash of character 13-grams. slimpajama is as published: 9 bands of 13 of 128 permutations, nothing
verified; it finds 0.4 of the pairs at a Jaccard similarity of 0.8. strict finds 0.96: 32 bands of 8 of 256 bins,
verified by the share of equal bins (0.75). Of a cluster the longest document stays; among equally long ones a hash of
the text, then of the id, decides. strict then compares every other document of the cluster with it, for a cluster is a
chain of pairs; of those that are not near it again one stays. slimpajama keeps one of each cluster.
"""

SPLIT_HELP = """btlm corpus split: part documents into train, validation and test; shuffle them.

example:  btlm corpus split --input=corpus/dedup --output=corpus/split --evaluation=EVAL --weight=RedPajamaWikipedia=2

A hash of the normalised text and the seed decides, so equal texts are never on both sides. Training documents that are
near-duplicates of held-out ones (the strict rule of dedup) are dropped, and all documents that have --evaluation text:
13 words in a row, or where words are written without spaces 26 Chinese or Japanese characters, 52 of Thai and others;
a text that is shorter, from 6 words on, whole. Evaluation texts are cleaned as the documents were.
--evaluation_rule=13-words finds runs of 13 words between spaces alone, as published. A weight takes a source's training
documents so many times; fractions by hash.
"""

TOKENIZER_HELP = """btlm corpus tokenizer: train a tokenizer that gives every text back.

examples:  btlm corpus tokenizer --input=corpus/split --output=corpus/tokenizer --vocab_size=32000
           btlm corpus tokenizer --input=corpus/split --output=corpus/tokenizer --kind=byte_level_bpe --vocab_size=50257

sentencepiece: byte pairs with byte fallback and no normalisation. byte_level_bpe: as GPT-2's, its pattern of words and
its end-of-text token, which becomes the last id; it encodes several times faster, through tiktoken. Both learn from
16 MB of training documents, shares of up to 64 files at even distances; the same documents give the same bytes.
"""

TOKENIZE_HELP = """btlm corpus tokenize: encode the documents of btlm corpus split and pack them into a token store.

example:  btlm corpus tokenize --input=corpus/split --output=store --tokenizer=GPT2 --workers=8

The tokenizer is a folder with GPT-2's vocab.json and merges.txt, with a tokenizer.json of byte-level BPE, or with a
SentencePiece tokenizer.model. It must give every text back, which is measured on documents of the corpus before the
work begins; --allow_lossy takes it nevertheless.

Training blocks are cut from one stream in which documents of all sources mix, as BTLM's were. --by_source makes a
stream for each source instead, so that training can weight them: --config.data.weights="web=3,books=1".

Training takes the store with --config.data.store=store --config.corpus.source=prepared; copied to a bucket, as
--config.data.store=gs://bucket/store: it is read there, block by block, and not fetched first.
"""


EXAMPLES_HELP = """btlm corpus examples: prompts and completions, or conversations, to fine-tune on -> a token store.

examples:  btlm corpus examples --input=pairs.jsonl --output=store --tokenizer=GPT2
           btlm corpus examples --input=CHATS --output=store --tokenizer=MODEL --template=chatml --block_len=2048

Lines of JSON, in .jsonl, .jsonl.zst or .jsonl.gz: {"prompt": ..., "completion": ...}, or {"messages": [{"role": ...,
"content": ...}, ...]} with the roles system, developer, user, assistant, tool; "source" may name where a line is from.
The loss is on completions alone, the assistant's messages, and on the token that ends each.

A pair is the prompt, the completion and the end of text. Messages become a text by the chat template of the tokenizer's
directory, or by --template, a file or a name, as transformers renders and encodes it; the assistant's part are the
template's {% generation %} blocks, or the difference of prefixes where it has none. Nothing is cleaned; exact
duplicates are dropped. Examples stay whole inside --window, the shortest sequence length of training, and do not see
each other: the longest first, each where it fits best; what is left is padding. Of one that is longer the end is cut
off. A hash of the prompt decides what is held out, so that one prompt is on one side.

A bad line costs that line: it goes to quarantine/ with its file, line and the reason. Training needs
--config.data.document_mask=true. btlm train --data=FILE does all this by itself.
"""


def clean_flags() -> Flags:
    """Define the flags of `btlm corpus clean`."""
    flags = _flags_with_workers(CLEAN_HELP)
    flags.define_string("source", "unnamed", "source of documents that do not say theirs")
    flags.define_boolean(
        "folders_are_sources", False, "instead of --source the folder inside the input, where there is one"
    )
    flags.define_string(
        "on_bad_file",
        "fail",
        "of one cut short or damaged; keep-prefix takes its beginning",
        choices=("fail", "keep-prefix"),
    )
    flags.define_float("max_bad_rate", 0.001, "share of bad lines that is accepted")
    flags.define_string("text_key", "text", "key or column of the text; a.b is b inside a")
    flags.define_string("id_key", "id", "key or column of the document's name")
    flags.define_string("source_key", "", "of the source; by default source, else meta.redpajama_set_name")
    return flags


def clean(arguments: Sequence[str]) -> int:
    """Run `btlm corpus clean`; return the exit code."""
    flags = clean_flags()
    if not _parse_stage(flags, arguments):
        return DONE
    from btlm_jax.corpus.readers.raw import Keys
    from btlm_jax.corpus.stages import clean as stage

    try:
        config = stage.CleanConfig(
            inputs=(flags.location("input"),),
            default_source=flags.text("source"),
            on_bad_file=flags.string("on_bad_file"),
            max_bad_rate=flags.number("max_bad_rate"),
            keys=Keys(text=flags.text("text_key"), id=flags.text("id_key"), source=flags.text("source_key")),
            folders_are_sources=flags.boolean("folders_are_sources"),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    with chosen_workers(flags, log=log) as workers:
        print_stage(stage.clean(config, output=flags.path("output"), workers=workers, log=log))
    return DONE


def dedup_flags() -> Flags:
    """Define the flags of `btlm corpus dedup`."""
    flags = _flags_with_workers(DEDUP_HELP)
    flags.define_string("preset", "strict", "slimpajama is as published", choices=("strict", "slimpajama"))
    return flags


def dedup(arguments: Sequence[str]) -> int:
    """Run `btlm corpus dedup`; return the exit code."""
    flags = dedup_flags()
    if not _parse_stage(flags, arguments):
        return DONE
    from btlm_jax.corpus.stages.dedup import deduplicate

    preset = flags.string("preset")
    source, output = flags.path("input"), flags.path("output")
    with chosen_workers(flags, log=log) as workers:
        print_stage(deduplicate(source, preset=preset, output=output, workers=workers, log=log))
    return DONE


def split_flags() -> Flags:
    """Define the flags of `btlm corpus split`."""
    flags = _flags_with_workers(SPLIT_HELP)
    flags.define_float("validation", 0.0017, "share of the documents")
    flags.define_float("test", 0.0017, "share of the documents")
    flags.define_integer("seed", 0, "of the hashes that decide")
    flags.define_strings("weight", "SOURCE=TIMES")
    flags.define_strings("evaluation", "raw file or folder not to train on")
    flags.define_string("evaluation_key", "text", "key or column of the text in these files; a.b is b inside a")
    flags.define_string(
        "evaluation_rule",
        "by-script",
        "how evaluation text is found; 13-words as published",
        choices=("by-script", "13-words"),
    )
    return flags


def split(arguments: Sequence[str]) -> int:
    """Run `btlm corpus split`; return the exit code."""
    flags = split_flags()
    if not _parse_stage(flags, arguments):
        return DONE
    if "" in flags.strings("evaluation"):  # not the current directory
        raise UsageError("--evaluation= is empty; give a file or folder, or leave the flag out")
    from btlm_jax.corpus.stages import split as stage
    from btlm_jax.storage.location import parse_location

    try:
        config = stage.SplitConfig(
            input=flags.path("input"),
            validation=flags.number("validation"),
            test=flags.number("test"),
            seed=flags.integer("seed"),
            weights=_weights(flags.strings("weight")),
            evaluation=tuple(map(parse_location, flags.strings("evaluation"))),
            evaluation_key=flags.text("evaluation_key"),
            evaluation_rule=flags.string("evaluation_rule"),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    with chosen_workers(flags, log=log) as workers:
        print_stage(stage.split(config, output=flags.path("output"), workers=workers, log=log))
    return DONE


def tokenizer_flags() -> Flags:
    """Define the flags of `btlm corpus tokenizer`."""
    flags = _stage_flags(TOKENIZER_HELP)
    flags.define_string(
        "kind", "sentencepiece", "byte_level_bpe is as GPT-2's", choices=("sentencepiece", "byte_level_bpe")
    )
    flags.define_integer("vocab_size", 32000, "tokens, the 256 bytes included")
    return flags


def tokenizer(arguments: Sequence[str]) -> int:
    """Run `btlm corpus tokenizer`; return the exit code."""
    flags = tokenizer_flags()
    if not _parse_stage(flags, arguments):
        return DONE
    from btlm_jax.corpus.stages import train_tokenizer as stage

    manifest = stage.train_tokenizer_stage(
        flags.path("input"),
        kind=flags.string("kind"),
        vocab_size=flags.integer("vocab_size"),
        output=flags.path("output"),
        log=log,
    )
    print(f"fingerprint {manifest['fingerprint']}")
    return DONE


def tokenize_flags() -> Flags:
    """Define the flags of `btlm corpus tokenize`."""
    flags = _flags_with_workers(TOKENIZE_HELP)
    flags.define_string("tokenizer", "", "directory of a tokenizer")
    flags.define_integer("block_len", 8192, "tokens of a block: the longest phase of training")
    flags.define_boolean("by_source", False, "a stream of training blocks for each source, for data.weights")
    flags.define_boolean("allow_lossy", False, "take a tokenizer that does not give every text back")
    return flags


def tokenize(arguments: Sequence[str]) -> int:
    """Run `btlm corpus tokenize`; return the exit code."""
    flags = tokenize_flags()
    if not _parse_stage(flags, arguments):
        return DONE
    if not flags.string("tokenizer"):
        raise UsageError(
            "--tokenizer=DIR is needed: a folder with vocab.json and merges.txt, tokenizer.json or tokenizer.model"
        )
    block_len = flags.integer("block_len")
    if not 0 < block_len < 2**31:
        raise UsageError(f"--block_len={block_len} must be 1 or more, and below 2**31")
    from btlm_jax.corpus.stages import tokenize as stage

    with chosen_workers(flags, log=log) as workers:
        config = stage.TokenizeConfig(
            input=flags.path("input"),
            tokenizer=flags.path("tokenizer"),
            block_len=block_len,
            by_source=flags.boolean("by_source"),
            allow_lossy=flags.boolean("allow_lossy"),
        )
        print_store(stage.tokenize(config, output=flags.path("output"), workers=workers, log=log))
    return DONE


def examples_flags() -> Flags:
    """Define the flags of `btlm corpus examples`."""
    flags = _flags_with_workers(EXAMPLES_HELP)
    flags.define_string("tokenizer", "", "directory of a tokenizer: of the model to be trained")
    flags.define_string("template", "", "chat template: a file, or chatml, llama2, llama3, mistral, zephyr, gemma")
    flags.define_integer("block_len", 2048, "tokens of a block: the longest phase of training")
    flags.define_integer("window", 0, "tokens in which examples are whole: the shortest phase; 0: --block_len")
    flags.define_string(
        "too_long", "truncate", "of an example longer than the window: its beginning, or nothing",
        choices=("truncate", "drop"),
    )  # fmt: skip
    flags.define_integer("most_examples", 0, "of a window; 0: any number. Attention on GPUs keeps 128 documents apart")
    flags.define_float("heldout", 0.05, "share of the examples")
    flags.define_integer("seed", 0, "of the hashes that decide what is held out")
    flags.define_float("max_bad_rate", 0.001, "share of bad lines that is accepted")
    flags.define_boolean("allow_lossy", False, "take a tokenizer that does not give every text back")
    return flags


def examples(arguments: Sequence[str]) -> int:
    """Run `btlm corpus examples`; return the exit code."""
    flags = examples_flags()
    if not _parse_stage(flags, arguments):
        return DONE
    if not flags.string("tokenizer"):
        raise UsageError("--tokenizer=DIR is needed: the directory of the tokenizer of the model to be trained")
    from btlm_jax.corpus.stages import examples as stage
    from btlm_jax.tokenizers.template_files import find_template

    tokenizer = flags.path("tokenizer")
    template, name = find_template(flags.string("template"), directory=tokenizer)
    try:
        config = stage.ExamplesConfig(
            inputs=(flags.location("input"),),
            tokenizer=tokenizer,
            template=template,
            template_name=name,
            block_len=flags.integer("block_len"),
            window=flags.integer("window") or flags.integer("block_len"),
            too_long=flags.string("too_long"),
            most_examples=flags.integer("most_examples"),
            heldout=flags.number("heldout"),
            seed=flags.integer("seed"),
            max_bad_rate=flags.number("max_bad_rate"),
            allow_lossy=flags.boolean("allow_lossy"),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    with chosen_workers(flags, log=log) as workers:
        manifest = stage.make_example_store(config, output=flags.path("output"), workers=workers, log=log)
    print(f"examples: {stage.describe(manifest)}")
    print_store(manifest)
    return DONE


def _weights(given: Sequence[str]) -> dict[str, float]:
    weights = [_weight(text) for text in given]
    if twice := {source for source, _ in weights if sum(other == source for other, _ in weights) > 1}:
        raise UsageError(f"--weight is given more than once for {', '.join(sorted(twice))}; give it once a source")
    return dict(weights)


def _weight(given: str) -> tuple[str, float]:
    source, _, times = given.rpartition("=")
    try:
        return source, float(times)
    except ValueError as error:
        raise UsageError(f"--weight={given} is not SOURCE=TIMES, for example --weight=RedPajamaWikipedia=2") from error


def _stage_flags(help_text: str) -> Flags:
    flags = Flags(help_text)
    flags.define_string("input", "", "where to read from")
    flags.define_string("output", "", "directory of this stage's work")
    return flags


def _flags_with_workers(help_text: str) -> Flags:
    flags = _stage_flags(f"{help_text}\n{WORKERS_HELP}")
    define_worker_flags(flags)
    return flags


def _parse_stage(flags: Flags, arguments: Sequence[str]) -> bool:
    """Parse the flags of a stage; return False when help was asked for and printed."""
    if not flags.parse(arguments):
        return False
    flags.location("input")
    flags.path("output")
    if flags.is_defined("workers"):
        check_worker_flags(flags)
    return True


def log(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def print_stage(manifest: dict) -> None:
    """Print what a stage read, wrote and dropped."""
    totals = manifest["totals"]
    for source in sorted(totals.get("read", ())):
        read, written = totals["read"][source], totals["written"].get(source, {"documents": 0, "bytes": 0})
        share = 100 * written["bytes"] / max(read["bytes"], 1)
        print(
            f"  {source}: {read['documents']:,} documents, {read['bytes']:,} bytes -> {written['documents']:,} "
            f"documents, {written['bytes']:,} bytes ({share:.1f} %)"
        )
    for reason, count in sorted((totals.get("dropped", {}) | totals.get("bad", {})).items()):
        print(f"  {reason}: {count:,}")
    for name, written in sorted(totals.get("splits", {}).items()):
        documents, size = (sum(part[key] for part in written.values()) for key in ("documents", "bytes"))
        print(f"  {name}: {documents:,} documents, {size:,} bytes")
    print(f"fingerprint {manifest['fingerprint']}")


def print_store(manifest: Manifest) -> None:
    """Print what a token store holds."""
    for name, split in manifest.splits.items():
        print(f"{name}: {split.num_blocks:,} blocks, {split.num_tokens:,} tokens, {len(split.shards)} shards")
        for source, part in split.sources.items():
            print(f"  {source}: {part.num_documents:,} documents, {part.num_bytes:,} bytes, {part.num_tokens:,} tokens")
    print(f"fingerprint {manifest.fingerprint}")
