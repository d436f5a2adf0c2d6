"""Raw text behind URLs gives the documents of local files; what goes wrong on the way is said in one line."""

import hashlib
import http.server
import logging
import sys
import threading
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from support import fake_gcs
from support.corpus_files import made_up_text, write_raw

from btlm_jax import notices
from btlm_jax.cli import main
from btlm_jax.corpus.engine import inputs, tasks
from btlm_jax.corpus.engine.inputs import read_stage
from btlm_jax.storage.location import (
    expand_pattern,
    hash_range,
    list_files,
    parse_location,
    read_bytes,
    version_stamp,
    with_sizes,
)


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A folder of raw files of three kinds, one large enough to be read in pieces."""
    monkeypatch.setattr(inputs, "PIECE_BYTES", 2_000)
    write_raw(tmp_path / "raw" / "a" / "one.jsonl.zst", [made_up_text(seed=seed) for seed in range(5)], source="A")
    write_raw(tmp_path / "raw" / "two.jsonl", [made_up_text(seed=seed) for seed in range(5, 16)], source="B")
    rows = [{"text": made_up_text(seed=seed), "source": "C"} for seed in range(16, 20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "raw" / "three.parquet")
    (tmp_path / "raw" / "picture.png").write_bytes(b"")
    return tmp_path


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def clean(place, output: Path) -> int:
    return main(["corpus", "clean", f"--input={place}", f"--output={output}", "--workers=1"])


def contents(directory: Path) -> dict:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_url_gives_the_bytes_of_the_local_folder(raw, memory, capsys):
    for name, data in files_of(raw / "raw").items():
        memory.pipe(f"/bucket/raw/{name}", data)
    assert clean(raw / "raw", raw / "local") == clean("memory://bucket/raw", raw / "remote") == 0
    assert contents(raw / "remote") == contents(raw / "local")
    assert len(read_stage(raw / "remote")["tasks"][0]) == 5  # one file is in three pieces
    assert clean("memory://bucket/raw/", raw / "remote") == 0 and "done already" in capsys.readouterr().out
    data = memory.cat("/bucket/raw/two.jsonl")
    memory.pipe("/bucket/raw/two.jsonl", data.replace(b"a", b"b", 1))
    assert clean("memory://bucket/raw", raw / "remote") == 1
    assert "two.jsonl changed after it was processed" in capsys.readouterr().err
    assert clean("memory://bucket/raw/two.jsonl", raw / "one") == 0
    assert clean("memory://bucket/nothing", raw / "none") == 1
    assert "memory://bucket/nothing" in capsys.readouterr().err


def test_evaluation_text_may_be_behind_a_url(raw, memory):
    memory.pipe("/held/test.txt", made_up_text(seed=3).encode())
    assert clean(raw / "raw", raw / "clean") == 0
    flags = ["--evaluation=memory://held", "--validation=0", "--test=0", "--workers=1"]
    assert main(["corpus", "split", f"--input={raw / 'clean'}", f"--output={raw / 'split'}", *flags]) == 0
    assert read_stage(raw / "split" / "work" / "assign")["totals"]["dropped"]["has evaluation text"] == 1


def test_a_transfer_that_ends_early_is_an_error_and_is_tidied_up(raw, memory, monkeypatch, capsys):
    memory.pipe("/bucket/a.jsonl", (raw / "raw" / "two.jsonl").read_bytes())
    monkeypatch.setattr(tasks, "version_stamp", lambda place: [0])
    real = list_files
    monkeypatch.setattr(
        inputs, "list_files", lambda root, **kw: [(name, at, size + 7) for name, at, size in real(root, **kw)]
    )
    monkeypatch.setattr(inputs, "PIECE_BYTES", 1 << 30)
    assert clean("memory://bucket", raw / "out") == 1
    assert "a.jsonl ended 7 bytes before it should" in capsys.readouterr().err
    assert not list((raw / "out").glob(".*.tmp"))


def test_google_cloud_storage_on_loopback(raw, monkeypatch):
    objects = {f"raw/{name}": data for name, data in files_of(raw / "raw").items()}
    with fake_gcs.connected(objects, monkeypatch) as bucket:
        assert clean(raw / "raw", raw / "local") == clean(f"{bucket}/raw", raw / "remote") == 0
        assert contents(raw / "remote") == contents(raw / "local")
        url = f"{bucket}/raw/two.jsonl"
        before = version_stamp(url)
        objects["raw/two.jsonl"] = objects["raw/two.jsonl"].replace(b"a", b"b", 1)
        assert version_stamp(url) != before


def test_a_missing_library_is_named(raw, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # another test has imported it
    assert clean("s3://bucket/raw", raw / "out") == 1
    command = f"{sys.executable} -m pip install 'btlm_jax[s3]'"
    assert f"s3://bucket/raw needs a library that is not installed: {command}" in capsys.readouterr().err
    assert clean("nonsense://bucket/raw", raw / "out") == 1 and "nonsense" in capsys.readouterr().err


class _Web(http.server.BaseHTTPRequestHandler):
    """A folder raw/ with two files, and sorted/ as Apache lists it; of chunked/a.txt and page.cgi no length is said."""

    LISTS = {
        "/raw/": b'<a href="a.txt">a</a> <a href="b.txt">b</a>',
        "/sorted/": b"""<a href="?C=N;O=D">Name</a> <a href="?C=S;O=A">Size</a> <a href="/">Parent Directory</a>
            <a href="/sorted/">.</a> <a href="#top">top</a> <a href="../raw/b.txt">b</a> <a href="page.cgi">page</a>
            <a href="a.txt">a</a>""",
    }
    modified = "Mon, 30 Nov 2026 10:00:00 GMT"  # of a.txt

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        is_chunked = self.path in ("/chunked/a.txt", "/sorted/page.cgi")
        body = self.LISTS.get(self.path.rstrip("/") + "/") or b"text of " + self.path.encode()
        self.send_response(200)
        self.send_header(*(("Transfer-Encoding", "chunked") if is_chunked else ("Content-Length", str(len(body)))))
        if self.path == "/raw/a.txt":
            self.send_header("Last-Modified", self.modified)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if is_chunked else body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    """The URL of a `_Web`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_files_of_a_web_server_are_read_if_it_says_how_long_they_are(web):
    files = [(name, f"{web}/raw/{name}", 18) for name in ("a.txt", "b.txt")]
    assert with_sizes(list_files(f"{web}/raw/", left_out=nothing)) == files
    assert with_sizes(list_files(f"{web}/raw/a.txt", left_out=nothing)) == files[:1]
    assert read_bytes(f"{web}/raw/a.txt") == b"text of /raw/a.txt" and version_stamp(f"{web}/raw/b.txt") == [18]
    url = f"{web}/chunked/a.txt"
    said = f"^{url}: its server does not say how long it is; download it, and give the file$"
    for ask in (lambda: with_sizes(list_files(url, left_out=nothing)), lambda: version_stamp(url)):
        with pytest.raises(OSError, match=said):
            ask()


