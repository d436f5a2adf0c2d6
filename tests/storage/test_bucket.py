"""A workdir in a bucket: what a kill between any two writes leaves is a run to go on from, and errors are named.

The bucket is tests/support/fake_gcs.py on loopback, through gcsfs.
"""

import asyncio
import contextlib
import os
import re
import shutil
import time
import types

import pytest
from support import fake_gcs
from support.bucket_pair import database_of, end_copying, opened_pair, whole, write_part
from support.web import serve_folder

from btlm_jax import notices
from btlm_jax.hub.given_model import fetch_model
from btlm_jax.storage import bucket, owner
from btlm_jax.train.checkpoint import go_back

RUN = "a/run"


@pytest.fixture
def refusals():
    """Statuses with which the bucket answers, by (method, part of an object's name)."""
    return {}


@pytest.fixture
def objects(refusals, monkeypatch, tmp_path):
    """The bucket's objects by name, those of the run without `RUN`; the local folders are new."""
    monkeypatch.setenv(bucket.STAGING_VARIABLE, str(tmp_path / "staging"))
    monkeypatch.setattr(bucket, "_WAITS", (0.0, 0.001))
    monkeypatch.setattr(bucket, "_POLL_SECONDS", 0.02)
    notices.begin(strict=())

    def refuse(method, name):
        found = [status for (verb, part), status in refusals.items() if verb == method and part in name]
        return found[0] if found else 0

    stored = {}
    with fake_gcs.connected(stored, monkeypatch, refuse=refuse):
        import gcsfs.retry  # gcsfs tries each request six times, in half a minute

        monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=lambda _: asyncio.sleep(0)))
        yield stored


URL = f"gs://{fake_gcs.BUCKET}/{RUN}"


@contextlib.contextmanager
def opened():
    with bucket.opened_for_run(URL) as mirror:
        mirror.begin()
        try:
            yield mirror
        finally:
            end_copying(mirror)  # without a last copy, as after a kill


def write_checkpoint(folder, step):
    """Write what orbax leaves of a checkpoint, in one rename."""
    partial = folder / f".{step}.partial"
    for name in ("position/metadata", "state/manifest.ocdbt", "state/d/x", "state/ocdbt.process_0/d"):
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} of {step}")
    (folder / "checkpoints").mkdir(exist_ok=True)
    partial.rename(folder / "checkpoints" / str(step))


def steps_of(objects):
    names = [name.removeprefix(f"{RUN}/").split("/") for name in objects if name.endswith("/commit.json")]
    return sorted(int(parts[1]) for parts in names if parts[0] == "checkpoints")


