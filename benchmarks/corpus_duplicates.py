"""How many planted near-duplicates each preset finds, how many of its pairs are such, and what each stage costs.

Command:  python benchmarks/corpus_duplicates.py --directory=DIR [--megabytes=320] [--planted=2400] [--tokenizer=GPT2]

Makes a corpus out of the text files of this installation (.py, .pyi, .md, .rst, .txt, .html, C headers), plants edited
copies whose true Jaccard similarity over the published normalisation's character 13-grams is measured one by one, and
runs the stages of `btlm corpus` on it, dedup with both presets, each a process of its own. Prints for every stage MB of
text a second of the processor's time (all processes) and the largest memory of a process; for every preset the share of
planted pairs that ended in one cluster, by similarity, and the true similarity of a sample of the pairs it found. DIR
is kept; run again with the same arguments it only measures what was not done, so the first run's costs count.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zstandard

from btlm_jax.corpus.engine.inputs import read_stage
from btlm_jax.corpus.near_duplicates.lsh import Clusters
from btlm_jax.corpus.near_duplicates.minhash import GRAM
from btlm_jax.corpus.near_duplicates.normalize import normalized
from btlm_jax.corpus.readers.records import read_records

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".html", ".h", ".hpp", ".cpp", ".c")
FILES = 16
EDGES = (0.45, 0.55, 0.65, 0.725, 0.775, 0.825, 0.875, 0.925, 0.975, 1.0)
MIN_LENGTH, MAX_LENGTH = 1_000, 60_000  # characters of a document that gets a planted copy
EDIT = 40  # characters replaced at a time
SAMPLED_PAIRS = 1_500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=320)
    parser.add_argument("--planted", type=int, default=2_400)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tokenizer", type=Path, help="folder with vocab.json and merges.txt, to pack a store as well")
    arguments = parser.parse_args()
    folder = arguments.directory
    if not (folder / "planted.json").is_file():
        make_corpus(folder, max_bytes=arguments.megabytes * 10**6, num_planted=arguments.planted)
    print(f"{'stage':<22} {'MB':>7} {'cpu s':>8} {'MB/cpu s':>9} {'wall s':>8} {'MB of memory':>13}")
    run_stage(folder, "clean", source="raw", target="clean", workers=arguments.workers)
    for preset in ("slimpajama", "strict"):
        target = f"dedup_{preset}"
        run_stage(folder, "dedup", f"--preset={preset}", source="clean", target=target, workers=arguments.workers)
    run_stage(folder, "split", source="dedup_strict", target="split", workers=arguments.workers)
    if arguments.tokenizer:
        chosen = f"--tokenizer={arguments.tokenizer}"
        run_stage(folder, "tokenize", chosen, source="split", target="store", workers=arguments.workers)
    texts = {}
    order = []
    for output in read_stage(folder / "clean")["outputs"]:
        for record in read_records(folder / "clean" / output["file"]):
            order.append(record.id)
            texts[record.id] = record.text
    similarities = json.loads((folder / "planted.json").read_text())
    for preset in ("slimpajama", "strict"):
        print_quality(folder / f"dedup_{preset}", order, texts, similarities)


def make_corpus(folder: Path, *, max_bytes: int, num_planted: int) -> None:
    """Write raw/ and planted.json: the measured similarity of each planted copy to its original."""
    rng = random.Random(0)
    documents = {}
    size = 0
    for path in installed_files():
        text = path.read_bytes().decode("utf-8", "replace")
        if size < max_bytes and len(text) > 200:
            documents[f"o{len(documents)}"] = text
            size += len(text.encode())
    usable = [name for name, text in documents.items() if MIN_LENGTH <= len(text) <= MAX_LENGTH]
    planted = {}
    for name in rng.sample(usable, num_planted):
        text = documents[name]
        other = documents[rng.choice(usable)]
        copy = edited(text, other, similarity=rng.uniform(0.45, 1.0), rng=rng)
        planted[f"v{name[1:]}"] = jaccard(text, copy)
        documents[f"v{name[1:]}"] = copy
    names = list(documents)
    rng.shuffle(names)
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    for number in range(FILES):
        rows = [
            json.dumps({"text": documents[name], "meta": {"redpajama_set_name": "Installed"}, "id": name})
            for name in names[number::FILES]
        ]
        data = zstandard.compress("\n".join(rows).encode())
        (folder / "raw" / f"part{number:02d}.jsonl.zst").write_bytes(data)
    print(f"{len(documents):,} documents, {size / 1e6:.0f} MB and {len(planted):,} planted copies")
    (folder / "planted.json").write_text(json.dumps(planted))


def installed_files() -> Iterator[Path]:
    """Yield the text files of the packages and of the standard library, in a shuffled order that is always the same."""
    roots = {sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), "/usr/share/doc"}
    found = sorted(path for root in roots for path in Path(root).rglob("*") if path.suffix in SUFFIXES)
    random.Random(1).shuffle(found)
    yield from (path for path in found if path.is_file())


def edited(text: str, other: str, *, similarity: float, rng: random.Random) -> str:
    """Replace pieces of a text by pieces of another until about `similarity` of their grams are common."""
    num_edits = round(len(text) * (1 - similarity) / (1 + similarity) / (EDIT + GRAM - 1))
    for _ in range(num_edits):
        place = rng.randrange(max(len(text) - EDIT, 1))
        start = rng.randrange(max(len(other) - EDIT, 1))
        text = text[:place] + other[start : start + EDIT] + text[place + EDIT :]
    return text


def jaccard(first: str, second: str) -> float:
    """Return the true similarity of two texts' character 13-grams after the published normalisation."""
    grams = []
    for text in (first, second):
        codes = normalized(text).astype("<u4").tobytes()
        grams.append({codes[start : start + 4 * GRAM] for start in range(0, len(codes) - 4 * GRAM + 1, 4)})
    return len(grams[0] & grams[1]) / max(len(grams[0] | grams[1]), 1)


