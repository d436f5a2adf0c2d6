#!/usr/bin/env bash
# A gcloud that keeps the state of one TPU slice in the folder $CLOUD, and runs what is sent to its VMs here.
#
#   $CLOUD/lives    one line a creation: the states that the queued resource shows, each once, the last for good
#   $CLOUD/faults   lines PATTERN|CODE|MESSAGE: the first whose pattern is in a command makes it fail so, once
#   $CLOUD/log      every command, one a line
#   $CLOUD/gs/      the buckets, for `storage ls` and `storage cp -r`; of s3:// with the variable SECRET
#   $CLOUD/queue    the states to come; $CLOUD/nodes/NAME a VM slice's state; $CLOUD/homes/NAME/N a worker's home
set -euo pipefail
shopt -s nullglob

echo "$*" >> "$CLOUD/log"
fail() {
  echo "$2" >&2
  exit "$1"
}

number=0
while IFS='|' read -r pattern code message; do
  number=$((number + 1))
  # shellcheck disable=SC2053 # a pattern
  if [[ "$*" == *$pattern* ]]; then
    sed -i "${number}d" "$CLOUD/faults"
    fail "$code" "$message"
  fi
done < <(if [ -s "$CLOUD/faults" ]; then cat "$CLOUD/faults"; fi)

if [ "$1" = storage ]; then
  [[ "$*" != *s3://* ]] || [ -n "${SECRET:-}" ] || fail 1 "ERROR: (gcloud.storage) Unable to locate credentials"
  set -- "${@/#s3:/gs:}"
  case $2 in
    ls)
      mapfile -t found < <(compgen -G "$CLOUD/gs/${3#gs://}")
      ((${#found[@]})) || fail 1 "ERROR: (gcloud.storage.ls) One or more URLs matched no objects."
      printf '%s\n' "${found[@]/#$CLOUD\/gs\//gs://}"
      ;;
    cp) mkdir -p "$CLOUD/gs/${5#gs://}" && cp -r "$4" "$CLOUD/gs/${5#gs://}" ;;
  esac
  exit
fi

command="$3 $4" name=$5
flag() { # the value of --$1=
  local word
  for word in "${words[@]}"; do [[ $word != "--$1="* ]] || echo "${word#*=}"; done
}
words=("$@")

make_nodes() {
  local each number
  while read -r each; do
    [ ! -e "$CLOUD/nodes/$each" ] || continue
    cat "$CLOUD/state-of-nodes" > "$CLOUD/nodes/$each" 2> /dev/null || echo READY > "$CLOUD/nodes/$each"
    for ((number = 0; number < WORKERS; number++)); do mkdir -p "$CLOUD/homes/$each/$number"; done
  done < "$CLOUD/names"
}

delete_node() { # and end what runs on it
  local group
  for group in "$CLOUD/homes/$1"/*/btlm_launch/*/run/group; do kill -KILL -- "-$(cat "$group")" 2> /dev/null || true; done
  rm -rf "$CLOUD/homes/$1" "$CLOUD/nodes/$1"
}

case $command in
  "queued-resources create")
    [ ! -e "$CLOUD/queue" ] || fail 1 "ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: $name"
    rm -f "$CLOUD"/silent-*
    if [ -s "$CLOUD/lives" ]; then
      head -n 1 "$CLOUD/lives" > "$CLOUD/queue"
      sed -i 1d "$CLOUD/lives"
    else
      echo "PROVISIONING ACTIVE" > "$CLOUD/queue"
    fi
    flag accelerator-type > "$CLOUD/type"
    flag node-id > "$CLOUD/names"
    count=$(flag node-count)
    for ((number = 0; number < ${count:-0}; number++)); do echo "$(flag node-prefix)-$number"; done >> "$CLOUD/names"
    ;;
  "queued-resources describe")
    [ -e "$CLOUD/queue" ] || fail 1 "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: $name"
    read -r state rest < "$CLOUD/queue"
    if [[ $(flag format) != "value(state.state)" ]]; then
      [[ $state != FAILED || $(flag format) != "value(state.failedData.error.message)" ]] || echo "no more capacity"
      exit
    fi
    [ -z "$rest" ] || echo "$rest" > "$CLOUD/queue"
    [ "$state" != ACTIVE ] || make_nodes
    echo "$state"
    ;;
  "queued-resources delete")
    [ -e "$CLOUD/queue" ] || fail 1 "ERROR: (gcloud.compute.tpus.queued-resources.delete) NOT_FOUND: $name"
    rm "$CLOUD/queue"
    [ ! -e "$CLOUD/leaves-nodes" ] || exit 0
    for node in "$CLOUD"/nodes/*; do delete_node "${node##*/}"; done
    ;;
  "queued-resources list")
    [ ! -e "$CLOUD/queue" ] || echo "projects/p/locations/z/queuedResources/$(cat "$CLOUD/queue-name" 2> /dev/null || echo pod)"
    echo "projects/p/locations/z/queuedResources/pod-7" # someone else's
    ;;
  "tpu-vm list")
    for node in "$CLOUD"/nodes/*; do printf '%s\tprojects/p/locations/z/queuedResources/pod\n' "${node##*/}"; done
    cat "$CLOUD/other-nodes" 2> /dev/null || true
    ;;
  "tpu-vm delete")
    delete_node "$name"
    ;;
  "tpu-vm describe")
    [ -e "$CLOUD/nodes/$name" ] || fail 1 "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: $name"
    case $(flag format) in
      "value(state)" | "value(state,health)") cat "$CLOUD/nodes/$name" ;;
      "value(acceleratorType)") cat "$CLOUD/type" ;;
      "value(networkEndpoints[].ipAddress)") (cd "$CLOUD/homes/$name" && echo * | sed 's/[0-9]\+/10.0.0.&/g; s/ /;/g') ;;
      "value(networkEndpoints[0].ipAddress)") echo 10.0.0.0 ;;
    esac
    ;;
  "tpu-vm scp")
    target=${6%:}
    for home in "$CLOUD/homes/$target"/*; do cp "$5" "$home/"; done
    ;;
  "tpu-vm ssh")
    state=$(cat "$CLOUD/nodes/$name" 2> /dev/null || echo ABSENT)
    [ "$state" = READY ] || fail 255 "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) the TPU is $state"
    worker=$(flag worker) worst=0
    for home in "$CLOUD/homes/$name"/*; do
      number=${home##*/}
      [ "$worker" = all ] || [ "$worker" = "$number" ] || continue
      if [ -e "$CLOUD/silent-$number" ]; then
        echo "##### Command execution on worker $number failed with exit status 255. Continuing." >&2
        worst=255
        continue
      fi
      (cd "$home" && unset SECRET && HOME=$home HOSTNAME=$name-w-$number NUMBER=$number NODE=$name PATH=$WORKER_PATH \
        bash -c "$(flag command)") &
    done
    for job in $(jobs -p); do wait "$job" || worst=$?; done
    exit "$worst"
    ;;
  *) fail 2 "ERROR: (gcloud) Invalid choice: $*" ;;
esac