def contents(folder):
    """Return the files of a local workdir, without this module's own."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths if path.name != "commit.json"}


def fetched(folder):
    """Return what a command that reads finds of the last checkpoint, and of the metrics."""
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    bucket.fetch(folder / "checkpoints" / str(steps[-1]))
    state = (folder / "checkpoints" / str(steps[-1]) / "state/d/x").read_text()
    return steps, state, (folder / "metrics.jsonl").read_text()


def test_a_run_is_copied_and_goes_on_elsewhere(objects, tmp_path):
    with opened() as mirror:
        (mirror.folder / "metrics.jsonl").write_text("1\n2\n3")  # the last line is being written
        (mirror.folder / "stacks").mkdir()
        (mirror.folder / "stacks" / "0.txt").write_text("main")
        write_checkpoint(mirror.folder, 3)
        mirror.settle()
        assert steps_of(objects) == [3] and objects[f"{RUN}/metrics.jsonl"] == b"1\n2\n"
        write_checkpoint(mirror.folder, 6)
        mirror.flush()
        assert not (mirror.folder / "checkpoints/3/state").exists()  # it is in the bucket
        first = mirror.folder
        here = contents(first)
        # The same machine goes on from its folder without reading it again; another one gets the same.
    shutil.rmtree(first / "stacks")
    objects[f"{RUN}/launches/1/command"] = b"btlm train"  # of launch/tpu.sh
    objects |= {f"{RUN}/.hidden": b"x", f"{RUN}/of_others/.hidden": b"x"}  # which a run does not copy
    before = dict(objects)
    with opened() as mirror:
        assert mirror.folder == first and fetched(first)[:2] == ([3, 6], "state/d/x of 6")
        mirror.flush()
    assert set(before) - set(objects) == {f"{RUN}/stacks/0.txt"}
    shutil.rmtree(tmp_path / "staging")
    with opened() as mirror:
        mirror.flush()
        assert objects.keys() >= {f"{RUN}/.hidden", f"{RUN}/of_others/.hidden"}
        assert fetched(mirror.folder) == ([3, 6], "state/d/x of 6", "1\n2\n")
        found = contents(mirror.folder)
    kept = {name: text for name, text in here.items() if name != "stacks/0.txt"}
    assert found == kept | {"metrics.jsonl": "1\n2\n", "launches/1/command": "btlm train"}


def test_another_machine_that_wrote_last_counts(objects, tmp_path, monkeypatch):
    with opened() as mirror:
        (mirror.folder / "metrics.jsonl").write_text("1\n")
        mirror.flush()
        stale = mirror.folder
    monkeypatch.setenv(bucket.STAGING_VARIABLE, str(tmp_path / "elsewhere"))
    with opened() as mirror:
        (mirror.folder / "metrics.jsonl").write_text("1\n2\n")
        mirror.flush()
    monkeypatch.setenv(bucket.STAGING_VARIABLE, str(tmp_path / "staging"))
    write_checkpoint(stale, 3)
    (stale / "metrics.jsonl").write_text("1\nlost\n")
    with opened() as mirror:
        assert mirror.folder == stale and contents(stale) == {"metrics.jsonl": "1\n2\n"}
        assert notices.counts() == {"not-uploaded": 1}  # and said
        # Another boot of the machine, which may have lost what was not yet on its disk: the bucket counts, too.
        (stale / "metrics.jsonl").write_text("1\n2\n3\n")
        mirror.flush()
        (stale / "metrics.jsonl").write_text("1\n")
    monkeypatch.setattr(bucket, "_boot", lambda: "other")
    with opened():
        assert contents(stale) == {"metrics.jsonl": "1\n2\n3\n"}


def test_a_checkpoint_that_is_being_set_aside_is_not_lost(objects):
    with opened() as mirror:
        for step in (3, 6, 9):
            write_checkpoint(mirror.folder, step)
            mirror.flush()
        partial = mirror.folder / "replaced/.from-3.partial"
        (partial / "checkpoints").mkdir(parents=True)
        (mirror.folder / "checkpoints/6").rename(partial / "checkpoints/6")  # whose arrays are in the bucket alone
        mirror.flush()
    with opened() as mirror:  # after a kill here, and after one at the end of it
        target = mirror.folder / "replaced/from-3"
        (mirror.folder / "replaced/.from-3.partial").rename(target)
    with opened() as mirror:
        assert f"{RUN}/checkpoints/6/state/d/x" in objects
        mirror.flush()
        bucket.fetch(target / "checkpoints/6")
        assert (target / "checkpoints/6/state/d/x").read_text() == "state/d/x of 6" and steps_of(objects) == [3, 9]


def test_what_an_outage_from_the_start_on_kept_here_is_uploaded_by_the_next_start(objects, refusals):
    with pytest.raises(OSError, match="cannot be written"), opened() as mirror:
        refusals["POST", ""] = 503
        (mirror.folder / "metrics.jsonl").write_text("1\n")
        write_checkpoint(mirror.folder, 3)
        mirror.flush()
    refusals.clear()
    with opened() as mirror:
        mirror.flush()
        assert steps_of(objects) == [3]
    objects.clear()  # the user deletes the run there
    with opened() as mirror:
        assert contents(mirror.folder) == {}


WENT_BACK = 13


class Killed(BaseException):
    """The process ends before a write."""


def count_writes(monkeypatch):
    """Return [writes before the one at which the process ends], and the kinds that there have been."""
    write, left, kinds = bucket.RemoteFolder._call, [10**6], set()

    def call(self, method, *arguments, **options):
        if method in ("pipe_file", "put_file", "rm_file", "cp_file"):
            left[0] -= 1
            kinds.add(method)
            if left[0] < 0:
                raise Killed
        return write(self, method, *arguments, **options)

    monkeypatch.setattr(bucket.RemoteFolder, "_call", call)
    monkeypatch.setattr(bucket, "_THREADS", 1)
    return left, kinds


@pytest.mark.slow
def test_a_kill_before_any_write_leaves_a_run_to_go_on_from(objects, tmp_path, monkeypatch):
    """Each of the writes of: a checkpoint, its successor, one deleted by the rules, going back to the first one."""
    left, kinds = count_writes(monkeypatch)

    def train(mirror):
        folder = mirror.folder
        end_copying(mirror)  # so that it is known which write comes when
        for step in (3, 6, 9, 12):
            (folder / "metrics.jsonl").write_text("".join(f"{n}\n" for n in range(1, step + 2)))
            write_checkpoint(folder, step)
            if step == 9:
                shutil.rmtree(folder / "checkpoints" / "3")
            mirror.flush()
            yield step
        assert go_back(folder, 6)
        mirror.flush()
        yield WENT_BACK

    num_writes, reached, outcomes = 0, 0, set()
    while reached < WENT_BACK:
        objects.clear()
        shutil.rmtree(tmp_path / "staging", ignore_errors=True)
        left[0], reached = num_writes, 0
        with contextlib.suppress(Killed), opened() as mirror:
            for step in train(mirror):
                reached = step
        left[0] = 10**6
        shutil.rmtree(tmp_path / "staging", ignore_errors=True)  # the next start is elsewhere
        with opened() as mirror:
            mirror.flush()
            if reached:
                steps, state, metrics = fetched(mirror.folder)
                assert steps[-1] >= (6 if reached >= 12 else reached) and state == f"state/d/x of {steps[-1]}"
                assert len(metrics.splitlines()) >= steps[-1]  # each step that counts is in the metrics
                outcomes.add((reached, *steps))
            if reached == 12 and steps[-1] == 12:  # the same command goes back now
                assert go_back(mirror.folder, 6).startswith("went back")
                mirror.flush()
                steps, _, _ = fetched(mirror.folder)
            if reached >= 12:
                assert steps == [6]
                for step in (9, 12):
                    bucket.fetch(path := mirror.folder / f"replaced/from-6/checkpoints/{step}")
                    assert (path / "state/d/x").read_text() == f"state/d/x of {step}"
            mirror.flush()
        # Nothing is left that counts for nothing.
        open_ones = bucket._uncommitted({name.removeprefix(f"{RUN}/"): [0] for name in objects})
        assert not open_ones, num_writes
        num_writes += 1
    assert num_writes > 30 and kinds == {"pipe_file", "put_file", "rm_file", "cp_file"}
    assert outcomes == {
        *((3, 3), (6, 3, 6), (6, 3, 6, 9), (6, 6, 9), (9, 6, 9), (12, 6, 9, 12), (12, 6)),
        (WENT_BACK, 6),
    }


def test_what_was_copied_by_other_means_is_taken(objects):
    for name in ("position/metadata", "state/d/x"):
        objects[f"{RUN}/checkpoints/5/{name}"] = b"copied"
    objects[f"{RUN}/metrics.jsonl"] = b"1\n"
    folder = bucket.open_for_reading(URL)
    assert fetched(folder) == ([5], "copied", "1\n") and steps_of(objects) == []
    with opened() as mirror:
        assert fetched(mirror.folder) == ([5], "copied", "1\n") and steps_of(objects) == [5]


def test_what_others_put_into_a_run_s_folder_stays(objects):
    with opened() as mirror:
        write_checkpoint(mirror.folder, 3)
        mirror.flush()
    names = ("config.json", "checkpoints/best/state/d/0", "checkpoints/README.txt", "notes/README.txt")
    objects |= {f"{RUN}/{name}": b"x" for name in names}
    objects[f"{RUN}/checkpoints/7/x"] = b"of a save that was killed"
    before = set(objects)
    for staging in ("the same", "another"):
        with opened() as mirror:
            mirror.close()
        assert set(objects) == before - {f"{RUN}/checkpoints/7/x"}, staging
        shutil.rmtree(mirror.folder)


def test_a_model_behind_a_web_server_is_read(objects, tmp_path):
    (tmp_path / "web/model").mkdir(parents=True)
    (tmp_path / "web/model/config.json").write_text("{}")
    for name in ("best", "3.orbax-checkpoint-tmp", "3"):  # of others, and of a save that was killed
        (tmp_path / f"web/run/checkpoints/{name}/state").mkdir(parents=True)
        (tmp_path / f"web/run/checkpoints/{name}/state/d").write_text(name)
    with serve_folder(tmp_path / "web") as url:
        folder = bucket.open_for_reading(f"{url}/model")
        fetch_model(f"{url}/model", step=0, directory=tmp_path / "fetched", log=lambda line: None)
        fetch_model(f"{url}/run", step=0, directory=tmp_path / "run", log=lambda line: None)
    assert contents(folder) == contents(tmp_path / "fetched") == {"config.json": "{}"}
    assert contents(tmp_path / "run") == {"checkpoints/3/state/d": "3"}


def test_damage_in_the_bucket_is_named(objects):
    with opened() as mirror:
        write_checkpoint(mirror.folder, 3)
        mirror.flush()
    folder = bucket.open_for_reading(URL)
    whole = objects.pop(f"{RUN}/checkpoints/3/state/d/x")
    with pytest.raises(ValueError, match=r"^state/d/x is gone$"):
        bucket.fetch(folder / "checkpoints/3")
    objects[f"{RUN}/checkpoints/3/state/d/x"] = whole[:-1] + b"#"
    with pytest.raises(ValueError, match=r"^state/d/x is not as it was written$"):
        bucket.fetch(folder / "checkpoints/3")


def test_no_name_in_a_bucket_leads_out_of_the_folder_that_is_written(objects, tmp_path):
    with opened() as mirror:
        write_checkpoint(mirror.folder, 3)
        mirror.flush()
    folder = bucket.open_for_reading(URL)
    commit = folder / "checkpoints/3/commit.json"
    commit.write_bytes(commit.read_bytes().replace(b"state/d/x", b"../../../../x"))
    with pytest.raises(ValueError, match=r"/checkpoints/3/\.\./\.\./\.\./\.\./x is not read"):
        bucket.fetch(folder / "checkpoints/3")
    outside = tmp_path / "outside"
    for name in ("x/../../../../../outside", "tokenizer/../../outside", f"/{outside}", "tokenizer//x", "./x"):
        objects[f"{RUN}/{name}"] = b"#!/bin/sh"
        before = dict(objects)
        for read in (
            lambda: bucket.open_for_reading(URL),
            lambda: opened().__enter__(),
            lambda: fetch_model(URL, step=0, directory=tmp_path / "model", log=lambda line: None),
        ):
            with pytest.raises(ValueError, match=f"^{re.escape(f'{URL}/{name}')} is not read"):
                read()
        assert objects == before and not list(tmp_path.rglob("outside")) and not (tmp_path / "model").exists()
        del objects[f"{RUN}/{name}"]


def test_what_is_deleted_while_it_is_read_is_not_there(objects, monkeypatch):
    with opened() as mirror:
        (mirror.folder / "metrics.jsonl").write_text("1\n")
        for step in (3, 6):
            write_checkpoint(mirror.folder, step)
            mirror.flush()
    listed = bucket.RemoteFolder.list

    def list_then_delete(self):
        found = listed(self)
        for name in [name for name in objects if "/checkpoints/3/" in name or name.endswith("metrics.jsonl")]:
            del objects[name]
        return found

    monkeypatch.setattr(bucket.RemoteFolder, "list", list_then_delete)
    folder = bucket.open_for_reading(URL)
    assert contents(folder) == {"checkpoints/6/position/metadata": "position/metadata of 6"}


def test_metrics_that_cannot_be_copied_do_not_stop_a_run_and_a_checkpoint_does_in_the_end(
    objects, refusals, monkeypatch, capsys
):
    monkeypatch.setattr(bucket, "FILES_SECONDS", 0.05)
    with opened() as mirror:
        refusals["POST", ""] = 503
        (mirror.folder / "metrics.jsonl").write_text("1\n")
        until = time.monotonic() + 20
        while "upload-failed" not in notices.counts() and time.monotonic() < until:
            time.sleep(0.02)
        mirror.check()
        write_checkpoint(mirror.folder, 3)
        with pytest.raises(OSError, match=r"gs://bucket/a/run/.* cannot be written \(3 attempts\): "):
            mirror.settle()
        refusals.clear()
        until = time.monotonic() + 20
        while "upload-caught-up" not in notices.counts() and time.monotonic() < until:
            time.sleep(0.02)
        mirror.check()
        assert steps_of(objects) == [3] and objects[f"{RUN}/metrics.jsonl"] == b"1\n"
    said = capsys.readouterr().err
    assert "attempt 1 of 3 failed, again in 0 s: " in said and "the run goes on, and it is tried again in" in said


def test_a_failed_copy_is_an_error_by_strict_wherever_the_run_looks_next(objects, refusals, monkeypatch):
    monkeypatch.setattr(bucket, "FILES_SECONDS", 0.05)
    notices.begin(strict=("upload-caught-up",))
    with opened() as mirror:
        refusals["POST", ""] = 503
        (mirror.folder / "metrics.jsonl").write_text("1\n")
        until = time.monotonic() + 20
        while not isinstance(mirror._error, notices.StrictError) and time.monotonic() < until:
            if mirror._error is not None:
                refusals.clear()
            time.sleep(0.02)
        with pytest.raises(notices.StrictError):
            mirror.check()
        with pytest.raises(notices.StrictError):
            mirror.flush()


@pytest.mark.parametrize(
    ("url", "refused", "message"),
    [
        (URL, 403, r"^workdir gs://bucket/a/run cannot be written: .* \(1 attempt\): .*Forbidden"),
        (URL, 503, r"^workdir gs://bucket/a/run cannot be written: .* \(3 attempts\): "),
        ("gs://no-bucket/run", 0, r"^workdir gs://no-bucket/run cannot be written: .*there is no such bucket; choose"),
    ],
)
def test_a_bucket_that_cannot_be_written_is_named_at_the_start(objects, refusals, url, refused, message):
    refusals["POST", ""] = refused
    with pytest.raises(OSError, match=message), bucket.opened_for_run(url):
        pass


def test_a_bucket_that_does_not_answer_is_named(objects, monkeypatch):
    remote = bucket.RemoteFolder(URL, waits=(), seconds=1.0)
    monkeypatch.setattr(fake_gcs, "_description", lambda *_: time.sleep(4))
    with pytest.raises(OSError, match=r"gs://bucket/a/run/x cannot be written \(1 attempt\): no answer in time"):
        remote.write("x", b"")


def test_a_bucket_has_one_owner(objects, monkeypatch):
    monkeypatch.setattr(owner, "_READ_BACK_SECONDS", 0.0)
    remote = bucket.RemoteFolder(URL)
    ownership = owner.take(remote, steal=False)
    with pytest.raises(FileExistsError, match=f"^{URL} belongs to process {os.getpid()} on "):
        owner.take(remote, steal=False)
    assert ownership.beat() == ""
    stolen = owner.take(remote, steal=True)
    assert ownership.beat() == f"was taken over by {stolen._owner}"
    ownership.release()  # of what is not its own any more
    assert f"{RUN}/owner.json" in objects
    stolen.release()
    assert f"{RUN}/owner.json" not in objects


def test_the_owner_s_file_is_not_copied(objects, monkeypatch):
    monkeypatch.setattr(owner, "_READ_BACK_SECONDS", 0.0)
    with opened() as mirror:
        ownership = owner.take(mirror.owned, steal=False)
        write_checkpoint(mirror.folder, 3)
        mirror.flush()
        assert not (mirror.folder / "owner.json").exists()
        assert ownership.beat() == ""
        ownership.release()


def test_a_run_that_wrote_nothing_leaves_nothing(objects):
    with opened() as mirror:
        mirror.close()
    assert objects == {}


# Several processes.


def test_each_process_uploads_its_part_and_the_first_commits_all(objects, tmp_path, monkeypatch):
    with opened_pair(URL, monkeypatch, tmp_path) as (first, second):
        for step in (3, 6):
            (first.folder / "metrics.jsonl").write_text(f"{step}\n")
            for index, mirror in enumerate((second, first)):
                write_part(mirror, step, index=1 - index)
                mirror.flush()
                assert (step in steps_of(objects)) == (mirror is first)
        assert objects[f"{RUN}/metrics.jsonl"] == b"6\n"
        assert not [name for name in objects if "/part." in name or name.endswith("state/manifest.ocdbt")]
        expected = {step: {f"w/{index}": f"{step}: {index}" for index in range(2)} for step in (3, 6)}
        for step in (3, 6):  # this run goes back, and another command reads: the own part of 3 is not here any more
            assert [whole(mirror.folder, step) for mirror in (first, second)] == [expected[step]] * 2
        (second.folder / "stacks").mkdir()
        (second.folder / "stacks/process-1.txt").write_text("main")
        second.copy_now("stacks")
        assert objects[f"{RUN}/stacks/process-1.txt"] == b"main"
        before = set(objects)
        second.close()
        first.close()
        assert set(objects) == before
    folder = bucket.open_for_reading(URL)
    assert whole(folder, 6) == whole(folder, 6) == expected[6]
    fetch_model(URL, step=0, directory=tmp_path / "model", log=lambda line: None)  # as btlm evaluate reads it
    assert database_of(tmp_path / "model", 6) == expected[6] and not (tmp_path / "model/metrics.jsonl").exists()
    for mirror in (first, second):  # as a kill leaves it, complete in one process or in both
        write_part(mirror, 9, index=int(mirror is second))
    second.flush()
    with opened_pair(URL, monkeypatch, tmp_path, run="2") as pair:
        assert notices.counts() == {"not-uploaded": 1}  # of the second the part is in the bucket
        assert [sorted(path.name for path in (each.folder / "checkpoints").iterdir()) for each in pair] == [
            ["3", "6"], ["3", "6"]
        ]  # fmt: skip
        assert not [name for name in objects if "/checkpoints/9/" in name]
        write_part(pair[0], 9, index=0)
    monkeypatch.setenv(bucket.STAGING_VARIABLE, str(tmp_path / "machine-0"))
    with opened() as alone:  # one process goes on where the first one was
        assert [path.name for path in (alone.folder / "checkpoints").iterdir()] == ["3", "6"]
        assert whole(alone.folder, 6) == expected[6]


def test_a_part_counts_for_its_own_save_alone(objects, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket, "_OTHERS_SECONDS", 0.1)
    late = f"^checkpoint 3 is not in {URL}: process 1 has not uploaded its part$"
    with opened_pair(URL, monkeypatch, tmp_path) as (first, second):
        write_part(first, 3, index=0)
        with pytest.raises(OSError, match=late):
            first.flush()
        write_part(second, 3, index=1, text=" before the run went back")
        second.flush()
        with pytest.raises(OSError, match=late):
            first.flush()
        shutil.rmtree(second.folder / "checkpoints/3")
        write_part(second, 3, index=1)
        second.run = "of an earlier start"
        second.flush()
        with pytest.raises(OSError, match=late):
            first.flush()
        shutil.rmtree(second.folder / "checkpoints/3")
        assert steps_of(objects) == []
        second.run = first.run
        write_part(second, 3, index=1)
        second.flush()
        first.flush()
        assert steps_of(objects) == [3] and whole(second.folder, 3) == {"w/0": "3: 0", "w/1": "3: 1"}


def test_nothing_is_deleted_before_the_next_checkpoint_is_committed(objects, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket, "_OTHERS_SECONDS", 0.05)
    with opened_pair(URL, monkeypatch, tmp_path) as (first, second):
        for index, mirror in ((1, second), (0, first)):
            write_part(mirror, 3, index=index)
            mirror.flush()
        write_part(first, 6, index=0)
        shutil.rmtree(first.folder / "checkpoints/3")
        with pytest.raises(OSError, match="process 1 has not uploaded its part"):
            first.flush()
        assert steps_of(objects) == [3]
        write_part(second, 6, index=1)
        second.flush()
        first.flush()
        assert steps_of(objects) == [6]
        with opened_pair(URL, monkeypatch, tmp_path / "others", run="2") as pair:
            assert whole(pair[0].folder, 6) == {"w/0": "6: 0", "w/1": "6: 1"}


def test_a_save_that_failed_and_is_made_again_takes_nothing_of_the_first_one(objects, refusals, tmp_path, monkeypatch):
    """Its files have the names of the first one's, and the same hashes of arrays."""
    with opened_pair(URL, monkeypatch, tmp_path) as (first, second):
        for index, mirror in ((1, second), (0, first)):
            write_part(mirror, 3, index=index)
            mirror.upload()
        refusals["POST", "commit.json"] = 503
        with pytest.raises(OSError, match="commit.json cannot be written"):
            first.flush()
        assert first.committed() == second.committed() == []
        for mirror in (first, second):
            mirror.forget([3])
        refusals.clear()
        first.flush()
        write_part(first, 3, index=0)
        first.upload()
        monkeypatch.setattr(bucket, "_OTHERS_SECONDS", 0.05)
        with pytest.raises(OSError, match="process 1 has not uploaded its part"):
            first.flush()
        write_part(second, 3, index=1)
        second.upload()
        first.flush()
        assert first.committed() == steps_of(objects) == [3]
    monkeypatch.setenv(bucket.STAGING_VARIABLE, str(tmp_path / "elsewhere"))
    assert whole(bucket.open_for_reading(URL), 3) == {"w/0": "3: 0", "w/1": "3: 1"}


