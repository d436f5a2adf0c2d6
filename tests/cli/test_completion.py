"""Completion scripts: what bash offers is what the flags are; every flag of every command is in all three scripts."""

import subprocess

import pytest

from btlm_jax.cli import UsageError, main
from btlm_jax.cli.completion import bash_script, commands, completion, fish_script, zsh_script


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "btlm.bash"
    path.write_text(bash_script())
    return path


def offered(script, line: str) -> list[str]:
    """Return what bash completes a line with."""
    code = f'source {script}; COMP_LINE=$1 COMP_POINT=${{#1}}; _btlm; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code, "bash", line], capture_output=True, text=True, check=True)
    return [word.strip() for word in done.stdout.splitlines() if word.strip()]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("btlm tr", ["train"]),
        (".venv/bin/btlm co", ["convert", "corpus", "configs", "completion"]),
        ("btlm corpus to", ["tokenizer", "tokenize"]),
        ("btlm tune ", ["coord-check"]),
        ("btlm completion z", ["zsh"]),
        ("btlm convert --fo", ["--format="]),
        ("btlm convert --from=x --format=g", ["gguf"]),
        ("btlm train --config=local", ["local_cpu"]),
        ("btlm train --config=x --config.optimizer.b", ["--config.optimizer.beta1=", "--config.optimizer.beta2="]),
        ("btlm corpus dedup --preset=", ["strict", "slimpajama"]),
        ("btlm train --config.curriculum.seq_len=(*) --dry", ["--dry_run"]),
        ("btlm generate --co", []),
    ],
)  # fmt: skip
def test_bash_completes(script, line, words):
    assert offered(script, line) == words


def test_bash_completes_files_of_other_flags(script, tmp_path):
    (tmp_path / "prompts.txt").touch()
    assert offered(script, f"btlm generate --prompts_file={tmp_path}/pro") == [f"{tmp_path}/prompts.txt"]


def test_every_command_and_flag_is_in_every_script():
    scripts = bash_script(), zsh_script(), fish_script()
    for command, define in commands().items():
        for flag in define().defined():
            assert all(flag.name in script for script in scripts), (command, flag)


def test_help_of_every_command_is_its_own_page(capsys):
    pages = {}
    for command in commands():
        assert main([*command.split(), "--help"]) == 0
        pages[command] = capsys.readouterr().out
        assert pages[command].startswith(f"btlm {command}")
    assert len(set(pages.values())) == len(pages)


def test_a_shell_must_be_named(capsys):
    with pytest.raises(UsageError, match="needs one of bash, zsh, fish; got bsh; did you mean bash?"):
        completion(["bsh"])
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == bash_script() + "\n"


def test_choices_are_those_of_the_code():
    from btlm_jax.convert import conversion, ggml
    from btlm_jax.corpus.near_duplicates.lsh import PRESETS
    from btlm_jax.corpus.stages import clean, train_tokenizer
    from btlm_jax.decode.decoder import CACHE_DTYPES
    from btlm_jax.quantize.quantize_model import Method

    choices = {
        (command, flag.name): flag.choices for command, define in commands().items() for flag in define().defined()
    }
    assert choices["convert", "format"] == conversion.FORMATS
    assert choices["convert", "dtype"] == conversion.DTYPES
    assert set(choices["convert", "file_type"]) == set(ggml.FILE_TYPES)
    assert set(choices["convert", "method"]) == set(Method)
    assert choices["corpus clean", "on_bad_file"] == clean.ON_BAD_FILE
    assert set(choices["corpus dedup", "preset"]) == set(PRESETS)
    assert choices["corpus tokenizer", "kind"] == train_tokenizer.KINDS
    assert set(choices["generate", "cache_dtype"]) == {*CACHE_DTYPES, "model"}
