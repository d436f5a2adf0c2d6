"""Near-duplicates in the training text, at equal tokens: what they cost on held-out text, and what is memorized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from btlm_jax.display.plotting import new_panels, write_figure
from btlm_jax.recipe.config import TrainConfig
from experiments.dedup.stores import CLEAN, DEDUPLICATED, PLANTED, VARIANTS, facts_of, make_stores
from experiments.study import Experiment, Measured, difference_and_interval, mean_and_interval, on_store, run, shown

COPIED, CONTROL, HELDOUT = "copied", "control", "heldout"
GROUPS = (COPIED, CONTROL, HELDOUT)
MOST_TOKENS = 32_768  # of a group of documents that are scored
HELP = """the same text without near-duplicates, with planted ones, and with these taken out again by the dedup stage.

Half of the planted text are copies of few documents, with 1 % of their words changed. All train on as many tokens.
Measured: the held-out loss, and the loss and the share of tokens predicted right of the copied documents, of documents
like them that are not copied, and of held-out ones.

example:  python -m experiments.dedup --folder=/tmp/dedup --data gutenberg_pd.jsonl us_presidents_pd.jsonl
"""


def make_variants(config: TrainConfig, first: Measured, stores: Mapping[str, Path]) -> dict[str, TrainConfig]:
    """Return the runs, one on each store."""
    return {name: on_store(config, stores[name]) for name in VARIANTS}


def measure(config: TrainConfig, workdir: Path) -> dict:
    """Return the loss of each group of documents, and the share of their tokens that are the likeliest."""
    import numpy as np

    from btlm_jax.display.progress import print_line
    from btlm_jax.evaluate.checkpoint import MODEL_DTYPE, opened_checkpoint
    from btlm_jax.evaluate.documents import Document
    from btlm_jax.evaluate.windows import rows_of
    from btlm_jax.tokenizers.tokenizer import encode_document

    values, length = facts_of(Path(config.data.store)), config.curriculum.table.block_len
    groups = {}
    with opened_checkpoint(str(workdir), log=print_line) as checkpoint:
        scorer, tokenizer = checkpoint.make_scorer(dtype=MODEL_DTYPE, batch_tokens=8 * length), checkpoint.tokenizer
        for group in GROUPS:
            rows, size = [], 0
            for text in values[group]:
                ids = [tokenizer.eos_id, *(token for piece in encode_document(tokenizer, text) for token in piece)]
                tokens = np.asarray(ids, np.int32)
                counted = np.ones(len(tokens) - 1, bool)
                document = Document(source=group, tokens=tokens, is_counted=counted, num_bytes=len(text.encode()))
                rows += rows_of(document, length=length, overlap=1)
                size += document.num_targets
                if size >= MOST_TOKENS:
                    break
            scores = scorer.log_likelihoods(rows)
            groups[group] = {
                "tokens": size,
                "loss": -float(sum(each.log_p_T.sum() for each in scores)) / size,
                "right": float(sum(each.is_greedy_T.sum() for each in scores)) / size,
            }
    return {"groups": groups, "facts": values["facts"]}


def report(config: TrainConfig, seeds: Sequence[Measured]) -> dict:
    """Return the losses of each variant, and its differences to the clean text."""
    variants = {}
    for name in VARIANTS:
        values = {"heldout_split": [measured[name]["loss"] for measured in seeds]}
        clean = {"heldout_split": [measured[CLEAN]["loss"] for measured in seeds]}
        for group in GROUPS:
            for key in ("loss", "right"):
                values[f"{group}_{key}"] = [measured[name]["groups"][group][key] for measured in seeds]
                clean[f"{group}_{key}"] = [measured[CLEAN]["groups"][group][key] for measured in seeds]
        variants[name] = {
            "values": {key: mean_and_interval(each) for key, each in values.items()},
            "minus_clean": {key: difference_and_interval(values[key], clean[key]) for key in values},
        }
    return {"facts": seeds[0][CLEAN]["facts"], "variants": variants}


def describe(values: dict) -> str:
    """Return a table of the losses, and the differences."""
    lines = [
        "| text | held-out loss | minus clean | loss of copied documents | of others trained on | copied: right |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in values["variants"].items():
        found, difference = each["values"], each["minus_clean"]["heldout_split"]
        lines.append(
            f"| {name} | {found['heldout_split']['mean']:.4f} | "
            f"{shown(difference, sign='+') if name != CLEAN else '0'} | {found['copied_loss']['mean']:.4f} | "
            f"{found['control_loss']['mean']:.4f} | {found['copied_right']['mean']:.1%} |"
        )
    facts = values["facts"]
    lines.append(
        f"\n{facts['planted_copies']:,} copies of {facts['copied_documents']:,} documents are "
        f"{facts['planted_share']:.0%} of the planted text; dedup leaves {facts['left_by_dedup']:,} documents of "
        f"{facts['unique_documents'] + facts['planted_copies']:,}, {facts['unique_documents']:,} of which are unique. "
        f"Near-duplicates that the text had by itself: {facts['natural_near_duplicates']:,} of "
        f"{facts['natural_documents']:,} documents."
    )
    return "\n".join(lines)


def plot(values: dict, path: Path) -> None:
    """Draw, for each text, the loss of the copied documents, of others trained on and of held-out ones."""
    figure, panels = new_panels(size=(9.0, 4.0), dpi=110, columns=2)
    for panel, key, label in zip(
        panels, ("loss", "right"), ("loss, nats a token", "share of tokens predicted right"), strict=True
    ):
        for number, group in enumerate(GROUPS):
            for place, name in enumerate(VARIANTS):
                found = values["variants"][name]["values"][f"{group}_{key}"]
                x = place + 0.15 * (number - 1)
                panel.plot([x] * len(found["values"]), found["values"], ".", color=f"C{number}", alpha=0.5)
                panel.plot(
                    [x], [found["mean"]], "_", markersize=14, color=f"C{number}", label=group if not place else None
                )
        panel.set_xticks(range(len(VARIANTS)), [CLEAN, PLANTED, DEDUPLICATED])
        panel.set_ylabel(label)
        panel.legend(fontsize=8)
    write_figure(figure, path)


EXPERIMENT = Experiment(
    folder=Path(__file__).parent,
    kind="dedup",
    help_text=HELP,
    make_stores=make_stores,
    make_variants=make_variants,
    measure=measure,
    report=report,
    describe=describe,
    plot=plot,
)

if __name__ == "__main__":
    run(EXPERIMENT)
