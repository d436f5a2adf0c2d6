"""Running a stage: what happens to workers, locks and manifests when something goes wrong."""

import fcntl
import json
import os
import re
import signal

import pytest
from support.corpus_files import made_up_text, write_raw

from btlm_jax.cli import main
from btlm_jax.corpus.engine.inputs import TASK_BYTES, make_tasks, raw_inputs, read_stage
from btlm_jax.corpus.engine.progress import Progress
from btlm_jax.corpus.engine.stage import Stage, only_command, run_stage
from btlm_jax.corpus.engine.tasks import Input, Task
from btlm_jax.corpus.engine.workers import LocalWorkers
from btlm_jax.corpus.readers.records import read_records
from btlm_jax.storage.files import AtomicFile

TASKS = [Task(index=index, inputs=(), weight=1) for index in range(4)]


def count(task, directory, heartbeat):
    heartbeat(10, 2_000_000)
    return {"totals": {"seen": {"all": 1 + task.index}}, "outputs": []}


def die(task, directory, heartbeat):
    if task.index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return count(task, directory, heartbeat)


def refuse(task, directory, heartbeat):
    raise ValueError(f"task {task.index} cannot be done")


def stage(run) -> Stage:
    return Stage(name="counting", settings={"recipe": 1}, tasks=TASKS, run=run)


def run(made: Stage, directory, *, num_workers=1, said=None) -> dict:
    log = [].append if said is None else said.append
    return run_stage(made, directory, workers=LocalWorkers(num_workers), log=log, check=lambda results: None)


def test_a_killed_worker_ends_the_stage_and_the_next_start_finishes_it(tmp_path):
    with pytest.raises(ValueError, match="a worker was killed, perhaps for its memory; finished work is kept"):
        run(stage(die), tmp_path / "a", num_workers=2)
    said = []
    assert run(stage(count), tmp_path / "a", num_workers=2, said=said) == run(stage(count), tmp_path / "b")
    assert "counting: 4/4 shards" in said[-1]


def large(task, directory, heartbeat):
    data = bytearray(300_000_000 if task.index == 1 else 1)
    data[::4096] = b"x" * len(data[::4096])
    return count(task, directory, heartbeat)


def test_the_largest_memory_of_a_worker_is_told(tmp_path):
    said = []
    run(stage(large), tmp_path, num_workers=2, said=said)
    assert int(re.search(r"at most (\d+) MB a process", said[-1])[1]) > 300


def test_the_first_error_of_a_worker_is_told_and_totals_add_up(tmp_path):
    with pytest.raises(ValueError, match="task . cannot be done"):
        run(stage(refuse), tmp_path, num_workers=2)
    assert list((tmp_path / "done").iterdir()) == []
    said = []
    manifest = run(stage(count), tmp_path, num_workers=2, said=said)
    assert manifest["totals"] == {"seen": {"all": 10}} and read_stage(tmp_path) == manifest
    assert "40 documents" in said[-1] and "ETA 0:00:00" in said[-1] and "MB a process" in said[-1]


def append(task, directory, heartbeat):
    with open(task.inputs[0].path, "a") as file:
        file.write("more")
    return count(task, directory, heartbeat)


def test_an_input_that_changes_while_it_is_read_is_refused(tmp_path):
    (tmp_path / "raw.jsonl").write_text("text")
    tasks = make_tasks(raw_inputs(tmp_path / "raw.jsonl"))
    made = Stage(name="appending", settings={}, tasks=tasks, run=append)
    with pytest.raises(ValueError, match="raw.jsonl changed while it was read; run again"):
        run(made, tmp_path / "out")
    assert list((tmp_path / "out" / "done").iterdir()) == []


def test_two_processes_do_not_work_in_one_directory(tmp_path):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="another process is working"):
            run(stage(count), tmp_path)


