"""Prompts and completions, and conversations, to a token store: what is trained, whole, once, and what is refused."""

import dataclasses
import gzip
import json
import random
import re
import shutil
from datetime import datetime
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from support import tiny_tokenizers
from support.corpus_files import contents, limited_open_files
from support.tiny import tiny_config
from tokenizers import AddedToken

from btlm_jax import notices
from btlm_jax.cli import main
from btlm_jax.corpus import example_encoding
from btlm_jax.corpus.example_encoding import ExampleEncoder
from btlm_jax.corpus.example_packing import pack_windows
from btlm_jax.corpus.inspect import stats
from btlm_jax.corpus.own_examples import first_prompt
from btlm_jax.corpus.readers.examples import Conversation, Pair
from btlm_jax.corpus.stages import examples as stage
from btlm_jax.data import store
from btlm_jax.data.loader import read_rows
from btlm_jax.data.reader import open_store
from btlm_jax.data.verify import verify
from btlm_jax.evaluate.documents import read_store
from btlm_jax.tokenizers.named_templates import NAMED_TEMPLATES
from btlm_jax.tokenizers.tokenizer import find_tokenizer
from btlm_jax.train.finish import heldout_batches
from btlm_jax.train.setup import check_curriculum

WINDOW, BLOCK = 96, 384
DAY = datetime(2026, 11, 30)
END, EOS = "<|im_end|>", tiny_tokenizers.EOS


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(tiny_tokenizers.TEXTS).split()[0] for _ in range(count))


def pairs(count: int, *, seed: int) -> list[dict]:
    rng = random.Random(seed)
    return [
        {"prompt": f"{number}é: {words(rng, rng.randint(0, 2))}", "completion": f" {words(rng, rng.randint(1, 4))} 漢"}
        for number in range(count)
    ]


def chats(count: int, *, seed: int) -> list[dict]:
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        turns = [{"role": "system", "content": "Be\nbrief."}] * (number % 3 == 0)
        for turn in range(rng.randint(1, 2)):
            turns += [
                {"role": "user", "content": f"{number}.{turn}?"},
                {"role": "assistant", "content": f"yes {number}"},
            ]
        rows.append({"messages": turns, "source": "chats"})
    return rows


def write(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows).encode()
    packed = {".zst": zstandard.compress, ".gz": gzip.compress}.get(path.suffix, bytes)(data)
    path.write_bytes(packed)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """The directory of a byte-level tokenizer with the tokens of ChatML and that template."""
    folder, made = tmp_path_factory.mktemp("tokenizer"), tiny_tokenizers.tiny_byte_level()
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in ("<|im_start|>", END)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(NAMED_TEMPLATES["chatml"])
    return folder


