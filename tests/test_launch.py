"""The launchers, with stand-ins on PATH for what is not here: see support/fake_cloud.py."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.fake_cloud import Cloud, make_checkout

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), ROOT / "tests" / "support" / "fake_gcloud.sh"])
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
GCLOUD = "ERROR: (gcloud.compute.tpus"
EXPIRED = "There was a problem refreshing your current auth tokens: please run: gcloud auth login"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return make_checkout(tmp_path_factory.mktemp("launch") / "checkout")


@pytest.fixture
def cloud(tmp_path, checkout):
    cloud = Cloud(tmp_path, checkout)
    yield cloud
    cloud.end()


def test_scripts_are_executable():
    assert [script for script in SCRIPTS if not os.access(script, os.X_OK)] == []


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck: pip install 'btlm_jax[test]'")
def test_shellcheck_finds_nothing():
    found = subprocess.run([str(SHELLCHECK), *SCRIPTS], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_flags_of_the_compiler_are_in_one_place():
    assert [path.name for path in LAUNCH.iterdir() if "xla_" in path.read_text()] == []


# ---------------------------------------------------------------------------------------------- a whole run


def test_all_goes_from_nothing_to_nothing(cloud, checkout):
    """With words that no shell may read, changes that are not committed, and a restart after a preemption."""
    cloud.will(runs=["10:75 10:75", "20:0 20:0"])
    evil = """--config.a=b  c; touch evil 'q' "d" `touch evil` $(touch evil) $HOME \\ é"""
    said = cloud.run(
        "all", "--", evil, "--flag", WORKERS="2", FLAGS="""--config.curriculum.seq_len="(4, 8)" '--x=$HOME; y'"""
    )
    assert "exit code 0" in said and "nothing of it is listed" in said and cloud.is_empty
    arguments = cloud.read("arguments-pod-w-1").split("\0")[:-1]
    run = ["train", "--distributed", "--config=configs/one.py", f"--workdir={cloud.workdir}"]
    assert arguments == [*run, "--config.curriculum.seq_len=(4, 8)", "--x=$HOME; y", evil, "--flag"]
    assert not [*checkout.rglob("evil"), *cloud.state.rglob("evil")]
    # What was asked of the table is what changes the config.
    asked = (
        "plan --check --topology=v5litepod-16 --config=configs/one.py --config.curriculum.seq_len=(4, 8) --config.a="
    )
    assert cloud.read("asked").startswith(asked)
    assert cloud.read("tree-pod-w-0") == cloud.read("tree-pod-w-1") == "changed here\nnew here\n"
    (record,) = (cloud.workdir / "launches").iterdir()
    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert (record / "commit").read_text() == commit.stdout
    assert "+changed here" in (difference := (record / "diff.patch").read_text()) and "+new here" in difference
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {(record / 'command').read_text()}"], capture_output=True, text=True, check=True
    )
    assert words.stdout.split("\0")[:-1] == ["btlm", *arguments]
    # Each worker has made an environment, once, in the place of the tree, and both have checked 16 devices.
    setup = cloud.read("setup")
    assert setup.count("uv venv") == setup.count("pip install") == 2 and setup.count("--devices=16") == 2
    assert "./tree[tpu]" in setup and cloud.num_starts() == cloud.num_starts("pod-w-1") == 2


def test_preempted_slices_are_created_again_and_get_the_same_tree(cloud):
    cloud.will(runs=["10:preempt", "20:0"])
    said = cloud.run("all", PROVISION="spot")
    assert "pod is SUSPENDED" in said and "exit code 0" in said and cloud.is_empty
    created = cloud.commands("queued-resources create")
    assert len(created) == 2 and all(line.endswith("--spot --node-id=pod") for line in created)
    assert cloud.num_starts() == 2 and cloud.read("tree-pod-w-0") == "changed here\nnew here\n"


def test_watch_restarts_but_creates_nothing(cloud):
    cloud.will(runs=["10:75", "20:preempt"])
    cloud.run("up")
    cloud.run("run")
    assert "launch/tpu.sh all creates it again" in cloud.run("watch", code=1)
    assert cloud.num_starts() == 2 and len(cloud.commands("queued-resources create")) == 1


# ------------------------------------------------------------------------------------- how workers can end


@pytest.mark.parametrize(
    "ends, code",
    [
        ("10:kill 10:77", 0),  # a process that was killed: its peer says that it is gone
        ("10:77 10:wait", 0),  # one that does not end by itself is stopped
        ("10:77 10:70", 70),  # the fault counts, of whatever worker
    ],
)
def test_a_run_ends_as_all_workers_do(cloud, ends, code):
    cloud.will(runs=[ends, "20:0"])
    said = cloud.run("all", code=code, GRACE="300", WORKERS="2")
    assert f"exit code {code}" in said and cloud.is_empty
    assert cloud.num_starts() == (1 if code else 2)


@pytest.mark.parametrize(
    "codes, together",
    [
        ("0 0 0", 0),
        ("0 75 75", 75),
        ("75 77 75", 77),
        ("75 lost 0", 77),
        ("silent 75", 77),
        ("134 77", 77),  # JAX's client aborts by itself
        ("137 0", 77),
        ("77 76 75", 76),
        ("75 2 2", 2),
        ("1 77", 1),
        ("77 127", 127),
        ("0 130", 130),
        ("141 77", 141),
    ],
)
def test_the_codes_of_all_workers_decide(codes, together):
    words = " ".join(f"host-{number}:{code}" for number, code in enumerate(codes.split()))
    source = f"PREEMPTED=75 PEER_GONE=77; codes=({words}); {function('verdict')} verdict"
    assert subprocess.run(["bash", "-c", source], check=False).returncode == together


def test_restarts_end(cloud):
    cloud.will(runs=["10:75", "20:75", "20:77", "20:77", "20:75"])
    said = cloud.run("all", code=77, MAX_FRUITLESS="1")
    assert "no checkpoint after 20 in 2 starts" in said and cloud.num_starts() == 4 and cloud.is_empty


def test_restarts_that_advance_end_too(cloud):
    cloud.will(runs=["10:75", "20:75", "30:75"])
    assert "MAX_RESTARTS=1" in cloud.run("all", code=75, MAX_RESTARTS="1", KEEP="1")
    assert cloud.num_starts() == 2 and not cloud.is_empty


@pytest.mark.slow
def test_a_worker_that_does_not_answer_any_more_costs_the_slice(cloud):
    cloud.will(runs=["10:77 10:wait", "20:0"])
    process = cloud.start("all", WORKERS="2")
    wait_for(cloud, "waits-pod-w-1")
    cloud.will(silent_1="")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "1 of 2 workers do not answer" in said, said
    assert len(cloud.commands("queued-resources create")) == 2


def test_processes_that_left_no_code_are_lost_and_started_again(cloud):
    cloud.will(runs=["10:wait", "20:0"])
    cloud.run("up")
    cloud.run("run")
    wait_for(cloud, "waits-pod-w-0")
    cloud.end()
    said = cloud.run("watch")
    assert "pod-w-0:lost" in said and cloud.num_starts() == 2


def test_a_heartbeat_that_stands_still_is_a_worker_that_is_gone(cloud):
    cloud.will(runs=["10:wait", "20:0"])
    cloud.run("up", BEAT="60")
    cloud.run("run", BEAT="60")
    wait_for(cloud, "waits-pod-w-0")
    (beat,) = cloud.state.glob("homes/pod/0/btlm_launch/pod/run/beat")
    beat.write_text("1000\n")
    said = cloud.run("watch")
    assert "pod-w-0:silent" in said and "exit code 0" in said


@pytest.mark.slow
def test_stop_has_the_run_save_and_kills_what_does_not(cloud):
    cloud.will(runs=["10:wait 10:hang"])
    cloud.run("up", WORKERS="2")
    cloud.run("run", STOP_TIMEOUT="1")
    wait_for(cloud, "waits-pod-w-0")
    assert "running on 2 workers" in cloud.run("run", code=2)
    said = cloud.run("stop")
    assert "pod-w-0: ended, exit code 75, checkpoint 10" in said and "pod-w-1: ended, exit code 137" in said
    cloud.run("run")
    assert cloud.read("setup").count("pip install") == 2  # the environments were there


# ------------------------------------------------------------------------------------- what the cloud does


@pytest.mark.parametrize(
    "plans",
    [
        {"lives": ["WAITING_FOR_RESOURCES FAILED", "WAITING_FOR_RESOURCES PROVISIONING ACTIVE"]},
        {"faults": f"resources create|1|{GCLOUD}.queued-resources.create) RESOURCE_EXHAUSTED: no capacity"},
        {"faults": [f"resources create|1|{GCLOUD}.queued-resources.create) UNAVAILABLE"] * 2},
        {"faults": [f"resources describe|1|{EXPIRED}"] * 2},
    ],
    ids=["creation failed", "no capacity", "network", "expired login"],
)
def test_up_tries_again(cloud, plans):
    cloud.will(**plans)
    assert "pod is ready" in cloud.run("up") and not cloud.is_empty


@pytest.mark.parametrize(
    "plans, said, code",
    [
        ({"lives": ["FAILED"] * 9}, "pod is FAILED: no more capacity", 1),
        ({"lives": "WAITING_FOR_RESOURCES"}, "the request is withdrawn", 1),  # for good
        ({"state_of_nodes": "CREATING"}, "could not be created in 3 attempts", 1),
        ({"faults": f"create|1|{GCLOUD}.queued-resources.create) INVALID_ARGUMENT: no such zone"}, "no such zone", 1),
        ({"faults": f"create|1|{GCLOUD}.queued-resources.create) PERMISSION_DENIED: no"}, "was refused", 1),
        ({"faults": [f"|1|{EXPIRED}"] * 9}, "gcloud auth login", 1),
    ],
    ids=["always fails", "never granted", "never ready", "invalid", "refused", "never logged in"],
)
def test_up_ends_and_leaves_nothing(cloud, plans, said, code):
    cloud.will(**plans)
    assert said in cloud.run("up", code=code, UP_TIMEOUT="200", READY_TIMEOUT="100") and cloud.is_empty
    assert len(cloud.commands("queued-resources create")) <= 3


def test_what_exists_is_taken(cloud):
    """Also where the answer to the creation was lost, and while a run is on it."""
    cloud.will(runs="10:wait", lives="ACTIVE", faults=f"describe|1|{GCLOUD}.queued-resources.describe) NOT_FOUND")
    cloud.run("up")
    cloud.will(faults=f"describe|1|{GCLOUD}.queued-resources.describe) NOT_FOUND")
    assert "exists already" in cloud.run("up")
    assert "pod is a v5litepod-16, not TYPE=v5litepod-64" in cloud.run("up", code=2, TYPE="v5litepod-64")
    cloud.run("run")
    wait_for(cloud, "waits-pod-w-0")
    process = cloud.start("all")
    time.sleep(0.5)
    cloud.will(runs=["10:wait", "20:0"])
    cloud.run("stop")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "is running on 1 workers of pod; it is followed" in said, said
    assert cloud.num_starts() == 2 and cloud.read("setup").count("pip install") == 1 and cloud.is_empty


def test_ssh_that_fails_now_and_then_ends_nothing(cloud):
    """Each kind of call fails once or twice, that of the start after it was carried out."""
    cloud.will(
        runs=["10:75", "20:0"],
        faults=[
            *["tpu-vm scp|255|ssh: connection reset"] * 2,
            *["tar xzf|255|ssh: connection reset"],
            *["worker setup|255|ssh: connection reset"] * 2,
            *["worker check|255|ssh: connection reset"],
            *["worker report|255|ssh: connection reset"] * 2,
            *["worker start|255|ssh: connection reset"] * 2,
            *["worker report|1|" + EXPIRED] * 2,
        ],
    )
    assert "exit code 0" in cloud.run("all") and cloud.num_starts() == 2 and cloud.read("faults") == ""


def test_a_start_whose_answer_is_lost_is_one_start(cloud):
    cloud.will(runs=["10:wait"])
    cloud.run("up")
    cloud.run("run")
    wait_for(cloud, "waits-pod-w-0")
    home = cloud.state / "homes" / "pod" / "0"
    start = (home / "btlm_launch/pod/run/start").read_text().strip()
    environment = cloud.settings | {"PATH": str(cloud.there), "HOSTNAME": "pod-w-0", "NUMBER": "0"}
    for again in (start, start + "1"):
        command = ["bash", "btlm_launch/pod/tpu.sh", "worker", "start", again]
        subprocess.run(command, cwd=home, env=environment, check=True)
    end = time.monotonic() + 30
    while cloud.num_starts() < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert cloud.num_starts() == 2


def test_an_expired_login_ends_the_watch_not_the_run(cloud):
    cloud.will(runs=["10:wait"])
    cloud.run("up")
    cloud.run("run")
    cloud.will(faults=[f"{each}|1|{EXPIRED}" for each in ("worker report", "resources describe") for _ in range(20)])
    assert "the run goes on by itself" in cloud.run("watch", code=1, ATTEMPTS="2")
    cloud.will(faults="")
    assert "pod-w-0: running" in cloud.run("status")


def test_a_slice_that_was_there_is_not_deleted_because_ssh_fails(cloud):
    cloud.run("up")
    cloud.will(faults=["worker report|255|ssh: connection refused"] * 3)
    assert "do not answer" in cloud.run("all", code=1) and not cloud.is_empty


def test_sick_devices_cost_the_slice(cloud):
    cloud.will(unhealthy=["once"] * 2, runs="10:0")
    assert "do not compute" in cloud.run("all") and len(cloud.commands("queued-resources create")) == 2


def test_down_proves_that_nothing_is_left(cloud):
    cloud.run("up")
    cloud.will(leaves_nodes="")
    assert "nothing of it is listed" in cloud.run("down") and cloud.is_empty
    assert len(cloud.commands("tpu-vm delete pod")) == 1  # whose queued resource did not take it along
    assert "nothing of it is listed" in cloud.run("down")  # nothing was there
    cloud.run("up")
    cloud.will(faults=[f"delete|1|{GCLOUD}.queued-resources.delete) UNAVAILABLE"] * 99)
    said = cloud.run("down", code=1)
    assert "still there: queued-resources pod, tpu-vm pod" in said and "may cost money" in said


def test_down_takes_along_the_slices_of_an_up_with_other_settings_and_no_others(cloud):
    cloud.run("up", SLICES="2")
    cloud.will(leaves_nodes="", other_nodes=["pod-3\tprojects/p/locations/z/queuedResources/pod-3", "pod-4\t"])
    said = cloud.run("down")
    assert "nothing of it is listed" in said and cloud.is_empty
    assert [line.split()[4] for line in cloud.commands("tpu-vm delete")] == ["pod-0", "pod-1"]
    assert "pod-4 is of no queued resource, and is left" in said and "SLICES=5 launch/tpu.sh down" in said


# ---------------------------------------------------------------------------------------- what is sent


@pytest.mark.parametrize(
    "kind, version, devices",
    [
        ("v4-128", "tpu-ubuntu2204-base", 64),
        ("v5litepod-256", "v2-alpha-tpuv5-lite", 256),
        ("v5p-128", "v2-alpha-tpuv5", 64),
        ("v6e-256", "v2-alpha-tpuv6e", 256),
    ],
)
def test_each_generation_has_its_image_and_number_of_devices(cloud, kind, version, devices):
    settings = {"PROVISION": "reserved", "CREATE_FLAGS": "--network='a b' --internal-ips"}
    said = cloud.run("up", "--dry-run", TYPE=kind, **settings)
    assert f"--accelerator-type={kind} --runtime-version={version} --network=a\\ b --internal-ips --reserved" in said
    source = f"TYPE={kind} SLICES=1; die() {{ exit 9; }}; " + function("num_devices") + "num_devices"
    assert subprocess.run(["bash", "-c", source], capture_output=True, text=True, check=True).stdout == f"{devices}\n"


def test_a_dry_run_prints_every_command_and_runs_none(cloud):
    said = cloud.run("all", "--dry-run")
    assert not cloud.read("log")
    order = ("create", "tpu-vm scp", "worker\\ setup", "worker\\ check", "worker\\ start", "delete", "tpu-vm list")
    places = [said.index(word) for word in order]
    assert places == sorted(places)


def test_several_slices_know_each_other(cloud):
    cloud.will(runs="10:0")
    cloud.run("all", SLICES="2", WORKERS="2", SECRET="s;e c", EXPORT="SECRET", LIBTPU_INIT_ARGS="--xla_a=1 --xla_b=2")
    assert "--node-count=2 --node-prefix=pod" in cloud.commands("queued-resources create")[0]
    assert cloud.read("setup").count("--devices=32") == 4 and cloud.is_empty
    for number in (0, 1):
        variables = cloud.read(f"variables-pod-{number}-w-1")
        shared = "MEGASCALE_COORDINATOR_ADDRESS=10.0.0.0", "MEGASCALE_NUM_SLICES=2", "SECRET=s;e c"
        assert all(f"{each}\n" in variables for each in (*shared, f"MEGASCALE_SLICE_ID={number}"))
        assert "LIBTPU_INIT_ARGS=--xla_a=1 --xla_b=2\n" in cloud.read(f"environment-pod-{number}-w-1")
    records = [*(cloud.workdir / "launches").rglob("*")]
    assert records and not any("s;e c" in path.read_text() for path in records if path.is_file())


def in_bucket(cloud):
    return {"WORKDIR": "gs://bucket/a run", "CHECKPOINTS": str(cloud.state / "gs/bucket/a run/checkpoints")}


@pytest.mark.slow
def test_a_workdir_in_a_bucket(cloud):
    """Commit and changes are kept there, and a preempted run goes on from what is committed there."""
    cloud.will(runs=["10:75", "20:wait"], extras="gcs")
    started = cloud.start("all", **in_bucket(cloud))
    wait_until = time.monotonic() + 60
    while not (cloud.state / "waits-pod-w-0").exists() and time.monotonic() < wait_until:
        time.sleep(0.05)
    assert " step 20" in cloud.run("status", **in_bucket(cloud))
    assert "step 20" in cloud.run("logs", **in_bucket(cloud))
    cloud.run("stop", **in_bucket(cloud))
    started.communicate(timeout=60)
    cloud.run("down", **in_bucket(cloud))
    assert cloud.is_empty
    records = [*(cloud.state / "gs/bucket/a run/launches").iterdir()]
    assert records and all((record / "command").read_text().startswith("btlm train ") for record in records)
    assert "--workdir=gs://bucket/a run" in cloud.read("arguments-pod-w-0").split("\0")
    assert "./tree[tpu,gcs]" in cloud.read("setup")


def test_checkpoints_that_are_not_committed_are_no_progress(cloud):
    cloud.will(runs=["10:75", "20:75", "30:75"], commits_nothing="")
    said = cloud.run("all", code=75, MAX_FRUITLESS="2", **in_bucket(cloud))
    assert "step 30" not in said and cloud.is_empty


def test_a_workdir_elsewhere_is_listed_with_the_exported_credentials(cloud):
    """Of 4 starts 3 advance."""
    cloud.will(runs=["10:75", "20:75", "30:75", "40:0"])
    settings = in_bucket(cloud) | {"WORKDIR": "s3://bucket/a run", "EXPORT": "SECRET", "SECRET": "key"}
    assert "checkpoint 30, 20 before" in cloud.run("all", MAX_FRUITLESS="0", **settings)
    assert any((cloud.state / "gs/bucket/a run/launches").iterdir())


def test_a_bucket_that_could_not_be_listed_is_no_lost_checkpoint():
    report = "report() { echo '@btlm host running - 0 0'; }; codes=() STALE=1 step=20"
    source = f"{report}; {function('ask')} ask; echo $step"
    assert subprocess.run(["bash", "-c", source], capture_output=True, text=True, check=True).stdout == "20\n"


@pytest.mark.parametrize("python", ["python3.11", "uv", "deadsnakes"])
def test_a_python_is_found_or_brought(cloud, python):
    if python == "python3.11":
        cloud.python_on_image(python)
    if python == "deadsnakes":
        cloud.will(no_uv="")
        (cloud.there / "uv").unlink()
    cloud.will(runs="10:0", extras="gcs,wandb")
    cloud.run("all", "--", "--config.log.trackers=wandb", CACHE_DIR="gs://bucket/cache")
    setup = cloud.read("setup")
    assert ("uv venv" in setup) == (python == "uv") and ("deadsnakes" in setup) == (python == "deadsnakes")
    assert ("python3.11 -m venv" in setup) == (python != "uv")
    assert setup.count("./tree[tpu,gcs,wandb]") == 1
    run = f"--config=configs/one.py --workdir={cloud.workdir} --config.log.trackers=wandb"
    assert cloud.read("asked").endswith(f"gs://bucket/cache train --print_extras --distributed {run}\n")
    assert cloud.read("variables-pod-w-0") == "JAX_COMPILATION_CACHE_DIR=gs://bucket/cache\n"


def test_a_wheel_and_a_config_that_git_ignores_are_sent(cloud, checkout, tmp_path):
    cloud.will(runs="10:0")
    (tmp_path / "btlm_jax-1-py3-none-any.whl").write_text("wheel")
    cloud.run("all", WHEEL=str(tmp_path / "btlm_jax-1-py3-none-any.whl"), CONFIG="pods/v5e_256")
    assert "--config=pods/v5e_256\0" in cloud.read("arguments-pod-w-0")
    assert "./btlm_jax-1-py3-none-any.whl[tpu]" in cloud.read("setup")
    cloud.run("up", CONFIG="ignored.py")
    cloud.run("run", CONFIG="ignored.py")
    assert "--config=../config.py\0" in cloud.read("arguments-pod-w-0")
    (sent,) = cloud.state.glob("homes/pod/0/btlm_launch/pod/config.py")
    assert sent.read_text() == (checkout / "ignored.py").read_text()


def test_a_config_that_is_sent_alone_and_reads_others_is_refused(cloud, tmp_path):
    cloud.will(reads_others="")
    (tmp_path / "btlm_jax-1-py3-none-any.whl").write_text("wheel")
    said = cloud.run("all", code=2, WHEEL=str(tmp_path / "btlm_jax-1-py3-none-any.whl"), CONFIG="configs/one.py")
    assert "CONFIG=configs/one.py is sent alone" in said and not cloud.read("log")


def test_leftovers_are_cleaned(cloud):
    cloud.will(runs="10:0", lock="")
    cloud.run("all")
    assert not (cloud.state / "lock").exists()


# --------------------------------------------------------------------------------------- looking, and mistakes


def test_logs_status_and_ssh(cloud):
    cloud.will(runs="10:wait")
    cloud.run("up", WORKERS="2")
    cloud.run("run")
    wait_for(cloud, "waits-pod-w-0", "waits-pod-w-1")
    said = cloud.run("status")
    assert "pod: queued resource ACTIVE" in said and "queued-resources pod\ntpu-vm pod\n" in said
    assert re.search(r"^pod-w-1: running, heartbeat \d+ s ago, checkpoint 10: step 10$", said, flags=re.MULTILINE)
    assert "pod-7" not in said
    assert re.findall(r"^(\S+)  step 10$", cloud.run("logs"), flags=re.MULTILINE) in (
        ["pod-w-0", "pod-w-1"],
        ["pod-w-1", "pod-w-0"],
    )
    assert re.findall(r"^(\S+)  step 10$", cloud.run("logs", "1"), flags=re.MULTILINE) == ["pod-w-1"]
    assert cloud.run("ssh", "1", "echo", "a  b;", "'") == "a  b; '\n"
    assert "--worker=1 --command=echo" in cloud.commands("tpu-vm ssh")[-1]


@pytest.mark.parametrize(
    "words, settings, said",
    [
        (["up"], {"TYPE": ""}, "set TYPE"),
        (["run"], {"CONFIG": ""}, "set CONFIG"),
        (["all"], {"WORKDIR": ""}, "set WORKDIR"),
        (["down"], {"NAME": ""}, "set NAME"),
        (["down"], {"NAME": "a; b"}, "NAME=a; b must be"),
        (["run"], {"WORKDIR": "runs/x"}, "must be a URL, or an absolute path"),
        (["run"], {"FLAGS": "--a='b"}, "a quote that does not end"),
        (["run", "--config.seed=2"], {}, "after --, as in launch/tpu.sh run -- --config.seed=2"),
        (["up"], {"TYPE": "h100"}, "TYPE=h100 is not known"),
        (["all"], {"TYPE": "v5e-256"}, "TYPE=v5e-256 is not known; use v4-N, v5litepod-N (a v5e)"),
        (["run"], {"TYPE": "v6e-4x4"}, "TYPE=v6e-4x4 must end in a number"),
        (["all"], {"EXPORT": "HOME SECRET"}, "EXPORT names SECRET, which is not set"),
        (["run"], {"EXPORT": "HOME=x"}, "EXPORT names HOME=x, which is not set"),
        (["up"], {"PROVISION": "cheap"}, "PROVISION=cheap is not known"),
        (["all"], {"POLL": "1m"}, "POLL=1m must be a whole number"),
        (["all"], {"WHEEL": "gone.whl"}, "WHEEL=gone.whl is no file"),
        (["launch"], {}, "launch/tpu.sh up"),
    ],
)
def test_mistakes_are_named(cloud, words, settings, said):
    assert said in cloud.run(*words, code=2, **settings)
    assert not cloud.commands("create") and not cloud.commands("scp")


@pytest.mark.parametrize("verb", ["up", "run", "all"])
def test_what_does_not_fit_is_neither_created_nor_copied(cloud, verb):
    cloud.will(refuses="")
    assert "it does not fit" in cloud.run(verb, code=1) and not cloud.read("log")


def test_the_layout_is_asked_for_with_values_that_are_words_of_their_own(cloud):
    words = ["--config.model.remat", "full", "--init", "m", "-config.mesh.tensor=2", "--resume_step=3", "--config.seed"]
    cloud.run("up", FLAGS=" ".join(words))
    layout = "plan --check --topology=v5litepod-16 --config=configs/one.py"
    assert cloud.read("asked") == f"{layout} --config.model.remat full -config.mesh.tensor=2 --config.seed\n"


def test_without_btlm_here_nothing_is_created(cloud):
    (Path(cloud.settings["PATH"]) / "btlm").unlink()
    assert "no btlm here to check the run with" in cloud.run("up", code=2) and not cloud.read("log")


def test_beside_an_installed_package_the_btlm_on_path_trains(tmp_path):
    shutil.copytree(LAUNCH, tmp_path / "work" / "launch")
    (tmp_path / "btlm").write_text('#!/usr/bin/env bash\necho "$PWD" "$@"')
    (tmp_path / "nvidia-smi").write_text("#!/usr/bin/env bash\necho '580.65.06, 9.0'")
    for name in ("btlm", "nvidia-smi"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for words in (["local.sh"], ["gpu.sh", "local_cpu", "runs/local"]):
        command = [tmp_path / "work" / "launch" / words[0], *words[1:]]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        # There, so that relative paths are those of whoever calls.
        assert done.stdout == f"{tmp_path} train --config=local_cpu --workdir=runs/local\n"


def function(name: str) -> str:
    """Return the text of a function of launch/tpu.sh."""
    (text,) = re.findall(rf"^{name}\(\) {{\n.*?^}}\n", (LAUNCH / "tpu.sh").read_text(), flags=re.MULTILINE | re.DOTALL)
    return text


def wait_for(cloud: Cloud, *names: str) -> None:
    end = time.monotonic() + 30
    while not all((cloud.state / name).exists() for name in names):
        assert time.monotonic() < end, names
        time.sleep(0.02)
