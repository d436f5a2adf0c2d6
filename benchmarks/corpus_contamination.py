"""How many documents with evaluation text are left after clean and split, for many forms of text.

Command:  python benchmarks/corpus_contamination.py --directory=DIR [--count=100] [--rule=by-script]

For every form, `count` evaluation texts are made, and a corpus of `count` documents that each contain one of them
between other text of the same form, as it stands in the evaluation file, and of as many documents that contain none.
Prints for each form how many of the contaminated documents are left, and how many of the others were dropped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import html
import io
import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

from btlm_jax.cli import main as btlm
from btlm_jax.corpus.engine.inputs import read_stage
from btlm_jax.corpus.readers.records import read_records

_WORDS = {
    "english": "the of and question answer which country river mountain because many people between under number water",
    "french": "l’été déjà où élève forêt garçon naïf cœur « bien » qu’il n’est été français leçon façon âge hôtel",
}


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of text: made from a seed, and changed in the way that the form stands for."""

    make: Callable[[random.Random, int], str]  # takes the number of words, or what is as long
    change: Callable[[str], str] = str
    num_words: int = 40  # of an evaluation text

    def text(self, seed: int | str, num_words: int = 0) -> str:
        """Return the text of a seed, of `num_words` words instead of as many as evaluation texts have."""
        return self.change(self.make(random.Random(f"{seed}"), num_words or self.num_words))


def _latin(rng: random.Random, num_words: int) -> str:
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(num_words)]
    return " ".join(words) + "."


def _mixed_with(words: str) -> Callable[[random.Random, int], str]:
    def make(rng: random.Random, num_words: int) -> str:
        own = words.split()
        return " ".join(rng.choice(own) if rng.random() < 0.5 else _latin(rng, 1)[:-1] for _ in range(num_words)) + "."

    return make


def _characters(
    first: int, last: int, *, marks: str, share: float, per_word: int
) -> Callable[[random.Random, int], str]:
    """Return a maker of text without spaces between words: characters of a range, and marks between some."""

    def make(rng: random.Random, num_words: int) -> str:
        text = ""
        for _ in range(num_words * per_word):
            text += chr(rng.randint(first, last)) + (rng.choice(marks) if rng.random() < share else "")
        return text

    return make


def _quoted(text: str) -> str:
    return f"“{text[: len(text) // 2]}” ‘{text[len(text) // 2 :]}’"


def _full_width(text: str) -> str:
    return "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in text)


def _mojibake(text: str) -> str:
    return text.replace("e", "é").encode().decode("latin-1").replace("\x83Â", "")


FORMS = {
    "curly quotes": Form(_latin, _quoted),
    "French": Form(_mixed_with(_WORDS["french"])),
    "NFD": Form(_mixed_with(_WORDS["french"]), lambda text: unicodedata.normalize("NFD", text)),
    "entities": Form(_mixed_with(_WORDS["english"] + " &lt; &amp; &quot; r&eacute;sum&eacute;")),
    "full-width letters": Form(_latin, _full_width),
    "mojibake": Form(_latin, _mojibake),
    "Chinese": Form(_characters(0x4E00, 0x9FA5, marks="，。", share=0.08, per_word=3)),
    "Japanese": Form(_characters(0x3041, 0x3093, marks="、。", share=0.08, per_word=3)),
    "Thai": Form(_characters(0x0E01, 0x0E2E, marks=" ", share=0.03, per_word=5)),
    "Khmer": Form(_characters(0x1780, 0x17A2, marks=" ។", share=0.03, per_word=5)),
    "nine-word questions": Form(_latin, num_words=9),
    "seven-word questions, quoted": Form(_latin, _quoted, num_words=7),
    "short Chinese questions": Form(_characters(0x4E00, 0x9FA5, marks="", share=0, per_word=2), num_words=8),
}
assert html.unescape("&eacute;") == "é"


def measure(folder: Path, *, count: int, rule: str = "by-script") -> dict[str, int]:
    """Run clean and split on a corpus of each form; return how many contaminated documents each has left.

    Raises:
      AssertionError: documents without evaluation text were dropped.
    """
    left = {}
    for number, (name, form) in enumerate(FORMS.items()):
        place = folder / f"form{number:02d}"
        (place / "raw").mkdir(parents=True)
        evaluation = [form.text(f"evaluation {index}") for index in range(count)]
        clean = [form.text(f"clean {index}", num_words=150) for index in range(count)]
        dirty = [
            f"{form.text(f'before {index}', num_words=60)}\n{text}\n{form.text(f'after {index}', num_words=60)}"
            for index, text in enumerate(evaluation)
        ]
        rows = [
            {"text": text, "id": f"{kind}{index}"}
            for kind, texts in (("dirty", dirty), ("clean", clean))
            for index, text in enumerate(texts)
        ]
        (place / "raw" / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (place / "evaluation.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in evaluation))
        _run("clean", place / "raw", place / "clean")
        flags = [f"--evaluation={place / 'evaluation.jsonl'}", f"--evaluation_rule={rule}", "--validation=0"]
        _run("split", place / "clean", place / "split", *flags)
        outputs = read_stage(place / "split")["outputs"]
        ids = {record.id for output in outputs for record in read_records(place / "split" / output["file"])}
        left[name] = sum(name.startswith("dirty") for name in ids)
        assert {name for name in ids if name.startswith("clean")} == {f"clean{index}" for index in range(count)}
    return left


def _run(verb: str, source: Path, target: Path, *flags: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = btlm(["corpus", verb, f"--input={source}", f"--output={target}", "--workers=1", *flags])
    if code:
        raise SystemExit(said.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--rule", default="by-script")
    arguments = parser.parse_args()
    for form, num_left in measure(arguments.directory, count=arguments.count, rule=arguments.rule).items():
        print(f"{form:<30} {num_left:>4} of {arguments.count} contaminated documents are left")


if __name__ == "__main__":
    main()
