"""Notices of Google Cloud that this machine will be taken away or halted, from its metadata server.

https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys
"""

from __future__ import annotations

import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

POLL_SECONDS = 2.0
HOST_VARIABLE = "GCE_METADATA_HOST"  # Google's libraries read it, too


def notice() -> str | None:
    """Return the notice that there is, "" without one, None where the server does not say."""
    preempted, event = _value("preempted"), _value("maintenance-event")
    if preempted == "TRUE":
        return "notice of preemption"
    # The other value, MIGRATE_ON_HOST_MAINTENANCE, moves a machine that goes on meanwhile.
    if event == "TERMINATE_ON_HOST_MAINTENANCE":
        return "notice of maintenance"
    return "" if preempted and event else None


def watch(request: Callable[[str], None]) -> str:
    """Look for a notice in a thread from here on; call `request` with the first that was not there from the beginning.

    Returns the notice that was, "" without one: it may stand for an hour before the halt, at every start of a launcher.
    """
    standing = notice() or ""

    def look(ignored: str) -> None:
        while not (found := notice()) or found == ignored:
            ignored = "" if found == "" else ignored
            time.sleep(POLL_SECONDS)
        request(found)

    threading.Thread(target=look, args=(standing,), name="maintenance", daemon=True).start()
    return standing


def _value(name: str) -> str:
    host = os.environ.get(HOST_VARIABLE) or "metadata.google.internal"
    address = f"http://{host}/computeMetadata/v1/instance/{name}"
    asked = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    try:  # never through a proxy
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=POLL_SECONDS) as answer:
            return answer.read(1000).decode(errors="replace").strip()
    except (OSError, urllib.error.URLError):
        return ""
