"""The drawings in the documentation are what their script draws, of the package's own numbers."""

import re
import xml.etree.ElementTree

import pytest
from support.docs_scripts import DOCS, ROOT, load_script, markdown_pages

FOLDER = DOCS / "drawings"
draw = load_script("drawings/draw.py")

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", draw.DRAWINGS)
def test_the_file_is_what_the_script_draws(name):
    assert (FOLDER / f"{name}.svg").read_text() == draw.DRAWINGS[name]().svg(), "run python docs/drawings/draw.py"


def test_there_are_no_other_files():
    assert {path.stem for path in FOLDER.glob("*.svg")} == set(draw.DRAWINGS)


@pytest.mark.parametrize("name", draw.DRAWINGS)
def test_a_drawing_can_be_read_aloud_and_stays_inside_its_frame(name):
    root = xml.etree.ElementTree.fromstring(draw.DRAWINGS[name]().svg())
    assert root.get("role") == "img" and root.find(f"{SVG}title").text and root.find(f"{SVG}desc").text
    _, _, width, height = map(float, root.get("viewBox").split())
    for text in root.iter(f"{SVG}text"):
        wide = "code" in text.get("class", "") or "head" in text.get("class", "")
        length = (8.3 if wide else 7.3) * len(text.text)  # units of a 14 px letter, at most, on average
        x, y = float(text.get("x")), float(text.get("y"))
        start = x - {"middle": length / 2, "end": length}.get(text.get("text-anchor"), 0)
        assert start >= 0 and start + length <= width and 10 < y < height, text.text


@pytest.mark.parametrize("name", draw.DRAWINGS)
def test_every_drawing_is_shown_with_a_text_for_those_who_do_not_see_it(name):
    pages = [path.read_text() for path in markdown_pages()]
    shown = [
        page.split(f"drawings/{name}.svg)")[0].rsplit("![", 1)[1] for page in pages if f"drawings/{name}.svg)" in page
    ]
    assert shown and all(len(alternative.removesuffix("](").split()) > 8 for alternative in shown)


@pytest.mark.parametrize("name", draw.DRAWINGS)
def test_names_from_the_code_are_functions_of_the_package(name):
    code = "".join(path.read_text() for path in (ROOT / "btlm_jax").rglob("*.py"))
    root = xml.etree.ElementTree.fromstring(draw.DRAWINGS[name]().svg())
    names = {text.text for text in root.iter(f"{SVG}text") if re.fullmatch(r"[a-z]+(?:_[a-z]+)+", text.text)}
    assert sorted(each for each in names if f"def {each}(" not in code) == []
