"""Tables that sort by a click and by keys, made-up data that says so, and pages on a telephone, in headless Chromium."""

from pathlib import Path

import pytest

from instructblip.evaluation.report.page import Report, ReportSection, write_report
from instructblip.evaluation.report.table import MADE_UP_DATA, as_html, score_table
from instructblip.evaluation.results_file import read_run
from tests.kit.browser import Browser
from tests.kit.stored import entry, write_run
from tests.unit.test_report import example, row

pytestmark = pytest.mark.slow

_FIRST = """[...document.querySelectorAll(".sortable tbody tr")].map((e) => e.cells[0].firstChild.textContent.trim())"""
_SORTED = """[...document.querySelectorAll("thead th")].map((e) => e.getAttribute("aria-sort")).filter((e) => e)"""
_WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    rows = [
        row("a", title="Birds", value=9.5, low=8.0, high=11.0, count=900, paper={"vicuna_7b": 8.0}),
        row("b", title="apples", value=86.0, count=1200, marks={MADE_UP_DATA: ""}),
        row("c", title="Cats", value=None, low=None, high=None, count=30, baselines={}),
        row("d", title="Dogs", value=70.0, count=4000, baselines={"chance": 50.0, "images withheld": 12.5}),
    ]
    sections = [ReportSection("a", {"prompt": "x" * 90}, examples=[example("long " * 30)]), ReportSection("b")]
    write_report(path, Report("A title of a run", "outputs/train/x", "LLM y", "2026-01-31", rows, sections))
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    runs = [
        write_run(folder / "one", {"gqa": entry("gqa", 9.5), "nocaps": entry("nocaps", 100.5)}),
        write_run(folder / "two", {"gqa": entry("gqa", 50.0) | {"made_up": True}}),
    ]
    path = folder / "table.html"
    path.write_text(as_html(score_table([read_run(run) for run in runs])), encoding="utf-8")
    return path


def heading(number: int) -> str:
    return f"thead tr:last-child th:nth-child({number}) button"


def test_clicks_sort_numbers_as_numbers_missing_ones_last_and_the_third_restores(
    running: Browser, report: Path
) -> None:
    running.open(report)
    given = running.value(_FIRST)
    assert given == ["Birds", "apples", "Cats", "Dogs"]
    orders = []
    for _ in range(3):
        running.click(heading(4))
        orders.append((running.value(_FIRST), running.value(_SORTED)))
    assert orders == [
        (["apples", "Dogs", "Birds", "Cats"], ["descending"]),
        (["Birds", "Dogs", "apples", "Cats"], ["ascending"]),
        (given, []),
    ]
    running.click(heading(1))
    assert running.value(_FIRST) == ["apples", "Birds", "Cats", "Dogs"]  # as a dictionary has them


def test_the_keyboard_sorts_too(running: Browser, report: Path) -> None:
    running.open(report)
    running.value(f"document.querySelector({heading(3)!r}).focus()")
    for kind in ("keyDown", "keyUp"):
        text = {"text": "\r"} if kind == "keyDown" else {}
        running.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, **text)
    assert running.value(_FIRST) == ["Dogs", "apples", "Birds", "Cats"]
    assert running.value("document.activeElement.className") == "sort"  # where it was, for the next press


def test_the_papers_rows_are_sorted_among_ones_own(running: Browser, table: Path) -> None:
    running.open(table)
    column = 1 + running.value("""[...document.querySelectorAll("thead th")].findIndex((e) => e.title === "gqa")""")
    running.click(heading(column))
    found = running.value(_FIRST)
    assert (found[0][:3], found[-1][:3]) == ("two", "one")  # 50.0, all of the papers', 9.5
    assert len(found) > 4


def test_made_up_data_are_said_where_scores_are(running: Browser, report: Path, table: Path) -> None:
    running.open(report)
    assert "mean nothing: apples" in running.value('document.querySelector(".banner").textContent')
    marked = running.value('[...document.querySelectorAll(".invented")].map((e) => e.parentElement.tagName)')
    assert marked == ["TD", "H2"]
    running.open(table)
    assert "mean nothing: GQA" in running.value('document.querySelector(".banner").textContent')


@pytest.mark.parametrize("width", [420, 1280])
def test_no_page_scrolls_sideways(running: Browser, report: Path, table: Path, width: int) -> None:
    running.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    for page in (table, report):
        running.open(page)
        assert running.value(_WIDER) == 0, page.name
    box = running.value(
        '(() => { const e = document.querySelector(".scroll"); return e.scrollWidth - e.clientWidth; })()'
    )
    assert (box > 0) == (width == 420)  # the table scrolls inside its box
    running.call("Emulation.clearDeviceMetricsOverride")
