"""The code that the documentation shows is the code of the package."""

import pytest
from support.docs_scripts import DOCS, load_script

refresh_excerpts = load_script("refresh_excerpts.py")

PAGES = sorted(path for path in DOCS.rglob("*.md") if "<!-- from " in path.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_excerpt_is_the_code(page):
    text = page.read_text()
    assert text.count("<!-- from ") == refresh_excerpts.num_excerpts(text) > 0  # a marker without code is a mistake
    assert text == refresh_excerpts.refreshed(text), "run python docs/refresh_excerpts.py"


def test_one_batch_is_followed_in_eight_excerpts():
    page = (DOCS / "internals" / "follow-one-batch.md").read_text()
    assert refresh_excerpts.num_excerpts(page) == 8


def test_a_changed_excerpt_is_seen():
    page = PAGES[0].read_text()
    assert refresh_excerpts.refreshed(page.replace("return ", "return  ", 1)) == page
