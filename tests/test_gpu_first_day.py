"""benchmarks/gpu_first_day.py around its sections: what it refuses, keeps, leaves out, tries again and says.

Its sections are a stand-in's, in processes of their own as they are; the real ones need a GPU, or minutes in miniature.
"""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# The script with other sections: cases of `attention` abort the process or fail as files beside it say, `losses` hangs.
STAND_IN = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import gpu_first_day as script
from gpu_first_day import Doing, Row

script.HERE = Path(__file__).resolve()
there = Path(__file__).parent

def machine(setting):
    yield Row(section="machine", case="versions", figure=(there / "versions").read_text(), verdict=script.MEASURED)

def attention(setting):
    for case in ("one", "two", "three"):
        if case in setting.skipped:
            continue
        yield Doing(text=case, case=case)
        with open(there / "called", "a") as file:
            file.write(case + " ")
        if (there / f"abort-{{case}}").exists():
            os.abort()
        yield script.checked("attention", case, 1.0, 0.5 if (there / f"fail-{{case}}").exists() else 2.0)

def losses(setting):
    yield Doing(text="a while")
    (there / "began").touch()
    while (there / "hang").exists():
        time.sleep(0.02)
    yield script.checked("losses", "all", 0.0, 1.0)

script.RUN = dict(machine=machine, attention=attention, losses=losses)
script.SECTIONS = dict.fromkeys(script.RUN, 60.0)
if __name__ == "__main__":
    sys.exit(script.main())
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "stand_in.py").write_text(STAND_IN.format(benchmarks=str(BENCHMARKS)))
    (tmp_path / "versions").write_text("jax 1")
    return tmp_path


def start(place: Path, *words: str, **settings: str) -> subprocess.Popen:
    command = [sys.executable, place / "stand_in.py", "--miniature", f"--folder={place / 'kept'}", *words]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent), **settings}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def run(place: Path, *words: str, code: int, **settings: str) -> tuple[str, str]:
    process = start(place, *words, **settings)
    said = process.communicate(timeout=120)
    assert process.returncode == code, said
    return said


def called(place: Path) -> list[str]:
    """Return the cases of attention that ran since the last call."""
    path = place / "called"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def test_a_case_that_aborts_leaves_the_others_and_is_tried_again_alone(place):
    (place / "abort-two").touch()
    table, said = run(place, code=1)
    assert called(place) == ["one", "two", "three"]
    assert re.search(r"^\| attention \| two \| exit code -6: .* \| FAILED \|$", table, re.MULTILINE)
    assert "| attention | three | 1 | 2 | ok |" in table and "3 checks hold, 1 failed in attention" in table
    assert "the same command goes on".lower() in said.lower() and "attention: two" in said
    assert (place / "kept" / "table.md").read_text().endswith(table)

    (place / "abort-two").unlink()
    table, said = run(place, code=0)
    assert called(place) == ["two"] and "losses: done before, 1 rows" in said
    assert "4 checks hold, 0 failed; 1 figures; 0 not run" in table and "broke off" not in table
    run(place, code=0)
    assert called(place) == []


def test_after_ctrl_c_nothing_is_left_running_and_the_same_command_goes_on(place):
    (place / "hang").touch()
    process = start(place)
    end = time.monotonic() + 60
    while not (place / "began").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    table, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert re.search(r"3 checks hold, 0 failed; 1 figures; 0 not run; .* minutes, stopped before the end", table)
    assert "Not begun: losses" in table and "The same command goes on" in said
    left = subprocess.run(["pgrep", "-f", str(place / "stand_in.py")], capture_output=True, text=True, check=False)
    assert left.stdout == ""
    called(place)
    (place / "hang").unlink()
    table, _ = run(place, code=0)
    assert called(place) == [] and "4 checks hold" in table


def test_what_is_not_run_is_said_with_the_reason(place):
    table, said = run(place, "--minutes=0.3", code=0)  # less than what a section needs
    left = "machine: all of it; attention: all of it; losses: all of it"
    assert f"Not run, the minutes were over: {left}\n" in table and "The same command goes on" in said


def test_rows_of_another_machine_do_not_stand_in_one_table(place):
    run(place, code=0)
    (place / "versions").write_text("jax 2")
    _, said = run(place, code=2)
    assert "is of another machine or code: versions was jax 1, is jax 2; give another --folder" in said
    _, said = run(place, code=2)
    assert "versions was jax 1, is jax 2" in said


