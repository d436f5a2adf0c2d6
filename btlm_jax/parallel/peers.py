"""The other processes of a run: found, compared, watched, and stopped together.

Imported only where a run has several processes. They meet through coordinator.py, and from then on speak through the
key-value store of JAX's coordination service, which works whatever devices each has. Every BEAT_SECONDS each process
writes that it lives and reads what the others wrote.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax._src import clusters, distributed  # no public name: the key-value store, and which processes a pod has

import btlm_jax
from btlm_jax import module_command
from btlm_jax.parallel.coordinator import HEARTBEAT_SECONDS, READY, differences
from btlm_jax.stopping import (
    BEGINNING,
    ENDING,
    PEER_GONE,
    PREEMPTED,
    STEPPING,
    MissingProcessesError,
    ProcessesDifferError,
    Stop,
)

MEETING_SECONDS = 300.0  # for all processes to come
REFUSING_SECONDS = 20.0  # for a process that cannot take part to find another one that it can tell so
BEAT_SECONDS = 2.0
GONE_SECONDS = 40.0  # without a word from a process: it is gone
SUSPECT_SECONDS = 12.0  # the same, once an exchange with it has failed
ANSWER_SECONDS = 60.0  # for a port that is open to answer as the meeting point does
SEEN_SECONDS = 10.0  # for a file that process 0 wrote to be seen by the others
ENDED_SECONDS = 20.0  # for this process to end by itself when another one has ended with an error
TOKEN_FILE = ".processes"  # in the workdir, of process 0
_VARIABLES = ("JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "XLA_FLAGS", "LIBTPU_INIT_ARGS")
_PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint", "grain")
_PREFIX, _FACTS = "btlm/", "btlm-facts/"  # of keys: read at every beat; read when facts are agreed on
_NOT_BEGUN, _ENDING = -1, 1 << 60  # what is published in place of a step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands among those of the run."""

    address: str  # host:port of process 0
    count: int
    index: int
    is_from_cluster: bool = False  # JAX found it, and gives each process of a host its own device where it can (Slurm)


def place_in_cluster() -> Place:
    """Return where JAX finds this process in a pod, or in what else it knows.

    Raises:
      OSError: it is in none.
    """
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(MEETING_SECONDS))
    address, count, index, _ = found
    if address is None or count is None or index is None:
        raise OSError(
            "--distributed: this machine is in no pod or cluster that JAX knows (TPU pods, Slurm, Open MPI): give "
            "--coordinator=HOST:PORT, --num_processes and --process_id, or leave the flag out for one process"
        )
    return Place(address=address, count=count, index=index, is_from_cluster=True)


def facts_of(config: Mapping[str, Any], *, flags: Mapping[str, Any]) -> dict[str, str]:
    """Return what must be the same in all processes of a run, and is known before any device is touched."""
    facts = {"btlm_jax": f"{btlm_jax.__version__}, code {code_fingerprint()}", "Python": platform.python_version()}
    facts |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    facts |= {name: repr(os.environ[name]) for name in _VARIABLES if name in os.environ}
    facts |= {f"--{name}": repr(value) for name, value in flags.items()}
    return facts | _flat(config, "")


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, str]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: repr(value)}
    return flat


def code_fingerprint() -> str:
    """Return a short hash of this package's Python and C++ sources."""
    folder, total = Path(btlm_jax.__file__).parent, hashlib.sha256()
    for path in sorted(path for ending in ("py", "cc", "h") for path in folder.rglob(f"*.{ending}")):
        total.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:12]


def join(place: Place, *, facts: Mapping[str, str], stop: Stop, log: Callable[[str], None]) -> Peers:
    """Meet the other processes of the run, compare `facts`, start JAX's service and watch each other from here on.

    Raises:
      OSError: process 0 cannot be reached, or processes are missing after MEETING_SECONDS; names them.
      ProcessesDifferError: a process was started otherwise than process 0.
    """
    host, _, port = place.address.rpartition(":")
    if place.index == 0:
        _start_coordinator(int(port), place, seconds=MEETING_SECONDS)
    names = _meet(host.strip("[]"), int(port), place, facts=facts, log=log, refused="", seconds=MEETING_SECONDS)
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, and only between steps
    # The service runs in coordinator.py; JAX would start another one in process 0.
    jaxlib: Any = importlib.import_module("jaxlib._jax")
    with mock.patch.object(jaxlib, "get_distributed_runtime_service", lambda *_, **__: None):
        jax.distributed.initialize(
            place.address,
            place.count,
            place.index,
            # Otherwise a shell of Slurm leaves each process one device of those that it was given.
            cluster_detection_method=None if place.is_from_cluster else "deactivate",
            initialization_timeout=int(MEETING_SECONDS),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=1,
        )
    peers = Peers(distributed.global_state.client, place, names=names, stop=stop)
    stop.join(peers)
    _end_on_abort(stop)
    peers.watch()
    return peers


