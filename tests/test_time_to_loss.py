"""benchmarks/time_to_loss.py: bits per byte by hand, the peers' sizes and learning, times off curves, the search."""

import itertools
import math
import sys

import jax
import numpy as np
import pytest
from support.tiny import REPOSITORY

torch = pytest.importorskip("torch")
sys.path.append(str(REPOSITORY / "benchmarks"))
import loss_curves  # noqa: E402
import steps  # noqa: E402
import time_to_loss  # noqa: E402
import torch_trainers  # noqa: E402

from btlm_jax.parallel.make_mesh import make_mesh  # noqa: E402
from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer, train_sentencepiece  # noqa: E402
from btlm_jax.train.program import make_program  # noqa: E402

PEERS = (time_to_loss.GPT, time_to_loss.CHAT)


@pytest.fixture(autouse=True)
def one_thread():
    """Let PyTorch compute in one thread: two that share a core with other tests wait for each other."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def test_bits_per_byte_counts_the_utf8_of_the_target_pieces():
    text = "na\u00efve  \u25b2 caf\u00e9\n\ta line of \U0001f600\n"  # pieces, and bytes of what the model has not seen
    model = train_sentencepiece(["a line of words, a line of letters\n" * 20], vocab_size=300)
    tokenizer = SentencePieceTokenizer(model)
    ids = [tokenizer.eos_id, *tokenizer.encode(text), tokenizer.eos_id]
    num_bytes = loss_curves.piece_bytes(model)[ids].sum()
    assert num_bytes == len(text.encode()) == 34
    # Four nats a token: 4 / 0.693147... bits for each id, over the bytes.
    assert loss_curves.bits_per_byte(4.0 * len(ids), num_bytes) == pytest.approx(4 * len(ids) / 0.69314718 / 34)


def test_peers_have_ours_parameters_within_three_percent():
    program = make_program(steps.read_config(batch=2, length=512), make_mesh(devices=jax.devices()[:1], tensor=1))
    ours = sum(leaf.size for leaf in jax.tree.leaves(program.state.params))
    D, V, T, L = 256, 4096, 512, 4
    by_hand = {time_to_loss.GPT: V * D + T * D + L * (12 * D * D + 2 * D) + D}
    D = 224
    by_hand[time_to_loss.CHAT] = 2 * V * D + L * 12 * D * D + 24 + 2 + 2 * L  # smear, backout, two scales a layer
    for peer, shape in time_to_loss.FULL.peers.items():
        with torch.device("meta"):
            model = torch_trainers.MODELS[peer](torch_trainers.Shape(**shape))
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == by_hand[peer]
        assert abs(count / ours - 1) < 0.03, (peer, count, ours)


@pytest.mark.parametrize("shape", [(2, 24, 40), (3, 40, 24)])
def test_muon_s_update_is_nearly_the_orthogonal_factor(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x / x.norm(dim=-1, keepdim=True)  # rows of one norm, which is what it brings rows to
    found = torch_trainers.orthogonalize(x, torch.float32)
    U, _, Vh = np.linalg.svd(x.numpy(), full_matrices=False)
    wanted, least = U @ Vh, min(shape[1:])
    assert found.norm(dim=(-2, -1)).numpy() == pytest.approx(math.sqrt(least))
    assert (found.numpy() * wanted).sum((-2, -1)) / least == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_learns_within_its_budget_and_evaluates_in_time_that_is_not_counted(peer):
    shape = dict(vocab_size=48, num_layers=2, d_model=32, num_heads=2, block_len=20)
    tokens = np.resize(np.random.default_rng(0).permutation(48)[:17], 4000).astype(np.uint16)  # a cycle of 17
    heldout = np.stack([tokens[:21], tokens[30:51]])
    spec = dict(
        peer=peer, form="eager, float32", shape=shape, rows=8, rate=8.0, expected_tokens=160 * 60, seed=0,
        seconds=240.0, evaluations=3,
    )  # fmt: skip
    ticks, records = itertools.count(), []

    def record(step, nats):
        both, first, part = (nats(heldout[:n], [20, 20][:n]) for n in (2, 1, 1))
        assert first == part < both
        assert nats(heldout, [20, 5]) < both
        records.append((step, both / 40))

    done = torch_trainers.train(spec, tokens=tokens, record=record, counted=lambda: float(next(ticks)))
    assert done["steps"] == records[-1][0] and len(records) in (3, 4)
    assert 200 < next(ticks) <= 241  # ticks
    assert records[-1][1] < records[0][1] and records[-1][1] < 0.8 * math.log(48), records


def test_times_and_values_are_read_off_the_lines_between_evaluations():
    curve = [(10.0, 3.0), (20.0, 2.5), (40.0, 2.3), (50.0, 2.4)]
    assert loss_curves.seconds_to(2.4, curve) == pytest.approx(30.0)
    assert loss_curves.seconds_to(3.0, curve) == 10.0 and loss_curves.seconds_to(2.2, curve) is None
    assert loss_curves.value_after(45.0, curve) == pytest.approx(2.35) and loss_curves.value_after(60.0, curve) == 2.4


def test_the_search_goes_up_a_move_that_helps_and_never_back():
    def bits(setting):
        return abs(math.log2(setting["rate"]) - 2) + abs(math.log2(setting["batch"] / 1024))

    tried = []
    while (setting := time_to_loss.next_setting(time_to_loss.GPT, tried)) is not None:
        tried.append((setting, bits(setting)))
    rates_and_batches = [(setting["rate"], setting["batch"]) for setting, _ in tried]
    assert rates_and_batches == [(1, 1024), (2, 1024), (4, 1024), (8, 1024), (4, 2048), (4, 512)]
