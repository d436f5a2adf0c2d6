"""Tokenizers give every text back, and the same ids on every machine."""

import dataclasses
import hashlib
import json

import pytest
from hypothesis import given, settings
from support.tiny_tokenizers import ANY_TEXT, EOS, NASTY, TEXTS, tiny_byte_level
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from btlm_jax.data import store
from btlm_jax.tokenizers.byte_level import ByteLevelTokenizer, naming_library_errors, read_byte_level
from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer, train_sentencepiece
from btlm_jax.tokenizers.tokenizer import find_tokenizer, load_tokenizer, tokenizer_info

TINY = tiny_byte_level().to_str().encode()
BYTE_LEVEL = ByteLevelTokenizer(TINY, eos_id=299)


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece(TEXTS, vocab_size=400)


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_every_text_comes_back_without_control_ids(model, text):
    tokenizer = SentencePieceTokenizer(model)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids and 0 not in ids
    assert tokenizer.vocab_size == 400 and all(0 < token < 400 for token in ids)
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text


def test_training_and_encoding_are_deterministic(model):
    assert train_sentencepiece(TEXTS, vocab_size=400) == model
    tokenizer = SentencePieceTokenizer(model)
    alone = [tokenizer.encode(text) for text in TEXTS]
    assert all(tokenizer.encode_batch(TEXTS, num_threads=threads) == alone for threads in (1, 2, 5))
    assert sum(map(len, alone)) < 0.7 * sum(map(len, TEXTS))  # it learned something


@pytest.mark.parametrize("end", ["", " x"], ids=["no space", "one space in 20,000 characters"])
def test_a_text_that_is_one_long_word_gives_a_tokenizer_that_has_spaces(end):
    """As of a language that is written without; SentencePiece alone leaves out characters that are rare."""
    words = [word for text in TEXTS for word in text.split()]
    text = "".join(words[number % len(words)] for number in range(5000)) + end
    tokenizer = SentencePieceTokenizer(train_sentencepiece([text], vocab_size=400))
    for other in (text, " a", "a  b \u2581 c\n d", *NASTY):
        assert tokenizer.decode(tokenizer.encode_exactly(other)) == other


def test_sizes_that_cannot_be_trained_are_refused():
    with pytest.raises(ValueError, match="^vocab_size=200 is too small"):
        train_sentencepiece(TEXTS, vocab_size=200)
    with pytest.raises(ValueError, match="no tokenizer of 50000 pieces can be trained"):
        train_sentencepiece(["too little"], vocab_size=50_000)


def test_a_store_loads_only_its_own_tokenizer(model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    facts = store.TokenizerInfo(
        kind="sentencepiece",
        file="tokenizer.model",
        sha256=hashlib.sha256(model).hexdigest(),
        vocab_size=400,
        eos_id=1,
    )
    assert tokenizer_info(SentencePieceTokenizer(model)) == facts
    assert load_tokenizer(tmp_path, facts).encode("eta") == SentencePieceTokenizer(model).encode("eta")
    with pytest.raises(ValueError, match="is not the one the manifest records"):
        load_tokenizer(tmp_path, dataclasses.replace(facts, sha256="0" * 64))
    with pytest.raises(ValueError, match="kind 'bpe' .* reads sentencepiece, byte_level_bpe, "):
        load_tokenizer(tmp_path, dataclasses.replace(facts, kind="bpe"))
    with pytest.raises(FileNotFoundError, match="lacks its tokenizer file other"):
        load_tokenizer(tmp_path, dataclasses.replace(facts, file="other"))


def test_a_store_loads_a_byte_level_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(TINY)
    facts = tokenizer_info(BYTE_LEVEL)
    assert dataclasses.astuple(facts)[:2] == ("byte_level_bpe", "tokenizer.json") and facts.vocab_size == 300
    assert load_tokenizer(tmp_path, facts).encode(TEXTS[0]) == BYTE_LEVEL.encode(TEXTS[0])
    with pytest.raises(ValueError, match="has no token of id 300"):
        load_tokenizer(tmp_path, dataclasses.replace(facts, eos_id=300))


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_byte_level_gives_any_text_back(text):
    ids = BYTE_LEVEL.encode(text)
    assert BYTE_LEVEL.decode(ids) == text and all(0 <= token < 299 for token in ids)


@pytest.mark.parametrize("text", [*NASTY, EOS, f"a{EOS}b\n{EOS}"], ids=range(len(NASTY) + 2))
def test_no_text_makes_the_end_of_text_in_byte_level(text):
    ids = BYTE_LEVEL.encode(text)
    assert BYTE_LEVEL.decode([299, *ids, 299]) == text and 299 not in ids


def test_byte_level_ids_are_those_of_the_merges():
    def by_hand(word: str) -> list[str]:  # the algorithm of the GPT-2 paper: merge the earliest learnt pair, again
        ranks = {pair: rank for rank, pair in enumerate(BYTE_LEVEL.merges)}
        parts = list(word)
        while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if pair in ranks]:
            first = min(pairs, key=ranks.get)
            at = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == first)
            parts[at : at + 2] = ["".join(first)]
        return parts

    for word in {word for text in TEXTS for word in text.split()}:
        letters = word.encode().decode("ascii", "ignore")
        if letters.isalpha():
            assert [BYTE_LEVEL.tokens[token] for token in BYTE_LEVEL.encode(letters)] == by_hand(letters)


def test_byte_level_batches_are_the_same_on_any_number_of_threads():
    alone = [BYTE_LEVEL.encode(text) for text in TEXTS]
    assert all(BYTE_LEVEL.encode_batch(TEXTS, num_threads=threads) == alone for threads in (1, 2, 5))
    assert sum(map(len, alone)) < 0.8 * sum(map(len, TEXTS))


