"""The order with weights: exact shares, every window of a source once an epoch, the same wherever it is read."""

import collections
import dataclasses
import functools
import re
from unittest import mock

import jax
import numpy as np
import pytest
from grain.experimental import index_shuffle
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.loader import make_loader, make_mesh
from support.tiny_store import write_store

from btlm_jax.data import store
from btlm_jax.data.loader import needed_rows
from btlm_jax.data.mixed_order import MixedOrder, Stream, make_mixed_order
from btlm_jax.data.order import TrainingOrder, derived_seed
from btlm_jax.data.reader import open_store
from btlm_jax.data.verify import verify
from btlm_jax.recipe.curriculum import make_curriculum
from btlm_jax.recipe.mixture import parse_weights

NAMES = ("books", "code", "web")


def streams_of(num_blocks: list[int]) -> tuple[Stream, ...]:
    firsts = np.cumsum([0, *num_blocks]).tolist()
    return tuple(Stream(*each, 16 * each[-1]) for each in zip(NAMES, firsts, num_blocks, strict=False))


def windows_of_phases(order: MixedOrder) -> list[list[tuple[int, int, int]]]:
    """Return (source, block of it, window) of every sequence of each phase, in order."""
    phases = []
    for phase in order.curriculum.phases:
        rows = []
        for window in order.windows(phase, sequences=range(phase.num_steps * phase.batch_size)):
            source = max(n for n, stream in enumerate(order.streams) if stream.first_block <= window.block)
            block = window.block - order.streams[source].first_block
            assert block < order.streams[source].num_blocks and 0 <= window.window < order.block_len // phase.seq_len
            rows.append((source, block, window.window))
        phases.append(rows)
    return phases


@functools.cache
def permutation(length: int, seed: int) -> list[int]:
    return np.random.default_rng([length, seed]).permutation(length).tolist()


# Permutations that take no milliseconds for a few blocks; those of Grain have a test of their own.
quickly_permuted = mock.patch(
    "btlm_jax.data.order._permuted", lambda index, *, length, seed: permutation(length, seed)[index]
)


