"""Text as it comes: equal to decoding everything at once, final when shown, cheap, and without stop strings."""

import io

import pytest
import sentencepiece
from hypothesis import given, settings, strategies
from support.tiny_tokenizers import TEXTS, tiny_byte_level
from tokenizers import AddedToken

from btlm_jax.convert.sentencepiece_to_hf import to_hf_tokenizer
from btlm_jax.tokenizers.byte_level import ByteLevelTokenizer
from btlm_jax.tokenizers.detokenize import PARTIAL, Detokenizer, StopFinder, StreamDecoder
from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer, train_sentencepiece
from btlm_jax.tokenizers.sentencepiece_json import SentencePieceJsonTokenizer
from btlm_jax.tokenizers.sentencepiece_proto import parse_model

END = "<|im_end|>"
NASTY = "naïve 漢字かな 😀👩‍💻 a\ufffdb\n  é"


def like_llama() -> bytes:
    """A SentencePiece model that puts a space before every text, and drops it where a text begins."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=370, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def as_json(model: SentencePieceTokenizer) -> SentencePieceJsonTokenizer:
    library = to_hf_tokenizer(parse_model(model.contents), unk_id=model.unk_id)
    return SentencePieceJsonTokenizer(library.to_str().encode(), eos_id=model.eos_id)


TOKENIZERS = {
    "byte-level": ByteLevelTokenizer(tiny_byte_level().to_str().encode(), eos_id=299),
    "sentencepiece": SentencePieceTokenizer(train_sentencepiece(TEXTS, vocab_size=400)),
    "sentencepiece like Llama's": SentencePieceTokenizer(like_llama()),
}
TOKENIZERS["sentencepiece in tokenizer.json"] = as_json(TOKENIZERS["sentencepiece"])
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def pieces(tokenizer, ids, *, begins_text) -> list[str]:
    detokenizer = Detokenizer(tokenizer, begins_text=begins_text)
    return [*map(detokenizer.push, ids), detokenizer.finish()]


def after(tokenizer, prompt, ids) -> str:
    return tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]


def bytes_of(tokenizer) -> list[int]:
    """Ids that stand for single bytes, most of which are no character alone."""
    return [token for token in range(tokenizer.vocab_size) if PARTIAL in tokenizer.decode([token])]


@each_tokenizer
def test_pieces_are_the_whole_text_for_any_ids(name):
    tokenizer = TOKENIZERS[name]
    any_id = strategies.integers(0, tokenizer.vocab_size - 1)
    half = strategies.sampled_from(bytes_of(tokenizer))

    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @given(strategies.lists(any_id | half, max_size=30))
    def check(ids):
        assert "".join(pieces(tokenizer, ids, begins_text=True)) == tokenizer.decode(ids)
        for prompt in ("etaoin é", " "):
            prompt_ids = tokenizer.encode(prompt)
            assert "".join(pieces(tokenizer, ids, begins_text=False)) == after(tokenizer, prompt_ids, ids)

    check()


def test_bytes_of_a_cut_character_spoil_no_whole_one():
    model, tokenizer = (TOKENIZERS[name] for name in ("sentencepiece", "sentencepiece in tokenizer.json"))
    ids = tokenizer.encode("a 你好 ab")
    assert tokenizer.decode(ids[:6]) == "".join(pieces(tokenizer, ids[:6], begins_text=True)) == "a 你\ufffd"
    for end in range(len(ids) + 1):
        assert tokenizer.decode(ids[:end]) == model.decode(ids[:end])


@each_tokenizer
def test_no_half_character_is_shown_and_no_whole_one_waits(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(NASTY)
    assert len(ids) > len(NASTY)  # characters are split over ids
    detokenizer, shown = Detokenizer(tokenizer, begins_text=True), ""
    for count, token in enumerate(ids, start=1):
        shown += detokenizer.push(token)
        assert NASTY.startswith(shown)
        whole = tokenizer.decode(ids[:count])
        assert len(shown) >= len(whole.rstrip(PARTIAL))
    assert shown == NASTY


@each_tokenizer
def test_a_long_text_is_not_decoded_again_and_again(name, monkeypatch):
    tokenizer = TOKENIZERS[name]
    decoded = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids), raising=False)
    broken = bytes_of(tokenizer)
    for ids in (tokenizer.encode(NASTY * 30), broken[:5] * 200, broken[-1:] * 1000):
        decoded.clear()
        pieces(tokenizer, ids, begins_text=False)
        assert max(decoded) < 30 and sum(decoded) < 40 * len(ids)


@pytest.mark.parametrize(
    ("stops", "text", "want", "found"),
    [
        (["END"], "the END of it", "the ", "END"),
        (["END"], "the EN", "the EN", ""),
        (["aab"], "caaab", "ca", "aab"),
        (["abc", "b"], "xabc", "xa", "b"),  # the first that is complete
        (["bc", "abc"], "xabc", "x", "abc"),  # of those, the longest
        (["\n\n", "#"], "a\n# b", "a\n", "#"),
        ([], "anything", "anything", ""),
        (["x"], "xx", "", "x"),
        (["ababac"], "abababacc", "ab", "ababac"),
    ],
)
def test_a_stop_string_is_found_however_the_text_is_cut(stops, text, want, found):
    for size in range(1, len(text) + 1):
        finder, shown = StopFinder(stops), ""
        for start in range(0, len(text), size):
            shown += finder.push(text[start : start + size])
            assert want.startswith(shown)
        assert (shown + finder.finish(), finder.found) == (want, found)


@each_tokenizer
def test_a_stop_string_is_found_across_tokens(name):
    tokenizer = TOKENIZERS[name]
    text = StreamDecoder(tokenizer, begins_text=True, stops=["字か", "never"])
    shown = ["".join(text.push(token)) for token in tokenizer.encode(NASTY)]
    assert "".join(shown) + text.finish() == "naïve 漢" and text.stop == "字か"


def test_a_special_token_is_found_as_a_stop_string():
    library = tiny_byte_level()
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<|im_start|>", END)])
    tokenizer = ByteLevelTokenizer(library.to_str().encode(), eos_id=299)
    ids = tokenizer.encode_prompt(f" hello{END}\n<|im_start|>user\n the cat")
    assert tokenizer.decode(ids) == " hello\nuser\n the cat"
    for stops, shown, found in (
        ([END], " hello", END),
        (["cat", "<|im_start|>", END], " hello", END),
        (["lo"], " hel", "lo"),
        (["user\n the cat"], " hello\n", "user\n the cat"),
        (["hello\n"], " ", "hello\n"),
        (["hello world", END], " hello", END),  # what was held back for the first is text
    ):
        text = StreamDecoder(tokenizer, begins_text=False, stops=stops)
        pieces = []
        for token in ids:
            pieces.append(text.push(token))
            if text.stop:
                break
        assert ("".join(pieces) + text.finish(), text.stop) == (shown, found)


@each_tokenizer
def test_a_stop_string_of_broken_bytes_is_found_at_the_end(name):
    tokenizer = TOKENIZERS[name]
    text = StreamDecoder(tokenizer, begins_text=False, stops=[PARTIAL])
    ids = [*tokenizer.encode("eta"), bytes_of(tokenizer)[0]]
    shown = "".join(map(text.push, ids)) + text.finish()
    assert shown == after(tokenizer, tokenizer.encode("x"), ids[:-1]) and text.stop == PARTIAL
