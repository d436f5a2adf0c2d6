#!/usr/bin/env bash
# Run a config on Cloud TPU VMs, from creating the slice to deleting it.
#
#   launch/tpu.sh all [-- FLAGS]     up, run, watch; create the slice again when it was preempted or is gone; down
#   launch/tpu.sh up                 ask for the slice, as a queued resource, and wait until it is ready
#   launch/tpu.sh run [-- FLAGS]     copy this working tree (or WHEEL) to every worker, install it, check the devices,
#                                    start `btlm train` on all, detached
#   launch/tpu.sh watch              follow a run; start it again after exit codes 75 and 77 (`all` does it, and more)
#   launch/tpu.sh status             the slice, the run on each worker, and what of it costs money
#   launch/tpu.sh logs [WORKER] [--follow]
#   launch/tpu.sh ssh [WORKER] [COMMAND ...]
#   launch/tpu.sh stop               have the run save and end (SIGTERM); print the workers' exit codes
#   launch/tpu.sh down               delete the slice, and prove by listing that nothing of it is left
#
# Set NAME, ZONE, TYPE (for example v5litepod-256), CONFIG (a name or a path) and WORKDIR (a URL such as
# gs://bucket/run, or an absolute path that every worker sees, such as a Filestore mount). FLAGS after -- go to `btlm train` as they are; the variable FLAGS is
# split at spaces, with quotes as a shell's but nothing expanded. Optional settings:
#
#   PROJECT  PROVISION=on-demand|spot|reserved (SPOT=1 is spot)  WHEEL (of btlm_jax, without a checkout: CONFIG is a name)
#   SLICES=2 (that many slices of TYPE, joined over the data-center network)  CREATE_FLAGS (more flags of gcloud's
#   queued-resources create)  CACHE_DIR (compiled steps; WORKDIR/compile_cache without)  EXPORT="WANDB_API_KEY ..."
#   (variables from here that the run gets, LIBTPU_INIT_ARGS always)  KEEP=1 (all does not delete the slice at the end)
#   MAX_RESTARTS=20  MAX_FRUITLESS=3 (restarts in a row without a new checkpoint)  ATTEMPTS=6 of what fails by itself
#   seconds: POLL=60  BACKOFF=10 (doubled each time)  UP_TIMEOUT=86400  READY_TIMEOUT=1800  GRACE=180  STALE=600
#   SSH_TIMEOUT=120  SETUP_TIMEOUT=3600  CHECK_TIMEOUT=600  STOP_TIMEOUT=600
#
# --dry-run (or DRY_RUN=1) prints each gcloud command instead of running it. `up`, `run` and `all` first ask the
# checked-in table, through `btlm plan --check`, whether CONFIG fits TYPE, and stop if it does not. XLA's flags of each
# generation are not here: btlm_jax/train/flops.py has them, for `btlm train` and `btlm plan` alike.
#
# Exit code: the run's own, that of a fault before others (0, 2, 70, 75, 76, 77: docs/troubleshooting.md); 1 where the
# cloud refused or gave up; 2 for a wrong setting. Nothing here runs only as long as an ssh session: after a lost
# connection, or Ctrl-C, the same command goes on with the run that is there.
set -euo pipefail
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "launch/tpu.sh: needs bash 4.4 or newer; this is $BASH_VERSION" >&2
  exit 2
}

PREEMPTED=75 PEER_GONE=77
ABSENT=3 EXISTS=4 REFUSED=5 LOGIN=6 CAPACITY=7 TROUBLE=8 # why gcloud failed
RUN_FILES=btlm_launch                                    # below the home of a worker; NAME's are in a folder of it

usage() {
  sed -n '2,39s/^# \{0,1\}//p' "$0"
  exit 2
}
say() { printf '%(%F %T)T launch/tpu.sh: %s\n' -1 "$*" >&2; }
die() {
  local code=$1
  shift
  say "$*"
  exit "$code"
}
need() {
  local name
  for name in "$@"; do [ -n "${!name:-}" ] || die 2 "set $name"; done
}

# ---------------------------------------------------------------------------------------------------- on a worker
# `worker VERB` runs there, out of the copy of this file in $RUN_FILES/NAME. What users wrote reaches it in files of
# NUL-terminated words (arguments, environment, settings), so that no shell reads it a second time.

worker() {
  local verb=$1 setting
  shift
  cd "$(dirname "$0")"
  export_environment
  while IFS= read -r -d '' setting; do printf -v "${setting%%=*}" %s "${setting#*=}"; done < settings
  mkdir -p run
  "worker_$verb" "$@"
}

content() { if [ -s "$1" ]; then echo "$(< "$1")"; fi; }
boot_id() { echo "$(< /proc/sys/kernel/random/boot_id)"; }

# Whether the training, or what waits for its code, runs since this boot.
is_alive() {
  local name process key value _
  [ -e run/boot ] && [ "$(< run/boot)" = "$(boot_id)" ] || return 1
  for name in run/group run/child; do
    process=$(content "$name")
    [ -n "$process" ] && [ -e "/proc/$process/status" ] || continue
    while read -r key value _; do
      if [ "$key" = State: ] && [[ $value != [ZX] ]]; then return 0; fi
    done < "/proc/$process/status"
  done 2> /dev/null
  return 1
}

kill_group() {
  if [ -s run/group ] && [ "$(content run/boot)" = "$(boot_id)" ]; then
    kill -KILL -- "-$(content run/group)" 2> /dev/null || true
  fi
}

