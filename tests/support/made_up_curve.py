"""What a run leaves of its loss curve, without training."""

import json
from pathlib import Path

from btlm_jax.recipe.config import TrainConfig
from btlm_jax.train import CONFIG_FILE, METRICS_FILE


def write_curve(workdir: Path, config: TrainConfig, losses: list[float]) -> None:
    """Write the config and the metrics of steps of 384 tokens with these losses."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / CONFIG_FILE).write_text(config.to_json())
    numbers = {"learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_second": 1.0, "mfu": 0.1, "seconds": 1.0}
    rows = [
        {"kind": "train", "step": step, "tokens": 384 * step, "seq_len": 24, "loss": loss, "weight": 384.0, **numbers}
        for step, loss in enumerate(losses, start=1)
    ]
    (workdir / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
