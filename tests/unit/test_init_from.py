"""The start from weights of a run, of transformers or of LAVIS: what is taken, what is new, what is refused."""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from instructblip.config.checks import check
from instructblip.config.schema import SourcesConfig, TrainConfig
from instructblip.config.validate import to_yaml
from instructblip.errors import UserError
from instructblip.files import CHECKSUM, read_json, with_checksum, write_json
from instructblip.models.adapters import Adapter
from instructblip.models.base import Model
from instructblip.models.instructblip import InstructBLIP
from instructblip.training.plan.start import plan_alignment
from instructblip.training.start import begin_run
from instructblip.weights.checkpoint import save_checkpoint
from instructblip.weights.init_from import Begun, differing_parts, start_from
from instructblip.weights.init_sources import check_pinned, find_start, read_start, save_text_branch
from instructblip.weights.lavis import save_lavis
from instructblip.weights.load import frozen_fingerprints, load_run
from instructblip.weights.names import foreign_names
from instructblip.weights.partner import Partner, declared
from instructblip.weights.parts import build_model
from instructblip.weights.start import NO_LLM, PLAIN, Start
from instructblip.weights.transformers_write import save_huggingface
from tests.kit.blip2 import tiny_stage1, tiny_stage2, write_retrieval
from tests.kit.families import write_llm
from tests.kit.runs import compose
from tests.kit.tiny import tiny_parts

TEXT = re.compile(r"text_ffn|\.word_embeddings|\.position_embeddings")


