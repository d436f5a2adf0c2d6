"""Train a small model until its loss by position and its retrieval say something, and evaluate it.

    python benchmarks/long_context.py runs/long --tokens=7372800

trains configs/local_cpu.py's model on the documents of the installed Python, three quarters of the tokens at 128 and
one at 512, and measures it by `btlm evaluate --all`: held-out loss, loss by position up to 32,768 tokens with and
without interpolated ALiBi, and retrieval up to 4,096 tokens. The plots and the report are in WORKDIR/evaluation/.
Started again, training and evaluation go on where they were. The default takes half an hour and ten minutes on 2 idle
cores (AMD EPYC Zen 4, 2026-11-30); --tokens=200000 shows that it runs.
"""

from __future__ import annotations

import argparse
import sys

from btlm_jax.cli import DONE, main

TOKENS_PER_STEP = 1024  # 8 x 128 = 2 x 512
LENGTHS = "512,2048,8192,32768"
RETRIEVAL_LENGTHS = "512,1024,2048,4096"


def train_and_evaluate(workdir: str, *, tokens: int) -> int:
    """Return the exit code of the first command that failed, or DONE."""
    steps = max(8, tokens // TOKENS_PER_STEP)
    first, second = (steps - steps // 4) * TOKENS_PER_STEP, steps // 4 * TOKENS_PER_STEP
    trained = main(
        [
            "train", "--config=local_cpu", f"--workdir={workdir}",
            f"--config.curriculum.num_tokens=({first},{second})",
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
    parser.add_argument("--tokens", type=int, default=7_372_800, help="to train on")
    arguments = parser.parse_args()
    sys.exit(train_and_evaluate(arguments.workdir, tokens=arguments.tokens))
