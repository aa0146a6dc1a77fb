"""`python -m instructblip.training.inspect`: the plan's table, the first samples, the rate, and mistakes in one line."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from instructblip.config.entry import compose_config
from instructblip.config.schema import InspectConfig
from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.data.templates import load_templates
from instructblip.errors import UserError
from instructblip.training.inspection import inspect
from tests.kit.tiny import write_easy_vqa


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    write_easy_vqa(folder / "raw", images=12)
    prepare_dataset(load_card("easy_vqa"), folder / "raw", folder / "shards", progress=False)
    return folder / "shards"


def _inspect(shards: Path, *overrides: str) -> str:
    text = io.StringIO()
    sizes = ("image_size=24", "timed=64", "steps=10", "batch_size=20", "samples=3")
    config = compose_config("inspect", InspectConfig, [f"data.shards={shards}", *sizes, *overrides])
    inspect(config, Console(file=text, width=120))
    return text.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [("workers=1", "data.transform=blip_image_train"), ("data.transform=center_crop",)]
)
def test_table_samples_and_rate(shards: Path, overrides: tuple[str, ...]) -> None:
    text = _inspect(shards, *overrides)
    assert "200 samples in 10 steps" in text
    assert len(re.findall(r"│ easy_vqa_(present|absent|shape|color) ", text)) == 4
    samples = re.findall(
        r"^(\d): easy_vqa_\w+/\S+\n  template     '(.*)'\n  instruction  '(.*)'\n  target       '(.*)'\n"
        r"  image        1 x 24 x 24 pixels$",
        text,
        flags=re.MULTILINE,
    )
    assert [number for number, *_ in samples] == ["0", "1", "2"]
    forms = load_templates("half_bare").templates
    assert all(template in forms and question and target for _, template, question, target in samples)
    assert re.search(rf"the loader alone: [\d,]+ samples/s with {int('workers=1' in overrides)} workers", text)
    rows = re.findall(r"│ (decode|transform|read, text and transport) +│ +([\d.]+) │ +(\d+) │", text)
    assert [name for name, *_ in rows] == ["decode", "transform", "read, text and transport"]
    assert 98 <= sum(int(share) for *_, share in rows) <= 102


@pytest.mark.slow
def test_the_sequence_is_that_of_training(shards: Path) -> None:
    first, second = _inspect(shards), _inspect(shards, "seed=1")
    ids = [re.findall(r"^\d: (\S+)$", text, flags=re.MULTILINE) for text in (first, second, _inspect(shards))]
    assert ids[0] == ids[2] != ids[1]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["data.transform=crop"], "data.transform=crop is none of resize_square, center_crop, blip2_image_train"),
        (["data.cache_features=true"], "leaves nothing to decode"),
        (["mixture.per=epoch"], "mixture.per=epoch is none of sample, image, batch, step"),
        (
            ["mixture.per=batch", "micro_batch_size=3"],
            "whole micro-batches, but there is a batch_size of 20",
        ),
        (["mixture.weights=temperature"], "mixture.weights=temperature needs a mixture.temperature"),
        (["mixture.datasets=[{name: vsr}]"], "trains on vsr, which is held out"),
        (["mixture.datasets=[{name: easy_vqa_shape}, {name: easy_vqa_shape}]"], "names easy_vqa_shape twice"),
        (["samples=-1"], "samples=-1 is too small"),
        (["data.tolerance.fraction=2"], "data.tolerance.fraction=2 is too large; give 1 or less"),
    ],
)
def test_mistakes_are_one_line(shards: Path, overrides: list[str], line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)) as error:
        _inspect(shards, *overrides)
    assert "\n" not in str(error.value)
