"""The core reads in one sitting: how many files and lines one batch passes, and functions one matrix product."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "follow_batch.py"


@pytest.mark.slow
def test_a_batch_and_a_product_pass_few_files_and_functions():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    result = subprocess.run([sys.executable, BENCHMARK], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    for file in ("data/reader.py", "model/projection.py", "train/step.py"):  # the recorder records
        assert file in result.stdout
