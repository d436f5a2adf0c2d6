"""A byte-level BPE of one's own, from trained merges to tokens, text, and files for other clients."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpus_files import made_up_text, write_raw
from support.tiny_tokenizers import ANY_TEXT, EOS, NASTY, TEXTS

from btlm_jax import module_command
from btlm_jax.cli import main
from btlm_jax.convert.tokenizer_files import write_tokenizer_files
from btlm_jax.corpus.engine.inputs import read_stage
from btlm_jax.corpus.engine.tasks import LocalInput, LocalTask
from btlm_jax.corpus.readers.records import Record, ShardWriter
from btlm_jax.corpus.stages import train_tokenizer
from btlm_jax.data import store
from btlm_jax.data.verify import verify
from btlm_jax.tokenizers import train_in_process
from btlm_jax.tokenizers.byte_level import ByteLevelTokenizer, train_byte_level
from btlm_jax.tokenizers.detokenize import Detokenizer
from btlm_jax.tokenizers.gpt2 import FastGpt2Tokenizer, fastest_tokenizer
from btlm_jax.tokenizers.sentencepiece_bpe import train_sentencepiece
from btlm_jax.tokenizers.tokenizer import find_tokenizer, load_tokenizer

VOCAB_SIZE = 601
RUNS = [
    "=" * 64 + "\n" + "-" * 21 + " aaaaa aaaa aaa aa",
    "    deep\n        deeper\n\n\n",
    "naïve 漢字かな \U0001f600 ab" * 9,
] * 200


@pytest.fixture(scope="module")
def contents() -> bytes:
    return train_byte_level([*TEXTS, *RUNS], vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def fast_and_slow(contents):
    """The tokenizer through tiktoken, and the trained file in the tokenizers library as anybody reads it."""
    return fastest_tokenizer(ByteLevelTokenizer(contents, eos_id=VOCAB_SIZE - 1)), tokenizers.Tokenizer.from_str(
        contents.decode()
    )


PIECES = st.sampled_from(["=", "==", "-" * 5, " ", "   ", "\n", "a", "aaaa", "'ll", " eta", "漢", *NASTY, *RUNS[:3]])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_tiktoken_makes_the_ids_of_the_trained_file(fast_and_slow, data):
    fast, slow = fast_and_slow
    text = "".join(data.draw(st.lists(PIECES | ANY_TEXT, max_size=9)))
    assert isinstance(fast, FastGpt2Tokenizer)
    ids = fast.encode(text)
    if EOS not in text:  # which the library itself takes for the special token
        assert ids == slow.encode(text).ids
    assert fast.decode(ids) == text and fast.eos_id not in ids
    detokenizer = Detokenizer(fast, begins_text=True)
    assert "".join([*map(detokenizer.push, ids), detokenizer.finish()]) == text


def test_training_is_deterministic_and_learns(contents, fast_and_slow, monkeypatch):
    fast, _ = fast_and_slow
    assert (fast.vocab_size, fast.eos_id) == (VOCAB_SIZE, VOCAB_SIZE - 1)
    assert fast.encode("=" * 64) == fast.encode("=" * 64 + " ")[:1]  # a token of its own
    assert sum(len(fast.encode(text)) for text in TEXTS) < 0.5 * sum(map(len, TEXTS))
    assert train_byte_level(reversed([*TEXTS, *RUNS]), vocab_size=VOCAB_SIZE) == contents
    monkeypatch.setenv("RAYON_NUM_THREADS", "5")  # of the library's, in another process with other hashes
    assert train_in_process("byte_level_bpe", [*TEXTS, *RUNS], vocab_size=VOCAB_SIZE) == contents


def test_sizes_that_cannot_be_trained_are_refused():
    with pytest.raises(ValueError, match="vocab_size=256 is too small for byte-level BPE: 257 or more"):
        train_byte_level(TEXTS, vocab_size=256)
    for train in (train_byte_level, train_sentencepiece):
        with pytest.raises(ValueError, match="vocab_size=4611686018427387904 is too large: 4,194,304 or less"):
            train(TEXTS, vocab_size=2**62)
    with pytest.raises(ValueError, match="no tokenizer of 5,000 tokens can be trained on this text: .* at 269; ask"):
        train_byte_level(["too little text"], vocab_size=5_000)
    smallest = ByteLevelTokenizer(train_byte_level([], vocab_size=257), eos_id=256)
    assert smallest.encode("é\n") == [smallest.tokens.index(character) for character in "Ã©Ċ"]


def test_files_for_hugging_face_and_back(contents, tmp_path):
    tokenizer = ByteLevelTokenizer(contents, eos_id=VOCAB_SIZE - 1)
    write_tokenizer_files(tmp_path, tokenizer, model_max_length=64, more_probes=TEXTS)  # proves them
    assert {"vocab.json", "merges.txt", "tokenizer.json"} < {path.name for path in tmp_path.iterdir()}
    (tmp_path / "tokenizer.json").unlink()
    again = fastest_tokenizer(find_tokenizer(tmp_path))
    assert isinstance(again, FastGpt2Tokenizer)
    assert again.encode_batch(TEXTS, num_threads=2) == tokenizer.encode_batch(TEXTS, num_threads=1)


def test_the_stage_trains_it_and_the_next_one_takes_it(tmp_path, capsys):
    texts = [made_up_text(seed=seed) for seed in range(60)]
    write_raw(tmp_path / "raw" / "one.jsonl.zst", texts, source="books")

    def run(verb, source, output, *flags) -> int:
        return main(["corpus", verb, f"--input={tmp_path / source}", f"--output={tmp_path / output}", *flags])

    assert run("clean", "raw", "clean", "--workers=1") == 0
    assert run("split", "clean", "split", "--workers=1", "--validation=0.2", "--test=0.1") == 0
    flags = ["--kind=byte_level_bpe", "--vocab_size=400"]
    assert run("tokenizer", "split", "bpe", *flags) == run("tokenizer", "split", "again", *flags) == 0
    assert (tmp_path / "bpe" / "tokenizer.json").read_bytes() == (tmp_path / "again" / "tokenizer.json").read_bytes()
    assert read_stage(tmp_path / "bpe")["settings"]["kind"] == "byte_level_bpe"
    assert run("tokenizer", "split", "bpe", "--vocab_size=400") == 1  # the directory was begun otherwise
    assert run("tokenize", "split", "store", "--workers=1", f"--tokenizer={tmp_path / 'bpe'}", "--block_len=48") == 0
    manifest = verify(tmp_path / "store", log=print)
    assert (manifest.tokenizer.kind, manifest.tokenizer.eos_id) == ("byte_level_bpe", 399)
    assert load_tokenizer(tmp_path / "store", manifest.tokenizer).decode([399]) == ""
    assert sum(part.num_documents for part in manifest.splits[store.TRAIN].sources.values()) > 20
    capsys.readouterr()
    assert run("tokenizer", "split", "other", "--kind=unigram") == 2
    assert "--kind=unigram is not known; it may be sentencepiece, byte_level_bpe" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level_bpe"])
def test_ctrl_c_ends_a_training(tmp_path, kind):
    """In the middle of the library's work, which does not look at signals."""
    texts = "".join(random.Random(1).choices([chr(code) for code in range(0x4E00, 0x9FA5)], k=1_500_000))
    code = (
        "import sys;"
        "from btlm_jax.tokenizers import train_in_process as t; text = sys.stdin.read();"
        "print('begins', flush=True); t(sys.argv[1], [text], vocab_size=25_000)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, kind],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        process.stdin.write(texts.encode())
        process.stdin.close()
        assert process.stdout.readline() == b"begins\n"
        child = wait_for_child(process.pid)
        time.sleep(1.5)  # it has its libraries and its text
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=20) != 0
        finally:  # leaving the block waits for it
            process.kill()
        assert b"KeyboardInterrupt" in process.stderr.read()
    assert not (Path("/proc") / str(child)).exists()


