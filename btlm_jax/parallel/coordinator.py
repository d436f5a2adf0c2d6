"""The meeting point of a run's processes, in a process of its own beside process 0.

    python -m btlm_jax.parallel.coordinator PORT COUNT SECONDS

First it waits, SECONDS at most, until all COUNT processes are there, and compares what they say of themselves; one that
is missing or different, or that cannot take part, is named to all. Then it is JAX's coordination service at the same
port. A process of its own, because every client of that service aborts at once when it goes: with process 0 killed the
others would end so, and could say nothing. It ends when process 0 and the connections of the others are gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

READY = "ready\n"  # on standard output: the port is open
HEARTBEAT_SECONDS = 1800  # of JAX's own: longer than anything that peers.py watches
_LAST_SECONDS = 120.0  # of this process, at most, after process 0
_REFUSING_SECONDS = 20.0  # in which those that come late are told why there is no run
_SAY_SECONDS = 1.0
_ESTABLISHED = "01"  # in /proc/net/tcp
_refusing = threading.Event()


def differences(facts: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """Return what the first of (name of a process, its facts) has otherwise than another, a line a process and key."""
    first_name, first = facts[0]
    return [
        f"{key}: {first_name} has {first.get(key, 'nothing')}, {name} has {other.get(key, 'nothing')}"
        for name, other in facts[1:]
        for key in dict.fromkeys([*first, *other])
        if first.get(key) != other.get(key)
    ]


class Meeting:
    """Who has come: hellos of processes by their numbers, and what is answered."""

    def __init__(self, count: int):
        self.count = count
        self.hellos: dict[int, dict] = {}

    def welcome(self, hello: dict) -> str:
        """Take a process in; return why it cannot be, "" if it is."""
        number, count, where = hello.get("index"), hello.get("count"), f"{hello.get('host')}, pid {hello.get('pid')}"
        if count != self.count:
            return f"process {number} ({where}) was started for --num_processes={count}, process 0 for {self.count}"
        if not isinstance(number, int) or not 0 <= number < self.count:
            return f"there is no process {number} of {self.count} ({where})"
        if refused := hello.get("refused"):
            return f"process {number} ({where}) cannot take part: {refused}"
        if number in self.hellos:
            other = self.hellos[number]
            both = f"{other.get('host')}, pid {other.get('pid')}, and {where}"
            return f"two processes were started with --process_id={number}: {both}"
        self.hellos[number] = hello
        return ""

    @property
    def missing(self) -> list[int]:
        """Return the numbers of processes that have not come."""
        return [number for number in range(self.count) if number not in self.hellos]

    def differences(self) -> list[str]:
        """Return how what has come differs from process 0."""
        return differences([(self.name(number), self.hellos[number]["facts"]) for number in sorted(self.hellos)])

    def name(self, number: int) -> str:
        """Return what a process is called."""
        return f"process {number} ({self.hellos[number].get('host')})"


def listen(port: int, *, seconds: float) -> socket.socket:
    """Return a socket that listens at a port; one of an earlier run that is about to end is waited for.

    Raises:
      OSError: the port is in use.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:
            if time.monotonic() > until:
                raise OSError(f"port {port} of this machine cannot be listened at: {error.strerror}") from error
        time.sleep(_SAY_SECONDS / 4)


def meet(server: socket.socket, *, count: int, seconds: float) -> bool:
    """Wait for all processes and answer each; return whether they may go on.

    The answers are {"missing": numbers}, every second, and then one of {"go": names}, {"error": why},
    {"differ": lines} and {"late": numbers}. Those that come too late for an error are told it too, for a while.
    """
    meeting, until, said_at = Meeting(count), time.monotonic() + seconds, 0.0
    members: dict[int, socket.socket] = {}

    def refuse(answer: dict) -> bool:
        _refusing.set()
        told = [key.fileobj for key in selector.get_map().values() if isinstance(key.fileobj, socket.socket)]
        told.remove(server)
        _answer(told, answer)
        num_told, last = len(told), time.monotonic() + _REFUSING_SECONDS
        while num_told < count and (left := last - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(TimeoutError):
                with server.accept()[0] as connection:
                    _answer([connection], answer)
                    num_told += 1
        return False

    with contextlib.ExitStack() as connections, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ, None)
        while meeting.missing:
            for key, _ in selector.select(_SAY_SECONDS / 4):
                if key.data is None:
                    connection = connections.enter_context(server.accept()[0])
                    connection.setblocking(False)
                    selector.register(connection, selectors.EVENT_READ, bytearray())
                    continue
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                hello = _received(connection, key.data)
                if hello is None:
                    selector.unregister(connection)
                    gone = [number for number, member in members.items() if member is connection]
                    for number in gone:
                        del members[number], meeting.hellos[number]
                    connection.close()
                elif hello:
                    if refusal := meeting.welcome(hello):
                        return refuse({"error": refusal})
                    members[hello["index"]] = connection
                    if different := meeting.differences():
                        return refuse({"differ": different})
            if time.monotonic() - said_at > _SAY_SECONDS:
                said_at = time.monotonic()
                _answer(list(members.values()), {"missing": meeting.missing})
            if time.monotonic() > until:
                return refuse({"late": meeting.missing})
        server.close()
        _answer(list(members.values()), {"go": [meeting.name(number) for number in range(count)]})
    return True


def _received(connection: socket.socket, buffer: bytearray) -> dict | None:
    """Return the hello that a connection has sent, {} if it is not whole yet, None if the connection is at its end."""
    try:
        data = connection.recv(1 << 16)
    except OSError:
        return None
    buffer += data
    if not data:
        return None
    line, newline, _ = buffer.partition(b"\n")
    if not newline:
        return {}
    buffer.clear()
    try:
        hello = json.loads(line)
        return hello if isinstance(hello["facts"], dict) else None
    except (ValueError, TypeError, KeyError):  # another program's
        return None


def _answer(connections: Sequence[socket.socket], answer: dict) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.settimeout(1.0)
            connection.sendall(json.dumps(answer).encode() + b"\n")
            connection.setblocking(False)


def _is_connected(port: int) -> bool:
    """Return whether a connection to a port of this machine is open."""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                if state == _ESTABLISHED and int(local.rpartition(":")[2], 16) == port:
                    return True
    return False


def _end_after_parent(port: int) -> None:
    """Wait for the end of process 0, whose pipe is the standard input, and of the connections; then end."""
    while os.read(0, 1024):
        pass
    until = time.monotonic() + _LAST_SECONDS
    while time.monotonic() < until and (_refusing.is_set() or _is_connected(port)):
        time.sleep(_SAY_SECONDS / 4)
    os._exit(0)


def main() -> int:
    """Meet, then serve."""
    port, count, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    for number in (signal.SIGTERM, signal.SIGINT):  # the processes of the run decide when it ends
        signal.signal(number, signal.SIG_IGN)
    server = listen(port, seconds=seconds)
    sys.stdout.write(READY)
    sys.stdout.flush()
    threading.Thread(target=_end_after_parent, args=(port,), daemon=True).start()
    if not meet(server, count=count, seconds=seconds):
        return 1
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from jaxlib import _jax  # type: ignore[attr-defined]

    service = _jax.get_distributed_runtime_service(  # noqa: F841  it serves until this process ends
        f"[::]:{port}", count, heartbeat_timeout=HEARTBEAT_SECONDS, shutdown_timeout=1
    )
    threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
