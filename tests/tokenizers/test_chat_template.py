"""Chat templates: texts, ids and masks are those of transformers' apply_chat_template."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from support.published_templates import PUBLISHED
from support.tiny_tokenizers import TEXTS, tiny_byte_level
from tokenizers import AddedToken

from btlm_jax import notices
from btlm_jax.convert.sentencepiece_to_hf import to_hf_tokenizer
from btlm_jax.tokenizers.chat_template import ChatTemplate
from btlm_jax.tokenizers.named_templates import NAMED_TEMPLATES
from btlm_jax.tokenizers.sentencepiece_bpe import train_sentencepiece
from btlm_jax.tokenizers.sentencepiece_proto import parse_model
from btlm_jax.tokenizers.special_tokens import read_variables
from btlm_jax.tokenizers.template_files import find_template, read_chat_templates
from btlm_jax.tokenizers.tokenizer import find_tokenizer

MARKS = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
]
TURNS = [
    {"role": "user", "content": "  Wie geht's, Zoë?\n\nnaïve e\u0301 漢字 \U0001f468\u200d\U0001f469\n"},
    {"role": "assistant", "content": " \U0001f600 good\u00a0—\ttabs  and αβγ \n"},
    {"role": "user", "content": "{{ eos_token }} {% if %} <b>&amp;</b> <|endoftext|> </s> [INST]"},
    {"role": "assistant", "content": "", "name": None},
    {"role": "user", "content": "x" * 40},
    {"role": "assistant", "content": "last words: ﬁ Ａ"},
]
SYSTEM = {"role": "system", "content": "Be brief; ünïcode.\n"}
WITHOUT_SYSTEM = ("mistral", "gemma")


def conversations(name: str) -> list[list[dict]]:
    whole = [TURNS, TURNS[:2], TURNS[:3]]
    return whole if name in WITHOUT_SYSTEM else [*whole, [SYSTEM, *TURNS], [SYSTEM, *TURNS[4:]]]


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    """Directories of a byte-level tokenizer and one with SentencePiece's pieces, with the marks as special tokens."""
    byte_level = tiny_byte_level()
    pieces = to_hf_tokenizer(parse_model(train_sentencepiece(TEXTS, vocab_size=400)), unk_id=0)
    found = {}
    for kind, tokenizer in (("byte level", byte_level), ("pieces", pieces)):
        tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
        found[kind] = tmp_path_factory.mktemp("tokenizer")
        tokenizer.save(str(found[kind] / "tokenizer.json"))
        values = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
        (found[kind] / "tokenizer_config.json").write_text(json.dumps(values))
    return found


def template_of(source: str, directory: Path) -> ChatTemplate:
    tokenizer = find_tokenizer(directory)
    variables = read_variables(directory, tokenizer, prompt_bos_id=None)
    now = datetime(2026, 11, 30)
    return ChatTemplate(source, name="it", variables=variables, special_tokens=tokenizer.special_tokens, now=now)


def ids_and_mask(template: ChatTemplate, messages: list[dict], directory: Path) -> tuple[list[int], list[int]]:
    chat = template.render(messages)
    ids, offsets = find_tokenizer(directory).encode_prompt_with_offsets(chat.text)
    return ids, [int(any(begin < last and end > first for first, last in chat.spans)) for begin, end in offsets]


@pytest.mark.parametrize("kind", ["byte level", "pieces"])
def test_ids_and_masks_are_those_of_transformers(directories, kind):
    transformers = pytest.importorskip("transformers")
    directory = directories[kind]
    client = transformers.PreTrainedTokenizerFast.from_pretrained(str(directory))
    for name, published in PUBLISHED.items():
        named, bare = template_of(NAMED_TEMPLATES[name], directory), template_of(published, directory)
        assert named.has_generation_blocks and not bare.has_generation_blocks
        for messages in conversations(name):
            expected = client.apply_chat_template(
                messages, chat_template=NAMED_TEMPLATES[name], return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = ids_and_mask(named, messages, directory)
            assert ids == client.apply_chat_template(messages, chat_template=published)["input_ids"], name
            assert ids == expected["input_ids"] and mask == expected["assistant_masks"], name
            assert 0 < sum(mask) < len(mask)
            # Without blocks the difference of prefixes says the same: all these end with a special token.
            assert bare.render(messages) == named.render(messages), name
            prompts = [
                client.apply_chat_template(
                    messages[:-1], chat_template=source, tokenize=False, add_generation_prompt=True
                )
                for source in (NAMED_TEMPLATES[name], published)
            ]
            assert prompts[0] == prompts[1], name


def test_offsets_are_those_of_the_ids(directories, tmp_path):
    """Of a model file as of tokenizer.json: each has the characters that it is made of, bytes the whole character."""
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(TEXTS, vocab_size=400))
    text = "eta <unk>漢 \U0001f600\n\n</s>e\u0301 oin"
    for directory in (*directories.values(), tmp_path):
        tokenizer = find_tokenizer(directory)
        ids, offsets = tokenizer.encode_prompt_with_offsets(text)
        assert ids == tokenizer.encode_prompt(text) and len(ids) == len(offsets)
        assert all(begin < end for begin, end in offsets)
        assert [begin for begin, _ in offsets] == sorted(begin for begin, _ in offsets)
        end_id = tokenizer.special_tokens["</s>"]
        assert [text[begin:end] for number, (begin, end) in zip(ids, offsets, strict=True) if number == end_id] == [
            "</s>"
        ]
        for character in "漢\U0001f600":  # no token has it, so it is bytes
            place = text.index(character)
            assert sum((begin, end) == (place, place + 1) for begin, end in offsets) == len(character.encode())


