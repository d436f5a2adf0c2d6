"""Long documents: what is computed piece by piece is what the whole gives, in memory that stays under 1 GB."""

import json
import os
import random
import re
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpus_files import made_up_text, write_raw
from support.tiny_tokenizers import NASTY, TEXTS, tiny_byte_level

from btlm_jax.corpus.near_duplicates import normalize
from btlm_jax.corpus.near_duplicates.lsh import PRESETS
from btlm_jax.corpus.near_duplicates.normalize import normalized, normalized_pieces
from btlm_jax.corpus.readers import records
from btlm_jax.corpus.readers.records import Record
from btlm_jax.corpus.stages.evaluation_text import RULES, run_hashes
from btlm_jax.tokenizers import gpt2
from btlm_jax.tokenizers.byte_level import ByteLevelTokenizer, long_runs, train_byte_level
from btlm_jax.tokenizers.gpt2 import fastest_tokenizer
from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer, train_sentencepiece
from btlm_jax.tokenizers.tokenizer import split_for_encoding

SPACES = ["a \n\n  b\n \n\n\nc  d   e\n\t\tf \n'll we're"] * 300  # merges of every kind of run
BYTE_LEVEL = ByteLevelTokenizer(train_byte_level([*TEXTS, *SPACES], vocab_size=500), eos_id=499)
TOKENIZERS = {
    "tiktoken": fastest_tokenizer(BYTE_LEVEL),
    "tokenizers": BYTE_LEVEL,
    "sentencepiece": SentencePieceTokenizer(train_sentencepiece(TEXTS, vocab_size=400)),
}
# What stands around a place where a text could be cut: spaces of all kinds, contractions, marks, digits, controls.
ATOMS = [" ", " ", "\n", "\n", "\t", "\r", "\xa0", "\u2028", "\x1c", "\x85", "a", "'s", "'", "12", "!", "é", "e\u0301"]
ATOMS += ["漢", "\U0001f600", "\u200d", "\x00", " eta", "\u3000", "</s>", "<|endoftext|>", "İ", "Σ"]
TEXT = st.lists(st.sampled_from(ATOMS) | st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")).map(
    "".join
)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=400, deadline=None)
@given(text=TEXT)
def test_the_ids_of_pieces_are_those_of_the_whole(name, text):
    tokenizer = TOKENIZERS[name]
    with mock.patch("btlm_jax.tokenizers.tokenizer.PIECE_CHARACTERS", 1):
        pieces = list(split_for_encoding(text, tokenizer.boundary))
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in tokenizer.encode(piece)] == tokenizer.encode(text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_texts_are_cut_often(name):
    text = "\n".join([*TEXTS[:40], *NASTY])
    with mock.patch("btlm_jax.tokenizers.tokenizer.PIECE_CHARACTERS", 50):
        pieces = list(split_for_encoding(text, TOKENIZERS[name].boundary))
    assert len(pieces) > len(text) / 500
    assert [token for piece in pieces for token in TOKENIZERS[name].encode(piece)] == TOKENIZERS[name].encode(text)


def test_other_tokenizers_are_given_whole_texts():
    pattern = tiny_byte_level()
    body = json.loads(pattern.to_str())
    body["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, body["pre_tokenizer"]],
    }
    assert ByteLevelTokenizer(json.dumps(body).encode(), eos_id=299).boundary is None
    with mock.patch("btlm_jax.tokenizers.tokenizer.PIECE_CHARACTERS", 2):
        assert list(split_for_encoding("a b c d\ne", None)) == ["a b c d\ne"]


@settings(max_examples=200, deadline=None)
@given(text=TEXT, size=st.integers(1, 9))
def test_normalised_pieces_are_the_normalised_whole(text, size):
    whole = normalized(text)
    with mock.patch.object(normalize, "_SLICE", size):
        pieces = list(normalized_pieces(text))
        if "\u0307" not in text.lower() and "Σ" not in text:  # whose lower case depends on their neighbours
            assert np.array_equal(np.concatenate([np.empty(0, np.uint8), *pieces]), whole)
        assert all(map(len, pieces))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=200), st.lists(st.integers(0, 200), max_size=4))
def test_signatures_of_pieces_are_those_of_the_whole(codes, cuts):
    codes = np.array(codes, np.uint8)
    pieces = np.split(codes, sorted(min(cut, len(codes)) for cut in cuts))
    for preset in PRESETS.values():
        assert np.array_equal(preset.signature(pieces), preset.signature([codes]))


JAPANESE = "漢字かな交じり文は単語の間に空白を置かないので、そのままでは単語の列にはならない"


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=25, deadline=None)
@given(text=TEXT, size=st.integers(1, 9))
def test_runs_of_words_do_not_depend_on_the_pieces(rule, text, size):
    text = text.replace("Σ", "").replace("İ", "")  # whose lower case depends on their neighbours
    text = f"{text} {' '.join(TEXTS[0].split()[:40])} {JAPANESE} naïve {text}"
    whole = run_hashes(text, rule=rule)
    with mock.patch.object(normalize, "_SLICE", size):
        assert np.array_equal(run_hashes(text, rule=rule), whole) and len(whole) > 20


@given(text=TEXT)
def test_sizes_are_those_of_utf8(text):
    with mock.patch.object(records, "_PIECE_CHARACTERS", 3):
        assert Record(id="", source="", text=text, meta={}).num_bytes == len(text.encode())


