"""What is beside a model's weights survives conversions: tokenizers after transformers, pad, templates, eos."""

import json
import runpy
import shutil

import jinja2
import numpy as np
import pytest
from support import llama_cpp
from support.published_files import oracle_weights, write_published
from support.tiny import REPOSITORY
from support.tiny_tokenizers import EOS, TEXTS, tiny_byte_level, trained
from tokenizers import AddedToken, normalizers

from btlm_jax import notices
from btlm_jax.convert import conversion
from btlm_jax.convert.conversion import Conversion, convert
from btlm_jax.convert.tokenizer_files import write_tokenizer_files
from btlm_jax.hub import native
from btlm_jax.hub.gguf import GGUFFile
from btlm_jax.hub.source import open_source
from btlm_jax.tokenizers.byte_level import ByteLevelTokenizer
from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer, train_sentencepiece
from btlm_jax.tokenizers.tokenizer import find_tokenizer, load_tokenizer, tokenizer_info

transformers = pytest.importorskip("transformers")
SYMBOL, CHAT = "<|im_start|>", "{% for m in messages %}" + "<|im_start|>{{ m.content }}" + "{% endfor %}"
PLAIN = dict(add_dummy_prefix=False, remove_extra_whitespaces=False, byte_fallback=True)
MADE = {
    "ours": lambda: SentencePieceTokenizer(train_sentencepiece(TEXTS, vocab_size=400)),
    "unigram": lambda: trained(model_type="unigram", user_defined_symbols=["\n"], **PLAIN),
    "dummy prefix": lambda: trained(model_type="bpe", byte_fallback=True, remove_extra_whitespaces=False),
    "byte-level": lambda: ByteLevelTokenizer(tiny_byte_level().to_str().encode(), eos_id=299),
}
NASTY = ["", " ", "a  b\n\n\tc", "\u00c9t\u00e9 \u6570\u5b66 \U0001f600", "</s><unk>", EOS, f"a{SYMBOL}b", *TEXTS[:5]]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """PyTorch's proof of the weights is another test's."""
    monkeypatch.setattr(conversion, "has_transformers", lambda: False)
    notices.begin(strict=())


def make(source, target, **changes):
    options = {"format": "hf", "dtype": "float32", "file_type": "F32", "pad_ffn": 1, "max_shard_bytes": 10**9}
    options |= {"method": "rtn", "calibration": None} | changes
    convert(Conversion(source=source, target=target, **options), log=lambda line: None)
    return target


def model_with(directory, tokenizer, **changes):
    """The tiny oracle's weights with a tokenizer; its vocabulary of 512 has room for added tokens."""
    changes = {"eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.eos_id} | changes
    write_published(directory, oracle_weights(), **changes)
    write_tokenizer_files(directory, tokenizer, model_max_length=64)
    return directory


def resaved(directory, target, **special):
    """Have transformers read and write a directory's tokenizer, with tokens added; the rest is copied."""
    shutil.copytree(directory, target)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (target / name).unlink(missing_ok=True)
    auto = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if special:
        auto.add_special_tokens(special)
    auto.save_pretrained(target)
    return target, auto


@pytest.mark.parametrize("name", MADE)
def test_a_tokenizer_that_transformers_saved_is_read_back(name, tmp_path):
    tokenizer = MADE[name]()
    directory = tmp_path / "in"
    directory.mkdir()
    write_tokenizer_files(directory, tokenizer, model_max_length=64)
    tuned, auto = resaved(directory, tmp_path / "tuned")
    assert not (tuned / "tokenizer.model").exists()
    again = find_tokenizer(tuned)
    assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    for text in NASTY:
        assert again.encode(text) == tokenizer.encode(text) == auto(text, split_special_tokens=True)["input_ids"]
        if name != "unigram" or "<unk>" not in text:
            assert again.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / again.stored_file).write_bytes(again.contents)
    assert load_tokenizer(tmp_path / "store", tokenizer_info(again)).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_a_tokenizer_that_changes_texts_is_read_and_said(tmp_path):
    """As of a run on a store that was made with --allow_lossy; only a store asks for that flag."""
    contents = tiny_byte_level(normalizer=normalizers.Lowercase()).to_str().encode()
    directory = model_with(tmp_path / "in", ByteLevelTokenizer(contents, eos_id=299, allow_lossy=True))
    read = native.read_model_directory(make(make(directory, tmp_path / "hf"), tmp_path / "native", format="native"))
    assert read.tokenizer.decode(read.tokenizer.encode("Ab")) == "ab"
    assert notices.counts()["tokenizer-lossy"] == 2
    with pytest.raises(ValueError, match="would not give every text back, as it has: Lowercase; btlm corpus tokenize"):
        find_tokenizer(directory)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours", "byte-level"])
