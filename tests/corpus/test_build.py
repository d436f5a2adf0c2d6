"""A whole build, small and real: reproducible, complete, readable by others, and atomic."""

import contextlib
import shutil
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from support.real_store import BLOCK_LEN, VOCAB_SIZE, build_real_store, made_up_documents

from btlm_jax.corpus.installed import build
from btlm_jax.data import store
from btlm_jax.data.reader import open_store
from btlm_jax.data.verify import verify
from btlm_jax.storage.files import only_writer
from btlm_jax.tokenizers.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("built") / "store"
    return directory, build_real_store(directory)


def stream_of(reader, first: int, count: int) -> list[int]:
    tokens = []
    for number in range(first, first + count):
        block = reader.read(number)
        tokens += block.tokens[1 : block.num_targets + 1].tolist()
    return tokens


def test_two_builds_are_equal_byte_for_byte(built, tmp_path):
    directory, manifest = built
    again = build_real_store(tmp_path / "store")
    assert again.fingerprint == manifest.fingerprint == verify(directory, log=print).fingerprint
    files = {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    for name, content in files.items():
        assert (tmp_path / "store" / name).read_bytes() == content, name
        assert str(directory).encode() not in content, f"{name} names a path of this machine"


def test_every_document_is_in_exactly_one_split_and_every_token_is_there(built):
    directory, manifest = built
    opened = open_store(directory, expected_fingerprint=manifest.fingerprint)
    tokenizer = load_tokenizer(directory, manifest.tokenizer)
    texts = {document.text for document in made_up_documents(Counter())}
    found = []
    train = opened.split(store.TRAIN)
    found += split_documents(stream_of(train, 0, len(train)), tokenizer)
    heldout = opened.split(store.HELDOUT)
    by_source = {}
    for name, source in manifest.splits[store.HELDOUT].sources.items():
        tokens = stream_of(heldout, source.first_block, source.num_blocks)
        assert len(tokens) == source.num_tokens
        by_source[name] = split_documents(tokens, tokenizer)
        assert len(by_source[name]) == source.num_documents > 0
        assert sum(len(text.encode()) for text in by_source[name]) == source.num_bytes <= 2_000
        found += by_source[name]
        written = (directory / "heldout" / f"{name}.txt").read_text()
        assert written == "\n".join(by_source[name])
    dropped = manifest.made_by["dropped"]["over corpus.heldout_bytes_per_source"]
    assert len(found) == len(set(found)) == len(texts) - dropped
    assert set(found) <= texts


def split_documents(targets: list[int], tokenizer) -> list[str]:
    documents, current = [], []
    for token in targets:
        if token == tokenizer.eos_id:
            documents.append(tokenizer.decode(current))
            current = []
        else:
            current.append(token)
    assert not current
    return documents


def test_counts_add_up(built):
    _, manifest = built
    for split in manifest.splits.values():
        assert split.num_tokens == sum(source.num_tokens for source in split.sources.values())
        assert split.num_blocks == sum(shard.num_blocks for shard in split.shards)
    blocks = [(s.first_block, s.num_blocks) for s in manifest.splits[store.HELDOUT].sources.values()]
    assert [first for first, _ in blocks] == np.cumsum([0, *(count for _, count in blocks)])[:-1].tolist()
    assert manifest.tokenizer.vocab_size == VOCAB_SIZE and manifest.block_len == BLOCK_LEN


def test_tfds_opens_the_store_without_tensorflow(built):
    directory, manifest = built
    source = tfds.builder_from_directory(str(directory)).as_data_source(store.TRAIN)
    reader = open_store(directory, expected_fingerprint="").split(store.TRAIN)
    assert len(source) == len(reader) == manifest.splits[store.TRAIN].num_blocks
    for number in (0, len(source) // 2, len(source) - 1):
        block = reader.read(number)
        np.testing.assert_array_equal(source[number]["tokens"], block.tokens)
        assert source[number]["num_targets"] == block.num_targets


def test_a_failed_build_leaves_nothing_and_a_killed_one_is_cleaned(tmp_path):
    directory = tmp_path / "store"
    full = OSError(28, "No space left on device", str(directory))
    with mock.patch.object(build.store, "write_manifest", side_effect=full), pytest.raises(OSError, match="No space"):
        build_real_store(directory)
    assert list(tmp_path.iterdir()) == []
    stale = tmp_path / ".store.partial"
    stale.mkdir()
    (stale / "half").write_text("written")
    build_real_store(directory)
    assert not stale.exists() and not (directory / "half").exists()
    with pytest.raises(FileExistsError, match="exists already; delete it"):
        build_real_store(directory)


def test_of_two_builders_one_is_refused_or_takes_what_the_other_made(built, tmp_path, monkeypatch):
    directory = tmp_path / "store"
    with only_writer(directory), pytest.raises(FileExistsError, match="store is being made by another process; wait"):
        build_real_store(directory)

    @contextlib.contextmanager
    def lock_late(path):
        with only_writer(path):
            shutil.copytree(built[0], path)  # meanwhile
            yield

    monkeypatch.setattr(build, "only_writer", lock_late)
    said = []
    assert build_real_store(directory, log=said.append) == built[1]
    assert said == [f"Corpus: another process has made {directory} meanwhile, and it is used"]
    assert [path.name for path in tmp_path.iterdir()] == ["store"] and verify(directory, log=print) == built[1]


def test_the_cap_takes_whole_documents_up_to_it():
    documents = list(made_up_documents(Counter()))
    dropped = Counter()
    taken = build._take(documents, max_bytes=20_000, seed=1, dropped=dropped)
    size = sum(len(document.text.encode()) for document in taken)
    assert 18_000 < size <= 20_000 and dropped["over corpus.max_bytes"] == len(documents) - len(taken)
    other = build._take(documents, max_bytes=20_000, seed=2, dropped=Counter())
    assert [document.id for document in taken] != [document.id for document in other]
    assert {document.source for document in taken} == {"stdlib", "packages", "docs"}


def test_too_little_text_for_a_split_is_refused():
    config = build.CorpusConfig(
        source="installed_python", max_bytes=1_000, heldout_fraction=0.01, heldout_bytes_per_source=100
    )
    documents = list(made_up_documents(Counter()))[:3]
    with pytest.raises(ValueError, match="leave no held-out text of docs, packages, stdlib; raise them"):
        build._split(documents, config=config, seed=1, dropped=Counter())