def wait_for_child(parent: int) -> int:
    for _ in range(600):
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            if numbers := children.read_text().split():
                return int(numbers[0])
        time.sleep(0.05)
    raise AssertionError(f"process {parent} has started none in 30 seconds")


def test_the_training_text_is_spread_over_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr("btlm_jax.corpus.stages.train_tokenizer.TOKENIZER_BYTES", 6_000)
    monkeypatch.setattr("btlm_jax.corpus.stages.train_tokenizer.MAX_FILES", 5)
    paths = []
    for number in range(5):
        with ShardWriter(tmp_path, stem=f"d{number}") as writer:
            for index in range(9 if number != 1 else 1):
                text = made_up_text(seed=100 * number + index)
                writer.add(Record(id=f"{number} {index}", source="A", text=text, meta={}))
        paths.append(tmp_path / writer.outputs[0]["file"])
    inputs = tuple(LocalInput(name=path.name, path=path, sha256="") for path in paths)
    texts = list(train_tokenizer._texts(LocalTask(index=0, inputs=inputs), lambda documents, size: None))
    own = [sum(text in {made_up_text(seed=100 * n + i) for i in range(9)} for text in texts) for n in range(5)]
    assert own[1] == 1 and min(own) >= 1 and own[0] <= 3 and max(own) <= 4  # the second has only one
    assert 6_000 < sum(map(len, texts)) < 7_500


def test_what_the_training_process_refuses_is_an_error_here():
    with pytest.raises(ValueError, match="vocab_size=256 is too small for byte-level BPE"):
        train_in_process("byte_level_bpe", TEXTS, vocab_size=256)


def test_a_module_of_the_current_directory_is_no_library(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "dis.py").write_text("raise SystemExit('taken from the current directory')")
    subprocess.run(module_command("btlm_jax.notices"), cwd=tmp_path, check=True)
