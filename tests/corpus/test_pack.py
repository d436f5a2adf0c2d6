"""Packing against a slow oracle: concatenate everything, then slice."""

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from hypothesis import given
from hypothesis import strategies as st

from btlm_jax.corpus.pack import pack, write_shard

EOS = 1


def test_records_have_their_fields_in_the_order_of_names(tmp_path):
    """TFDS's own serialiser has them in an order that changes from process to process."""
    path = tmp_path / "shard"
    shard = write_shard(path, blocks=pack([[7, 8, 9]] * 4, block_len=5, eos_id=EOS, dtype="uint16"))
    assert (shard.num_blocks, shard.num_bytes) == (4, path.stat().st_size)
    reader = ArrayRecordReader(str(path))
    for record in reader.read_all():
        assert 0 < record.index(b"num_targets") < record.index(b"tokens")


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