@dataclass(frozen=True)
class Stages:
    """A model, and its tensors as LAVIS's files of BLIP-2's two stages: the first holds all queries' weights plus one.

    Attributes:
        model: what the second over the first gives.
        folder: of `stage1.pth` and `stage2.pth`, and whatever a test writes.
        config: of a run of the parts that the model was built of.
    """

    model: InstructBLIP
    folder: Path
    config: TrainConfig

    @property
    def both(self) -> list[str]:
        """The two files."""
        return [f"{self.folder}/stage1.pth", f"{self.folder}/stage2.pth"]

    def file(self, name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
        """A changed copy of the second stage's file."""
        path = self.folder / name
        torch.save({"model": change(torch.load(self.folder / "stage2.pth", weights_only=True)["model"])}, path)
        return path


def changed(config: TrainConfig, **sections: Any) -> TrainConfig:
    """With other values: `init_from=[...]`, `qformer={"queries": 5}`."""
    new = {
        name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return replace(config, **new)


def begin(config: TrainConfig, init_from: list[str] | str, **sections: Any) -> tuple[Model, Begun]:
    """What train.py has before its first step."""
    config = changed(config, init_from=[init_from] if isinstance(init_from, str) else init_from, **sections)
    model = build_model(config, trained=config.train.parts(config))
    return model, begin_run(model, config)


def write_run(
    folder: Path,
    config: TrainConfig,
    model: Model,
    start: Start = PLAIN.start,
    average: dict[str, Tensor] | None = None,
) -> Path:
    """The folder of a run that took nine steps."""
    state = {"frozen": frozen_fingerprints(model), "start": start.to_json(), "untrained": []}
    (folder / "checkpoints").mkdir(parents=True)
    save_checkpoint(
        folder / "checkpoints", step=9, model=model.held_state(), average=average, optimizer={}, state=state, keep=1
    )
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return folder


@torch.no_grad()
def shift(model: Model, parts: tuple[str, ...] = ("qformer",)) -> Model:
    """Change every weight of these parts."""
    for part in parts:
        for tensor in model.part_state(part).values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.02)
    return model


def same(found: Model, expected: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that differ."""
    state = found.state_dict()
    return [name for name, tensor in expected.items() if not torch.equal(state[name], tensor)]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    folder = tmp_path_factory.mktemp("stages")
    write_llm("vicuna_7b", folder / "llm")
    parts = {key: value for key, value in tiny_parts(folder / "parts").items() if not key.startswith("llm.")}
    base = [*(f"{key}={value}" for key, value in parts.items()), "llm=vicuna_7b", f"llm.sources.path={folder / 'llm'}"]
    base += ["qformer=blip2", "vision.norm=layer", "llm.dtype=float32"]
    config = compose("train", TrainConfig, [*base, "data.cache_features=false"])
    model = build_model(changed(config, seed=7))
    torch.manual_seed(5)
    shift(model)
    names = foreign_names(model.held_state(), "lavis")
    state = {native: tensor.clone() for native, tensor in model.held_state().items()}
    first = {
        names[name]: tensor if TEXT.search(name) else tensor + 1
        for name, tensor in state.items()
        if not name.startswith("projection.")
    }
    heads = {"itm_head.weight": torch.ones(2, 32), "itm_head.bias": torch.ones(2), "temp": torch.ones(())}
    torch.save({"model": first | heads, "optimizer": {}, "epoch": 3}, folder / "stage1.pth")
    second = {names[name]: tensor for name, tensor in state.items() if not TEXT.search(name)}
    torch.save({"model": second}, folder / "stage2.pth")
    assert isinstance(model, InstructBLIP)
    return Stages(model, folder, config)


# --- BLIP-2's two stages ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stage_2_lies_over_stage_1_however_it_is_spelt(stages: Stages) -> None:
    old = dict(zip(("stage1", "stage2"), stages.both, strict=True))
    for spelling in ({"init_from": stages.both}, {"init_from": [], "qformer": old}):
        model, begun = begin(stages.config, **spelling)
        assert same(model, stages.model.held_state()) == []
        assert begun.start.new == ()
        assert begun.start.aligned_to is None
        assert [line.partition(" ")[0] for line in begun.lines[-2:]] == ["starting", "left"]
        assert "vision norm, Q-Former, text branch, projection" in begun.lines[-2]
        assert begun.lines[-1] == "left out, since this model has none: matching_head, temperature"
        assert begun.text_branch == {}
    assert begun.lines[0] == f"qformer.stage1 and stage2 are another spelling of init_from=[{','.join(stages.both)}]"
    assert [item["name"] for item in begun.start.weights] == ["stage1", "stage2"]
    for given in (
        {"init_from": stages.both},
        {"init_from": [], "qformer": old},
    ):  # which may hold the encoder that is drawn
        check(changed(stages.config, vision={"init": "scratch"}, **given))
    with pytest.raises(UserError, match=r"stage1 and stage2 mean init_from=\[.*give init_from= alone"):
        check(changed(stages.config, init_from=["elsewhere"], qformer=old))


@pytest.mark.slow
def test_the_first_stage_alone_leaves_the_projection_new(stages: Stages) -> None:
    model, begun = begin(stages.config, stages.both[0])
    moved = {name: tensor for name, tensor in stages.model.held_state().items() if not name.startswith("projection.")}
    for name, tensor in moved.items():
        torch.testing.assert_close(model.state_dict()[name], tensor if TEXT.search(name) else tensor + 1)
    assert begun.start.new == ("projection",)
    assert begun.start.aligned_to == NO_LLM
    assert begun.lines[-1] == (
        "the Q-Former was aligned to no language model; llm=vicuna_7b needs it trained, and the projection starts anew"
    )


@pytest.mark.slow
def test_a_model_that_reads_no_text_keeps_the_text_branch_for_others(stages: Stages) -> None:
    model, begun = begin(stages.config, stages.both, qformer={"instruction_aware": False})
    assert not [name for name in model.held_state() if TEXT.search(name)]
    assert same(model, {name: t for name, t in stages.model.held_state().items() if not TEXT.search(name)}) == []
    assert begun.text_branch.keys() == {name for name in stages.model.held_state() if TEXT.search(name)}
    assert begun.start.text_branch is not None


@pytest.mark.slow
def test_a_run_of_the_second_stage_is_all_that_instruction_tuning_needs(stages: Stages, tmp_path: Path) -> None:
    deaf = changed(stages.config, qformer={"instruction_aware": False})
    model, begun = begin(deaf, stages.both)
    run = write_run(tmp_path / "stage2", deaf, model, begun.start)
    save_text_branch(run, begun.text_branch)
    found, again = begin(stages.config, str(run))
    assert same(found, stages.model.held_state()) == []
    assert again.start.aligned_to is None
    assert again.start.new == ()
    file = run / "text_branch.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=r"text_branch\.safetensors is not what the run wrote; copy the whole run again"
    ):
        begin(stages.config, str(run))
    file.unlink()
    with pytest.raises(UserError, match=r"text_branch\.safetensors is missing.*copy the whole run"):
        begin(stages.config, str(run))


@pytest.mark.slow
def test_without_a_text_branch_instructions_cannot_be_read_unless_bert_has_one(stages: Stages) -> None:
    with pytest.raises(UserError) as error:
        begin(stages.config, stages.both[1])
    for words in ("has no text branch", "init_from=[STAGE1, STAGE2]", "qformer.instruction_aware=false"):
        assert words in str(error.value)
    bert = build_model(changed(stages.config, qformer={"init": "bert"}))
    model, begun = begin(stages.config, stages.both[1], qformer={"init": "bert"})
    assert begun.start.new == ("text branch",)
    assert "new: text branch (BERT's)" in begun.lines
    text = {name: tensor for name, tensor in bert.held_state().items() if TEXT.search(name)}
    assert same(model, {**stages.model.held_state(), **text}) == []


# --- the first stage as the model itself -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_first_stage_goes_on_from_lavis_transformers_and_the_second_stage(stages: Stages, tmp_path: Path) -> None:
    source, config = tiny_stage1(0), stages.config.qformer
    save_lavis(source, tmp_path / "stage1.pth")
    save_huggingface(source, tmp_path / "whole")  # with the side file for what transformers has no place for
    write_retrieval(tmp_path / "retrieval")
    second = tiny_stage2(0)
    save_lavis(second, tmp_path / "stage2.pth")

    def taken(*places: str) -> tuple[Model, Begun]:
        weights = [read_start(find_start(str(tmp_path / place))) for place in places]
        return (model := tiny_stage1(1)), start_from(model, weights, replace(config, extra_tokens=[]), None)

    for place in ("stage1.pth", "whole"):
        model, begun = taken(place)
        assert same(model, source.held_state()) == []
        assert (begun.start.new, begun.start.aligned_to) == ((), None)
    _, begun = taken("retrieval")
    assert begun.start.new == ("language-model head", "temperature")
    model, begun = taken("stage1.pth", "stage2.pth")
    assert torch.equal(model.state_dict()["qformer.query_tokens"], second.qformer.query_tokens)
    assert "left out, since this model has none: projection" in begun.lines
    with pytest.raises(UserError, match="has no text branch"):
        taken("stage2.pth")


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_language_model_is_said_in_one_line(stages: Stages) -> None:
    wide = stages.file(
        "wide.pth",
        lambda state: (
            state | {name: torch.randn(48, *tensor.shape[1:]) for name, tensor in state.items() if "llm_proj" in name}
        ),
    )
    opt = stages.file(
        "opt.pth", lambda state: {name.replace("llm_proj", "opt_proj"): tensor for name, tensor in state.items()}
    )

    def over_stage1(second: Path | str, **qformer: str) -> tuple[Model, Begun]:
        return begin(stages.config, [stages.both[0], str(second)], qformer=qformer)

    model, begun = over_stage1(stages.both[1], aligned_to="flan_t5_xl")
    assert same(model, stages.model.held_state()) == []
    assert begun.lines[-1] == "Q-Former and projection were aligned to flan_t5_xl; llm=vicuna_7b needs them trained"
    model, begun = over_stage1(wide)
    assert set(same(model, stages.model.held_state())) == {"projection.weight", "projection.bias"}
    assert begun.start.new == ("projection",)
    assert "new: projection (into width 32, there it leads into 48)" in begun.lines
    assert begun.lines[-1] == (
        "Q-Former and projection were aligned to an LLM of width 48; llm=vicuna_7b needs them trained, "
        "and the projection, into another width, starts anew"
    )
    model, begun = over_stage1(opt, aligned_to="vicuna_7b")
    assert same(model, stages.model.held_state()) == []
    assert begun.start.aligned_to == "an LLM of LAVIS's opt_proj"


def test_a_vision_encoder_of_another_width_leaves_the_keys_and_values_new(stages: Stages) -> None:
    _, begun = begin(stages.config, stages.both, vision={"layers": ["bn1"]})
    assert begun.start.new == ("vision norm", "cross-attention keys and values")
    (line,) = [line for line in begun.lines if line.startswith("new: ")]
    width = stages.model.vision.width
    assert f"vision norm (image tokens of width 24, there {width})" in line
    model, begun = begin(stages.config, stages.both, vision={"norm": "channel"})
    assert begun.start.new == ("vision norm",)
    kept = {name: tensor for name, tensor in stages.model.held_state().items() if "vision_norm" not in name}
    assert same(model, kept) == []


@pytest.mark.slow
def test_tokens_that_were_added_to_berts_are_cut_off_or_stay_new(stages: Stages) -> None:
    table, words = stages.model.qformer.word_embeddings.weight, "qformer.word_embeddings.weight"
    model, begun = begin(stages.config, stages.both, qformer={"extra_tokens": []})
    assert torch.equal(model.state_dict()[words], table[:-1])
    assert begun.start.new == ()
    model, _ = begin(stages.config, stages.both, qformer={"extra_tokens": ["[DEC]", "[NEW]"]})
    assert torch.equal(model.state_dict()[words][:-1], table)
    state = torch.load(stages.folder / "stage1.pth", weights_only=True)["model"]
    name = "Qformer.bert.embeddings.word_embeddings.weight"
    torch.save({"model": state | {name: state[name][:-5]}}, stages.folder / "other_words.pth")
    with pytest.raises(UserError, match=r"word_embeddings\.weight is .* choose the qformer= and qformer\."):
        begin(stages.config, f"{stages.folder}/other_words.pth")


@pytest.mark.parametrize(
    ("given", "qformer", "words"),
    [
        ("nowhere.pth", {}, ["init_from=nowhere.pth is no run, transformers folder, hub id or .pth file"]),
        ("no/where/at_all", {}, ["is no run, transformers folder, hub id or .pth file; give one that is there"]),
        ("{llm}", {}, ["holds a model of type llama, wanted is instructblip or blip-2"]),
        ("{folder}", {}, ["there is no checkpoint at"]),
        ("{second} {first}", {}, ["stage1.pth holds no projection", "give the first stage first"]),
        ("{first} {both}", {}, ["nothing of", "stage1.pth is left under", "leave it out"]),
        ("{odd}", {}, ["odd.pth has the unknown tensor Qformer.bert.pooler.weight"]),
        ("{first}", {"queries": 5}, ["query_tokens is (1, 4, 32), this Q-Former needs (1, 5, 32)"]),
        ("{first}", {"layers": 2}, ["stage1.pth has qformer.layers.2.", "this Q-Former has not"]),
        ("{first}", {"cross_attention_every": 3}, ["has qformer.layers.2.cross_attention."]),
    ],
)
def test_a_start_that_is_refused_in_one_line(
    given: str, qformer: dict[str, int], words: list[str], stages: Stages
) -> None:
    first = torch.load(stages.folder / "stage1.pth", weights_only=True)["model"]
    both = stages.file("both.pth", lambda state: {**first, **state})
    odd = stages.file("odd.pth", lambda state: state | {"Qformer.bert.pooler.weight": torch.ones(1)})
    files = {"first": stages.both[0], "second": stages.both[1], "both": both, "odd": odd}
    named = given.format(folder=stages.folder, llm=stages.folder / "llm", **files).split()
    with pytest.raises(UserError) as error:
        begin(stages.config, named, qformer=qformer)
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_weights_can_be_pinned(stages: Stages) -> None:
    weights = [read_start(find_start(given)) for given in stages.both]
    check_pinned(weights, [])
    check_pinned(weights, [found.sha256 for found in weights])
    with pytest.raises(UserError, match=r"stage1.pth has the fingerprint [0-9a-f]{64}, and init_sha256 wants abc"):
        check_pinned(weights, ["abc", weights[1].sha256])
    with pytest.raises(UserError, match="init_sha256 has 1 entries for 2 of init_from"):
        check_pinned(weights, ["abc"])


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_parts_that_a_run_trained_are_taken_too_and_held(stages: Stages, tmp_path: Path) -> None:
    config = changed(stages.config, train={"vision": "full", "llm": "full"})
    source = shift(build_model(config, trained=config.train.parts(config)), ("vision", "qformer", "llm"))
    run = write_run(tmp_path / "whole", config, source)
    model, begun = begin(stages.config, str(run))
    assert same(model, source.held_state()) == []
    assert model.trained_parts == {"qformer"}
    assert model.held_state().keys() == source.held_state().keys()
    assert [line.partition(" of ")[0] for line in begun.lines[1:]] == [
        "taken too: the vision encoder",
        "taken too: the language model",
    ]
    # A run that goes on, and one that is loaded, need nothing but the checkpoint and the configured files.
    next_run = write_run(tmp_path / "next", stages.config, model, begun.start)
    shutil.rmtree(run)
    loaded = load_run(next_run, device="cpu")
    assert same(loaded.model, source.held_state()) == []
    assert loaded.standing.start == begun.start
    # Parts of other sizes, or another LLM by name, are left alone.
    convnext = tmp_path / "model.safetensors"
    save_file(timm.create_model("test_convnext", pretrained=False).state_dict(), convnext)
    write_run(run, changed(config, llm={"name": "another"}), source)
    other = {"backbone": "test_convnext", "layers": [], "grid": None, "sources": SourcesConfig(path=str(convnext))}
    model, begun = begin(stages.config, str(run), vision=other)
    assert model.held_parts == {"qformer"}
    assert any(line.startswith("left out: the vision encoder") for line in begun.lines)
    assert begun.start.aligned_to == "another"


@pytest.mark.slow
def test_what_a_run_trained_of_a_language_model_is_said_to_be_left_out_of_another(
    stages: Stages, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = changed(stages.config, train={"llm": "full"}, llm={"name": "another"})
    source = build_model(config, trained=config.train.parts(config))
    run = write_run(tmp_path / "run", config, shift(source, ("llm",)))
    assert same(load_run(run, device="cpu").model, source.held_state()) == []
    assert not caplog.records
    load_run(run, device="cpu", config=stages.config)
    assert [text for text in caplog.messages if "trained of its language model, another, is left out" in text] != []


def test_adapters_below_another_start_are_said_to_be_left_out(stages: Stages) -> None:
    model = build_model(stages.config, trained=stages.config.train.parts(stages.config))
    lower, upper = (read_start(find_start(given)) for given in stages.both)
    weights = [replace(lower, adapters={"llm": Adapter()}), upper]
    found = start_from(model, weights, stages.config.qformer, stages.config.llm)
    assert f"left out: the adapters of {stages.both[0]}, over which others lie" in found.lines


@pytest.mark.slow
def test_a_run_that_kept_an_average_is_loaded_with_it_and_started_from_it(stages: Stages, tmp_path: Path) -> None:
    """As it was validated and scored."""
    averages = {name: tensor + 1 for name, tensor in stages.model.held_state().items()}
    run = write_run(tmp_path / "run", stages.config, stages.model, average=averages)
    assert same(load_run(run, device="cpu").model, averages) == []
    assert same(begin(stages.config, str(run))[0], averages) == []


@pytest.mark.slow
def test_untrained_parts_stay_untrained_from_run_to_run(stages: Stages, tmp_path: Path) -> None:
    model, begun = begin(stages.config, stages.both[0])
    run = write_run(tmp_path / "run", stages.config, model, begun.start)
    state = run / "checkpoints/step_00000009/state.json"
    values = read_json(state) | {"untrained": begun.start.untrained(("llm",))}
    values.pop(CHECKSUM)
    write_json(state, with_checksum(values))
    assert load_run(run, device="cpu").standing.untrained == ("projection",)
    _, again = begin(stages.config, str(run))
    assert again.start.new == ("projection",)
    assert again.start.aligned_to == NO_LLM
    assert begun.start.untrained(("qformer", "llm")) == ()


def test_a_frozen_part_from_other_files_is_said(stages: Stages, tmp_path: Path) -> None:
    model, begun = begin(stages.config, stages.both)
    run = write_run(tmp_path / "run", stages.config, model, begun.start)
    same_parts, again = begin(stages.config, str(run))
    assert differing_parts(again, frozen_fingerprints(same_parts)) == []
    shift(same_parts, ("vision",))
    (line,) = differing_parts(again, frozen_fingerprints(same_parts))
    assert line.startswith("the vision encoder is not the one that these weights were trained with")


@pytest.mark.parametrize("source", ["run", "transformers"])
def test_a_qformer_of_other_heads_is_no_start(source: str, stages: Stages, tmp_path: Path) -> None:
    assert stages.config.qformer is not None
    bert = Path(str(stages.config.qformer.sources.path))
    shutil.copytree(bert, tmp_path / "bert")
    write_json(tmp_path / "bert/config.json", read_json(bert / "config.json") | {"num_attention_heads": 2})
    other = changed(stages.config, qformer={"sources": SourcesConfig(path=str(tmp_path / "bert"))})
    if source == "run":
        write_run(tmp_path / "given", other, build_model(other))
    else:
        other = changed(other, vision=_VIT, qformer={"instruction_aware": True})
        save_huggingface(build_model(other), tmp_path / "given")
    with pytest.raises(
        UserError, match=r"trained with a Q-Former of 2 heads, and 4 heads would read .* choose the qformer="
    ):
        begin(stages.config, str(tmp_path / "given"))
    if source == "run":
        begin(other, str(tmp_path / "given"))
        shutil.rmtree(tmp_path / "bert")  # a start needs the source's own files no more, and knows less without them
        begin(stages.config, str(tmp_path / "given"))


_VIT = {
    "init": "scratch",
    "backbone": "eva_giant_patch14_clip_224",
    "image_size": 28,
    "layers": [],
    "grid": None,
    "final_norm": False,
    "options": {"embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5},
}


@pytest.mark.slow
def test_a_vision_encoder_of_other_heads_is_no_start_and_beside_ones_own_it_is_said(
    stages: Stages, tmp_path: Path
) -> None:
    config = changed(stages.config, vision=_VIT, train={"vision": "full"})
    run = write_run(tmp_path / "run", config, build_model(config, trained=config.train.parts(config)))
    assert not [line for line in begin(config, str(run))[1].lines if "heads" in line]
    other = {"options": {**_VIT["options"], "num_heads": 2}}
    with pytest.raises(UserError, match=r"vision encoder of 4 heads, and 2 heads would .* vision\.options\.num_heads"):
        begin(config, str(run), vision=other)
    frozen = changed(config, train={"vision": "frozen"})
    run = write_run(tmp_path / "frozen", frozen, build_model(frozen, trained=frozen.train.parts(frozen)))
    found = begin(config, str(run), vision=other)[1].lines
    assert found[-1] == (
        "the vision encoder is not the one that these weights were trained with: 4 heads, here 2 heads"
    )
    file = run / "config.yaml"  # of another timm
    file.write_text(
        file.read_text(encoding="utf-8").replace("eva_giant_patch14_clip_224", "eva_gone"), encoding="utf-8"
    )
    assert not [line for line in begin(config, str(run), vision=other)[1].lines if "heads" in line]


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_is_not_aligned(stages: Stages, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", changed(stages.config, llm={"name": "qwen3_8b"}), stages.model)
    first, second = stages.both

    def line(*given: str, width: int = 32, **qformer: Any) -> str | None:
        config = changed(stages.config, qformer=qformer)
        return plan_alignment(given, config.qformer, config.language_model(), width)

    assert "qformer.init=given has no weights of its own" in (line() or "")
    assert "aligned to no language model" in (line(init="bert") or "")
    assert "aligned to no language model" in (line(first) or "")
    assert line(first, second) is None
    assert (line(first, second, width=48) or "").endswith("and the projection, into another width, starts anew")
    assert "aligned to flan_t5_xl" in (line(second, aligned_to="flan_t5_xl") or "")
    assert "aligned to qwen3_8b" in (line(str(run)) or "")
    assert line("Somebody/not-fetched") is None  # a plan fetches nothing
    assert "aligned to qwen3_8b" in (line("Somebody/not-fetched", aligned_to="qwen3_8b") or "")


def test_what_the_user_says_of_a_partner_counts_where_nothing_else_tells() -> None:
    names = [Partner(), Partner(name="qwen3_8b"), Partner(weights={"lm_head.weight": torch.zeros(1)})]
    found = [declared(partner, "vicuna_7b") for partner in (*names, None)]
    assert [partner and partner.name for partner in found] == ["vicuna_7b", "qwen3_8b", None, None]
