"""Files of prompts: what is read, and what is refused with its line."""

import json
import os
import threading

import pytest
from support.tiny_tokenizers import EOS, TEXTS, tiny_byte_level

from btlm_jax.generate.prompts import read_prompts
from btlm_jax.tokenizers.byte_level import ByteLevelTokenizer
from btlm_jax.tokenizers.prompt_bos import prompt_ids
from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer, train_sentencepiece


def write(tmp_path, name, contents):
    path = tmp_path / name
    path.write_bytes(contents)
    return path


def test_lines_are_prompts_as_they_stand(tmp_path):
    path = write(tmp_path, "p.txt", "\ufeff  two é\r\nthree\u2028 {\n\tfour ".encode())
    assert [prompt.text for prompt in read_prompts(path)] == ["  two é", "three\u2028 {", "\tfour "]


def test_json_lines_keep_the_other_keys(tmp_path):
    path = write(tmp_path, "p.jsonl", b'{"prompt": "a\\nb", "id": 7}\n{"prompt": ""}\n')
    assert [(prompt.text, prompt.extra) for prompt in read_prompts(path)] == [("a\nb", {"id": 7}), ("", {})]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("p.txt", b"", r"p.txt is empty: write one prompt a line"),
        ("p.jsonl", b"", r"p.jsonl is empty"),
        ("p.txt", b"one\n\nthree\n", r"p.txt, line 2: it is blank; delete it, or write"),
        ("p.txt", b"one\ntwo\n\xff\n", r"p.txt, line 3: 'utf-8' codec can't decode byte 0xff"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"p.jsonl, line 2: it is not JSON .* like {.prompt.: .text.}"),
        ("p.jsonl", b"\n", r"line 1: it is not JSON"),
        ("p.jsonl", b'["prompt"]\n', r'line 1: it has no "prompt" that is a string'),
        ("p.jsonl", b'{"Prompt": "a"}\n', r'line 1: it has no "prompt" that is a string'),
        ("p.jsonl", b'{"prompt": 5}\n', r'line 1: it has no "prompt" that is a string'),
        ("p.jsonl", b'{"prompt": "a", "text": "b"}\n', r"line 1: its key 'text' is one that generate writes"),
        ("p.jsonl", b'{"prompt": "a\\ud800"}\n', r"line 1: its prompt is not valid Unicode: .* at character 2"),
        ("p.jsonl", b"[" * 100_000, r"line 1: it is not JSON \(maximum recursion depth"),
        ("p.jsonl", b'{"prompt": "", "n": ' + b"9" * 5000 + b"}", r"line 1: it is not JSON \(Exceeds the limit"),
        # what would be lost, or make the output invalid, when the text is made
        (
            "p.jsonl",
            b'{"prompt": ""}\n{"prompt": "", "note": "\\ud800"}',
            r"line 2: its key 'note' or a text in it is not val",
        ),
        (
            "p.jsonl",
            b'{"prompt": "", "a": [{"\\udfff": 1}]}',
            r"line 1: its key 'a' or a text in it is not valid Unicode",
        ),
        ("p.jsonl", b'{"prompt": "", "\\ud800": 1}', r"line 1: its key '.ud800' or a text in it is not valid Unicode"),
        ("p.jsonl", b'{"prompt": "", "x": NaN}', r"line 1: NaN in it is not JSON, and could not be written"),
        ("p.jsonl", b'{"prompt": "", "x": [-Infinity]}', r"line 1: -Infinity in it is not JSON"),
        ("p.jsonl", b'{"prompt": "", "x": {"y": 1e999}}', r"line 1: the number 1e999 in it is too large"),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}', r"line 1: its key 'prompt' is given twice"),
        (
            "p.jsonl",
            b'{"prompt": "a", "x": ' + b"[" * 101 + b"]" * 101 + b"}",
            r"line 1: it is nested more than 100 deep",
        ),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, name, contents, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path, name, contents))


def test_other_keys_come_back_as_they_were(tmp_path):
    extra = {"a": [1, 2.5e-300, None, True, {"é\u2028": "\U0001f600\x00"}], "n": 10**4000, "": "", "deep": [[[[]]]]}
    (prompt,) = read_prompts(write(tmp_path, "p.jsonl", json.dumps({"prompt": "x"} | extra).encode()))
    assert prompt.extra == extra


def test_a_pipe_is_read_and_a_device_or_folder_is_not(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"one\ntwo\n",))
    writer.start()
    assert [prompt.text for prompt in read_prompts(pipe)] == ["one", "two"]
    writer.join()
    for path in (tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="is no file: give a file of one prompt a line"):
            read_prompts(type(tmp_path)(path))


def test_only_an_empty_prompt_or_the_models_files_put_an_id_in_front():
    byte_level = ByteLevelTokenizer(tiny_byte_level().to_str().encode(), eos_id=299)
    sentencepiece = SentencePieceTokenizer(train_sentencepiece(TEXTS, vocab_size=400))
    for tokenizer, name in ((byte_level, EOS), (sentencepiece, "</s>")):
        eos, eta, o = tokenizer.eos_id, tokenizer.encode("eta"), tokenizer.encode(" o")
        for text, bos_id, expected in (
            ("eta", None, eta),
            ("", None, [eos]),
            ("eta", 7, [7, *eta]),
            ("", 7, [7]),
            (f"eta{name} o{name}{name}", None, [*eta, eos, *o, eos, eos]),  # as documents in training
            (name, None, [eos]),
        ):
            assert prompt_ids(text, tokenizer=tokenizer, bos_id=bos_id) == expected
        assert eos not in tokenizer.encode(f"eta{name}")  # a text of training is text


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file of prompts .*nowhere.txt"):
        read_prompts(tmp_path / "nowhere.txt")
