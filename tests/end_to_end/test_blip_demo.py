"""A small BLIP on the demo's parts: the experiments, one from the other, and CapFilt by its captioner and its filter."""

import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import instructblip
from instructblip.config.schema import TrainConfig
from instructblip.errors import UserError
from instructblip.models.blip import BLIPRetrieval
from instructblip.models.vision import ChannelNorm
from instructblip.training.planned import print_plan
from instructblip.weights.blip import save_blip
from instructblip.weights.checkpoint import load_checkpoint, newest_whole
from instructblip.weights.start import Start
from tests.kit.runs import REPOSITORY, World, compose, one_thread

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from capfilt_study import RUNS, Picture, Study, counts, share, shuffled, table, url

pytestmark = pytest.mark.slow

EXPERIMENTS = ("blip_demo", "blip_demo_caption", "blip_demo_retrieval", "blip_demo_vqa")
SEED = 1


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_planned_and_goes_on_from_pre_training(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose("train", TrainConfig, [f"experiment={name}", "plan=true"])
    assert print_plan(config, Console()) == 0
    assert "It fits" in capsys.readouterr().out
    assert config.name == config.recipe.name == name
    assert config.init_from == ([] if name == "blip_demo" else ["outputs/train/blip_demo"])
    assert (config.train.vision, config.data.cache_features, config.vision.norm) == ("frozen", True, "channel")


@pytest.fixture(scope="module")
def study(world: World, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """One seed: two steps of each run, on tiny parts, and CapFilt of the test pictures."""
    parts = [item for item in world.train if item.startswith(("vision.", "data."))]
    parts += [item.replace("qformer.", "text.") for item in world.train if item.startswith("qformer.sources.path=")]
    steps = dict.fromkeys(RUNS, 2)  # after which the filter is sure of nothing
    study = Study(tmp_path_factory.mktemp("study"), steps=steps, pictures=8, threshold=0.0, parts=parts)
    with world.here(), one_thread():
        study.do(SEED)
    return study


def _model(study: Study, name: str) -> dict[str, torch.Tensor]:
    checkpoint, _ = newest_whole(study.folder / f"{name}_{SEED}" / "checkpoints")
    assert checkpoint is not None
    loaded = load_checkpoint(checkpoint)
    start = Start.from_json(loaded.state["start"])
    assert "vision encoder" not in start.new  # the demo's, frozen: no run holds it
    assert [found["name"] for found in start.weights] == (
        [] if RUNS[name].after is None else [f"{RUNS[name].after}_{SEED}"]
    )
    return loaded.model


def test_captioner_and_filter_start_from_the_one_pre_training(study: Study) -> None:
    before = _model(study, "pretrain")
    for name in ("captioner", "filter"):
        after = _model(study, name)
        for part in ("mean", "std"):  # measured once, in pre-training
            assert torch.equal(after[f"vision_norm.{part}"], before[f"vision_norm.{part}"])
            assert after[f"vision_norm.{part}"].std() > 0


def test_every_text_of_the_web_is_right_or_wrong_and_counted_once(study: Study) -> None:
    entry = study.measured()[SEED]
    texts, report = entry["texts"], entry["report"]
    gone, wrong = texts["wrong texts of the web that go"]
    stay, right = texts["right texts of the web that stay"]
    assert (gone, wrong, stay, right) == (0, 4, 4, 4)
    assert report["web"].get("kept", 0) == wrong - gone + stay
    assert report["synthetic"].get("kept", 0) == texts["right among captions that stay"][1]
    assert texts["right among all texts after"][1] == wrong - gone + stay + report["synthetic"].get("kept", 0)
    assert table(study.measured(), [SEED]).row_count == 6


def test_what_goes_and_what_stays_is_counted_by_what_a_picture_shows() -> None:
    shown = ["a red circle", "a blue circle", "a red circle", "a teal triangle"]
    pictures = [Picture(b"", shows, text) for shows, text in zip(shown, [shown[3], *shown[1:]], strict=True)]
    listed = [
        {"url": url(0), "caption": "oh a red circle", "source": "synthetic"},
        {"url": url(1), "caption": "a blue circle", "source": "web"},
        {"url": url(2), "caption": "a teal triangle", "source": "synthetic"},
    ]
    assert list(counts(pictures, listed).values()) == [[1, 1], [1, 3], [0, 2], [1, 2], [3, 4], [1, 3]]
    assert share(1, 1) == "100.0 [20.7, 100.0]  1 of 1"  # Wilson: 1 / (1 + 1.96 ** 2)


def test_half_of_the_texts_are_of_pictures_that_show_something_else() -> None:
    shown = ["a red circle", "a blue circle"] * 5
    pictures = [Picture(b"", text, text) for text in shown]
    made = shuffled(pictures, SEED)
    assert sum(picture.text != picture.caption for picture in made) == 5
    assert [picture.caption for picture in made] == shown
    assert made == shuffled(pictures, SEED) != shuffled(pictures, SEED + 1)


def test_all_of_a_cnns_tokens_stand_for_the_image_and_no_other_format_holds_it(study: Study, tmp_path: Path) -> None:
    model = instructblip.load(study.folder / f"filter_{SEED}", device="cpu")
    assert isinstance(model, BLIPRetrieval)
    assert isinstance(model.vision_norm, ChannelNorm)
    size = model.vision.image_size
    pixels = torch.randint(0, 256, (2, 1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens_B1PU = model.image_tokens(pixels)
    other_B1PU = tokens_B1PU.clone()
    other_B1PU[:, :, -1] += 1  # the last place, which [CLS] of a ViT alone would know of
    found, changed = (model.encode_images(tokens).projected_BQE for tokens in (tokens_B1PU, other_B1PU))
    assert not torch.allclose(found, changed, atol=1e-4)
    assert torch.allclose(found, model.encode_images(tokens_B1PU.flip(2)).projected_BQE, atol=1e-5)
    with pytest.raises(UserError, match="has no place in"):
        save_blip(model, tmp_path / "model.pth")
    with pytest.raises(UserError):
        model.save_huggingface(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
