"""The report in headless Chromium: filter, search and larger pictures by real clicks and keys."""

import re
from pathlib import Path

import pytest

from instructblip.evaluation.report.page import Report, ReportSection, write_report
from tests.kit.browser import Browser
from tests.unit.test_report import example, row

_VISIBLE = """[...document.querySelectorAll(".example")].filter((e) => e.checkVisibility())
    .map((e) => e.querySelector(".question").textContent)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of six samples: two right, two partly right, two wrong."""
    folder = tmp_path_factory.mktemp("report")
    outcomes = ("right", "partial", "wrong")
    sections = [
        ReportSection(
            name,
            examples=[example(f"{name}: is thing {n} red?", outcome=outcomes[n % 3], score=50.0) for n in range(6)],
        )
        for name in ("a", "b")
    ]
    report = Report("T", "outputs/train/x", "LLM y", "2026-01-31", [row("a"), row("b")], sections)
    write_report(folder / "report.html", report)
    return folder / "report.html"


@pytest.fixture
def tab(running: Browser, page: Path) -> Browser:
    """The page freshly opened."""
    running.open(page)
    return running


def questions(*numbers: int, of: str = "ab") -> list[str]:
    return [f"{name}: is thing {number} red?" for name in of for number in numbers]


def counted(tab: Browser) -> str:
    return str(tab.value('document.querySelector("output").textContent'))


@pytest.mark.slow
def test_everything_is_shown_at_first(tab: Browser) -> None:
    assert tab.value(_VISIBLE) == questions(0, 1, 2, 3, 4, 5)
    assert counted(tab) == "12 of 12 samples"  # the page's policy lets its own script run


def test_wrong_ones_then_a_search(tab: Browser) -> None:
    tab.click("input[value=wrong]")
    assert tab.value(_VISIBLE) == questions(2, 5)
    tab.click("input[type=search]")
    tab.type("B: THING  5")
    assert tab.value(_VISIBLE) == questions(5, of="b")
    assert counted(tab) == "1 of 12 samples"
    nothing = tab.value('document.querySelector("#dataset-0 .nothing").checkVisibility()')
    assert nothing is True  # dataset a says that none of its samples is left
    tab.type(" partly")  # the words of the page itself are not searched
    assert tab.value(_VISIBLE) == []


@pytest.mark.parametrize(("outcome", "numbers"), [("right", (0, 3)), ("partial", (1, 4)), ("wrong", (2, 5))])
def test_each_outcome(tab: Browser, outcome: str, numbers: tuple[int, ...]) -> None:
    tab.click(f"input[value={outcome}]")
    assert tab.value(_VISIBLE) == questions(*numbers)
    tab.click("input[value=all]")
    assert len(tab.value(_VISIBLE)) == 12


def test_one_dataset_alone(tab: Browser) -> None:
    tab.call("DOM.enable")
    tab.value('document.querySelector(".controls select").focus()')
    tab.press("ArrowDown", 40)
    tab.press("ArrowDown", 40)
    assert tab.value(_VISIBLE) == questions(0, 1, 2, 3, 4, 5, of="b")
    assert tab.value('document.querySelector("#dataset-0").hidden') is True
    tab.click("input[value=right]")
    assert counted(tab) == "2 of 12 samples"


@pytest.mark.slow
def test_a_click_makes_a_picture_larger_and_another_smaller(tab: Browser) -> None:
    width = 'document.querySelector("#dataset-1 .picture").getBoundingClientRect().width'
    before = tab.value(width)
    tab.click("#dataset-1 .zoom")
    assert tab.value(width) > 2 * before
    tab.click("#dataset-1 .zoom")
    assert tab.value(width) == before


@pytest.mark.slow
def test_a_link_of_the_table_leads_to_its_dataset(tab: Browser) -> None:
    tab.click('.summary a[href="#dataset-1"]')
    assert re.search("#dataset-1$", tab.value("location.href"))