SMI = "#!/usr/bin/env bash\nprintf '%b' \"${SMI}\"; exit ${SMI_CODE:-0}\n"
H100 = "{}, GPU-{}, NVIDIA H100 80GB HBM3, {}, 12\\n"


@pytest.fixture
def script(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return importlib.import_module("gpu_first_day")


@pytest.mark.parametrize(
    "settings, plugin, said",
    [
        (dict(SMI="No devices were found\\n", SMI_CODE="6"), "", "nvidia-smi finds no GPU: No devices were found"),
        (dict(SMI=H100.format(0, "a", "580.65")), "", "JAX has no plugin for CUDA here: pip install -e '.[cuda]'"),
        (dict(SMI=H100.format(0, "a", "550.90")), "jax_cuda13_plugin", "is 550.90, and jax_cuda13_plugin needs 580"),
        (dict(SMI=H100.format(0, "a", "520.61")), "jax_cuda12_plugin", "is 520.61, and jax_cuda12_plugin needs 525"),
        (
            dict(SMI=H100.format(0, "a", "580.65"), CUDA_VISIBLE_DEVICES="3"),
            "jax_cuda13_plugin",
            "CUDA_VISIBLE_DEVICES=3 names no GPU; there are 0",
        ),
    ],
)
def test_a_machine_that_cannot_run_it_is_refused_at_once(script, monkeypatch, settings, plugin, said):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True if name == plugin else None)
    with pytest.raises(script.CannotRunError, match=re.escape(said)):
        script.choose_gpu()


def test_the_first_visible_gpu_is_used_and_a_busy_one_said(script, monkeypatch, capsys):
    monkeypatch.setenv("SMI", H100.format(0, "a", "580.65") + H100.format(1, "b", "580.65").replace(" 12", " 9000"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert script.choose_gpu() == "0" and "WARNING" not in (said := capsys.readouterr().err)
    assert "GPU 0 of 2, NVIDIA H100 80GB HBM3, driver 580.65; the others are not used" in said
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,0")
    assert script.choose_gpu() == "1" and "WARNING: others use 9000 MiB" in capsys.readouterr().err


def test_without_nvidia_smi_miniature_is_named(script, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(script.CannotRunError, match="no GPU here, or no driver.*--miniature"):
        script.choose_gpu()


@pytest.mark.parametrize("is_miniature", [True, False])
def test_what_is_timed_is_what_the_other_scripts_take(script, is_miniature):
    from attention_contenders import CONTENDERS
    from train_step import CPU_OURS, CPU_PEERS, GPU_OURS, GPU_PEERS

    jobs = script.jobs_of(is_miniature=is_miniature)
    assert len({job.case for job in jobs}) == len(jobs)
    first = {}
    for job in jobs:
        words = list(job.command)
        if "--one" in words:
            framework, device = words[2], words[6]
            known = (*CPU_OURS, *CPU_PEERS) if device == "cpu" else (*GPU_OURS, *GPU_PEERS)
            assert framework in known and job.flops > 6e6 * job.num_tokens
        else:
            framework, device = words[2], words[6]
            assert framework in {*CONTENDERS["cpu"], *CONTENDERS["cuda"]}
        assert device == ("cpu" if is_miniature else "cuda")
        first.setdefault(job.of, job)
        # JAX would take the memory of the GPU from a peer's steps.
        assert not (job.is_peer and "--one" in words) or job.variables["JAX_PLATFORMS"] == "cpu"
    assert all(job.name.startswith("btlm_jax") and not job.variables.get("XLA_FLAGS") for job in first.values())


def test_a_time_is_held_against_ours_the_peak_and_what_was_predicted(script):
    job = script.Job(of="step", name="btlm_jax", command=(), variables={}, num_tokens=1000, flops=5e12)
    result = {"median": 0.02, "peak": 3 * 2**30, "predicted": 0.025, "first": 41.2}
    assert script._time_figure(job, result, ours=0.01, peak=1e15) == (
        "20.00 ms; 2.00 of ours; 50,000 tokens/s; MFU 25.0%; 3.0 GiB; 0.80 of the 25 ms predicted; first step 41 s"
    )
    assert script._time_figure(job, result, ours=None, peak=0).startswith("20.00 ms; 50,000 tokens/s; 3.0 GiB; ")
    row = script.Row(section="times", case="a|b", figure="1", verdict=script.MEASURED)
    assert str(row) == "| times | a/b | 1 |  |  |"
