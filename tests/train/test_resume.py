"""kill -9 the real command at chosen moments, start it again, and find every bit as if nothing had happened."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from support.real_store import build_real_store, write_config

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kill_resume.py"
PER_STEP = 16 * 24
STEPS = (20, 12)


@pytest.fixture(scope="module")
def kill_resume():
    spec = importlib.util.spec_from_file_location("kill_resume", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_resume"] = module
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)  # its runs compile as a user's do
        yield module


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, kill_resume):
    """A config file and the workdir of its run that nobody killed."""
    folder = tmp_path_factory.mktemp("resume")
    build_real_store(folder / "store")
    config = write_config(
        folder / "config.py",
        store=folder / "store",
        curriculum__num_tokens=tuple(steps * PER_STEP for steps in STEPS),
        evaluation__every_steps=5,
        checkpoint__every_steps=6,
        log__sample_prompt="eta",
        log__sample_tokens=1,
    )
    kill_resume.finish(config, folder / "run", changes=())
    return config, folder / "run"


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(undisturbed, kill_resume, tmp_path):
    """Three kills; benchmarks/kill_resume.py does as many as are asked for."""
    config, expected = undisturbed
    moments = ("during a save", "during a step", "after the switch")
    hits = kill_resume.run_with_kills(config, tmp_path / "run", moments, switch=STEPS[0], seed=1, changes=())
    assert hits, "no kill hit the run before it ended"
    assert kill_resume.differences(tmp_path / "run", expected) == []
    steps = [row["step"] for row in kill_resume.rows_of(tmp_path / "run") if row["kind"] == "train"]
    assert steps == list(range(1, sum(STEPS) + 1))
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if "tmp" in path.name]


@pytest.mark.slow
def test_the_comparison_sees_a_difference(undisturbed, kill_resume, tmp_path):
    _, expected = undisturbed
    run = tmp_path / "run"
    shutil.copytree(expected, run)
    assert kill_resume.differences(run, expected) == []
    shutil.rmtree(run / "checkpoints" / str(sum(STEPS)))  # now an earlier one is the last
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    row = next(number for number, line in enumerate(lines) if '"kind": "train"' in line)
    lines[row] = lines[row].replace('"loss": ', '"loss": 1')
    (run / "metrics.jsonl").write_text("".join(lines))
    problems = kill_resume.differences(run, expected)
    assert any(problem.startswith("state") for problem in problems)
    assert any(problem.startswith("line") for problem in problems)
