"""Counted FLOPs against torch's own counter over real forward and backward passes, and the devices' peaks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from instructblip.data.batching import Batch
from instructblip.models.adapters import Adapter, adapted_layers, inject
from instructblip.models.instructblip import InstructBLIP
from instructblip.objectives import Objective, make_objectives
from instructblip.training.loop import train_step
from instructblip.training.optim import make_adamw
from instructblip.training.plan.flops import (
    GPUS,
    ModelShape,
    StepWorkload,
    adapter_shares,
    device_peak,
    image_flops,
    known_gpu,
    language_shape,
    model_shape,
)
from instructblip.weights.parts import train_parts
from tests.kit.blip import tiny_caption
from tests.kit.losses import ALIGNMENT, LANGUAGE
from tests.kit.stage1 import step, tiny_batch, tiny_stage1
from tests.kit.tiny import tiny_encoder_decoder_llm, tiny_images, tiny_llm, tiny_model, tiny_vision

PROMPTS = [
    "Question: what color is the shape? Short answer:",
    "is there a circle in the image? Answer with yes or no:",
    "Based on the image, is this statement true or false? The shape is green. Answer:",
]
ANSWERS = ["it is a yellow rectangle on a green ground", "yes there is one", "false"]


LLM = LANGUAGE[0].outputs


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """torch counts attention only where it is made of matrix products, not in its CPU kernel."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def shape_of(model: InstructBLIP) -> ModelShape:
    with torch.device("meta"):
        vision = tiny_vision()
    return model_shape(vision, model.qformer, model.projection, model.llm.model)


def passed(
    model: InstructBLIP, images: torch.Tensor, *, objectives: Sequence[Objective] = LANGUAGE
) -> tuple[StepWorkload, float]:
    """A step's work, and the FLOPs that torch counts in it."""
    count = len(images)
    batch = Batch(
        ids=[str(number) for number in range(count)],
        datasets=["a"] * count,
        instructions=PROMPTS[:count],
        targets=ANSWERS[:count],
        images=images,
        places=list(range(count)),
        image_ids=[str(number) for number in range(count)],
        positions=list(range(count)),
    )
    optimizer = make_adamw(model.named_parameters(), weight_decay=0.0, betas=(0.9, 0.999))
    with counted() as counter:
        result = train_step(model.train(), optimizer, [batch], objectives=objectives, rate=1e-4, clip_norm=None)
    return result.work, float(counter.get_total_flops())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "off"), [("decoder", 0.01), ("encoder_decoder", 0.04)])
def test_a_step_of_one_sample_is_counted_as_torch_counts_it(kind: str, off: float) -> None:
    """One sample: no padding, and no mean over lengths. A decoder's first self-attention, here one of two, has no gradient
    to pass on beside an encoder; the formula does not know."""
    model = tiny_model(llm={"decoder": tiny_llm, "encoder_decoder": tiny_encoder_decoder_llm}[kind]())
    work, expected = passed(model, tiny_images(1))
    assert work.samples == work.frames == work.encoded == 1
    assert shape_of(model).total(work, LLM) == pytest.approx(expected, rel=off)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [("llm",), ("qformer", "llm")])
def test_adapters_are_counted_as_torch_counts_them(parts: tuple[str, ...]) -> None:
    """The first layer's adapters have nothing to pass gradients on to; the formula does not know."""
    pytest.importorskip("peft", reason="adapters need requirements-lora.txt")
    model = tiny_model()
    train_parts(model, ("qformer", "llm"), {part: Adapter(8, 16.0, 0.0, ("all-linear",)) for part in parts})
    work, expected = passed(model, tiny_images(1))
    shares = adapter_shares({part: model.part_modules(part) for part in model.adapters})
    assert shares.keys() == set(parts) and all(share > 0.1 for share in shares.values())
    with torch.device("meta"):
        vision = tiny_vision()
    shape = model_shape(vision, model.qformer, model.projection, model.llm.model, model.trained_parts, shares)
    assert shape.total(work, LLM) == pytest.approx(expected, rel=0.03)


def test_the_share_of_adapters_is_theirs_in_all_matrices_that_a_position_meets() -> None:
    pytest.importorskip("peft", reason="adapters need requirements-lora.txt")
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", vocab_size=50, **EXPERTS))
    inject(llm, ["model.layers.0.self_attn.q_proj"], Adapter(8, 16.0, 0.0, ()), seed=0)
    shape = language_shape(llm)
    assert adapter_shares({"llm": [llm]}) == {"llm": 8 * (64 + 64) / (shape.decoder.matrices + shape.head)}


