"""Take a run through its clients and back: hf, a step of transformers' Trainer, save_pretrained, native, GGUF.

    python benchmarks/clients_round_trip.py RUN

RUN is a finished training run. Each arrow is `btlm convert`, which proves itself, or transformers alone:

    RUN -> hf -> Trainer.train, 1 step -> save_pretrained (tokenizer, too) -> native -> GGUF F32

Checked besides: the step changed weights; native has the tuned weights to the bit; every form's tokenizer makes the
same ids; the run's logits are those of transformers on the export, native's and those of the GGUF file, computed as
llama.cpp does, are those of transformers on the tuned directory. Prints one line for each; exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from btlm_jax.convert.conversion import Conversion, convert
from btlm_jax.hub.gguf import GGUFFile, GGUFTokenizer, gguf_logits
from btlm_jax.hub.source import open_source

TEXTS = (
    "def area(radius):\n    return 3.14 * radius ** 2\n",
    " two  spaces\tand a tab",
    "\u00c9t\u00e9 \u6570\u5b66 \U0001f600",
)
# One step on the first text, and the logits before and after it, in a process of its own: this one has JAX's threads.
TRAIN = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
source, target, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
ids = tokenizer(text, return_tensors="pt")["input_ids"][0]

def save_logits(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    with torch.no_grad():
        numpy.save(directory + ".npy", model(ids[None]).logits[0].numpy())

save_logits(source)
arguments = TrainingArguments(output_dir=target + ".work", max_steps=1, learning_rate=1e-3, report_to=[],
    save_strategy="no", use_cpu=True, per_device_train_batch_size=1, disable_tqdm=True)
Trainer(model=model, args=arguments, train_dataset=[{"input_ids": ids, "labels": ids}]).train()
model.save_pretrained(target)
tokenizer.save_pretrained(target)
save_logits(target)
"""


def make(source: Path, target: Path, *, form: str) -> Path:
    """Convert, printing what the proofs say."""
    options = {"dtype": "float32", "file_type": "F32", "pad_ffn": 1 if form != "gguf" else 256, "method": "rtn"}
    settings = Conversion(
        source=source, target=target, format=form, max_shard_bytes=1 << 40, calibration=None, **options
    )
    for proof in convert(settings, log=lambda line: None):
        print(f"  {form}: {proof}", flush=True)
    return target


def main(run: Path) -> int:
    """Go round; return the exit code."""
    failures = 0

    def check(holds: bool, text: str) -> None:
        nonlocal failures
        failures += not holds
        print(f"{'ok' if holds else 'FAIL'}  {text}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        hf, tuned, native, gguf = (Path(scratch) / name for name in ("hf", "tuned", "native", "m.gguf"))
        make(run, hf, form="hf")
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch}
        subprocess.run([sys.executable, "-c", TRAIN, hf, tuned, TEXTS[0]], env=environment, check=True)
        make(tuned, native, form="native")
        make(native, gguf, form="gguf")
        before, after, last = (open_source(directory) for directory in (hf, tuned, native))
        names = list(before.tensors.shapes)
        moved = sum(not np.array_equal(before.tensors.read(name), after.tensors.read(name)) for name in names)
        check(moved == len(names), f"the step changed {moved} of {len(names)} tensors")
        same = all(np.array_equal(after.tensors.read(name), last.tensors.read(name)) for name in names)
        check(same, "native has the tuned weights to the bit")
        run_tokenizer, file = open_source(run).tokenizer, GGUFFile(gguf)
        for text in TEXTS:
            ids = run_tokenizer.encode(text)
            others = [source.tokenizer.encode(text) for source in (before, after, last)]
            check(all(other == ids for other in others), f"the ids of {text[:20]!r} in run, hf, tuned and native")
            check(GGUFTokenizer(file.keys).encode(text) == ids, f"the ids of {text[:20]!r} in the GGUF file")
        ids_T = np.asarray(run_tokenizer.encode(TEXTS[0]))
        exported_TV, tuned_TV = (np.load(f"{directory}.npy") for directory in (hf, tuned))
        for name, actual_TV, expected_TV in (
            ("the run", open_source(run).logits(ids_T), exported_TV),
            ("native", last.logits(ids_T), tuned_TV),
            ("the GGUF file", gguf_logits(file, ids_T), tuned_TV),
        ):
            error = float(np.abs(actual_TV - expected_TV).max() / np.abs(expected_TV).max())
            check(error < 2e-5, f"logits of {name} against transformers on these weights: {error:.1e} of the largest")
    return int(failures > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path)
    sys.exit(main(parser.parse_args().run))
