#!/usr/bin/env bash
# Set up a virtual environment with CUDA and run a config on this machine's GPUs: launch/gpu.sh CONFIG WORKDIR [flags]
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
# The launcher restarts a preempted run (exit code 75); any other code is the run's own end.
while :; do
  code=0
  btlm train --config="$config" --workdir="$workdir" "$@" || code=$?
  [ "$code" -eq 75 ] || exit "$code"
done
