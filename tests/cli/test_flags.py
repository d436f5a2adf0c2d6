"""Flags: one style, every spelling accepted, values of the declared type."""

import pytest

from btlm_jax import __version__
from btlm_jax.cli import UsageError, main
from btlm_jax.cli.parse import Flags, load_config
from btlm_jax.notices import StrictError
from btlm_jax.recipe.config import config_types


def parsed(*arguments: str) -> Flags:
    flags = Flags("btlm what: what it does")
    flags.define_string("num_tokens", "", "text")
    flags.define_string("colour", "red", "of it", choices=("red", "green"))
    flags.define_strings("stop_at", "texts")
    flags.define_integer("top_k", 3, "whole number")
    flags.define_float("min_p", 0.5, "number")
    flags.define_boolean("dry_run", False, "switch")
    flags.define_boolean("all_of_it", True, "switch")
    assert flags.parse(arguments)
    return flags


def test_defaults_and_types():
    flags = parsed()
    values = flags.string("num_tokens"), flags.strings("stop_at"), flags.integer("top_k"), flags.number("min_p")
    assert values == ("", [], 3, 0.5)
    assert (flags.boolean("dry_run"), flags.is_given("dry_run")) == (False, False)
    with pytest.raises(AssertionError, match="top_k"):
        flags.string("top_k")


@pytest.mark.parametrize("word", ["--dry-run", "--dry_run", "-dry-run", "--dry-run=true"])
def test_a_switch_is_spelled_with_either(word):
    assert parsed(word).boolean("dry_run") is True


@pytest.mark.parametrize(
    "word", ["--noall_of_it", "--no-all-of-it", "--no_all_of_it", "--noall-of-it", "--all-of-it=0"]
)
def test_a_switch_is_turned_off(word):
    assert parsed(word).boolean("all_of_it") is False


@pytest.mark.parametrize(
    "words",
    [["--num-tokens=-a-b"], ["--num_tokens", "-a-b"], ["--num-tokens", "-a-b"], ["--dry-run", "--num-tokens=-a-b"]],
)
def test_hyphens_of_a_value_stay(words):
    assert parsed(*words).string("num_tokens") == "-a-b"


def test_negative_numbers_repeated_flags_and_empty_values():
    flags = parsed("--top-k", "-2", "--stop-at=a-b", "--stop_at", "--c-d", "--num_tokens=")
    assert flags.integer("top_k") == -2
    assert flags.strings("stop_at") == ["a-b", "--c-d"]
    assert flags.is_given("num_tokens") and not flags.is_given("min_p")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--topk=3"], "unknown flag --topk; did you mean --top_k?"),
        (["--top-q=3"], "unknown flag --top-q; did you mean --top_k?"),
        (["--xyz=3"], "unknown flag --xyz (btlm what --help lists all)"),
        (["--notop_k"], "unknown flag --notop_k; did you mean --top_k?"),
        (["--top-k=many"], "--top_k=many must be a whole number"),
        (["--top-k=1.0"], "--top_k=1.0 must be a whole number"),
        (["--top-k=99999999999999999999"], "is too large for a whole number of 64 bits"),
        (["--top-k=" + "9" * 5000], "must be a whole number"),
        (["--min-p=nan"], "--min_p=nan must be a finite number"),
        (["--min-p=1e999"], "--min_p=1e999 must be a finite number"),
        (["--min-p=0,5"], "--min_p=0,5 must be a number"),
        (["--colour=grean"], "--colour=grean is not known; it may be red, green; did you mean green?"),
        (["--top-k"], "--top-k needs a value: --top-k=..."),
        (["--dry-run", "yes"], "unexpected argument 'yes'"),
        (["--dry-run=maybe"], "--dry-run=maybe is a switch: give --dry-run alone, or true or false"),
        (["--", "--dry-run"], "unexpected argument '--dry-run'"),
        (["--"], "unexpected argument '--'"),
        (["--config.seed=3"], "unknown flag --config.seed"),
    ],
)
def test_wrong_flags_are_usage_errors(words, message):
    with pytest.raises(UsageError) as raised:
        parsed(*words)
    assert message in str(raised.value)