# End what an earlier start left: its processes, the lock of the TPU. Says who else holds the devices.
clean_up() {
  local holders
  kill_group
  rm -f run/group run/child run/exit_code run/exit_code.new
  rm -f "$TPU_LOCK_FILE" 2> /dev/null || sudo -n rm -f "$TPU_LOCK_FILE" || true
  holders=$(sudo -n fuser /dev/accel* /dev/vfio/[0-9]* 2> /dev/null || true)
  [ -z "${holders// /}" ] || { echo "$HOSTNAME: the TPU's devices are held by processes$holders" >&2; return 1; }
}

# Print a Python from 3.11 to 3.13 that can make an environment. The images of TPU VMs have 3.10.
find_python() {
  local python
  for python in python3.11 python3.12 python3.13 python3; do
    if "$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null; then
      echo "$python"
      return
    fi
  done
  return 1
}

# Make an environment in a folder: by the image's Python, else by uv, which brings one along, else by deadsnakes'.
make_environment() {
  local folder=$1 python
  rm -rf "$folder"
  if python=$(find_python); then
    "$python" -m venv "$folder"
  elif PATH=$HOME/.local/bin:$PATH command -v uv > /dev/null || python3 -m pip install --quiet --user uv; then
    PATH=$HOME/.local/bin:$PATH uv venv --quiet --seed --python=3.11 "$folder"
  else
    sudo -n add-apt-repository -y ppa:deadsnakes/ppa
    sudo -n apt-get update -q
    sudo -n apt-get install -q -y python3.11 python3.11-venv
    python3.11 -m venv "$folder"
  fi
  if [ -n "$WHEEL" ]; then
    "$folder/bin/python" -m pip install -q "./${WHEEL}[$EXTRAS]"
  else
    "$folder/bin/python" -m pip install -q -c tree/constraints.txt -e "./tree[$EXTRAS]"
  fi
}

# Unpack the tree and make the environment, once for the same requirements. Repeating it is harmless.
worker_setup() {
  local key folder
  ! is_alive || { echo "$HOSTNAME: btlm train is running here" >&2; return 1; }
  clean_up
  rm -rf tree.new && mkdir tree.new
  [ ! -f source.tar.gz ] || tar xzf source.tar.gz -C tree.new
  rm -rf tree && mv tree.new tree
  if [ -n "$WHEEL" ]; then
    key=$(sha256sum "$WHEEL")
  else
    key=$(cat tree/setup.cfg tree/setup.py tree/constraints.txt | sha256sum)
  fi
  key=$(echo "$PWD $EXTRAS $key" | sha256sum) # the tree is installed in place
  folder=../env-${key:0:16}
  exec 9> "$folder.lock"
  flock 9
  if [ ! -e "$folder/complete" ]; then
    make_environment "$folder"
    touch "$folder/complete"
  fi
  ln -sfn "$folder" env
}

# Check that all devices of all hosts are there and compute; every worker must run it at the same time.
worker_check() {
  timeout "$CHECK_TIMEOUT" env/bin/python -m btlm_jax.parallel.health --devices="$DEVICES" --distributed
}

# Keep commit, changes and command of this start beside the run. Worker 0 of the first slice does it.
worker_record() {
  local name words
  name=launches/$(date -u +%Y%m%dT%H%M%SZ)
  mkdir -p "$name"
  cp commit diff.patch "$name/"
  mapfile -d '' words < arguments
  printf '%q ' btlm train "${words[@]}" > "$name/command"
  case $WORKDIR in
    *://*) gcloud storage cp -r "$name" "$WORKDIR/launches/" ;;
    *) mkdir -p "$WORKDIR/launches" && cp -r "$name" "$WORKDIR/launches/" ;;
  esac
}

# Start the run, detached. The same START twice starts once: the answer to the first may have been lost.
worker_start() {
  local start=$1
  [ "$(content run/start)" != "$start" ] || return 0
  clean_up
  boot_id > run/boot
  printf '%(%s)T\n' -1 > run/beat
  echo "--- started $(date -u +%Y-%m-%dT%H:%M:%SZ)" >> run/log
  setsid bash tpu.sh worker supervise > /dev/null 2>&1 < /dev/null 9>&- &
  until [ -s run/child ] || [ -e run/exit_code ]; do sleep 0.05; done
  echo "$start" > run/start
}

export_environment() {
  local variable
  unset "${!MEGASCALE_@}" # of an earlier job on this machine
  while IFS= read -r -d '' variable; do export "${variable?}"; done < environment
}

# Run the training, with a heartbeat, and keep its exit code. Signals are for the training alone, which saves.
worker_supervise() {
  local arguments child code=0
  mapfile -d '' arguments < arguments
  trap '' TERM HUP INT
  echo $$ > run/group
  cd tree
  env --default-signal=TERM,HUP,INT ../env/bin/btlm train "${arguments[@]}" >> ../run/log 2>&1 < /dev/null &
  child=$!
  cd ..
  echo "$child" > run/child
  while kill -0 "$child" 2> /dev/null; do
    printf '%(%s)T\n' -1 > run/beat.new
    mv run/beat.new run/beat # a report may read it at any time
    sleep "$BEAT"
  done &
  wait "$child" || code=$?
  echo "$code" > run/exit_code.new
  mv run/exit_code.new run/exit_code
  rm run/group
}

