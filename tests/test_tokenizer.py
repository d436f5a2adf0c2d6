"""Tokenizers give every text back, and the same ids on every machine."""

import dataclasses
import hashlib
from collections import Counter

import pytest
from real_store import made_up_documents

from btlm_jax.corpus.tokenizer import SentencePieceTokenizer, load_tokenizer, train_tokenizer
from btlm_jax.store import Tokenizer

TEXTS = [document.text for document in made_up_documents(Counter())]
NASTY = [
    "",
    " ",
    "  two leading spaces\n\n\n\ttabs\t\tand trailing  ",
    "emoji \U0001f600, accents é e\u0301, Greek αβγ, CJK 漢字, ligature ﬁ, full width Ａ",
    "</s><unk><0x41> control pieces as text",
    "carriage\r\nreturns\rand \x0b\x1f controls",
    "x" * 20_000,
]


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer(TEXTS, vocab_size=400)


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_every_text_comes_back_without_control_ids(model, text):
    tokenizer = SentencePieceTokenizer(model)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids and 0 not in ids
    assert tokenizer.vocab_size == 400 and all(0 < token < 400 for token in ids)
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text


def test_training_and_encoding_are_deterministic(model):
    assert train_tokenizer(TEXTS, vocab_size=400) == model
    tokenizer = SentencePieceTokenizer(model)
    alone = [tokenizer.encode(text) for text in TEXTS]
    assert all(tokenizer.encode_batch(TEXTS, num_threads=threads) == alone for threads in (1, 2, 5))
    assert sum(map(len, alone)) < 0.7 * sum(map(len, TEXTS))  # it learned something


def test_sizes_that_cannot_be_trained_are_refused():
    with pytest.raises(ValueError, match="model.vocab_size=200 is too small"):
        train_tokenizer(TEXTS, vocab_size=200)
    with pytest.raises(ValueError, match="no tokenizer of 50000 pieces can be trained"):
        train_tokenizer(["too little"], vocab_size=50_000)


def test_a_store_loads_only_its_own_tokenizer(model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    facts = Tokenizer(
        kind="sentencepiece",
        file="tokenizer.model",
        sha256=hashlib.sha256(model).hexdigest(),
        vocab_size=400,
        eos_id=1,
    )
    assert load_tokenizer(tmp_path, facts).encode("eta") == SentencePieceTokenizer(model).encode("eta")
    with pytest.raises(ValueError, match="is not the one the manifest records"):
        load_tokenizer(tmp_path, dataclasses.replace(facts, sha256="0" * 64))
    with pytest.raises(ValueError, match="kind 'bpe'"):
        load_tokenizer(tmp_path, dataclasses.replace(facts, kind="bpe"))
    with pytest.raises(FileNotFoundError, match="lacks its tokenizer file other"):
        load_tokenizer(tmp_path, dataclasses.replace(facts, file="other"))
