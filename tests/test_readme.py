"""The README and the documentation against the repository: commands are what `btlm` takes, files exist."""

import configparser
import re
import shlex
from pathlib import Path

import pytest
from support.docs_scripts import ROOT, markdown_pages

from btlm_jax import cli

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in markdown_pages()}
COMMANDS = sorted(
    {
        line.strip()
        for text in PAGES.values()
        for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    }
)
BTLM_COMMANDS = sorted(
    {
        tuple(shlex.split(match[1], comments=True))
        for line in COMMANDS
        if (match := re.search(r"(?:^|/|&& )btlm (.*)$", line))
    }
)
NAMED_IN_TEXT = sorted(  # `btlm plan --check` inside a sentence or a table
    {
        tuple(shlex.split(command))
        for text in PAGES.values()
        for command in re.findall(r"`btlm ([^`<]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        if "\n" not in command
    }
)
CONFIGS = sorted({config for each in BTLM_COMMANDS if (config := tuple(x for x in each if x.startswith("--config")))})
DRY_RUNS = sorted({tuple(x for x in each if "--workdir" not in x) for each in BTLM_COMMANDS if "--dry-run" in each})
REPOSITORY_FOLDERS = ("benchmarks", "btlm_jax", "configs", "docs", "experiments", "launch", "tests")


def _words(arguments: tuple[str, ...]) -> list[str]:
    return [word for word in arguments if not word.startswith("-")]


def _help(words: list[str], capsys) -> str:
    assert cli.main([*words, "--help"]) == cli.DONE
    return capsys.readouterr().out


def test_the_gate_runs_the_test_command_as_written():
    (command,) = (line for line in COMMANDS if "pytest" in line)
    assert command in (ROOT / ".ci/run").read_text().splitlines()


@pytest.mark.parametrize("arguments", [*BTLM_COMMANDS, *NAMED_IN_TEXT], ids=" ".join)
def test_every_btlm_command_parses(arguments, capsys):
    words = _words(arguments)
    shown = _help(words, capsys)
    flags = {word[2:].split("=")[0].replace("-", "_") for word in arguments if word.startswith("--")} - {"help"}
    known = set(re.findall(r"--(\w+)", shown))
    assert [flag for flag in flags if not flag.startswith("config.") and flag not in known] == []
    if arguments in BTLM_COMMANDS and words[0] == "corpus" and len(words) == 1:
        pytest.fail("a command of corpus needs its stage")


@pytest.mark.parametrize("arguments", CONFIGS, ids=" ".join)
def test_every_config_exists_and_takes_its_values(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    planned = []
    monkeypatch.setattr("btlm_jax.train.loop.dry_run", lambda config, workdir: planned.append(config) or "the plan")
    arguments = ["train", *arguments, "--dry-run"]
    assert cli.main(arguments) == cli.DONE and len(planned) == 1


@pytest.mark.parametrize("arguments", DRY_RUNS, ids=" ".join)
def test_dry_runs_print_the_plan(arguments, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main(arguments) == cli.DONE
    assert "Curriculum: " in capsys.readouterr().out


def test_every_flag_with_choices_is_given_one_of_them():
    choices = {
        "format": ("hf", "native", "jais", "gguf", "int4"),
        "executor": ("local", "ray", "slurm"),
        "preset": ("strict", "slimpajama"),
        "kind": ("sentencepiece", "byte_level_bpe"),
    }
    given = [word[2:].split("=", 1) for arguments in BTLM_COMMANDS for word in arguments if word.startswith("--")]
    assert [pair for pair in given if len(pair) == 2 and pair[1] not in choices.get(pair[0], (pair[1],))] == []


def test_every_launcher_command_is_one_of_its_verbs():
    script = (ROOT / "launch/tpu.sh").read_text()
    (verbs,) = re.findall(r"^    ((?:\w+ \| )+\w+)\) shift ;;$", script, flags=re.MULTILINE)
    used = [match[1] for line in COMMANDS if (match := re.search(r"launch/tpu\.sh(?: (\w+))?", line))]
    assert used and set(used) <= set(verbs.split(" | "))


def test_every_extra_exists():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = {
        extra
        for text in PAGES.values()
        for extras in re.findall(r"(?:btlm_jax|-e '\.)\[([a-z0-9_,]+)\]", text)
        for extra in extras.split(",")
    }
    assert named and named <= set(setup["options.extras_require"])
    table = PAGES["docs/reference/files.md"].split("## Optional installations")[1]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)))) == set(
        setup["options.extras_require"]
    )


@pytest.mark.parametrize("page", PAGES)
def test_every_path_named_exists(page):
    path = rf"(?:{'|'.join(REPOSITORY_FOLDERS)})/[\w./-]*"
    named = set(re.findall(rf"`({path})`", PAGES[page]))
    named |= set(re.findall(rf"(?<![\w/.-])({path}\.(?:py|md|sh|svg|json|cc|h|png))\b", PAGES[page]))
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_inside_the_repository_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL))
    here = (ROOT / page).parent
    assert [link for link in links if not (here / link).resolve().exists()] == []


def test_the_readme_is_short_and_names_every_verb():
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= 150
    rows = re.findall(r"^\| `btlm ([\w-]+)` \|.*\((docs/guide/[\w-]+\.md)\) \|$", readme, flags=re.MULTILINE)
    assert dict(rows) == {verb: f"docs/guide/{verb}.md" for verb in cli.VERBS}


def test_every_folder_of_the_package_is_in_the_map():
    rows = re.findall(r"^\| `(\w+)/` \|", PAGES["docs/internals/map.md"], flags=re.MULTILINE)
    folders = [path.parent.name for path in (ROOT / "btlm_jax").glob("*/__init__.py")]
    assert sorted(rows) == sorted(folders)


def test_every_test_file_that_a_guarantee_names_exists_and_most_are_named():
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", PAGES["docs/guarantees.md"]))
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    assert named <= tests and len(named) > 50


def test_commands_are_found():
    assert len(BTLM_COMMANDS) > 40 and len(NAMED_IN_TEXT) > 10 and Path("README.md").name in PAGES
