"""Flags: one style, every spelling accepted, values of the declared type."""

import pytest

from btlm_jax.cli import UsageError
from btlm_jax.cli.parse import Flags


def parsed(*arguments: str) -> Flags:
    flags = Flags("what it does")
    flags.define_string("num_tokens", "", "text")
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
        (["--topk=3"], "Unknown command line flag 'topk'"),
        (["--top-q=3"], "Unknown command line flag 'top_q'. Did you mean: top_k"),
        (["--top-k=many"], "flag --top_k=many: invalid literal for int"),
        (["--top-k"], "Missing value for flag"),
        (["--dry-run", "yes"], "unexpected argument 'yes'"),
        (["--", "--dry-run"], "unexpected argument '--dry-run'"),
    ],
)
def test_wrong_flags_are_usage_errors(words, message):
    with pytest.raises(UsageError) as raised:
        parsed(*words)
    assert message in str(raised.value)


def test_help_shows_underscores(capsys):
    flags = Flags("what it does")
    flags.define_integer("top_k", 3, "whole number")
    assert not flags.parse(["--top-k=x", "--help"])
    shown = capsys.readouterr().out
    assert "what it does" in shown and "--top_k           whole number" in shown