def run(source: Path, output: Path, tokenizer: Path, *flags: str) -> int:
    return main(
        ["corpus", "examples", f"--input={source}", f"--output={output}", f"--tokenizer={tokenizer}", "--workers=1",
         f"--block_len={BLOCK}", f"--window={WINDOW}", *flags]
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory) -> Path:
    """A folder of raw examples in three forms, one of them twice, and of the store of them in small shards."""
    folder = tmp_path_factory.mktemp("examples")
    given_pairs, given_chats = pairs(60, seed=1), chats(40, seed=2)
    write(folder / "raw" / "a.jsonl", given_pairs[:30])
    write(folder / "raw" / "more" / "b.jsonl.zst", [*given_pairs[30:], "", given_pairs[3]])
    write(folder / "raw" / "more" / "c.jsonl.gz", given_chats)
    (folder / "raw" / "README.md").write_text("about it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "BLOCKS_PER_SHARD", 5)
        patch.setattr("btlm_jax.corpus.engine.inputs.TASK_BYTES", 1)
        assert run(folder / "raw", folder / "store", tokenizer) == 0
    assert notices.counts() == {"file-not-read": 1}
    return folder


def expected_of(rows: list[dict]) -> dict[str, list[str]]:
    """Return what is trained of each example, by its first words: the text of each stretch with its end."""
    found = {}
    for row in rows:
        if "prompt" in row:
            found[row["prompt"]] = [row["completion"] + EOS]
        else:
            said = [turn["content"] + END for turn in row["messages"] if turn["role"] == "assistant"]
            users = [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
            found[users[0]] = said
    return found


def trained_of(folder: Path, split: str, *, seq_len: int) -> dict[str, list[str]]:
    """Read windows of a split as training does; return what is trained of each example, by the text of its prompt."""
    opened = open_store(folder / "store", expected_fingerprint="")
    reader, stored = opened.split(split), find_tokenizer(folder / "store")
    names = [stored.token(number) for number in range(stored.vocab_size)]

    def text_of(ids) -> str:
        return stored.decode(ids) + (names[ids[-1]] if ids[-1] in stored.special_ids else "")

    found: dict[str, list[str]] = {}
    places = [(block, start) for block in range(len(reader)) for start in range(0, BLOCK, seq_len)]
    rows = read_rows(reader, places, seq_len=seq_len, most_documents=1000)
    assert rows["starts_BT"].max() < seq_len and set(np.unique(rows["weights_BT"])) == {0, 1}
    for inputs, targets, weights, starts in zip(
        *(rows[name] for name in ("inputs_BT", "targets_BT", "weights_BT", "starts_BT")), strict=True
    ):
        for start in np.unique(starts):
            own = np.flatnonzero(starts == start)
            trained = own[weights[own] > 0]
            if not len(trained):
                continue
            stretches = np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1)
            prompt = stored.decode(inputs[start : trained[0] + 1].tolist())
            if "\n" in prompt:  # of ChatML: the first user's message
                prompt = prompt.split("user\n")[1].split("\n")[0]
            assert prompt not in found
            found[prompt] = [text_of(targets[stretch].tolist()) for stretch in stretches]
    return found


@pytest.mark.parametrize("seq_len", [WINDOW, BLOCK])
def test_completions_and_their_ends_are_trained_once_and_nothing_else(made, seq_len):
    """Of every example, in windows of the shortest phase and in whole blocks."""
    expected = expected_of(pairs(60, seed=1) + chats(40, seed=2))
    train, heldout = (trained_of(made, split, seq_len=seq_len) for split in (store.TRAIN, store.HELDOUT))
    assert len(train) == 95 and len(heldout) == 5 and not train.keys() & heldout.keys()
    assert train | heldout == expected


def test_padding_begins_where_examples_end_and_nothing_of_it_is_trained(made):
    """It is a document of its own: its queries see no example."""
    reader = open_store(made / "store", expected_fingerprint="").split(store.TRAIN)
    num_paddings = 0
    for block in reader.read_many(range(len(reader))):
        assert block.marks is not None
        for marks in block.marks[:-1].reshape(-1, WINDOW):
            is_padding = marks & store.PADDING > 0
            begin = len(marks) - int(is_padding.sum())
            assert is_padding[begin:].all() and not (marks[begin:] & store.TRAINED).any()
            begins = np.flatnonzero(is_padding & (marks & store.BEGINS > 0)).tolist()
            assert begins == [begin] * (0 < begin < len(marks)) or begin == 0
            num_paddings += begin < len(marks)
    assert num_paddings > 5


def test_examples_of_one_prompt_are_held_out_together(tokenizer, tmp_path):
    rows = [{"prompt": f"{number % 12}?", "completion": f" {number}"} for number in range(36)]
    write(tmp_path / "pairs.jsonl", rows)
    assert run(tmp_path / "pairs.jsonl", tmp_path / "store", tokenizer, "--heldout=0.2") == 0
    opened, prompts = open_store(tmp_path / "store", expected_fingerprint=""), {}
    stored = find_tokenizer(tmp_path / "store")
    for name in (store.TRAIN, store.HELDOUT):
        reader, prompts[name] = opened.split(name), []
        for block in reader.read_many(range(len(reader))):
            assert block.marks is not None
            for begin in np.flatnonzero(block.marks[:-1] & (store.BEGINS | store.PADDING) == store.BEGINS):
                end = begin + int((block.marks[begin:] & store.TRAINED > 0).argmax())
                prompts[name].append(stored.decode(block.tokens[begin:end].tolist()))
    assert len(prompts[store.HELDOUT]) == 9 and len(prompts[store.TRAIN]) == 27
    assert not set(prompts[store.TRAIN]) & set(prompts[store.HELDOUT])


def test_the_manifest_counts_what_is_trained(made):
    manifest = verify(made / "store", log=print)
    assert manifest.features == (store.EXAMPLES, store.SOURCES) and manifest.window == WINDOW
    stored = find_tokenizer(made / "store")
    for name, split in manifest.splits.items():
        found = trained_of(made, name, seq_len=WINDOW)
        assert sum(source.num_documents for source in split.sources.values()) == len(found)
        texts = [text for stretches in found.values() for text in stretches]
        num_bytes = sum(len(text.removesuffix(END).removesuffix(EOS).encode()) for text in texts)
        assert sum(source.num_bytes for source in split.sources.values()) == num_bytes
        assert split.num_tokens == sum(len(stored.encode_prompt(text)) for text in texts)
    assert set(manifest.splits[store.TRAIN].sources) == {"chats", "examples", "more"}
    assert "documents are examples, whole in windows of 96 tokens" in stats.describe(made / "store")
    counts = manifest.made_by["counts"]
    assert counts["read"] == 101 and counts["duplicates"] == 1 and counts["held out"] == 5
    source = tfds.builder_from_directory(str(made / "store")).as_data_source(store.TRAIN)
    block = open_store(made / "store", expected_fingerprint="").split(store.TRAIN).read(2)
    np.testing.assert_array_equal(source[2]["marks"], block.marks)
    np.testing.assert_array_equal(source[2]["tokens"], block.tokens)


def test_the_held_out_loss_is_over_completions_only(made):
    """The batches of an evaluation weigh as many targets as the manifest has trained ones, by source."""
    opened = open_store(made / "store", expected_fingerprint="")
    sharding = NamedSharding(jax.make_mesh((1,), ("fsdp",), devices=jax.devices()[:1]), PartitionSpec("fsdp"))
    weights: dict[str, float] = {}
    for sources, batch in heldout_batches(
        opened, batch_size=2, blocks_per_source=100, prefetch=1, sharding=sharding, most_documents=1000
    ):
        for source, weight in zip(sources, np.asarray(batch["weights_BT"]).sum(1).tolist(), strict=True):
            weights[source] = weights.get(source, 0) + weight
    expected = {name: source.num_tokens for name, source in opened.manifest.splits[store.HELDOUT].sources.items()}
    assert {name: weight for name, weight in weights.items() if name} == expected and sum(expected.values()) > 20


def test_each_example_is_evaluated_by_itself_over_what_is_trained(made):
    stored = find_tokenizer(made / "store")
    corpus = read_store(made / "store", stored, name="model")
    expected = trained_of(made, store.HELDOUT, seq_len=WINDOW)
    found = {}
    for document in corpus.documents:
        prompt_and_more = stored.decode(document.tokens.tolist())
        (key,) = [
            key for key in expected if prompt_and_more.lstrip().startswith(key) or f"user\n{key}" in prompt_and_more
        ]
        found[key] = document
    assert found.keys() == expected.keys() and len(corpus.documents) == len(expected)
    for key, document in found.items():
        assert document.num_targets == sum(len(stored.encode_prompt(text)) for text in expected[key])
    for name, source in (
        open_store(made / "store", expected_fingerprint="").manifest.splits[store.HELDOUT].sources.items()
    ):
        own = corpus.of_source(name)
        assert sum(document.num_targets for document in own) == source.num_tokens
        assert sum(document.num_bytes for document in own) == source.num_bytes


def test_what_was_killed_goes_on_to_the_same_bytes(made, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BLOCKS_PER_SHARD", 5)
    monkeypatch.setattr("btlm_jax.corpus.engine.inputs.TASK_BYTES", 1)
    shutil.copytree(made / "store", tmp_path / "store")
    for name in (
        "manifest.json",
        "work/windows/manifest.json",
        "work/encoded/ids-00001.npy",
        "work/shards/done/00001.json",
    ):
        (tmp_path / "store" / name).unlink()
    assert run(made / "raw", tmp_path / "store", tokenizer) == 0
    assert contents(tmp_path / "store") == contents(made / "store")


def test_more_tasks_than_open_files(tokenizer, tmp_path, monkeypatch):
    """A memory map keeps its file open."""
    lines = [json.dumps(row) for row in pairs(60, seed=1)]
    for number, line in enumerate(lines):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / f"{number:02d}.jsonl").write_text(line)
    monkeypatch.setattr("btlm_jax.corpus.engine.inputs.TASK_BYTES", 1)
    with limited_open_files(20):
        assert run(tmp_path / "raw", tmp_path / "many", tokenizer) == 0
    (tmp_path / "one.jsonl").write_text("\n".join(lines))
    assert run(tmp_path / "one.jsonl", tmp_path / "one", tokenizer) == 0
    many, one = (open_store(tmp_path / name, expected_fingerprint="") for name in ("many", "one"))
    for split in (store.TRAIN, store.HELDOUT):
        shards = [opened.manifest.splits[split].shards for opened in (many, one)]
        assert shards[0] == shards[1]


def test_a_template_that_asks_for_the_date_gets_that_of_the_beginning(tokenizer, tmp_path, monkeypatch):
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + NAMED_TEMPLATES["chatml"])
    for part in range(2):
        write(tmp_path / "raw" / f"{part}.jsonl", chats(20, seed=part))
    monkeypatch.setattr("btlm_jax.corpus.engine.inputs.TASK_BYTES", 1)

    class Clock(datetime):
        day = 30

        @classmethod
        def now(cls, tz=None):
            return cls(2026, 11, cls.day, 23, 59)

    monkeypatch.setattr(stage, "datetime", Clock)
    flags = ["--template", str(template)]
    assert run(tmp_path / "raw", tmp_path / "store", tokenizer, *flags) == 0
    before = contents(tmp_path / "store")
    assert first_prompt(tmp_path / "store").startswith("30 Nov 2026<|im_start|>")
    for name in ("manifest.json", "work/encoded/ids-00001.npy", "work/windows/manifest.json"):
        (tmp_path / "store" / name).unlink()
    Clock.day = 29
    assert run(tmp_path / "raw", tmp_path / "store", tokenizer, *flags) == 0
    assert contents(tmp_path / "store") == before
    assert run(tmp_path / "raw", tmp_path / "other", tokenizer, *flags) == 0
    assert first_prompt(tmp_path / "other").startswith("29 Nov 2026<")
    with monkeypatch.context() as earlier:
        earlier.setattr(stage, "ASKS_TIME", "no template")
        named = {"eos_token": EOS, "cls_token": "<none>"}  # the latter is no token
        earlier.setattr(example_encoding, "read_variables", lambda *given, **rest: named)
        assert run(tmp_path / "raw", tmp_path / "old", tokenizer, *flags) == 0
    assert run(tmp_path / "raw", tmp_path / "old", tokenizer, *flags) == 0  # a plan that does not have the date
    naming = shutil.copytree(tokenizer, tmp_path / "naming")
    (naming / "tokenizer_config.json").write_text('{"cls_token": "<none>"}')
    assert run(tmp_path / "raw", tmp_path / "named", naming, *flags) == 0
    assert notices.counts()["config-keys-dropped"] == 1  # not by every task


