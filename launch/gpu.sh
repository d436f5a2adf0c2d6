#!/usr/bin/env bash
# Set up a virtual environment with CUDA and run a config on this machine's GPUs: launch/gpu.sh CONFIG WORKDIR [flags]
#
#   GPUS=0,1      these; by default those of CUDA_VISIBLE_DEVICES, or all
#   PROCESSES=N   of the run, each with its share of the GPUs: 1 by default. NVIDIA advises one a GPU where one process
#                 with several hangs (docs/GPU_performance.md of JAX-Toolbox)
#
# The driver is checked first: CUDA 13 needs 580 and GPUs from compute capability 7.5 on, CUDA 12 needs 525 and is taken
# where that is all there is. In a checkout JAX's plugin for it is installed where .venv lacks it, 4 GB, with what the
# run's buckets and trackers need, and all GPUs must multiply and exchange (btlm_jax/parallel/health.py).
#
# Starts the run again after exit codes 75 (preempted and saved) and 77 (a peer is gone), MAX_RESTARTS times (20), and
# MAX_FRUITLESS times (3) in a row without a new checkpoint, after BACKOFF seconds (10, doubled each time). SIGTERM to
# this script is handed on: the run saves and ends, and the script with it. So it is after Ctrl-C, and where the terminal
# is closed or its connection lost; with nohup or in tmux the run goes on.
set -euo pipefail
here=$PWD # what is relative is the caller's
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { echo "usage: [GPUS=0,1] [PROCESSES=N] launch/gpu.sh CONFIG WORKDIR [flags]" >&2; exit 2; }
config=$1 workdir=$2
shift 2

refuse() { echo "launch/gpu.sh: $*" >&2; exit 2; }

