"""A cloud of one TPU slice for launch/tpu.sh: its gcloud, its VMs, and a training on them whose end is chosen."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Of the system, what a VM has: no Python but the image's, no sudo, no gcloud.
_TOOLS = (
    "bash", "cat", "chmod", "cp", "date", "dirname", "env", "flock", "grep", "gzip", "head", "ln", "ls", "mkdir",
    "mktemp", "mv", "printf", "realpath", "rm", "sed", "setsid", "sh", "sha256sum", "sleep", "sort", "tail", "tar",
    "timeout", "touch", "tr", "xargs",
)  # fmt: skip
_IMAGE = {
    "sudo": """
echo "sudo $*" >> "$CLOUD/setup"
[[ $* != *install* ]] || cp "$CLOUD/venv" "$CLOUD/../there/python3.11"
""",
    # 3.10: nothing but the installation of uv works.
    "python3": '[ "$1" = -m ] && echo "python3 $*" >> "$CLOUD/setup" && [ ! -e "$CLOUD/no-uv" ]',
    # Makes an environment, as `venv` of the Pythons below does.
    "uv": """
echo "uv $*" >> "$CLOUD/setup"
for folder; do :; done
mkdir -p "$folder/bin"
cp "$CLOUD/env-python" "$folder/bin/python"
cp "$CLOUD/env-btlm" "$folder/bin/btlm"
""",
}
_VENV = """
if [ "$1" = -c ]; then exit 0; fi
echo "${0##*/} $*" >> "$CLOUD/setup"
mkdir -p "$3/bin"
cp "$CLOUD/env-python" "$3/bin/python"
cp "$CLOUD/env-btlm" "$3/bin/btlm"
"""
_BTLM = """
echo ${JAX_COMPILATION_CACHE_DIR:-} "$@" >> "$CLOUD/asked"
if [ -e "$CLOUD/refuses" ]; then echo "it does not fit" >&2; exit 1; fi
if [[ $* == *--config=/*/config.py* && -e "$CLOUD/reads-others" ]]; then exit 2; fi
[ "$1" != train ] || cat "$CLOUD/extras" 2> /dev/null || true
"""
# pip, and the check of the devices.
_ENV_PYTHON = """
echo "${*:1:3} $(pwd -P) ${*: -1}" >> "$CLOUD/setup"
[[ $* != *health* ]] || env | grep -e MEGASCALE -e LIBTPU >> "$CLOUD/environment-$HOSTNAME" || true
if [[ $* = *health* ]] && [ -s "$CLOUD/unhealthy" ]; then sed -i 1d "$CLOUD/unhealthy"; exit 1; fi
"""
# The N-th start of a worker ends as line N of $CLOUD/runs says, at its word of the number of the worker: STEP:CODE. In
# place of a code: `wait` until SIGTERM, then 75; `hang` until SIGKILL; `kill` itself; `preempt` the whole slice.
_ENV_BTLM = r"""
echo started >> "$CLOUD/starts-$HOSTNAME"
printf '%s\0' "$@" > "$CLOUD/arguments-$HOSTNAME"
cat changed.txt new.txt > "$CLOUD/tree-$HOSTNAME" 2> /dev/null
env | grep -e MEGASCALE -e JAX_COMPILATION -e SECRET > "$CLOUD/variables-$HOSTNAME"
line=$(sed -n "$(grep -c . "$CLOUD/starts-$HOSTNAME")p" "$CLOUD/runs")
read -ra ends <<< "$line"
end=${ends[NUMBER]:-${ends[0]:-0:0}}
step=${end%:*} code=${end#*:}
[ "$step" = 0 ] || mkdir -p "$CHECKPOINTS/$step" "$CHECKPOINTS/$step.orbax-checkpoint-tmp"
[ -e "$CLOUD/commits-nothing" ] || touch "$CHECKPOINTS/$step/commit.json" # as in a bucket
echo "step $step"
case $code in
  wait) trap 'exit 75' TERM; touch "$CLOUD/waits-$HOSTNAME"; while :; do sleep 0.05; done ;;
  hang) trap '' TERM; while :; do sleep 0.05; done ;;
  kill) kill -KILL $$ ;;
  preempt) echo SUSPENDED > "$CLOUD/queue"; for node in "$CLOUD"/nodes/*; do echo PREEMPTED > "$node"; done; sleep 60 ;;
  *) exit "$code" ;;
esac
"""


class Cloud:
    """A folder with a checkout, a bucket of commands for PATH, and the state of the cloud."""

    def __init__(self, folder: Path, checkout: Path):
        self.state, self.checkout, self.workdir = folder / "cloud", checkout, folder / "work dir"
        here, there = folder / "here", folder / "there"
        for each in (self.state, here, there, self.state / "nodes"):
            each.mkdir()
        for tool in (*_TOOLS, "git"):
            (here / tool).symlink_to(Path(shutil.which(tool) or tool).resolve())
            if tool != "git":
                (there / tool).symlink_to(Path(shutil.which(tool) or tool).resolve())
        for name, script in _IMAGE.items():
            _write(there / name, script)
        _write(here / "btlm", _BTLM)
        _write(self.state / "env-python", _ENV_PYTHON)
        _write(self.state / "env-btlm", _ENV_BTLM)
        _write(self.state / "venv", _VENV)
        for each in (here, there):
            (each / "gcloud").symlink_to(ROOT / "tests" / "support" / "fake_gcloud.sh")
        self.there = there
        self.settings = {
            "PATH": str(here),
            "HOME": str(folder),
            "CLOUD": str(self.state),
            "WORKER_PATH": str(there),
            "CHECKPOINTS": str(self.workdir / "checkpoints"),
            "NAME": "pod",
            "ZONE": "zone-a",
            "TYPE": "v5litepod-16",
            "CONFIG": "configs/one.py",
            "WORKDIR": str(self.workdir),
            "TPU_LOCK_FILE": str(self.state / "lock"),
            "MILLISECONDS_OF_A_SECOND": "1",
            "BEAT": "0.1",
            "WORKERS": "1",
            "ATTEMPTS": "3",
        }

    def run(self, *words: str, code: int = 0, **settings: str) -> str:
        """Run launch/tpu.sh, check its exit code, and return what it said."""
        process = self.start(*words, **settings)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == code, said
        return said

    def start(self, *words: str, **settings: str) -> subprocess.Popen:
        """Begin launch/tpu.sh."""
        return subprocess.Popen(
            [self.checkout / "launch" / "tpu.sh", *words],
            env=self.settings | settings,
            cwd=self.checkout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def will(self, **plans: str | list[str]) -> None:
        """Set what is to come: lives, runs, faults, or any other file of the state."""
        for name, lines in plans.items():
            (self.state / name.replace("_", "-")).write_text(
                "".join(f"{line}\n" for line in ([lines] if isinstance(lines, str) else lines))
            )

    def python_on_image(self, name: str) -> None:
        """Put a Python that can make environments on the VMs."""
        _write(self.there / name, _VENV)

    def read(self, name: str) -> str:
        """Return a file of the state, "" if there is none."""
        path = self.state / name
        return path.read_text() if path.exists() else ""

    def commands(self, *words: str) -> list[str]:
        """Return the gcloud commands that were run and have these words."""
        return [line for line in self.read("log").splitlines() if all(word in line for word in words)]

    @property
    def is_empty(self) -> bool:
        """Whether nothing exists that costs money."""
        return not (self.state / "queue").exists() and not any((self.state / "nodes").iterdir())

    def num_starts(self, host: str = "pod-w-0") -> int:
        return len(self.read(f"starts-{host}").splitlines())

    def end(self) -> None:
        """Kill what still runs on the VMs."""
        for group in self.state.glob("homes/*/*/btlm_launch/*/run/group"):
            try:
                os.killpg(int(group.read_text()), 9)
            except ProcessLookupError:
                pass


def make_checkout(folder: Path) -> Path:
    """Make a repository with the launcher, and with a changed, a new and an ignored file."""
    (folder / "configs").mkdir(parents=True)
    shutil.copytree(ROOT / "launch", folder / "launch")
    for name in ("setup.cfg", "setup.py", "constraints.txt", "configs/one.py", "changed.txt"):
        (folder / name).write_text(f"{name}\n")
    (folder / ".gitignore").write_text("ignored*\n")
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    (folder / "changed.txt").write_text("changed here\n")
    (folder / "new.txt").write_text("new here\n")
    (folder / "ignored.py").write_text("ignored\n")
    return folder


def _write(path: Path, script: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