def test_marks_that_contradict_the_manifest_are_found(made, tmp_path):
    manifest = store.read_manifest(made / "store")
    with pytest.raises(ValueError, match="window=36 is not possible with block_len=384"):
        rewrite(made / "store", tmp_path / "other", window=36)
    split = manifest.splits[store.HELDOUT]
    name, source = next(iter(split.sources.items()))
    wrong = dataclasses.replace(split, sources=split.sources | {name: dataclasses.replace(source, num_tokens=1)})
    rewrite(made / "store", tmp_path / "counts", splits=manifest.splits | {store.HELDOUT: wrong})
    with pytest.raises(ValueError, match="its manifest says"):
        verify(tmp_path / "counts", log=print)


def rewrite(directory: Path, copy: Path, **changes) -> store.Manifest:
    shutil.copytree(directory, copy)
    store.write_manifest(copy, dataclasses.replace(store.read_manifest(directory), **changes))
    return store.read_manifest(copy)


BAD_LINES = [
    ('{"prompt": "a"', "not JSON"),
    ('["a"]', "not an object but list"),
    ('{"prompt": "a"}', "there is no completion"),
    ('{"completion": "a"}', "there is no prompt"),
    ('{"prompt": "a", "completion": ""}', "the completion is empty"),
    ('{"prompt": ["a"], "completion": "b"}', "prompt is a list, not a text"),
    (
        '{"instruction": "a", "output": "b"}',
        "neither messages nor prompt and completion; its keys are instruction, output",
    ),
    ('{"messages": []}', "no messages"),
    ('{"messages": "a"}', "messages are a text, not a list"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "no message is the assistant's, so there is nothing to train"),
    (
        '{"messages": [{"role": "human", "content": "a"}]}',
        "message 1 has the role 'human'; roles are system, .*; user is",
    ),
    ('{"messages": [{"from": "human", "value": "a"}]}', "message 1 has no role; its keys are from and value"),
    ('{"messages": [{"role": "assistant", "content": ""}]}', "message 1 of the assistant is empty"),
    ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "message 1 has content that is a list, not a"),
    ('{"messages": [{"role": "user"}]}', "message 1 has no content"),
    ('{"messages": ["a"]}', "message 1 is a text, not an object"),
    ('{"messages": [{"role": "assistant", "content": "a"}], "completion": "b"}', "both messages and a completion"),
]


