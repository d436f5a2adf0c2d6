import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds
from support.tiny_store import stream_blocks, write_store

from btlm_jax.data import store
from btlm_jax.data.reader import open_store
from btlm_jax.data.verify import verify

BLOCK_LEN, TRAIN_TOKENS, BLOCKS_PER_SHARD = 24, 13 * 24 + 7, 5


@pytest.fixture
def directory(tmp_path):
    write_store(
        tmp_path,
        block_len=BLOCK_LEN,
        train_tokens=TRAIN_TOKENS,
        heldout_tokens={"b": 50, "a": 31},
        blocks_per_shard=BLOCKS_PER_SHARD,
    )
    return tmp_path


def test_read_gives_every_block_of_every_shard(directory):
    token_store = open_store(directory, expected_fingerprint="")
    expected = stream_blocks(first=0, num_targets=TRAIN_TOKENS, block_len=BLOCK_LEN)
    reader = token_store.split(store.TRAIN)
    assert len(reader) == len(expected) == 14
    for number in np.random.default_rng(3).permutation(14).tolist():
        tokens, num_targets, marks = reader.read(number)
        assert tokens.dtype == np.uint16
        np.testing.assert_array_equal(tokens, expected[number][0])
        assert num_targets == expected[number][1] and marks is None
    assert reader.read(13).num_targets == 7


def test_read_agrees_with_tfds(directory):
    features = tfds.features.FeaturesDict(
        {
            "tokens": tfds.features.Tensor(
                shape=(BLOCK_LEN + 1,), dtype=np.uint16, encoding=tfds.features.Encoding.BYTES
            ),
            "num_targets": tfds.features.Scalar(np.int32),
        }
    )
    reader = open_store(directory, expected_fingerprint="").split(store.HELDOUT)
    for number in range(len(reader)):
        example = features.deserialize_example_np(next(reader._records.read([number])))
        np.testing.assert_array_equal(reader.read(number).tokens, example["tokens"])
        assert reader.read(number).num_targets == example["num_targets"]


