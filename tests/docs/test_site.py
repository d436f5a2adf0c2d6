"""The built documentation: it builds strictly, and a browser that shows it asks nobody else for anything."""

import html.parser
import re
import subprocess
import sys

import pytest
from support.docs_scripts import DOCS, ROOT

_LOADED = {  # attributes by which a browser loads something, by tag; a link to click is none
    "script": ("src",),
    "img": ("src", "srcset"),
    "link": ("href",),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "form": ("action",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}
_NAMES_ONLY = ("canonical", "next", "prev")  # rel of a link that is not loaded


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


class _Loads(html.parser.HTMLParser):
    """Collects what a page loads, and the class names of its elements."""

    def __init__(self):
        super().__init__()
        self.addresses: list[str] = []
        self.styles: list[str] = []
        self.components: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        self.styles.append(values.get("style", ""))
        self.components += [values.get("data-md-component", ""), *values.get("class", "").split()]
        if tag == "link" and values.get("rel") in _NAMES_ONLY:
            return
        self.addresses += [values[name] for name in _LOADED.get(tag, ()) if name in values]


def _is_foreign(address: str) -> bool:
    return re.match(r"\s*(?:[a-z]+:)?//", address, flags=re.IGNORECASE) is not None


def _loads(text: str) -> _Loads:
    parser = _Loads()
    parser.feed(text)
    return parser


@pytest.mark.slow
def test_no_page_loads_anything_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text()
        loads = _loads(text)
        assert [address for address in loads.addresses if _is_foreign(address)] == [], page
        assert not any("url(" in style for style in loads.styles), page
        for style in re.findall(r"<style.*?>(.*?)</style>", text, flags=re.DOTALL):
            assert not re.search(r"@import|url\(\s*['\"]?(?:https?:)?//", style), page


def test_no_style_sheet_or_drawing_loads_anything_from_elsewhere(site):
    for path in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        text = path.read_text()
        assert not re.search(r"@import|url\(\s*['\"]?(?:https?:)?//|(?:xlink:)?href=\"(?:https?:)?//", text), path


def test_no_script_is_given_a_reason_to_ask_elsewhere(site):
    """Material's script asks github.com for stars where a page names a repository, and unpkg.com for diagrams."""
    for page in site.rglob("*.html"):
        components = _loads(page.read_text()).components
        assert not {"source", "mermaid"} & set(components), page
    ours = [path for path in site.rglob("*.js") if path.relative_to(site).parts[0] != "assets"]
    assert not any(re.search(r"https?://", path.read_text()) for path in ours)


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://example.org/x.js"></script>',
        '<img src="//example.org/x.png">',
        '<link rel="stylesheet" href="HTTPS://example.org/x.css">',
    ],
)
def test_what_is_loaded_from_elsewhere_is_seen(tag):
    assert any(map(_is_foreign, _loads(tag).addresses))


def test_the_site_has_no_scripts_of_the_sources(site):
    assert list(site.rglob("*.py")) == [] and (site / "style.css").is_file()


def test_every_page_has_the_tables_it_includes(site):
    including = ("measurements.md", "plan.md", "pod-table.md", "why-the-recipe.md")
    for page in DOCS.rglob("*.md"):
        assert ("<!-- include " in page.read_text()) == (page.name in including)
    text = (site / "why-the-recipe" / "index.html").read_text()
    assert "down(up(x) silu(gate(x)))" in text and "<!-- include" not in text
    text = (site / "reference" / "pod-table" / "index.html").read_text()
    assert "v5p:4x4x8" in text and "<!-- include" not in text
    text = (site / "guide" / "plan" / "index.html").read_text()
    assert "by the others" in text and "<!-- include" not in text
    assert "optimizer.beta1" in (site / "reference" / "configuration" / "index.html").read_text()
