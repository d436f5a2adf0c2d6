"""Tokenizers written for Hugging Face make the ids and the text of the originals, or are refused."""

import json
import shutil

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_tokenizers import ANY_TEXT, EOS, TEXTS, own_pattern, tiny_byte_level, trained

from btlm_jax.convert import tokenizer_files
from btlm_jax.convert.sentencepiece_to_hf import to_hf_tokenizer
from btlm_jax.convert.tokenizer_files import prove_tokenizer_files, write_tokenizer_files
from btlm_jax.tokenizers.byte_level import ByteLevelTokenizer
from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer, train_sentencepiece
from btlm_jax.tokenizers.sentencepiece_proto import BYTE, CONTROL, UNKNOWN, USER_DEFINED, parse_model
from btlm_jax.tokenizers.tokenizer import find_tokenizer

transformers = pytest.importorskip("transformers")  # without it only the other clients are compared


PLAIN = dict(add_dummy_prefix=False, remove_extra_whitespaces=False, byte_fallback=True)
SYMBOLS = ["\n", "<tag>", "\t\t"]
MADE = {
    "byte-level": lambda: ByteLevelTokenizer(tiny_byte_level().to_str().encode(), eos_id=299),
    "byte-level, own pattern": lambda: ByteLevelTokenizer(own_pattern().to_str().encode(), eos_id=299),
    "ours": lambda: SentencePieceTokenizer(train_sentencepiece(TEXTS, vocab_size=400)),
    "BPE, symbols": lambda: trained(model_type="bpe", user_defined_symbols=SYMBOLS, **PLAIN),
    "BPE, dummy prefix": lambda: trained(
        model_type="bpe", byte_fallback=True, remove_extra_whitespaces=False, user_defined_symbols=["\n"]
    ),
    "BPE, spaces removed": lambda: trained(model_type="bpe", byte_fallback=True, pad_id=3),
    "BPE, no bytes": lambda: trained(model_type="bpe", vocab_size=150, **PLAIN | {"byte_fallback": False}),
    "unigram, symbols": lambda: trained(model_type="unigram", user_defined_symbols=SYMBOLS, **PLAIN),
    "unigram, dummy prefix": lambda: trained(model_type="unigram", byte_fallback=True),
}


@pytest.fixture(scope="module", params=MADE)
def written(request, tmp_path_factory):
    """(name, tokenizer, directory of its files); no test may change them."""
    directory, tokenizer = tmp_path_factory.mktemp("written"), MADE[request.param]()
    write_tokenizer_files(directory, tokenizer, model_max_length=64, more_probes=TEXTS)
    return request.param, tokenizer, directory


def auto_tokenizer(directory):
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_auto_tokenizer_makes_the_same_ids_and_text(written, data):
    _, tokenizer, directory = written
    if not hasattr(written[1], "auto"):
        written[1].auto = auto_tokenizer(directory)
    words = st.sampled_from([*SYMBOLS, "  ", " eta", "aaaa", "<0x41>", "</s>", EOS, *TEXTS[0].split()[:9]])
    text = "".join(data.draw(st.lists(words | ANY_TEXT, max_size=6)))
    ids = tokenizer.encode(text)
    assert tokenizer.auto(text, split_special_tokens=True, verbose=False)["input_ids"] == ids
    if not isinstance(tokenizer, SentencePieceTokenizer) or tokenizer.unk_id not in ids:
        assert tokenizer.auto.decode(ids) == tokenizer.decode(ids)


def test_special_tokens_and_length_are_told(written):
    name, tokenizer, directory = written
    auto = auto_tokenizer(directory)
    assert (auto.eos_token_id, auto.model_max_length, len(auto)) == (tokenizer.eos_id, 64, tokenizer.vocab_size)
    assert auto(f"a{auto.eos_token}")["input_ids"] == [*tokenizer.encode("a"), tokenizer.eos_id]  # as all clients do
    has_bos = isinstance(tokenizer, SentencePieceTokenizer) and name != "ours"
    assert auto.bos_token_id == (tokenizer.bos_id if has_bos else tokenizer.eos_id)
    assert auto.decode([tokenizer.eos_id], skip_special_tokens=True) == ""


def test_the_files_are_read_back_as_the_same_tokenizer(written):
    name, tokenizer, directory = written
    again = find_tokenizer(directory)
    assert (again.kind, again.vocab_size, again.eos_id) == (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id)
    assert again.encode_batch(TEXTS, num_threads=1) == tokenizer.encode_batch(TEXTS, num_threads=1)
    expected = {"tokenizer.json", "tokenizer_config.json"}
    expected |= {"byte-level": {"vocab.json", "merges.txt"}, "byte-level, own pattern": set()}.get(
        name, {"tokenizer.model"}
    )
    assert {path.name for path in directory.iterdir()} == expected


def test_clients_of_2019_read_the_gpt2_files(tmp_path):
    tokenizer = MADE["byte-level"]()
    write_tokenizer_files(tmp_path, tokenizer, model_max_length=8)
    assert json.loads((tmp_path / "vocab.json").read_text()) == {
        token: number for number, token in enumerate(tokenizer.tokens)
    }
    lines = (tmp_path / "merges.txt").read_text().split("\n")[1:-1]  # as GPT-2's own encoder.py reads them
    assert [tuple(line.split()) for line in lines] == tokenizer.merges
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert merges == lines
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "GPT2Tokenizer"


