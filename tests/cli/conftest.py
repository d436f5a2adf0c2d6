"""What several tests of verbs share."""

import pytest

from btlm_jax.train import loop


@pytest.fixture
def begun(monkeypatch):
    """(config, beginning) of each run that would be trained."""
    runs = []

    def train(config, **named):
        runs.append((config, named["beginning"]))
        return loop.DONE

    monkeypatch.setattr(loop, "train", train)
    return runs