# Print the newest checkpoint's step, 0 without one.
newest_step() {
  local names step=0 name
  case $WORKDIR in
    # There a checkpoint counts once it has this object, which is written last.
    *://*) names=$(gcloud storage ls "$WORKDIR/checkpoints/*/commit.json" 2> /dev/null || true) ;;
    *) names=$(ls "$WORKDIR/checkpoints" 2> /dev/null || true) ;;
  esac
  while read -r name; do
    name=${name%/commit.json}
    name=${name##*/}
    [[ ! $name =~ ^[0-9]{1,15}$ ]] || ((10#$name <= step)) || step=$((10#$name))
  done <<< "$names"
  echo "$step"
}

# Print one line: host, state, exit code, age of the heartbeat, newest checkpoint, last line of the log. `ask` reads it.
worker_report() {
  local state=idle code=- age=0 beat now line=""
  if is_alive; then
    beat=$(content run/beat)
    printf -v now '%(%s)T' -1
    state=running age=$((now - ${beat:-now}))
  elif [ -s run/exit_code ]; then
    state=ended code=$(content run/exit_code)
  elif [ -e run/start ]; then
    state=lost # by a reboot, say: the process is not there, and its code never was
  fi
  [ ! -s run/log ] || line=$(tail -n 1 run/log | tr -d '\000-\037')
  echo "@btlm $HOSTNAME $state $code $age $(newest_step) $line"
}

# Have the training save and end; kill it after STOP_TIMEOUT.
worker_stop() {
  local child waited
  if is_alive; then
    child=$(content run/child)
    kill -TERM "$child" 2> /dev/null || true
    for ((waited = 0; waited < STOP_TIMEOUT * 5; waited++)); do
      is_alive || break
      sleep 0.2
    done
    ! is_alive || kill -KILL "$child" 2> /dev/null || true # the supervisor then writes its code
    for ((waited = 0; waited < 20; waited++)); do
      [ ! -s run/exit_code ] || break
      sleep 0.1
    done
  fi
  worker_report
}

worker_tail() { tail -n "$1" run/log | sed "s/^/$HOSTNAME  /"; }
worker_follow() { tail -n 20 -F run/log | sed -u "s/^/$HOSTNAME  /"; }

# ----------------------------------------------------------------------------------------------------- gcloud

# Wait so many seconds; tests have shorter ones.
pause() {
  local milliseconds=$(($1 * ${MILLISECONDS_OF_A_SECOND:-1000})) seconds
  waited=$((waited + $1))
  printf -v seconds '%d.%03d' $((milliseconds / 1000)) $((milliseconds % 1000))
  [ -n "$DRY_RUN" ] || sleep "$seconds"
}
back_off() { pause $((BACKOFF << ($1 > 6 ? 5 : $1 - 1))); } # before attempt $1 + 1

# Run gcloud once, for at most $1 seconds; return why it failed, and say it.
cloud_once() {
  local limit=$1 errors=$scratch/errors.$BASHPID code=0 text
  shift
  if [ -n "$DRY_RUN" ]; then
    { printf gcloud; printf ' %q' "$@"; echo; } >&3
    return 0
  fi
  timeout "$limit" gcloud "$@" 2> "$errors" < /dev/null 3>&- || code=$?
  [ "$code" -ne 0 ] || return 0
  text=$(grep -v -e '^Updated property' -e '^SSH: Attempting' "$errors" | tail -n 5 || true)
  case $text in
    *"gcloud auth login"* | *Reauthentication* | *invalid_grant* | *UNAUTHENTICATED*) code=$LOGIN ;;
    *"ERROR: (gcloud"*NOT_FOUND*) return "$ABSENT" ;;
    *"ERROR: (gcloud"*ALREADY_EXISTS*) return "$EXISTS" ;;
    *"ERROR: (gcloud"*PERMISSION_DENIED* | *"ERROR: (gcloud"*INVALID_ARGUMENT* | *"unrecognized arguments"*) code=$REFUSED ;;
    *"ERROR: (gcloud"*RESOURCE_EXHAUSTED* | *"no more capacity"*) code=$CAPACITY ;;
    *) code=$TROUBLE ;;
  esac
  say "gcloud ${*:1:4} failed: ${text:-no answer in $limit s}"
  [ "$code" -ne "$LOGIN" ] || say "the login has expired: run gcloud auth login in another terminal"
  return "$code"
}

# The same until it succeeds, at most ATTEMPTS times. Absence, existence and refusals are answers.
cloud() {
  local attempt code output
  for ((attempt = 1; ; attempt++)); do
    code=0
    output=$(cloud_once "$@") || code=$?
    case $code in
      0) [ -z "$output" ] || echo "$output" ;;&
      0 | "$ABSENT" | "$EXISTS" | "$REFUSED") return "$code" ;;
    esac
    if ((attempt >= ATTEMPTS)); then return "$code"; fi
    back_off "$attempt"
  done
}

queue() { cloud 300 compute tpus queued-resources "$1" "$NAME" "${place[@]}" "${@:2}"; }
node() { cloud 300 compute tpus tpu-vm "$1" "$2" "${place[@]}" "${@:3}"; }

# Print the state of the queued resource, ABSENT if there is none.
queue_state() {
  local code=0
  queue describe --format='value(state.state)' || code=$?
  [ "$code" -ne "$ABSENT" ] || { echo ABSENT; return 0; }
  return "$code"
}

node_state() {
  local code=0
  node describe "$1" --format='value(state)' || code=$?
  [ "$code" -ne "$ABSENT" ] || { echo ABSENT; return 0; }
  return "$code"
}

