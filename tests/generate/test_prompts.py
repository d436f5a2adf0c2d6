"""Files of prompts: what is read, and what is refused with its line."""

import pytest

from btlm_jax.generate.prompts import read_prompts


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
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, name, contents, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path, name, contents))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file of prompts .*nowhere.txt"):
        read_prompts(tmp_path / "nowhere.txt")
