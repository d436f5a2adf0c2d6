"""Run an exported directory in several versions of transformers, and compare what they compute.

    python benchmarks/transformers_versions.py DIRECTORY PYTHON [PYTHON ...]

DIRECTORY is what btlm convert --format=hf wrote, with a tokenizer; each PYTHON an interpreter with PyTorch and one
version of transformers. All run the same: a forward pass, greedy continuations with a growing and a static cache and of
prompts of different lengths in one batch, a mask of four axes, a pipeline of two texts at a time, a classifier. Prints
what differs from the first interpreter: ids must be the same, numbers within 1e-5. Exit code 1 if one fails or differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

PROGRAM = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
transformers.logging.set_verbosity_error()
directory, said = sys.argv[1], {"version": transformers.__version__}
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
prompts = ["def area(radius):", "The cat sat on the mat and", "x"]
greedy = {"max_new_tokens": 12, "do_sample": False}
with torch.no_grad():
    ids = tokenizer(prompts[0], return_tensors="pt")["input_ids"]
    said["ids"] = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    logits = model(ids).logits
    said["logits"] = logits[0, -1, :8].tolist()
    said["greedy"] = model.generate(ids, **greedy).tolist()
    said["static cache"] = model.generate(ids, cache_implementation="static", **greedy).tolist()
    said["beams"] = model.generate(ids, num_beams=3, max_new_tokens=6).tolist()
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    rows = model.generate(**batch, **greedy)[:, batch["input_ids"].shape[1]:].tolist()
    said["batch"] = rows
    T = ids.shape[1]
    seen = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    said["4-D mask"] = model(ids, attention_mask=seen).logits[0, -1, :8].tolist()
    assert torch.equal(model(ids, position_ids=torch.arange(T)[None], cache_position=torch.arange(T),
                             token_type_ids=torch.zeros_like(ids)).logits, logits)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    said["pipeline"] = [out[0]["generated_text"] for out in writer(prompts, batch_size=2, **greedy)]
torch.manual_seed(0)
judge = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True, num_labels=2)
with torch.no_grad():
    judge.score.weight.copy_(torch.ones_like(judge.score.weight) * torch.tensor([[0.1], [0.2]]))
    said["classification"] = judge.eval().float()(**batch).logits.flatten().tolist()
print("RESULT" + json.dumps(said))
"""


def run(python: str, directory: str) -> dict:
    """Return what one interpreter says, or its error."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch}
        done = subprocess.run([python, "-c", PROGRAM, directory], env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if done.returncode or not lines:
        return {"error": done.stderr.strip().splitlines()[-3:]}
    return json.loads(lines[0].removeprefix("RESULT"))


def is_near(first: object, other: object) -> bool:
    """Return whether two results are equal, numbers to 1e-5."""
    if isinstance(first, list) and isinstance(other, list):
        return len(first) == len(other) and all(is_near(a, b) for a, b in zip(first, other, strict=True))
    if isinstance(first, float) and isinstance(other, float):
        return abs(first - other) <= 1e-5 * max(1.0, abs(first))
    return first == other


def main(directory: str, pythons: list[str]) -> int:
    """Run and compare; return the exit code."""
    results, failures = [run(python, directory) for python in pythons], 0
    for python, result in zip(pythons, results, strict=True):
        if "error" in result or "error" in results[0]:
            print(f"FAIL {python}: {result.get('error', 'nothing to compare with')}")
            failures += 1
            continue
        differing = [name for name in result if name != "version" and not is_near(results[0][name], result[name])]
        failures += bool(differing)
        print(f"{'FAIL' if differing else 'ok'}  transformers {result['version']}: {len(result) - 1} results", end="")
        print(f", other than the first's: {', '.join(differing)}" if differing else "")
    return int(failures > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIRECTORY")
    parser.add_argument("pythons", metavar="PYTHON", nargs="+")
    options = parser.parse_args()
    sys.exit(main(options.directory, options.pythons))
