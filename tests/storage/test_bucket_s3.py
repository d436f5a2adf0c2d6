"""A workdir in a bucket of S3: moto's server on loopback, through s3fs."""

import shutil

import fsspec
import pytest
from support.bucket_pair import end_copying, opened_pair, whole, write_part
from support.real_store import write_config
from support.run_command import ONE_PHASE, recorded, train_arguments
from support.run_here import run_here

from btlm_jax.storage import bucket

BUCKET = "bucket"


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret")):
            patch.setenv(name, value)
        moto_server = pytest.importorskip("moto.server", reason="moto is not installed")
        running = moto_server.ThreadedMotoServer(port=0, verbose=False)
        running.start()
        address, port = running.get_host_and_port()
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://{address}:{port}"})
        system = fsspec.filesystem("s3")
        system.mkdir(BUCKET)
        yield system
        running.stop()


@pytest.mark.slow
def test_a_run_in_s3(server, token_store, tmp_path, monkeypatch, capsys):
    url = f"s3://{BUCKET}/alone"
    monkeypatch.setenv(bucket.STAGING_VARIABLE, str(tmp_path / "staging"))
    config = write_config(tmp_path / "config.py", store=token_store, **ONE_PHASE)
    assert run_here(*train_arguments(config, url)) == 0
    shutil.rmtree(tmp_path / "staging")  # as if the next commands were on another machine
    assert run_here("checkpoints", url, "--verify") == 0 and run_here("status", url) == 0
    said = capsys.readouterr().out
    assert said.count("verified") == 2 and "step 3/3" in said
    assert (
        run_here(
            *train_arguments(config, url),
            "--config.curriculum.num_tokens=(1536,)",
            "--config.optimizer.schedule_tokens=1152",
        )
        == 0
    )
    folder = bucket.open_for_reading(url)
    assert [row["step"] for row in recorded(folder, "train")] == [1, 2, 3, 4]
    assert run_here(*train_arguments(config, f"s3://no-such/{tmp_path.name}")) == 1
    assert "there is no such bucket; choose another --workdir" in capsys.readouterr().err


def test_two_processes_in_s3(server, tmp_path, monkeypatch):
    url = f"s3://{BUCKET}/pair"
    with opened_pair(url, monkeypatch, tmp_path) as pair:
        (pair[0].folder / "metrics.jsonl").write_text("1\n")
        for index in (1, 0):
            write_part(pair[index], 3, index=index)
            pair[index].flush()
        (pair[0].folder / "metrics.jsonl").write_text("1\n2\n")
        write_part(pair[1], 6, index=1)
        pair[1].flush()
        for mirror in pair:
            end_copying(mirror)
    for index in range(2):
        shutil.rmtree(tmp_path / f"machine-{index}")
    with opened_pair(url, monkeypatch, tmp_path, run="2") as pair:
        for mirror in pair:
            assert whole(mirror.folder, 3) == {"w/0": "3: 0", "w/1": "3: 1"}
            assert [path.name for path in (mirror.folder / "checkpoints").iterdir()] == ["3"]
        assert (pair[0].folder / "metrics.jsonl").read_text() == "1\n"
    assert not [name for name in bucket.RemoteFolder(url).list() if "checkpoints/6" in name]
