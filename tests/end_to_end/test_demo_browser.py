"""The page to try, in headless Chromium by clicks: upload, ask, rank, look, match; two checkpoints; what is refused."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from instructblip.config.schema import DemoConfig, DemoLimitsConfig
from instructblip.demo.asking import Subject
from instructblip.demo.examples import Example
from instructblip.weights.load import load_model
from tests.kit.blip2 import write_retrieval
from tests.kit.browser import Browser
from tests.kit.tiny import tiny_huggingface

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="gradio is not installed (requirements-demo.txt)")

PROMPT, MARKUP = "what color is the shape?", "<img src=x onerror=alert(1)> ${1+1} {{1+1}}"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, color in {"red": (220, 30, 30), "blue": (30, 40, 220)}.items():
        Image.new("RGB", (60, 40), color).save(folder / f"{name}.png")
    Image.new("L", (2001, 1000)).save(folder / "large.png")
    (folder / "broken.png").write_bytes(b"\x89PNG, but no more than that")
    return folder


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    """An InstructBLIP, and a BLIP-2 that matches and writes nothing."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_huggingface(folder / "answering")
    write_retrieval(folder / "matching")
    return [Subject(load_model(folder / name, device="cpu"), name) for name in ("answering", "matching")]


@pytest.fixture(scope="module")
def address(subjects: list[Subject], pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of both, served."""
    from instructblip.demo.page import Page

    limits = DemoLimitsConfig(pixels=2_000_000, candidates=3)
    config = DemoConfig(checkpoint="answering", beside="matching", limits=limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        patch.setenv("GRADIO_SHARE", "True")  # which the page does not listen to
        page = Page(subjects, [Example(pictures / "blue.png", "is it blue?", ("yes", "no"))], config)
        local, public = page.open()
        assert public is None
        assert local.startswith("http://127.0.0.1:")
        yield local
        page.close()


@pytest.fixture
def tab(running: Browser, address: str) -> Browser:
    """The page freshly opened."""
    running.visit(address)
    running.wait_for("!!document.querySelector('#picture input[type=file]')")
    return running


def give_picture(tab: Browser, path: Path) -> None:
    tab.upload("#picture input[type=file]", path)
    tab.wait_for("!!document.querySelector('#picture img')")


def write(tab: Browser, place: str, text: str) -> None:
    tab.click(f"#{place} textarea")
    tab.type(text)


def choose(tab: Browser, title: str) -> None:
    """Click on a tab by its title."""
    tab.wait_for(
        f"(() => {{ const b = [...document.querySelectorAll('button[role=tab]')].find("
        f"e => e.textContent.trim() == {json.dumps(title)} && e.checkVisibility());"
        "if (b) b.id = 'wanted-tab'; return !!b; })()"
    )
    tab.click("#wanted-tab")
    tab.value("document.querySelector('#wanted-tab').removeAttribute('id')")


def said(tab: Browser, place: str) -> str:
    """What stands in a place, once it says something."""
    return str(tab.wait_for(f"document.querySelector('#{place}')?.innerText.trim()"))


def test_a_picture_is_asked_about(tab: Browser, subjects: list[Subject], pictures: Path) -> None:
    give_picture(tab, pictures / "red.png")
    write(tab, "prompt", PROMPT)
    tab.click("#ask")
    (expected,) = subjects[0].model.generate(
        [Image.open(pictures / "red.png")], [PROMPT], max_new_tokens=30, min_new_tokens=1
    )
    shown = expected.replace("\r\n", "\n").replace("\r", "\n")  # by a textarea
    tab.wait_for(f"document.querySelector('#generate-0 textarea').value == {json.dumps(shown)}")
    assert "Greedy" in said(tab, "how")
    assert "has no head to generate text with" in said(tab, "generate-1")


def test_candidates_have_bars_and_markup_is_text(tab: Browser, pictures: Path) -> None:
    give_picture(tab, pictures / "red.png")
    write(tab, "prompt", PROMPT)
    choose(tab, "Candidates")
    write(tab, "candidates", f"red\r{MARKUP}\rred\r\rblue")
    tab.click("#rank")
    tab.wait_for("document.querySelectorAll('#rank-0 tbody tr').length == 3")
    rows = tab.value("[...document.querySelectorAll('#rank-0 tbody tr')].map(r => [...r.cells].map(c => c.innerText))")
    assert {row[0] for row in rows} == {"red", "blue", MARKUP}
    shares = [float(row[1].rstrip("%")) for row in rows]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert shares == sorted(shares, reverse=True)
    widths = tab.value("[...document.querySelectorAll('#rank-0 .bar')].map(b => b.getBoundingClientRect().width)")
    assert widths[0] > widths[1] >= widths[2] > 0
    write(tab, "candidates", "\rgreen")
    tab.click("#rank")
    assert "4 candidates, and the page takes 3" in said(tab, "wrong-rank p")


def test_a_heat_map_for_each_layer(tab: Browser, pictures: Path) -> None:
    give_picture(tab, pictures / "red.png")
    write(tab, "prompt", PROMPT)
    choose(tab, "Attention")
    tab.click("#look")
    tab.wait_for("document.querySelectorAll('#attention-0 img').length == 3")
    tab.wait_for("[...document.querySelectorAll('#attention-0 img')].every(i => i.naturalWidth == 60)")
    assert "mean of 2 layers" in said(tab, "attention-0")
    assert "layer 2" in said(tab, "attention-0")
    assert tab.wait_for("document.querySelectorAll('#attention-1 img').length") == 3  # BLIP-2's queries, too


def test_a_text_is_matched(tab: Browser, subjects: list[Subject], pictures: Path) -> None:
    give_picture(tab, pictures / "red.png")
    choose(tab, "Match")
    write(tab, "text", "a dog")
    tab.click("#match")
    expected = float(subjects[1].model.match([Image.open(pictures / "red.png")], ["a dog"]))
    tab.wait_for(f"document.querySelector('#match-1').innerText.includes('{100 * expected:.1f}%')")
    assert "has no head to match images and texts with" in said(tab, "match-0")


def test_stop_ends_the_writing(
    tab: Browser, subjects: list[Subject], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def generate(images: object, on_text: Callable[[str], None], **options: object) -> list[str]:
        """Writes for a minute, where nobody ends it."""
        try:
            for count in range(600):
                on_text("word " * (count + 1))
                time.sleep(0.1)
        finally:
            ended.set()
        return ["the end"]

    monkeypatch.setattr(subjects[0].model, "generate", generate)
    give_picture(tab, pictures / "red.png")
    write(tab, "prompt", PROMPT)
    tab.click("#ask")
    tab.wait_for("document.querySelector('#generate-0 textarea').value.startsWith('word word')")
    tab.click("#stop")
    assert ended.wait(timeout=30)


def test_an_example_fills_the_page(tab: Browser) -> None:
    tab.wait_for("!!document.querySelector('#examples img')")
    tab.click("#examples img")
    tab.wait_for("!!document.querySelector('#picture img')")
    tab.wait_for("document.querySelector('#prompt textarea').value == 'is it blue?'")
    choose(tab, "Candidates")
    tab.wait_for("document.querySelector('#candidates textarea').value == 'yes\\nno'")
    tab.click("#rank")
    tab.wait_for("document.querySelectorAll('#rank-0 tbody tr').length == 2")


def test_what_is_wrong_is_one_line(tab: Browser, pictures: Path) -> None:
    tab.click("#ask")
    assert said(tab, "wrong-answer p").startswith("there is no picture yet")
    for name, line in {
        "broken": "the image you gave cannot be decoded",
        "large": "the picture has 2,001 x 1,000 pixels, and the page takes 2 million",
    }.items():
        tab.visit(str(tab.value("location.href")))
        tab.wait_for("!!document.querySelector('#picture input[type=file]')")
        tab.upload("#picture input[type=file]", pictures / f"{name}.png")
        tab.wait_for("!!document.querySelector('#picture img')")
        write(tab, "prompt", PROMPT)
        tab.click("#ask")
        assert said(tab, "wrong-answer p").startswith(line)
        assert "Traceback" not in tab.text()


def test_nothing_is_fetched_from_elsewhere(tab: Browser, address: str) -> None:
    found = tab.value("performance.getEntriesByType('resource').map(e => e.name)")
    assert found
    assert [name for name in found if not name.startswith((address, "data:", "blob:"))] == []


def test_it_fits_a_phone(tab: Browser, pictures: Path) -> None:
    tab.resize(420, 900)
    give_picture(tab, pictures / "red.png")
    assert tab.value("document.documentElement.scrollWidth") <= 420
    tab.resize(1280, 1100)
