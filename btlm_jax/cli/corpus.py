"""The verbs of `btlm corpus`: from raw text to a token store, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from btlm_jax.cli import DONE, UsageError, corpus_stages
from btlm_jax.cli.corpus_stages import log, print_stage, print_store
from btlm_jax.cli.parse import Flags, did_you_mean
from btlm_jax.cli.train import build_store, define_workdir

if TYPE_CHECKING:
    from btlm_jax.storage.location import PathOrUrl

HELP = """btlm corpus VERB: make or check a corpus and its token store.

  build      make the store that a config names out of what is installed, all at once
  clean      raw files -> repaired Unicode, short documents dropped
  dedup      near-duplicates over all sources: one document of each cluster stays
  split      train, validation and test by hash; nothing near the held-out text stays in train; shuffled
  tokenizer  train a tokenizer on the documents of split: SentencePiece or byte-level BPE
  tokenize   the documents of split -> a token store
  examples   prompts and completions, or conversations, to fine-tune on -> a token store
  stats      documents, bytes and tokens by source, lengths, clusters
  show       documents by number or id; clusters of duplicates
  verify     read a stage's output or a token store again and compare every byte with its manifest

clean to tokenize are stages, each from a directory into a new one. A stage that was killed goes on where it was when
the same command is given again; the result does not depend on kills, on --workers, or on --executor, which takes them
to a Ray or Slurm cluster.

examples:  btlm corpus build --config=local_cpu --workdir=runs/local
           btlm corpus clean --input=RAW --output=corpus/clean --workers=8
           btlm corpus dedup --input=corpus/clean --output=corpus/dedup --workers=8
           btlm corpus split --input=corpus/dedup --output=corpus/split --workers=8
           btlm corpus tokenize --input=corpus/split --output=store --tokenizer=GPT2 --workers=8
           btlm corpus stats --input=store
           btlm corpus show --input=corpus/dedup --clusters=3 --documents=corpus/clean
           btlm corpus verify --store=runs/local/store
           btlm corpus verify --store=gs://bucket/store
"""


_READ = "token store (directory or URL), or directory of a stage's work"

BUILD_HELP = """btlm corpus build: make the token store that a config names out of what is installed, without training.

example:  btlm corpus build --config=local_cpu --workdir=runs/local

btlm train does the same when there is no store yet. A store that is there and was made with other settings is refused.
"""

STATS_HELP = """btlm corpus stats: documents, bytes and tokens by source, lengths and clusters of a stage or a store.

examples:  btlm corpus stats --input=store --plots=pictures
           btlm corpus stats --input=gs://bucket/store
"""

SHOW_HELP = """btlm corpus show: print documents by number or id, or the largest clusters of duplicates.

examples:  btlm corpus show --input=corpus/clean --number=17 --count=3
           btlm corpus show --input=corpus/split --id=RAW/a.jsonl:12
           btlm corpus show --input=corpus/dedup --clusters=3 --documents=corpus/clean
"""

VERIFY_HELP = """btlm corpus verify: read a stage's output or a token store again; compare every byte with its manifest.

examples:  btlm corpus verify --store=runs/local/store
           btlm corpus verify --store=gs://bucket/store