def test_all_that_is_beside_the_weights_survives_every_form(name, tmp_path, capsys):
    """hf -> transformers -> hf -> native -> hf -> gguf, with added tokens, a pad token, a template and a config."""
    first = make(model_with(tmp_path / "in", MADE[name]()), tmp_path / "hf")
    tuned, auto = resaved(first, tmp_path / "tuned", pad_token="<|pad|>", additional_special_tokens=[SYMBOL])
    settings = json.loads((tuned / "tokenizer_config.json").read_text())
    settings |= {"padding_side": "left", "chat_template": CHAT}
    (tuned / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"eos_token_id": [auto.eos_token_id, 7, 9], "temperature": 0.25, "top_k": 11, "do_sample": True}
    (tuned / "generation_config.json").write_text(json.dumps(generation))
    if (first / "tokenizer.model").exists():  # left beside it by hand; it lacks the added tokens
        shutil.copy(first / "tokenizer.model", tuned)
    (tuned / "LICENSE").write_text("what may be done with the model")
    back = make(tuned, tmp_path / "back")
    assert notices.counts()["files-not-converted"] == 2  # and the model card
    assert notices.counts().get("tokenizer-preferred", 0) == (name == "ours")
    own = make(back, tmp_path / "native", format="native")
    again = make(own, tmp_path / "again")
    text = f"{SYMBOL}def f(x):{SYMBOL}<|pad|>  y"
    for directory in (back, again):
        read = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        assert read(text)["input_ids"] == auto(text)["input_ids"]
        assert (read.pad_token, read.padding_side, read.chat_template) == ("<|pad|>", "left", CHAT)
        assert json.loads((directory / "config.json").read_text())["pad_token_id"] == auto.pad_token_id
        assert generation.items() <= json.loads((directory / "generation_config.json").read_text()).items()
    assert open_source(own).tokenizer.encode(text) == find_tokenizer(again).encode(text)
    jais = make(again, tmp_path / "jais", format="jais", pad_ffn=256)
    assert generation.items() <= json.loads((jais / "generation_config.json").read_text()).items()
    capsys.readouterr()
    path = make(again, tmp_path / "m.gguf", format="gguf", pad_ffn=256)
    assert "GGUF has a place for two, and 9 is left out (config-keys-dropped" in capsys.readouterr().err
    keys = GGUFFile(path).keys
    assert keys["tokenizer.chat_template"] == CHAT
    assert keys["tokenizer.ggml.padding_token_id"] == auto.pad_token_id
    assert (keys["general.sampling.temp"], keys["general.sampling.top_k"]) == (0.25, 11)
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"]) == (auto.eos_token_id, 7)
    texts = [text, *NASTY[1:]]
    assert llama_cpp.tokenize(path, texts) == [find_tokenizer(again).encode(one) for one in texts]


def test_symbols_added_to_gpt2_split_texts_in_a_gguf_as_they_do_in_transformers(tmp_path):
    made = tiny_byte_level()
    made.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<tool>ab", normalized=False)])
    tokenizer = ByteLevelTokenizer(made.to_str().encode(), eos_id=299)
    path = make(model_with(tmp_path / "in", tokenizer), tmp_path / "m.gguf", format="gguf", pad_ffn=256)
    texts = ["a<tool> b", "<tool>abc", "<tool><tool>ab", "x <tool", f"{EOS}<tool>"]
    expected = [tokenizer.encode(text) for text in texts]
    assert 300 in expected[0] and 301 in expected[1]
    assert llama_cpp.tokenize(path, texts) == expected


