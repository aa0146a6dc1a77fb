"""Low-rank adapters: as peft's around transformers' own classes, acting in every path, over every kind of base."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BlipImageProcessor

from instructblip.config.schema import TrainConfig
from instructblip.distributed import Ranks
from instructblip.errors import UserError
from instructblip.models.adapters import Adapter, adapted_layers, is_adapter, plain_state
from instructblip.models.base import Model
from instructblip.models.fingerprint import fingerprint_tensors
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM
from instructblip.models.quantized import quantize_linears
from instructblip.training.checks import check_objectives
from instructblip.training.loop import train_step
from instructblip.training.optim import WeightAverage, make_adamw
from instructblip.training.parallel import parallelize
from instructblip.weights.adapters import attach
from instructblip.weights.load import frozen_fingerprints, load_model
from instructblip.weights.parts import train_parts
from instructblip.weights.peft_format import peft_folders, whole_folder
from tests.kit.blip import tiny_caption, tiny_retrieval, tiny_vqa
from tests.kit.losses import LANGUAGE, term_of
from tests.kit.runs import compose
from tests.kit.stage1 import tiny_stage1
from tests.kit.tiny import tiny_encoder_decoder_llm, tiny_huggingface, tiny_llm, tiny_model, tiny_released_model
from tests.unit.test_parallel import batches, model_of, traced  # noqa: F401, a fixture

pytest.importorskip("peft", reason="adapters need requirements-lora.txt")

PROMPTS = ["what is it?", "Question: what color is the shape? Short answer:", "is it a circle?"]
TARGETS = ["red", "a yellow rectangle on it", "yes"]
CANDIDATES = [["red", "green", "a red circle"], ["a yellow rectangle", "a yellow one", "no"], ["yes", "no"]]
PLAIN = Adapter(rank=3, alpha=6.0, dropout=0.0)
ALL = replace(PLAIN, targets=("all-linear",))


def int8_llm() -> LLM:
    llm = tiny_llm()
    quantize_linears(llm.model, "int8", keep=llm.model.get_output_embeddings())
    return llm


def bfloat16_llm() -> LLM:
    llm = tiny_llm()
    for parameter in llm.parameters():  # `llm.bfloat16()` would round the rotary frequencies as well
        parameter.data = parameter.data.bfloat16()
    return llm


def fp8_llm() -> LLM:
    llm = bfloat16_llm()
    quantize_linears(llm.model, "fp8", keep=llm.model.get_output_embeddings())
    return llm


LLMS: dict[str, Callable[[], LLM]] = {
    "decoder": tiny_llm,
    "encoder_decoder": tiny_encoder_decoder_llm,
    "int8": int8_llm,
    "bfloat16": bfloat16_llm,
    "fp8": fp8_llm,
}


def released(llm: str = "decoder") -> InstructBLIP:
    """With EVA's joint query, key and value layer, which multiplies with its weight itself."""
    torch.manual_seed(1)
    return tiny_released_model(llm=LLMS[llm]())


