#!/usr/bin/env bash
# Set up a virtual environment and run a config on this machine's CPU: launch/local.sh [configs/local_cpu.py] [runs/local] [flags]
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:-configs/local_cpu.py}
workdir=${2:-runs/local}
shift $(($# > 2 ? 2 : $#))
[ -x .venv/bin/btlm ] || { python3 -m venv .venv && .venv/bin/pip install -e .; }
exec .venv/bin/btlm train --config="$config" --workdir="$workdir" "$@"