# Run a worker verb on all workers of all slices at once; print what they print, return the worst failure.
on_workers() {
  local limit=$1 command="bash $RUN_FILES/$NAME/tpu.sh worker ${*:2}"
  on_nodes "$limit" --worker=all --batch-size=all --command="$command"
}

on_nodes() {
  local limit=$1 node jobs=() job code worst=0
  shift
  for node in "${nodes[@]}"; do
    cloud_once "$limit" compute tpus tpu-vm ssh "$node" "${place[@]}" "${ssh_flags[@]}" "$@" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do
    code=0
    wait "$job" || code=$?
    ((code <= worst)) || worst=$code
  done
  return "$worst"
}

# The same until all succeed, at most ATTEMPTS times.
surely_on_workers() {
  local attempt
  for ((attempt = 1; ; attempt++)); do
    if on_workers "$@"; then return 0; fi
    if ((attempt >= ATTEMPTS)); then return 1; fi
    back_off "$attempt"
  done
}

# --------------------------------------------------------------------------------------------------- the slice

runtime() {
  case $TYPE in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die 2 "TYPE=$TYPE is not known; use v4-N, v5litepod-N (a v5e), v5p-N or v6e-N" ;;
  esac
}

num_devices() {
  local number=${TYPE##*-}
  [[ $number =~ ^[0-9]+$ ]] || die 2 "TYPE=$TYPE must end in a number"
  case $TYPE in v4-* | v5p-*) number=$((number / 2)) ;; esac # their names count cores, two of which are one device
  echo $((number * SLICES))
}

# Run the btlm of this machine.
btlm_here() {
  PATH=$PATH:.venv/bin command -v btlm > /dev/null ||
    die 2 "no btlm here to check the run with: python3 -m venv .venv && .venv/bin/pip install -e ."
  PATH=$PATH:.venv/bin btlm "$@"
}

check_fits() {
  local changes=() word n
  runtime > /dev/null
  num_devices > /dev/null
  if ((SLICES > 1)); then
    say "the table has layouts of one slice: btlm plan --topology=$TYPE --slices=$SLICES tells whether $CONFIG fits"
    return 0
  fi
  for ((n = 0; n < ${#train_flags[@]}; n++)); do
    word=${train_flags[n]}
    [[ $word =~ ^-+config\. ]] || continue
    changes+=("$word")
    if [[ $word != *=* ]]; then # its value is the next word
      n=$((n + 1))
      changes+=("${train_flags[@]:n:1}")
    fi
  done
  btlm_here plan --check --topology="$TYPE" --config="$CONFIG" "${changes[@]}" || exit
}

create() {
  local flags=("--accelerator-type=$TYPE" "--runtime-version=$(runtime)" "${create_flags[@]}") code=0
  case $PROVISION in
    spot | reserved) flags+=("--$PROVISION") ;;
    on-demand) ;;
    *) die 2 "PROVISION=$PROVISION is not known; use on-demand, spot or reserved" ;;
  esac
  if ((SLICES > 1)); then flags+=("--node-count=$SLICES" "--node-prefix=$NAME"); else flags+=("--node-id=$NAME"); fi
  queue create "${flags[@]}" || code=$?
  [ "$code" -ne "$EXISTS" ] || say "$NAME exists already, or the answer to an earlier try was lost: it is taken"
  [ "$code" -ne "$REFUSED" ] || die 1 "the slice was refused; see above"
  [ "$code" -ne "$LOGIN" ] || die 1 "not logged in; log in and run the same command again"
  [ "$code" -eq 0 ] || [ "$code" -eq "$EXISTS" ]
}

# Create the slice, or take the one that is there, and wait until every VM is ready.
up() {
  local state is_new attempt wait_until error
  for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
    waited=0 is_new="" wait_until=$UP_TIMEOUT
    while :; do
      state=$(queue_state) || die 1 "the state of $NAME cannot be read; run the same command again"
      case $state in
        ABSENT)
          [ -z "$is_new" ] || break # what was asked for has vanished
          create || break
          is_new=1 created=1
          [ -z "$DRY_RUN" ] || return 0
          continue
          ;;
        FAILED | SUSPENDED | SUSPENDING | DELETING)
          error=$(queue describe --format='value(state.failedData.error.message)' || true)
          say "$NAME is $state${error:+: $error}"
          break
          ;;
        ACTIVE)
          check_type
          if are_ready; then
            say "$NAME is ready"
            return 0
          fi
          ! is_gone || break
          [ "$wait_until" -ne "$UP_TIMEOUT" ] || wait_until=$((waited + READY_TIMEOUT))
          ;;
        *) [ -z "$DRY_RUN" ] || { create; return 0; } ;;
      esac
      if ((waited >= wait_until)); then
        say "$NAME is $state and not ready after $waited s"
        [ "$state" != ACTIVE ] || break
        down
        die 1 "the request is withdrawn"
      fi
      say "$NAME is $state"
      pause "$POLL"
    done
    remove || die 1 "$NAME cannot be deleted"
    back_off "$attempt"
  done
  die 1 "$NAME could not be created in $ATTEMPTS attempts"
}

