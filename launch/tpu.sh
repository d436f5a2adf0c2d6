#!/usr/bin/env bash
# Run a config on a Cloud TPU pod slice, from creating it to deleting it.
#
#   launch/tpu.sh up     create the slice through a queued resource and wait until it is ready
#   launch/tpu.sh run    copy this checkout (or WHEEL) to every worker, install it, start `btlm train` on all, detached
#   launch/tpu.sh watch  follow worker 0's log; restart on exit code 75 (preempted and saved), stop on any other
#   launch/tpu.sh status state of the slice and the exit code of each worker
#   launch/tpu.sh down   delete the slice
#
# Set NAME, ZONE, TYPE (for example v5litepod-256), CONFIG (a name or a path) and WORKDIR (a folder that every worker
# sees: a Filestore or gcsfuse mount). Optional: PROJECT, SPOT=1, FLAGS, MAX_RESTARTS, WHEEL (of btlm_jax, where there is
# no checkout). DRY_RUN=1 prints each gcloud command instead of running it. `up` and `run` first ask the checked-in table,
# through `btlm plan --check`, whether CONFIG fits TYPE, and stop if it does not.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 2; }
need() { for name in "$@"; do [ -n "${!name:-}" ] || { echo "launch/tpu.sh: set $name" >&2; exit 2; }; done; }
gc() {
  if [ -n "${DRY_RUN:-}" ]; then echo "gcloud $*"; else gcloud "$@"; fi
}
place() { echo "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"}; }
on_all() { gc compute tpus tpu-vm ssh "$NAME" $(place) --worker=all --batch-size=all --command="$1"; }

runtime() {
  case $TYPE in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo "launch/tpu.sh: TYPE=$TYPE is not known; use v4-N, v5litepod-N, v5p-N or v6e-N" >&2; exit 2 ;;
  esac
}

check_fits() {
  # FLAGS is read as the shell of a worker will read it; what changes the config is what matters here.
  local words=() changes=() word
  eval "words=(${FLAGS:-})"
  for word in "${words[@]}"; do [[ $word != --config.* ]] || changes+=("$word"); done
  PATH=$PATH:.venv/bin command -v btlm > /dev/null || {
    echo "launch/tpu.sh: no btlm here to check the layout with: python3 -m venv .venv && .venv/bin/pip install -e ." >&2
    exit 2
  }
  PATH=$PATH:.venv/bin btlm plan --check --topology="$TYPE" --config="$CONFIG" "${changes[@]}" || exit 1
}

state() { gc compute tpus queued-resources describe "$NAME" $(place) --format='value(state.state)'; }

up() {
  need NAME ZONE TYPE CONFIG
  local version
  version=$(runtime)
  check_fits
  gc compute tpus queued-resources create "$NAME" $(place) --node-id="$NAME" --accelerator-type="$TYPE" \
    --runtime-version="$version" ${SPOT:+--spot}
  [ -z "${DRY_RUN:-}" ] || return 0
  until [ "$(state)" = ACTIVE ]; do
    case $(state) in
      FAILED | SUSPENDED) echo "launch/tpu.sh: $NAME is $(state); launch/tpu.sh down, then up again" >&2; exit 1 ;;
    esac
    echo "$(date +%T) $NAME is $(state)"
    sleep 30
  done
}

run() {
  need NAME ZONE TYPE CONFIG WORKDIR
  local folder
  check_fits
  if [ -n "${WHEEL:-}" ]; then
    gc compute tpus tpu-vm scp "$WHEEL" "$NAME": $(place) --worker=all
    install "mkdir -p btlm_jax && mv '${WHEEL##*/}' btlm_jax/" "./${WHEEL##*/}[tpu]"
  else
    folder=$(mktemp -d)
    git archive --format=tar.gz -o "$folder/btlm_jax.tar.gz" HEAD
    gc compute tpus tpu-vm scp "$folder/btlm_jax.tar.gz" "$NAME": $(place) --worker=all
    rm -r "$folder"
    install "mkdir -p btlm_jax && tar xzf btlm_jax.tar.gz -C btlm_jax" "-e .[tpu]"
  fi
  start
}

install() { on_all "$1 && cd btlm_jax && python3 -m venv .venv && .venv/bin/pip install -q $2"; }

start() {
  # Detached, so that a lost ssh does not end it; the exit code goes to a file for `status` and `watch`.
  on_all "cd btlm_jax && sudo rm -f /tmp/libtpu_lockfile exit_code && nohup bash -c '.venv/bin/btlm train --distributed --config=$CONFIG --workdir=$WORKDIR ${FLAGS:-}; echo \$? > exit_code' > train.log 2>&1 < /dev/null &"
}

exit_code() { gc compute tpus tpu-vm ssh "$NAME" $(place) --worker=0 --command='cat btlm_jax/exit_code 2>/dev/null || true'; }

watch() {
  need NAME ZONE CONFIG WORKDIR
  local restarts=0 code
  while :; do
    gc compute tpus tpu-vm ssh "$NAME" $(place) --worker=0 --command='timeout 60 tail -n 5 -f btlm_jax/train.log || true'
    code=$(exit_code)
    [ -z "${DRY_RUN:-}" ] || return 0
    case $code in
      "") ;;
      75)
        restarts=$((restarts + 1))
        [ "$restarts" -le "${MAX_RESTARTS:-20}" ] || { echo "launch/tpu.sh: preempted $restarts times, giving up" >&2; exit 75; }
        echo "preempted and saved; starting again ($restarts)"
        start
        ;;
      *) echo "btlm train ended with exit code $code"; exit "$code" ;;
    esac
  done
}

status() {
  need NAME ZONE
  state
  on_all 'hostname; cat btlm_jax/exit_code 2>/dev/null || echo running; tail -n 1 btlm_jax/train.log'
}

down() {
  need NAME ZONE
  gc compute tpus queued-resources delete "$NAME" $(place) --force --quiet
}

case ${1:-} in
  up | run | watch | status | down) "$1" ;;
  *) usage ;;
esac
