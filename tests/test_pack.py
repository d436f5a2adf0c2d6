"""Packing against a slow oracle: concatenate everything, then slice."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from btlm_jax.corpus.pack import pack

EOS = 1


@given(st.lists(st.lists(st.integers(2, 99), max_size=30), max_size=12), st.integers(1, 17))
def test_blocks_are_slices_of_one_stream(documents, block_len):
    stream = [EOS]
    for document in documents:
        stream += [*document, EOS]
    blocks = list(pack(documents, block_len=block_len, eos_id=EOS, dtype="uint16"))
    targets = []
    for index, block in enumerate(blocks):
        assert block.tokens.dtype == np.uint16 and len(block.tokens) == block_len + 1
        expected = stream[index * block_len : index * block_len + block_len + 1]
        assert block.tokens.tolist() == expected + [EOS] * (block_len + 1 - len(expected))
        assert block.num_targets == len(expected) - 1 > 0
        targets += block.tokens[1 : block.num_targets + 1].tolist()
    assert targets == stream[1:]  # every token but the first EOS is a target exactly once
    assert all(block.num_targets == block_len for block in blocks[:-1])