check_type() {
  local type
  type=$(node describe "${nodes[0]}" --format='value(acceleratorType)') || return 0
  type=${type##*/}
  [ -z "$type" ] || [ "$type" = "$TYPE" ] || die 2 "$NAME is a $type, not TYPE=$TYPE; choose another NAME"
}

are_ready() {
  local each
  for each in "${nodes[@]}"; do [ "$(node_state "$each")" = READY ] || return 1; done
}

# Count the workers of all slices.
count_workers() {
  local each addresses
  num_workers=0
  for each in "${nodes[@]}"; do
    addresses=$(node describe "$each" --format='value(networkEndpoints[].ipAddress)') || die 1 "$each cannot be described"
    read -ra addresses <<< "${addresses//[;,]/ }"
    num_workers=$((num_workers + ${#addresses[@]}))
  done
  [ -n "$DRY_RUN" ] || ((num_workers > 0)) || die 1 "$NAME has no workers"
}

# Whether the slice, or a part of it, is no more.
is_gone() {
  local state each
  state=$(queue_state) || return 1
  case $state in ABSENT | FAILED | SUSPENDED | SUSPENDING | DELETING) say "$NAME is $state"; return 0 ;; esac
  for each in "${nodes[@]}"; do
    state=$(node_state "$each") || return 1
    case $state in ABSENT | PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING) say "$each is $state"; return 0 ;; esac
  done
  return 1
}

# List what there is of NAME, one a line. A VM says which queued resource asked for it: of another SLICES it is found
# too, and that of another queued resource, such as one named NAME-1, is not taken for a slice of this one.
list_all() {
  local names name queue
  names=$(cloud 300 compute tpus queued-resources list "${place[@]}" --format='value(name)') || return 1
  while read -r name; do [ "${name##*/}" != "$NAME" ] || echo "queued-resources $NAME"; done <<< "$names"
  names=$(cloud 300 compute tpus tpu-vm list "${place[@]}" --format='value(name,queuedResource)') || return 1
  while read -r name queue; do
    name=${name##*/}
    if [ -n "$queue" ]; then
      [ "${queue##*/}" != "$NAME" ] || echo "tpu-vm $name"
    elif [[ " $NAME ${nodes[*]} " == *" $name "* ]]; then
      echo "tpu-vm $name"
    elif [[ $name =~ ^$NAME-[0-9]+$ ]]; then
      say "$name is of no queued resource, and is left: if it is a slice of $NAME, SLICES=$((10#${name##*-} + 1)) launch/tpu.sh down deletes it"
    fi
  done <<< "$names"
}

# Delete the slice, whatever is left of it.
remove() {
  local attempt left kind name
  for ((attempt = 1; ; attempt++)); do
    queue delete --force --quiet > /dev/null || true # the list tells
    left=$(list_all) || return 1
    [ -n "$left" ] || return 0
    while read -r kind name; do
      [ "$kind" != tpu-vm ] || node delete "$name" --quiet > /dev/null || true # its queued resource may be gone
    done <<< "$left"
    if ((attempt > ATTEMPTS)); then
      say "still there: ${left//$'\n'/, }"
      return 1
    fi
    back_off "$attempt"
  done
}

down() {
  remove || die 1 "$NAME is not deleted, and may cost money: launch/tpu.sh down, or the console"
  say "$NAME is deleted: nothing of it is listed"
}

# ----------------------------------------------------------------------------------------------------- the run

# Pack what the workers get: sources with their uncommitted changes, or a wheel; the command as words; this file.
pack() {
  local tree config=$CONFIG sent=$CONFIG name needed code=0
  mkdir -p "$payload"
  cp launch/tpu.sh "$payload/"
  if [ -n "$WHEEL" ]; then
    cp "$WHEEL" "$payload/"
    echo "${WHEEL##*/}" > "$payload/commit"
    : > "$payload/diff.patch"
  else
    git rev-parse -q --verify HEAD > "$payload/commit" ||
      die 2 "$PWD is no git checkout with a commit; set WHEEL to a wheel of btlm_jax"
    cp "$(git rev-parse --git-path index)" "$scratch/index"
    GIT_INDEX_FILE=$scratch/index git add -A
    tree=$(GIT_INDEX_FILE=$scratch/index git write-tree)
    git diff --binary HEAD "$tree" > "$payload/diff.patch"
    git archive --format=tar "$tree" | gzip > "$payload/source.tar.gz"
  fi
  if [ -f "$CONFIG" ] && { [ -n "$WHEEL" ] || ! git cat-file -e "$tree:$CONFIG" 2> /dev/null; }; then
    cp "$CONFIG" "$payload/config.py" # git ignores it, or it lies elsewhere
    config=../config.py sent=$payload/config.py
  fi
  needed=$(JAX_COMPILATION_CACHE_DIR=${CACHE_DIR:-${JAX_COMPILATION_CACHE_DIR:-}} \
    btlm_here train --print_extras --distributed --config="$sent" --workdir="$WORKDIR" "${train_flags[@]}") || code=$?
  if ((code)); then
    [ "$sent" = "$CONFIG" ] ||
      say "CONFIG=$CONFIG is sent alone, and must work alone: give one that reads other files by its name, as pods/v5p_128"
    exit "$code"
  fi
  printf '%s\0' --distributed "--config=$config" "--workdir=$WORKDIR" "${train_flags[@]}" > "$payload/arguments"
  : > "$payload/environment"
  [ -z "${LIBTPU_INIT_ARGS:-}" ] || exported=(LIBTPU_INIT_ARGS "${exported[@]}")
  for name in "${exported[@]}"; do
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ && -n ${!name+set} ]] || die 2 "EXPORT names $name, which is not set"
    printf '%s\0' "$name=${!name}" >> "$payload/environment"
  done
  [ -z "$CACHE_DIR" ] || printf '%s\0' "JAX_COMPILATION_CACHE_DIR=$CACHE_DIR" >> "$payload/environment"
  for name in WORKDIR STOP_TIMEOUT CHECK_TIMEOUT BEAT TPU_LOCK_FILE; do printf '%s\0' "$name=${!name}"; done \
    > "$payload/settings"
  printf '%s\0' "WHEEL=${WHEEL##*/}" "DEVICES=$(num_devices)" "EXTRAS=tpu${needed:+,$needed}" >> "$payload/settings"
}

# Copy it to all workers and unpack it there. Slices of one run differ in their number alone.
ship() {
  local number archive=$scratch/$NAME.tar.gz coordinator
  local unpack="mkdir -p $RUN_FILES/$NAME && cd $RUN_FILES/$NAME && rm -f source.tar.gz && chmod 600 ../../$NAME.tar.gz && tar xzf ../../$NAME.tar.gz"
  cp "$payload/environment" "$scratch/environment"
  if ((SLICES > 1)); then
    coordinator=$(node describe "${nodes[0]}" --format='value(networkEndpoints[0].ipAddress)') || return 1
  fi
  for number in "${!nodes[@]}"; do
    if ((SLICES > 1)); then
      cp "$scratch/environment" "$payload/environment"
      printf '%s\0' "MEGASCALE_COORDINATOR_ADDRESS=$coordinator" "MEGASCALE_NUM_SLICES=$SLICES" \
        "MEGASCALE_SLICE_ID=$number" MEGASCALE_PORT=8080 >> "$payload/environment"
    fi
    (umask 077 && tar czf "$archive" -C "$payload" .)
    cloud "$SETUP_TIMEOUT" compute tpus tpu-vm scp "$archive" "${nodes[number]}:" "${place[@]}" --quiet --worker=all || return 1
  done
  cp "$scratch/environment" "$payload/environment"
  local attempt
  for ((attempt = 1; ; attempt++)); do
    if on_nodes "$SSH_TIMEOUT" --worker=all --batch-size=all --command="umask 077 && $unpack"; then return 0; fi
    if ((attempt >= ATTEMPTS)); then return 1; fi
    back_off "$attempt"
  done
}

# Install on a slice that is up, check its devices and start the run.
place_run() {
  count_workers
  ship || { say "the working tree could not be copied"; return 1; }
  surely_on_workers "$SETUP_TIMEOUT" setup || { say "the environment could not be made"; return 1; }
  on_workers "$((CHECK_TIMEOUT + 60))" check >&2 || on_workers "$((CHECK_TIMEOUT + 60))" check >&2 ||
    { say "the devices of $NAME are not all there or do not compute"; return 1; }
  cloud_once "$SSH_TIMEOUT" compute tpus tpu-vm ssh "${nodes[0]}" "${place[@]}" "${ssh_flags[@]}" --worker=0 \
    --command="bash $RUN_FILES/$NAME/tpu.sh worker record" || say "commit and changes could not be kept in $WORKDIR"
  begin
}

begin() {
  ask || true
  from_step=$step
  surely_on_workers "$SSH_TIMEOUT" start "$(date +%s).$((++num_starts)).$$" || { say "the run could not be started"; return 1; }
  say "started on ${num_workers} workers, after checkpoint $from_step"
}

report() {
  local file=$RUN_FILES/$NAME/tpu.sh
  on_nodes "$SSH_TIMEOUT" --worker=all --batch-size=all \
    --command="if [ -e $file ]; then bash $file worker report; else echo @btlm \$HOSTNAME idle - 0 0; fi"
}

# Ask all workers how the run is. Sets reported, running, idle, codes (host:code ...), step and last_line.
ask() {
  local output line host state code age at rest failure=0
  reported=0 running=0 idle=0 codes=()
  output=$(report) || failure=$?
  while IFS= read -r line; do
    [[ $line == "@btlm "* ]] || continue
    read -r _ host state code age at rest <<< "$line"
    ((reported += 1))
    ((at == 0)) || step=$at # 0 too where a bucket could not be listed
    case $state in
      running) if ((age > STALE)); then codes+=("$host:silent"); else ((running += 1)); fi ;;
      ended) codes+=("$host:$code") ;;
      lost) codes+=("$host:lost") ;;
      *) ((idle += 1)) ;;
    esac
    [ -z "$rest" ] || last_line="$host: $rest"
  done <<< "$output"
  return "$failure"
}