def test_a_model_file_is_read_as_sentencepiece_reads_it(written):
    _, tokenizer, directory = written
    if not (directory / "tokenizer.model").is_file():
        return
    model = parse_model((directory / "tokenizer.model").read_bytes())
    library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.contents)
    ids = range(library.vocab_size())
    assert list(model.pieces) == [library.id_to_piece(i) for i in ids]
    assert list(model.scores) == [library.get_score(i) for i in ids]
    for kind, is_kind in [(BYTE, library.is_byte), (CONTROL, library.is_control), (UNKNOWN, library.is_unknown)]:
        assert model.ids_of_type(kind) == [i for i in ids if is_kind(i)]


def test_settings_of_a_model_file_are_read():
    first = parse_model(MADE["BPE, symbols"]().contents)
    assert (first.model_type, first.byte_fallback, first.add_dummy_prefix, first.remove_extra_whitespaces) == (
        2,
        1,
        0,
        0,
    )
    assert [first.pieces[number] for number in first.ids_of_type(USER_DEFINED)] == SYMBOLS
    second = parse_model(trained(model_type="unigram", treat_whitespace_as_suffix=True, vocab_size=150).contents)
    assert (second.model_type, second.byte_fallback, second.add_dummy_prefix, second.remove_extra_whitespaces) == (
        1, 0, 1, 1,
    )  # fmt: skip
    assert second.whitespace_as_suffix and second.escape_whitespaces and not first.whitespace_as_suffix
    for damaged in (b"\x0a\x7f", b"\xff", b"\x0f\x00"):
        with pytest.raises(ValueError, match="this is no SentencePiece model"):
            parse_model(damaged)


REFUSED = {
    "it rewrites characters": dict(normalization_rule_name="nmt_nfkc", model_type="bpe", byte_fallback=True),
    "of words or characters": dict(model_type="char"),
    "spaces follow the word": dict(model_type="bpe", treat_whitespace_as_suffix=True, byte_fallback=True),
    "user-defined symbol of several": dict(model_type="bpe", user_defined_symbols=["<tag>"], byte_fallback=True),
    r"makes other ids than the tokenizer: for '<0x41>": dict(model_type="unigram", vocab_size=150),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_expressed_is_refused(message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_tokenizer_files(tmp_path, trained(**REFUSED[message]), model_max_length=64)
    assert not list(tmp_path.iterdir())


def test_a_failed_proof_leaves_the_old_files(tmp_path, monkeypatch):
    def without_last_merge(model, *, unk_id):
        body = json.loads(to_hf_tokenizer(model, unk_id=unk_id).to_str())
        del body["model"]["merges"][-1]
        return tokenizers.Tokenizer.from_str(json.dumps(body))

    (tmp_path / "tokenizer.json").write_text("of before")
    monkeypatch.setattr(tokenizer_files, "to_hf_tokenizer", without_last_merge)
    with pytest.raises(ValueError, match=r"tokenizer.json makes other ids than the tokenizer: for .* not \["):
        write_tokenizer_files(tmp_path, MADE["ours"](), model_max_length=64)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("tokenizer.json", "of before")]


TAMPERED = [
    ("tokenizer.json", lambda body: body["decoder"].update({"decoders": body["decoder"]["decoders"][1:]}), "turns the"),
    ("tokenizer.json", lambda body: body.update({"decoder": None}), "tokenizer.json turns the ids of"),
    ("tokenizer.json", lambda body: body["added_tokens"].clear(), r"tokenizer.json reads '</s>' as the ids .*\[1\]"),
    ("tokenizer_config.json", lambda body: body.update({"eos_token": "<unk>"}), "has eos_token_id=0"),
    ("tokenizer_config.json", lambda body: body.update({"pad_token": "<new>"}), "401 tokens"),
]


@pytest.mark.parametrize("case", range(len(TAMPERED)))
def test_the_proof_sees_what_was_changed(case, tmp_path):
    tokenizer = MADE["ours"]()
    write_tokenizer_files(tmp_path, tokenizer, model_max_length=64)
    name, change, message = TAMPERED[case]
    body = json.loads((tmp_path / name).read_text())
    change(body)
    (tmp_path / name).write_text(json.dumps(body))
    with pytest.raises(ValueError, match=message):
        prove_tokenizer_files(tmp_path, tokenizer)


def test_the_proof_sees_old_vocabulary_files(tmp_path):
    tokenizer = MADE["byte-level"]()
    write_tokenizer_files(tmp_path, tokenizer, model_max_length=64)
    lines = (tmp_path / "merges.txt").read_text().splitlines(keepends=True)
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "kept")
    (tmp_path / "merges.txt").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="vocab.json with merges.txt makes other ids"):
        prove_tokenizer_files(tmp_path, tokenizer)


def test_texts_handed_in_are_compared(tmp_path, monkeypatch):
    tokenizer = MADE["ours"]()
    encoded_texts = []
    monkeypatch.setattr(
        tokenizer, "encode", lambda text: encoded_texts.append(text) or SentencePieceTokenizer.encode(tokenizer, text)
    )
    write_tokenizer_files(tmp_path, tokenizer, model_max_length=64, more_probes=["held out"])
    assert "held out" in encoded_texts and "" in encoded_texts
    with pytest.raises(ValueError, match="model_max_length=0 must be at least 1"):
        write_tokenizer_files(tmp_path, tokenizer, model_max_length=0)
