"""The report: safe with hostile text, self-contained, complete. Its filters at work: end_to_end/test_report_browser.py."""

import base64
import dataclasses
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instructblip.errors import UserError
from instructblip.evaluation.report.page import (
    Report,
    ReportExample,
    ReportRow,
    ReportSection,
    axis_end,
    candidates,
    thumbnail,
    write_report,
)
from instructblip.evaluation.report.table import OTHER_SPLIT, SUBSET

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"' & {{ 7 * 7 }} </style>"


def picture(color: str, size: tuple[int, int] = (8, 6), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format=kind)
    return buffer.getvalue()


def example(question: str, correct: bool = True, image: bytes | None = None, **fields: object) -> ReportExample:
    values: dict[str, object] = {
        "picture": thumbnail([image or picture("red")], "a test"),
        "question": question,
        "instruction": f"Question: {question} Answer:",
        "answers": [("yes", 1)],
        "prediction": "yes" if correct else "no",
        "outcome": "right" if correct else "wrong",
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
    write_report(path, Report(title, "outputs/train/x", "LLM y", "2026-01-31", rows or [row("a"), row("b")], sections))
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
    hostile = example(
        HOSTILE, instruction=HOSTILE + "!", answers=[(HOSTILE, 2)], prediction=HOSTILE, scores=[(HOSTILE, -1.0)]
    )
    section = ReportSection(
        HOSTILE,
        {HOSTILE: HOSTILE},
        [(HOSTILE, HOSTILE, HOSTILE)],
        {HOSTILE: [(HOSTILE, 1, 2.0)]},
        [HOSTILE],
        [hostile],
    )
    names = {
        "title": HOSTILE,
        "task": HOSTILE,
        "mode": HOSTILE,
        "metric": HOSTILE,
        "baselines": {HOSTILE: 1.0},
        "marks": {SUBSET: HOSTILE},
    }
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
    assert [article["data-outcome"] for article in articles] == ["wrong", "right", "right"] * 6
    assert content.count("✓ right</span>") == 12
    assert content.count("✗ wrong</span>") == 6
    for section in sections:
        for shown in section.examples:
            assert shown.question in page.text
            assert shown.instruction in page.text
    stored = [image["href"] for image in page.named("image")]
    assert stored == [thumbnail([image], "a test").uri for image in images]
    assert [use["href"] for use in page.named("use")] == [f"#picture-{n % 3}" for n in range(9)] * 2


def test_small_pictures_keep_hard_pixels_and_large_ones_are_stored_reduced(tmp_path: Path) -> None:
    large, jpeg, webp = picture("red", (2000, 1000)), picture("red", (300, 200), "JPEG"), picture("red", (9, 9), "WEBP")
    examples = [example(str(n), image=image) for n, image in enumerate((picture("red"), large, jpeg, webp))]
    page = Page(write(tmp_path / "r.html", [ReportSection("a", examples=examples)]))
    sizes = [(image["width"], image["height"]) for image in page.named("image")]
    assert sizes == [("8", "6"), ("320", "160"), ("300", "200"), ("9", "9")]
    hrefs = [image["href"] or "" for image in page.named("image")]
    kinds = [href.split(";")[0].removeprefix("data:image/") for href in hrefs]
    assert kinds == ["png", "webp", "webp", "png"]
    stored = opened(hrefs[0])
    assert (stored.size, stored.getpixel((3, 3))) == ((8, 6), (255, 0, 0))  # every pixel as it was
    assert opened(hrefs[1]).size == (320, 160)
    classes = [svg["class"] for svg in page.named("svg") if (svg.get("class") or "").startswith("picture")]
    assert classes == ["picture tiny", "picture", "picture", "picture tiny"]


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")


def test_the_frames_of_a_video_stand_side_by_side_in_their_order() -> None:
    colors = ("red", "lime", "blue")
    found = thumbnail([picture(color, (640, 480)) for color in colors], "a test")
    sheet = opened(found.uri)
    assert (sheet.size, found.tiny) == ((found.width, found.height), False)
    assert max(sheet.size) <= 320
    quarters = [sheet.getpixel((sheet.width * x // 4, sheet.height * y // 4)) for y in (1, 3) for x in (1, 3)]
    expected = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    for pixel, color in zip(quarters, expected, strict=True):
        assert pixel == pytest.approx(color, abs=8)


def test_what_is_no_picture_is_told_with_its_place() -> None:
    with pytest.raises(UserError, match="image the_place cannot be decoded"):
        thumbnail([b"nonsense"], "the_place")


@pytest.mark.slow
def test_a_large_report_stays_below_15_megabytes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 255, (30, 40, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
    noisy = Image.fromarray(np.clip(np.array(smooth) + generator.normal(0, 12, (480, 640, 3)), 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    noisy.save(buffer, format="JPEG", quality=90)  # as detailed as photographs are
    one = thumbnail([buffer.getvalue()], "a test")
    scores = [(f"candidate number {n}", -float(n)) for n in range(100)]
    examples = [
        example("q", picture=dataclasses.replace(one, uri=f"{one.uri[:-12]}{number:012d}"), scores=scores)
        for number in range(13 * 60)
    ]
    sections = [ReportSection(f"d{n}", examples=examples[60 * n : 60 * (n + 1)]) for n in range(13)]
    content = write(tmp_path / "r.html", sections)
    assert content.count("<image ") == 780
    assert len(content.encode()) < 15_000_000


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
    rows = [("why", 2500, 41.25), *((f"rare {n}", 1, 0.0) for n in range(20))]
    section = ReportSection(
        "a",
        {"split": "test", "beam size": "5"},
        [("ndcg", "51.3", "50.0 to 52.6"), ("tokenizer", "PTB", "")],
        {"question type": rows, "x": []},
        ["3 samples failed"],
    )
    text = Page(write(tmp_path / "r.html", [section])).text
    for shown in ("beam size", "5", "By question type", "why", "2,500", "41.2", "rare 19", "9 rarer ones"):
        assert shown in text
    for shown in ("Further scores", "50.0 to 52.6", "PTB", "3 samples failed"):
        assert shown in text


def test_the_papers_scores_and_marks_stand_beside_ones_own(tmp_path: Path) -> None:
    rows = [
        row("a", paper={"vicuna_7b": 49.2, "flan_t5_xl": 48.4}, marks={OTHER_SPLIT: "val, the paper: test"}),
        row("b"),
        row("c", value=None, low=None, high=None, paper={"vicuna_7b": 34.5}),
    ]
    content = write(tmp_path / "r.html", [], rows)
    text = Page(content).text
    for shown in ("the papers", "FlanT5-XL", "Vicuna-7B", "49.2", "48.4", "34.5", "answers not public"):
        assert shown in text
    assert "FlanT5-XXL" not in text  # no number, no column
    assert f"† {OTHER_SPLIT.meaning}." in " ".join(text.split())
    assert "another split than the paper&#39;s: val, the paper: test" in content
    assert SUBSET.meaning not in content


@pytest.mark.parametrize(
    ("fields", "expected", "missing"),
    [
        ({"outcome": "partial", "score": 60.0}, ["◐ partly right", "60.0"], "wrong</span>"),
        ({"outcome": "right", "score": 100.0}, ["✓ right"], "100.0"),
        ({"outcome": "", "score": 84.25}, ["84.2"], 'class="verdict">✓'),
        ({"outcome": "", "score": None, "answers": []}, ["prediction"], "<dt>answer"),
        ({"answers": [("blue", 7), ("navy", 1)]}, ['blue <span class="times">\u00d77</span> | navy'], "\u00d71<"),
        ({"answers": [("a long caption of more than forty characters", 1)] * 5}, ['<ul class="several">'], " | "),
    ],
)
def test_outcomes_scores_and_answers_of_a_sample(
    tmp_path: Path, fields: dict[str, object], expected: list[str], missing: str
) -> None:
    content = write(tmp_path / "r.html", [ReportSection("a", examples=[example("q", **fields)])])
    article = " ".join(content[content.index("<article") : content.index("</article>")].split())
    for text in expected:
        assert text in article
    assert missing not in article


def test_candidates_are_sorted_with_probabilities_that_sum_to_1() -> None:
    rows = candidates(example("q", scores=[("no", -1002.0), ("yes", -1000.0), ("maybe", float("-inf"))]))
    assert [entry["name"] for entry in rows] == ["yes", "no", "maybe"]
    assert [entry["probability"] for entry in rows] == pytest.approx([0.880797, 0.119203, 0.0], abs=1e-6)
    assert (rows[0]["is_answer"], rows[0]["is_prediction"], rows[1]["is_answer"]) == (True, True, False)
    assert candidates(example("q", scores=[])) == []


def test_ten_candidates_and_the_answer_are_shown_and_open_generation_has_none(tmp_path: Path) -> None:
    scores = [(f"candidate {n}", -float(n)) for n in range(40)]
    many = example("q", scores=scores, answers=[("candidate 30", 1)])
    assert [entry["rank"] for entry in candidates(many)] == [*range(1, 11), 31]
    content = write(tmp_path / "r.html", [ReportSection("a", examples=[many])])
    assert "7 less likely candidates of 36" in content
    assert content.count("candidate 9<") == 1
    assert "candidate 10<" not in content
    assert '<span class="role">31.</span> candidate 30 <span class="role">(answer)' in content
    content = write(tmp_path / "r.html", [ReportSection("a", examples=[example("q", scores=[])])])
    assert 'class="candidates"' not in content


def test_the_axis_is_100_unless_a_metric_goes_beyond() -> None:
    assert [axis_end(*values) for values in ((0.0, 3.0), (99.0, 100.0), (100.5,), (151.0, 2.0))] == [100, 100, 150, 200]


def test_a_second_report_replaces_the_first_whole(tmp_path: Path) -> None:
    first = write(tmp_path / "r.html", [ReportSection("a", examples=[example("q")])])
    assert write(tmp_path / "r.html", [ReportSection("a", examples=[example("q")])]) == first
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
