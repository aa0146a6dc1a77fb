"""The report: safe with hostile text, self-contained, complete, and its filters at work in a browser."""

import base64
import hashlib
import html
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from instructblip.evaluation.report import (
    Report,
    ReportExample,
    ReportRow,
    ReportSection,
    axis_end,
    candidates,
    write_report,
)

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"' & {{ 7 * 7 }} </style>"


def picture(color: str, size: tuple[int, int] = (8, 6), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format=kind)
    return buffer.getvalue()


def example(question: str, correct: bool = True, image: bytes | None = None, **fields: object) -> ReportExample:
    values: dict[str, object] = {
        "image": image or picture("red"),
        "question": question,
        "instruction": f"Question: {question} Answer:",
        "answer": "yes",
        "prediction": "yes" if correct else "no",
        "correct": correct,
        "scores": [("yes", -0.5), ("no", -2.5)],
    }
    return ReportExample(**{**values, **fields})  # type: ignore[arg-type]


def row(dataset: str = "a", **fields: object) -> ReportRow:
    values: dict[str, object] = {
        "dataset": dataset, "title": f"Dataset {dataset}", "task": "question answering", "mode": "ranking",
        "metric": "accuracy", "count": 1234, "value": 86.54, "low": 85.0, "high": 88.0, "baselines": {"chance": 33.3},
    }  # fmt: skip
    return ReportRow(**{**values, **fields})  # type: ignore[arg-type]


def write(path: Path, sections: list[ReportSection], rows: list[ReportRow] | None = None, title: str = "T") -> str:
    write_report(path, Report(title, "outputs/train/x", "2026-01-31", rows or [row("a"), row("b")], sections))
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_hostile_text_stays_text_everywhere(tmp_path: Path) -> None:
    hostile = example(HOSTILE, instruction=HOSTILE + "!", answer=HOSTILE, prediction=HOSTILE, scores=[(HOSTILE, -1.0)])
    section = ReportSection(HOSTILE, {HOSTILE: HOSTILE}, {HOSTILE: [(HOSTILE, 1, 2.0)]}, [hostile])
    names = {"title": HOSTILE, "task": HOSTILE, "mode": HOSTILE, "metric": HOSTILE, "baselines": {HOSTILE: 1.0}}
    content = write(tmp_path / "r.html", [section], [row(HOSTILE, **names)], title=HOSTILE)
    page = Page(content)
    assert len(page.named("script")) == 1
    assert len(page.named("style")) == 1
    assert page.named("img") == []
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("{{ 7 * 7 }}") >= 12  # shown as it is, never evaluated


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page = Page(write(tmp_path / "r.html", [ReportSection("a", examples=[example("q")])]))
    loaded = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "xlink:href", "data", "action")
    ]
    assert loaded
    assert all(value and value.startswith(("#", "data:image/")) for value in loaded)
    assert page.named("link") == []
    assert "url(" not in page.text
    assert "@import" not in page.text