def run_stage(folder: Path, verb: str, *flags: str, source: str, target: str, workers: int) -> None:
    """Run a verb in a process of its own and print what it cost."""
    command = [
        *(sys.executable, "-m", "btlm_jax", "corpus", verb),
        *(f"--input={folder / source}", f"--output={folder / target}", f"--workers={workers}", *flags),
    ]
    began = time.monotonic()
    with open(folder / f"{target}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"btlm corpus {verb} failed: {(folder / f'{target}.log').read_text()}")
    counts = read_stage(folder / (source if verb == "tokenize" else target))["totals"]
    size = sum(count["bytes"] for count in counts["written" if verb == "tokenize" else "read"].values()) / 1e6
    seconds = usage.ru_utime + usage.ru_stime
    wall = time.monotonic() - began
    said = re.findall(r"at most (\d+) MB a process", (folder / f"{target}.log").read_text())
    memory = max(map(int, said))
    print(f"{target:<22} {size:>7.0f} {seconds:>8.1f} {size / seconds:>9.1f} {wall:>8.1f} {memory:>13}", flush=True)


def print_quality(folder: Path, order: list[str], texts: dict[str, str], similarities: dict[str, float]) -> None:
    """Print recall by similarity, and the true similarities of pairs that were found."""
    files = sorted((folder / "work" / "pairs").glob("pairs-*.npy"))
    pairs = np.unique(np.concatenate([np.load(path) for path in files]), axis=0)
    clusters = Clusters(len(order))
    clusters.join(pairs)
    roots = clusters.roots(np.arange(len(order)))
    number = {name: index for index, name in enumerate(order)}
    found, true = [], []
    for name, similarity in similarities.items():
        original = f"o{name[1:]}"
        if name in number and original in number:
            found.append(roots[number[name]] == roots[number[original]])
            true.append(similarity)
    bins = np.digitize(true, EDGES[1:-1])
    print(f"\n{folder.name}: {len(np.unique(roots)):,} of {len(order):,} documents stay; {len(pairs):,} pairs")
    print("planted, J from   " + " ".join(f"{edge:>6}" for edge in EDGES[:-1]))
    counts = np.bincount(bins, minlength=len(EDGES) - 1)
    print("pairs             " + " ".join(f"{count:>6}" for count in counts))
    shares = np.bincount(bins, weights=found, minlength=len(EDGES) - 1) / np.maximum(counts, 1)
    print("found             " + " ".join(f"{share:>6.3f}" for share in shares))
    sample = np.random.default_rng(0).permutation(pairs)[:SAMPLED_PAIRS]
    exact = np.array([jaccard(texts[order[a]], texts[order[b]]) for a, b in sample])
    print(
        f"of {len(sample):,} pairs found: "
        + ", ".join(f"{(exact >= j).mean():.3f} have J >= {j}" for j in (0.8, 0.75, 0.7, 0.5))
    )


if __name__ == "__main__":
    main()