RUNS = ["=" * 64, " " * 200, "\n" * 50, "ACGT" * 9, "漢字" * 20, "0123456789" * 5] * 30
RUN_TOKENIZER = fastest_tokenizer(
    ByteLevelTokenizer(train_byte_level([*TEXTS, *RUNS], vocab_size=640), eos_id=639)
)  # whose longest tokens have many characters


@settings(max_examples=60, deadline=None)
@given(
    alphabet=st.sampled_from(["a", " ", " \n\t\u3000", "ACGT", "0123456789", "=-.", "漢字かな", "é\u0301漢", "a漢"]),
    seed=st.integers(0, 1 << 30),
    length=st.integers(700, 2500),
    around=st.tuples(st.sampled_from(["", "a ", " ", "x"]), st.sampled_from(["", "b", " b", "\n"])),
)
def test_the_ids_of_a_long_run_are_those_of_the_whole(alphabet, seed, length, around):
    text = around[0] + "".join(random.Random(seed).choices(alphabet, k=length)) + around[1]
    whole = RUN_TOKENIZER.encode(text)  # below MAX_RUN
    with mock.patch.multiple(gpt2, MAX_RUN=300, OVERLAP=280):
        assert RUN_TOKENIZER.encode(text) == whole == RUN_TOKENIZER.encode_batch([text], num_threads=2)[0]
    assert RUN_TOKENIZER.decode(whole) == text


def test_a_million_spaces_or_letters_come_back():
    """A run on which tiktoken's regular expressions give up; each in ids that the tokenizers library gives too."""
    for text in ("v" + " " * 1_000_000 + "w", "a" * 400_000 + "\n" * 350_001):
        ids = RUN_TOKENIZER.encode(text)
        assert RUN_TOKENIZER.decode(ids) == text
        assert len(set(ids)) < 12  # equal characters give equal tokens, but for the ends
    with mock.patch.object(gpt2, "OVERLAP", 2), pytest.raises(ValueError, match="characters in a row cannot be encod"):
        RUN_TOKENIZER.encode("x" + " " * 250_001 + "y")


@given(
    st.lists(st.tuples(st.sampled_from("aé漢 \n1!="), st.integers(1, 30)), max_size=12),
    st.integers(4, 20),
)
def test_long_runs_are_those_of_one_class(runs, length):
    text = "".join(character * count for character, count in runs)
    kinds = "".join("L" if c in "aé漢" else " " if c in " \n" else "N" if c == "1" else "!" for c in text)
    expected = [match.span() for match in re.finditer(r"(.)\1*", kinds, re.DOTALL) if len(match[0]) > length]
    assert list(long_runs(text, length)) == expected


def test_training_ends_on_a_long_word_and_learns_the_same_of_others():
    """A hundred thousand letters in a row took the library hours; words that are not long are as they were."""
    unpunctuated = "".join(random.Random(1).choices([chr(code) for code in range(0x4E00, 0x5000)], k=100_000))
    began = time.process_time()
    contents = train_byte_level([*TEXTS, unpunctuated, " " * 100_000], vocab_size=900)
    assert time.process_time() - began < 30
    assert ByteLevelTokenizer(contents, eos_id=899).decode([*range(256)])
    with mock.patch("btlm_jax.tokenizers.byte_level.MAX_TRAINED_WORD", 10_000):
        whole = train_byte_level([*TEXTS, *RUNS], vocab_size=640)
    assert whole == RUN_TOKENIZER.contents


MEASURED = """
import json, re, sys
from btlm_jax.cli import main
for arguments in json.loads(sys.argv[1]):
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    assert main(["corpus", *arguments, "--workers=1"]) == 0
    print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measures memory as Linux says it")
def test_a_document_of_20_megabytes_stays_under_360(tmp_path):
    """In every stage, though the text has emoji, with which a character takes four bytes; two follow one another.

    290 MB on 2026-11-29, and of 40 megabytes 451: one copy more of the text as a str takes 80 MB.
    """
    page = "\n".join(made_up_text(seed=seed) for seed in range(1500))
    lines = [line + " \U0001f600" if number % 50 == 0 else line for number, line in enumerate(page.split(". "))]
    page = ".\n".join(lines)
    long = page * (20_000_000 // len(page.encode()) + 1)
    texts = [long, *(made_up_text(seed=seed) for seed in range(40))]
    write_raw(tmp_path / "raw" / "one.jsonl.zst", texts, source="books")
    tiny_byte_level().save(str(tmp_path / "tokenizer.json"))
    stages = {
        "clean": ("raw",),
        "dedup": ("clean",),
        "split": ("dedup", "--validation=0.1", "--test=0.1"),
        "tokenize": ("split", f"--tokenizer={tmp_path}", "--block_len=512"),
    }
    commands = [
        [verb, f"--input={tmp_path / source}", f"--output={tmp_path / verb}", *flags]
        for verb, (source, *flags) in stages.items()
    ]
    ran = subprocess.run([sys.executable, "-c", MEASURED, json.dumps(commands)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    peaks = [1024 * int(kilobytes) for kilobytes in re.findall(r"^peak (\d+)$", ran.stdout, re.MULTILINE)]
    assert len(peaks) == len(stages) and max(peaks) < 360e6, dict(zip(stages, peaks, strict=True))