def test_links_of_a_web_server_s_list_that_are_no_files_of_it_are_not_read(web):
    url = f"{web}/sorted/a.txt"
    for place in (f"{web}/sorted", f"{web}/sorted/"):
        notices.begin(strict=())
        assert [(item.name, item.location, item.num_bytes) for item in inputs.raw_inputs(place)] == [("a.txt", url, 21)]
        assert notices.counts() == {"file-not-read": 1}  # page.cgi, of which no length is said
    assert expand_pattern(f"{web}/sorted/*") == [url, f"{web}/sorted/page.cgi"]


def test_a_file_of_a_web_server_that_was_replaced_by_one_as_long_has_another_stamp(web, monkeypatch):
    before = version_stamp(f"{web}/raw/a.txt")
    monkeypatch.setattr(_Web, "modified", "Mon, 30 Nov 2026 11:00:00 GMT")
    assert before[0] == version_stamp(f"{web}/raw/a.txt")[0] and before != version_stamp(f"{web}/raw/a.txt")


def nothing(name, beside) -> str:
    return ""


class ConnectionOfALibraryError(OSError):
    """As aiohttp's: it does not say what was asked for."""


def test_an_error_of_a_library_is_one_line_that_names_the_url(memory, monkeypatch, capsys, caplog):
    def find(self, path, **_):
        try:
            raise ConnectionOfALibraryError("Name or service not known")
        except OSError:
            logging.getLogger("gcsfs").exception("out of retries")
            raise

    monkeypatch.setattr(type(memory), "find", find)
    with pytest.raises(OSError, match=r"^memory://bucket/raw cannot be read: .*Name or service not known$"):
        list_files("memory://bucket/raw", left_out=lambda name, beside: "")
    assert caplog.messages == ["out of retries"] and not any(record.exc_info for record in caplog.records)
    assert main(["corpus", "clean", "--input=memory://bucket/raw", "--output=unused"]) == 1
    assert "error: memory://bucket/raw cannot be read: " in capsys.readouterr().err.splitlines()[-1]