# The same until all answer, at most ATTEMPTS times.
surely_ask() {
  local attempt
  for ((attempt = 1; ; attempt++)); do
    if ask; then return 0; fi
    if ((attempt >= ATTEMPTS)); then return 1; fi
    back_off "$attempt"
  done
}

# Return what the codes of all workers mean together: the first fault, else a code to start again after, else 0.
# A worker that was killed, or is silent, is a peer that is gone.
verdict() {
  local each code again=0
  for each in "${codes[@]}"; do
    code=${each##*:}
    case $code in
      0) ;;
      "$PREEMPTED") [ "$again" -ne 0 ] || again=$PREEMPTED ;;
      "$PEER_GONE" | lost | silent) again=$PEER_GONE ;;
      130 | 141) return "$code" ;;
      129 | 1[3-9][0-9]) again=$PEER_GONE ;; # a signal
      *) return "$code" ;;
    esac
  done
  return "$again"
}

# Wait until the run has ended on all workers, and return its code; return 1 if the slice is gone. Sets is_lost then.
follow() {
  local silent=0 some_ended=0 code failure
  is_lost=""
  while :; do
    failure=0
    ask || failure=$?
    [ -z "$DRY_RUN" ] || return 0
    if ((reported >= num_workers && running == 0)); then
      code=0
      verdict || code=$?
      ((${#codes[@]})) || die 1 "no run was started on $NAME: launch/tpu.sh run"
      say "ended: ${codes[*]}"
      return "$code"
    fi
    if ((reported >= num_workers)); then silent=0; else silent=$((silent + 1)); fi
    if ((silent >= 3)); then
      say "$((num_workers - reported)) of $num_workers workers do not answer"
      if is_gone || ((silent >= 3 * ATTEMPTS)); then
        ((failure != LOGIN)) || die 1 "not logged in; the run goes on by itself: log in and run the same command again"
        is_lost=1
        return 1
      fi
    else
      say "step $step; $running of $num_workers run${codes[*]:+; ended: ${codes[*]}}; $last_line"
    fi
    # The others end by themselves within a minute or so.
    if ((${#codes[@]})); then
      if ((some_ended >= GRACE)); then
        say "some have ended and others have not in $GRACE s: all are stopped"
        on_workers "$((STOP_TIMEOUT + 60))" stop > /dev/null || true
        some_ended=0
      fi
      some_ended=$((some_ended + POLL))
    fi
    pause "$POLL"
  done
}

# Follow the run and start it again, on a new slice if need be and $1 allows, as long as that helps; return its code.
keep_running() {
  local may_create=$1 restarts=0 fruitless=0 code
  while :; do
    code=0
    if [ -z "$is_lost" ]; then follow || code=$?; fi
    if [ -z "$is_lost" ]; then
      case $code in
        "$PREEMPTED" | "$PEER_GONE") ;;
        *)
          say "btlm train ended with exit code $code"
          return "$code"
          ;;
      esac
    elif [ -z "$may_create" ]; then
      say "$NAME is gone: launch/tpu.sh all creates it again"
      return 1
    else
      code=$PREEMPTED
    fi
    ((++restarts <= MAX_RESTARTS)) || { say "$restarts ends, and MAX_RESTARTS=$MAX_RESTARTS; giving up"; return "$code"; }
    if ((step > from_step)); then fruitless=0; else fruitless=$((fruitless + 1)); fi
    ((fruitless <= MAX_FRUITLESS)) ||
      { say "no checkpoint after $from_step in $fruitless starts, and MAX_FRUITLESS=$MAX_FRUITLESS; giving up"; return "$code"; }
    say "starting again ($restarts of at most $MAX_RESTARTS; checkpoint $step, $from_step before)"
    from_step=$step
    ((fruitless == 0)) || back_off "$fruitless"
    if [ -n "$is_lost" ]; then
      remove || return 1
      up
      if place_run; then is_lost=""; fi
    elif ! begin; then
      is_lost=1
    fi
  done
}

# ------------------------------------------------------------------------------------------------------ verbs

run() {
  need TYPE CONFIG WORKDIR
  check_fits
  pack
  count_workers
  surely_ask || die 1 "the workers of $NAME do not answer"
  ((running == 0)) || die 2 "btlm train is running on $running workers of $NAME: launch/tpu.sh stop, or watch"
  place_run || exit 1
}

watch() {
  say "following $NAME; launch/tpu.sh all also creates the slice again when it is gone, and deletes it at the end"
  count_workers
  ask || true
  from_step=$step
  keep_running ""
}

all() {
  local code=0
  need TYPE CONFIG WORKDIR
  check_fits
  pack
  trap 'say "$NAME stays, and costs money: the same command goes on with it, launch/tpu.sh down deletes it"; exit 130' INT TERM
  up
  count_workers
  if ! surely_ask; then # of a slice that was there already a run may be on it
    [ -n "$created" ] || die 1 "the workers of $NAME do not answer: run the same command again, or launch/tpu.sh down"
    is_lost=1
  fi
  if ((running)); then
    say "btlm train is running on $running workers of $NAME; it is followed"
    from_step=$step
  elif [ -n "$is_lost" ] || ! place_run; then
    is_lost=1
  fi
  keep_running 1 || code=$?
  if [ -n "$KEEP" ]; then
    say "$NAME stays, as KEEP is set"
  else
    (down) || { [ "$code" -ne 0 ] || code=1; }
  fi
  return "$code"
}

status() {
  local state each
  state=$(queue_state) || exit 1
  echo "$NAME: queued resource $state"
  for each in "${nodes[@]}"; do echo "$each: $(node describe "$each" --format='value(state,health)' || echo ABSENT)"; done
  { report || echo "@not all workers answered"; } | show
  echo "costs money while it exists:"
  list_all
}

# Make lines of workers' reports readable.
show() {
  local mark host state code age at rest
  while read -r mark host state code age at rest; do
    case $mark in
      @btlm)
        [ "$code" = - ] || state+=", exit code $code"
        [ "$state" != running ] || state+=", heartbeat $age s ago"
        echo "$host: $state, checkpoint $at${rest:+: $rest}"
        ;;
      @not) echo "not $host $state $code" ;;
    esac
  done
}

logs() {
  local worker=all verb="tail 20" word
  for word in "$@"; do
    case $word in
      --follow) verb=follow ;;
      all) ;;
      *) [[ $word =~ ^[0-9]+$ ]] || die 2 "WORKER=$word must be a number"; worker=$word ;;
    esac
  done
  local command="bash $RUN_FILES/$NAME/tpu.sh worker $verb" limit=$SSH_TIMEOUT attempt=0
  [ "$verb" != follow ] || limit=86400
  until on_nodes "$limit" --worker="$worker" --batch-size=all --command="$command"; do
    ((++attempt < ATTEMPTS)) || exit 1
    back_off "$attempt"
  done
}

