"""A model continued on another corpus against one trained on it from nothing: equal tokens, and what it forgets.

Command:  python benchmarks/finetune.py --base=TEXTS --other=TEXTS --directory=runs/finetune [--minutes=4] [--more=1.5]

Trains a model on --base for --minutes, and continues it on --other for --more minutes (`btlm train --data --init`).
Then, on its store with the same steps, batches and tokens: once from nothing, at twice the peak learning rate, as a
new model has it; once with the optimizer kept; and once with the embeddings and LayerNorms frozen. Each model is
evaluated on all held-out text of both corpora. TEXTS are what --data takes. Workdirs that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from pathlib import Path

import jax

from btlm_jax.data.reader import open_store
from btlm_jax.data.store import HELDOUT
from btlm_jax.hub.native import read_run
from btlm_jax.parallel.mesh import evaluation_sharding
from btlm_jax.train.finish import heldout_batches
from btlm_jax.train.heldout import SourceLoss, evaluate_heldout, make_eval_step

ROWS = 8  # sequences of a batch of the evaluation
FROZEN = "embedding,ln_*"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", required=True, help="text that the model is trained on first")
    parser.add_argument("--other", nargs="+", required=True, help="text that it is continued on")
    parser.add_argument("--directory", type=Path, required=True, help="of the workdirs")
    parser.add_argument("--minutes", type=float, default=4.0, help="of the first training")
    parser.add_argument("--more", type=float, default=1.5, help="of the second, which sets the tokens of all others")
    arguments = parser.parse_args()
    base, continued = (arguments.directory / name for name in ("base", "continued"))
    train(base, "--data", *arguments.base, f"--minutes={arguments.minutes:g}")
    train(continued, "--data", *arguments.other, f"--init={base}", f"--minutes={arguments.more:g}")
    config = continued / "config.json"
    peak = json.loads(config.read_text())["optimizer"]["peak_learning_rate"]
    same = [f"--config={config}", f"--config.data.store={continued.resolve() / 'store'}"]
    scratch, kept, frozen = (arguments.directory / name for name in ("scratch", "kept", "frozen"))
    train(scratch, *same, f"--config.optimizer.peak_learning_rate={2 * peak!r}")
    train(kept, *same, f"--init={base}", "--init_optimizer=kept")
    train(frozen, *same, f"--init={base}", f"--config.optimizer.freeze={FROZEN}")
    summary = json.loads((continued / "summary.json").read_text())
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of checkpoints that it opens for reading
    print(f"{summary['num_steps']:,} steps, {summary['num_tokens']:,} tokens of the other corpus in each but the first")
    print(f"{'model':<36} {'other: nats':>12} {'bits/byte':>10} {'base: nats':>12} {'bits/byte':>10}")
    for name, workdir in (
        ("base, as it was", base),
        ("continued", continued),
        ("continued, optimizer kept", kept),
        (f"continued, {FROZEN} frozen", frozen),
        ("from nothing", scratch),
    ):
        losses = [heldout(workdir, store=folder / "store") for folder in (continued, base)]
        print(
            f"{name:<36}" + "".join(f" {loss.loss:>12.4f} {loss.bits_per_byte:>10.4f}" for loss in losses), flush=True
        )


def train(workdir: Path, *arguments: str) -> None:
    """Run `btlm train` to its end, unless it came to its end before.

    Raises:
      SystemExit: the command failed.
    """
    if (workdir / "summary.json").is_file():
        return
    workdir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "btlm_jax", "train", *arguments, f"--workdir={workdir}"]
    with open(workdir.with_suffix(".log"), "a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"{workdir}: exit code {code}; {workdir.with_suffix('.log')} says why")


def heldout(workdir: Path, *, store: Path) -> SourceLoss:
    """Return the loss of a run's model on all held-out text of a store, which has its tokenizer."""
    native, token_store = read_run(workdir), open_store(store, expected_fingerprint="")
    eval_step = jax.jit(make_eval_step(native.metadata.network(), loss_chunk=native.metadata.model.loss_chunk))
    with jax.set_mesh(native.mesh):
        batches = heldout_batches(
            token_store,
            batch_size=ROWS,
            blocks_per_source=token_store.manifest.splits[HELDOUT].num_blocks,
            prefetch=2,
            sharding=evaluation_sharding(native.mesh),
        )
        return evaluate_heldout(eval_step, native.params, batches, manifest=token_store.manifest).total


if __name__ == "__main__":
    main()
