"""Notices of a metadata server, on loopback in place of Google's."""

import http.server
import queue
import threading

import pytest

from btlm_jax import stopping
from btlm_jax.cli import train
from btlm_jax.parallel import maintenance


@pytest.fixture
def values(monkeypatch):
    """What the server answers, by name; others are not found."""
    answers = {"preempted": "FALSE", "maintenance-event": "NONE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            folder, _, name = self.path.rpartition("/")
            known = folder == "/computeMetadata/v1/instance" and name in answers
            is_asked_rightly = self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known and is_asked_rightly else 404)
            self.end_headers()
            if known:
                self.wfile.write(answers[name].encode() + b"\n")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv(maintenance.HOST_VARIABLE, f"localhost:{server.server_port}")
        monkeypatch.setenv("http_proxy", "http://localhost:9")  # nothing of this goes through it
        yield answers
        server.shutdown()


def test_a_notice_of_preemption_or_of_a_halt_is_one(values):
    assert maintenance.notice() == ""
    values["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    assert maintenance.notice() == ""
    values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    assert maintenance.notice() == "notice of maintenance"
    values["preempted"] = "TRUE"
    assert maintenance.notice() == "notice of preemption"


def test_a_notice_requests_a_stop_once_it_comes(values, monkeypatch):
    """One that stood before, as for an hour before a halt, does not, until it is withdrawn and comes again."""
    monkeypatch.setattr(maintenance, "POLL_SECONDS", 0.02)
    values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    requested = threading.Event()
    assert maintenance.watch(lambda reason: requested.set()) == "notice of maintenance"
    del values["maintenance-event"]  # the server says nothing for a while: nothing is withdrawn
    assert not requested.wait(0.1)
    values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    assert not requested.wait(0.1)
    values["maintenance-event"] = "NONE"
    assert not requested.wait(0.2)
    values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    assert requested.wait(20)


def test_a_start_says_that_a_notice_from_before_does_not_stop_it(values, capsys):
    values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    stop = stopping.Stop()
    train._watch_notices(stop)
    assert "notice of maintenance was there before this start" in capsys.readouterr().err and not stop.reason


def test_another_notice_than_the_standing_one_requests_a_stop(values, monkeypatch):
    monkeypatch.setattr(maintenance, "POLL_SECONDS", 0.02)
    values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    reasons = queue.SimpleQueue()
    maintenance.watch(reasons.put)
    values["preempted"] = "TRUE"
    assert reasons.get(timeout=20) == "notice of preemption"


def test_a_server_that_does_not_answer_gives_no_notice(monkeypatch):
    monkeypatch.setenv(maintenance.HOST_VARIABLE, "localhost:9")
    assert maintenance.notice() is None
