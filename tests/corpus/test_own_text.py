"""From text to a split in one go: what is held out exists, is honest and of the size promised; bad text is refused."""

import itertools
import json
import random
import re
from collections import Counter

import pytest
from support.corpus_files import contents, made_up_text, write_raw

from btlm_jax import notices
from btlm_jax.corpus import own_text
from btlm_jax.corpus.engine.inputs import raw_inputs_of, read_stage
from btlm_jax.corpus.engine.workers import LocalWorkers
from btlm_jax.corpus.readers import raw
from btlm_jax.corpus.readers.records import read_records
from btlm_jax.corpus.stages.pieces import pieces_of

BOOK = "\n\n".join(made_up_text(seed=seed, num_words=200) for seed in range(130))  # 170 kB


def prepare(directory, *locations):
    own_text.check_inputs(raw_inputs_of(locations))
    return own_text.split_text(locations, directory=directory, workers=LocalWorkers(1), log=lambda line: None)


def parts_of(text):
    """The documents of each side: {split: {id: text}}."""
    found = {}
    for output in read_stage(text.folder)["outputs"]:
        side = found.setdefault(output["split"], {})
        side.update((record.id, record.text) for record in read_records(text.folder / output["file"]))
    return found


@pytest.mark.parametrize(
    ("num_bytes", "wanted"),
    [
        (64_000, 16_000),
        (200_000, 16_000),
        (320_000, 16_000),
        (1_000_000, 50_000),
        (10**12, 1_000_000),
        (20_000, 10_000),
    ],
)
def test_five_percent_are_held_out_but_sixteen_kilobytes_and_never_more_than_half(num_bytes, wanted):
    assert own_text.heldout_target(num_bytes) == wanted


@pytest.mark.parametrize("size", [64_000, 150_000])
def test_of_one_file_contiguous_pieces_are_held_out_and_nothing_is_lost(tmp_path, size):
    book = BOOK[:size]
    (tmp_path / "book.txt").write_text(book)
    text = prepare(tmp_path / "made", tmp_path / "book.txt")
    parts = parts_of(text)
    heldout = sum(len(piece) for piece in parts["validation"].values())
    assert 16_000 <= heldout <= 16_000 + 6_000 and len(parts["validation"]) > 2
    pieces = parts["train"] | parts["validation"]
    in_order = sorted(pieces, key=lambda name: int(name.partition("#")[2]))
    assert "".join(pieces[name] for name in in_order) == book
    assert not parts["train"].keys() & parts["validation"].keys()
    assert text.train_bytes == size - heldout
    assert (tmp_path / "made" / "heldout.txt").read_text() == "\n".join(parts["validation"].values())
    assert f"{heldout:,} bytes ({heldout / size:.1%})" in text.lines[1] and "contiguous" in text.lines[1]


def test_of_many_documents_whole_ones_are_held_out(tmp_path):
    texts = [made_up_text(seed=seed, num_words=300) for seed in range(200)]
    write_raw(tmp_path / "raw.jsonl.zst", texts, source="S")
    text = prepare(tmp_path / "made", tmp_path / "raw.jsonl.zst")
    parts = parts_of(text)
    assert {*parts["train"].values(), *parts["validation"].values()} == set(texts)
    sizes = [len(one) for one in parts["validation"].values()]
    target = own_text.heldout_target(sum(map(len, texts)))
    assert target <= sum(sizes) < target + max(map(len, texts))
    assert "contiguous" not in text.lines[1]
    assert not (tmp_path / "made" / "pieces").exists()


def test_a_repetition_inside_a_book_is_on_one_side_only(tmp_path):
    """Half of the book stands in it twice: whatever of it is held out is not trained on."""
    half = BOOK[:70_000]
    (tmp_path / "book.txt").write_text("\n\n".join([half, BOOK[70_000:], half]))
    parts = parts_of(prepare(tmp_path / "made", tmp_path / "book.txt"))
    trained = " ".join(parts["train"].values())
    lines = [line for piece in parts["validation"].values() for line in piece.splitlines() if len(line) > 40]
    assert len(lines) > 100
    assert sum(line in trained for line in lines) < 0.1 * len(lines)