def test_a_template_that_changes_earlier_messages_is_refused_without_blocks(directories):
    source = "{% for m in messages %}{{ m.role if not loop.last else 'LAST' }}:{{ m.content }};{% endfor %}"
    with pytest.raises(ValueError, match="no generation blocks, .* first 1 messages .* --template=FILE"):
        template_of(source, directories["pieces"]).render(TURNS)
    blocks = source.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    chat = template_of(blocks, directories["pieces"]).render(TURNS)
    assert [chat.text[begin:end] for begin, end in chat.spans] == [turn["content"] for turn in TURNS]


def test_white_space_after_the_end_is_trained_only_where_nothing_ends_it(directories):
    def spans(source: str) -> list[str]:
        chat = template_of(source, directories["pieces"]).render(TURNS[:2])
        return [chat.text[begin:end] for begin, end in chat.spans]

    said = TURNS[1]["content"]
    lines = "{% for m in messages %}{{ m.content }}END\n\n{% endfor %}"
    assert spans(lines.replace("END", "|")) == [f"{said}|\n\n"]
    assert spans(lines.replace("END", "</s>")) == [f"{said}</s>"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "cannot be read"),
        ("{{ messages[9].content }}", "cannot render"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ 1 / 0 }}", "cannot render"),
        ("{{ messages.__class__.__mro__ }}", "cannot render"),
        ("{{ messages.append(1) }}", "cannot render"),
        ("{% set n = namespace(__init__=1) %}", "cannot render"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "cannot render"),
        ("{{ raise_exception.__globals__.keys() }}", "cannot render"),
    ],
)
def test_errors_of_templates_are_named(directories, source, message):
    with pytest.raises(ValueError, match=f"^the chat template it {message}" if "no system" not in message else message):
        template_of(source, directories["pieces"]).render(TURNS)


def test_functions_and_filters_of_transformers_are_there(directories):
    source = (
        "{%- set n = namespace(count=0) %}{%- for m in messages %}{%- set n.count = n.count + 1 %}"
        "{%- if loop.index == 2 %}{% break %}{%- endif %}{%- endfor %}"
        "{{- n.count }} {{ dict(a='é<') | tojson }} {{ strftime_now('%d %b %Y') }} {{ tools is none }}"
        "{% generation %}{% endgeneration %}"
    )
    assert template_of(source, directories["pieces"]).render(TURNS).text == '2 {"a": "é<"} 30 Nov 2026 True'


def test_keys_of_messages_that_are_null_are_left_out(directories):
    source = "{% for m in messages %}{{ 'name' in m }} {% endfor %}{% generation %}{% endgeneration %}"
    assert template_of(source, directories["pieces"]).render(TURNS).text == "False " * len(TURNS)


def test_the_template_is_the_directorys_or_given(directories, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "of the config"}))
    assert find_template("", directory=tmp_path)[0] == "of the config"
    several = [{"name": "default", "template": "first"}, {"name": "rag", "template": "second"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert find_template("", directory=tmp_path)[0] == "first"
    (tmp_path / "chat_template.jinja").write_text("of the file: ü", encoding="utf-8")
    assert find_template("", directory=tmp_path)[0] == "of the file: ü"
    assert read_chat_templates(tmp_path) == {"default": "of the file: ü", "rag": "second"}
    (tmp_path / "own.jinja").write_text("own")
    assert find_template(str(tmp_path / "own.jinja"), directory=tmp_path) == ("own", str(tmp_path / "own.jinja"))
    assert find_template("zephyr", directory=tmp_path) == (NAMED_TEMPLATES["zephyr"], "zephyr")
    with pytest.raises(FileNotFoundError, match="--template=chat is neither a file nor one of the templates chatml, "):
        find_template("chat", directory=tmp_path)
    assert find_template("", directory=directories["pieces"])[0] == ""
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template.jinja is no text"):
        find_template("", directory=tmp_path)


def test_the_names_of_special_tokens_are_read(directories, tmp_path):
    tokenizer = find_tokenizer(directories["pieces"])

    def read(prompt_bos_id=None, **files: dict) -> dict:
        for name, values in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(values))
        return read_variables(tmp_path, tokenizer, prompt_bos_id=prompt_bos_id)

    rest = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    assert read_variables(directories["pieces"], tokenizer, prompt_bos_id=None) == {"bos_token": "<s>", **rest}
    assert read() == {"bos_token": "</s>", **rest}  # as an export names it
    assert read(prompt_bos_id=tokenizer.token_id("<|eot_id|>")) == {"bos_token": "<|eot_id|>", **rest}
    older = {"bos_token": {"content": "<s>"}, "pad_token": "<|im_end|>", "cls_token": "<none>"}
    config = {"bos_token": None, "pad_token": "<|im_start|>"}
    notices.begin(strict=())
    assert read(special_tokens_map=older, tokenizer_config=config) == {
        "bos_token": "<s>", **rest, "pad_token": "<|im_end|>"
    }  # fmt: skip
    assert notices.counts() == {"config-keys-dropped": 1}
    assert read(tokenizer_config=config | {"added_tokens_decoder": {}}) == {**rest, "pad_token": "<|im_start|>"}
    with pytest.raises(ValueError, match="bos_token=3 of its files must be a token's text"):
        read(tokenizer_config={"bos_token": 3, "added_tokens_decoder": {}})
