"""A Google Cloud Storage of a few objects on loopback: what gcsfs asks for when it lists, reads, writes and deletes.

    python fake_gcs.py PORT SECONDS

serves a bucket that begins empty until it is killed, and takes so long for each write.
"""

import contextlib
import json
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

BUCKET = "bucket"


@contextlib.contextmanager
def connected(
    objects: dict[str, bytes], monkeypatch, *, refuse: Callable[[str, str], int] = lambda method, name: 0
) -> Iterator[str]:
    """Serve the objects of BUCKET, which may change meanwhile, as gs://BUCKET; yield that URL."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks another server, over TLS, for a minute
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    with serve(objects, refuse=refuse) as endpoint:
        options = {"endpoint_url": endpoint, "token": "anon"}
        monkeypatch.setitem(fsspec.config.conf, "gs", options)
        for name, value in options.items():  # for other processes
            monkeypatch.setenv(f"FSSPEC_GS_{name.upper()}", value)
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield f"gs://{BUCKET}"
    gcsfs.GCSFileSystem.clear_instance_cache()


@contextlib.contextmanager
def serve(
    objects: dict[str, bytes], *, refuse: Callable[[str, str], int] = lambda method, name: 0, port: int = 0
) -> Iterator[str]:
    """Serve the objects of BUCKET, which may change meanwhile; yield the endpoint.

    `refuse` takes the method and the name of the object of a request, and returns the status to answer it with, 0 to
    serve it; it may take its time.
    """
    uploads: dict[str, tuple[str, bytearray]] = {}  # that were begun: name and what came of it

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # an answer in one packet: the client's system would wait 40 ms to acknowledge the first

        def do_GET(self):
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            named = re.fullmatch(rf"(?:/download)?/storage/v1/b/{BUCKET}/o(?:/(.+))?", url.path)
            if self._is_refused(urllib.parse.unquote(named[1] or "") if named else ""):
                return
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

        def do_POST(self):
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urllib.parse.unquote(url.path)
            copied = re.fullmatch(rf"/storage/v1/b/{BUCKET}/o/(.+)/rewriteTo/b/{BUCKET}/o/(.+)", path)
            if copied:
                source, target = copied.groups()
                if self._is_refused(target):
                    return
                if source not in objects:
                    return self._answer(404, b"{}")
                objects[target] = objects[source]
                self._answer(200, json.dumps({"done": True, "resource": _description(objects, target)}).encode())
            elif path != f"/upload/storage/v1/b/{BUCKET}/o":
                self._answer(404, b"{}")
            elif query["uploadType"] == "multipart":
                boundary = b"\n--" + re.search(r'boundary="(.+)"', self.headers["Content-Type"])[1].encode()
                facts, _, rest = body.partition(boundary + b"\n")
                data = rest.partition(b"\n\n")[2].removesuffix(boundary + b"--")
                self._store(json.loads(facts.partition(b"\n\n")[2])["name"], data)
            elif "upload_id" not in query:
                key = str(len(uploads))
                uploads[key] = json.loads(body)["name"], bytearray()
                endpoint = f"http://{self.headers['Host']}{url.path}?uploadType=resumable&upload_id={key}"
                self._answer(200, b"{}", [("Location", endpoint)])
            else:
                name, data = uploads[query["upload_id"]]
                first, last, size = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", self.headers["Content-Range"]).groups()
                data[int(first) :] = body
                if int(last) + 1 == int(size):
                    return self._store(name, bytes(data))
                self._answer(308, b"", [("Range", f"bytes=0-{last}")])

        do_PUT = do_POST

        def do_DELETE(self):
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            name = path.removeprefix(f"/storage/v1/b/{BUCKET}/o/")
            if not self._is_refused(name):
                self._answer(204 if objects.pop(name, None) is not None else 404, b"")

        def _store(self, name: str, data: bytes):
            if not self._is_refused(name):
                objects[name] = data
                self._answer(200, json.dumps(_description(objects, name)).encode())

        def _is_refused(self, name: str) -> bool:
            if status := refuse(self.command, name):
                self._answer(status, json.dumps({"error": {"code": status, "message": "not now"}}).encode())
            return bool(status)

        def _send_part(self, data: bytes):
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-")).groups()
            self._answer(206, data[int(first) : int(last) + 1 if last else None])

        def _answer(self, status: int, body: bytes, headers: Sequence[tuple[str, str]] = ()):
            self.send_response(status)
            for header, value in (("Content-Type", "application/json"), *headers):
                self.send_header(header, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
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
    names = sorted(name for name in list(objects) if name.startswith(prefix))
    items, folders = [], set()
    for name in names:
        rest = name[len(prefix) :]
        if delimiter and delimiter in rest:
            folders.add(prefix + rest.split(delimiter)[0] + delimiter)
        else:
            items.append(_description(objects, name))
    return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}


if __name__ == "__main__":

    def wait(method: str, name: str) -> int:
        time.sleep(0.0 if method == "GET" else float(sys.argv[2]))
        return 0

    with serve({}, port=int(sys.argv[1]), refuse=wait):
        threading.Event().wait()
