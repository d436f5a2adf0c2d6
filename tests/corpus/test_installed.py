"""Finding prose in source files, and skipping what is not."""

import time
from collections import Counter
from pathlib import Path

import pytest

from btlm_jax.corpus.installed import documents as installed

SOURCE = '''#!/usr/bin/env python
"""Module docstring with "quotes" and a \\""" escaped one."""

# First paragraph,
# second line.

x = "# not a comment"  # after code: left out
y = """assigned: not a docstring"""
z = f'{x}' + r"\\"  # another

def f():
    r\'\'\'Raw docstring.

        Indented more.
    \'\'\'
    #: marked
    return "it's"

"""unterminated
'''


def test_prose_of_python_takes_docstrings_and_comment_paragraphs_only():
    assert installed.prose_of_python(SOURCE) == (
        "/usr/bin/env python",
        'Module docstring with "quotes" and a \\""" escaped one.',
        "First paragraph,\nsecond line.",
        "Raw docstring.\n\nIndented more.",
        "marked",
    )


@pytest.mark.parametrize("piece", ['"""', "'", '"\\', "#'\"", "''' ", '"" "'])
def test_pathological_source_takes_linear_time(piece):
    began = time.process_time()
    installed.prose_of_python(piece * 40_000)
    assert time.process_time() - began < 8


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_bad_files_lists_and_tests_are_skipped_and_counted(tmp_path, monkeypatch):
    prose = b"This is a text of the kind that is read, and it has the words that are in it. " * 4
    good = b'"""' + prose + b'"""\n'
    files = {
        "pkg/good.py": good,
        "pkg/latin.py": b'"""caf\xe9"""',
        "pkg/nul.py": b'"""a\0b"""',
        "pkg/huge.py": b"#" * (installed.MAX_FILE_BYTES + 1),
        "pkg/tests/test_x.py": good,
        "pkg/empty.py": b"",
        "pkg/LICENSE.txt": prose,
        "pkg/labels.txt": b"n01440764\ntench\ngoldfish\n" * 50,
        "pkg/guide.md": prose,
        "pkg/data.bin": b"1",
    }
    for name, content in files.items():
        write(tmp_path / name, content)

    class Distribution:
        name = "pkg"

        @staticmethod
        def locate_file(name):
            return tmp_path / name

    Distribution.files = [*sorted(files, reverse=True), "pkg/missing.py", "../../share/doc.md"]
    monkeypatch.setattr(installed, "installed_distributions", lambda: [Distribution])
    monkeypatch.setattr(installed, "_stdlib_documents", lambda skipped: iter(()))
    monkeypatch.setattr(installed.pydoc_data.topics, "topics", {"assert": "The statement."})
    skipped = Counter()
    documents = list(installed.installed_documents(skipped))
    assert [(document.id, document.source) for document in documents] == [
        ("stdlib/pydoc_data/topics/assert", "docs"),
        ("pkg/good.py", "packages"),
        ("pkg/guide.md", "docs"),
    ]
    assert skipped == {
        "not UTF-8": 1,
        "has NUL": 1,
        "over 4 MB": 1,
        "unreadable": 1,
        "licence or list": 1,
        "not prose": 1,
    }


def test_a_broken_installation_is_passed_over(tmp_path, monkeypatch):
    for name, contents in {"whole": "Metadata-Version: 2.1\nName: Whole-One\nVersion: 1\n", "half": ""}.items():
        write(tmp_path / f"{name}-1.dist-info" / "METADATA", contents.encode())
    (tmp_path / "empty-1.dist-info").mkdir()
    monkeypatch.setattr(installed.sys, "path", [str(tmp_path)])
    assert [distribution.name for distribution in installed.installed_distributions()] == ["Whole-One"]


@pytest.mark.slow
def test_this_installation_has_documents_of_every_source_and_no_absolute_path():
    seen = set()
    for document in installed.installed_documents(Counter()):
        assert not document.id.startswith("/") and ".." not in document.id
        seen.add(document.source)
        if seen == set(installed.SOURCES):
            break
    assert seen == set(installed.SOURCES)
    assert "btlm_jax" not in {name.lower() for name in installed.describe_installation()["packages"]}
