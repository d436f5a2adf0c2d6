"""Three token stores of one text: as it is, with near-duplicates planted, and with those taken out again.

DIR/corpus              the text, cleaned, deduplicated and split, and its tokenizer
DIR/planted             the training documents with the copies, and what `btlm corpus dedup` leaves of them
DIR/documents.json      the copied documents, as many that are not, and what was planted and found
DIR/store-VARIANT
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from btlm_jax.recipe.config import TrainConfig
from btlm_jax.storage.files import read_json_object, scratch_directory, write_atomically

CLEAN, PLANTED, DEDUPLICATED = "clean", "planted", "deduplicated"
VARIANTS = (CLEAN, PLANTED, DEDUPLICATED)
DOCUMENTS_FILE = "documents.json"
COPIES = 16  # of each document that is copied
EDITED = 0.01  # of the words of a copy, replaced by other words of the document
PIECE_CHARACTERS = 4_000  # documents are cut to so many: those that are copied are then like all others
SHORTEST = 1_000  # characters of a document that is copied
MARGIN = 1.1  # the clean text has so many times the tokens of a run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """The documents of the three stores, and those whose memorization is measured."""

    unique: list[str]
    copied: list[str]  # of the unique ones
    control: list[str]  # as many unique ones of about the same lengths that are not copied
    copies: list[str]


def edited(text: str, *, rng: random.Random) -> str:
    """Return a near-duplicate: EDITED of the words, but at least one, replaced by others of the text."""
    words = text.split(" ")
    for place in rng.sample(range(len(words)), max(1, round(EDITED * len(words)))):
        words[place] = rng.choice(words)
    return " ".join(words)


def pieces_of(text: str) -> list[str]:
    """Return a text in pieces of at most PIECE_CHARACTERS, cut at spaces where there are any."""
    pieces, begin = [], 0
    while len(text) - begin > PIECE_CHARACTERS:
        space = text.rfind(" ", begin + 1, begin + PIECE_CHARACTERS)
        end = space if space > 0 else begin + PIECE_CHARACTERS
        pieces.append(text[begin:end])
        begin = end + (space > 0)
    return [*pieces, text[begin:]]


def choose_texts(texts: Sequence[str], sizes: Sequence[int], *, num_tokens: int, seed: int) -> Texts:
    """Return what to train on: unique text of MARGIN x num_tokens, and copies with about as many tokens.

    `sizes` are the texts' tokens.

    Raises:
      ValueError: the texts are too few, or none has the length of one that is copied.
    """
    rng = random.Random(seed)
    order = list(range(len(texts)))
    rng.shuffle(order)
    unique: list[int] = []
    size = 0
    for number in order:
        if size >= MARGIN * num_tokens:
            break
        unique.append(number)
        size += sizes[number]
    if size < MARGIN * num_tokens:
        raise ValueError(
            f"the training text has {size:,} tokens, and this needs {round(MARGIN * num_tokens):,}: give more "
            "--data, or fewer tokens (--config.curriculum.num_tokens)"
        )
    fitting = [number for number in unique if len(texts[number]) >= SHORTEST]
    copied: list[int] = []
    copied_size = 0
    for number in fitting:
        if COPIES * copied_size >= size or 2 * (len(copied) + 1) > len(fitting):
            break
        copied.append(number)
        copied_size += sizes[number]
    if not copied:
        raise ValueError(f"two documents or more of {SHORTEST:,} characters are needed; give other --data")
    others = [number for number in fitting if number not in copied]
    control: list[int] = []
    for number in copied:  # the nearest in length
        nearest = min(others, key=lambda other, size=sizes[number]: abs(sizes[other] - size))
        others.remove(nearest)
        control.append(nearest)
    copies = [edited(texts[number], rng=rng) for number in copied for _ in range(COPIES)]
    return Texts(
        unique=[texts[number] for number in unique],
        copied=[texts[number] for number in copied],
        control=[texts[number] for number in control],
        copies=copies,
    )


def make_stores(config: TrainConfig, data: Sequence[str], folder: Path) -> dict[str, Path]:
    """Make what is not there yet; return the stores by variant.

    Raises:
      ValueError: no --data is given, or it is too small.
    """
    stores = {name: folder / f"store-{name}" for name in VARIANTS}
    if all((path / "manifest.json").is_file() for path in stores.values()):
        return stores
    if not data:
        raise ValueError("give --data=FILES: near-duplicates are planted into documents, and these are counted first")
    from btlm_jax.corpus import own_text
    from btlm_jax.corpus.engine.inputs import read_stage
    from btlm_jax.corpus.engine.workers import LocalWorkers
    from btlm_jax.corpus.readers.records import read_records
    from btlm_jax.display.progress import print_line
    from btlm_jax.tokenizers.tokenizer import encode_document, find_tokenizer

    place, run = folder / "corpus", {"workers": LocalWorkers(1), "log": print_line}
    text = own_text.split_text([Path(each) for each in data], directory=place, **run)
    directory = own_text.make_tokenizer(text, vocab_size=config.model.vocab_size, directory=place, log=print_line)
    tokenizer = find_tokenizer(directory)
    split: dict[str, list[str]] = {"train": [], "validation": []}
    for output in read_stage(text.folder)["outputs"]:
        split[output["split"]] += [record.text for record in read_records(text.folder / output["file"])]
    train = [piece for each in split["train"] for piece in pieces_of(each)]
    sizes = [sum(map(len, encode_document(tokenizer, each))) for each in train]
    num_tokens = config.curriculum.table.num_tokens
    chosen = choose_texts(train, sizes, num_tokens=num_tokens, seed=config.data.seed)
    heldout = [piece for each in split["validation"] for piece in pieces_of(each)]
    random.Random(config.data.seed).shuffle(heldout)
    planted = [*chosen.unique, *chosen.copies]
    random.Random(config.data.seed).shuffle(planted)
    kept = deduplicated(planted, folder / PLANTED)
    natural = read_stage(place / "dedup")["totals"]
    facts = {
        "unique_documents": len(chosen.unique),
        "copied_documents": len(chosen.copied),
        "planted_copies": len(chosen.copies),
        "planted_share": sum(map(len, chosen.copies)) / sum(map(len, planted)),
        "left_by_dedup": len(kept),
        "natural_documents": sum(each["documents"] for each in natural["read"].values()),
        "natural_near_duplicates": sum(natural["dropped"].values()),
    }
    values = {"facts": facts, "copied": chosen.copied, "control": chosen.control, "heldout": heldout}
    write_atomically(folder / DOCUMENTS_FILE, json.dumps(values))
    for name, documents in zip(VARIANTS, (chosen.unique, planted, kept), strict=True):
        write_store(stores[name], documents, heldout, directory, config=config)
    return stores


def deduplicated(texts: Sequence[str], folder: Path) -> list[str]:
    """Return what the stages clean and dedup (strict) leave of documents, in their order; they work in `folder`."""
    from btlm_jax.corpus.engine.inputs import read_stage
    from btlm_jax.corpus.engine.workers import LocalWorkers
    from btlm_jax.corpus.readers.records import read_records
    from btlm_jax.corpus.stages.clean import KEEP_PREFIX, CleanConfig, clean
    from btlm_jax.corpus.stages.dedup import deduplicate
    from btlm_jax.display.progress import print_line

    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    write_atomically(folder / "documents.jsonl", "".join(lines))
    run = {"workers": LocalWorkers(1), "log": print_line}
    config = CleanConfig(
        inputs=(folder / "documents.jsonl",),
        default_source="text",
        on_bad_file=KEEP_PREFIX,
        max_bad_rate=0.0,
        folders_are_sources=False,
    )
    clean(config, output=folder / "clean", **run)
    deduplicate(folder / "clean", preset="strict", output=folder / "dedup", **run)
    outputs = read_stage(folder / "dedup")["outputs"]
    return [record.text for output in outputs for record in read_records(folder / "dedup" / output["file"])]


def facts_of(store: Path) -> dict:
    """Return what was planted into the stores beside this one, and the documents whose loss is measured."""
    return read_json_object(store.parent / DOCUMENTS_FILE)


def write_store(
    directory: Path, train: Sequence[str], heldout: Sequence[str], tokenizer_folder: Path, *, config: TrainConfig
) -> None:
    """Write a token store: one stream of the training documents, and one of those held out."""
    from btlm_jax.corpus.pack import pack, write_shards, write_tfds_metadata
    from btlm_jax.data import store
    from btlm_jax.data.store import TokenBlock
    from btlm_jax.tokenizers.sentencepiece_bpe import TOKENIZER_FILE
    from btlm_jax.tokenizers.tokenizer import encode_document, find_tokenizer, tokenizer_info

    tokenizer = find_tokenizer(tokenizer_folder)
    info, block_len = tokenizer_info(tokenizer), config.curriculum.table.block_len
    dtype = store.token_dtype(info.vocab_size)

    def blocks_of(texts: Sequence[str]) -> Iterator[TokenBlock]:
        documents = ([token for piece in encode_document(tokenizer, text) for token in piece] for text in texts)
        return pack(documents, block_len=block_len, eos_id=info.eos_id, dtype=dtype)

    with scratch_directory(directory) as scratch:
        (scratch / info.file).write_bytes((tokenizer_folder / TOKENIZER_FILE).read_bytes())
        splits = {}
        for name, source, texts in ((store.TRAIN, "all", train), (store.HELDOUT, "text", heldout)):
            blocks = list(blocks_of(texts))
            num_tokens = sum(block.num_targets for block in blocks)
            is_heldout = name == store.HELDOUT  # whose blocks are of a source
            entry = store.Source(
                num_documents=len(texts),
                num_bytes=sum(len(text.encode()) for text in texts),
                num_tokens=num_tokens,
                first_block=0,
                num_blocks=len(blocks) if is_heldout else 0,
            )
            splits[name] = store.Split(
                num_blocks=len(blocks),
                num_tokens=num_tokens,
                shards=tuple(write_shards(scratch, split=name, blocks=blocks)),
                sources={source: entry},
            )
        write_tfds_metadata(scratch, splits, block_len=block_len, dtype=dtype)
        manifest = store.Manifest(
            block_len=block_len,
            dtype=dtype,
            tokenizer=info,
            splits=splits,
            features=(),
            made_by={"experiment": "dedup"},
        )
        store.write_manifest(scratch, manifest)
        os.replace(scratch, directory)
