"""Put tables that live elsewhere in the repository into pages (a MkDocs hook): `<!-- include PATH -->`.

Headings go down one level, pictures are left out: what a page of the site shows is the file's text and tables.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def on_page_markdown(markdown: str, **_) -> str:
    """Replace the markers of a page (called by MkDocs)."""
    return re.sub(r"<!-- include (\S+) -->", lambda match: _contents(match[1]), markdown)


def _contents(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    text = re.sub(r"^(#+ )", r"#\1", text, flags=re.MULTILINE)
    return re.sub(r"^!\[.*\n?", "", text, flags=re.MULTILINE)
