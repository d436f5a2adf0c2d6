"""Greedy continuations here, in transformers on the export and in llama.cpp on the GGUF are the same."""

import sys

import pytest
from support.tiny import REPOSITORY

pytest.importorskip("transformers")
sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import greedy_clients  # noqa: E402

from btlm_jax.convert import conversion  # noqa: E402


@pytest.mark.slow
def test_clients_write_the_same_texts(monkeypatch, tmp_path):
    monkeypatch.setattr(conversion, "has_transformers", lambda: False)  # it is asked below
    greedy_clients.random_model(tmp_path / "model")
    options = {"num_tokens": 12, "python": "", "prompts": greedy_clients.PROMPTS}
    found = greedy_clients.run(tmp_path / "model", tmp_path, **options)
    assert found.keys() == {"transformers", "llama.cpp"}
    for comparison in found.values():
        assert comparison.same_prompts == 20 and not comparison.differences, comparison
        assert comparison.near_ties <= 2 and comparison.same_texts >= 10


def test_a_difference_is_not_taken_for_a_near_tie():
    def continuation(*ids, prompt=(3,), margin=1.0, text="text"):
        return greedy_clients.Continuation(prompt=list(prompt), ids=list(ids), margins=[margin] * len(ids), text=text)

    mine = continuation(5, 6)
    for other, expected in (
        (mine, (1, 1, 0, 0)),
        (continuation(5, 7), (1, 0, 0, 1)),
        (continuation(5), (1, 0, 0, 1)),
        (continuation(5, 7, margin=9e-5), (1, 0, 1, 0)),
        (continuation(5, 6, prompt=(1, 3)), (0, 0, 0, 1)),
        (continuation(5, 6, text="other"), (1, 0, 0, 1)),
    ):
        found = greedy_clients.compare(["text"], [mine], [other])
        assert (found.same_prompts, found.same_texts, found.near_ties, len(found.differences)) == expected