def test_tokens_that_older_directories_name_elsewhere_are_kept(tmp_path, capsys):
    """Of before transformers 4.34: tokens that fine-tuning added are in special_tokens_map.json alone."""
    made = tiny_byte_level()
    made.add_special_tokens(["<|pad|>", "<|mask|>", SYMBOL])
    source = model_with(tmp_path / "in", ByteLevelTokenizer(made.to_str().encode(), eos_id=299))
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    mask = {"content": "<|mask|>", "lstrip": True, "normalized": False, "rstrip": False, "single_word": False}
    named = {"pad_token": "<|pad|>", "mask_token": mask, "additional_special_tokens": [SYMBOL]}
    (source / "special_tokens_map.json").write_text(json.dumps(named))
    for name in ("LICENSE.txt", "adapter_config.json"):
        (source / name).write_text("")
    exported = make(source, tmp_path / "hf")
    assert notices.counts()["files-not-converted"] == 2
    assert "adapter_config.json, LICENSE.txt of" in capsys.readouterr().err.replace(
        "LICENSE.txt, adapter_config.json of", "adapter_config.json, LICENSE.txt of"
    )
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(path, local_files_only=True) for path in (source, exported)
    )
    assert theirs.special_tokens_map == ours.special_tokens_map and ours.pad_token == "<|pad|>"
    assert json.loads((exported / "config.json").read_text())["pad_token_id"] == theirs.pad_token_id == 300
    assert theirs.all_special_tokens == ours.all_special_tokens and SYMBOL in ours.all_special_tokens
    # transformers 5 reads no objects in a list without a type, and adds what is not there
    named["additional_special_tokens"] = [mask | {"content": SYMBOL}, "<none>"]
    (source / "special_tokens_map.json").write_text(json.dumps(named))
    again = transformers.AutoTokenizer.from_pretrained(make(source, tmp_path / "again"), local_files_only=True)
    assert again.all_special_tokens == ours.all_special_tokens and len(again) == len(ours)
    said = capsys.readouterr().err
    assert "names tokens that its tokenizer has not, which are dropped: additional_special_tokens '<none>'" in said


def test_a_begin_of_text_that_a_model_has_not_is_not_in_the_text_of_its_template(tmp_path):
    """Of clients of every form: a template that asks for bos_token gets nothing, where the model was trained so."""
    source, chat = model_with(tmp_path / "in", MADE["byte-level"]()), "{{ bos_token }}" + CHAT
    named = [{"name": "default", "template": chat}, {"name": "rag", "template": CHAT}]
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"chat_template": named}
    texts = {}
    for bos in (None, EOS):
        (source / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": bos}))
        own = make(source, tmp_path / f"native-{bos is None}", format="native")
        exported = make(own, tmp_path / f"hf-{bos is None}")
        auto = transformers.AutoTokenizer.from_pretrained(exported, local_files_only=True)
        keys = GGUFFile(make(own, tmp_path / f"{bos is None}.gguf", format="gguf", pad_ffn=256)).keys
        assert keys["tokenizer.chat_template.rag"] == CHAT  # it does not ask for the token
        bos_text = keys["tokenizer.ggml.tokens"][keys["tokenizer.ggml.bos_token_id"]]
        messages = [{"content": "a"}]
        texts[bos] = auto.apply_chat_template(messages, tokenize=False)
        assert (
            jinja2.Template(keys["tokenizer.chat_template"]).render(messages=messages, bos_token=bos_text) == texts[bos]
        )
    assert texts == {None: "<|im_start|>a", EOS: f"{EOS}<|im_start|>a"}


@pytest.mark.parametrize(
    ("config", "generation", "eos_id", "is_said"),
    [
        (1, None, 1, False),
        (5, None, 5, True),  # config.json has priority over the tokenizer's, as transformers stops there
        (..., None, 1, False),
        (None, None, 1, False),
        ([5, 1], None, 1, True),
        (1, {"eos_token_id": 9}, 9, True),
        (5, {"eos_token_id": [9, 5]}, 5, True),
        (5, {"temperature": 1.0}, 5, True),
    ],
)
def test_one_id_ends_a_text_in_every_form(config, generation, eos_id, is_said, tmp_path):
    source = model_with(tmp_path / "in", MADE["ours"](), eos_token_id=config)
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    notices.begin(strict=())
    opened = open_source(source)
    assert opened.config.eos_token_id == opened.metadata().eos_id == eos_id
    assert ("eos-contradicts" in notices.counts()) == is_said
    if is_said and not generation:
        hf, path = make(source, tmp_path / "hf"), make(source, tmp_path / "m.gguf", format="gguf", pad_ffn=256)
        assert json.loads((hf / "config.json").read_text())["eos_token_id"] == eos_id
        assert json.loads((hf / "generation_config.json").read_text())["eos_token_id"] == eos_id
        assert GGUFFile(path).keys["tokenizer.ggml.eos_token_id"] == eos_id


@pytest.mark.parametrize(("token", "said"), [("<0x41>", "eos-contradicts"), ("<nowhere>", "config-keys-dropped")])
def test_an_end_of_text_of_tokenizer_config_beside_a_model_is_not_passed_over(token, said, tmp_path):
    source = model_with(tmp_path / "in", MADE["ours"]())
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"eos_token": token}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert open_source(source).config.eos_token_id == 1
    assert notices.counts() == {said: 1}


