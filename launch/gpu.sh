#!/usr/bin/env bash
# Set up a virtual environment with CUDA and run a config on this machine's GPUs: launch/gpu.sh CONFIG WORKDIR [flags]
#
# Starts the run again after exit codes 75 (preempted and saved) and 77 (a peer is gone), MAX_RESTARTS times (20). SIGTERM
# to this script is handed on: the run saves and ends, and the script with it.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { echo "usage: launch/gpu.sh CONFIG WORKDIR [flags]" >&2; exit 2; }
config=$1 workdir=$2
shift 2
# In a checkout its own environment; beside an installed package (btlm configs says where this file is) the btlm on PATH.
if [ -f setup.cfg ]; then
  [ -x .venv/bin/btlm ] || { python3 -m venv .venv && .venv/bin/pip install -e '.[cuda]'; }
  PATH=$PWD/.venv/bin:$PATH
fi
child="" stopping="" signalled=""
trap 'stopping=1 signalled=1; [ -z "$child" ] || kill -TERM "$child" 2> /dev/null || true' TERM
for ((restarts = 0; ; restarts++)); do
  # In the background, as bash acts on a signal only between commands; Ctrl-C reaches the run as it does this script.
  env --default-signal=INT btlm train --config="$config" --workdir="$workdir" "$@" &
  child=$!
  while :; do
    signalled="" code=0
    wait "$child" || code=$?
    [ -n "$signalled" ] || break # a signal ends the wait, not the run
  done
  child=""
  case $code in 75 | 77) ;; *) exit "$code" ;; esac
  if [ -n "$stopping" ] || ((restarts >= ${MAX_RESTARTS:-20})); then exit "$code"; fi
  echo "launch/gpu.sh: exit code $code; starting again" >&2
done