def test_a_damaged_manifest_is_refused(tmp_path):
    run(stage(count), tmp_path)
    path = tmp_path / "manifest.json"
    body = json.loads(path.read_text())
    body["totals"]["seen"]["all"] = 11
    path.write_text(json.dumps(body))
    with pytest.raises(ValueError, match="its contents do not give its fingerprint"):
        read_stage(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        read_stage(tmp_path)


def test_files_share_tasks_in_order_up_to_a_size(tmp_path):
    sizes = [TASK_BYTES // 2, TASK_BYTES // 2, 1, TASK_BYTES * 3, 5, 6]
    inputs = [Input(name=str(n), location=tmp_path, num_bytes=size, sha256="") for n, size in enumerate(sizes)]
    tasks = make_tasks(inputs)
    assert [[int(item.name) for item in task.inputs] for task in tasks] == [[0, 1], [2], [3], [4, 5]]
    assert [task.index for task in tasks] == [0, 1, 2, 3]


def test_raw_files_are_found_by_suffix_in_the_order_of_their_names(tmp_path):
    for name in ("b/2.jsonl", "a.jsonl.zst", "b/1.txt", "b/picture.png", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [item.name for item in raw_inputs(tmp_path)] == ["a.jsonl.zst", "b/1.txt", "b/2.jsonl"]
    assert [item.name for item in raw_inputs(tmp_path / "b" / "2.jsonl")] == ["2.jsonl"]


def test_what_links_lead_to_is_read_once(tmp_path, capsys):
    """As in the cache of the Hugging Face hub, where files of two revisions are links to one."""
    for name in ("raw/x.jsonl", "blob"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    for name, target in (("a.jsonl", "x.jsonl"), ("b.jsonl", "../blob"), ("c.jsonl", "../blob")):
        (tmp_path / "raw" / name).symlink_to(target)
    assert [item.name for item in raw_inputs(tmp_path / "raw")] == ["b.jsonl", "x.jsonl"]
    said = capsys.readouterr().err
    assert f"a.jsonl links to {tmp_path / 'raw' / 'x.jsonl'}, which is read already" in said
    assert f"c.jsonl links to {tmp_path / 'blob'}, which is read already" in said


@pytest.mark.parametrize("name", ["a.jsonl", "__init__.txt", "a.parquet"])
def test_an_empty_file_may_come_first(tmp_path, name, capsys):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).write_bytes(b"")
    write_raw(tmp_path / "raw" / "b.jsonl", [made_up_text(seed=1)], source="A")
    code = main(["corpus", "clean", f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'clean'}", "--workers=1"])
    if name.endswith(".parquet"):
        assert code == 1 and "a.parquet cannot be used: its name ends in .parquet, but it is empty" in (
            capsys.readouterr().err
        )
    else:
        assert code == 0 and read_stage(tmp_path / "clean")["outputs"][0]["num_documents"] == 1
    assert len(make_tasks([Input(name="", location=tmp_path, num_bytes=0, sha256="")] * 3)) == 1


def test_a_name_that_is_not_utf8_is_escaped(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "caf\udce9.txt").write_text(made_up_text(seed=1))
    assert (
        main(["corpus", "clean", f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'clean'}", "--workers=1"]) == 0
    )
    output = tmp_path / "clean" / read_stage(tmp_path / "clean")["outputs"][0]["file"]
    assert [record.id for record in read_records(output)] == ["caf\\xe9.txt"]


def test_the_time_left_is_known_when_it_can_be():
    """Of two shards as large, the second goes on while its text is counted; before one is done nothing is known."""
    progress = Progress("x", num_tasks=3, num_done=0, weights=[100, 100, 200], log=print)
    assert progress.seconds_left(5) is None
    progress.add(10, 500)
    assert progress.seconds_left(5) is None  # what share of the shard that is, nobody knows
    progress.add(10, 500)
    progress.task_done(100, 1000)
    assert progress.seconds_left(10) == 30
    progress.add(10, 1000)
    progress.add(10, 1000)  # half of the largest and the other one, none of them done
    assert progress.seconds_left(30) == 10
    progress.add(10, 2000)
    assert progress.seconds_left(40) is None  # more text than was thought
    progress.task_done(100, 1000)
    progress.task_done(200, 3000)
    assert progress.seconds_left(50) == 0
    unknown = Progress("one task", num_tasks=1, num_done=0, weights=[1], log=(said := []).append)
    unknown.add(1, 100)
    unknown.report()
    assert "ETA unknown" in said[0]
    first = Progress("of one large file", num_tasks=1, num_done=0, weights=[2000], log=print)
    assert first.eta(5) == "unknown"
    first.add(1, 500)
    assert first.eta(10) == "at least 0:00:30"
    first.add(1, 1500)
    assert first.eta(40) == "unknown"  # a compressed file


def test_an_error_of_writing_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with (
        pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'a'}'"),
        AtomicFile(tmp_path / "a") as file,
    ):
        file.write(b"x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("enter", [lambda folder: run(stage(count), folder), lambda folder: enter_command(folder)])
def test_a_directory_of_other_things_is_not_written_to(tmp_path, enter):
    folder = tmp_path / "documents"
    for name in ("work/mine", "done"):  # folders of a stage have such names too
        (folder / name).mkdir(parents=True)
    (folder / ".mine.tmp").write_text("not a stage's")
    with pytest.raises(ValueError, match="documents holds other things, .mine.tmp for one, and no stage's work; give"):
        enter(folder)
    assert sorted(path.name for path in folder.iterdir()) == [".mine.tmp", "done", "work"]
    (folder / ".mine.tmp").unlink()
    enter(folder)  # may be of a stage that was killed at its beginning


def test_a_directory_of_steps_is_known_by_their_plans(tmp_path):
    run(stage(count), tmp_path / "work" / "step")
    (tmp_path / "documents.jsonl").write_text("an output")
    enter_command(tmp_path)
    (tmp_path / "work" / "step" / "plan.json").unlink()
    with pytest.raises(ValueError, match="holds other things, documents.jsonl for one"):
        enter_command(tmp_path)


def enter_command(folder):
    with only_command(folder, inputs=[]):
        pass