def test_a_checkpoint_that_is_gone_is_damaged_for_the_process_that_has_a_part_of_it(objects, tmp_path, monkeypatch):
    with opened_pair(URL, monkeypatch, tmp_path) as (first, second):
        for index, mirror in ((1, second), (0, first)):
            write_part(mirror, 3, index=index)
            mirror.flush()
        del objects[f"{RUN}/checkpoints/3/commit.json"]
        with pytest.raises(ValueError, match=r"^commit.json is gone$"):
            bucket.fetch(second.folder / "checkpoints/3")


def test_a_checkpoint_of_a_step_that_was_set_aside_does_not_replace_it_there(objects):
    with opened() as mirror:
        end_copying(mirror)
        for step in (3, 6):
            write_checkpoint(mirror.folder, step)
            mirror.flush()
        target = mirror.folder / "replaced/from-3/checkpoints"
        target.mkdir(parents=True)
        (mirror.folder / "checkpoints/6").rename(target / "6")
        write_checkpoint(mirror.folder, 6)
        (mirror.folder / "checkpoints/6/state/d/x").write_text("anew")
        mirror.flush()
        assert objects[f"{RUN}/checkpoints/6/state/d/x"] == b"anew"
        assert objects[f"{RUN}/replaced/from-3/checkpoints/6/state/d/x"] == b"state/d/x of 6"


