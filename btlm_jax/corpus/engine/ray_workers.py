"""Run a stage's tasks on a Ray cluster: an existing one, or one on this machine that is started for this command."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from btlm_jax import install_command
from btlm_jax.corpus.engine.progress import Progress
from btlm_jax.corpus.engine.tasks import Task, TaskFunction, no_heartbeat, run_task
from btlm_jax.corpus.engine.workers import OnDone

_CONNECT_SECONDS = 10.0
_CANCEL_SECONDS = 20.0  # for cancelled tasks to delete their unfinished files
_STORE_BYTES = 100_000_000  # of Ray's object store, which holds only records; Ray's default is 30 % of the memory


class RayWorkers:
    """Run at most `count` tasks at a time, each on one CPU of the cluster at `address`; "" starts a cluster here.

    A context manager: Ray starts with the first task and stops at the end of the block.
    """

    def __init__(self, *, count: int, address: str):
        self._count, self._address = count, address
        self._ray: ModuleType | None = None

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *exception) -> None:
        if self._ray is not None:
            self._ray.shutdown()
            self._ray = None

    def run_tasks(
        self,
        run: TaskFunction,
        tasks: Sequence[Task],
        directory: Path,
        *,
        name: str,
        progress: Progress,
        on_done: OnDone,
    ) -> None:
        """Run tasks; see `Workers`.

        Raises:
          ValueError: as `Workers`, or Ray is not installed.
          OSError: as `Workers`, or there is no cluster at the address.
        """
        if not tasks:
            return
        ray = self._start()
        remote_task = ray.remote(num_cpus=1, max_retries=0)(_run_in_folder)
        shared = ray.put(run)
        waiting, running = iter(tasks), {}
        try:
            while True:
                for task in itertools.islice(waiting, self._count - len(running)):
                    running[remote_task.remote(shared, task, directory, Path.cwd())] = task
                if not running:
                    break
                ended, _ = ray.wait(list(running), timeout=progress.interval)
                for reference in ended:
                    task = running.pop(reference)
                    record = _record(ray, reference, name=name, task=task)
                    progress.add_record(record["counted"])
                    on_done(task, record)
                progress.report_if_due()
        except KeyboardInterrupt:
            for reference in running:
                ray.cancel(reference)  # raises KeyboardInterrupt in the task
            _wait(ray, running, timeout=_CANCEL_SECONDS)
            raise
        except Exception:
            _wait(ray, running, timeout=None)
            raise

    def _start(self) -> ModuleType:
        if self._ray is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            try:
                ray = importlib.import_module("ray")
            except ImportError as error:
                raise ValueError(f"--executor=ray needs Ray: {install_command('ray')}") from error
            if self._address:
                _check_address(self._address)
                options = {"address": self._address}
            else:
                options = {"address": "local", "num_cpus": self._count, "object_store_memory": _STORE_BYTES}
                options |= {"include_dashboard": False}
            try:
                ray.init(**options, log_to_driver=False, logging_level="error")
            except (
                Exception
            ) as error:  # Ray raises just this, for example when its processes take more than 30 s to start
                raise OSError(_start_error(self._address, error)) from error
            self._ray = ray
        return self._ray


def _start_error(address: str, error: Exception) -> str:
    if not address:
        return f"Ray cannot start on this machine: {error}"
    return (
        f"the Ray cluster at {address} takes no work: {error}. It needs the Ray and Python versions that are installed "
        "here, and if it asks for a token, RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN"
    )


def _check_address(address: str) -> None:
    """Raise at once for an address that Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(
            f"the address {address!r} of the Ray cluster is not HOST:PORT, which `ray start --head` prints; run this "
            "command on a machine of the cluster"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise OSError(
            f"there is no Ray cluster at {address} ({error}); start one with `ray start --head`, or leave out "
            "--ray_address and RAY_ADDRESS for one on this machine alone"
        ) from error


def _record(ray: ModuleType, reference: object, *, name: str, task: Task) -> dict:
    """Return the record of a finished task, or raise the error of a failed one."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (ValueError, OSError)):
            raise error.cause from None
        if isinstance(error.cause, ray.exceptions.RaySystemError) or "failed to import" in str(error.cause):
            raise ValueError(
                f"{name}: the machine that had {task} cannot load what it is to do; every machine of the Ray cluster "
                f"needs this installation under the same path: {str(error).strip().splitlines()[-1]}"
            ) from None
        raise
    except ray.exceptions.RayError as error:  # a lost process or machine, or Ray's memory monitor killed it
        raise ValueError(
            f"{name}: the worker that had {task} was killed, perhaps for its memory; Ray says: "
            f"{' '.join(str(error).split())} (its logs are in /tmp/ray/session_latest/logs of the machine). Finished "
            "work is kept: run the same command again, with fewer --workers if memory is short"
        ) from error


def _wait(ray: ModuleType, running: dict, *, timeout: float | None) -> None:
    if running:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.wait(list(running), num_returns=len(running), timeout=timeout)


def _run_in_folder(run: TaskFunction, task: Task, directory: Path, folder: Path) -> dict:
    os.chdir(folder)  # paths are relative to the command's working directory
    return run_task(run, task, directory, no_heartbeat)