def test_the_policy_names_exactly_this_style_and_script(tmp_path: Path) -> None:
    content = write(tmp_path / "r.html", [ReportSection("a", examples=[example("q")])])
    (policy,) = [
        meta["content"] for meta in Page(content).named("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (body,) = re.findall(f"<{tag}>(.*?)</{tag}>", content, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not [attributes for _, attributes in Page(content).tags if "style" in attributes]  # the policy would drop it


def test_every_example_is_there_and_each_image_once(tmp_path: Path) -> None:
    images = [picture(color) for color in ("red", "green", "blue")]
    sections = [
        ReportSection(name, examples=[example(f"{name}{n}?", n % 3 > 0, images[n % 3]) for n in range(9)])
        for name in ("a", "b")
    ]
    content = write(tmp_path / "r.html", sections)
    page = Page(content)
    articles = page.named("article")
    assert [article["data-section"] for article in articles] == ["0"] * 9 + ["1"] * 9
    assert [article["data-correct"] for article in articles] == ["wrong", "right", "right"] * 6
    assert content.count("✓ right</span>") == 12
    assert content.count("✗ wrong</span>") == 6
    for section in sections:
        for shown in section.examples:
            assert shown.question in page.text
            assert shown.instruction in page.text
    stored = [image["href"] for image in page.named("image")]
    assert stored == [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
    assert [use["href"] for use in page.named("use")] == [f"#picture-{n % 3}" for n in range(9)] * 2


def test_small_pictures_keep_hard_pixels_and_large_ones_are_stored_reduced(tmp_path: Path) -> None:
    large, jpeg, webp = picture("red", (2000, 1000)), picture("red", (300, 200), "JPEG"), picture("red", (9, 9), "WEBP")
    examples = [example(str(n), image=image) for n, image in enumerate((picture("red"), large, jpeg, webp))]
    page = Page(write(tmp_path / "r.html", [ReportSection("a", examples=examples)]))
    sizes = [(image["width"], image["height"]) for image in page.named("image")]
    assert sizes == [("8", "6"), ("640", "320"), ("300", "200"), ("9", "9")]
    hrefs = [image["href"] or "" for image in page.named("image")]
    assert [href.split(";")[0] for href in hrefs] == ["data:image/png"] + ["data:image/jpeg"] * 3
    assert hrefs[2].endswith(base64.b64encode(jpeg).decode())  # as the file was
    with Image.open(io.BytesIO(base64.b64decode(hrefs[1].split(",")[1]))) as stored:
        assert stored.size == (640, 320)
    classes = [svg["class"] for svg in page.named("svg") if (svg.get("class") or "").startswith("picture")]
    assert classes == ["picture tiny", "picture", "picture", "picture tiny"]


def test_the_table_shows_scores_intervals_and_all_baselines(tmp_path: Path) -> None:
    rows = [
        row("a", baselines={"images withheld": 66.6}),
        row("b", value=121.9, high=124.0, baselines={"paper": 123.1}),
    ]
    content = write(tmp_path / "r.html", [ReportSection("a")], rows)
    text = Page(content).text
    for shown in ("1,234", "86.5", "85.0 to 88.0", "images withheld", "66.6", "121.9", "123.1", "axis 0 to 150"):
        assert shown in text
    assert 'href="#dataset-0">Dataset a' in content  # only what has a section is a link
    assert 'href="#dataset-1"' not in content


def test_protocol_and_breakdowns_are_shown(tmp_path: Path) -> None:
    section = ReportSection(
        "a", {"split": "test", "beam size": "5"}, {"question type": [("why", 2500, 41.25)], "x": []}
    )
    text = Page(write(tmp_path / "r.html", [section])).text
    for shown in ("beam size", "5", "By question type", "why", "2,500", "41.2"):
        assert shown in text


def test_candidates_are_sorted_with_probabilities_that_sum_to_1() -> None:
    rows = candidates(example("q", scores=[("no", -1002.0), ("yes", -1000.0), ("maybe", float("-inf"))]))
    assert [entry["name"] for entry in rows] == ["yes", "no", "maybe"]
    assert [entry["probability"] for entry in rows] == pytest.approx([0.880797, 0.119203, 0.0], abs=1e-6)
    assert (rows[0]["is_answer"], rows[0]["is_prediction"], rows[1]["is_answer"]) == (True, True, False)
    assert candidates(example("q", scores=[])) == []


def test_many_candidates_are_folded_and_open_generation_has_none(tmp_path: Path) -> None:
    many = example("q", scores=[(f"candidate {n}", -float(n)) for n in range(40)])
    content = write(tmp_path / "r.html", [ReportSection("a", examples=[many])])
    assert "34 less likely candidates" in content
    assert content.count("candidate 39<") == 1
    content = write(tmp_path / "r.html", [ReportSection("a", examples=[example("q", scores=[])])])
    assert 'class="candidates"' not in content


def test_the_axis_is_100_unless_a_metric_goes_beyond() -> None:
    assert [axis_end(*values) for values in ((0.0, 3.0), (99.0, 100.0), (100.5,), (151.0, 2.0))] == [100, 100, 150, 200]


def test_a_second_report_replaces_the_first_whole(tmp_path: Path) -> None:
    first = write(tmp_path / "r.html", [ReportSection("a", examples=[example("q")])])
    assert write(tmp_path / "r.html", [ReportSection("a", examples=[example("q")])]) == first
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def browse(path: Path, profile: Path) -> str:
    """The page's document after its scripts ran in headless Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    switches = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync dump-dom"
    )
    command = [browser, *(f"--{switch}" for switch in switches.split()), f"--user-data-dir={profile}", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_filter_and_search_in_a_browser(tmp_path: Path) -> None:
    sections = [
        ReportSection(name, examples=[example(f"{name} is thing {n} red?", n % 2 == 0) for n in range(4)])
        for name in ("a", "b")
    ]
    content = write(tmp_path / "r.html", sections)
    document = browse(tmp_path / "r.html", tmp_path / "profile")
    assert "8 of 8 samples" in document  # the policy lets the page's own script run

    clicks = """<script>
      document.querySelector("input[value=wrong]").click();
      const type = (selector, value) => {
        const element = document.querySelector(selector);
        element.value = value;
        element.dispatchEvent(new Event("input", {bubbles: true}));
      };
      type("select", "1");
      type("input[type=search]", " RED thing  3 ");
    </script></body>"""
    without_policy = re.sub(r"<meta http-equiv[^>]*>", "", content)  # it would stop the clicks' script
    driven = without_policy.replace("</body>", clicks)
    (tmp_path / "driven.html").write_text(driven, encoding="utf-8")
    document = browse(tmp_path / "driven.html", tmp_path / "profile")
    assert "1 of 8 samples" in document
    shown = re.findall(r'<article (?![^>]*hidden)[^>]*>.*?class="question">(.*?)</p>', document, flags=re.DOTALL)
    assert [html.unescape(question) for question in shown] == ["b is thing 3 red?"]
    assert re.search(r'<section id="dataset-0"[^>]*hidden', document)
