"""What fails in one process of several while they save and restore is heard of in all; the others are made up here."""

import pytest
from support.tiny import tiny_config

from btlm_jax import notices, stopping
from btlm_jax.parallel import rendezvous
from btlm_jax.stopping import AgreedError, OthersFailedError
from btlm_jax.train import checkpoint
from btlm_jax.train.checkpoint import Checkpointer, DamagedError


@pytest.fixture
def checkpointer(tmp_path):
    made = Checkpointer(tmp_path, config=tiny_config().checkpoint)
    yield made
    made.close()


@pytest.fixture
def say(monkeypatch):
    """Have another process, number 1, say what the test puts into the list; the next time it says nothing."""
    texts: list[str] = []
    monkeypatch.setattr(checkpoint.jax, "process_count", lambda: 2)
    monkeypatch.setattr(rendezvous, "texts_of_all", lambda text: [text, texts.pop() if texts else ""])
    monkeypatch.setattr(checkpoint, "_is_so_everywhere", lambda value: value)
    return texts


def fail(text):
    """Fail as a save does whose part could not be written, and which then met no other process."""
    try:
        raise OSError(text)
    except OSError:
        raise OthersFailedError(rendezvous.OTHERS_FAILED)  # noqa: B904  as orbax's `finally` does


@pytest.mark.parametrize("here", ["", "quota"])
def test_a_save_that_failed_is_an_error_in_all_which_names_the_process(checkpointer, say, monkeypatch, here):
    monkeypatch.setattr(checkpointer._manager, "wait_until_finished", lambda: fail(here) if here else None)
    say.append("no space left")
    with pytest.raises(AgreedError) as caught:
        checkpointer.wait()
    expected = "process 0: quota; process 1: no space left" if here else "process 1: no space left"
    assert caught.value.reason == expected and f"{expected}; there is none yet; free some space" in str(caught.value)
    checkpointer.close()  # says nothing more of it


def test_one_that_only_waited_for_the_others_says_so(checkpointer, say, monkeypatch):
    def fail_alone():
        raise OthersFailedError(rendezvous.OTHERS_FAILED)

    monkeypatch.setattr(checkpointer._manager, "wait_until_finished", fail_alone)
    say.append("no space left")
    with pytest.raises(AgreedError, match=r": process 1: no space left; there is none yet"):
        checkpointer.wait()


def test_training_goes_on_after_one_failed_save_in_any_process(checkpointer, say, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpointer, "_make_manager", lambda: checkpointer._manager)
    monkeypatch.setattr(checkpointer._manager, "close", lambda: None)
    monkeypatch.setattr(checkpointer, "save", lambda state, *, position, config: saved.append(position))
    notices.begin(strict=())
    say.append("no space left")
    checkpointer.save_or_go_on("state", position=1, config="config")
    assert saved == [1] and notices.counts() == {"save-failed": 1}
    say.append("no space left")  # of the save that began anew
    with pytest.raises(AgreedError, match="process 1: no space left"):
        checkpointer.save_or_go_on("state", position=2, config="config")
    assert saved == [1]


def test_what_only_one_process_knows_ends_it_in_place_of_going_on_alone(checkpointer, say, monkeypatch):
    """The others are at another exchange than the new manager's; this one ends with an error, and then they do."""

    def fail_here(state, *, position, config):
        raise OSError("the folder of an earlier save cannot be deleted")

    monkeypatch.setattr(checkpointer, "save", fail_here)
    monkeypatch.setattr(checkpointer, "_go_on_after", lambda error: pytest.fail("went on alone"))
    with pytest.raises(OSError, match="cannot be deleted"):
        checkpointer.save_or_go_on("state", position=1, config="config")
    checkpointer._failure = OSError("before")
    with pytest.raises(OSError, match="cannot be deleted"):
        checkpointer.retry("state", position=1, config="config")


def test_rules_that_one_process_cannot_follow_are_an_error_in_all(checkpointer, say, monkeypatch):
    monkeypatch.setattr(rendezvous, "value_of_first", lambda value: [])
    monkeypatch.setattr(checkpointer, "steps", lambda: [3])
    with pytest.raises(AgreedError, match=r"process 0: \[Errno 2\] No such file"):  # its folder is gone
        checkpointer._delete_by_rules()
    (checkpointer.directory / "3").mkdir()

    def refuse(step):
        raise OSError("quota")

    monkeypatch.setattr(checkpointer._manager, "delete", refuse)
    with pytest.raises(AgreedError, match="process 0: quota"):
        checkpointer._delete_by_rules()


def test_what_another_process_cannot_read_is_damaged_here_too(checkpointer, say):
    say.append("its part is missing")
    with pytest.raises(DamagedError) as caught:
        checkpointer._in_all(7, lambda: "read", errors=ValueError)
    assert caught.value.reason == "process 1: its part is missing"
    assert checkpointer._in_all(7, lambda: "read", errors=ValueError) == "read"


def test_what_a_signal_broke_is_not_damaged(checkpointer, monkeypatch):
    def read():
        raise RuntimeError("the loop is closed")  # as a library may say of an interrupt

    stop = stopping.Stop()
    monkeypatch.setattr(stopping, "current", lambda: stop)
    stop.heed("SIGTERM")
    with pytest.raises(stopping.Stopped):
        checkpointer._in_all(7, read, errors=Exception)
    with pytest.MonkeyPatch.context() as patch:  # of another command
        patch.setattr(stopping, "_is_interrupted", True)
        patch.setattr(stopping, "current", stopping.Stop)
        with pytest.raises(KeyboardInterrupt):
            checkpointer._in_all(7, read, errors=Exception)
    stop.stage = stopping.STEPPING  # there no handler raises
    with pytest.raises(DamagedError):
        checkpointer._in_all(7, read, errors=Exception)
