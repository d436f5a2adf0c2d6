"""Completion scripts: what bash offers is what the flags are; every flag of every command is in all three scripts."""

import os
import pty
import select
import shutil
import signal
import subprocess
import time

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
        ("btlm tune ", ["coord-check", "lr-transfer", "search", "scaling"]),
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


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("btlm tr", "btlm train "),
        ("btlm corpus cl", "btlm corpus clean "),
        ("btlm convert --from=x --format=g", "btlm convert --from=x --format=gguf "),
        ("btlm train --config.optimizer.beta1", "btlm train --config.optimizer.beta1="),
        ("btlm generate --prompts_file=prom", "btlm generate --prompts_file=prompts.txt "),
    ],
)
def test_zsh_completes(tmp_path, line, completed):
    """What zsh's line editor, in a terminal of its own, has after the line and a tab."""
    (tmp_path / "prompts.txt").touch()
    (tmp_path / "btlm.zsh").write_text(zsh_script())
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execvpe("zsh", ["zsh", "-f", "-i"], os.environ | {"TERM": "dumb", "HOME": str(tmp_path), "COLUMNS": "300"})
    try:
        show = "show() { print -r -- \"<$BUFFER>\"; exit }; zle -N show; bindkey '^X' show"
        load = f"{os.environ.get('ZSH_SETUP', '')}; autoload -U compinit; compinit -u -D; source btlm.zsh; {show}"
        os.write(terminal, f"{load}; echo LOADED\n".encode())
        read_until(terminal, b"LOADED\r\n")
        os.write(terminal, f"{line}\t\x18".encode())
        assert f"<{completed.strip()}" in read_until(terminal, b">\r\n").decode()
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)


def read_until(terminal: int, end: bytes) -> bytes:
    """Return what a terminal shows up to an end, or in 20 s."""
    shown, deadline = b"", time.monotonic() + 20
    while not shown.endswith(end) and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                shown += os.read(terminal, 1 << 16)
            except OSError:  # the shell has ended
                break
    return shown


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(tmp_path):
    (tmp_path / "prompts.txt").touch()
    (tmp_path / "btlm.fish").write_text(fish_script())
    cases = {
        "btlm tr": ["train"],
        "btlm tune ": ["coord-check", "lr-transfer", "search", "scaling"],
        "btlm corpus clean ": [],  # no verbs once more
        "btlm convert --format=g": ["--format=gguf"],
        "btlm train --config=loc": ["--config=local_cpu"],
        "btlm train --config.optimizer.b": ["--config.optimizer.beta1", "--config.optimizer.beta2"],
        "btlm generate --prompts_file=prom": ["--prompts_file=prompts.txt"],
    }
    code = "source btlm.fish; for line in $argv; complete -C $line | cut -f1; echo '#'; end"
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(
        ["fish", "--no-config", "-c", code, *cases], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    found = [words.split() for words in done.stdout.split("#\n")]
    assert found == [*cases.values(), []], done.stderr


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
