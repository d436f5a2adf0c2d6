"""A workdir in a bucket, of two processes whose folders are of different machines."""

import contextlib

import tensorstore

from btlm_jax.storage import bucket


def end_copying(mirror):
    """End the copying in the background, as a kill does."""
    mirror._closed.set()
    if mirror._thread:
        mirror._thread.join()


@contextlib.contextmanager
def opened_pair(url, monkeypatch, tmp_path, *, run="1"):
    """Yield the workdir of each of two processes of a run, whose folders are of different machines."""
    with contextlib.ExitStack() as stack:
        pair = []
        for index in range(2):
            monkeypatch.setenv(bucket.STAGING_VARIABLE, str(tmp_path / f"machine-{index}"))
            mirror = stack.enter_context(bucket.opened_for_run(url, index=index, count=2))
            mirror.run = run
            stack.callback(end_copying, mirror)
            mirror.begin()
            end_copying(mirror)  # so that it is known which write comes when
            pair.append(mirror)
        monkeypatch.setenv(bucket.STAGING_VARIABLE, str(tmp_path / "staging"))
        yield pair


def database(path):
    spec = {"driver": "ocdbt", "base": f"file://{path}/"}
    return tensorstore.KvStore.open(spec).result()


def write_part(mirror, step, *, index, text=""):
    """Write what orbax leaves where a process saves its own part: also a database of all that has only this part."""
    folder = mirror.folder / "checkpoints" / str(step)
    for place in ("state", f"state/ocdbt.process_{index}"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        database(folder / place)[f"w/{index}"] = f"{step}{text}: {index}".encode() * 99
    (folder / "digests").mkdir()
    (folder / "digests/metadata").write_text(f"hashes of {step}{text}")


def whole(folder, step):
    """Return what is in a checkpoint's database of all."""
    bucket.fetch(folder / "checkpoints" / str(step))
    return database_of(folder, step)


def database_of(folder, step):
    """Return the same of one whose files are there."""
    found = database(folder / "checkpoints" / str(step) / "state")
    return {key.decode(): found[key].decode()[: len(f"{step}: 0")] for key in found.list().result()}