def test_an_interruption_after_any_stage_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text(BOOK)
    prepare(tmp_path / "whole", tmp_path / "book.txt")
    for name in ("clean", "divide", "deduplicate", "split"):
        stage = getattr(own_text, name)

        def interrupted(*arguments, stage=stage, **named):
            stage(*arguments, **named)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(own_text, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                prepare(tmp_path / "killed", tmp_path / "book.txt")
    prepare(tmp_path / "killed", tmp_path / "book.txt")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_subfolders_are_sources(tmp_path):
    for number in range(60):
        folder = tmp_path / "texts" / ("poems" if number % 2 else "letters")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(made_up_text(seed=number, num_words=300))
    (tmp_path / "texts" / "top.md").write_text(made_up_text(seed=99, num_words=300))
    text = prepare(tmp_path / "made", tmp_path / "texts")
    assert set(read_stage(tmp_path / "made" / "clean")["totals"]["written"]) == {"poems", "letters", "text"}
    assert "of 3 sources (letters, poems, text)" in text.lines[0]


def test_several_paths_are_sources_and_a_file_is_read_once(tmp_path, capsys):
    for name in (
        "a/texts/one.txt",
        "b/texts/two.txt",
        "x/en/c/one.txt",
        "y/en/c/one.txt",
        "single.txt",
        "a/single.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(*roots) -> list[str]:
        return [item.name for item in raw_inputs_of([tmp_path / root for root in roots])]

    notices.begin(strict=())
    assert names("a/texts", "single.txt", "a/texts/one.txt", "a/texts") == ["texts/one.txt", "single.txt"]
    assert notices.counts() == {"file-read-once": 1} and "one.txt is given more than once" in capsys.readouterr().err
    assert names("a/texts", "b/texts", "single.txt") == ["a/texts/one.txt", "b/texts/two.txt", "single.txt"]
    assert names("x/en/c", "y/en/c", "b/texts") == ["x/en/c/one.txt", "y/en/c/one.txt", "texts/two.txt"]
    assert names("single.txt", "a/single.txt") == [f"{tmp_path.name}/single.txt", "a/single.txt"]
    assert names("x/en", "y/en/c/one.txt", "b/texts/two.txt") == ["en/c/one.txt", "one.txt", "two.txt"]
    for name in ("UPPER.TXT", "README", "a.csv", "b.csv"):
        (tmp_path / "x" / name).write_text(name)
    capsys.readouterr()
    for _ in range(2):  # a listing that is made again is neither said nor counted again
        assert names("x") == ["UPPER.TXT", "en/c/one.txt"]
    said = "note: {}: 3 files of other kinds are not read, README for one (2 .csv, 1 no suffix) (file-not-read)\n"
    assert capsys.readouterr().err == said.format(tmp_path / "x") and notices.counts()["file-not-read"] == 3
    (tmp_path / "x" / "UPPER.TXT").unlink()
    assert names("x", "y", "y/en/c", "a/texts/one.txt") == ["x/en/c/one.txt", "y/en/c/one.txt", "one.txt"]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        (
            "three.txt",
            b"abc",
            r"--data is too small: 1 files with 3 bytes; training needs 64 kB of text \(64,000 bytes\)",
        ),
        (
            "line.txt",
            b"The cat sat on the mat.\n" * 9000,
            r"of 216,000 bytes, what is left without near-duplicates has ",
        ),
        ("program.bin", bytes(range(256)) * 900, r"no document can be read \(program.bin: it is binary, not text"),
        (
            "utf16.txt",
            ("A text. " * 9000).encode("utf-16"),
            r"no document can be read \(utf16.txt: it is UTF-16, and UTF-8",
        ),
        (
            "program.txt",
            bytes([200, 201]) * 90_000,
            r"no document can be read \(program.txt: not UTF-8: byte 0xc8 at 0",
        ),
        (
            "short.jsonl",
            b'{"text": "short"}\n' * 9000,
            r"nothing is left: all documents are short \(under 200 characters\)",
        ),
        ("wrong.jsonl", b'{"body": "a text"}\n' * 9000, r"no document can be read \(wrong.jsonl: there is no text"),
        ("small.jsonl.zst", None, r"--data is too small: cleaned, 3 documents with [\d,]+ bytes"),
    ],
)
def test_text_that_cannot_be_trained_on_is_refused_with_the_reason(tmp_path, name, data, said):
    if data is None:
        write_raw(tmp_path / name, [made_up_text(seed=seed) for seed in range(3)], source="S")
    else:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=said) as raised:
        prepare(tmp_path / "made", tmp_path / name)
    assert notices.is_named(raised.value)


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(FileNotFoundError, match=r"raw holds no file that ends in \.jsonl"):
        prepare(tmp_path / "made", tmp_path / "raw")


