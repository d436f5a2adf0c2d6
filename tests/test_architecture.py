"""Imports only go down, and each outside library has its room."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "btlm_jax"

LAYER = {
    "config": 0, "curriculum": 0, "store": 0, "files": 0, "figures": 0, "places": 0,
    "mup": 1, "sharding": 1, "metrics": 1, "writers": 1,
    "attention": 2, "collectives": 2, "corpus": 2, "cpu": 2, "data": 2, "loss": 2, "model": 2, "optimizer": 2,
    "sampling": 2,
    "step": 3, "checkpoint": 3, "decoders": 3, "detokenize": 3,
    "convert": 4, "describe": 4, "evaluate": 4, "generate": 4, "interrupt": 4, "loading": 4, "plan": 4, "prepare": 4,
    "program": 4, "prompts": 4, "quantize": 4, "report": 4, "serve": 4, "train": 4, "tune": 4,
    "cli": 5, "__main__": 6, "__init__": 0,
}  # fmt: skip
ROOM_OF = {
    "flax.linen": {"model"},
    "orbax": {"checkpoint"},
    "grain": {"data", "corpus"},
    "tensorflow_datasets": {"data", "corpus"},
    "array_record": {"data", "corpus"},
    "sentencepiece": {"corpus"},
    "tokenizers": {"corpus", "convert"},
    "tiktoken": {"corpus"},
    "ftfy": {"corpus"},
    "zstandard": {"corpus", "data"},
    "orjson": {"corpus"},
    "pyarrow": {"corpus"},
    "fsspec": {"places"},
    "ray": {"corpus"},
    "torch": {"convert"},
    "transformers": {"convert"},
    "gguf": {"convert"},
    "absl.flags": {"cli"},
    "tensorboardX": {"metrics", "writers"},
    "matplotlib": {"figures", "evaluate", "tune"},
}
NEVER = {("corpus", "model"), ("model", "data"), ("data", "corpus"), ("data", "model")}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if path.parent.name == "remote_code":  # is copied out of the package, where only relative imports work
                continue
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path):
    mine = room(path)
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "btlm_jax" and len(parts) > 1 and parts[1] in LAYER:
            theirs = parts[1]
            assert LAYER[theirs] <= LAYER[mine], f"{mine} imports {theirs}, which is above it"
            assert (mine, theirs) not in NEVER, f"{mine} must not import {theirs}"
        for library, rooms in ROOM_OF.items():
            if name == library or name.startswith(library + "."):
                assert mine in rooms, f"{mine} imports {library}, which belongs in {rooms}"


def test_every_module_has_a_layer():
    assert {room(path) for path in MODULES} <= LAYER.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 320, "which idea wants its own room?"