def test_bad_lines_are_refused_by_file_and_line_or_left_out_and_counted(tokenizer, tmp_path, capsys):
    write(tmp_path / "bad.jsonl", [line for line, _ in BAD_LINES] + pairs(4, seed=3))
    assert run(tmp_path / "bad.jsonl", tmp_path / "store", tokenizer) == 1
    said = capsys.readouterr().err
    assert "error: bad.jsonl, line 1: not JSON" in said and f"{len(BAD_LINES)} of {len(BAD_LINES) + 4} lines" in said
    quarantine = tmp_path / "store/work/encoded/quarantine/00000.jsonl"
    defects = [json.loads(line) for line in quarantine.read_text().splitlines()]
    for number, ((_, reason), defect) in enumerate(zip(BAD_LINES, defects, strict=True), start=1):
        assert (defect["file"], defect["line"]) == ("bad.jsonl", number)
        assert re.search(reason, defect["reason"]), (reason, defect)
    assert run(tmp_path / "bad.jsonl", tmp_path / "store", tokenizer, "--max_bad_rate=0.9") == 0
    assert notices.counts()["line-quarantined"] == len(BAD_LINES)
    assert "are bad and left out, bad.jsonl, line 1: not JSON" in capsys.readouterr().err


def test_files_that_cannot_be_read_whole_are_refused(tokenizer, tmp_path, capsys):
    for name, data, message in (
        ("a.jsonl.zst", zstandard.compress(b"{}" * 999)[:-3], "cut short"),
        ("b.jsonl", b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        ("c.txt", b"text", "no lines of JSON"),
        ("d.jsonl", b"\n", "no line in the files"),
    ):
        (tmp_path / name).write_bytes(data)
        assert run(tmp_path / name, tmp_path / f"store-{name}", tokenizer) == 1
        assert message in capsys.readouterr().err


def test_messages_without_a_template_and_refused_by_one_name_file_and_line(tokenizer, tmp_path, capsys):
    write(tmp_path / "chats.jsonl", chats(6, seed=1))
    bare = tmp_path / "bare"
    bare.mkdir()
    tiny_tokenizers.tiny_byte_level().save(str(bare / "tokenizer.json"))
    assert run(tmp_path / "chats.jsonl", tmp_path / "a", bare) == 1
    said = capsys.readouterr().err
    assert "chats.jsonl, line 1: it has messages, and the tokenizer's directory has no chat" in said
    assert "None of 6 lines is an example" in said
    (tmp_path / "own.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    assert run(tmp_path / "chats.jsonl", tmp_path / "b", bare, f"--template={tmp_path / 'own.jinja'}") == 1
    assert "own.jinja cannot render it: no system" in capsys.readouterr().err
    (tmp_path / "own.jinja").write_text("{% for %}")
    assert run(tmp_path / "chats.jsonl", tmp_path / "c", bare, f"--template={tmp_path / 'own.jinja'}") == 1
    assert "own.jinja cannot be read" in capsys.readouterr().err
    # Without the tokens of ChatML its marks are text, and nothing tells a model where to stop.
    assert run(tmp_path / "chats.jsonl", tmp_path / "d", bare, "--template=chatml", "--too_long=truncate") == 0
    assert notices.counts()["no-end-token"] == 6


def test_what_is_longer_than_the_window_is_cut_or_left_out_and_counted(tokenizer, tmp_path, capsys):
    long_completion = {"prompt": "a", "completion": " b" * WINDOW}
    long_prompt = {"prompt": "a" * 9 * WINDOW, "completion": "b"}
    write(tmp_path / "long.jsonl", [*pairs(3, seed=1), long_completion, long_prompt])
    assert run(tmp_path / "long.jsonl", tmp_path / "cut", tokenizer) == 0
    assert notices.counts() == {"example-cut": 1, "example-too-long": 1}
    assert "1 of 5 examples are longer than the window of 96 tokens, and are cut at its end" in capsys.readouterr().err
    assert run(tmp_path / "long.jsonl", tmp_path / "drop", tokenizer, "--too_long=drop") == 0
    assert notices.counts() == {"example-too-long": 2}
    cut, dropped = (store.read_manifest(tmp_path / name).splits for name in ("cut", "drop"))
    assert (
        sum(split.num_tokens for split in cut.values()) - sum(split.num_tokens for split in dropped.values())
        == WINDOW - 1
    )
    write(tmp_path / "all.jsonl", [long_prompt])
    assert run(tmp_path / "all.jsonl", tmp_path / "none", tokenizer) == 1
    assert (
        "all 1 examples are longer than the window of 96 tokens, and their completions lie" in capsys.readouterr().err
    )
    assert run(tmp_path / "long.jsonl", tmp_path / "strict", tokenizer, "--strict=example-cut") == 1


def test_names_of_special_tokens_stand_for_them_which_is_said(tokenizer, tmp_path):
    rows = [{"prompt": "<|im_start|>user\nhi<|im_end|>\n", "completion": f"hello{EOS}"}, *pairs(3, seed=4)]
    write(tmp_path / "named.jsonl", rows)
    assert run(tmp_path / "named.jsonl", tmp_path / "store", tokenizer, "--heldout=0.2") == 0
    assert notices.counts() == {"special-token-named": 1}
    encoder = ExampleEncoder(find_tokenizer(tokenizer), directory=tokenizer, template="", template_name="", now=DAY)
    encoded = encoder.encode(Pair(**rows[0]))
    eos = encoder.tokenizer.eos_id
    assert encoded.ids.tolist().count(eos) == 1 and encoded.ids[-1] == eos  # it is not written twice


def test_completions_are_encoded_as_after_their_prompts(tmp_path):
    """A tokenizer that puts a space before a text puts none before a completion."""
    made = tiny_tokenizers.trained(add_dummy_prefix=True, remove_extra_whitespaces=False, byte_fallback=True)
    (tmp_path / "tokenizer.model").write_bytes(made.contents)
    tokenizer = find_tokenizer(tmp_path)
    encoder = ExampleEncoder(tokenizer, directory=tmp_path, template="", template_name="", now=DAY)
    for prompt, completion in (("eta", "oin"), ("eta ", "oin"), ("eta", " oin"), ("eta", "\noin")):
        encoded = encoder.encode(Pair(prompt=prompt, completion=completion))
        assert tokenizer.decode(encoded.ids.tolist()) == prompt + completion
        assert encoded.prompt.tolist() == tokenizer.encode(prompt)
    source = "{% generation %}{{ messages[0].content }}{% endgeneration %}"  # before which nothing stands
    bare = ExampleEncoder(tokenizer, directory=tmp_path, template=source, template_name="it", now=DAY)
    chat = bare.encode(Conversation(messages=({"role": "assistant", "content": "eta oin"},), tools=None))
    assert not chat.is_trained[0] and chat.is_trained[1:].all()
    empty = encoder.encode(Pair(prompt="", completion="oin"))
    assert empty.prompt.tolist() == [tokenizer.eos_id] and empty.is_trained[1:].all()


def test_one_prompt_is_on_one_side():
    rng = np.random.default_rng(3)
    prompt_N, whole_N = rng.integers(0, 40, 400).astype(np.uint64), np.arange(400).astype(np.uint64)
    is_out_N, by_prompt = stage.hold_out(prompt_N, whole_N, share=0.1)
    assert by_prompt and 40 <= is_out_N.sum() < 60
    assert not set(prompt_N[is_out_N].tolist()) & set(prompt_N[~is_out_N].tolist())
    is_out_N, by_prompt = stage.hold_out(np.zeros(9, np.uint64), np.arange(9).astype(np.uint64), share=0.2)
    assert not by_prompt and is_out_N.sum() == 2
    with pytest.raises(ValueError, match="1 different examples are too few"):
        stage.hold_out(whole_N[:1], whole_N[:1], share=0.5)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(1, 5))
@settings(max_examples=60)
def test_packing_is_best_fit_of_the_longest_first(lengths, most):
    window_N = pack_windows(lengths, window=20, most=most)
    rooms, counts, expected = [], [], {}
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        fitting = [w for w, room in enumerate(rooms) if room >= lengths[number] and counts[w] < most]
        if not fitting:
            rooms.append(20)
            counts.append(0)
            fitting = [len(rooms) - 1]
        chosen = min(fitting, key=lambda w: rooms[w])
        rooms[chosen] -= lengths[number]
        counts[chosen] += 1
        expected[number] = rooms[chosen]
    found_rooms = np.full(len(rooms), 20)
    np.subtract.at(found_rooms, window_N, lengths)
    # Windows of equal room are exchangeable: that as many are left with each room says the rule.
    assert sorted(found_rooms.tolist()) == sorted(rooms) and (found_rooms >= 0).all()
    assert not len(lengths) or np.bincount(window_N).max() <= most


def test_windows_with_few_examples_are_made_on_request_and_others_refused_where_attention_cannot(
    tokenizer, tmp_path, monkeypatch
):
    rows = [{"prompt": "a", "completion": f"{number}"} for number in range(90)]
    write(tmp_path / "short.jsonl", rows)
    config = tiny_config(
        curriculum__seq_len=(WINDOW, BLOCK), curriculum__batch_size=(4, 1), curriculum__num_tokens=(BLOCK, BLOCK),
        optimizer__warmup_tokens=BLOCK, data__document_mask=True, data__max_epochs=9,
    )  # fmt: skip
    manifests = {}
    for most in (0, 6):
        assert run(tmp_path / "short.jsonl", tmp_path / f"{most}", tokenizer, f"--most_examples={most}") == 0
        manifests[most] = store.read_manifest(tmp_path / f"{most}")
        reader = open_store(tmp_path / f"{most}", expected_fingerprint="").split(store.TRAIN)
        num_documents = [
            int((block.marks[:-1] & store.BEGINS > 0).sum()) for block in reader.read_many(range(len(reader)))
        ]
        assert manifests[most].made_by["counts"][store.MOST_DOCUMENTS] == max(num_documents)
        check_curriculum(config, manifests[most])
    monkeypatch.setattr("btlm_jax.train.setup.most_documents", lambda model: 30)
    check_curriculum(config, manifests[6])
    with pytest.raises(ValueError, match=r"keeps no more than 30 apart here: .* --most_examples=6,"):
        check_curriculum(config, manifests[0])
