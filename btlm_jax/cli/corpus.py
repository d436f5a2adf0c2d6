"""The verbs of `btlm corpus`: from raw text to a token store, stage by stage."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from btlm_jax.cli import corpus_stages
from btlm_jax.cli.corpus_stages import log, print_stage, print_store
from btlm_jax.cli.parse import DONE, UsageError, parse_config, parse_flags, run_flags, workdir_of
from btlm_jax.cli.train import build_store
from btlm_jax.storage.location import PathOrUrl, parse_location

HELP = """btlm corpus VERB: make or check a corpus and its token store.

  build      make the store that a config names out of what is installed, all at once
  clean      raw files -> repaired Unicode, short documents dropped
  dedup      near-duplicates over all sources: one document of each cluster stays
  split      train, validation and test by hash; nothing near the held-out text stays in train; shuffled
  tokenizer  train a tokenizer on the documents of split: SentencePiece or byte-level BPE
  tokenize   the documents of split -> a token store
  stats      documents, bytes and tokens by source, lengths, clusters
  show       documents by number or id; clusters of duplicates
  verify     read a stage's output or a token store again and compare every byte with its manifest

clean to tokenize are stages, each from a directory into a new one. A stage that was killed goes on where it was when
the same command is given again; the result does not depend on kills, on --workers, or on --executor, which takes them
to a Ray or Slurm cluster.

examples:  btlm corpus build --config=configs/local_cpu.py --workdir=runs/local
           btlm corpus clean --input=RAW --output=corpus/clean --workers=8
           btlm corpus dedup --input=corpus/clean --output=corpus/dedup --workers=8
           btlm corpus split --input=corpus/dedup --output=corpus/split --workers=8
           btlm corpus tokenize --input=corpus/split --output=store --tokenizer=GPT2 --workers=8
           btlm corpus stats --input=store
           btlm corpus show --input=corpus/dedup --clusters=3 --documents=corpus/clean
           btlm corpus verify --store=runs/local/store
           btlm corpus verify --store=gs://bucket/store
"""


def corpus(arguments: Sequence[str]) -> int:
    """Run `btlm corpus`; return the exit code."""
    if arguments and arguments[0] in ("--help", "-h"):
        print(HELP)
        return DONE
    if not arguments or arguments[0] not in VERBS:
        raise UsageError(f"btlm corpus needs one of {', '.join(VERBS)}; got {arguments[0] if arguments else 'nothing'}")
    return VERBS[arguments[0]](arguments[1:])


def _build(arguments: Sequence[str]) -> int:
    values = run_flags()
    config = parse_config(values, arguments, help_text=HELP)
    if config is None:
        return DONE
    setup = importlib.import_module("btlm_jax.train.setup")
    workdir = workdir_of(values)
    setup.make_workdir(workdir)
    token_store = setup.prepare_store(
        config.data,
        corpus=config.corpus,
        vocab_size=config.model.vocab_size,
        block_len=config.curriculum.table.block_len,
        workdir=workdir,
        expected_fingerprint="",
        build_store=build_store,
    )
    print_store(token_store.manifest)
    return DONE


def _stats(arguments: Sequence[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("plots", "", "directory to draw the same into, as PNG", flag_values=values)
    directory = _directory(values, arguments, name="input", verb="stats")
    if directory is not None:
        print(importlib.import_module("btlm_jax.corpus.inspect.stats").describe(directory))
        if values["plots"].value:
            plot = importlib.import_module("btlm_jax.corpus.inspect.charts").plot
            for path in plot(directory, target=Path(values["plots"].value)):
                print(f"drew {path}")
    return DONE


def _show(arguments: Sequence[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("input", "", "directory of a stage's work", flag_values=values)
    flags.DEFINE_integer("number", -1, "number of a document, from 0", flag_values=values)
    flags.DEFINE_integer("count", 1, "documents from that number on", flag_values=values)
    flags.DEFINE_string("id", "", "id of a document", flag_values=values)
    flags.DEFINE_integer("clusters", 0, "clusters of dedup, the largest first", flag_values=values)
    flags.DEFINE_string("documents", "", "with --clusters: the stage that dedup read", flag_values=values)
    flags.DEFINE_integer("characters", 300, "with --clusters: of each document", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    if not parse_flags(values, arguments, help_text=HELP):
        return DONE
    chosen = {name: values[name].value for name in values}
    asked = (chosen["number"] >= 0) + bool(chosen["id"]) + (chosen["clusters"] > 0)
    if not chosen["input"] or asked != 1:
        raise UsageError("btlm corpus show needs --input=DIR and one of --number=N, --id=ID or --clusters=N")
    if chosen["clusters"] and not chosen["documents"]:
        raise UsageError("--clusters needs --documents=DIR, the stage that dedup read")
    show = importlib.import_module("btlm_jax.corpus.inspect.show")
    directory = Path(chosen["input"])
    if chosen["clusters"]:
        source = Path(chosen["documents"])
        found = show.clusters(directory, documents=source, count=chosen["clusters"], characters=chosen["characters"])
    elif chosen["id"]:
        found = show.by_id(directory, document=chosen["id"])
    else:
        found = show.by_number(directory, number=chosen["number"], count=chosen["count"])
    for text in found:
        print(text)
    return DONE


def _directory(values: flags.FlagValues, arguments: Sequence[str], *, name: str, verb: str) -> PathOrUrl | None:
    """Parse the flags of a verb that only reads a directory; return None when help was asked for and printed."""
    flags.DEFINE_string(name, "", "token store (directory or URL), or directory of a stage's work", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    if not parse_flags(values, arguments, help_text=HELP):
        return None
    if not values[name].value:
        raise UsageError(f"btlm corpus {verb} needs --{name}=DIR")
    return parse_location(values[name].value)


def _verify(arguments: Sequence[str]) -> int:
    directory = _directory(flags.FlagValues(), arguments, name="store", verb="verify")
    if directory is None:
        return DONE
    if isinstance(directory, Path) and (directory / "plan.json").is_file():
        manifest = importlib.import_module("btlm_jax.corpus.engine.inputs").verify_stage(directory)
        print("every file is as its manifest says")
        print_stage(manifest)
        return DONE
    manifest = importlib.import_module("btlm_jax.data.verify").verify(directory, log=log)
    print("every shard is as its manifest says")
    print_store(manifest)
    return DONE


VERBS = {
    "build": _build,
    "clean": corpus_stages.clean,
    "dedup": corpus_stages.dedup,
    "split": corpus_stages.split,
    "tokenizer": corpus_stages.tokenizer,
    "tokenize": corpus_stages.tokenize,
    "stats": _stats,
    "show": _show,
    "verify": _verify,
}
