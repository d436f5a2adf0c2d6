"""A run goes on with other numbers of devices: same order, same tokens in each step, to the token.

benchmarks/elastic.py does it with the real step in real processes.
"""

import types

import jax
import numpy as np
from support.loop_run import CHANGES, PRIME, digest, train
from support.tiny import tiny_config

from btlm_jax.data.reader import open_store
from btlm_jax.data.store import TRAIN
from btlm_jax.parallel.make_mesh import make_run_mesh
from btlm_jax.train import loop


def test_a_run_goes_on_with_1_2_4_and_8_devices_and_back_to_the_token(token_store, tmp_path, monkeypatch):
    store = open_store(token_store, expected_fingerprint="")
    parts = [(1, 2), (2, 5), (4, 6), (8, 9), (2, 11), (1, 14), (4, 0)]
    found, whole = (train(tmp_path / name, store, monkeypatch, p) for name, p in (("elastic", parts), ("1", [(1, 0)])))
    assert found.outcomes == [loop.PREEMPTED] * 6 + [loop.DONE]
    assert found.steps == whole.steps and (found.final == whole.final).all() and len(whole.steps) == 16

    assert [step for step, _ in found.evaluations] == [step for step, _ in whole.evaluations] == [4, 8, 9, 12]
    assert dict(found.evaluations)[9] == 9 and dict(whole.evaluations)[9] < 9  # the part that stops at 9 saves alone

    stopped = {"optimizer__schedule": "constant", "optimizer__end_learning_rate": 0.0}
    made = [train(tmp_path / "shorter", store, monkeypatch, [part], **stopped, **changes) for part, changes in (
        ((1, 12), {}), ((1, 0), {"curriculum__num_tokens": (9 * 384, 3 * 384)}),
    )]  # fmt: skip
    assert [step for each in made for step, _ in each.evaluations] == [4, 8, 9]  # what follows step 12 is the end's

    config = tiny_config(**CHANGES)
    order, reader = loop._make_loader(
        types.SimpleNamespace(
            config=config, token_store=store, most_documents=1,
            mesh=make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices()[:1]),
        )
    ).order, store.split(TRAIN)  # fmt: skip
    w = 1
    for phase in config.curriculum.table.phases:  # by hand, from the blocks
        for step in range(phase.first_step, phase.end_step):
            first = (step - phase.first_step) * phase.batch_size
            rows = []
            for window in order.windows(phase, sequences=range(first, first + phase.batch_size)):
                (block,) = reader.read_many([window.block])
                begin = window.window * phase.seq_len
                rows.append(block.tokens[begin : begin + phase.seq_len])
            number = int(digest(np.stack(rows).astype(np.int32)))
            assert whole.steps[step + 1][0] == number
            w = (3 * w + number) % PRIME
    assert (whole.final == w).all()
