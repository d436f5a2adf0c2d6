"""The page of the family has the table that its configs and their plans give."""

import json
import runpy

from support.docs_scripts import DOCS, ROOT, load_script

from btlm_jax.plan.chips import CHIPS
from btlm_jax.plan.search import SPARE
from btlm_jax.plan.table_text import format_table_markdown

FAMILY = ROOT / "configs" / "family"


def test_the_page_has_the_table_as_it_is():
    renew_family = load_script("renew_family.py")
    page = (DOCS / "reference" / "family.md").read_text()
    assert renew_family.renewed(page) == page
    for size in ("4M", "12M", "40M", "111M", "256M", "590M", "1.3B", "2.7B"):
        assert f"\n| `family/{size}` | " in page
    assert renew_family.renewed(page.replace("2,646,255,744", "1")) == page != page.replace("2,646,255,744", "1")


def test_the_plans_are_of_the_files_and_fit_with_memory_to_spare():
    table = json.loads((FAMILY / "table.json").read_text())
    assert (FAMILY / "table.md").read_text() == format_table_markdown(table)
    modules = {path.stem: runpy.run_path(str(path)) for path in FAMILY.glob("*.py")}
    placed = {name: module["TOPOLOGY"] for name, module in modules.items() if "TOPOLOGY" in module}
    assert {row["name"]: row["topology"] for row in table["rows"]} == placed
    for row in table["rows"]:
        assert row["is_config"] and row["fits"] and row["available_bytes"] == CHIPS[row["chip"]].hbm_bytes
        assert row["needed_bytes"] < (1 - SPARE) * row["available_bytes"]
