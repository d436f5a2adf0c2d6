"""Interrupt the real command at chosen moments, start it again, and find every bit as if nothing had happened."""

import importlib.util
import random
import shutil
import sys
from pathlib import Path

import pytest
from support.real_store import build_real_store, write_config

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kill_resume.py"
PER_STEP, STEPS = 8 * 48, 20  # of one phase: tests/train/test_processes.py resumes over a change of phases


@pytest.fixture(scope="module")
def kill_resume():
    spec = importlib.util.spec_from_file_location("kill_resume", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_resume"] = module
    spec.loader.exec_module(module)
    little_optimized = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # the script compiles as a user does
    environment_of = module.environment_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "environment_of", lambda **options: environment_of(**options) | little_optimized)
        yield module


@pytest.fixture(scope="module")
def runs(tmp_path_factory, kill_resume):
    folder = tmp_path_factory.mktemp("resume")
    build_real_store(folder / "store")
    config = write_config(
        folder / "config.py",
        store=folder / "store",
        curriculum__seq_len=(48,),
        curriculum__batch_size=(8,),
        curriculum__num_tokens=(STEPS * PER_STEP,),
        evaluation__every_steps=5,
        checkpoint__every_steps=6,
        log__sample_prompt="eta",
        log__sample_tokens=1,
    )
    return kill_resume.Runs(config, folder, switch=STEPS, changes=())


@pytest.mark.slow
def test_a_run_that_was_hit_ends_with_the_same_bits(runs, kill_resume, tmp_path):
    """Three hits; benchmarks/kill_resume.py does as many as are asked for."""
    hits = [
        kill_resume.Hit(moment=moment, signal=name, victims="all", delay=0.3)
        for moment, name in (("a save", "SIGKILL"), ("compilation", "SIGTERM"), ("the end report", "SIGKILL"))
    ]
    results = runs.hit(tmp_path / "run", hits, kind="one", rng=random.Random(0))
    assert [(row["problem"], row.get("end", "")) for row in results] == [("", "")] * len(results)
    assert [row["codes"] for row in results] == [[-9], [75], [-9]]
    assert kill_resume.table(results).splitlines()[-1].startswith("| all | 3 | 2 | 1 | 0 | 3 / 0 / 0 |")
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if "tmp" in path.name]


@pytest.mark.slow
def test_the_comparison_sees_a_difference(runs, kill_resume, tmp_path):
    expected = runs.undisturbed(1)
    run = tmp_path / "run"
    shutil.copytree(expected, run)
    assert kill_resume.differences(run, expected) == []
    shutil.rmtree(run / "checkpoints" / str(STEPS))  # now an earlier one is the last
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    row = next(number for number, line in enumerate(lines) if '"kind": "train"' in line)
    lines[row] = lines[row].replace('"loss": ', '"loss": 1')
    (run / "metrics.jsonl").write_text("".join(lines))
    problems = kill_resume.differences(run, expected)
    assert any(problem.startswith("state") for problem in problems)
    assert any(problem.startswith("line") for problem in problems)