def test_links_are_followed_once_and_what_cannot_be_read_is_named(tmp_path, capsys):
    raw, disk = tmp_path / "raw", tmp_path / "disk"
    for path in (raw / "a.txt", raw / "b" / "c.txt", disk / "d" / "e.txt", raw / ".git" / "x.txt", raw / ".hidden.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    for name, target in {
        "linked": disk,
        "twice": disk / "d",  # read under linked/ or under its own name, once
        "loop": raw,
        "file.txt": disk / "d" / "e.txt",  # read there
        "gone.txt": disk / "gone.txt",
        "self.txt": raw / "self.txt",
        "b2": raw / "b",
    }.items():
        (raw / name).symlink_to(target)
    (raw / "latin\udce9.txt").write_text("x")
    stage = raw / "stage"
    for name in ("plan.json", "work/y.txt", "quarantine/0.jsonl", "documents.txt"):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_text("x")
    (raw / "b" / "work").mkdir()
    (raw / "b" / "work" / "own.txt").write_text("x")  # a folder of that name that is no stage's
    notices.begin(strict=())
    found = {item.name for item in inputs.raw_inputs(raw)}
    assert found - {"twice/e.txt", "linked/d/e.txt"} == {
        "a.txt", "b/c.txt", "b/work/own.txt", "latin\\xe9.txt", "stage/documents.txt"
    }  # fmt: skip
    assert len(found) == 6
    assert notices.counts() == {
        "folder-read-once": 3, "file-read-once": 1, "not-readable": 2, "left-out": 5
    }  # fmt: skip
    said = capsys.readouterr().err
    assert f"{raw / 'gone.txt'} is left out" in said and f"{raw / '.git'} is not read" in said
    assert inputs.raw_inputs(raw / ".hidden.txt")[0].name == ".hidden.txt"  # given by its own name


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch, capsys):
    for name in ("a.txt", "secret/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    real = Path.iterdir  # the tests may run as a user who may read everything

    def iterdir(self):
        if self.name in forbidden:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    forbidden = ["secret"]
    assert [item.name for item in inputs.raw_inputs(tmp_path)] == ["a.txt"]
    assert f"{tmp_path / 'secret'} cannot be read and is left out: Permission denied" in capsys.readouterr().err
    forbidden = [tmp_path.name]
    with pytest.raises(PermissionError):
        inputs.raw_inputs(tmp_path)


def test_hidden_files_behind_a_url_are_left_out(memory, capsys):
    for name in ("a.txt", ".git/b.txt", ".c.txt", "stage/plan.json", "stage/work/d.txt", "work/e.txt"):
        memory.pipe(f"/bucket/{name}", b"x")
    notices.begin(strict=())
    assert [item.name for item in inputs.raw_inputs("memory://bucket")] == ["a.txt", "work/e.txt"]
    assert notices.counts() == {"left-out": 4}
    assert "memory://bucket/stage/work is not read" in capsys.readouterr().err


def test_locations_are_paths_or_urls(tmp_path):
    assert parse_location("a/b") == Path("a/b") and parse_location("gs://a/b") == "gs://a/b"
    (tmp_path / "a").write_bytes(b"0123456789")
    assert (
        list_files(tmp_path, left_out=nothing)
        == list_files(tmp_path / "a", left_out=nothing)
        == [("a", tmp_path / "a", 10)]
    )
    url = f"file://{tmp_path}"
    assert [name for name, _, _ in list_files(url, left_out=nothing)] == ["a"]
    for place in (tmp_path / "a", f"{url}/a"):
        assert hash_range(place, begin=3, num_bytes=4, copy_to=None) == hashlib.sha256(b"3456").hexdigest()
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        list_files(tmp_path / "b", left_out=nothing)
