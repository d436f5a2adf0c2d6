"""The page of the family has the table that its configs and their plans give."""

from support.docs_scripts import DOCS, load_script


def test_the_page_has_the_table_as_it_is():
    renew_family = load_script("renew_family.py")
    page = (DOCS / "reference" / "family.md").read_text()
    assert renew_family.renewed(page) == page
    for size in ("4M", "12M", "40M", "111M", "256M", "590M", "1.3B", "2.7B"):
        assert f"\n| `family/{size}` | " in page
    assert renew_family.renewed(page.replace("2,646,255,744", "1")) == page != page.replace("2,646,255,744", "1")
