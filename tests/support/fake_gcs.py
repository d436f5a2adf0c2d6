"""A Google Cloud Storage of a few objects on loopback: what gcsfs asks for when it lists and reads."""

import contextlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

BUCKET = "bucket"


@contextlib.contextmanager
def connected(objects: dict[str, bytes], monkeypatch) -> Iterator[str]:
    """Serve the objects of BUCKET, which may change meanwhile, as gs://BUCKET; yield that URL."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks another server, over TLS, for a minute
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    with serve(objects) as endpoint:
        options = {"endpoint_url": endpoint, "token": "anon"}
        monkeypatch.setitem(fsspec.config.conf, "gs", options)
        for name, value in options.items():  # for other processes
            monkeypatch.setenv(f"FSSPEC_GS_{name.upper()}", value)
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield f"gs://{BUCKET}"
    gcsfs.GCSFileSystem.clear_instance_cache()


@contextlib.contextmanager
def serve(objects: dict[str, bytes]) -> Iterator[str]:
    """Serve the objects of BUCKET, which may change meanwhile; yield the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            named = re.fullmatch(rf"(?:/download)?/storage/v1/b/{BUCKET}/o(?:/(.+))?", url.path)
            if named is None:
                self._answer(404, b"{}")
            elif named[1] is None:
                self._answer(200, json.dumps(_listing(objects, **query)).encode())
            elif (name := urllib.parse.unquote(named[1])) not in objects:
                self._answer(404, b"{}")
            elif query.get("alt") == "media" or url.path.startswith("/download"):
                self._send_part(objects[name])
            else:
                self._answer(200, json.dumps(_description(objects, name)).encode())

        def _send_part(self, data: bytes):
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-")).groups()
            self._answer(206, data[int(first) : int(last) + 1 if last else None])

        def _answer(self, status: int, body: bytes):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a client that has its answer from elsewhere hangs up
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _description(objects: dict[str, bytes], name: str) -> dict:
    generation = str(1 + hash(objects[name]) % 10**9)
    return {
        "kind": "storage#object",
        "bucket": BUCKET,
        "name": name,
        "size": str(len(objects[name])),
        "generation": generation,
        "etag": generation,
        "updated": "2026-01-01T00:00:00Z",
        "timeCreated": "2026-01-01T00:00:00Z",
    }


def _listing(objects: dict[str, bytes], *, prefix: str = "", delimiter: str = "", **_) -> dict:
    names = sorted(name for name in objects if name.startswith(prefix))
    items, folders = [], set()
    for name in names:
        rest = name[len(prefix) :]
        if delimiter and delimiter in rest:
            folders.add(prefix + rest.split(delimiter)[0] + delimiter)
        else:
            items.append(_description(objects, name))
    return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}
