"""From split documents to a token store: every token once, in order, counted, whatever was killed."""

import dataclasses
import os
import random
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_tokenizers
from support.corpus_files import contents, made_up_text, write_raw
from tokenizers import normalizers

from btlm_jax import notices
from btlm_jax.cli import INTERRUPTED, main
from btlm_jax.corpus.engine.inputs import read_stage
from btlm_jax.corpus.pack import write_shards
from btlm_jax.corpus.readers.records import read_records
from btlm_jax.corpus.stages import tokenize as tokenizing
from btlm_jax.data import store
from btlm_jax.data.reader import open_store
from btlm_jax.data.verify import verify
from btlm_jax.tokenizers.byte_level import read_byte_level
from btlm_jax.tokenizers.gpt2 import FastGpt2Tokenizer, fastest_tokenizer, tiktoken_gives_same_ids
from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer, train_sentencepiece
from btlm_jax.tokenizers.tokenizer import load_tokenizer

MARK = "\u2581"  # SentencePiece's own for a space
TEXTS = [made_up_text(seed=seed, num_words=50) + (f" é{MARK}\n" if seed % 10 == 0 else " é\n") for seed in range(120)]
SOURCES = ("A", "B")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with split documents and the two kinds of tokenizers."""
    folder = tmp_path_factory.mktemp("prepared")
    for number, source in enumerate(SOURCES):
        write_raw(folder / "raw" / f"{number}.jsonl", TEXTS[number::2], source=source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("btlm_jax.corpus.stages.split.GATHER_BYTES", 8_000)
        for verb, source, flags in (("clean", "raw", []), ("split", "clean", ["--validation=0.1", "--test=0.1"])):
            command = ["corpus", verb, f"--input={folder / source}", f"--output={folder / verb}", "--workers=1", *flags]
            assert main(command) == 0
    tiny_tokenizers.write_gpt2_files(folder / "bpe")
    (folder / "pieces").mkdir()
    (folder / "pieces" / "tokenizer.model").write_bytes(train_sentencepiece(tiny_tokenizers.TEXTS, vocab_size=400))
    return folder


def run(folder, output, *flags, tokenizer="bpe", block_len=64) -> int:
    return main(
        ["corpus", "tokenize", f"--input={folder / 'split'}", f"--output={output}", f"--block_len={block_len}",
         f"--tokenizer={folder / tokenizer}", "--workers=1", *flags]
    )  # fmt: skip


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "BLOCKS_PER_SHARD", 7)


def documents(folder, name: str) -> list:
    outputs = [output for output in read_stage(folder / "split")["outputs"] if output["split"] == name]
    return [record for output in outputs for record in read_records(folder / "split" / output["file"])]


def streams_of(opened, name: str) -> dict[str, list[int]]:
    """Return the targets of each stream of a split."""
    reader, split = opened.split(name), opened.manifest.splits[name]
    stretches = {source: (part.first_block, part.num_blocks) for source, part in split.sources.items()}
    if name == store.TRAIN and not opened.manifest.features:
        stretches = {"": (0, split.num_blocks)}
    found = {}
    for source, (first, count) in stretches.items():
        blocks = [reader.read(number) for number in range(first, first + count)]
        assert all(a.tokens[-1] == b.tokens[0] for a, b in zip(blocks, blocks[1:], strict=False))
        found[source] = [token for block in blocks for token in block.tokens[1 : block.num_targets + 1].tolist()]
    return found


@pytest.mark.parametrize(("tokenizer", "flags"), [("bpe", []), ("pieces", []), ("bpe", ["--by_source"])])
def test_the_store_holds_every_document_once_and_in_order(prepared, tmp_path, tokenizer, flags):
    """With --by_source the training documents of each source are a stream, in the order of the split."""
    assert run(prepared, tmp_path / "store", *flags, tokenizer=tokenizer) == 0
    manifest = verify(tmp_path / "store", log=print)
    opened = open_store(tmp_path / "store", expected_fingerprint=manifest.fingerprint)
    assert [len(manifest.splits[name].shards) > 1 for name in (store.TRAIN, store.HELDOUT)] == [True, True]
    stored = load_tokenizer(tmp_path / "store", manifest.tokenizer)
    for name, store_name in tokenizing.STORE_SPLITS.items():
        expected = documents(prepared, name)
        assert all(stored.decode(stored.encode_exactly(record.text)) == record.text for record in expected)
        parts = {"": expected} if name == "train" and not flags else {
            source: [record for record in expected if record.source == source] for source in SOURCES
        }  # fmt: skip
        found = streams_of(opened, store_name)
        assert found.keys() == parts.keys()
        for source, records in parts.items():
            wanted = [token for record in records for token in [*stored.encode_exactly(record.text), stored.eos_id]]
            assert found[source] == wanted
        for source, part in manifest.splits[store_name].sources.items():
            own = [record for record in expected if record.source == source]
            assert part.num_documents == len(own) > 0
            assert part.num_bytes == sum(len(record.text.encode()) for record in own)
            assert part.num_tokens == sum(len(stored.encode_exactly(record.text)) + 1 for record in own)
    assert manifest.features == (("sources",) if flags else ())
    num_marked = sum(MARK in record.text for name in tokenizing.STORE_SPLITS for record in documents(prepared, name))
    assert num_marked == 12
    source = tfds.builder_from_directory(str(tmp_path / "store")).as_data_source(store.TRAIN)
    np.testing.assert_array_equal(source[3]["tokens"], opened.split(store.TRAIN).read(3).tokens)


@pytest.mark.slow
def test_two_workers_and_any_kill_give_the_same_bytes(prepared, tmp_path, monkeypatch):
    assert run(prepared, tmp_path / "one") == 0
    expected = contents(tmp_path / "one")
    real, rng, kills = os.replace, random.Random(5), 0
    while True:
        left = [rng.randint(2, 9)]

        def replace(source, target, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr("os.replace", replace)
        code = run(prepared, tmp_path / "killed")
        if code == 0:
            break
        kills += 1
        assert code == INTERRUPTED and kills < 60
    monkeypatch.undo()
    monkeypatch.setattr(store, "BLOCKS_PER_SHARD", 7)
    assert kills >= 3 and contents(tmp_path / "killed") == expected
    assert run(prepared, tmp_path / "killed") == 0  # says that it is done


@pytest.mark.slow
def test_workers_of_their_own_give_the_same_store(prepared, tmp_path, monkeypatch):
    monkeypatch.undo()  # spawned workers have the real size of a shard
    assert run(prepared, tmp_path / "one") == run(prepared, tmp_path / "two", "--workers=2") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_does_not_fit_is_refused(prepared, tmp_path, capsys):
    assert run(prepared, tmp_path / "store") == 0
    assert run(prepared, tmp_path / "store", block_len=32) == 1
    assert "block_len=64 then, 32 now" in capsys.readouterr().err
    assert run(prepared, tmp_path / "store", "--by_source") == 1
    assert "by_source=None then, True now" in capsys.readouterr().err
    assert run(prepared, tmp_path / "store", tokenizer="pieces") == 1
    assert "was begun otherwise" in capsys.readouterr().err
    assert run(prepared, tmp_path / "other", f"--input={prepared / 'clean'}") == 1
    assert "holds the stage clean; tokenize what btlm corpus split wrote" in capsys.readouterr().err
    assert run(prepared, tmp_path / "other", tokenizer="nothing") == 1
    assert run(prepared, tmp_path / "other", "--tokenizer=") == 2
    assert run(prepared, tmp_path / "other", block_len=0) == 2
    shutil.copytree(prepared / "clean", tmp_path / "clean")
    split = ["corpus", "split", f"--input={tmp_path / 'clean'}", f"--output={tmp_path / 'split'}", "--workers=1"]
    assert main([*split, "--validation=0"]) == 0
    assert run(tmp_path, tmp_path / "other", f"--tokenizer={prepared / 'bpe'}") == 1
    assert "has no validation document that" in capsys.readouterr().err


@settings(deadline=None)
@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["it's", " the", "\n\n", "  ", "42", "é", "…", "\t", "et"])).map("".join)
)
def test_tiktoken_gives_the_ids_of_the_tokenizers_library(fast_and_slow, text):
    fast, slow = fast_and_slow
    assert fast.encode(text) == slow.encode(text)
    assert fast.decode(fast.encode(text)) == text
    assert fast.encode_batch([text, "a"], num_threads=2) == fast.encode_batch([text, "a"], num_threads=1)
    for named in (text, f"{text}{tiny_tokenizers.EOS} {text}{tiny_tokenizers.EOS}"):
        assert fast.encode_prompt(named) == slow.encode_prompt(named)
        assert fast.encode_prompt_with_offsets(named) == slow.encode_prompt_with_offsets(named)


@pytest.fixture(scope="module")
def fast_and_slow(prepared):
    slow = read_byte_level(prepared / "bpe")
    fast = fastest_tokenizer(slow)
    assert isinstance(fast, FastGpt2Tokenizer)
    return fast, slow


def test_tiktoken_on_whole_texts(fast_and_slow):
    fast, slow = fast_and_slow
    for text in [*TEXTS, *tiny_tokenizers.TEXTS[:60], *tiny_tokenizers.NASTY]:
        assert fast.encode(text) == slow.encode(text)
    assert (fast.vocab_size, fast.eos_id, fast.contents) == (slow.vocab_size, slow.eos_id, slow.contents)
    assert fast.eos_id not in fast.encode(tiny_tokenizers.EOS)


def test_other_tokenizers_stay_with_their_own_library(prepared, tmp_path):
    pieces = SentencePieceTokenizer((prepared / "pieces" / "tokenizer.model").read_bytes())
    assert fastest_tokenizer(pieces) is pieces
    shutil.copytree(prepared / "bpe", tmp_path / "swapped")
    merges = (tmp_path / "swapped" / "merges.txt").read_text().splitlines()
    header = [merges.pop(0)] if merges[0].startswith("#") else []
    merges[0], merges[1] = merges[1], merges[0]  # the ids no longer follow the merges
    (tmp_path / "swapped" / "merges.txt").write_text("\n".join(header + merges))
    swapped = read_byte_level(tmp_path / "swapped")
    assert not tiktoken_gives_same_ids(swapped) and fastest_tokenizer(swapped) is swapped


def test_a_store_that_lost_files_gets_them_again(prepared, tmp_path):
    assert run(prepared, tmp_path / "store") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir() if path.is_file()}
    first, second, *_ = sorted((tmp_path / "store").glob("tokens-*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    (tmp_path / "store" / "tokenizer.json").unlink()
    assert run(prepared, tmp_path / "store") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir() if path.is_file()} == before


def test_a_tokenizer_that_loses_text_is_measured_and_refused(prepared, tmp_path, capsys):
    """The same rule for both kinds; allowed, the loss is recorded in the store, which training opens."""
    tiny_tokenizers_of = {
        "tokenizer.model": tiny_tokenizers.trained(byte_fallback=True, normalization_rule_name="nmt_nfkc").contents,
        "tokenizer.json": tiny_tokenizers.tiny_byte_level(normalizer=normalizers.Lowercase()).to_str().encode(),
    }
    for name, contents_of_it in tiny_tokenizers_of.items():
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(contents_of_it)
        store_folder = tmp_path / f"store_{folder.name}"
        assert run(prepared, store_folder, f"--tokenizer={folder}") == 1
        said = capsys.readouterr().err
        assert "give every text back" in said and "--allow_lossy" in said
        assert not (store_folder / "work").exists()
        assert run(prepared, store_folder, f"--tokenizer={folder}", "--allow_lossy", "--strict=tokenizer-lossy") == 1
        assert run(prepared, store_folder, f"--tokenizer={folder}", "--allow_lossy") == 0
        assert "texts come back changed, for example" in capsys.readouterr().err
        manifest = verify(store_folder, log=print)
        assert "texts come back changed" in manifest.made_by["lossy"]
        assert load_tokenizer(store_folder, manifest.tokenizer).vocab_size == manifest.tokenizer.vocab_size


def test_what_is_said_of_a_tokenizer_is_said_once(prepared, tmp_path):
    """Tasks read a copy of it, which is surely the one that the command read."""
    shutil.copytree(prepared / "pieces", tmp_path / "both")
    (tmp_path / "both" / "tokenizer.json").write_text(tiny_tokenizers.tiny_byte_level().to_str())
    assert run(prepared, tmp_path / "store", tokenizer=tmp_path / "both") == 0
    assert notices.counts() == {"tokenizer-preferred": 1}
    (copied,) = (tmp_path / "store" / "work").glob("tokenizer-*/tokenizer.json")
    assert copied.read_bytes() == (tmp_path / "store" / "tokenizer.json").read_bytes()


def test_a_tokenizer_with_a_normaliser_to_nfc_is_taken(prepared, tmp_path):
    """As of Qwen: the documents are NFC after clean."""
    (tmp_path / "nfc").mkdir()
    (tmp_path / "nfc" / "tokenizer.json").write_text(
        tiny_tokenizers.tiny_byte_level(normalizer=normalizers.NFC()).to_str()
    )
    assert run(prepared, tmp_path / "store", f"--tokenizer={tmp_path / 'nfc'}") == 0
    assert run(prepared, tmp_path / "plain") == 0
    with_nfc, plain = (open_store(tmp_path / name, expected_fingerprint="") for name in ("store", "plain"))
    assert streams_of(with_nfc, store.TRAIN) == streams_of(plain, store.TRAIN)
    assert read_byte_level(tmp_path / "nfc").encode("e\u0301") == read_byte_level(tmp_path / "nfc").encode("\xe9")
    assert not tiktoken_gives_same_ids(read_byte_level(tmp_path / "nfc"))


def test_files_that_tfds_reads_must_describe_the_store(prepared, tmp_path, capsys):
    assert run(prepared, tmp_path / "store") == 0
    for name, changes in {
        "features.json": [("65", "66"), ("uint16", "uint32"), ("{", "[", 1), None],
        "dataset_info.json": [('"train"', '"heldout"'), ('"7"', '"8"'), ("array_record", "tfrecord"), ("{", ""), None],
    }.items():
        path = tmp_path / "store" / name
        before = path.read_text()
        for change in changes:
            path.unlink()
            if change is not None:
                path.write_text(before.replace(*change))
                assert path.read_text() != before, change
            capsys.readouterr()
            assert main(["corpus", "verify", f"--store={tmp_path / 'store'}"]) == 1, change
            said = capsys.readouterr().err
            assert name in said and "restore it or rebuild the store" in said
            path.write_text(before)
    assert main(["corpus", "verify", f"--store={tmp_path / 'store'}"]) == 0


def test_ids_that_the_tokenizer_does_not_have_are_found(prepared, tmp_path, capsys):
    """In a store whose hashes are right: by verify, and by the reader that training uses."""
    assert run(prepared, tmp_path / "store") == 0
    manifest = store.read_manifest(tmp_path / "store")
    split = manifest.splits[store.HELDOUT]
    reader = open_store(tmp_path / "store", expected_fingerprint="").split(store.HELDOUT)
    blocks = [reader.read(number) for number in range(len(reader))]
    tokens = blocks[9].tokens.copy()
    tokens[5] = manifest.tokenizer.vocab_size
    blocks[9] = blocks[9]._replace(tokens=tokens)
    shards = tuple(write_shards(tmp_path / "store", split=store.HELDOUT, blocks=blocks))
    splits = {**manifest.splits, store.HELDOUT: dataclasses.replace(split, shards=shards)}
    store.write_manifest(tmp_path / "store", dataclasses.replace(manifest, splits=splits))
    capsys.readouterr()
    assert main(["corpus", "verify", f"--store={tmp_path / 'store'}"]) == 1
    said = capsys.readouterr().err
    assert "it has the id 300, and the tokenizer's ids end at 299" in said and "btlm corpus: error" in said
    reader = open_store(tmp_path / "store", expected_fingerprint="").split(store.HELDOUT)
    with pytest.raises(ValueError, match="block 9 in shard .* has the id 300"):
        reader.read(9)
    assert reader.read(8).tokens.max() < 300