serves() { "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null; }

find_python() {
  local python
  for python in python3.11 python3.12 python3.13 python3; do
    ! serves "$python" || { echo "$python"; return; }
  done
  refuse "no Python from 3.11 to 3.13 with venv: apt install python3.11-venv, or .venv made by uv venv --python=3.12 --seed"
}

# ------------------------------------------------------------------------------------------------ GPUs and driver
command -v nvidia-smi > /dev/null || refuse "no nvidia-smi: install NVIDIA's driver, 580 or newer, or use launch/local.sh"
found=$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader) || refuse "nvidia-smi failed: $found"
mapfile -t lines <<< "$found"
GPUS=${GPUS:-${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((${#lines[@]} - 1)))}}
IFS=, read -ra gpus <<< "$GPUS"
extra=cuda
for gpu in "${gpus[@]}"; do
  [[ $gpu =~ ^[0-9]+$ && $gpu -lt ${#lines[@]} ]] || refuse "GPUS=$GPUS names no GPU $gpu: there are ${#lines[@]}, from 0 on"
  driver=${lines[gpu]%%,*} capability=${lines[gpu]##*, }
  [[ $driver =~ ^[0-9]+\. && $capability =~ ^[0-9]+\.[0-9]+$ ]] || refuse "nvidia-smi says of GPU $gpu: ${lines[gpu]}"
  major=${driver%%.*} capability=$((${capability%.*} * 10 + ${capability#*.}))
  ((major >= 525)) || refuse "driver $driver is too old: CUDA 12 needs 525, CUDA 13 needs 580"
  ((major >= 580 && capability >= 75)) || extra=cuda12
done
processes=${PROCESSES:-1}
if [[ ! $processes =~ ^[1-9][0-9]*$ ]] || ((${#gpus[@]} % processes)); then
  refuse "PROCESSES=$processes does not divide ${#gpus[@]} GPUs"
fi
cuda=13
[ "$extra" = cuda ] || cuda=12
echo "launch/gpu.sh: ${#gpus[@]} GPUs, driver $driver, CUDA $cuda" >&2

# ------------------------------------------------------------------------------------------------ environment
# Where CUDA does not start JAX goes on with the CPU, which btlm train and the check of the GPUs refuse.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
export CUDA_DEVICE_ORDER=PCI_BUS_ID # numbers GPUs as nvidia-smi does, and not the fastest first
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9} # of each GPU's memory; JAX's own is 0.75
# In a checkout its own environment; beside an installed package (btlm configs says where this file is) the btlm on PATH.
if [ -f setup.cfg ]; then
  if [ ! -x .venv/bin/btlm ] || ! compgen -G ".venv/lib/python3*/site-packages/jax_cuda${cuda}_plugin" > /dev/null; then
    room=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
    ((room >= 5)) || refuse "$PWD has $room GiB of room, and the environment needs 5"
    echo "launch/gpu.sh: installing .[$extra] into .venv, 4 GB: some minutes" >&2
    if ! serves .venv/bin/python; then
      python=$(find_python)
      "$python" -m venv --clear .venv
    fi
    .venv/bin/pip install -c constraints.txt -e ".[$extra]"
  fi
  PATH=$PWD/.venv/bin:$PATH
  needed=$(cd "$here" && btlm train --print_extras --config="$config" --workdir="$workdir" "$@") || exit
  if [ -n "$needed" ] && [ "$needed" != "$(cat .venv/extras 2> /dev/null)" ]; then
    echo "launch/gpu.sh: installing .[$needed], for the buckets and trackers of the run" >&2
    if .venv/bin/pip install -q -c constraints.txt -e ".[$needed]"; then
      echo "$needed" > .venv/extras
    else
      echo "launch/gpu.sh: .[$needed] could not be installed; the run says what it lacks" >&2
    fi
  fi
  CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]}") .venv/bin/python -m btlm_jax.parallel.health \
    --devices="${#gpus[@]}" --platform=gpu ||
    refuse "the GPUs do not compute as they should, see above"
fi

# ------------------------------------------------------------------------------------------------ the run
cd "$here"
children=() stopping="" signalled=""
trap 'stopping=1 signalled=1; kill_children' TERM INT HUP # a SIGTERM beside the terminal's SIGINT changes nothing
kill_children() { # hand SIGTERM on; one that has ended is none
  local child
  for child in "${children[@]}"; do kill -TERM "$child" 2> /dev/null || true; done
}

# In the background, as bash acts on a signal only between commands.
start() {
  local share=$((${#gpus[@]} / processes)) port=$((20000 + RANDOM % 10000)) together=() n
  children=()
  for ((n = 0; n < processes; n++)); do
    ((processes == 1)) || together=(--coordinator="localhost:$port" --num_processes="$processes" --process_id="$n")
    CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:n * share:share}") \
      btlm train --config="$config" --workdir="$workdir" "${together[@]}" "$@" &
    children+=($!)
  done
}

# Wait for all processes; set code to what they mean together: the first fault, else 77, else 75, else 0.
finish() {
  local child one again=0 fault=""
  for child in "${children[@]}"; do
    while :; do
      signalled="" one=0
      wait "$child" || one=$?
      [ -n "$signalled" ] || break # a signal ends the wait, not the run
    done
    case $one in
      0) ;;
      75) [ "$again" -ne 0 ] || again=75 ;;
      77 | -1) again=77 ;; # -1: bash 5.2 lost the code, of a process that ended at the moment of a signal
      # By a signal, beside others: they say that it is gone.
      13[1-9] | 14[02-9]) if ((processes > 1)); then again=77; else fault=${fault:-$one}; fi ;;
      *) fault=${fault:-$one} ;;
    esac
  done
  code=${fault:-$again}
}

newest_step() { # of a checkpoint, 0 without one
  local name step=0
  case $workdir in
    *://*) { btlm checkpoints "$workdir" 2> /dev/null || true; } | awk '{gsub(",", "", $1)} $1 ~ /^[0-9]+$/ {n = $1} END {print n + 0}' ;;
    *)
      for name in "$workdir"/checkpoints/*; do
        name=${name##*/}
        [[ ! $name =~ ^[0-9]{1,15}$ ]] || ((10#$name <= step)) || step=$((10#$name))
      done
      echo "$step"
      ;;
  esac
}

pause() { # so many seconds, or until a signal
  local waited
  for ((waited = 0; waited < $1; waited++)); do
    [ -z "$stopping" ] || return 0
    sleep 1
  done
}

fruitless=0
step=$(newest_step)
for ((restarts = 0; ; restarts++)); do
  [ -z "$stopping" ] || exit 75
  start "$@"
  [ -z "$stopping" ] || kill_children # a signal came while they were started
  finish
  case $code in 75 | 77) ;; *) exit "$code" ;; esac
  newest=$(newest_step)
  fruitless=$((newest > step ? 0 : fruitless + 1))
  ((newest == 0)) || step=$newest # 0 where a bucket could not be listed
  if [ -n "$stopping" ] || ((restarts >= ${MAX_RESTARTS:-20})); then exit "$code"; fi
  if ((fruitless > ${MAX_FRUITLESS:-3})); then
    echo "launch/gpu.sh: exit code $code, and no checkpoint after $step in $fruitless starts; giving up" >&2
    exit "$code"
  fi
  echo "launch/gpu.sh: exit code $code at checkpoint $step; starting again" >&2
  ((fruitless == 0)) || pause $((${BACKOFF:-10} << (fruitless > 6 ? 5 : fruitless - 1)))
done
