#!/usr/bin/env bash
# Run a config on GPU nodes of a Slurm cluster:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh CONFIG WORKDIR [flags]
#
# One task a GPU: JAX finds the others by Slurm's variables, and gives each task the GPU of its number, or the only one
# that Slurm lets it see (--gpus-per-task=1). WORKDIR is a folder that every node sees. `btlm` is that of .venv in the
# folder where sbatch was called, or on PATH.
#
# The run saves and ends with 75 where the tasks alone get SIGTERM: 5 to 6 minutes before the time limit, at the beginning
# of a preemption's GraceTime, and by `scancel --signal=TERM JOB`. Where srun gets it too, it kills the tasks, and the
# steps since the last checkpoint are lost: by a plain scancel, scontrol requeue, and a preemption without GraceTime.
#
# After 75 and 77 (a peer is gone) the job is requeued, at most MAX_RESTARTS times (20), and at most 3 times in a row
# without a new checkpoint; never after `scontrol update JobId=JOB Requeue=0`. Any other code is the job's own; a fault of
# one task counts before what it did to others.
#SBATCH --job-name=btlm
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: sbatch --nodes=N --gpus-per-node=G --ntasks-per-node=G launch/slurm.sh CONFIG WORKDIR [flags]" >&2; exit 2; }
config=$1 workdir=$2
shift 2
[[ $workdir != *://* ]] || { echo "launch/slurm.sh: WORKDIR=$workdir must be a folder that every node sees, not a URL" >&2; exit 2; }
[ -n "${SLURM_JOB_ID:-}" ] || { echo "launch/slurm.sh: this is no Slurm job; submit it with sbatch" >&2; exit 2; }
gpus=${SLURM_GPUS_ON_NODE:-} tasks=${SLURM_TASKS_PER_NODE:-} # such as 8(x2)
if [ -n "$gpus" ] && [ -n "$tasks" ] && [[ ! $tasks =~ ^$gpus(\(x[0-9]+\))?$ ]]; then
  echo "launch/slurm.sh: nodes with $gpus GPUs have $tasks tasks, and one task takes one GPU: submit it with --ntasks-per-node=$gpus" >&2
  exit 2
fi
PATH=${SLURM_SUBMIT_DIR:-$PWD}/.venv/bin:$PATH
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} # by which btlm train refuses a CPU where CUDA does not start
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun 22.05 to 23.02 reads this alone
export CUDA_DEVICE_ORDER=PCI_BUS_ID # as Slurm numbers GPUs, also of several models in a node
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9} # of a GPU, as plans assume
state=$workdir/slurm-$SLURM_JOB_ID
rm -rf "$state/codes"
mkdir -p "$state/codes"

newest_step() { # of a checkpoint, 0 without one
  local name step=0
  for name in "$workdir"/checkpoints/*; do
    name=${name##*/}
    [[ ! $name =~ ^[0-9]{1,15}$ ]] || ((10#$name <= step)) || step=$((10#$name))
  done
  echo "$step"
}

# Print what the tasks' codes mean together: the first fault, else 77, else 75, else 0. srun's own is the largest.
verdict() {
  local file code again=0
  for ((task = 0; task < ${SLURM_NTASKS:-${SLURM_JOB_NUM_NODES:-1}}; task++)); do # srun starts one a node by default
    file=$state/codes/$task
    code=lost
    [ ! -s "$file" ] || code=$(< "$file")
    case $code in
      0) ;;
      75) [ "$again" -ne 0 ] || again=75 ;;
      lost | 77 | 13[1-9] | 14[02-9]) again=77 ;; # gone with its node, or by a signal
      -1) again=77 ;; # bash 5.2 lost the code, of a process that ended at the moment of a signal
      *) echo "$code"; return ;;
    esac
  done
  echo "$again"
}

# The task's own code goes to a file. Words are passed on as they are; $1 is where the codes go. Slurm signals this shell,
# and the training too where cgroup.conf has SignalChildrenProcesses=yes: a second SIGTERM changes nothing there.
# shellcheck disable=SC2016
task='codes=$1; shift
case ${CUDA_VISIBLE_DEVICES:-,} in *,*) ;; *) export JAX_LOCAL_DEVICE_IDS=${JAX_LOCAL_DEVICE_IDS:-0} ;; esac
btlm train --distributed "$@" & child=$!
trap "signalled=1; kill -TERM $child 2> /dev/null" TERM
while :; do
  signalled="" code=0
  wait "$child" || code=$?
  [ -n "$signalled" ] || break # a signal ends the wait, not the training
done
echo "$code" > "$codes/$SLURM_PROCID"; exit "$code"'

# --wait=0: no WaitTime of the cluster ends the tasks that still save. --export=ALL: what sbatch was given is not for the
# tasks too, which would lose PATH and JAX_PLATFORMS by it.
from=$(newest_step)
srun --kill-on-bad-exit=0 --wait=0 --export=ALL bash -c "$task" btlm "$state/codes" --config="$config" --workdir="$workdir" "$@" || true
code=$(verdict)
case $code in 75 | 77) ;; *) exit "$code" ;; esac

# scancel reaches the nodes one after another: tasks may end before this script does. From then on a job is COMPLETING to
# squeue while a process of it runs, and CANCELLED then; scontrol would requeue it.
job_state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2> /dev/null || true)
case $job_state in
  CANCELLED | COMPLETING)
    echo "launch/slurm.sh: exit code $code, and the job is $job_state, as after scancel: it is not requeued" >&2
    exit "$code"
    ;;
esac

fruitless=0
if (($(newest_step) <= from)); then fruitless=$(($(cat "$state/fruitless" 2> /dev/null || echo 0) + 1)); fi
echo "$fruitless" > "$state/fruitless"
if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_RESTARTS:-20} || fruitless > 3)); then
  echo "launch/slurm.sh: exit code $code after ${SLURM_RESTART_COUNT:-0} restarts, $fruitless in a row without a checkpoint; giving up" >&2
  exit "$code"
fi
echo "launch/slurm.sh: exit code $code at checkpoint $(newest_step); the job is requeued" >&2
scontrol requeue "$SLURM_JOB_ID" || { echo "launch/slurm.sh: Slurm refuses to requeue the job, see above" >&2; exit "$code"; }