def refuse(place: Place, reason: str) -> None:
    """Tell the other processes of the run, where they can be reached, why this one cannot take part."""
    host, _, port = place.address.rpartition(":")
    try:
        if place.index == 0:
            _start_coordinator(int(port), place, seconds=REFUSING_SECONDS)
        refused = reason.partition("\n")[0]
        _meet(host.strip("[]"), int(port), place, facts={}, log=print, refused=refused, seconds=REFUSING_SECONDS)
    except (OSError, ProcessesDifferError):  # nobody is there; or it is what this process has said
        pass


def _start_coordinator(port: int, place: Place, *, seconds: float) -> None:
    """Start the meeting point beside process 0, which this is.

    Raises:
      OSError: it does not start, for example because the port is in use.
    """
    command = [*module_command("btlm_jax.parallel.coordinator"), str(port), str(place.count), str(seconds)]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None and child.stderr is not None
    if child.stdout.readline() != READY:
        *_, said = child.stderr.read().strip().splitlines() or ["it said nothing"]
        raise OSError(f"process 0 cannot open --coordinator={place.address}: {said.removeprefix('OSError: ')}")
    threading.Thread(target=child.stderr.read, name="coordinator", daemon=True).start()  # so that it is never full
    globals()["_coordinator"] = child  # its standard input is open for as long as this process lives


def _meet(
    host: str,
    port: int,
    place: Place,
    *,
    facts: Mapping[str, str],
    log: Callable[[str], None],
    refused: str,
    seconds: float,
) -> list[str]:
    """Wait until all processes are at the meeting point; return what each is called.

    With a reason why this one is `refused` they are told it.
    """
    hello = {"index": place.index, "count": place.count, "host": socket.gethostname(), "pid": os.getpid()}
    hello |= {"refused": refused} if refused else {}
    line = json.dumps({**hello, "facts": dict(facts)}).encode() + b"\n"
    began, opened_at, problem = time.monotonic(), 0.0, ""
    while time.monotonic() - began < seconds:
        try:
            with socket.create_connection((host, port), timeout=10) as connection:
                opened_at = opened_at or time.monotonic()
                connection.sendall(line)
                if names := _answered(connection, place, log=log):
                    return names
            problem = "something is there that does not answer as a run that begins; it may be a run that has begun"
            if time.monotonic() - opened_at > ANSWER_SECONDS:
                break
        except OSError as error:
            if isinstance(error, MissingProcessesError):
                raise
            problem = error.strerror or str(error)
        time.sleep(0.5)
    raise MissingProcessesError(
        f"process {place.index} of {place.count} cannot reach process 0 at {place.address}, tried for "
        f"{time.monotonic() - began:.0f} s: {problem}. Start the same command there with --process_id=0, and see that "
        "the address is right, that nothing else has the port, and that no firewall is between"
    )


def _answered(connection: socket.socket, place: Place, *, log: Callable[[str], None]) -> list[str]:
    """Return the processes' names when all are there, nothing if the other end is no meeting point."""
    said_at = time.monotonic()
    with connection.makefile("rb") as lines:
        for line in lines:
            try:
                answer = json.loads(line)
            except ValueError:
                return []
            match answer:
                case {"go": list(names)}:
                    return names
                case {"error": str(why)}:
                    raise ProcessesDifferError(f"the processes of this run do not fit together: {why}")
                case {"differ": list(lines_of_facts)}:
                    raise ProcessesDifferError(
                        "the processes of this run differ:\n  "
                        + "\n  ".join(map(str, lines_of_facts))
                        + "\nstart the same command, with the same code and packages, on all hosts"
                    )
                case {"late": list(numbers)}:
                    raise MissingProcessesError(
                        f"{_processes(numbers)} of {place.count} did not come to {place.address} in "
                        f"{MEETING_SECONDS:.0f} s: see whether the command was started there, and with which number"
                    )
                case {"missing": list(numbers)} if numbers and time.monotonic() - said_at > 15:
                    said_at = time.monotonic()
                    log(f"Waiting for {_processes(numbers)} of {place.count}")
    return []