ssh() {
  local worker=0
  if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    worker=$1
    shift
  fi
  local words=(compute tpus tpu-vm ssh "${nodes[0]}" "${place[@]}" "${ssh_flags[@]}" "--worker=$worker")
  [ $# -eq 0 ] || words+=("--command=$(printf '%q ' "$@")")
  if [ -n "$DRY_RUN" ]; then cloud_once 1 "${words[@]}"; else exec gcloud "${words[@]}"; fi
}

stop() { surely_on_workers "$((STOP_TIMEOUT + 60))" stop | show; }

# -------------------------------------------------------------------------------------------------- beginning

# Split text into `words` at spaces, quotes as a shell has them; nothing is expanded or run.
split() {
  words=()
  [ -n "${1//[[:space:]]/}" ] || return 0
  xargs printf '%s\0' <<< "$1" > "$scratch/words" 2> /dev/null || die 2 "$2=$1 has a quote that does not end"
  mapfile -d '' words < "$scratch/words"
}

set_up() {
  local config_here words name
  : "${NAME:=}" "${ZONE:=}" "${TYPE:=}"
  need NAME ZONE
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
    die 2 "NAME=$NAME must be lower-case letters, digits and hyphens, and begin with a letter"
  : "${CONFIG:=}" "${WORKDIR:=}" "${WHEEL:=}" "${CACHE_DIR:=}" "${KEEP:=}" "${DRY_RUN:=}" "${SLICES:=1}"
  : "${PROVISION:=${SPOT:+spot}}" "${PROVISION:=on-demand}" "${TPU_LOCK_FILE:=/tmp/libtpu_lockfile}" "${BEAT:=15}"
  : "${MAX_RESTARTS:=20}" "${MAX_FRUITLESS:=3}" "${ATTEMPTS:=6}" "${BACKOFF:=10}" "${POLL:=60}" "${UP_TIMEOUT:=86400}"
  : "${READY_TIMEOUT:=1800}" "${GRACE:=180}" "${STALE:=600}" "${SSH_TIMEOUT:=120}" "${SETUP_TIMEOUT:=3600}"
  : "${CHECK_TIMEOUT:=600}" "${STOP_TIMEOUT:=600}"
  for name in SLICES MAX_RESTARTS MAX_FRUITLESS ATTEMPTS BACKOFF POLL UP_TIMEOUT READY_TIMEOUT GRACE STALE SSH_TIMEOUT \
    SETUP_TIMEOUT CHECK_TIMEOUT STOP_TIMEOUT; do
    [[ ${!name} =~ ^[0-9]{1,9}$ ]] || die 2 "$name=${!name} must be a whole number"
  done
  ((SLICES > 0 && ATTEMPTS > 0)) || die 2 "SLICES and ATTEMPTS must be at least 1"
  [[ -z $WORKDIR || $WORKDIR == /* || $WORKDIR == *://* ]] ||
    die 2 "WORKDIR=$WORKDIR must be a URL, or an absolute path that every worker sees"
  [ -z "$WHEEL" ] || { [ -f "$WHEEL" ] && WHEEL=$(realpath "$WHEEL"); } || die 2 "WHEEL=$WHEEL is no file"
  if [ -n "$CONFIG" ] && [ -f "$CONFIG" ]; then config_here=$(realpath "$CONFIG"); fi # where the user stands
  cd "$(dirname "$0")/.."
  [ -z "${config_here:-}" ] || CONFIG=${config_here#"$PWD/"}
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  payload=$scratch/payload
  exec 3>&1
  place=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
  ssh_flags=(--quiet "--ssh-flag=-oConnectTimeout=30" "--ssh-flag=-oServerAliveInterval=15")
  nodes=("$NAME")
  if ((SLICES > 1)); then mapfile -t nodes < <(for ((name = 0; name < SLICES; name++)); do echo "$NAME-$name"; done); fi
  waited=0 num_workers=0 num_starts=0 step=0 from_step=0 last_line="" is_lost="" created="" running=0 codes=()
  split "${CREATE_FLAGS:-}" CREATE_FLAGS
  create_flags=("${words[@]}")
  split "${EXPORT:-}" EXPORT
  exported=("${words[@]}")
  split "${FLAGS:-}" FLAGS
  train_flags=("${words[@]}")
}

main() {
  local verb=${1:-} words=()
  case $verb in
    up | run | logs | status | ssh | stop | down | all | watch) shift ;;
    worker)
      shift
      worker "$@"
      exit
      ;;
    *) usage ;;
  esac
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    if [ "$1" = --dry-run ] || [ "$1" = --dry_run ]; then DRY_RUN=1; else words+=("$1"); fi
    shift
  done
  [ $# -eq 0 ] || shift
  set_up
  case $verb in
    run | all)
      [ ${#words[@]} -eq 0 ] || die 2 "${words[*]}: flags of btlm train come after --, as in launch/tpu.sh $verb -- ${words[0]}"
      train_flags+=("$@")
      ;;
    up)
      need TYPE CONFIG
      check_fits
      ;;
    ssh) words+=("$@") ;;
  esac
  "$verb" "${words[@]}"
}

main "$@"