def test_adapters_of_the_encoder_are_no_second_time_in_its_own_count() -> None:
    pytest.importorskip("peft", reason="adapters need requirements-lora.txt")
    model = tiny_caption()
    before = image_flops(model.vision)
    train_parts(model, ("vision",), {"vision": Adapter(8, 16.0, 0.0, ())})
    assert image_flops(model.vision) == before
    assert [layer.disable_adapters for _, layer in adapted_layers(model)] == [False] * 4  # two of each block act again


@pytest.mark.slow
@pytest.mark.parametrize(("parts", "off"), [(("llm",), 0.05), (("vision",), 0.03)])
def test_a_frozen_qformer_passes_gradients_on_to_the_vision_encoder_alone(parts: tuple[str, ...], off: float) -> None:
    """The LLM's first layer has nothing to pass gradients on to; the formula does not know."""
    model = tiny_model()
    train_parts(model, parts)
    work, expected = passed(model, tiny_images(1))
    with torch.device("meta"):
        vision = tiny_vision()
    shape = model_shape(vision, model.qformer, model.projection, model.llm.model, model.trained_parts)
    assert shape.total(work, LLM) == pytest.approx(expected, rel=off)
    backward = {part.part: part.backward for part in shape.by_part(work, LLM)}
    assert (backward["Q-Former and projection"] > 0) == (parts == ("vision",))


@pytest.mark.slow
def test_a_clip_is_counted_frame_by_frame() -> None:
    model = tiny_model()
    work, expected = passed(model, tiny_images(1, frames=3))
    assert work.frames == work.encoded == 3
    assert shape_of(model).total(work, LLM) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_cached_image_tokens_leave_the_encoder_out() -> None:
    model = tiny_model()
    images = tiny_images(1)
    pixels, _ = passed(model, images)
    tokens, expected = passed(model, model.image_tokens(images))
    shape = shape_of(model)
    assert (pixels.encoded, tokens.encoded) == (1, 0)
    assert shape.total(pixels, LLM) - shape.total(tokens, LLM) == shape.image_flops > 0
    assert shape.total(tokens, LLM) == pytest.approx(expected, rel=0.02)


def test_the_alignment_loss_leaves_the_llm_out() -> None:
    model = tiny_model()
    work, expected = passed(model, tiny_images(1), objectives=ALIGNMENT)
    assert work.positions == 0
    assert work.text > 0
    assert shape_of(model).total(work, ALIGNMENT[0].outputs) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_padding_is_no_work(kind: str) -> None:
    model = tiny_model(llm={"decoder": tiny_llm, "encoder_decoder": tiny_encoder_decoder_llm}[kind]())
    shape, images = shape_of(model), tiny_images(3)
    together, spent = passed(model, images)
    lengths = model.sample_length()
    assert together.positions == sum(
        lengths(prompt, answer, 1) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    )
    assert shape.total(together, LLM) < 0.95 * spent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "off"),
    [(("contrastive", "matching", "captioning"), 0.03), (("contrastive",), 0.03), (("captioning",), 0.08)],
)
def test_a_step_of_the_first_stage_is_counted_as_torch_counts_it(names: tuple[str, ...], off: float) -> None:
    """Two samples with captions of one length; what the first pass computes is counted apart.

    Captions alone leave the last of three layers without a gradient in its queries; the formula does not know.
    """
    model, batch = tiny_stage1(), tiny_batch([0, 6])._replace(targets=["a man", "a bus"])
    objectives = make_objectives(dict.fromkeys(names, 1.0))
    outputs = frozenset().union(*(objective.outputs for objective in objectives))
    with counted() as counter:
        work = step(model, [batch], objectives).result.work
    with torch.device("meta"):
        vision = tiny_vision()
    heads = nn.ModuleList([model.vision_projection, model.text_projection, model.matching_head])
    shape = model_shape(vision, model.qformer, heads, None)
    assert (work.samples, work.encoded, work.text) == (2, 2, 2 * 4)
    found = shape.total(work, outputs) + shape.repeated(work, outputs)
    assert found == pytest.approx(counter.get_total_flops(), rel=off)


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 16}
EXPERTS = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize(
    ("kind", "sizes", "off"),
    [
        ("llama", SIZES, 1e-3),
        ("phi3", SIZES, 1e-3),
        ("gpt_neox", SIZES, 1e-3),
        ("gpt2", GPT, 1e-3),  # its layers are Conv1D
        ("gpt_bigcode", GPT, 1e-3),
        ("mixtral", EXPERTS, 1e-2),  # the router is left out
        ("gpt_oss", EXPERTS, 1e-2),  # experts' matrices lie the other way round
    ],
)
def test_a_language_model_is_counted_as_torch_counts_it(kind: str, sizes: dict[str, int], off: float) -> None:
    settings = AutoConfig.for_model(kind, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=1, **sizes)
    settings._experts_implementation = "eager"  # torch counts no product of groups
    llm = AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    with counted() as counter, torch.no_grad():
        llm.base_model(inputs_embeds=torch.randn(3, 40, 64), use_cache=False)
    work = StepWorkload(samples=3, positions=3 * 40)
    found = language_shape(llm).by_part(work, runs=True, gradients=0.0)[0].forward
    assert found == pytest.approx(counter.get_total_flops(), rel=off)


