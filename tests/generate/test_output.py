"""The file of texts: what it may replace, and what a full disk or a damaged rest of an earlier start leads to."""

import json
import os
import resource

import pytest

from btlm_jax import notices
from btlm_jax.generate.output import TextsFile, check_output

LINE = json.dumps({"prompt": "", "sample": 0, "text": "é", "num_tokens": 1, "ended_by": "length"}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("link", "is a link to other; it is not replaced: give the file's own name"),
        ("dangling", "is a link to nowhere; it is not replaced"),
        ("pipe", "is no regular file and is not replaced; without --output texts go to standard output"),
        ("prompts", "is the file of prompts itself; give another name"),
        ("config.json", "exists and holds something else than texts of btlm generate"),
        ("bytes", "exists and holds something else than texts of btlm generate"),
        ("partial is a link", "texts.jsonl.partial is a link to other"),
        ("directory", "is a directory; give the name of a file"),
    ],
)
def test_what_is_not_a_file_of_texts_is_not_replaced(tmp_path, kind, message):
    path, prompts = tmp_path / "texts.jsonl", tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}')
    (tmp_path / "other").write_text("precious")
    {
        "link": lambda: path.symlink_to("other"),
        "dangling": lambda: path.symlink_to("nowhere"),
        "pipe": lambda: os.mkfifo(path),
        "prompts": lambda: path.hardlink_to(prompts),
        "config.json": lambda: path.write_text('{"model_type": "btlm",\n"text": 1}'),
        "bytes": lambda: path.write_bytes(bytes(range(256))),
        "partial is a link": lambda: (tmp_path / "texts.jsonl.partial").symlink_to("other"),
        "directory": lambda: path.mkdir(),
    }[kind]()
    with pytest.raises((ValueError, OSError), match=message):
        check_output(path, prompts_file=prompts)
    assert (tmp_path / "other").read_text() == "precious"


def test_earlier_texts_and_empty_files_are_replaced(tmp_path):
    path = tmp_path / "texts.jsonl"
    notices.begin(strict=())
    check_output(path, prompts_file=None)
    path.touch()
    check_output(path, prompts_file=None)
    assert notices.counts() == {}
    path.write_text(LINE + "\n")
    check_output(path, prompts_file=None)
    assert notices.counts() == {"output-replaced": 1}
    notices.begin(strict=["output-replaced"])
    with pytest.raises(notices.StrictError, match="holds texts, which are replaced when all new ones are made"):
        check_output(path, prompts_file=None)
    notices.begin(strict=())


def texts_file(path, **settings) -> TextsFile:
    return TextsFile(path, settings={"seed": 1, "sampling": {"top_p": 0.1}, "stops": ("a",)} | settings, num_texts=3)


def test_a_full_disk_is_named_and_the_same_command_goes_on(tmp_path):
    path = tmp_path / "texts.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    texts = texts_file(path)
    texts.add(2, LINE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (texts.partial.stat().st_size + 30, hard))  # in the next line
        with pytest.raises(
            OSError, match=r"texts.jsonl.partial cannot be written: File too large; 1 of 3 texts are in"
        ):
            texts.add(0, LINE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    texts.close()
    again = texts_file(path)
    assert again.done == {2}
    again.add(1, LINE)
    again.add(0, LINE.replace("é", "0"))
    again.finish()
    assert path.read_text() == "\n".join([LINE.replace("é", "0"), LINE, LINE]) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_the_rest_of_an_earlier_start_is_read_as_far_as_it_is_whole(tmp_path):
    path = tmp_path / "texts.jsonl"
    texts = texts_file(path)
    for number in range(3):
        texts.add(number, LINE)
    texts.close()
    whole = texts.partial.read_bytes()
    first, second = whole.index(b"\n") + 1, whole.index(b"\n1\t") + 1
    for contents, done in (
        (whole, {0, 1, 2}),
        (whole[:-1], {0, 1}),
        (whole[:second], {0}),
        (whole[:second] + bytes(200), {0}),
        (whole[:second] + b"7\t{}\n" + whole[second:], {0}),
        (whole[:second] + b"3\t{}\n" + whole[second:], {0}),
        (whole[:second] + b'1\t{"text": \n' + whole[second:], {0}),
        (whole[:first], set()),
        (whole[: first - 4], set()),
        (b"", set()),
    ):
        texts.partial.write_bytes(contents)
        again = texts_file(path)
        assert again.done == done
        for number in {0, 1, 2} - done:
            again.add(number, LINE)
        again.close()
        assert again.done == {0, 1, 2} and texts_file(path).done == {0, 1, 2}
    with pytest.raises(ValueError, match=r"of another command \(bos: None there, 5 now; seed: 1 there, 2 now\)"):
        texts_file(path, seed=2, bos=5)
    for contents in (b"precious\n", b"[]\n", b"precious", b'{"btlm generate": 5}\n'):
        texts.partial.write_bytes(contents)
        with pytest.raises(ValueError, match="is not an unfinished output of btlm generate; delete it or give another"):
            texts_file(path)