def adapted(model: Model, adapters: dict[str, Adapter], *, drawn: bool = True) -> Any:
    """The model with adapters, which `drawn` ones change it."""
    train_parts(model, list(adapters), adapters)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters() if drawn else ():
        if is_adapter(name):
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def pictures(model: Model, count: int = 3) -> Tensor:
    size = model.vision.image_size
    return torch.randint(
        0, 256, (count, 1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def computed(model: InstructBLIP) -> list[Any]:
    """What each path gives: training with one sample a row and with several, ranking as trees and as rows, beams, greedy."""
    images, found = pictures(model), list[Any]()
    with torch.no_grad():
        for packed in (False, True) if model.llm.kind == "decoder" else (False,):
            found.append(term_of(model, images, PROMPTS, TARGETS, packed=packed).total)
    found += model.rank(images, PROMPTS, CANDIDATES)
    own, model.llm.abilities = model.llm.abilities, replace(model.llm.abilities, tree=False)
    found += model.rank(images, PROMPTS, CANDIDATES)
    model.llm.abilities = own
    texts = [model.generate(images, PROMPTS, num_beams=beams, max_new_tokens=6) for beams in (1, 3)]
    return [*found, *texts]


def assert_same(found: Sequence[Any], expected: Sequence[Any], bound: float) -> None:
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(one, other, atol=bound, rtol=bound)
        else:
            assert one == other


# --- nothing changes, and then everything does -------------------------------------------------------------------------


@pytest.mark.parametrize("llm", LLMS)
def test_new_adapters_change_nothing(llm: str) -> None:
    model = released(llm)
    before, names, frozen = computed(model), set(model.state_dict()), frozen_fingerprints(model, ("vision", "llm"))
    stream = torch.get_rng_state()
    adapters = {part: replace(PLAIN, dropout=0.5) for part in ("vision", "qformer", "llm")}
    adapted(model, adapters, drawn=False)
    assert torch.equal(torch.get_rng_state(), stream)
    assert_same(computed(model), before, bound=0.0)
    assert names == {name for name in model.state_dict() if not is_adapter(name)}
    assert frozen_fingerprints(model, ("vision", "llm")) == frozen
    assert {parameter.dtype for name, parameter in model.named_parameters() if is_adapter(name)} == {torch.float32}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        name for name in model.held_state() if is_adapter(name)
    }


@pytest.mark.slow
@pytest.mark.parametrize("llm", ["decoder", "encoder_decoder", "int8"])
def test_adapters_act_in_every_path_as_the_weights_with_them_merged(llm: str) -> None:
    model = adapted(released(llm), {"vision": ALL, "qformer": ALL, "llm": ALL})
    assert model.adapters["llm"].targets != ("all-linear",)  # they are remembered by name
    plain = released("encoder_decoder" if llm == "encoder_decoder" else "decoder")
    plain.load_state_dict(plain_state(model, merge=True))
    assert_same(computed(model), computed(plain), bound=1e-5)
    assert not torch.allclose(computed(model)[0], computed(released(llm))[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "part", "call"),
    [
        (tiny_caption, "text", lambda model, images: model.generate(images)),
        (tiny_vqa, "text", lambda model, images: model.generate(images, PROMPTS)),
        (tiny_stage1, "qformer", lambda model, images: [model.match(images, TARGETS)]),
        (tiny_retrieval, "text", lambda model, images: [model.match(images, TARGETS)]),
    ],
)
def test_models_without_a_language_model_are_adapted_too(make: Any, part: str, call: Any) -> None:
    model, plain = adapted(make(), {part: PLAIN}), make()
    assert {name.rpartition(".")[2] for name, _ in adapted_layers(model)} == {"query", "value"}
    plain.load_state_dict(plain_state(model, merge=True))
    assert_same(call(model, pictures(model)), call(plain, pictures(model)), bound=1e-5)


# --- peft around transformers' own class -------------------------------------------------------------------------------


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_peft_around_transformers_class(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    theirs = tiny_huggingface(tmp_path / "base")
    targets = r".*(language_model.*\.(q_proj|v_proj|down_proj)|self_attn\.qkv|attention\.(query|value))"
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    wrapped = get_peft_model(theirs, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu").model
    assert isinstance(ours, InstructBLIP)
    assert ours.adapters.keys() == {"vision", "qformer", "llm"}
    assert ours.adapters["llm"] == Adapter(4, 6.0, 0.0, ("down_proj", "q_proj", "v_proj"))
    assert not ours.trained_parts & ours.adapters.keys()  # what was loaded does not train by itself
    ours.choose_trained(("vision", "qformer", "llm"))
    images = pictures(ours, 1)
    term = term_of(ours, images, PROMPTS[:1], TARGETS[:1])
    (term.total / term.counts.sum()).backward()
    loss = transformers_loss(wrapped, tmp_path / "base", ours, images)
    loss.backward()
    torch.testing.assert_close(term.total / term.counts.sum(), loss, atol=1e-5, rtol=1e-5)
    found = whole_folder(ours, "huggingface").tensors  # names of the gradients' parameters, in their order
    gradients = [parameter.grad for name, parameter in ours.named_parameters() if is_adapter(name)]
    expected = {name.replace(".default", ""): p.grad for name, p in wrapped.named_parameters() if "lora" in name}
    assert set(found) == set(expected)
    for name, gradient in zip(found, gradients, strict=True):
        assert gradient is not None and gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def transformers_loss(model: Any, folder: Path, ours: InstructBLIP, images: Tensor) -> Tensor:
    form, config = ours.llm.prompt_format, model.config
    answer = form.answer_ids(PROMPTS[0], TARGETS[0])
    ids = torch.tensor([[config.image_token_index] * 4 + form.prompt_ids(PROMPTS[0], training=True) + answer[:-1]])
    heard = ours.qformer_tokenizer(PROMPTS[:1], return_tensors="pt")  # type: ignore[misc]
    pixels = BlipImageProcessor.from_pretrained(folder)(list(images[0]), do_resize=False, return_tensors="pt")
    outputs = model(
        pixel_values=pixels["pixel_values"],
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        qformer_input_ids=heard["input_ids"],
        qformer_attention_mask=heard["attention_mask"],
    )
    return torch.nn.functional.cross_entropy(outputs.logits[0, -len(answer) :], torch.tensor(answer))


@pytest.mark.slow
@pytest.mark.parametrize("llm", ["decoder", "encoder_decoder"])
def test_peft_opens_a_checkpoints_adapters_around_transformers_language_model(llm: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted(model_of(llm, dropout=0.0), {"llm": ALL, "qformer": PLAIN})
    folders = peft_folders(model.adapters, model.held_state())
    assert folders.keys() == {"llm", "qformer"}
    folders["llm"].write(tmp_path / "llm")
    theirs = PeftModel.from_pretrained(model_of(llm).llm.model, tmp_path / "llm").eval()
    ids = torch.arange(3, 12)[None]
    more = {"decoder_input_ids": ids} if llm == "encoder_decoder" else {}
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids, **more).logits, model.llm.model(input_ids=ids, **more).logits)
    again = model_of(llm)
    attach(again, tmp_path / "llm")
    for name, tensor in model.llm.state_dict().items():
        assert torch.equal(again.llm.state_dict()[name], tensor), name


# --- training ----------------------------------------------------------------------------------------------------------


def steps(model: Any, count: int = 2, ranks: Ranks | None = None, **layout: Any) -> list[float]:
    """Losses of a few steps after the model was laid out."""
    parallelize(model, ranks or Ranks(), kind="ddp", **layout)
    parameters = list(model.named_parameters())
    optimizer = make_adamw(parameters, weight_decay=0.05, betas=(0.9, 0.999), part_of=model.part_of)
    losses = []
    for number in range(count):
        torch.manual_seed(number)
        packed = model.llm.kind == "decoder"
        step = train_step(
            model.train(), optimizer, batches(), objectives=LANGUAGE, rate=1e-2, clip_norm=1.0, packed=packed
        )
        losses.append(step.loss)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_qlora_step_is_that_over_the_expanded_weights(kind: str) -> None:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes", reason="nf4 needs requirements-quantization.txt")
    rounded, plain = model_of("decoder"), model_of("decoder")
    head = rounded.llm.model.get_output_embeddings()
    quantize_linears(rounded.llm.model, kind, keep=head)
    plain.llm.model.load_state_dict(plain_state(rounded.llm.model, merge=False))
    for model in (rounded, plain):
        adapted(model, {"llm": replace(ALL, dropout=0.3), "qformer": PLAIN})
    before = frozen_fingerprints(rounded)
    assert steps(rounded) == pytest.approx(steps(plain), rel=1e-5)
    expected = plain.held_state()
    moved = [name for name in expected if "lora_B" in name]
    for name, tensor in rounded.held_state().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3, msg=name)
    assert len(moved) > 20 and all(rounded.held_state()[name].abs().max() > 0 for name in moved)
    assert frozen_fingerprints(rounded) == before


def test_half_precision_weights_stay_and_adapters_over_them_keep_small_updates() -> None:
    torch.manual_seed(1)
    model = tiny_model(llm=bfloat16_llm())
    adapted(model, {"llm": PLAIN}, drawn=False)
    before = fingerprint_tensors(plain_state(model.llm, merge=False))
    losses = steps(model, 3)
    assert losses[-1] < losses[0]
    assert fingerprint_tensors(plain_state(model.llm, merge=False)) == before
    assert {tensor.dtype for name, tensor in model.held_state().items() if is_adapter(name)} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("llm", ["decoder", "encoder_decoder"])
def test_recomputed_activations_and_an_average_change_no_step(llm: str) -> None:
    plain, recomputed = (adapted(model_of(llm), {"llm": replace(ALL, dropout=0.4), "qformer": PLAIN}) for _ in range(2))
    average = WeightAverage(plain, 0.5)
    assert steps(plain) == steps(recomputed, activation_checkpointing=True)
    average.update()
    for name, tensor in average.state(plain.held_state()).items():
        moved = plain.held_state()[name]
        assert torch.equal(tensor, moved) is not (is_adapter(name)), name


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("llm", ["decoder", "int8"])
def test_compiled_blocks_change_no_step(llm: str) -> None:
    def model() -> Any:
        torch.manual_seed(1)
        return adapted(tiny_model(llm=LLMS[llm]()), {"llm": ALL, "qformer": PLAIN})

    plain, compiled = model(), model()
    assert steps(compiled, compile_blocks=True) == pytest.approx(steps(plain), rel=1e-5)
    for name, tensor in plain.held_state().items():
        torch.testing.assert_close(compiled.held_state()[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


def test_the_base_is_in_evaluation_mode_and_the_adapters_drop() -> None:
    model = adapted(model_of("encoder_decoder"), {"llm": replace(PLAIN, dropout=0.5)}).train()
    training = {name.rpartition(".")[2] for name, module in model.llm.named_modules() if module.training}
    assert training == {"lora_dropout", "default"}
    model.eval()
    assert not any(module.training for module in model.modules())


def test_checkpoints_hold_adapters_alone_of_a_part_that_has_files_of_its_own() -> None:
    model = adapted(released(), {"vision": PLAIN, "llm": PLAIN})
    held = {name.partition(".")[0] for name in model.held_state() if not is_adapter(name)}
    assert held == {"qformer", "projection", "vision_norm"}  # which are drawn or from elsewhere
    assert {name.partition(".")[0] for name in model.held_state() if is_adapter(name)} == {"vision", "llm"}


# --- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.llm=lora", "train.lora.llm.rank=0"], ["train.lora.llm.rank", "1"]),
        (["train.lora.llm.rank=8"], ["train.lora.llm", "train.llm=frozen", "train.llm=lora"]),
        (["train.llm=lora", "train.lora.llm.targts=[q_proj]"], ["train.lora.llm.targts", "targets"]),
        (["train.vision=lora", "data.cache_features=true"], ["train.vision=lora", "data.cache_features=false"]),
        (["train.llm=full", "llm.quantization=int8"], ["train.llm=lora"]),
        (["train.learning_rates.llm=1e-4"], ["train.learning_rates.llm", "train.llm=frozen", "leave it out"]),
        (["llm.dtype=float16", "recipe.precision=bf16"], ["recipe.precision=bf16", "set llm.dtype=bfloat16"]),
        (["experiment=blip_demo_retrieval", "train.text=lora"], ["train.text=lora", "model.queue_size=null"]),
    ],
)
def test_wrong_settings_end_in_one_line(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        compose("train", TrainConfig, overrides)
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_a_phase_that_reaches_no_adapter_is_refused() -> None:
    """The demo's first phase leaves the language model's layers out."""
    alone = ["train.llm=lora", "train.qformer=frozen"]
    with pytest.raises(
        UserError, match=r"phases\.alignment would teach nothing: alignment leaves .* \(~recipe\.phases"
    ):
        check_objectives(compose("train", TrainConfig, alone))
    check_objectives(compose("train", TrainConfig, [*alone, "~recipe.phases.alignment"]))
    check_objectives(compose("train", TrainConfig, [*alone, "recipe.phases.alignment.objectives.language_modeling=1"]))
    check_objectives(compose("train", TrainConfig, ["train.llm=lora"]))


@pytest.mark.parametrize(
    ("part", "targets", "words"),
    [
        ("llm", ("qproj",), ["train.lora.llm.targets", "qproj", "q_proj"]),
        ("llm", ("all-linear", "qproj"), ["train.lora.llm.targets", "qproj"]),
        ("llm", ("lm_head",), ["lm_head", "down_proj"]),  # tied to the table in many models, which would be merged into
        ("llm", ("embed_tokens",), ["embed_tokens"]),
        ("vision", (), ["train.vision=lora", "no linear layers", "train.vision=full"]),  # a CNN
    ],
)
def test_layers_that_cannot_be_adapted_are_named(part: str, targets: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        train_parts(tiny_model(), [part], {part: replace(PLAIN, targets=targets)})
    assert [word for word in words if word not in str(error.value)] == []


def test_a_layer_that_the_encoder_never_calls_is_refused() -> None:
    model = released()
    attention = model.vision.backbone.blocks[0].attn
    weight = attention.proj.weight
    model.vision.backbone.blocks[0].attn.proj.forward = lambda x: x @ weight.T  # a class that does as it likes
    inner = type(attention.proj)
    model.vision.backbone.blocks[0].norm_never_called = inner(4, 4)
    with pytest.raises(UserError, match=r"never calls .*norm_never_called"):
        train_parts(model, ["vision"], {"vision": replace(PLAIN, targets=("norm_never_called",))})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, ["use_dora"]),
        ({"peft_type": "IA3"}, ["peft_type"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights", "pissa", "only plain LoRA"]),
        ({"a_kind_to_come": {"rate": 2}}, ["a_kind_to_come", "only plain LoRA"]),
        ({"lora_alpha": None}, ["adapter_config.json", "lora_alpha"]),
        ({"alpha_pattern": {"q_proj": "8"}}, ["adapter_config.json", "alpha_pattern"]),
    ],
)
def test_other_kinds_of_adapters_are_refused(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    model = adapted(tiny_model(), {"llm": PLAIN})
    folder = peft_folders(model.adapters, model.held_state())["llm"]
    folder._replace(config={**folder.config, **change}).write(tmp_path / "adapter")
    with pytest.raises(UserError) as error:
        attach(tiny_model(), tmp_path / "adapter")
    assert [word for word in words if word not in str(error.value)] == []


def test_a_layer_outside_the_blocks_is_named_among_those_that_are_read(tmp_path: Path) -> None:
    model = adapted(tiny_model(), {"llm": PLAIN})
    folder = peft_folders(model.adapters, model.held_state())["llm"]
    pair = {f"base_model.model.lm_head.{matrix}.weight": torch.zeros(2, 2) for matrix in ("lora_A", "lora_B")}
    folder._replace(tensors={**folder.tensors, **pair}).write(tmp_path / "adapter")
    with pytest.raises(
        UserError, match=r"adapts lm_head, for which this model has no layer of its own: .* outside the blocks"
    ):
        attach(tiny_model(), tmp_path / "adapter")


def test_adapters_of_another_model_are_refused(tmp_path: Path) -> None:
    model = adapted(model_of("encoder_decoder"), {"llm": PLAIN})
    peft_folders(model.adapters, model.held_state())["llm"].write(tmp_path / "t5")
    with pytest.raises(UserError, match="of another model"):
        attach(tiny_model(), tmp_path / "t5")
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        attach(tiny_model(), tmp_path)
    other = adapted(tiny_model(), {"llm": PLAIN})
    peft_folders(other.adapters, other.held_state())["llm"].write(tmp_path / "llm")
    with pytest.raises(UserError, match="has adapters already"):
        attach(other, tmp_path / "llm")
