"""launch/gpu.sh, launch/slurm.sh and launch/jobset.yaml, with stand-ins on PATH for btlm, srun, squeue and scontrol."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from btlm_jax import cli
from btlm_jax.cli.train import train_flags

ROOT = Path(__file__).parent.parent
WORDS = ["--config.a=b  c; 'x' \"y\" $HOME `z`", "--flag"]
# Task n ends with word n of line N of `ends` at its start N: STEP:CODE, or STEP:wait for SIGTERM.
BTLM = r"""
if [[ $2 == --print_extras ]]; then cat "$STATE/extras" 2> /dev/null; exit 0; fi
n=${SLURM_PROCID:-0}
for word; do case $word in --process_id=*) n=${word#*=} ;; esac; done
echo "${CUDA_VISIBLE_DEVICES:-}" > "$STATE/gpus-$n"
echo "${JAX_PLATFORMS:-} ${CUDA_DEVICE_ORDER:-}" > "$STATE/platforms-$n"
echo "${JAX_LOCAL_DEVICE_IDS:-}" > "$STATE/devices-$n"
echo started >> "$STATE/starts-$n"
printf '%s\0' "$@" > "$STATE/arguments-$n"
read -ra ends <<< "$(sed -n "$(grep -c . "$STATE/starts-$n")p" "$STATE/ends")"
end=${ends[n]:-${ends[0]}}
[ "${end%:*}" = 0 ] || mkdir -p "$STATE/work dir/checkpoints/${end%:*}"
if [ "${end#*:}" = wait ]; then
  trap 'trap "" TERM; sleep 0.1; echo >> "$STATE/signals-$n"; exit 75' TERM
  touch "$STATE/waits-$n"
  while :; do sleep 0.02; done
fi
exit "${end#*:}"
"""
# A shell cannot take a signal that is ignored at its start, as SIGHUP is where these tests run below nohup.
NOT_BELOW_NOHUP = (
    *(sys.executable, "-S", "-c"),
    "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])",
)
# As btlm does, it takes SIGINT although bash has processes in the background ignore it, and saves once.
BTLM_THAT_SAVES = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
got, place = [], pathlib.Path(os.environ["STATE"])
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: got.append(number))
(place / "waits-0").touch()
while not got:
    time.sleep(0.02)
time.sleep(0.5)
(place / "saved").write_text(" ".join(signal.Signals(number).name for number in sorted(got)))
sys.exit(75)
"""
# At SIGTERM it kills its tasks, as Slurm's does; each is a session, in place of a cgroup. WAIT_TIME is slurm.conf's.
SRUN = r"""
exported=${SLURM_EXPORT_ENV:-ALL} seconds=${WAIT_TIME:-0}
while [[ $1 == --* ]]; do
  case $1 in --export=*) exported=${1#*=} ;; --wait=*) seconds=${1#*=} ;; esac
  shift
done
echo "${SRUN_CPUS_PER_TASK:-}" > "$STATE/cpus"
[ "$exported" = ALL ] || unset JAX_PLATFORMS
jobs=() worst=0
trap 'for job in "${jobs[@]}"; do kill -KILL -- "-$job" 2> /dev/null; done' TERM
for ((n = 0; n < ${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}; n++)); do
  SLURM_PROCID=$n setsid "$@" &
  jobs+=($!)
  echo $! > "$STATE/task-$n"
done
echo $$ > "$STATE/srun"
if [ "$seconds" != 0 ]; then
  wait -n
  sleep "$seconds"
  for job in "${jobs[@]}"; do kill -KILL -- "-$job" 2> /dev/null; done
fi
for job in "${jobs[@]}"; do
  while :; do
    code=0
    wait "$job" || code=$?
    [ -e "/proc/$job" ] || break
  done
  ((code <= worst)) || worst=$code
done
exit "$worst"
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "bin").mkdir()
    scripts = {"btlm": BTLM, "srun": SRUN, "scontrol": 'echo "$@" >> "$STATE/requeued"; exit "${SCONTROL_CODE:-0}"'}
    # Of coreutils before 8.31.
    scripts["env"] = """[[ $* != *--default-signal* ]] || exit 125; exec /usr/bin/env "$@" """
    scripts["squeue"] = '[ "$*" = "--noheader --jobs=7 --format=%T" ] && echo "${JOB_STATE:-RUNNING}"'
    scripts["nvidia-smi"] = """printf '%b' "${SMI:-580.65.06, 9.0\\n580.65.06, 9.0\\n}"; exit "${SMI_CODE:-0}" """
    for name, script in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "launch").mkdir()  # without setup.cfg beside it: the btlm on PATH
    (tmp_path / "launch" / "gpu.sh").write_text((ROOT / "launch" / "gpu.sh").read_text())
    return tmp_path


def start(
    place: Path, script: Path, ends: list[str], *, workdir: str = "", is_group: bool = False, **settings: str
) -> subprocess.Popen:
    (place / "ends").write_text("".join(f"{line}\n" for line in ends))
    environment = {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "STATE": str(place), "BACKOFF": "0", **settings}
    return subprocess.Popen(
        [*NOT_BELOW_NOHUP, "bash", script, "local_cpu", workdir or place / "work dir", *WORDS],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        cwd=place,
        start_new_session=is_group,
    )


def finish(process: subprocess.Popen, *, code: int) -> str:
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    return said


def wait_for(*paths: Path) -> None:
    end = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, paths
        time.sleep(0.02)


def num_starts(place: Path) -> int:
    return len((place / "starts-0").read_text().splitlines())


def slurm(place: Path, ends: list[str], **settings: str) -> subprocess.Popen:
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", **settings}
    return start(place, ROOT / "launch" / "slurm.sh", ends, **job)


def test_gpu_restarts_after_75_and_77_and_not_for_ever(place):
    gpu = place / "launch" / "gpu.sh"
    finish(start(place, gpu, ["1:75", "2:77", "3:0"]), code=0)
    arguments = (place / "arguments-0").read_text().split("\0")[:-1]
    assert num_starts(place) == 3
    assert arguments == ["train", "--config=local_cpu", f"--workdir={place / 'work dir'}", *WORDS]
    (place / "starts-0").unlink()
    finish(start(place, gpu, ["1:77"] * 9, MAX_RESTARTS="2"), code=77)
    assert num_starts(place) == 3


def test_gpu_gives_up_without_new_checkpoints(place):
    said = finish(start(place, place / "launch" / "gpu.sh", ["1:75", *["2:75"] * 9], MAX_FRUITLESS="1"), code=75)
    assert num_starts(place) == 4 and "no checkpoint after 2 in 2 starts" in said


@pytest.mark.parametrize(
    "count, num_trained", [('$((200 + $(cat "$STATE"/starts-0 2> /dev/null | wc -l)))', 3), ("", 2)]
)
def test_gpu_sees_progress_in_a_bucket_with_a_damaged_checkpoint(place, count, num_trained):
    """`btlm checkpoints` ends with 1 there: the newest that it lists counts."""
    lists = f"""if [ "$1" = checkpoints ]; then printf '%s of a table\\n' 100 {count or "none"}; exit 1; fi"""
    (place / "bin" / "btlm").write_text(f"#!/usr/bin/env bash\n{lists}{BTLM}")
    settings = {"MAX_FRUITLESS": "1", "MAX_RESTARTS": "2"}
    finish(start(place, place / "launch" / "gpu.sh", ["0:75"] * 9, workdir="gs://a/run", **settings), code=75)
    assert num_starts(place) == num_trained


def test_gpu_does_not_start_after_a_signal_that_came_before(place):
    lists = """if [ "$1" = checkpoints ]; then touch "$STATE/lists"; sleep 1; exit 0; fi"""
    (place / "bin" / "btlm").write_text(f"#!/usr/bin/env bash\n{lists}{BTLM}")
    process = start(place, place / "launch" / "gpu.sh", ["0:0"], workdir="gs://a/run")
    wait_for(place / "lists")
    process.send_signal(signal.SIGTERM)
    finish(process, code=75)
    assert not (place / "starts-0").exists()


def test_gpu_pauses_before_it_starts_again_and_sigterm_ends_the_pause(place):
    process = start(place, place / "launch" / "gpu.sh", ["0:75"] * 9, BACKOFF="600")
    assert process.stderr is not None
    said = [process.stderr.readline() for _ in range(2)]
    assert "exit code 75 at checkpoint 0; starting again" in said[-1]
    process.send_signal(signal.SIGTERM)
    finish(process, code=75)
    assert num_starts(place) == 1


@pytest.mark.parametrize(
    "settings, gpus",
    [
        ({}, ["0,1"]),
        ({"GPUS": "1"}, ["1"]),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, ["1,0"]),
        ({"PROCESSES": "2"}, ["0", "1"]),
    ],
)
def test_gpu_gives_each_process_its_share_of_the_gpus(place, settings, gpus):
    said = finish(start(place, place / "launch" / "gpu.sh", ["1:0"], **settings), code=0)
    assert f"{len(','.join(gpus).split(','))} GPUs, driver 580.65.06, CUDA 13" in said
    assert [(place / f"gpus-{n}").read_text().strip() for n in range(len(gpus))] == gpus
    for n in range(len(gpus) if len(gpus) > 1 else 0):
        words = (place / f"arguments-{n}").read_text().split("\0")[3:6]
        assert re.fullmatch(r"--coordinator=localhost:2\d{4}", words[0])
        assert words[1:] == [f"--num_processes={len(gpus)}", f"--process_id={n}"]


@pytest.mark.parametrize(
    "ends, code, starts",
    [("1:77 1:75", 77, 2), ("1:75 1:0", 75, 2), ("1:77 1:70", 70, 1), ("1:0 1:137", 77, 2), ("1:2 1:77", 2, 1)],
)
def test_gpu_ends_as_all_processes_do(place, ends, code, starts):
    finish(start(place, place / "launch" / "gpu.sh", [ends] * 3, PROCESSES="2", MAX_RESTARTS="1"), code=code)
    assert num_starts(place) == starts


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"SMI": "520.61.05, 8.0\\n"}, "driver 520.61.05 is too old: CUDA 12 needs 525, CUDA 13 needs 580"),
        ({"SMI": "No devices were found\\n"}, "nvidia-smi says of GPU 0: No devices were found"),
        ({"SMI": "no driver", "SMI_CODE": "9"}, "nvidia-smi failed: no driver"),
        ({"GPUS": "0,2"}, "GPUS=0,2 names no GPU 2: there are 2, from 0 on"),
        ({"PROCESSES": "3"}, "PROCESSES=3 does not divide 2 GPUs"),
    ],
)
def test_gpu_refuses_what_cannot_run(place, settings, said):
    assert said in finish(start(place, place / "launch" / "gpu.sh", ["1:0"], **settings), code=2)
    assert not (place / "starts-0").exists()


@pytest.mark.parametrize(
    "smi, extra", [("580.65.06, 9.0", "cuda"), ("550.90.07, 9.0", "cuda12"), ("580.65.06, 7.0", "cuda12")]
)
def test_gpu_installs_what_the_driver_takes_and_checks_the_gpus(place, smi, extra):
    """In a checkout, whose environment is a stand-in too."""
    (place / "setup.cfg").touch()
    for name, script in {
        "python3.11": '[ "$1" = -c ] || { mkdir -p .venv/bin && cp "$STATE"/bin/{btlm,pip,python} .venv/bin; }',
        "pip": 'echo "$@" > "$STATE/installed"',
        "python": 'echo "$JAX_PLATFORMS $CUDA_VISIBLE_DEVICES $*" > "$STATE/checked"; [ ! -e "$STATE/sick" ]',
    }.items():
        (place / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}")
        (place / "bin" / name).chmod(0o755)
    finish(start(place, place / "launch" / "gpu.sh", ["1:0"], SMI=f"{smi}\\n"), code=0)
    assert (place / "installed").read_text() == f"install -c constraints.txt -e .[{extra}]\n"
    assert (place / "checked").read_text() == "cuda,cpu 0 -m btlm_jax.parallel.health --devices=1 --platform=gpu\n"
    (place / "sick").touch()
    assert "do not compute" in finish(start(place, place / "launch" / "gpu.sh", ["1:0"], SMI=f"{smi}\\n"), code=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_gpu_hands_a_signal_on_and_ends_with_the_run(place, number):
    process = start(place, place / "launch" / "gpu.sh", ["1:wait", "2:0"])
    wait_for(place / "waits-0")
    process.send_signal(number)
    finish(process, code=75)
    assert num_starts(place) == 1 and (place / "signals-0").exists()


def test_gpu_waits_after_ctrl_c_until_the_run_has_saved(place):
    """The terminal sends it to both, here as a process group."""
    (place / "bin" / "btlm").write_text(BTLM_THAT_SAVES)
    process = start(place, place / "launch" / "gpu.sh", ["1:0"], is_group=True)
    wait_for(place / "waits-0")
    os.killpg(process.pid, signal.SIGINT)
    finish(process, code=75)
    assert (place / "saved").read_text() == "SIGINT SIGTERM"


def test_gpu_installs_into_an_environment_without_cuda(place):
    (place / "setup.cfg").touch()
    pip = 'echo "$@" > "$STATE/installed"'
    for name, script in {"python3.11": "touch $STATE/made", "pip": pip, "python": "true"}.items():
        (place / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (place / "bin" / name).chmod(0o755)
    shutil.copytree(place / "bin", place / ".venv" / "bin")
    finish(start(place, place / "launch" / "gpu.sh", ["1:0"]), code=0)
    assert (place / "installed").read_text() == "install -c constraints.txt -e .[cuda]\n"
    assert not (place / "made").exists()  # what else is in .venv stays there
    (place / "installed").unlink()
    (place / ".venv" / "lib" / "python3.11" / "site-packages" / "jax_cuda13_plugin").mkdir(parents=True)
    finish(start(place, place / "launch" / "gpu.sh", ["1:0", "1:0"]), code=0)
    assert not (place / "installed").exists()
    (place / "extras").write_text("gcs,wandb\n")
    finish(start(place, place / "launch" / "gpu.sh", ["1:0"] * 3), code=0)
    assert (place / "installed").read_text() == "install -q -c constraints.txt -e .[gcs,wandb]\n"
    (place / "installed").unlink()
    finish(start(place, place / "launch" / "gpu.sh", ["1:0"] * 4), code=0)
    assert not (place / "installed").exists()


def test_gpu_replaces_an_environment_of_another_python_and_says_which_it_needs(place):
    (place / "setup.cfg").touch()
    (place / ".venv" / "bin").mkdir(parents=True)
    (place / ".venv" / "bin" / "python").symlink_to("/bin/false")  # of Python 3.10
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (place / "bin" / name).symlink_to("/bin/false")
    said = finish(start(place, place / "launch" / "gpu.sh", ["1:0"]), code=2)
    assert "no Python from 3.11 to 3.13 with venv" in said
    (place / "bin" / "python3.12").unlink()
    (place / "bin" / "python3.12").write_text('#!/usr/bin/env bash\n[ "$1" = -c ] || echo "$*" > "$STATE/made"\n')
    (place / "bin" / "python3.12").chmod(0o755)
    finish(start(place, place / "launch" / "gpu.sh", ["1:0"]), code=127)  # the stand-in makes no pip
    assert (place / "made").read_text() == "-m venv --clear .venv\n"


def test_slurm_runs_every_task_with_the_same_words(place):
    finish(slurm(place, ["5:0"], SLURM_EXPORT_ENV="NONE", SLURM_CPUS_PER_TASK="12"), code=0)
    assert (place / "cpus").read_text() == "12\n"
    for task in (0, 1):
        arguments = (place / f"arguments-{task}").read_text().split("\0")[:-1]
        run = ["train", "--distributed", "--config=local_cpu", f"--workdir={place / 'work dir'}"]
        assert arguments == [*run, *WORDS]
    assert not (place / "requeued").exists()
    assert (place / "platforms-0").read_text() == "cuda,cpu PCI_BUS_ID\n"
    finish(slurm(place, ["5:0", "5:0"], JAX_PLATFORMS="rocm", CUDA_VISIBLE_DEVICES="0,1"), code=0)
    assert (place / "platforms-0").read_text() == "rocm PCI_BUS_ID\n" and (place / "devices-1").read_text() == "\n"


def test_slurm_gives_a_task_the_only_gpu_that_it_sees(place):
    """Where JAX would take that of the task's number on its node."""
    finish(slurm(place, ["5:0"], CUDA_VISIBLE_DEVICES="0"), code=0)
    assert (place / "devices-1").read_text() == "0\n"


@pytest.mark.parametrize("tasks, code", [("2", 0), ("2(x3)", 0), ("1(x3)", 2), ("2(x2),1", 2), ("22", 2)])
def test_slurm_wants_one_task_a_gpu(place, tasks, code):
    said = finish(slurm(place, ["5:0"], SLURM_GPUS_ON_NODE="2", SLURM_TASKS_PER_NODE=tasks), code=code)
    assert ("submit it with --ntasks-per-node=2" in said) == bool(code)
    assert (place / "starts-0").exists() == (code == 0)


def test_slurm_refuses_a_bucket(place):
    assert "must be a folder that every node sees" in finish(slurm(place, ["5:0"], workdir="gs://a/run"), code=2)
    assert not (place / "gs:").exists()


@pytest.mark.parametrize("send", [os.kill, os.killpg])  # by SignalChildrenProcesses=no and =yes
def test_slurm_saves_at_the_sigterm_of_tasks_and_requeues(place, send):
    process = slurm(place, ["5:wait"], WAIT_TIME="0.1")
    wait_for(place / "waits-0", place / "waits-1")
    for task in (0, 1):
        send(int((place / f"task-{task}").read_text()), signal.SIGTERM)
        time.sleep(0.3)  # the other one takes longer
    assert "exit code 75 at checkpoint 5; the job is requeued" in finish(process, code=0)
    assert (place / "signals-0").exists() and (place / "signals-1").exists()
    assert (place / "requeued").read_text() == "requeue 7\n"


def test_slurm_neither_saves_nor_requeues_at_a_plain_scancel(place):
    process = slurm(place, ["5:wait"])
    wait_for(place / "srun", place / "waits-0", place / "waits-1")
    for each in (int((place / "srun").read_text()), process.pid):
        os.kill(each, signal.SIGTERM)
    finish(process, code=-signal.SIGTERM)
    assert not (place / "signals-0").exists() and not (place / "requeued").exists()


def test_slurm_ends_with_the_run_where_requeueing_is_refused(place):
    assert "refuses to requeue" in finish(slurm(place, ["5:75"], SCONTROL_CODE="1"), code=75)


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_slurm_does_not_requeue_what_was_cancelled(place, state):
    said = finish(slurm(place, ["5:75"], JOB_STATE=state), code=75)
    assert f"the job is {state}, as after scancel" in said and not (place / "requeued").exists()


@pytest.mark.parametrize(
    "ends, code, is_requeued",
    [("5:77 5:137", 0, True), ("5:77 5:70", 70, False), ("5:76 5:77", 76, False), ("5:2", 2, False)],
)
def test_slurm_ends_as_all_tasks_do(place, ends, code, is_requeued):
    finish(slurm(place, [ends]), code=code)
    assert (place / "requeued").exists() == is_requeued


def test_slurm_starts_one_task_a_node_without_a_number(place):
    finish(slurm(place, ["5:77 5:70"], SLURM_NTASKS="", SLURM_JOB_NUM_NODES="2"), code=70)


def test_slurm_gives_up(place):
    assert "after 2 restarts" in finish(slurm(place, ["5:75"], MAX_RESTARTS="2", SLURM_RESTART_COUNT="2"), code=75)
    for code in (0, 0, 0, 75):  # no checkpoint after the fifth
        said = finish(slurm(place, ["5:75"] * 9), code=code)
    assert "giving up" in said


def test_slurm_asks_for_the_signal_and_to_be_requeued():
    text = (ROOT / "launch" / "slurm.sh").read_text()
    options = re.findall(r"^#SBATCH (\S+)$", text, flags=re.MULTILINE)
    assert {"--requeue", "--signal=TERM@300"} <= set(options)
    assert text.index("#SBATCH") < text.index("set -euo")  # Slurm reads no further than the first command


def test_the_jobset_is_whole_and_its_command_is_one_of_btlm(place):
    job = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (slices,) = job["spec"]["replicatedJobs"]
    spec = slices["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = 1
    for side in topology.split("x"):
        chips *= int(side)
    assert spec["parallelism"] == spec["completions"]
    assert chips == spec["completions"] * container["resources"]["limits"]["google.com/tpu"] == 128
    # A pod's end is the Job's, which the rule of the JobSet tells from a fault that would come again.
    (rule,) = spec["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]["values"]
    assert spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never" and rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == container["name"] and codes == sorted(codes)
    assert {cli.ERROR, cli.USAGE, cli.FAULT, cli.BAD_NUMBERS} == set(codes)
    policy = job["spec"]["failurePolicy"]
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # The command, as a container without an entry point runs it.
    (place / "ends").write_text("0:0\n")
    environment = {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "STATE": str(place)}
    subprocess.run(container["command"], env=environment, check=True)
    verb, *arguments = (place / "arguments-0").read_text().split("\0")[:-1]
    flags = train_flags()
    assert verb == "train" and flags.parse(arguments) and flags.boolean("distributed")
    assert flags.config().model.num_layers == 32
