"""How tokenizers differ: by their tokens and by what they make of texts, not by how they are written."""

import json

import pytest
from support.tiny_tokenizers import TEXTS, tiny_byte_level
from tokenizers import AddedToken

from btlm_jax.convert.sentencepiece_to_hf import to_hf_tokenizer
from btlm_jax.tokenizers.byte_level import ByteLevelTokenizer
from btlm_jax.tokenizers.compare import difference
from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer, train_sentencepiece
from btlm_jax.tokenizers.sentencepiece_json import SentencePieceJsonTokenizer
from btlm_jax.tokenizers.sentencepiece_proto import parse_model


def byte_level(*, added=(), change=lambda body: None):
    tokenizer = tiny_byte_level()
    tokenizer.add_tokens([AddedToken(text) for text in added])
    body = json.loads(tokenizer.to_str())
    change(body)
    return ByteLevelTokenizer(json.dumps(body).encode(), eos_id=299)


def swap_two(body):
    ids = body["model"]["vocab"]
    first, second = sorted(token for token in ids if len(token) == 2)[:2]
    ids[first], ids[second] = ids[second], ids[first]


def swap_merges(body):
    body["model"]["merges"].reverse()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def test_the_same_is_the_same_however_it_is_written(tokenizer):
    assert not difference(tokenizer, tokenizer).texts
    indented = ByteLevelTokenizer(json.dumps(json.loads(tokenizer.contents), indent=3).encode(), eos_id=299)
    assert indented.contents != tokenizer.contents and not difference(tokenizer, indented).texts


def test_a_sentencepiece_model_and_its_tokenizer_json_are_the_same():
    model = SentencePieceTokenizer(train_sentencepiece(iter(TEXTS), vocab_size=400))
    library = to_hf_tokenizer(parse_model(model.contents), unk_id=model.unk_id)
    other = SentencePieceJsonTokenizer(library.to_str().encode(), eos_id=model.eos_id)
    assert difference(model, other) == difference(other, model) == difference(model, model)


def test_one_with_more_tokens_is_an_extension(tokenizer):
    found = difference(tokenizer, byte_level(added=["<a>", "<b>"]))
    assert found.num_new_ids == 2 and str(found) == "302 ids in place of 300"
    found = difference(byte_level(added=["<a>", "<b>"]), tokenizer)
    assert found.num_new_ids == 0 and str(found) == "300 ids in place of 302"


@pytest.mark.parametrize("added", [(), ("<a>",)])
def test_other_tokens_are_no_extension(tokenizer, added):
    found = difference(tokenizer, byte_level(added=added, change=swap_two))
    assert found.num_new_ids == 0 and "2 ids are other tokens, the first is 280: 'ai' in place of 'aa'" in str(found)
    assert f"{300 + len(added)} ids in place of" in str(found) or not added
    other = byte_level(added=added)
    other.eos_id = 7
    found = difference(tokenizer, other)
    assert found.num_new_ids == 0 and "a text ends with id 7 in place of 299" in str(found)


def test_other_merges_are_seen_in_texts(tokenizer):
    assert "gets other ids" in str(difference(tokenizer, byte_level(change=swap_merges)))