def test_what_cuts_pads_or_adds_ids_is_left_out():
    tokenizer = tiny_byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5)
    read = ByteLevelTokenizer(tokenizer.to_str().encode(), eos_id=299)
    assert read.encode_batch(TEXTS, num_threads=2) == BYTE_LEVEL.encode_batch(TEXTS, num_threads=2)


def same_tokens(tokenizer: ByteLevelTokenizer) -> bool:
    return (tokenizer.tokens, tokenizer.merges) == (BYTE_LEVEL.tokens, BYTE_LEVEL.merges) and tokenizer.eos_id == 299


def test_vocabulary_and_merges_are_the_same_tokenizer(model, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="looked for tokenizer.model, tokenizer.json, and vocab.json with merge"
    ):
        find_tokenizer(tmp_path)
    tiny_byte_level().model.save(str(tmp_path))
    vocab = tmp_path / "vocab.json"
    vocab.write_text(json.dumps(json.loads(vocab.read_text()) | {EOS: 299}))
    assert same_tokens(find_tokenizer(tmp_path))
    merges = (tmp_path / "merges.txt").read_text()
    (tmp_path / "merges.txt").write_text(merges.split("\n", 1)[1])  # as published without the version line
    assert same_tokens(find_tokenizer(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "!"}}))
    with pytest.raises(ValueError, match="text can make the special token '!'"):
        find_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(ValueError, match="lacks the end-of-text token '</s>'"):
        find_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("zz yy\n")
    with pytest.raises(ValueError, match="vocab.json, or merges.txt, is damaged: "):
        find_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="lacks merges.txt"):
        find_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert find_tokenizer(tmp_path).contents == model
    for contents in (b"not one", b""):
        (tmp_path / "tokenizer.model").write_bytes(contents)
        with pytest.raises(ValueError, match="tokenizer.model cannot be used: this is no SentencePiece model"):
            find_tokenizer(tmp_path)


REFUSED = {
    "is BPE with pre-tokenizer Metaspace and decoder ByteLevel": dict(pre_tokenizer=pre_tokenizers.Metaspace()),
    "would not give every text back, as it has: NFKC": dict(normalizer=normalizers.NFKC()),
    "as it has: add_prefix_space": dict(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "as it has: Whitespace": dict(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "as it has: Split": dict(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_tokenizer_json_of_another_kind_is_refused(message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tiny_byte_level(**REFUSED[message]).to_str())
    with pytest.raises(ValueError, match=message):
        read_byte_level(tmp_path)


def test_a_damaged_tokenizer_json_is_refused(tmp_path):
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=False)).to_str()
    body = json.loads(TINY)
    body["model"]["vocab"]["!"] = 500
    for contents, message in [
        (unigram, "is Unigram with pre-tokenizer none and decoder none"),
        ("{", "tokenizer.json is not valid JSON"),
        ("[]", "tokenizer.json must be a JSON object"),
        (json.dumps(body), "the ids of tokenizer.json are not 0 to 299"),
    ]:
        (tmp_path / "tokenizer.json").write_text(contents)
        with pytest.raises(ValueError, match=message):
            read_byte_level(tmp_path)


def test_a_panic_of_the_library_is_a_damaged_file():
    class PanicException(BaseException):
        pass

    with pytest.raises(ValueError, match="x.json is damaged: PanicException"), naming_library_errors("x.json"):
        raise PanicException
    with pytest.raises(KeyboardInterrupt), naming_library_errors("x.json"):
        raise KeyboardInterrupt


def test_another_pattern_of_words_is_kept():
    split = pre_tokenizers.Split(Regex(r"\s|\S+"), "isolated")
    steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    other = tiny_byte_level(pre_tokenizer=pre_tokenizers.Sequence(steps))
    other.add_tokens([AddedToken("<tag>", special=False)])
    other.add_special_tokens(["<pad>"])
    read = ByteLevelTokenizer(other.to_str().encode(), eos_id=299)
    assert BYTE_LEVEL.has_gpt2_rules and not read.has_gpt2_rules and read.special_ids == [299, 301]
    ids = read.encode("12 eta<tag><pad>")
    assert read.decode(ids) == "12 eta<tag><pad>" and 300 in ids and 301 not in ids
    in_pieces = [id for piece in ("12", " ", "eta") for id in BYTE_LEVEL.encode(piece)]
    assert read.encode("12 eta") == in_pieces != BYTE_LEVEL.encode("12 eta")


def test_what_a_run_keeps_is_found_with_its_end_of_text(tmp_path):
    """A tokenizer.json does not say which token ends a text; what a run keeps beside it does."""
    contents = tiny_byte_level().to_str().replace("<|endoftext|>", "[end]").encode()
    kept = ByteLevelTokenizer(contents, eos_id=299)
    store.write_tokenizer(tokenizer_info(kept), contents, directory=tmp_path)
    found = find_tokenizer(tmp_path)
    assert (found.eos_id, found.contents, found.decode([299])) == (299, contents, "")
    (tmp_path / store.TOKENIZER_INFO_FILE).unlink()
    with pytest.raises(ValueError, match="lacks the end-of-text token"):
        find_tokenizer(tmp_path)


def test_a_kept_tokenizer_that_changes_texts_is_still_asked_about(tmp_path):
    contents = tiny_byte_level(normalizer=normalizers.Lowercase()).to_str().encode()
    kept = ByteLevelTokenizer(contents, eos_id=299, allow_lossy=True)
    store.write_tokenizer(tokenizer_info(kept), contents, directory=tmp_path)
    assert find_tokenizer(tmp_path, allow_lossy=True).contents == contents
    with pytest.raises(ValueError):
        find_tokenizer(tmp_path)