Exit code 0 when all is as recorded, 1 with the names of the damaged files otherwise.
"""


def corpus(arguments: Sequence[str]) -> int:
    """Run `btlm corpus`; return the exit code."""
    if arguments and arguments[0] in ("--help", "-h", "help"):
        print(HELP)
        return DONE
    if not arguments or arguments[0] not in VERBS:
        given = arguments[0] if arguments else "nothing"
        raise UsageError(f"btlm corpus needs one of {', '.join(VERBS)}; got {given}{did_you_mean(given, list(VERBS))}")
    return VERBS[arguments[0]](arguments[1:])


def build_flags() -> Flags:
    """Define the flags of `btlm corpus build`."""
    flags = Flags(BUILD_HELP)
    flags.define_config()
    define_workdir(flags)
    return flags


def _build(arguments: Sequence[str]) -> int:
    flags = build_flags()
    if not flags.parse(arguments):
        return DONE
    config = flags.config()
    workdir = flags.path("workdir")
    from btlm_jax.train import setup

    setup.make_workdir(workdir)
    token_store = setup.prepare_store(
        config, workdir=workdir, expected_fingerprint="", build_store=build_store, wait_for_all=lambda: None
    )
    print_store(token_store.manifest)
    return DONE


def stats_flags() -> Flags:
    """Define the flags of `btlm corpus stats`."""
    flags = Flags(STATS_HELP)
    flags.define_string("input", "", _READ)
    flags.define_string("plots", "", "directory to draw the same into, as PNG")
    return flags


def _stats(arguments: Sequence[str]) -> int:
    flags = stats_flags()
    directory = _directory(flags, arguments, name="input")
    if directory is None:
        return DONE
    from btlm_jax.corpus.inspect import stats

    plots = flags.optional_path("plots")
    print(stats.describe(directory))
    if plots is not None:
        from btlm_jax.corpus.inspect import charts

        for path in charts.plot(directory, target=plots):
            print(f"drew {path}")
    return DONE


def show_flags() -> Flags:
    """Define the flags of `btlm corpus show`."""
    flags = Flags(SHOW_HELP)
    flags.define_string("input", "", "directory of a stage's work")
    flags.define_integer("number", -1, "number of a document, from 0")
    flags.define_integer("count", 1, "documents from that number on")
    flags.define_string("id", "", "id of a document")
    flags.define_integer("clusters", 0, "clusters of dedup, the largest first")
    flags.define_string("documents", "", "with --clusters: the stage that dedup read")
    flags.define_integer("characters", 300, "with --clusters: of each document")
    return flags


def _show(arguments: Sequence[str]) -> int:
    flags = show_flags()
    if not flags.parse(arguments):
        return DONE
    number, document, clusters = flags.integer("number"), flags.string("id"), flags.integer("clusters")
    if not flags.string("input") or (number >= 0) + bool(document) + (clusters > 0) != 1:
        raise UsageError("btlm corpus show needs --input=DIR and one of --number=N, --id=ID or --clusters=N")
    for name in ("count", "characters"):
        if flags.integer(name) < 1:
            raise UsageError(f"--{name}={flags.integer(name)} must be 1 or more")
    if clusters and not flags.string("documents"):
        raise UsageError("--clusters needs --documents=DIR, the stage that dedup read")
    from btlm_jax.corpus.inspect import show

    directory = flags.path("input")
    if clusters:
        texts = show.clusters(
            directory,
            documents=flags.path("documents"),
            count=clusters,
            characters=flags.integer("characters"),
        )
    elif document:
        texts = show.by_id(directory, document=document)
    else:
        texts = show.by_number(directory, number=number, count=flags.integer("count"))
    for text in texts:
        print(text)
    return DONE


def _directory(flags: Flags, arguments: Sequence[str], *, name: str) -> PathOrUrl | None:
    """Parse the flags of a verb that only reads a directory; return None when help was asked for and printed."""
    if not flags.parse(arguments):
        return None
    return flags.location(name)


def verify_flags() -> Flags:
    """Define the flags of `btlm corpus verify`."""
    flags = Flags(VERIFY_HELP)
    flags.define_string("store", "", _READ)
    return flags


def _verify(arguments: Sequence[str]) -> int:
    directory = _directory(verify_flags(), arguments, name="store")
    if directory is None:
        return DONE
    if isinstance(directory, Path) and (directory / "plan.json").is_file():
        from btlm_jax.corpus.engine.inputs import verify_stage

        stage_manifest = verify_stage(directory)
        print("every file is as its manifest says")
        print_stage(stage_manifest)
        return DONE
    from btlm_jax.data.verify import verify
    from btlm_jax.tokenizers.tokenizer import load_tokenizer, tokenizer_info

    store_manifest = verify(directory, log=log)
    recorded = store_manifest.tokenizer
    if (info := tokenizer_info(load_tokenizer(directory, recorded))) != recorded:
        raise ValueError(f"the tokenizer of {directory} is {info}, its manifest says {recorded}; rebuild the store")
    print("every shard is as its manifest says")
    print_store(store_manifest)
    return DONE


VERBS = {
    "build": _build,
    "clean": corpus_stages.clean,
    "dedup": corpus_stages.dedup,
    "split": corpus_stages.split,
    "tokenizer": corpus_stages.tokenizer,
    "tokenize": corpus_stages.tokenize,
    "examples": corpus_stages.examples,
    "stats": _stats,
    "show": _show,
    "verify": _verify,
}

FLAGS = {
    "build": build_flags,
    "clean": corpus_stages.clean_flags,
    "dedup": corpus_stages.dedup_flags,
    "split": corpus_stages.split_flags,
    "tokenizer": corpus_stages.tokenizer_flags,
    "tokenize": corpus_stages.tokenize_flags,
    "examples": corpus_stages.examples_flags,
    "stats": stats_flags,
    "show": show_flags,
    "verify": verify_flags,
}