def test_an_end_of_text_outside_the_vocabulary_is_refused(tmp_path):
    source = model_with(tmp_path / "in", MADE["ours"]())
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 512]}')
    with pytest.raises(
        ValueError, match=r"generation_config.json: eos_token_id=\[1, 512\] must be an id from 0 to 511"
    ):
        open_source(source)
    (source / "generation_config.json").unlink()
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (source / name).unlink()
    config = json.loads((source / "config.json").read_text())
    del config["eos_token_id"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names no eos_token_id, and its default 50256 is outside of vocab_size=512"):
        open_source(source)


def test_a_changed_file_beside_our_weights_is_said(tmp_path):
    hf = make(model_with(tmp_path / "in", MADE["ours"]()), tmp_path / "hf")
    notices.begin(strict=())
    open_source(hf)
    assert not notices.counts()
    config = (hf / "config.json").read_text()
    (hf / "config.json").write_text(config.replace("1e-05", "1e-15"))
    assert np.isclose(open_source(hf).config.layer_norm_epsilon, 1e-15)
    assert notices.counts() == {"changed-since-export": 1}


def test_tokens_that_only_a_config_adds_are_not_dropped_in_silence(tmp_path):
    source = model_with(tmp_path / "in", MADE["ours"]())
    (source / "tokenizer.json").unlink()
    (source / "added_tokens.json").write_text(json.dumps({SYMBOL: 400}))
    with pytest.raises(
        ValueError, match="adds 1 tokens to tokenizer.model, such as '<|im_start|>'".replace("|", r"\|")
    ):
        find_tokenizer(source)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["Ctrl-C", "full"])
def test_an_interrupted_native_conversion_leaves_nothing(error, tmp_path, monkeypatch):
    source = model_with(tmp_path / "in", MADE["byte-level"]())
    write = native.write_safetensors

    def interrupted(directory, tensors, **options):
        write(directory, tensors[:3], **options)
        raise error

    monkeypatch.setattr(native, "write_safetensors", interrupted)
    with pytest.raises(type(error)):
        make(source, tmp_path / "out", format="native")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_summary_without_its_evaluation_is_named(tmp_path):
    (tmp_path / "summary.json").write_text('{"num_steps": 3}')
    assert native._heldout_notes(tmp_path, 4, key="heldout") == {}
    with pytest.raises(ValueError, match="summary.json is damaged: it has no heldout.sources"):
        native._heldout_notes(tmp_path, 3, key="heldout")


@pytest.mark.slow
def test_flipped_bits_of_every_form_are_named(tmp_path):
    """A sample of what benchmarks/flip_bits.py does."""
    flip_bits = runpy.run_path(str(REPOSITORY / "benchmarks" / "flip_bits.py"))
    assert flip_bits["main"](model_with(tmp_path / "in", MADE["ours"]()), flips=16, seed=3) == 0


@pytest.mark.slow
def test_a_run_goes_through_its_clients_and_back(tiny_run):
    round_trip = runpy.run_path(str(REPOSITORY / "benchmarks" / "clients_round_trip.py"))
    assert round_trip["main"](tiny_run[1]) == 0
