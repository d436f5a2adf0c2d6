"""Every script under benchmarks/ says what it is for, by --help and by its docstring."""

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if "__main__" in path.read_text())
OF_EXTRAS = {"torch", "transformers", "datasketch", "xllamacpp", "gguf"}  # without which --help must work


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_its_flags_and_its_help_is_its_docstring(path):
    tree = ast.parse(path.read_text())
    assert path.name in (ast.get_docstring(tree) or "")
    parsers = [
        {word.arg: ast.unparse(word.value) for word in node.keywords}
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "argparse.ArgumentParser"
    ]
    assert parsers == [{"description": "__doc__", "formatter_class": "argparse.RawDescriptionHelpFormatter"}]
    imported = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {(node.module or "").split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not imported & OF_EXTRAS


def test_there_are_scripts():
    assert len(SCRIPTS) >= 20