def test_read_is_thread_safe(directory):
    reader = open_store(directory, expected_fingerprint="").split(store.TRAIN)
    wrong = []

    def read_all(seed):
        for number in np.random.default_rng(seed).integers(0, 13, 400).tolist():
            if reader.read(number).tokens[0] != number * BLOCK_LEN:
                wrong.append(number)

    threads = [threading.Thread(target=read_all, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


MANY_SHARDS = """
import pathlib, resource, sys
from btlm_jax.data import store
from btlm_jax.data.reader import open_store
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
reader = open_store(pathlib.Path(sys.argv[1]), expected_fingerprint="").split(store.TRAIN)
print(sum(int(block.tokens[0]) for block in reader.read_many(range(len(reader)))))
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
open_store(pathlib.Path(sys.argv[1]), expected_fingerprint="")
"""


def test_a_store_may_have_more_shards_than_a_process_may_open_files(tmp_path):
    write_store(tmp_path, block_len=4, train_tokens=400, heldout_tokens={"a": 3}, blocks_per_shard=1)
    result = subprocess.run([sys.executable, "-c", MANY_SHARDS, str(tmp_path)], capture_output=True, text=True)
    assert result.stdout == f"{sum(range(0, 400, 4))}\n"
    said = f"OSError: token store {tmp_path} has 101 files to keep open, and a process may open 300 here (ulimit -Hn)"
    assert said in result.stderr and "raised to 357" in result.stderr


def test_open_refuses_another_fingerprint(directory):
    fingerprint = store.read_manifest(directory).fingerprint
    assert open_store(directory, expected_fingerprint=fingerprint).manifest.fingerprint == fingerprint
    with pytest.raises(ValueError, match=f"{fingerprint}.*{'0' * 64}"):
        open_store(directory, expected_fingerprint="0" * 64)


def test_unknown_split_names_the_known_ones(directory):
    with pytest.raises(ValueError, match="no split 'test'; it has heldout, train"):
        open_store(directory, expected_fingerprint="").split("test")


def test_open_refuses_a_missing_shard(directory):
    name = store.shard_name(split=store.TRAIN, index=1, num_shards=3)
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        open_store(directory, expected_fingerprint="")


def test_open_refuses_a_truncated_shard(directory):
    name = store.shard_name(split=store.TRAIN, index=2, num_shards=3)
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=name):
        open_store(directory, expected_fingerprint="")


def test_read_names_the_shard_truncated_after_opening(directory):
    reader = open_store(directory, expected_fingerprint="").split(store.TRAIN)
    name = store.shard_name(split=store.TRAIN, index=1, num_shards=3)
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[: len(content) // 2])
    assert reader.read(4).num_targets == BLOCK_LEN
    with pytest.raises(ValueError, match=f"block 5 in shard .*{name}"):
        reader.read(5)


def flip_tokens_of_block(path, first_token):
    """Flip a bit inside the stored tokens of the block that starts with first_token."""
    content = bytearray(path.read_bytes())
    offset = content.find(np.arange(first_token, first_token + 8, dtype=np.uint16).tobytes())
    assert offset > 0
    content[offset + 3] ^= 0x10
    path.write_bytes(bytes(content))


def test_read_and_verify_name_a_corrupt_shard(directory):
    assert verify(directory, log=print) == store.read_manifest(directory)
    name = store.shard_name(split=store.TRAIN, index=1, num_shards=3)
    flip_tokens_of_block(directory / name, first_token=7 * BLOCK_LEN)
    reader = open_store(directory, expected_fingerprint="").split(store.TRAIN)
    with pytest.raises(ValueError, match=f"block 7 in shard .*{name}"):
        reader.read(7)
    with pytest.raises(ValueError, match=name) as error:
        verify(directory, log=print)
    assert store.shard_name(split=store.TRAIN, index=0, num_shards=3) not in str(error.value)


@pytest.mark.parametrize(
    "split, change, said",
    [
        (store.TRAIN, {"num_tokens": TRAIN_TOKENS + 1}, "its manifest says"),
        (store.TRAIN, {"sources": {"all": {"num_documents": 1}}}, "its manifest says"),
        (
            store.HELDOUT,
            {"sources": {"b": {"num_tokens": 49}, "a": {"num_tokens": 32}}},
            "source 'b' in split heldout .* has \\(50, 0\\)",
        ),
        (
            store.HELDOUT,
            {"sources": {"b": {"num_blocks": 2}, "a": {"first_block": 2, "num_blocks": 3}}},
            "block 2 does",
        ),
        (store.HELDOUT, {"sources": {"b": {"num_blocks": 5}, "a": {"num_blocks": 0}}}, "block 2 does not go on"),
    ],
)
def test_verify_reads_the_streams_and_counts(directory, split, change, said):
    manifest = store.read_manifest(directory)
    found = manifest.splits[split]
    sources = {
        name: dataclasses.replace(source, **change.get("sources", {}).get(name, {}))
        for name, source in found.sources.items()
    }
    found = dataclasses.replace(found, **{**change, "sources": sources})
    store.write_manifest(directory, dataclasses.replace(manifest, splits=manifest.splits | {split: found}))
    with pytest.raises(ValueError, match=said):
        verify(directory, log=print)


def test_verify_checks_the_tokenizer(directory):
    (directory / "tokenizer.model").write_bytes(b"other tokenizer")
    with pytest.raises(ValueError, match="tokenizer.model"):
        verify(directory, log=print)


def test_read_refuses_a_shard_of_another_block_length(directory, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_store(
        other, block_len=12, train_tokens=150, heldout_tokens={"a": 31, "b": 31}, blocks_per_shard=BLOCKS_PER_SHARD
    )
    name = store.shard_name(split=store.TRAIN, index=0, num_shards=3)
    reader = open_store(directory, expected_fingerprint="").split(store.TRAIN)
    (directory / name).write_bytes((other / name).read_bytes())
    with pytest.raises(ValueError, match="has 13 tokens and 12 targets; expected 25"):
        reader.read(0)


def with_manifest(directory, **changes):
    store.write_manifest(directory, dataclasses.replace(store.read_manifest(directory), **changes))


def test_an_id_that_the_tokenizer_does_not_have_is_named(directory):
    tokenizer = dataclasses.replace(store.read_manifest(directory).tokenizer, vocab_size=7 * BLOCK_LEN)
    with_manifest(directory, tokenizer=tokenizer)
    reader = open_store(directory, expected_fingerprint="").split(store.TRAIN)
    assert reader.read(5).tokens[-1] == 6 * BLOCK_LEN
    with pytest.raises(ValueError, match=f"block 6 in shard .*has the id {7 * BLOCK_LEN}, and the tokenizer's ids end"):
        reader.read_many([5, 6])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_len": "24"}, "manifest.json.block_len='24' must be of type int"),
        ({"block_len": 0}, "block_len=0"),
        ({"block_len": -24}, "block_len=-24"),
        ({"dtype": "object"}, "dtype='object'"),
        ({"splits": []}, "manifest.json.splits must be a table of keys"),
        ({"features": ("masks", "sources")}, "does not know masks, only examples, sources"),
        ({"features": ("sources", "sources")}, "not in order, each once"),
        ({"features": ("sources",)}, "source 'all' has 0 blocks of split train from 0 on"),
        ({"made_by": 3}, "manifest.json.made_by=3 must be of type dict"),
        ({"tokenizer": {"file": "x"}}, "config key manifest.json.tokenizer.kind is missing"),
        ({"tokenizer": ("vocab_size", -1)}, "eos_id=0 is none of the tokenizer's -1 ids"),
        ({"tokenizer": ("file", "../../secret")}, "'../../secret' is not the name of a file"),
        ({"shard": ("file", "/etc/passwd")}, "'/etc/passwd' is not the name of a file"),
        ({"shard": ("num_blocks", -5)}, "split train has 14 blocks, its shards have others"),
        ({"shard": ("num_blocks", 6)}, "split train has 14 blocks, its shards have others"),
        ({"shard": ("sha256", None)}, "shards[0].sha256=None must be of type str"),
    ],
    ids=str,
)
def test_a_manifest_that_hashes_right_and_says_nonsense_is_refused(directory, changes, said):
    changes = dict(changes)
    manifest = store.read_manifest(directory)
    if isinstance(changes.get("tokenizer"), tuple):
        key, value = changes["tokenizer"]
        changes["tokenizer"] = dataclasses.replace(manifest.tokenizer, **{key: value})
    if "shard" in changes:
        key, value = changes.pop("shard")
        train = manifest.splits[store.TRAIN]
        shards = (dataclasses.replace(train.shards[0], **{key: value}), *train.shards[1:])
        changes["splits"] = {**manifest.splits, store.TRAIN: dataclasses.replace(train, shards=shards)}
    with_manifest(directory, **changes)
    with pytest.raises(ValueError, match="is corrupt: ") as raised:
        store.read_manifest(directory)
    assert said in str(raised.value)


def test_a_manifest_nested_too_deeply_is_refused(directory):
    for depth in (100_000, 900):
        (directory / store.MANIFEST_FILE).write_text(
            f'{{"format": "{store.FORMAT}", "format_version": 1, "made_by": '
            + '{"a":' * depth
            + "1"
            + "}" * (depth + 1)
        )
        with pytest.raises(ValueError, match="is corrupt: "):
            store.read_manifest(directory)


def test_a_store_without_features_is_of_format_1_as_ever(directory):
    body = json.loads((directory / store.MANIFEST_FILE).read_text())
    assert body.pop("format_version") == 1 and "features" not in body
    fingerprint = body.pop("fingerprint")
    del body["format"]
    assert fingerprint == hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def test_features_are_of_format_2(directory):
    train = store.read_manifest(directory).splits[store.TRAIN]
    sources = {"all": dataclasses.replace(train.sources["all"], num_blocks=train.num_blocks)}
    splits = store.read_manifest(directory).splits | {store.TRAIN: dataclasses.replace(train, sources=sources)}
    with_manifest(directory, splits=splits, features=(store.SOURCES,))
    path = directory / store.MANIFEST_FILE
    body = json.loads(path.read_text())
    assert (body["format_version"], body["features"]) == (2, ["sources"])
    assert store.read_manifest(directory).features == (store.SOURCES,)
    for changes, said in (
        ({"format_version": 1}, "its format is 1, and its features are ['sources']"),
        ({"features": []}, "its format is 2, and its features are []"),
        ({"format_version": 3}, "this version reads btlm-token-store, 1 and 2"),
    ):
        path.write_text(json.dumps(body | changes))
        with pytest.raises(ValueError, match=re.escape(said)):
            store.read_manifest(directory)
