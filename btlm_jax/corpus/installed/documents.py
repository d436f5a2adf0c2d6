"""Documents in a Python installation: docstrings, comments and documentation files.

A document is the prose of one file: the docstrings and comment paragraphs of a `.py` file, or the text of a `.md`,
`.rst` or `.txt` file. Its id is a path relative to the installation, so it does not depend on the machine, and
documents come in the order of their ids. Repeated paragraphs and near-duplicates are dropped in memory, the latter by
near_duplicates/lsh.py on one-permutation MinHash of the lower-case text with its punctuation; stages/dedup.py is for
corpora that do not fit into memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import inspect
import pydoc_data.topics
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from btlm_jax.corpus.near_duplicates import MIN_CHARACTERS
from btlm_jax.corpus.near_duplicates.lsh import STRICT, Clusters, band_keys, bucket_pairs, survivors
from btlm_jax.corpus.near_duplicates.minhash import one_permutation

STDLIB, PACKAGES, DOCS = "stdlib", "packages", "docs"
SOURCES = (STDLIB, PACKAGES, DOCS)
MAX_FILE_BYTES = 4_000_000
BINS = STRICT.bands * STRICT.rows
THRESHOLD = 0.8
MIN_BLOCK_CHARACTERS = 60  # of a paragraph; shorter ones may repeat, such as "Returns:"
OWN_DISTRIBUTION = "btlm_jax"  # is left out, as its text changes with every commit

_SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DOC_SUFFIXES = {".md", ".rst", ".txt"}
# Licences and lists, by file name; _is_prose finds other lists.
_SKIPPED_DOCS = re.compile(r"licen[cs]e|copying|notice|authors|record|sources|top_level|entry_points|requires", re.I)
_SPACE = re.compile(r"\s+")
_WORD = re.compile(r"[a-z]+")
_COMMON_WORDS = frozenset("the of to and a in is for that be it with as this are not or by if on".split())

# Matches, in this order: a triple-quoted string at the start of a line (a docstring, or prose used as one); any other
# string, to skip it; consecutive comment lines; a comment after code, to skip it. Quantifiers are possessive or
# bounded, so that no file takes quadratic time.
_PROSE = re.compile(
    r"""
      ^[ \t]*+[rRuU]?(?:\"\"\"((?:[^"\\]++|\\.|"(?!""))*+)\"\"\"|'''((?:[^'\\]++|\\.|'(?!''))*+)''')
    | [rRbBfFuU]{0,2}(?:\"\"\"(?:[^"\\]++|\\.|"(?!""))*+\"\"\"|'''(?:[^'\\]++|\\.|'(?!''))*+''')
    | [rRbBfFuU]{0,2}(?:"(?:[^"\\\n]++|\\.){0,1000}+"|'(?:[^'\\\n]++|\\.){0,1000}+')
    | ^[ \t]*+(\#[^\n]*+(?:\n[ \t]*+\#[^\n]*+)*+)
    | \#[^\n]*+
    """,
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)
_COMMENT_MARK = re.compile(r"^[ \t]*#+[:!]?[ ]?", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """The prose of one file in paragraphs, each a docstring or consecutive comment lines."""

    id: str
    source: str
    blocks: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n\n".join(self.blocks)


def installed_documents(skipped: Counter) -> Iterator[Document]:
    """Yield every document of this installation; count skipped ones in `skipped`, by reason."""
    yield from _stdlib_documents(skipped)
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield Document(id=f"stdlib/pydoc_data/topics/{topic}", source=DOCS, blocks=(text.strip(),))
    for distribution in installed_distributions():
        for file in sorted(str(file) for file in distribution.files or ()):
            yield from _documents_of(
                Path(str(distribution.locate_file(file))), name=file, python_source=PACKAGES, skipped=skipped
            )


def installed_distributions() -> list[importlib.metadata.Distribution]:
    """Return the installed packages except this one, each once, sorted by name."""
    by_name = {}
    for distribution in importlib.metadata.distributions():
        if distribution.metadata["Name"] is None:
            continue  # what a failed installation leaves, which pip passes over too
        name = distribution.name.lower().replace("-", "_")
        if name != OWN_DISTRIBUTION:
            by_name.setdefault(name, distribution)
    return [by_name[name] for name in sorted(by_name)]


def describe_installation() -> dict:
    """Return the versions of Python and of the packages that the documents come from."""
    packages = {distribution.name: distribution.version for distribution in installed_distributions()}
    return {"python": ".".join(map(str, sys.version_info[:3])), "packages": packages}


def prose_of_python(text: str) -> tuple[str, ...]:
    """Return the docstrings and comment paragraphs of Python source, in order, without quotes and comment marks."""
    blocks = []
    for match in _PROSE.finditer(text):
        if match.lastindex == 3:
            blocks.append(_COMMENT_MARK.sub("", match[3]).strip())
        elif match.lastindex is not None:
            blocks.append(inspect.cleandoc(match[match.lastindex]).strip())
    return tuple(block for block in blocks if block)


def drop_repeated_paragraphs(documents: Iterable[Document], skipped: Counter) -> list[Document]:
    """Keep each paragraph in the first document that has it, which drops licence headers; then drop short documents."""
    seen: set[bytes] = set()
    shortened_documents = []
    for document in documents:
        blocks = []
        for block in document.blocks:
            if len(block) >= MIN_BLOCK_CHARACTERS:
                digest = hashlib.blake2b(_SPACE.sub(" ", block).encode("utf-8", "replace"), digest_size=12).digest()
                if digest in seen:
                    skipped["repeated paragraphs"] += 1
                    continue
                seen.add(digest)
            blocks.append(block)
        shortened = Document(id=document.id, source=document.source, blocks=tuple(blocks))
        if len(shortened.text) < MIN_CHARACTERS:
            skipped["short documents"] += 1
        else:
            shortened_documents.append(shortened)
    return shortened_documents


def drop_near_duplicates(documents: list[Document], skipped: Counter) -> list[Document]:
    """Return one document of each cluster of near-duplicates, in order: the longest, of equally long ones by id."""
    if not documents:
        return []
    signatures = np.stack([signature(document.text) for document in documents])

    def agree(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.mean(signatures[first] == signatures[second], axis=1) >= THRESHOLD

    numbers = np.arange(len(documents))
    clusters = Clusters(len(documents))
    for keys in band_keys(signatures, STRICT):
        clusters.join(bucket_pairs(keys, numbers, agree=agree))
    is_kept = survivors(
        clusters.roots(numbers),
        lengths=np.array([len(document.text) for document in documents]),
        ranks=np.unique([document.id for document in documents], return_inverse=True)[1],
    )
    skipped["near-duplicate documents"] += len(documents) - int(is_kept.sum())
    return [documents[index] for index in np.flatnonzero(is_kept)]


def signature(text: str) -> np.ndarray:
    """Return the one-permutation MinHash of the text's character 13-grams, uint32 [256]."""
    data = _SPACE.sub(" ", text.lower()).encode("utf-8", "replace")
    return one_permutation([np.frombuffer(data, np.uint8)], bins=BINS)


def _stdlib_documents(skipped: Counter) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        yield from _documents_of(path, name=f"stdlib/{path.relative_to(root)}", python_source=STDLIB, skipped=skipped)


def _documents_of(path: Path, *, name: str, python_source: str, skipped: Counter) -> Iterator[Document]:
    parts = Path(name).parts
    is_python = path.suffix == ".py"
    if not (is_python or path.suffix in _DOC_SUFFIXES) or ".." in parts or _SKIPPED_FOLDERS.intersection(parts):
        return
    if not is_python and _SKIPPED_DOCS.search(path.name):
        skipped["licence or list"] += 1
        return
    text = _read(path, skipped)
    if text and not is_python and not _is_prose(text):
        skipped["not prose"] += 1
    elif text:
        blocks = prose_of_python(text) if is_python else (text.strip(),)
        yield Document(id=name, source=python_source if is_python else DOCS, blocks=blocks)


def _is_prose(text: str) -> bool:
    """Return whether at least one word in 20 is a very common English word, which tables and lists hardly contain."""
    words = _WORD.findall(text.lower())
    return 20 * sum(word in _COMMON_WORDS for word in words) >= len(words) > 0


def _read(path: Path, skipped: Counter) -> str:
    try:
        data = path.read_bytes()
    except OSError:
        skipped["unreadable"] += 1
        return ""
    if len(data) > MAX_FILE_BYTES:
        skipped["over 4 MB"] += 1
        return ""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
        return ""
    if "\0" in text:
        skipped["has NUL"] += 1
        return ""
    return text.replace("\r\n", "\n")