@st.composite
def mixtures(draw):
    """Draw an order of 1 to 3 phases on 1 to 3 sources."""
    lengths = draw(st.lists(st.sampled_from([2, 4, 8]), min_size=1, max_size=3))
    tokens_per_step = 8 * draw(st.integers(1, 3))
    num_blocks = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    weights = st.lists(st.integers(0, 7), min_size=len(num_blocks), max_size=len(num_blocks)).filter(any)
    return MixedOrder(
        curriculum=make_curriculum(
            seq_len=tuple(lengths),
            batch_size=tuple(tokens_per_step // length for length in lengths),
            num_tokens=tuple(draw(st.integers(1, 12)) * tokens_per_step for _ in lengths),
        ),
        streams=streams_of(num_blocks),
        weights=tuple(tuple(draw(weights)) for _ in lengths),
        block_len=max(lengths) * draw(st.sampled_from([1, 2])),
        seed=draw(st.integers(0, 1)),
    )


@quickly_permuted
@settings(max_examples=120, deadline=None)
@given(mixtures())
def test_shares_are_exact_and_a_source_is_read_once_an_epoch(order):
    """By brute force: what an epoch of a source has is counted from the windows alone."""
    pieces = order.block_len // 2  # a window of any length is some of these
    read = [[] for _ in order.streams]  # of each source every piece, in the order of reading
    unread = 0
    for phase, rows in zip(order.curriculum.phases, windows_of_phases(order), strict=True):
        weights = order.weights[phase.index]
        counts = collections.Counter()
        for number, (source, block, window) in enumerate(rows, start=1):
            counts[source] += 1
            for each, weight in enumerate(weights):
                assert abs(counts[each] * sum(weights) - number * weight) < sum(weights)
            width = phase.seq_len // 2
            read[source] += range(block * pieces + window * width, block * pieces + (window + 1) * width)
        for own in read:
            if phase != order.curriculum.phases[-1]:
                missing = -len(own) % pieces
                own += [None] * missing  # of a block that the phase ends in
                unread += 2 * missing
    use = order.check_capacity(max_epochs=10**6)
    assert use.num_unread == unread
    for stream, own, of_source in zip(order.streams, read, use.sources, strict=True):
        per_epoch = stream.num_blocks * pieces
        assert of_source.num_tokens == 2 * sum(piece is not None for piece in own)
        assert of_source.epochs == pytest.approx(len(own) / per_epoch)
        for start in range(0, len(own), per_epoch):
            epoch = [piece for piece in own[start : start + per_epoch] if piece is not None]
            assert len(set(epoch)) == len(epoch)


@quickly_permuted
@settings(max_examples=40, deadline=None)
@given(mixtures(), st.integers(1, 4), st.integers(2, 5), st.randoms(use_true_random=False))
def test_a_longer_last_phase_and_scaled_weights_are_the_same_order(order, more_steps, factor, rng):
    expected = windows_of_phases(order)
    phases = order.curriculum.phases
    longer = MixedOrder(
        curriculum=make_curriculum(
            seq_len=tuple(phase.seq_len for phase in phases),
            batch_size=tuple(phase.batch_size for phase in phases),
            num_tokens=(
                *(phase.num_tokens for phase in phases[:-1]),
                phases[-1].num_tokens + more_steps * order.curriculum.tokens_per_step,
            ),
        ),
        streams=order.streams,
        weights=order.weights,
        block_len=order.block_len,
        seed=order.seed,
    )
    found = windows_of_phases(longer)
    assert found[:-1] == expected[:-1] and found[-1][: len(expected[-1])] == expected[-1]
    texts = []
    for weights in order.weights:
        parts = [f"{stream.source}={weight * factor}" for stream, weight in zip(order.streams, weights, strict=True)]
        rng.shuffle(parts)
        texts.append(",".join(parts))
    sources = {
        stream.source: store.Source(
            num_documents=0, num_bytes=0, num_tokens=0, first_block=stream.first_block, num_blocks=stream.num_blocks
        )
        for stream in order.streams
    }
    again = make_mixed_order(
        manifest_of(sources, block_len=order.block_len),
        curriculum=order.curriculum,
        weights=parse_weights(";".join(texts)),
        seed=order.seed,
    )
    assert windows_of_phases(again) == expected


def manifest_of(sources: dict[str, store.Source], *, block_len: int) -> store.Manifest:
    count = sum(source.num_blocks for source in sources.values())
    split = store.Split(num_blocks=count, num_tokens=0, shards=(), sources=sources)
    return store.Manifest(
        block_len=block_len,
        dtype="uint16",
        tokenizer=store.TokenizerInfo(kind="sentencepiece", file="t", sha256="", vocab_size=9, eos_id=0),
        splits={store.TRAIN: split},
        features=(store.SOURCES,),
        made_by={},
    )


def two_sources(**changes) -> MixedOrder:
    """Phase 1: 40 windows of a quarter of a block, 30 of them of books; phase 2: 8 blocks, 2 of books."""
    values = {
        "curriculum": make_curriculum(seq_len=(4, 16), batch_size=(8, 2), num_tokens=(5 * 32, 4 * 32)),
        "streams": streams_of([6, 31]),
        "weights": ((3, 1), (1, 3)),
        "block_len": 16,
        "seed": 7,
    }
    return MixedOrder(**{**values, **changes})


def test_a_source_is_read_by_the_documented_permutations():
    order = two_sources()
    first, last = order.curriculum.phases
    # 30 windows of books are 7.5 blocks: 6 of epoch 0 and 2 of epoch 1, whose last half stays unread.
    books = [window for source, *window in windows_of_phases(order)[0] if source == 0]
    for number in (0, 5, 23, 24, 29):
        epoch, index = divmod(number, 24)
        length = (24, 8)[epoch]
        seed = derived_seed("windows", 7, 0, epoch, "books")
        place = index_shuffle(index=index, max_index=length - 1, seed=seed, rounds=4)
        seed = derived_seed("blocks", 7, epoch, "books")
        block = index_shuffle(index=place // 4, max_index=5, seed=seed, rounds=4)
        assert books[number] == [block, place % 4]
    books = [window for source, *window in windows_of_phases(order)[1] if source == 0]
    seed = derived_seed("blocks", 7, 1, "books")
    assert books == [[index_shuffle(index=place, max_index=5, seed=seed, rounds=4), 0] for place in (2, 3)]
    assert order.epochs_seen(0) == {"epochs/books": 0, "epochs/code": 0}
    assert order.epochs_seen(3) == {"epochs/books": 18 / 24, "epochs/code": 6 / 124}
    assert order.epochs_seen(5) == {"epochs/books": 8 / 6, "epochs/code": 3 / 31}
    assert order.epochs_seen(9) == {"epochs/books": 10 / 6, "epochs/code": 9 / 31}


def test_the_order_stays_the_same_between_versions():
    """A resumed run reads on in the order it began in, so these numbers may never change, under a new Grain either."""
    order = two_sources()
    first, last = order.curriculum.phases
    windows = order.windows(first, sequences=range(6)) + order.windows(last, sequences=range(4))
    assert [(window.block, window.window) for window in windows] == [
        *((1, 0), (3, 2), (5, 3), (33, 1), (2, 3), (3, 3)),
        *((31, 0), (21, 0), (0, 0), (13, 0)),
    ]


def test_a_source_alone_is_as_good_as_its_store_alone():
    """With the other left out: every block of it once, and no two epochs alike."""
    curriculum = make_curriculum(seq_len=(16,), batch_size=(2,), num_tokens=(31 * 2 * 32,))
    order = two_sources(curriculum=curriculum, weights=((0, 1),))
    [rows] = windows_of_phases(order)
    epochs = [[block for _, block, _ in rows[start : start + 31]] for start in range(0, 124, 31)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(31))] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = windows_of_phases(two_sources(curriculum=curriculum, weights=((0, 1),), seed=8))
    assert other != [rows]


def test_what_is_read_of_each_source_is_said():
    use = two_sources().check_capacity(max_epochs=2)
    assert str(use).splitlines() == [
        "288 tokens by data.weights, of each source at most data.max_epochs=2 epochs",
        "  phase 1: books 75.00%, code 25.00%",
        "  phase 2: books 25.00%, code 75.00%",
        "  books: 152 tokens (52.78%) = 1.667 epochs of 96, each epoch in another order",
        "  code: 136 tokens (47.22%) = 0.290 epochs of 496",
        "  16 tokens of blocks that phases end in stay unread in their epoch",
    ]
    assert use.to_json()["sources"]["books"] == {"tokens": 152, "epochs": 10 / 6, "tokens_per_epoch": 96}
    with pytest.raises(ValueError, match="read books 1.67 times, and data.max_epochs=1: raise it to 2, lower"):
        two_sources().check_capacity(max_epochs=1)
    alone = str(two_sources(weights=((1, 0), (1, 0))).check_capacity(max_epochs=3))
    assert "phase 1: books 100.00%, no code" in alone and "  code: none of its 496 tokens" in alone
    assert "worth less than new text" not in alone and "padding" not in alone
    few = two_sources(streams=(Stream("books", 0, 6, 83), Stream("code", 6, 31, 496)))
    assert "1.667 epochs of 96 (14% of it padding: the source" in str(few.check_capacity(max_epochs=2))
    assert "worth less than new text" in str(
        two_sources(streams=streams_of([2, 31])).check_capacity(max_epochs=5)
    )  # 10 blocks of 2


def test_a_phase_can_have_the_sources_as_the_store_has_them(token_store):
    order = make_mixed_loader(token_store, weights="natural; web=1,books=1,code=0").order
    assert order.weights == ((6, 9, 20), (1, 0, 1)) and order.streams[2].source == "web"


def test_windows_must_fit_each_source():
    with pytest.raises(ValueError, match="seq_len=4 of phase 1 does not divide .* 10"):
        two_sources(block_len=10)
    with pytest.raises(ValueError, match="4,294,967,296 windows of 4"):
        two_sources(streams=streams_of([6, (1 << 30) + 1]))


BLOCK_LEN, TOKENS = 16, {"books": 5 * 16 + 3, "code": 9 * 16, "web": 20 * 16}  # 6, 9 and 20 blocks
CURRICULUM = make_curriculum(seq_len=(4, 16), batch_size=(16, 4), num_tokens=(4 * 64, 3 * 64))
WEIGHTS = "web=5, books=2, code=0; code=1, web=2, books=1"


@pytest.fixture(scope="module")
def token_store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("store")
    write_store(
        directory, block_len=BLOCK_LEN, train_tokens=TOKENS, heldout_tokens={"web": 31}, blocks_per_shard=6
    )  # fmt: skip
    return open_store(directory, expected_fingerprint="")


def flat_batches(loader, *, first_step: int) -> dict[int, dict[str, np.ndarray]]:
    return {
        step: {name: np.asarray(leaf).reshape(-1, leaf.shape[-1]) for name, leaf in batch.items()}
        for step, batch in loader.batches(first_step=first_step)
    }


def assert_equal(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for step in left:
        for name in right[step]:
            np.testing.assert_array_equal(left[step][name], right[step][name])


def make_mixed_loader(token_store, **changes):
    return make_loader(token_store, **{"curriculum": CURRICULUM, "weights": WEIGHTS, "max_epochs": 2, **changes})


def test_batches_have_the_sources_by_weight_and_their_own_tokens(token_store):
    """A token says its source and its place there, so shares and order are seen in what is trained on."""
    assert verify(token_store.directory, log=print) == token_store.manifest
    batches = flat_batches(make_mixed_loader(token_store), first_step=0)
    assert list(batches) == list(range(7))
    seen = {name: [] for name in TOKENS}
    for step, batch in batches.items():
        sources = [list(TOKENS)[row[0] // 10_000] for row in batch["inputs_BT"]]
        for row in range(len(sources)):
            real = batch["targets_BT"][row][batch["weights_BT"][row] == 1]
            np.testing.assert_array_equal(batch["inputs_BT"][row][: len(real)], real - 1)
            seen[sources[row]] += real.tolist()
        rows = sum(len(batches[earlier]["inputs_BT"]) for earlier in range(0 if step < 4 else 4, step + 1))
        weights = {"web": 5, "books": 2, "code": 0} if step < 4 else {"web": 2, "books": 1, "code": 1}
        count = sum(source == "web" for source in sources)
        assert abs(count - len(sources) * weights["web"] / sum(weights.values())) < 2
        assert rows == (step + 1) * 16 if step < 4 else (step - 3) * 4
    assert {name: len(set(tokens)) for name, tokens in seen.items()}.keys() == TOKENS.keys()
    assert len(seen["web"]) == len(set(seen["web"])) and len(seen["code"]) == len(set(seen["code"])) == 3 * 16


@pytest.mark.parametrize("first_step", [1, 3, 4, 6, 7])
def test_starting_at_a_step_equals_having_run_to_it(token_store, first_step):
    expected = flat_batches(make_mixed_loader(token_store), first_step=0)
    resumed = flat_batches(make_mixed_loader(token_store, prefetch=1), first_step=first_step)
    assert_equal(resumed, {step: batch for step, batch in expected.items() if step >= first_step})


@pytest.mark.parametrize("accumulation, fsdp, tensor", [(1, 4, 1), (2, 2, 2), (4, 1, 8)])
def test_mesh_and_accumulation_do_not_change_a_batch(token_store, accumulation, fsdp, tensor):
    expected = flat_batches(make_mixed_loader(token_store), first_step=0)
    loader = make_mixed_loader(token_store, accumulation=accumulation, fsdp=fsdp, tensor=tensor)
    assert_equal(flat_batches(loader, first_step=0), expected)


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_hosts_read_parts_of_the_same_batch(token_store, num_hosts):
    loader = make_mixed_loader(token_store)
    placements, whole = list(loader._placements), {step: loader._read_step(step) for step in range(7)}
    for step in whole:
        phase = CURRICULUM.phase_at(step)
        indices = NamedSharding(make_mesh(4, 2), P(None, "fsdp")).devices_indices_map((1, phase.batch_size, 5))
        share = len(jax.devices()) // num_hosts
        for host in range(num_hosts):
            devices = jax.devices()[host * share : (host + 1) * share]
            rows = needed_rows([indices[device] for device in devices], rows_shape=(1, phase.batch_size))
            assert len(rows) == phase.batch_size // num_hosts
            loader._placements[phase.index] = dataclasses.replace(placements[phase.index], row_numbers=rows)
            for name, leaf in loader._read_step(step).items():
                np.testing.assert_array_equal(leaf, whole[step][name][rows])


def test_without_weights_a_store_of_format_2_is_read_as_one_of_format_1(token_store):
    order = make_loader(token_store, curriculum=CURRICULUM, max_epochs=1).order
    assert order == TrainingOrder(curriculum=CURRICULUM, num_blocks=35, block_len=BLOCK_LEN, seed=5)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("web=1,books=1,code=1,wbe=2", "names 'wbe', which the token store does not have; its sources are 'books', "),
        (
            "web=-1,books=1,code=1",
            "names 'web=-1,books', which .*; a weight is a number such as 3 or 0.25, and what is none",
        ),
        ("web=1,books=1", "says nothing of 'code'; give each source of the token store a number in every"),
        ("web=1,books=1,code=1;web=1,code=1", "says nothing of 'books'"),
    ],
)
def test_names_that_are_not_the_stores_are_refused(token_store, weights, said):
    with pytest.raises(ValueError, match=said):
        make_mixed_loader(token_store, weights=weights)


def test_weights_on_a_store_of_format_1_are_refused_with_the_command(tmp_path):
    write_store(tmp_path, block_len=16, train_tokens=500, heldout_tokens={"a": 31}, blocks_per_shard=6)
    command = "btlm corpus tokenize --by_source --input=SPLIT --tokenizer=TOKENIZER --block_len=16 --output=NEW_STORE"
    with pytest.raises(ValueError, match=f"of format 1, has one of all.*\n  {re.escape(command)}"):
        make_mixed_loader(open_store(tmp_path, expected_fingerprint=""))
