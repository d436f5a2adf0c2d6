"""Documents in a Python installation: docstrings, comments and documentation files.

A document is the prose of one file: the docstrings and comment paragraphs of a `.py` file, or the text of a `.md`,
`.rst` or `.txt` file. Its id is a path relative to the installation, so it does not depend on the machine, and
documents come in the order of their ids.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import pydoc_data.topics
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

STDLIB, PACKAGES, DOCS = "stdlib", "packages", "docs"
SOURCES = (STDLIB, PACKAGES, DOCS)
MAX_FILE_BYTES = 4_000_000
OWN_DISTRIBUTION = "btlm_jax"  # is left out, as its text changes with every commit

_SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DOC_SUFFIXES = {".md", ".rst", ".txt"}
# Licences and lists, by file name; _is_prose finds other lists.
_SKIPPED_DOCS = re.compile(r"licen[cs]e|copying|notice|authors|record|sources|top_level|entry_points|requires", re.I)
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