def _processes(numbers: list[int]) -> str:
    return f"process{'es' * (len(numbers) > 1)} {', '.join(map(str, numbers[:20]))}{', ...' * (len(numbers) > 20)}"


class Peers:
    """The processes of this run, this one (`index`) among them."""

    def __init__(self, client: Any, place: Place, *, names: list[str], stop: Stop, clock=time.monotonic):
        self.index, self.count = place.index, place.count
        self._client, self._names, self._stop, self._clock = client, names, stop, clock
        now = clock()
        self._heard = dict.fromkeys(range(self.count), now)  # when each process last wrote that it lives
        self._beats: dict[int, str] = {}
        self._answered = now  # when the store last answered
        self._codes: dict[int, tuple[int, str, float]] = {}  # of processes that have ended: code, reason, since
        self._condition = threading.Condition()
        self._passed = _NOT_BEGUN  # the last step after which this process went on
        self._is_published = False  # it is, and this process goes on no further until all are
        self._stop_step: int | None = None
        self._patience = GONE_SECONDS
        self._wake = threading.Event()

    def watch(self) -> None:
        """Begin to write and to read, in a thread."""

        def beat() -> None:
            number = 0
            while True:
                number += 1
                try:
                    self.look(self._exchange(number))
                except RuntimeError:  # the store does not answer: `gone` sees for how long
                    pass
                self._wake.wait(BEAT_SECONDS)
                self._wake.clear()

        threading.Thread(target=beat, name="peers", daemon=True).start()

    def _exchange(self, number: int) -> dict[str, str]:
        self._set(f"{_PREFIX}beat/{self.index}", f"{number} {self._passed}")
        return dict(self._client.key_value_dir_get(_PREFIX))

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(key, value, allow_overwrite=True)

    def look(self, rows: Mapping[str, str]) -> None:
        """Take what all processes have written, by key."""
        now = self._answered = self._clock()
        published = {}
        for key, value in rows.items():
            _, kind, number = key.split("/")
            process = int(number)
            if kind == "beat" and self._beats.get(process) != value:
                self._beats[process], self._heard[process] = value, now
            elif kind == "end" and process not in self._codes:
                ended = json.loads(value)
                self._codes[process] = (ended["code"], ended["reason"], now)
            elif kind == "stop" and process != self.index:
                self._stop.heed(f"{value} of {self._names[process]}")
            elif kind == "passed":
                published[process] = int(value)
        if self._stop.reason and not self._is_published:
            with self._condition:
                self._is_published = True
                passed = {BEGINNING: _NOT_BEGUN, STEPPING: self._passed, ENDING: _ENDING}[self._stop.stage]
            self._set(f"{_PREFIX}passed/{self.index}", str(passed))
            self._wake.set()
        if len(published) == self.count:
            self._decide(list(published.values()))

    def _decide(self, passed: list[int]) -> None:
        """All have published the last step after which they went on, and go on no further."""
        if min(passed) == _NOT_BEGUN or self._stop.stage == ENDING:  # nothing to save, or all is saved
            self._stop.end_now(PREEMPTED, self._stop.said())
        with self._condition:
            self._stop_step = max(passed) + 1
            self._condition.notify_all()

    def request(self, reason: str) -> None:
        """Tell the others that the run shall stop."""
        threading.Thread(target=self._try_set, args=(f"{_PREFIX}stop/{self.index}", reason), daemon=True).start()
        self._wake.set()

    def is_agreed(self, step: int) -> bool:
        """Return whether all stop after `step`; waits for what the others have published, once a stop is requested."""
        with self._condition:
            if not self._is_published:
                self._passed = step
                return False
            while self._stop_step is None:
                self._condition.wait(1.0)
            return step >= self._stop_step  # after it, where the run went back from bad numbers at that step

    def hold_if_stopping(self) -> None:
        """Wait for the end of this process, which the watching thread brings, if the run is stopping."""
        while self._is_published:
            time.sleep(0.1)

    def end(self, code: int, reason: str) -> None:
        """Tell the others that this process ends with `code`."""
        value = json.dumps({"code": code, "reason": reason.partition("\n")[0][:500]})
        thread = threading.Thread(target=self._try_set, args=(f"{_PREFIX}end/{self.index}", value), daemon=True)
        thread.start()
        thread.join(2.0)  # the store may be gone

    def _try_set(self, key: str, value: str) -> None:
        try:
            self._set(key, value)
        except RuntimeError:
            pass

    def suspended(self, seconds: float) -> None:
        """Count anew: this whole process stood still for so long."""
        del seconds
        now = self._clock()
        self._heard, self._answered = dict.fromkeys(self._heard, now), now

    def wait_for_verdict(self) -> None:
        """Wait as long as it takes to see that one of them is gone, at which the watching thread ends this process."""
        self._patience = SUSPECT_SECONDS
        time.sleep(ENDED_SECONDS + SUSPECT_SECONDS)

    def gone(self) -> tuple[int, str] | None:
        """Return the exit code and the reason with which this process must end because of another one, if it must."""
        now = self._clock()
        for process, (code, reason, since) in sorted(self._codes.items()):
            if process == self.index or code in (0, PREEMPTED):
                continue
            if code == PEER_GONE:
                return PEER_GONE, f"{self._names[process]} ended with exit code {code}: {reason}"
            if now - since > ENDED_SECONDS:
                own = code if code in (1, 2, 70, 76) else PEER_GONE
                return own, f"{self._names[process]} ended with exit code {code}: {reason}"
        if now - self._answered > self._patience:
            return PEER_GONE, f"{self._names[0]} has not answered for {now - self._answered:.0f} s: it is gone"
        for process, heard in self._heard.items():
            if process not in self._codes and now - heard > self._patience:
                step = int(self._beats.get(process, "0 -1").split()[1])
                last = f"after step {step:,}" if step >= 0 else BEGINNING
                silence = f"has not been heard of for {now - heard:.0f} s, last {last}"
                return PEER_GONE, f"{self._names[process]} {silence}: it is gone"
        return None

    def agree(self, name: str, facts: Mapping[str, str]) -> None:
        """Check that all processes have the same facts; waits until all have come here.

        Raises:
          ProcessesDifferError: a process has others than process 0; names it, the key and both values.
        """
        self._set(f"{_FACTS}{name}/{self.index}", json.dumps(dict(facts)))
        while len(rows := self._client.key_value_dir_get(f"{_FACTS}{name}/")) < self.count:
            time.sleep(0.1)  # the watching thread ends this process if one of them does not come
        found = {int(key.rpartition("/")[2]): json.loads(value) for key, value in rows}
        if different := differences([(self._names[number], found[number]) for number in sorted(found)]):
            raise ProcessesDifferError("the processes of this run differ:\n  " + "\n  ".join(different))

    def check_workdir(self, workdir: Path) -> None:
        """Check that all processes see what process 0 writes to the workdir.

        Raises:
          ProcessesDifferError: one does not; names it.
        """
        path, token = workdir / TOKEN_FILE, os.urandom(8).hex()
        if self.index == 0:
            path.write_text(token, encoding="utf-8")
        expected, until = self.value_of_first("token", token), self._clock()
        until += SEEN_SECONDS
        while not (is_seen := _text_of(path) == expected) and self._clock() < until:
            time.sleep(0.2)
        self._set(f"{_FACTS}seen/{self.index}", str(is_seen))
        while len(rows := self._client.key_value_dir_get(f"{_FACTS}seen/")) < self.count:
            time.sleep(0.1)
        if self.index == 0:
            path.unlink(missing_ok=True)
        if blind := sorted(int(key.rpartition("/")[2]) for key, value in rows if value != "True"):
            raise ProcessesDifferError(
                f"the workdir {workdir} is not one for all processes: what {self._names[0]} wrote there is not seen by "
                f"{', '.join(self._names[number] for number in blind)}. Give a folder that all hosts share"
            )

    def value_of_first(self, name: str, value: str) -> str:
        """Return the value with which process 0 has called this; waits until it has."""
        key = f"{_FACTS}{name}"
        if self.index == 0:
            self._set(key, value)
        return self._client.blocking_key_value_get(key, int(1000 * MEETING_SECONDS))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _end_on_abort(stop: Stop) -> None:
    """Have the abort of JAX's client, which loses its connection to the service, end this process as documented."""
    libc = ctypes.CDLL(None)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(_: int) -> None:
        if threading.current_thread() is threading.main_thread():
            libc.signal(signal.SIGABRT, 0)  # another fault: let it abort
            return
        stop.end_standing("the connection to the coordinator beside process 0 is broken: it is gone")

    globals()["_on_abort"] = on_abort  # C has the only other reference
    libc.signal(signal.SIGABRT, on_abort)
