"""The logits of an exported directory as its users compute them: with PyTorch, transformers and the exported code.

They are computed in a process of their own, so that PyTorch and the exported code are not loaded into the conversion:
python -m btlm_jax.convert.transformers_logits DIRECTORY IDS.npy LOGITS.npy
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from btlm_jax import ending_of, module_command


def has_transformers() -> bool:
    """Whether PyTorch and transformers are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def transformers_logits(directory: Path, ids_T: np.ndarray) -> np.ndarray:
    """Return the float32 logits_TV that AutoModelForCausalLM gives, in the dtype of the exported weights.

    Raises:
      ValueError: transformers cannot load or run the directory; the message ends with the error's last line.
      OSError: its process was killed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        ids_file, logits_file = Path(scratch) / "ids.npy", Path(scratch) / "logits.npy"
        np.save(ids_file, ids_T)
        command = [*module_command(__name__), str(directory.resolve()), str(ids_file), str(logits_file)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": scratch, "HF_MODULES_CACHE": scratch}
        done = subprocess.run(command, env=environment, capture_output=True)
        if done.returncode < 0:  # what it said before has nothing to do with that
            raise OSError(
                f"the process that ran the exported model with transformers was {ending_of(done.returncode)}; nothing "
                "was kept: give the command again where the model fits into memory a second time"
            )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            reason = (said or [ending_of(done.returncode)])[-1]
            raise ValueError(f"transformers cannot run the exported model in {directory}: {reason}")
        return np.load(logits_file)


def _main(directory: str, ids_file: str, logits_file: str) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    with torch.no_grad():
        logits_BTV = model(torch.from_numpy(np.load(ids_file))[None]).logits
    np.save(logits_file, logits_BTV[0].float().numpy())


if __name__ == "__main__":
    _main(*sys.argv[1:])