def test_help_shows_names_types_choices_and_defaults(capsys):
    flags = Flags("btlm what: what it does")
    flags.define_integer("top_k", 3, "whole number")
    flags.define_string("colour", "red", "of it", choices=("red", "green"))
    flags.define_strings("stop", "text")
    flags.define_boolean("search", True, "look for it")
    assert not flags.parse(["--top-k=x", "--help"])
    shown = capsys.readouterr().out
    for line in (
        "btlm what: what it does",
        "  --top_k=N               whole number (default 3)",
        "  --colour=TEXT           of it (one of red, green; default red)",
        "  --stop=TEXT             text (may be given several times)",
        "  --search                look for it (on by default, --no_search turns it off)",
    ):
        assert line in shown.splitlines()


def test_a_flag_given_twice_is_said_and_the_last_one_counts(capsys):
    flags = parsed("--top_k=1", "--stop-at=a", "--top-k=2", "--stop-at=b")
    assert flags.integer("top_k") == 2 and flags.strings("stop_at") == ["a", "b"]
    assert capsys.readouterr().err == "note: --top_k is given more than once; the last one counts (given-twice)\n"
    with pytest.raises(StrictError):
        parsed("--top_k=1", "--top_k=1", "--strict")


@pytest.mark.parametrize("arguments", [["train", "--version"], ["corpus", "clean", "--version"], ["--version"], ["-V"]])
def test_the_version_is_said_everywhere(arguments, capsys):
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"btlm {__version__}\n"


CONFIG = """from ml_collections import ConfigDict, {import_}

def get_config(width="8"):
    model = dict(d_model=int(width), qk_norm="none")
    config = ConfigDict(dict(seed=1, model=model, mup=dict(), curriculum=dict(seq_len=(4,))))
    config.mup.base_d_model = config.model.get_ref("d_model")
    {more}
    return config
"""


def changed(tmp_path, *changes: str, argument: str = "", import_: str = "FieldReference", more: str = "pass") -> dict:
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(import_=import_, more=more))
    return load_config(file, argument=argument, changes=dict(change.split("=", 1) for change in changes))


def test_keys_are_changed_as_their_types_read_them(tmp_path):
    assert changed(tmp_path)["model"] == {"d_model": 8, "qk_norm": "none"}
    assert changed(tmp_path, argument="16")["mup"]["base_d_model"] == 16
    assert changed(tmp_path, "model.d_model=1_024")["mup"]["base_d_model"] == 1024  # what refers to it follows
    assert changed(tmp_path, "optimizer.eps=1e-5", more="config.optimizer = ConfigDict()")["optimizer"]["eps"] == 1e-5
    for text in ("(64,128)", "[64, 128]", "64,128", "(64, 128,)"):
        assert changed(tmp_path, f"curriculum.seq_len={text}")["curriculum"]["seq_len"] == (64, 128)
    assert changed(tmp_path, "curriculum.seq_len=(64,)")["curriculum"]["seq_len"] == (64,)
    text = "it's a (text), 3"
    read = changed(tmp_path, f"log.sample_prompt={text}", more="config.log = ConfigDict()")
    assert read["log"]["sample_prompt"] == text


def test_a_config_of_json_is_read_too(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 1, "curriculum": {"seq_len": [4, 8]}}')
    read = load_config(tmp_path / "config.json", argument="", changes={"seed": "5"})
    assert read.pop("bad_numbers")["max_skips"] > 0  # a section that older files have not
    assert read == {"seed": 5, "curriculum": {"seq_len": [4, 8]}}
    for text in ("[1]", "{", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json (is not|must be)"):
            load_config(tmp_path / "config.json", argument="", changes={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.lr=3", "did you mean optimizer.peak_learning_rate or "),
        ("optimizer.learning_rate=3", "did you mean optimizer.peak_learning_rate or optimizer.end_learning_rate?"),
        ("model.layers=3", "did you mean model.num_layers?"),
        ("model.d_modl=3", "did you mean model.d_model?"),
        ("modle.d_model=3", "did you mean model.d_model?"),
        ("d_ff=3", "did you mean model.d_ff?"),
        ("model.wd=3", "did you mean optimizer.weight_decay?"),
        ("zzz.qqq=3", "btlm train --help=config lists all"),
        ("model=3", "--config.model is a section; give one of its keys: model.vocab_size, "),
        ("model.d_model.x=3", "did you mean"),
        ("=3", "unknown config key "),
        ("curriculum.seq_len[0]=3", "give the whole tuple"),
        ("curriculum.seq_len=(1.5,)", "must be whole numbers, for example --config.curriculum.seq_len=2048,8192"),
        ("curriculum.seq_len=(4, 5", "must be whole numbers"),
        ("curriculum.seq_len=abc", "must be whole numbers"),
        ("seed=True", "--config.seed=True must be a whole number"),
        ("seed=1e3", "--config.seed=1e3 must be a whole number"),
        ("optimizer.eps=1e400", "--config.optimizer.eps=1e400 must be a finite number"),
        ("optimizer.eps=0,1", "--config.optimizer.eps=0,1 must be a number"),
        ("optimizer.eps=1", "has no section optimizer"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused_in_our_words(tmp_path, change, message):
    with pytest.raises((UsageError, ValueError)) as raised:
        changed(tmp_path, change)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "config.py, line 1: SyntaxError: "),
        ("import nothing_of_this_name\n", "config.py, line 1: ModuleNotFoundError: No module named"),
        ("\ndef get_config():\n    return {}['x']\n", "config.py, line 3: KeyError: 'x'"),
        ("raise SystemExit(0)\n", "config.py, line 1: SystemExit: 0"),
        ("def get_config():\n    return 3\n", "config.py: get_config must return a ConfigDict, not a int"),
        ("x = 3\n", "config.py has no function get_config"),
        ("get_config = dict", "unknown config key"),
    ],
)
def test_a_config_file_with_a_fault_is_named_with_the_line(tmp_path, text, message):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises((UsageError, ValueError)) as raised:
        load_config(tmp_path / "config.py", argument="", changes={"model.zzz": "3"} if "dict" in text else {})
    assert message in str(raised.value)


def test_every_key_of_the_config_is_in_the_help_with_its_meaning(capsys):
    assert main(["train", "--help=config"]) == 0
    shown = capsys.readouterr().out
    assert "flags:" not in shown
    for key in config_types():
        assert f"    {key} " in shown
    assert "whole numbers T of each phase; every one divides the longest" in shown
    assert main(["plan", "--help"]) == 0
    assert "--topology=TEXT" in (shown := capsys.readouterr().out) and "optimizer.beta1" in shown


def test_paths_know_the_home_directory_and_are_no_urls(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    flags = parsed("--num_tokens=~/runs/a")
    assert str(flags.path("num_tokens")) == str(flags.optional_path("num_tokens")) == "/home/x/runs/a"
    assert str(flags.location("num_tokens")) == "/home/x/runs/a"
    assert parsed().optional_path("num_tokens") is None
    flags = parsed("--num_tokens=gs://bucket/a")
    assert flags.location("num_tokens") == "gs://bucket/a"
    with pytest.raises(UsageError, match="--num_tokens=gs://bucket/a is a URL; a path on this machine is needed"):
        flags.path("num_tokens")
    flags = parsed("--num_tokens=")
    with pytest.raises(UsageError, match="--num_tokens= is empty; give the name of a file or directory, or leave the"):
        flags.optional_path("num_tokens")
    for read in (flags.path, flags.location):
        with pytest.raises(UsageError, match="--num_tokens=DIR is needed: text"):
            read("num_tokens")
