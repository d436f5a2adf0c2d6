"""What a Hugging Face directory's files put in front of a text: read as transformers reads them, and written so."""

import json

import pytest
from support.tiny_tokenizers import EOS, TEXTS, tiny_byte_level, trained
from tokenizers import AddedToken, processors

from btlm_jax import notices
from btlm_jax.convert.tokenizer_files import prove_tokenizer_files, write_tokenizer_files
from btlm_jax.tokenizers.byte_level import ByteLevelTokenizer
from btlm_jax.tokenizers.prompt_bos import read_prompt_bos
from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer, train_sentencepiece

transformers = pytest.importorskip("transformers")
BYTE_LEVEL = ByteLevelTokenizer(tiny_byte_level().to_str().encode(), eos_id=299)
SENTENCEPIECE = SentencePieceTokenizer(train_sentencepiece(TEXTS, vocab_size=400))


def prompt_of(directory, text: str) -> list[int]:
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)(text)["input_ids"]


@pytest.fixture(autouse=True)
def counted_notices():
    notices.begin(strict=())
    yield
    notices.begin(strict=())


def with_bos_token() -> bytes:
    tokenizer = tiny_byte_level()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer.to_str().encode()


PLAIN = {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "byte_fallback": True}
CASES = {
    "byte-level": lambda: (BYTE_LEVEL, None),
    "byte-level, end of text": lambda: (BYTE_LEVEL, 299),
    "byte-level, own": lambda: (ByteLevelTokenizer(with_bos_token(), eos_id=299), 300),
    "sentencepiece": lambda: (SENTENCEPIECE, None),
    "sentencepiece, end of text": lambda: (SENTENCEPIECE, 1),
    "sentencepiece, own": lambda: (trained(model_type="bpe", **PLAIN), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_transformers_does_and_what_is_read_back(tmp_path, case):
    tokenizer, bos_id = CASES[case]()
    write_tokenizer_files(tmp_path, tokenizer, model_max_length=64, prompt_bos_id=bos_id)
    expected = [*([] if bos_id is None else [bos_id]), *tokenizer.encode("eta oin")]
    assert prompt_of(tmp_path, "eta oin") == expected
    assert read_prompt_bos(tmp_path, tokenizer) == bos_id
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is (bos_id is not None)
    other = 5 if bos_id is None else None
    with pytest.raises(ValueError, match="tokenizer.json makes other ids of a prompt: for "):
        prove_tokenizer_files(tmp_path, tokenizer, prompt_bos_id=other)
    if (tmp_path / "vocab.json").is_file():  # clients that read these go by tokenizer_config.json
        (tmp_path / "tokenizer.json").unlink()
        assert prompt_of(tmp_path, "eta oin") == expected and read_prompt_bos(tmp_path, tokenizer) == bos_id
    assert notices.counts() == {}


def with_template(directory, single: str, *names: str, **config) -> None:
    tokenizer = tiny_byte_level()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
    )
    (directory / "tokenizer.json").write_text(tokenizer.to_str())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": EOS} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def test_the_post_processor_counts_and_what_contradicts_it_is_said(tmp_path):
    tokenizer = ByteLevelTokenizer(with_bos_token(), eos_id=299)
    for single, names, config, expected, said in (
        ("<s> $A", ["<s>"], {}, 300, {}),
        ("<s> $A", ["<s>"], {"add_bos_token": True}, 300, {}),
        ("<s> $A", ["<s>"], {"add_bos_token": False}, 300, {"add-bos-token-ignored": 1}),
        ("$A", [], {"add_bos_token": True}, None, {"add-bos-token-ignored": 1}),
        (f"$A {EOS}", [EOS], {}, None, {"prompt-end-ignored": 1}),
        (f"{EOS} $A {EOS}", [EOS], {}, 299, {"prompt-end-ignored": 1}),
    ):
        notices.begin(strict=())
        with_template(tmp_path, single, *names, **config)
        assert read_prompt_bos(tmp_path, tokenizer) == expected
        assert notices.counts() == said
        before = [] if expected is None else [expected]
        assert prompt_of(tmp_path, "eta")[: len(before) + 2] == [*before, *tokenizer.encode("eta")][: len(before) + 2]
    with_template(tmp_path, "<s> $A", "<s>", prompt_bos_id=None)  # as a run says it of a tokenizer that it keeps
    assert read_prompt_bos(tmp_path, tokenizer) is None
    with_template(tmp_path, f"{EOS} <s> $A", EOS, "<s>")
    with pytest.raises(ValueError, match=r"puts the ids \[299, 300\] in front of every text; only one id"):
        read_prompt_bos(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "tokenizer_config.json must be a JSON object"),
        ("{", "tokenizer_config.json is not valid JSON"),
        ('{"add_bos_token": "yes"}', "add_bos_token='yes' is not true or false"),
        ('{"add_bos_token": true, "bos_token": "<none>"}', "its bos_token='<none>' is no token of the vocabulary"),
        ('{"add_bos_token": true, "bos_token": 5}', "its bos_token=5 is no token of the vocabulary"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(tmp_path, config, message):
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        read_prompt_bos(tmp_path, BYTE_LEVEL)
