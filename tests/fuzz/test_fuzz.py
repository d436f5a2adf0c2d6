"""Mutated inputs with a fixed seed: every reader accepts them or says in our own words what is wrong."""

import pytest
from fuzz import inputs

from btlm_jax import notices

COUNT = 40  # of each of some thirty readers; tests/fuzz/run.py takes more


@pytest.fixture(scope="module")
def targets(tmp_path_factory, token_store):
    made = [inputs.targets(group, tmp_path_factory.mktemp(group), store=token_store) for group in inputs.GROUPS]
    return [target for group in made for target in group]


@pytest.mark.slow
def test_mutated_inputs_are_accepted_or_named(targets, monkeypatch):
    monkeypatch.setattr(notices, "_is_muted", True)
    faults, tried = [], 0
    for target in targets:
        result = inputs.run(target, count=COUNT, seed=0)
        tried += result.tried
        faults += [f"{target.name}: {kind}: {data[:200]!r}" for kind, (data, _) in result.faults.items()]
    assert not faults, "\n".join(faults)
    assert len(targets) >= 25 and tried == len(targets) * (COUNT + 1)


def test_a_valid_input_is_accepted_and_a_fault_is_found(targets):
    for target in targets:
        target.read(target.valid)
    broken = inputs.Target(name="broken", valid=b'{"a": 1}', read=lambda data: int(data), is_json=True)
    assert inputs.run(broken, count=9, seed=1).num_faults >= 9
