"""Examples in one go: files are told apart, and the window holds nearly all of them."""

import gzip
import json
from datetime import datetime

import pytest
import zstandard
from support.tiny_tokenizers import EOS, tiny_byte_level

from btlm_jax.corpus import own_examples
from btlm_jax.corpus.engine.inputs import raw_inputs
from btlm_jax.corpus.engine.workers import LocalWorkers
from btlm_jax.corpus.example_encoding import make_encoder
from btlm_jax.data.store import read_manifest

PAIR = {"prompt": "a", "completion": "b"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
TEXT = {"text": "a document", "prompt": "p", "completion": "c"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def encoder(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    tiny_byte_level().save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    return make_encoder(tmp_path / "tokenizer", template=("", ""), now=datetime(2026, 11, 30))


def test_files_of_examples_are_told_from_files_of_documents(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = f"\n{json.dumps(CHAT)}\n".encode()
    for name, data, expected in (
        ("a.jsonl", b"\xef\xbb\xbf" + json.dumps(PAIR).encode(), True),
        ("b.jsonl.zst", zstandard.compress(lines), True),
        ("c.jsonl.gz", gzip.compress(lines), True),
        ("d.jsonl", json.dumps(TEXT).encode(), False),
        ("e.txt", lines, False),
        ("f.jsonl", b"no JSON", False),
        ("g.jsonl", b"", False),
        ("h.jsonl", b"no JSON\n" + lines, True),
        ("i.jsonl.zst", b"no zstd", False),
        ("j.log", b"[1] a log, not lines of JSON", False),
    ):
        (folder / name).write_bytes(data)
        assert own_examples.are_examples(raw_inputs(folder / name)) is expected, name
    with pytest.raises(ValueError, match=r"both examples to fine-tune on \(a.jsonl\) and documents \(d.jsonl\)"):
        own_examples.are_examples(raw_inputs(folder))


def test_lines_that_are_neither_documents_nor_examples_are_named_with_their_keys(tmp_path):
    """Forms of other tools, and arrays, which no reader takes; beside files that can be read they are bad lines."""
    for number, (text, said) in enumerate(
        (
            ('{"prompt": "a"}', "has lines with the keys prompt, which are no examples"),
            ('{"conversations": [{"from": "human", "value": "a"}]}', "lines with the keys conversations"),
            ('{"instruction": "a", "output": "b"}', "lines with the keys instruction, output"),
            (json.dumps([CHAT]), "is a JSON array, not lines of JSON: jq"),
            (json.dumps([CHAT], indent=1), "is a JSON array"),
        )
    ):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(f"{text}\n")
        with pytest.raises(ValueError, match=f"--data cannot be read: {path.name} .*{said}"):
            own_examples.are_examples(raw_inputs(path))
    write(tmp_path / "z.jsonl", [CHAT])
    assert own_examples.are_examples(raw_inputs(tmp_path))


@pytest.mark.parametrize(("least", "most", "window"), [(4, 1024, 64), (128, 1024, 128), (4, 32, 32)])
def test_the_window_holds_nearly_all_examples(encoder, tmp_path, least, most, window):
    """The longest of 100 examples has over 200 ids, the next 53: a prompt, 51 ids and the end."""
    rows = [{"prompt": "a", "completion": "b" * number} for number in (*range(1, 52), *range(2, 50), 200)]
    write(tmp_path / "a.jsonl", [*rows[:50], {"bad": 1}, *rows[50:]])
    lengths = sorted(len(encoder.encode(own_examples.parse_example(row))) for row in rows)
    assert lengths[-1] > 64 >= lengths[-2] > 32
    inputs = raw_inputs(tmp_path / "a.jsonl")
    found = own_examples.choose_window(inputs, encoder=encoder, least=least, most=most, folder=tmp_path)
    assert found == window


def test_the_sample_prompt_is_a_held_out_one_with_special_tokens_by_name(encoder, tmp_path):
    write(tmp_path / "a.jsonl", [{"prompt": "", "completion": f"{number}"} for number in range(9)])
    manifest = own_examples.make_store(
        [tmp_path / "a.jsonl"], tokenizer=tmp_path / "tokenizer", template=("", ""), window=16, block_len=16,
        most_examples=0, output=tmp_path / "store", workers=LocalWorkers(1), log=print,
    )  # fmt: skip
    assert manifest == read_manifest(tmp_path / "store")
    assert own_examples.first_prompt(tmp_path / "store") == EOS  # before which an empty prompt begins
    write(tmp_path / "b.jsonl", [{"prompt": f"é {EOS}{EOS} x{number}", "completion": "y"} for number in range(9)])
    own_examples.make_store(
        [tmp_path / "b.jsonl"], tokenizer=tmp_path / "tokenizer", template=("", ""), window=32, block_len=32,
        most_examples=0, output=tmp_path / "other", workers=LocalWorkers(1), log=print,
    )  # fmt: skip
    assert own_examples.first_prompt(tmp_path / "other")[:-1] == f"é {EOS}{EOS} x"
