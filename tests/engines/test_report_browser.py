"""The report in a browser: everything that can be operated is reached and operated with keys alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Page, browser
from tests.engines.test_report import REMOVED, many, report_files
from tests.engines.test_time_chart import PROFILED

pytestmark = pytest.mark.skipif(browser() is None, reason="no Chromium or Chrome on this machine")

OPERABLE = (
    """[...document.querySelectorAll('a[href], button, summary, [tabindex="0"]')].filter(e => e.checkVisibility())"""
)
FOCUSED = "document.activeElement"
WIDTH = 390  # a phone's
A4 = 688  # CSS pixels between margins of 14 mm


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return report_files(tmp_path_factory.mktemp("report"), PROFILED)


@pytest.fixture(scope="module")
def page(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("browser")
    file = folder / "report.html"
    file.write_bytes(files["report.html"])
    with Page(file, folder, width=WIDTH) as page:
        yield page


def focus(page: Page, element: str) -> None:
    page.run(f"document.activeElement.blur(), window.place = {element}, place.focus()")


def test_tab_visits_everything_in_order_and_shows_where_it_is(page: Page) -> None:
    count = page.run(f"(window.operable = {OPERABLE}).length")
    assert count > 10
    visited = []
    for _ in range(count):
        page.press("Tab")
        visited.append(page.run(f"operable.indexOf({FOCUSED})"))
        outline = page.run(f"getComputedStyle({FOCUSED}).outlineStyle + getComputedStyle({FOCUSED}).outlineWidth")
        assert "none" not in outline
        assert not outline.endswith("0px")
        left, right = page.run(f"(r => [r.left, r.right])({FOCUSED}.getBoundingClientRect())")
        assert right > 0  # the link that is hidden at first is not while it has the focus
        assert left < WIDTH
    assert visited == list(range(count))


def test_the_skip_link_leads_to_the_comparison(page: Page) -> None:
    focus(page, "document.querySelector('.skip')")
    page.press("Enter")
    assert page.run("location.hash") == "#comparison"


def test_a_wide_table_scrolls_with_arrows(page: Page) -> None:
    focus(page, "document.querySelector('#comparison [role=region]')")
    assert page.run("place.scrollWidth > place.clientWidth")
    for _ in range(10):
        page.press("ArrowRight")
    page.run("new Promise(done => setTimeout(done, 300))")  # scrolling is smooth
    assert page.run("place.scrollLeft") > 0


def test_a_folded_table_opens_with_enter(page: Page) -> None:
    focus(page, "document.querySelector('details > summary')")
    before = page.run("place.parentElement.open")
    page.press("Enter")
    assert page.run("place.parentElement.open") is not before


def test_the_data_can_be_downloaded(page: Page, files: dict[str, bytes]) -> None:
    found = {}
    for index in range(page.run("document.querySelectorAll('a[download]').length")):
        focus(page, f"document.querySelectorAll('a[download]')[{index}]")
        file = page.download("Enter")
        found[file.name] = file.read_bytes()
    assert json.loads(found["results-0.json"]) == PROFILED
    assert found["report.csv"] == files["report.csv"]


@pytest.mark.parametrize("count", [3, 9, 12])
def test_nothing_runs_off_a_phone_or_a_printed_page(count: int, tmp_path: Path) -> None:
    document = json.loads(json.dumps(many(count)).replace("engine-01", "x" * 100))
    document["evaluated"] = [{**REMOVED, "label": "y" * 100}]
    file = tmp_path / "report.html"
    file.write_bytes(report_files(tmp_path, document)["report.html"])
    page_width = "document.documentElement.scrollWidth"
    strips = "[...document.querySelectorAll('.strips svg')]"
    with Page(file, tmp_path, width=WIDTH) as page:
        assert page.run(page_width) <= WIDTH  # tables scroll within it
        assert page.run(f"Math.max(...{strips}.map(e => e.getBoundingClientRect().right))") <= WIDTH
        assert page.run(f"new Set({strips}.map(e => e.getBoundingClientRect().width)).size") == 1  # one scale
        page.lay_out_for_print(width=A4)
        assert page.run(page_width) <= A4
        tables = "[...document.querySelectorAll('table')].filter(e => e.checkVisibility())"
        assert page.run(f"{tables}.length") >= 3
        wide = f"{tables}.filter(e => e.scrollWidth > e.parentElement.clientWidth)"
        assert page.run(f"{wide}.map(e => e.className)") == []
