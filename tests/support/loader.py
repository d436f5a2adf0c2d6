"""A small token store, and a loader over it."""

from pathlib import Path

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.tiny_store import write_store

from btlm_jax.data.loader import TrainLoader
from btlm_jax.data.reader import TokenStore
from btlm_jax.recipe.config import DataConfig
from btlm_jax.recipe.curriculum import Curriculum, make_curriculum

BLOCK_LEN, TRAIN_TOKENS = 16, 27 * 16 + 5  # 28 blocks, the last with 5 targets
HELDOUT_TOKENS = {"b": 50, "a": 31, "c": 16}  # 4, 2 and 1 blocks
CURRICULUM = make_curriculum(seq_len=(4, 16), batch_size=(16, 4), num_tokens=(4 * 64, 3 * 64))  # all 28 blocks


def write_tiny_store(directory: Path) -> None:
    write_store(
        directory,
        block_len=BLOCK_LEN,
        train_tokens=TRAIN_TOKENS,
        heldout_tokens=HELDOUT_TOKENS,
        blocks_per_shard=6,
    )


def make_mesh(fsdp: int, tensor: int):
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), devices=jax.devices()[: fsdp * tensor])


def make_loader(
    token_store: TokenStore,
    *,
    curriculum: Curriculum = CURRICULUM,
    accumulation: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    seed: int = 5,
    max_epochs: int = 1,
    weights: str = "",
    prefetch: int = 3,
    most_documents: int = 0,
) -> TrainLoader:
    return TrainLoader(
        token_store,
        curriculum=curriculum,
        data=DataConfig(
            store="store", seed=seed, max_epochs=max_epochs, weights=weights, prefetch=prefetch, document_mask=False
        ),
        accumulation=accumulation,
        shardings=[NamedSharding(make_mesh(fsdp, tensor), P(None, "fsdp")) for _ in curriculum.phases],
        most_documents=most_documents,
    )
