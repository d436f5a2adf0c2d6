"""The README against the repository: its commands are what the gate runs and what `btlm` takes, its files exist."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from btlm_jax import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.strip()
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
BTLM_COMMANDS = [
    shlex.split(found[1], comments=True) for line in COMMANDS if (found := re.search(r"(?:^|/)btlm (.*)$", line))
]


def test_the_gate_runs_the_test_command_as_written():
    (command,) = (line for line in COMMANDS if "pytest" in line)
    assert command in (ROOT / ".ci/run").read_text().splitlines()


@pytest.mark.parametrize("arguments", BTLM_COMMANDS, ids=" ".join)
def test_every_btlm_command_parses(arguments, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = [word for word in arguments if not word.startswith("--")]
    assert cli.main([*words, "--help"]) == cli.DONE
    shown = capsys.readouterr().out
    flags = {word[2:].split("=")[0] for word in arguments if word.startswith("--")}
    assert all(f"--{flag}" in shown for flag in flags if not flag.startswith("config."))
    for word in arguments:
        if word.startswith("--config="):
            assert (ROOT / word.partition("=")[2]).is_file(), word
    if words == ["train"]:  # the values given are ones that the config takes
        planned = [*arguments, "--dry-run"]
        monkeypatch.setattr(sys, "argv", ["btlm", *planned])  # where config_flags looks for --config.x.y
        assert cli.main(planned) == cli.DONE


def test_every_file_named_exists():
    map_text = re.search(r"## Map.*?```\n(.*?)```", README, flags=re.DOTALL)[1]
    package, rest = map_text.split("\nconfigs/", 1)
    modules = re.findall(r"(?:^ {2}|; {2})([a-z_]+(?:\.py|/))", package, flags=re.MULTILINE)
    named = [ROOT / "btlm_jax" / name for name in modules]
    for folder, names in re.findall(r"^(configs|launch)/ +(.*)$", "configs/" + rest, flags=re.MULTILINE):
        named += [ROOT / folder / name for name in re.findall(r"[a-z0-9_]+\.(?:py|sh)", names)]
    named += [ROOT / "tests" / name for name in re.findall(r"`(test_[a-z_]+\.py)`", README)]
    named += [ROOT / name for name in re.findall(r"`((?:benchmarks|launch|tests|btlm_jax)/[\w/.]+)`", README)]
    assert len(named) > 45
    assert [str(path) for path in named if not path.exists()] == []


def test_every_module_is_in_the_map():
    map_text = re.search(r"## Map.*?```\n(.*?)```", README, flags=re.DOTALL)[1]
    modules = {path.name for path in (ROOT / "btlm_jax").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert sorted(name for name in modules if name not in map_text) == []
