"""Train a small model until its loss by position and its retrieval say something, and evaluate it.

    python benchmarks/long_context.py runs/long --tokens=12000000

trains configs/local_cpu.py's model on the documents of the installed Python, three quarters of the tokens at 512 and
one at 2,048, and measures it by `btlm evaluate --all`: held-out loss, loss by position up to 32,768 tokens with and
without interpolated ALiBi, and retrieval up to 4,096 tokens. The plots and the report are in WORKDIR/evaluation/.
Started again, training and evaluation go on where they were. At 2,500 tokens/s, what 2 idle cores train at 512, 12
million tokens take 80 minutes; --tokens=200000 shows that it runs.
"""

from __future__ import annotations

import argparse
import sys

from btlm_jax.cli import DONE, main

TOKENS_PER_STEP = 4096  # 8 x 512 = 2 x 2,048
LENGTHS = "512,2048,8192,32768"
RETRIEVAL_LENGTHS = "512,1024,2048,4096"


def train_and_evaluate(workdir: str, *, tokens: int) -> int:
    """Return the exit code of the first command that failed, or DONE."""
    steps = max(8, tokens // TOKENS_PER_STEP)
    first, second = (steps - steps // 4) * TOKENS_PER_STEP, steps // 4 * TOKENS_PER_STEP
    trained = main(
        [
            "train", "--config=local_cpu", f"--workdir={workdir}", "--config.curriculum.seq_len=(512,2048)",
            "--config.curriculum.batch_size=(8,2)", f"--config.curriculum.num_tokens=({first},{second})",
            f"--config.optimizer.warmup_tokens={max(1, steps // 20) * TOKENS_PER_STEP}",
            "--config.data.max_epochs=8", "--config.evaluation.batch_size=2",
        ]
    )  # fmt: skip
    if trained != DONE:
        return trained
    return main(
        [
            "evaluate", f"--checkpoint={workdir}", "--all", f"--position_lengths={LENGTHS}",
            "--position_tokens=262144", f"--retrieval_lengths={RETRIEVAL_LENGTHS}",
        ]
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir")
    parser.add_argument("--tokens", type=int, default=12_000_000, help="to train on")
    arguments = parser.parse_args()
    sys.exit(train_and_evaluate(arguments.workdir, tokens=arguments.tokens))
