#!/usr/bin/env bash
# Set up a virtual environment and run a config on this machine's CPU: launch/local.sh [local_cpu] [runs/local] [flags]
set -euo pipefail
here=$PWD # what is relative is the caller's
cd "$(dirname "$0")/.."
config=${1:-local_cpu}
workdir=${2:-runs/local}
shift $(($# > 2 ? 2 : $#))
# In a checkout its own environment; beside an installed package (btlm configs says where this file is) the btlm on PATH.
if [ -f setup.cfg ]; then
  [ -x .venv/bin/btlm ] || { python3 -m venv .venv && .venv/bin/pip install -e .; }
  PATH=$PWD/.venv/bin:$PATH
fi
cd "$here"
exec btlm train --config="$config" --workdir="$workdir" "$@"
