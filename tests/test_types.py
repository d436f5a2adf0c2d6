"""The types of the package are right, by the rules of pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_basedpyright_finds_no_error():
    found = subprocess.run([Path(sys.executable).with_name("basedpyright")], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