def test_a_few_bad_files_are_left_out_and_said(tmp_path, capsys):
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(made_up_text(seed=number, num_words=300))
    (tmp_path / "z.txt").write_bytes(b"\0" * 100)
    notices.begin(strict=())
    prepare(tmp_path.parent / f"{tmp_path.name}-made", tmp_path)
    assert notices.counts()["line-quarantined"] == 1
    assert re.search(
        r"1 lines or files are bad and left out, z.txt: it is binary.*quarantine has all", capsys.readouterr().err
    )


def test_a_tokenizer_is_smaller_where_the_text_is_poor(tmp_path):
    words = ["".join(random.Random(seed).choices("ab", k=4)) for seed in range(60)]
    texts = [" ".join(random.Random(seed).choices(words, k=400)) for seed in range(60)]
    write_raw(tmp_path / "raw.jsonl", texts, source="S")
    text = prepare(tmp_path / "made", tmp_path / "raw.jsonl")
    notices.begin(strict=())
    made = own_text.make_tokenizer(text, vocab_size=1024, directory=tmp_path / "made", log=print)
    assert made.name in ("tokenizer-512", "tokenizer-300") and (made / "tokenizer.model").is_file()
    assert notices.counts()["smaller-vocabulary"] >= 1


# Long texts in pieces: of files as they are read, of documents before they are split.


def test_pieces_are_the_text_and_end_where_they_can():
    rng = random.Random(0)
    for characters in (7, 40, 1000):
        text = "".join(rng.choices(["word", " ", "\n", "\n\n", "x" * 90], k=400))
        pieces = list(pieces_of(text, characters=characters))
        assert "".join(pieces) == text
        assert all(characters // 2 <= len(piece) <= 3 * characters / 2 for piece in pieces)
        for start, piece in zip(itertools.accumulate(map(len, pieces), initial=0), pieces[:-1], strict=False):
            window = text[start + characters // 2 : start + 3 * characters // 2]
            assert piece[-1].isspace() or not re.search(r"\s", window)
    assert list(pieces_of("", characters=5)) == [""]


@pytest.mark.parametrize("unit", ["one line\n", "é ", "漢字", "\U0001f600"])
def test_a_long_text_file_is_read_in_documents_that_are_the_text(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(raw, "TEXT_BYTES", 1001)
    whole = unit * (5000 // len(unit.encode()))
    (tmp_path / "long.txt").write_text(whole)
    repairs = Counter()
    found = list(raw.read_raw(tmp_path / "long.txt", name="long.txt", default_source="s", repairs=repairs))
    assert "".join(record.text for record in found) == whole and len(found) > 4
    assert all(len(record.text.encode()) <= 1001 for record in found)
    offsets = [int(record.id.partition("@")[2]) for record in found]
    assert offsets == [sum(len(record.text.encode()) for record in found[:number]) for number in range(len(found))]
    assert repairs[raw.LONG_TEXT] == 1
    if unit.endswith(("\n", " ")):
        assert all(record.text.endswith(unit) for record in found)


@pytest.mark.parametrize(
    ("name", "data", "is_text"),
    [
        ("notes", b"plain words", True),
        ("code.py", b"x = 1", True),
        ("rows.json", b"[1, 2]", False),
        ("rows", b'  {"text": "t"}', False),
        ("rows.jsonl", b"plain words", False),
    ],
)
def test_a_file_whose_suffix_says_nothing_is_text_unless_it_looks_like_json(tmp_path, name, data, is_text):
    (tmp_path / name).write_bytes(data)
    (found,) = raw.read_raw(tmp_path / name, name=name, default_source="s")
    assert (getattr(found, "text", None) == data.decode()) == is_text
    if not is_text and data.startswith(b"  {"):
        assert found.text == json.loads(data)["text"]