def test_a_number_of_experts_for_each_layer_is_counted() -> None:
    """As Hunyuan's config.json has it."""
    settings = AutoConfig.for_model("hunyuan_v1_moe", vocab_size=50, num_experts=4, moe_topk=[2, 2], **GROUPED)
    llm = AutoModelForCausalLM.from_config(settings)
    one = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("hunyuan_v1_moe", vocab_size=50, num_experts=4, moe_topk=2, **GROUPED)
    )
    assert language_shape(llm).decoder == language_shape(one).decoder


@pytest.mark.parametrize("kind", ["t5", "bart", "switch_transformers", "t5gemma", "bigbird_pegasus"])
def test_an_encoder_decoder_is_counted_as_torch_counts_it(kind: str) -> None:
    """Switch Transformers have a linear layer of each expert, two in each layer; a position meets one."""
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    t5 = {"num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 96}
    experts = {"num_experts": 2, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
    bart = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, **heads}
    t5 |= {"d_model": 64}
    gemma = {"encoder": GROUPED | {"vocab_size": 50}, "decoder": GROUPED | {"vocab_size": 50}}
    sizes = {"bart": bart, "t5": t5, "switch_transformers": t5 | experts, "t5gemma": gemma, "bigbird_pegasus": bart}
    tokens = {"vocab_size": 50, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    settings = AutoConfig.for_model(kind, **tokens, **sizes[kind])
    llm = AutoModelForSeq2SeqLM.from_config(settings, attn_implementation="eager").eval()
    with counted() as counter, torch.no_grad():
        source, target = torch.randn(3, 40, 64), torch.randn(3, 8, 64)
        llm.base_model(inputs_embeds=source, decoder_inputs_embeds=target, use_cache=False)
    work = StepWorkload(samples=3, positions=3 * 48, answers=3 * 8)
    found = language_shape(llm).by_part(work, runs=True, gradients=0.0)[0].forward
    assert found == pytest.approx(counter.get_total_flops(), rel=1e-2)


@pytest.mark.slow
def test_parts_cost_what_passes_through_them() -> None:
    model = tiny_model()
    work, _ = passed(model, tiny_images(1))
    parts = {part.part: part for part in shape_of(model).by_part(work, LLM)}
    assert parts["vision encoder"].backward == 0
    assert parts["Q-Former and projection"].backward == 2 * parts["Q-Former and projection"].forward
    assert 1 < parts["language model"].backward / parts["language model"].forward < 1.3  # attention has two inputs
    assert parts["logits of the answers"].backward == parts["logits of the answers"].forward


def test_a_device_of_the_table_has_its_data_sheet_and_another_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "NVIDIA A100-SXM4-40GB": "a100_40",
        "NVIDIA A100 80GB PCIe": "a100_80",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA L40S": "l40s",
        "NVIDIA GeForce RTX 4090": "rtx_4090",
    }
    assert {name: known_gpu(name) for name in names} == {name: GPUS[key] for name, key in names.items()}
    assert known_gpu("NVIDIA H100 PCIe") is known_gpu("NVIDIA GeForce RTX 4090 D") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert device_peak(torch.device("cuda"), torch.bfloat16) == 989.4e12
    state = torch.random.get_rng_state()
    assert 1e8 < device_peak(torch.device("cpu"), torch.float32) < 1e14
    assert torch.equal(torch.random.get_rng_state(), state)  # a run's random stream does not notice
