"""Notices of a metadata server, on loopback in place of Google's."""

import http.server
import threading

import pytest

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
    monkeypatch.setattr(maintenance, "POLL_SECONDS", 0.02)
    requested = threading.Event()
    maintenance.watch(lambda reason: requested.set())
    assert not requested.wait(0.2)
    values["preempted"] = "TRUE"
    assert requested.wait(20)


def test_a_server_that_does_not_answer_gives_no_notice(monkeypatch):
    monkeypatch.setenv(maintenance.HOST_VARIABLE, "localhost:9")
    assert maintenance.notice() == ""
