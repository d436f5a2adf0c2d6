"""An evaluation by several processes: what the first one tells the others.

Two real ones are in tests/train/test_checkpoint_pair.py, and whole commands in benchmarks/evaluate_processes.py.
"""

import json

import pytest

from btlm_jax.evaluate import processes, results, scorer
from btlm_jax.evaluate.results import Results
from btlm_jax.stopping import ProcessesDifferError


def test_the_others_are_told_what_is_done_and_write_nothing(tmp_path, monkeypatch, capsys):
    told, asked = [], []

    def make(work):
        work.begin([3, 3, 3], unit_name="tokens")
        for number in range(3):
            if work.done(number) is None:
                asked.append(number)
                work.add(number, 10 * number)
            if len(asked) == stop_after:
                raise KeyboardInterrupt
        return {"values": [work.done(number) for number in range(3)]}

    def as_first(value):
        told.append(json.loads(json.dumps(value)))
        return value

    monkeypatch.setattr(results, "of_first", as_first)
    stop_after = 2
    first = Results(tmp_path / "first", identity={})
    with pytest.raises(KeyboardInterrupt):
        first.measure("part", {}, make)
    told.clear()
    asked.clear()
    stop_after = 9
    found = first.measure("part", {}, make)
    assert (asked, told) == ([2], [None, [[0, 0], [1, 10]]])
    assert first.measure("part", {}, make) == found and told[2:] == [found]

    def as_another(value):
        assert value is None
        return told.pop(0)

    capsys.readouterr()
    monkeypatch.setattr(results, "of_first", as_another)
    for module in (processes, results):
        monkeypatch.setattr(module, "is_first", lambda: False)
    asked.clear()
    another = Results(tmp_path / "another", identity={})
    assert another.measure("part", {}, make) == found and asked == [2]
    assert another.measure("part", {}, make) == found and asked == [2] and not told
    assert not another.folder.exists() and capsys.readouterr().err == ""


def test_processes_agree_on_what_is_measured_before_it_is(tmp_path, monkeypatch):
    agreed = []

    class Others:
        def agree(self, name, facts):
            agreed.append((name, facts))
            if "other documents" in facts["part of a, documents"]:
                raise ProcessesDifferError("the processes of this run differ")

    monkeypatch.setattr(results.stopping, "current", Others)
    kept = Results(tmp_path, identity={"model": "m"})
    for _ in range(2):
        assert kept.measure("part", {"documents": "d"}, lambda work: {}, what=" of a") == {}
    assert agreed[0][1] == {"part of a, model": '"m"', "part of a, part": '"part"', "part of a, documents": '"d"'}
    assert agreed[0][0] != agreed[1][0] and agreed[0][1] == agreed[1][1]  # under a new name each time
    with pytest.raises(ProcessesDifferError):
        kept.measure("part", {"documents": "other documents"}, lambda work: pytest.fail("measured"), what=" of a")


def test_a_process_that_is_out_of_memory_alone_does_not_go_on(monkeypatch):
    def nobody_comes(*, key, timeout_ms):
        raise TimeoutError(key)

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("btlm_jax.parallel.rendezvous.make_rendezvous", lambda: nobody_comes)
    with pytest.raises(MemoryError, match="process 0 has too little, and others have not"):
        scorer.wait_for_halving()
