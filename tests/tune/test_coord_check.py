"""The coordinate check: right parametrizations are flat, and every broken one is caught."""

import dataclasses

import numpy as np
import pytest

from btlm_jax.tune.coord_check import FULL, CaseResult, Design
from btlm_jax.tune.coord_report import format_table, report_coord_check, write_plot
from btlm_jax.tune.mutations import BTLM, CASES, NO_OUTPUT_SCALE

pytestmark = pytest.mark.fully_optimized


def result(case, *, slope: float, spread: float, design: Design = FULL) -> CaseResult:
    """A made-up measurement with this slope and spread."""
    x = np.log2(design.widths)
    statistics = {"flat one": tuple(0 * x), "tilted one": tuple(3 + slope * x)}
    return CaseResult(case=case, design=design, statistics=statistics, losses=(4.0 + spread, *[4.0] * (len(x) - 1)))


@pytest.mark.parametrize(
    ("case", "slope", "spread", "expected"),
    [
        (BTLM, 0.11, 0.1, True),
        (BTLM, -0.13, 0.1, False),
        (BTLM, 0.0, 0.13, False),
        (BTLM, np.nan, 0.0, False),
        (BTLM, 0.0, np.nan, False),
        (NO_OUTPUT_SCALE, 0.24, 0.29, False),
        (NO_OUTPUT_SCALE, -0.26, 0.0, True),
        (NO_OUTPUT_SCALE, 0.0, 0.31, True),
        (NO_OUTPUT_SCALE, np.nan, 0.0, True),
    ],
)
def test_verdict(case, slope, spread, expected):
    found = result(case, slope=slope, spread=spread)
    assert found.is_as_expected == expected
    if np.isfinite(slope):
        assert found.slopes == pytest.approx({"flat one": 0.0, "tilted one": slope})


def test_a_wrong_case_fails_the_table_by_name():
    right, wrong = result(BTLM, slope=0.0, spread=0.0), result(NO_OUTPUT_SCALE, slope=0.1, spread=0.0)
    assert format_table([right]).endswith("passed: all 1 cases are as expected")
    assert format_table([right, wrong]).endswith("failed: logits unscaled")


def test_plot_is_a_png(tmp_path):
    write_plot([result(case, slope=0.1, spread=0.0) for case in CASES[:3]], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


@pytest.mark.parametrize("change", [{"widths": (64,)}, {"widths": (64, 100)}, {"cases": ()}, {"seeds": ()}])
def test_a_senseless_design_is_refused(change):
    with pytest.raises(ValueError):
        dataclasses.replace(FULL, **change)


@pytest.mark.slow
def test_right_ones_pass_and_broken_ones_do_not(tmp_path):
    """A sample of `btlm tune coord-check`: the recipe, and the nearest of the broken ones.

    The middle one of three widths at equal distances does not enter their slope.
    """
    names = ("btlm", "attention / sqrt(d)")
    design = dataclasses.replace(
        FULL, cases=tuple(case for case in CASES if case.name in names), widths=FULL.widths[::2]
    )
    assert len(design.cases) == len(names)
    report = report_coord_check(design, directory=tmp_path)
    assert report.passed, report.table
    assert (tmp_path / "coord_check.txt").read_text() == report.table + "\n"
