"""ViT -> BLIP-2's first stage -> its second -> instruction tuning: each run starts from the one before."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

import instructblip
from instructblip.config.schema import TrainConfig
from instructblip.models.blip2 import BLIP2
from instructblip.models.instructblip import InstructBLIP
from instructblip.training.run import train
from instructblip.weights.checkpoint import load_checkpoint, newest_whole
from instructblip.weights.load import find_source
from tests.kit.families import write_llm
from tests.kit.runs import World, compose, evaluate_here, one_thread, read_lines, scores
from tests.kit.tiny import tiny_images

STEPS = 2
PHASE = (
    f"recipe.phases.align.steps={STEPS}",
    "recipe.phases.align.batch_size=4",
    "recipe.phases.align.micro_batch_size=2",
    "recipe.precision=fp32",
    "vision.dtype=float32",
    "mixture.datasets=[{name: coco_caption}]",
    "data.synthetic=true",
    "suite=none",
)


@dataclass(frozen=True)
class Chain:
    """Folders of the three runs."""

    stage1: Path
    stage2: Path
    tuned: Path


def run(world: World, output: Path, *overrides: str, without_llm: bool = False) -> Path:
    """Train on the world's tiny parts, and return the run's folder."""
    parts = [text for text in world.train if text.startswith(("vision.", "qformer.", "llm."))]
    own = [text for text in parts if not (without_llm and text.startswith("llm.")) and "dropout" not in text]
    common = ["vision=efficientnet_lite0", "qformer=minilm", *own, f"data.shards={output / 'shards'}", "data.workers=0"]
    config = compose("train", TrainConfig, [*common, f"output={output}", "parallel=single", *overrides])
    with world.here(), one_thread():
        assert train(config, Console(quiet=True)).status == 0
    return output / config.name


@pytest.fixture(scope="module")
def chain(world: World, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    output = tmp_path_factory.mktemp("chain")
    tokens = 'qformer.extra_tokens=["[DEC]"]'  # which begins a caption, and stays in the text branch
    stage1 = run(world, output, "experiment=blip2_stage1", *PHASE, tokens, without_llm=True)
    stage2 = run(world, output, "experiment=blip2_stage2", "llm=smollm2_135m", *PHASE, f"init_from={stage1}")
    phase = "recipe.phases={instruction: {steps: 2, batch_size: 4, learning_rate: 1e-3}}"
    easy = [text for text in world.train if text.startswith("data.")]
    tuned = run(
        world,
        output,
        *("experiment=demo", "name=tuned", "~recipe.phases", phase, "suite=none", tokens),
        *("qformer.init=given", "qformer.query_init=normal", *easy, f"init_from={stage2}"),
    )
    return Chain(stage1, stage2, tuned)


@pytest.mark.slow
def test_each_stage_starts_from_the_one_before(chain: Chain) -> None:
    kinds = {"stage1": "blip2_stage1", "stage2": "blip2", "tuned": "instructblip"}
    new = {
        "stage2": ["projection"],
        "tuned": [],  # of the first stage it has the text branch, of the second all else
    }
    for name, kind in kinds.items():
        folder: Path = getattr(chain, name)
        assert find_source(folder).kind == kind
        assert len(read_lines(folder / "metrics.jsonl")) >= STEPS
        checkpoint, _ = newest_whole(folder / "checkpoints")
        assert checkpoint is not None
        start = load_checkpoint(checkpoint).state["start"]
        if name in new:
            assert start["new"] == new[name]
            assert [Path(found["source"]).name for found in start["weights"]] == [
                {"stage2": "blip2_stage1", "tuned": "blip2_stage2"}[name]
            ]


@pytest.mark.slow
def test_each_is_loaded_and_does_what_it_can(chain: Chain) -> None:
    images, texts = tiny_images(2), ["a red circle", "two dogs"]
    stage1, stage2, tuned = (
        instructblip.load(folder, device="cpu") for folder in (chain.stage1, chain.stage2, chain.tuned)
    )
    assert isinstance(stage1, BLIP2)
    assert stage1.match(images, texts).shape == (2,)
    assert isinstance(stage2, InstructBLIP)
    assert not stage2.qformer.instruction_aware
    assert len(stage2.generate(images, max_new_tokens=3)) == 2
    assert isinstance(tuned, InstructBLIP)
    assert tuned.qformer.instruction_aware
    assert len(tuned.generate(images, texts, max_new_tokens=3)) == 2


@pytest.mark.slow
def test_the_second_stage_is_evaluated_as_any_model(chain: Chain, world: World, tmp_path: Path) -> None:
    evaluated = evaluate_here(world, chain.stage2, tmp_path, "samples=3", "batch_size=4")
    assert len(scores(evaluated)) == 4
    assert json.loads((evaluated / "results.json").read_text())["model"]["llm"]["name"] == "smollm2_135m"


@pytest.mark.slow
def test_an_encoder_decoder_reads_prefixes_and_learns_the_rest(
    chain: Chain, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_llm("flan_t5_base", tmp_path / "t5")
    seen: dict[int, tuple[str, str]] = {}
    prepare = InstructBLIP.prepare

    def watched(self: InstructBLIP, samples: object) -> object:
        pairs = zip(samples.instructions, samples.targets, strict=True)  # type: ignore[attr-defined]
        seen.update(zip(samples.positions, pairs, strict=True))  # type: ignore[attr-defined]
        return prepare(self, samples)  # type: ignore[arg-type]

    monkeypatch.setattr(InstructBLIP, "prepare", watched)
    t5 = ("llm=flan_t5_base", f"llm.sources.path={tmp_path / 't5'}", "llm.dtype=float32")
    start = (f"data.shards={chain.stage1.parent / 'shards'}", f"init_from={chain.stage1}")
    run(world, tmp_path, "experiment=blip2_stage2", *PHASE, *t5, *start, without_llm=True)
    assert sorted(seen) == list(range(8))
    for prefix, suffix in seen.values():
        words = (len(prefix.split()), len(suffix.split()))
        assert 1 <= words[0] <= sum(words) // 2