@pytest.mark.slow
def test_a_kill_of_processes_before_any_write_leaves_a_run_to_go_on_from(objects, tmp_path, monkeypatch):
    """As the test of one process: a checkpoint, its successor, and the first one is deleted by the rules."""
    left, _ = count_writes(monkeypatch)
    num_writes, reached, outcomes = 0, 0, set()
    while reached < 9:
        objects.clear()
        for index in range(2):
            shutil.rmtree(tmp_path / f"machine-{index}", ignore_errors=True)
        left[0], reached = num_writes, 0
        with contextlib.suppress(Killed), opened_pair(URL, monkeypatch, tmp_path) as (first, second):
            for step in (3, 6, 9):
                (first.folder / "metrics.jsonl").write_text("".join(f"{n}\n" for n in range(1, step + 2)))
                for mirror in (first, second):
                    write_part(mirror, step, index=int(mirror is second))
                    if step == 9:
                        shutil.rmtree(mirror.folder / "checkpoints" / "3")
                second.flush()
                first.flush()
                reached = step
        left[0] = 10**6
        with opened_pair(URL, monkeypatch, tmp_path, run="2") as pair:
            pair[0].flush()
            found = [sorted(path.name for path in (each.folder / "checkpoints").glob("*")) for each in pair]
            assert found[0] == found[1]
            if reached:
                last = int(found[0][-1])
                outcomes.add((reached, *found[0]))
                assert last >= (6 if reached >= 9 else reached)
                assert whole(pair[1].folder, last) == {f"w/{index}": f"{last}: {index}" for index in range(2)}
                assert len((pair[0].folder / "metrics.jsonl").read_text().splitlines()) >= last
        assert not bucket._uncommitted({name.removeprefix(f"{RUN}/"): [0] for name in objects}), num_writes
        num_writes += 1
    assert num_writes > 30 and {(3, "3"), (6, "3", "6"), (9, "6", "9")} <= outcomes
