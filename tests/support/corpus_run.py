"""The stages of the corpus one after the other, by any workers."""

from pathlib import Path

import pytest
from support import tiny_tokenizers
from support.corpus_files import made_up_text, write_raw

from btlm_jax.corpus.engine.workers import Workers
from btlm_jax.corpus.stages.clean import CleanConfig, clean
from btlm_jax.corpus.stages.dedup import deduplicate
from btlm_jax.corpus.stages.split import SplitConfig, split
from btlm_jax.corpus.stages.tokenize import TokenizeConfig, tokenize


def make_store(folder: Path, workers: Workers) -> Path:
    """Go from four raw files with duplicates to a token store, and return the folder of all stages."""
    texts = [made_up_text(seed=seed % 50) for seed in range(60)]
    for number in range(4):
        write_raw(folder / "raw" / f"{number}.jsonl", texts[number::4], source=f"S{number % 2}")
    tiny_tokenizers.write_gpt2_files(folder / "bpe")
    by = {"workers": workers, "log": print}
    cleaning = CleanConfig(inputs=(folder / "raw",), default_source="none", on_bad_file="fail", max_bad_rate=0.0)
    splitting = SplitConfig(
        input=folder / "dedup",
        validation=0.2,
        test=0.1,
        seed=0,
        weights={},
        evaluation=(),
        evaluation_rule="by-script",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("btlm_jax.corpus.engine.inputs.TASK_BYTES", 1)
        clean(cleaning, output=folder / "clean", **by)
    deduplicate(folder / "clean", preset="slimpajama", output=folder / "dedup", **by)
    split(splitting, output=folder / "split", **by)
    tokenizing = TokenizeConfig(
        input=folder / "split", tokenizer=folder / "bpe", block_len=64, by_source=False, allow_lossy=False
    )
    tokenize(tokenizing, output=folder / "store", **by)
    return folder
