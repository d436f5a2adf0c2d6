"""The launchers, with stand-ins on PATH for what is not here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REFUSING = 'echo "$@" >> "$(dirname "$0")/asked"; echo "it does not fit" >&2; exit 1'
LAUNCH = Path(__file__).parent.parent / "launch"
SLICE = {
    "NAME": "pod",
    "ZONE": "zone-a",
    "TYPE": "v5litepod-256",
    "CONFIG": "configs/pods/v5e_256.py",
    "WORKDIR": "/mnt/run",
}


def run(verb: str, folder: Path, *, gcloud: str, btlm: str = "true", **settings: str) -> subprocess.CompletedProcess:
    """Run launch/tpu.sh with stand-ins (bash): a gcloud that logs its arguments and then runs `gcloud`, and a btlm."""
    for name, script in (("gcloud", f'echo "$@" >> {folder}/log\n{gcloud}'), ("btlm", btlm)):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **settings}
    return subprocess.run(
        [LAUNCH / "tpu.sh", verb], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def log_of(folder: Path) -> str:
    return (folder / "log").read_text()


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_bash_and_executable(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize(
    "kind, version",
    [
        ("v4-128", "tpu-ubuntu2204-base"),
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_up_asks_for_the_runtime_of_the_generation_and_waits(tmp_path, kind, version):
    process = run(
        "up", tmp_path, gcloud='[[ "$*" != *describe* ]] || echo ACTIVE', **SLICE | {"TYPE": kind, "SPOT": "1"}
    )
    assert process.returncode == 0, process.stderr
    create, *_ = log_of(tmp_path).splitlines()
    assert f"--runtime-version={version}" in create and f"--accelerator-type={kind}" in create
    assert create.endswith("--spot") and "--zone=zone-a" in create


def test_up_stops_when_the_slice_failed(tmp_path):
    process = run("up", tmp_path, gcloud='[[ "$*" != *describe* ]] || echo FAILED', **SLICE)
    assert process.returncode == 1 and "pod is FAILED" in process.stderr


def test_run_starts_every_worker_detached(tmp_path):
    process = run("run", tmp_path, gcloud="true", **SLICE, FLAGS="--config.seed=2")
    assert process.returncode == 0, process.stderr
    start = log_of(tmp_path).splitlines()[-1]
    assert "--worker=all" in start and "nohup" in start
    assert "btlm train --distributed --config=configs/pods/v5e_256.py --workdir=/mnt/run --config.seed=2" in start


def test_run_copies_a_wheel_where_there_is_no_checkout(tmp_path):
    wheel = "dist/btlm_jax-1-py3-none-any.whl"
    process = run("run", tmp_path, gcloud="true", **SLICE | {"CONFIG": "pods/v5e_256"}, WHEEL=wheel)
    assert process.returncode == 0, process.stderr
    copy, install, start = log_of(tmp_path).splitlines()
    assert f"scp {wheel} pod:" in copy and "mv 'btlm_jax-1-py3-none-any.whl' btlm_jax/" in install
    assert ".venv/bin/pip install -q ./btlm_jax-1-py3-none-any.whl[tpu]" in install
    assert "btlm train --distributed --config=pods/v5e_256" in start


def test_beside_an_installed_package_the_btlm_on_path_trains(tmp_path):
    shutil.copytree(LAUNCH, tmp_path / "work" / "launch")
    (tmp_path / "btlm").write_text('#!/usr/bin/env bash\necho "$@"')
    (tmp_path / "btlm").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for words in (["local.sh"], ["gpu.sh", "local_cpu", "runs/local"]):
        command = [tmp_path / "work" / "launch" / words[0], *words[1:]]
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert shown == "train --config=local_cpu --workdir=runs/local\n"


@pytest.mark.parametrize("verb", ["up", "run"])
def test_what_does_not_fit_is_neither_created_nor_copied(tmp_path, verb):
    flags = """--config.mesh.tensor=2 --config.curriculum.seq_len="(4, 8)" --unrelated"""
    process = run(verb, tmp_path, gcloud="true", btlm=REFUSING, **SLICE, FLAGS=flags)
    assert process.returncode == 1 and "it does not fit" in process.stderr
    assert not (tmp_path / "log").exists()
    asked = "plan --check --topology=v5litepod-256 --config=configs/pods/v5e_256.py"
    changes = "--config.mesh.tensor=2 --config.curriculum.seq_len=(4, 8)"
    assert (tmp_path / "asked").read_text() == f"{asked} {changes}\n"


def test_without_btlm_here_nothing_is_created(tmp_path):
    lean = tmp_path / "lean"
    lean.mkdir()
    for tool in ("bash", "dirname", "env"):
        (lean / tool).symlink_to(shutil.which(tool))
    root = tmp_path / "checkout" / "launch"
    root.mkdir(parents=True)
    shutil.copy(LAUNCH / "tpu.sh", root)
    process = subprocess.run(
        [root / "tpu.sh", "up"], env={"PATH": str(lean), **SLICE}, capture_output=True, text=True, check=False
    )
    assert process.returncode == 2 and "no btlm here to check the layout with" in process.stderr


def test_watch_restarts_a_preempted_run_and_returns_the_last_code(tmp_path):
    codes = (
        '[[ "$*" == *"cat btlm_jax/exit_code"* ]] || exit 0\n'
        f'n=$(grep -c "cat btlm_jax" {tmp_path}/log)\n'
        "(( n < 3 )) && echo 75 || echo 0"
    )
    process = run("watch", tmp_path, gcloud=codes, **SLICE)
    assert process.returncode == 0 and "exit code 0" in process.stdout
    assert log_of(tmp_path).count("nohup") == 2


def test_watch_gives_up_after_too_many_restarts(tmp_path):
    process = run("watch", tmp_path, gcloud='[[ "$*" != *"cat btlm_jax"* ]] || echo 75', **SLICE, MAX_RESTARTS="2")
    assert process.returncode == 75 and "giving up" in process.stderr


@pytest.mark.parametrize("verb, missing", [("up", "TYPE"), ("run", "CONFIG"), ("down", "NAME")])
def test_a_missing_setting_is_named(tmp_path, verb, missing):
    settings = {name: value for name, value in SLICE.items() if name != missing}
    process = run(verb, tmp_path, gcloud="true", **settings)
    assert process.returncode == 2 and f"set {missing}" in process.stderr
    assert not (tmp_path / "log").exists()


def test_an_unknown_type_and_an_unknown_verb_are_usage_errors(tmp_path):
    assert "TYPE=h100 is not known" in run("up", tmp_path, gcloud="true", **SLICE | {"TYPE": "h100"}).stderr
    assert run("launch", tmp_path, gcloud="true", **SLICE).returncode == 2


def test_dry_run_calls_nothing(tmp_path):
    process = run("up", tmp_path, gcloud="true", **SLICE, DRY_RUN="1")
    assert "gcloud compute tpus queued-resources create pod" in process.stdout
    assert not (tmp_path / "log").exists()
