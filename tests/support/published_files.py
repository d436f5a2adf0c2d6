"""Published checkpoints in every form they came in, made from the oracles."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ORACLES = Path(__file__).parents[1] / "golden" / "oracles"
NAMES = ("tiny", "tiny_sp", "tiny_pi_fix")


def oracle_weights(name: str = "tiny") -> dict[str, np.ndarray]:
    """Return an oracle's tensors by published name."""
    return load_file(ORACLES / name / "model.safetensors")


def oracle_array(name: str, array: str) -> np.ndarray:
    """Return what the original code gave: input_ids, logits, greedy, ..."""
    return np.load(ORACLES / name / f"{array}.npy")


def write_published(directory: Path, weights: dict[str, np.ndarray], *, name: str = "tiny", **changes) -> Path:
    """Write weights and an oracle's config.json with changed keys; a key changed to ... is left out."""
    directory.mkdir(exist_ok=True)
    config = json.loads((ORACLES / name / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(kept))
    save_file(weights, directory / "model.safetensors")
    return directory


def write_shards(directory: Path, weights: dict[str, np.ndarray]) -> Path:
    """Write weights in two shards with an index, and the tiny oracle's config.json."""
    directory.mkdir()
    shutil.copy(ORACLES / "tiny" / "config.json", directory)
    weight_map = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(weights))}
    for file in set(weight_map.values()):
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory
