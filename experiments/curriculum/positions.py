"""The loss by position of a finished run, to 8 times its trained length and to 8 times the longest of all runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from btlm_jax.evaluate.positions import DYNAMIC, FIXED, PLAIN, Setting
from btlm_jax.recipe.config import TrainConfig

BEYOND = 8  # times the trained length, the longest windows
NUM_WINDOWS = 16  # of the longest; the others have the same tokens
FACTORS = (2.0, 8.0)  # that FIXED divides the slopes by


def settings_for(config: TrainConfig, *, longest: int) -> list[Setting]:
    """Return the curves of a run: slopes as trained in all lengths, and divided ones up to 8 times its own length."""
    trained = config.curriculum.table.block_len
    return [
        *(Setting(length=length, alibi=PLAIN, factor=1.0) for length in sorted({*own_lengths(trained), longest})),
        *(Setting(length=BEYOND * trained, alibi=FIXED, factor=factor) for factor in FACTORS),
        *(Setting(length=length, alibi=DYNAMIC, factor=1.0) for length in own_lengths(trained)[:-1]),
    ]


def own_lengths(trained: int) -> list[int]:
    """Return the lengths of windows that a run of a trained length is measured in: 2, 4 and 8 times that."""
    return [times * trained for times in (2, 4, BEYOND)]


def measure_positions_of(config: TrainConfig, workdir: Path) -> dict:
    """Return the curves of a run whose checkpoint is there, on the held-out documents of its store."""
    from btlm_jax.data.reader import open_store
    from btlm_jax.display.progress import print_line
    from btlm_jax.evaluate.checkpoint import MODEL_DTYPE, opened_checkpoint
    from btlm_jax.evaluate.documents import read_store
    from btlm_jax.evaluate.positions import measure_positions, stream_of
    from btlm_jax.evaluate.results import Work

    store = Path(config.data.store)
    longest = BEYOND * open_store(store, expected_fingerprint="").manifest.block_len
    with opened_checkpoint(str(workdir), log=print_line) as checkpoint:
        scorer = checkpoint.make_scorer(dtype=MODEL_DTYPE, batch_tokens=longest)
        stream = stream_of(read_store(store, checkpoint.tokenizer, name=str(workdir)))
        num_tokens = min(NUM_WINDOWS, len(stream.is_counted) // longest) * longest
        if not num_tokens:
            raise ValueError(
                f"the held-out text has {len(stream.is_counted):,} tokens, and a window {longest:,}: give more "
                "text, or shorter sequences (--config.curriculum.seq_len)"
            )
        trained = config.curriculum.table.block_len
        curves = [
            measure_positions(
                scorer, stream.cut(num_tokens), setting, trained_length=trained, work=Work(str(setting), None)
            )
            for setting in settings_for(config, longest=longest)
        ]
    return {
        "trained_length": trained,
        "curves": [
            {name: curve[name] for name in ("length", "alibi", "factor", "loss", "first_rise", "bins")}
            for curve in curves
        ],
    }


def find_curve(curves: Sequence[dict], alibi: str, *, length: int, factor: float = 1.0) -> dict:
    """Return the curve of that kind."""
    wanted = {"alibi": alibi, "length": length, "factor": factor}
    return next(curve for curve in curves if wanted.items() <= curve.items())


def loss_between(curve: dict, first: int, last: int) -> float:
    """Return the loss over positions first..last of a curve, of the bins that lie in it; position p sees p tokens.

    Raises:
      ValueError: no bin does.
    """
    bins = curve["bins"]
    inside = [
        (loss, number)
        for low, high, loss, number in zip(bins["first"], bins["last"], bins["loss"], bins["num_tokens"], strict=True)
        if first <= low and high <= last
    ]
    if not inside:
        raise ValueError(f"no bin of positions lies in {first}..{last}")
    return sum(loss * number for loss, number in inside) / sum(number for _, number in inside)
