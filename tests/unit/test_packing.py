"""Samples that share a row compute what they compute alone, in every decoder-only family, and the rows are nearly full."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from instructblip.data.batching import Batching
from instructblip.data.records import Record, Sample
from instructblip.distributed import Ranks
from instructblip.errors import UserError
from instructblip.models import llm as llm_module
from instructblip.models import varlen
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM
from instructblip.models.packing import RowLayout, block_causal_mask, pack_rows, packed_layout
from instructblip.training.loop import StepResult, train_step
from instructblip.training.optim import make_adamw
from instructblip.training.parallel import parallelize
from instructblip.weights.parts import load_llm
from tests.kit.families import SLIDING_WINDOW, llm_config, write_llm
from tests.kit.losses import LANGUAGE, term_and_workload, term_of
from tests.kit.tiny import tiny_encoder_decoder_llm, tiny_images, tiny_model

# The tiny models are so narrow that attention in longer rows would cost more than it saves: rows are made as for a wide one.
WIDE = 4096
PROMPTS = [
    "what color is the shape? Short answer:",
    "red",
    "is there a circle in the image? Question: what color is the shape in the image? Short answer:",
    "is there a circle?",
    "blue green teal gray",
]
TARGETS = ["red", "a long answer with blue green teal gray", "no", "yes no", "teal"]
# Llama with rotary positions, Mistral whose every layer slides, Gemma 3 with local and global layers, OPT with learned
# positions, Qwen 3 and SmolLM2.
DECODERS = ["vicuna_7b", "mistral_7b", "gemma_3_4b", "opt_2_7b", "qwen3_8b", "smollm2_135m"]


@pytest.fixture(autouse=True)
def wide_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(lengths: Sequence[int], *, width: int) -> list[list[int]]:
        return pack_rows(lengths, width=WIDE)

    monkeypatch.setattr(llm_module, "pack_rows", rows)


def load(name: str, folder: Path, dtype: str = "float32") -> LLM:
    write_llm(name, folder)
    options = {"sliding_window": SLIDING_WINDOW} if name == "mistral_7b" else {}
    return load_llm(llm_config(name, folder, dtype=dtype, options=options))


def step(
    model: InstructBLIP, images: Tensor, batches: Sequence[Sequence[int]], *, packed: bool
) -> tuple[float, dict[str, Tensor], list[Tensor]]:
    """Mean loss a token, its gradients, and each batch's losses a sample, of one step over micro-batches."""
    model.zero_grad()
    total, tokens, per_sample = 0.0, 0, []
    for rows in batches:
        loss = term_of(model, images[list(rows)], [PROMPTS[k] for k in rows], [TARGETS[k] for k in rows], packed=packed)
        loss.total.backward()
        total, tokens = total + loss.total.item(), tokens + int(loss.counts.sum())
        per_sample.append(loss.per_sample)
    gradients = {name: p.grad / tokens for name, p in model.named_parameters() if p.grad is not None}
    return total / tokens, gradients, per_sample


def by_length(model: InstructBLIP, monkeypatch: pytest.MonkeyPatch) -> InstructBLIP:
    """With attention by lengths, and no way back to a dense mask."""
    model.attend_by_length()
    monkeypatch.setattr(llm_module, "block_causal_mask", None)
    return model


def differences(model: InstructBLIP, images: Tensor, batches: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Of packed batches from one sample a row: in the loss a token, relative, and in the gradients, of the largest entry."""
    alone, expected, _ = step(model, images, [[k] for k in range(len(PROMPTS))], packed=False)
    together, found, _ = step(model, images, batches, packed=True)
    assert found.keys() == expected.keys() and len(found) > 20
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    worst = max(float((found[name] - gradient).abs().max()) for name, gradient in expected.items())
    return abs(together - alone) / alone, worst / largest


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_packed_rows_compute_what_one_sample_a_row_computes(name: str, frames: int, tmp_path: Path) -> None:
    model, images = tiny_model(llm=load(name, tmp_path)), tiny_images(len(PROMPTS), frames=frames)
    rows = pack_rows([model.sample_length()(p, t, frames) for p, t in zip(PROMPTS, TARGETS, strict=True)], width=WIDE)
    assert len(rows) <= 2
    loss, gradient = differences(model, images, [range(len(PROMPTS))])
    assert loss < 1e-6
    assert gradient < 1e-5


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_attention_by_length_computes_what_one_sample_a_row_computes(
    name: str, frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = tiny_model(llm=load(name, tmp_path)), tiny_images(len(PROMPTS), frames=frames)
    loss, gradient = differences(by_length(model, monkeypatch), images, [range(3), range(3, len(PROMPTS))])
    assert loss < 1e-6
    assert gradient < 3e-6  # of the largest entry, in float32


def test_attention_by_length_computes_what_a_dense_mask_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one row has no padding at all, while a model that asks for nothing by length is as before."""
    model, images = tiny_model(llm=load("vicuna_7b", tmp_path)), tiny_images(len(PROMPTS))
    before = term_and_workload(model, images, PROMPTS, TARGETS, packed=True)
    alone = term_of(model, images, PROMPTS, TARGETS).per_sample
    by_length(model, monkeypatch)
    term, work = term_and_workload(model, images, PROMPTS, TARGETS, packed=True)
    torch.testing.assert_close(term.per_sample, before[0].per_sample, rtol=1e-6, atol=1e-6)
    assert (work.padding, work.positions) == (0, before[1].positions - before[1].padding)
    assert torch.equal(term_of(model, images, PROMPTS, TARGETS).per_sample, alone)
    assert model.llm.model.config._attn_implementation == varlen.NAME


def test_recomputed_blocks_know_the_lengths_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny_model(llm=load("vicuna_7b", tmp_path)), tiny_images(len(PROMPTS))
    _, expected, _ = step(by_length(model, monkeypatch), images, [range(len(PROMPTS))], packed=True)
    parallelize(model, Ranks(), kind="single", activation_checkpointing=True)
    _, found, _ = step(model, images, [range(len(PROMPTS))], packed=True)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.slow
def test_without_the_ends_attention_by_length_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that does not hand them on is found out when it is asked to, and refused."""
    model, images = tiny_model(llm=load("vicuna_7b", tmp_path)), tiny_images(len(PROMPTS))
    by_length(model, monkeypatch)
    monkeypatch.setattr(varlen, "ends_of", lambda lengths, device: {})
    loss, gradient = differences(model, images, [range(len(PROMPTS))])
    assert loss > 1e-4
    assert gradient > 1e-2
    with pytest.raises(UserError, match=r"^LlamaForCausalLM does not keep .*parallel\.packed_attention=dense$"):
        model.attend_by_length()


def test_what_packs_nothing_attends_by_no_length() -> None:
    with pytest.raises(UserError, match=r"does not keep packed samples apart by their lengths"):
        tiny_model(llm=tiny_encoder_decoder_llm()).attend_by_length()


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["vicuna_7b", "gemma_3_4b"])
def test_packed_rows_in_bfloat16(name: str, autocast: bool, tmp_path: Path) -> None:
    """Within that format's rounding, whether the weights are bfloat16 or the computation alone."""
    llm = load(name, tmp_path, dtype="float32" if autocast else "bfloat16")
    model, images = tiny_model(llm=llm), tiny_images(len(PROMPTS))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        packed, padded = (term_of(model, images, PROMPTS, TARGETS, packed=packed) for packed in (True, False))
    torch.testing.assert_close(packed.per_sample, padded.per_sample, rtol=0.03, atol=0.1)
    packed.total.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_attention_by_length_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model was widened to float32 for a while, to see whether it keeps samples apart."""
    llm = load("gemma_3_4b", tmp_path, dtype="bfloat16")
    model, images = tiny_model(llm=llm), tiny_images(len(PROMPTS))
    alone = term_of(model, images, PROMPTS, TARGETS).per_sample
    by_length(model, monkeypatch)
    assert {parameter.dtype for parameter in llm.parameters()} == {torch.bfloat16}
    packed = term_of(model, images, PROMPTS, TARGETS, packed=True)
    torch.testing.assert_close(packed.per_sample, alone, rtol=0.03, atol=0.1)
    packed.total.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral_7b", "gemma_3_4b"])
def test_a_window_ends_inside_a_packed_sample(name: str, tmp_path: Path) -> None:
    """The tiny families' windows are shorter than their samples, or nothing would be tested of them."""
    llm = load(name, tmp_path)
    lengths = [tiny_model(llm=llm).sample_length()(p, t, 1) for p, t in zip(PROMPTS, TARGETS, strict=True)]
    assert llm.model.config.sliding_window == SLIDING_WINDOW < min(lengths)


# --- leaks -----------------------------------------------------------------------------------------------------------


def causal_alone(layout: RowLayout) -> Tensor:
    """What a row's places see where nothing parts its samples."""
    places_T = torch.arange(layout.owner_RT.shape[1])
    return (places_T[:, None] >= places_T).expand(len(layout.owner_RT), -1, -1)


def positions_go_on(rows: Sequence[Sequence[int]], lengths: Sequence[int], *, device: torch.device) -> RowLayout:
    layout = packed_layout(rows, lengths, device=device)
    return layout._replace(position_RT=torch.arange(layout.owner_RT.shape[1]).expand_as(layout.owner_RT))


@pytest.mark.parametrize("name", DECODERS)
def test_without_the_mask_the_comparison_fails(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny_model(llm=load(name, tmp_path)), tiny_images(len(PROMPTS))
    monkeypatch.setattr(llm_module, "block_causal_mask", causal_alone)
    loss, gradient = differences(model, images, [range(len(PROMPTS))])
    assert loss > 1e-4
    assert gradient > 1e-2


def test_without_positions_from_0_the_comparison_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For learned positions; rotary ones know distances only."""
    model, images = tiny_model(llm=load("opt_2_7b", tmp_path)), tiny_images(len(PROMPTS))
    monkeypatch.setattr(llm_module, "packed_layout", positions_go_on)
    loss, gradient = differences(model, images, [range(len(PROMPTS))])
    assert loss > 1e-4
    assert gradient > 1e-2


@pytest.mark.parametrize("changed", range(len(PROMPTS)))
def test_what_changes_in_one_sample_moves_no_other_by_a_bit(changed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny_model(), tiny_images(len(PROMPTS))
    other = images.clone()
    other[changed] = 255 - images[changed]
    before, after = (term_of(model, pixels, PROMPTS, TARGETS, packed=True).per_sample for pixels in (images, other))
    assert (before != after).tolist() == [sample == changed for sample in range(len(PROMPTS))]
    monkeypatch.setattr(llm_module, "block_causal_mask", causal_alone)
    before, after = (term_of(model, pixels, PROMPTS, TARGETS, packed=True).per_sample for pixels in (images, other))
    rows = pack_rows([model.sample_length()(p, t, 1) for p, t in zip(PROMPTS, TARGETS, strict=True)], width=WIDE)
    last = any(row[-1] == changed for row in rows)  # in its row: what is causal only leaks to the right
    assert int((before != after).sum()) == 1 if last else int((before != after).sum()) > 1


# --- whole steps -----------------------------------------------------------------------------------------------------


def drawn(frames: Sequence[int]) -> list[tuple[Sample, Tensor]]:
    """Samples as the loader draws them; those of several frames are videos."""
    rows = []
    for number, count in enumerate(frames):
        record = Record(str(number), "question", answers=(TARGETS[number],))
        sample = Sample(
            id=f"set/{number}",
            dataset="pictures" if count == 1 else "videos",
            record=record,
            frames=(),
            image_location=(0, number),
            image_id=str(number),
            position=number,
            instruction=PROMPTS[number],
            target=TARGETS[number],
            template="{question}",
        )
        rows.append((sample, tiny_images(1, frames=count, seed=number)[0]))
    return rows


def one_step(model: InstructBLIP, batching: Batching) -> tuple[StepResult, dict[str, Tensor]]:
    """A training step over pictures and videos, and its gradients."""
    optimizer = make_adamw(model.named_parameters(), weight_decay=0.05, betas=(0.9, 0.999))
    items = drawn([1, 3, 1, 1, 3])
    result = train_step(
        model,
        optimizer,
        batching.split(items),
        objectives=LANGUAGE,
        packed=batching.kind == "packed",
        rate=0.0,
        clip_norm=None,
    )
    return result, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *itertools.product(("bucketed", "packed"), ("vicuna_7b", "gemma_3_4b", "opt_2_7b")),
        ("bucketed", "flan_t5_xl"),
    ],
)
def test_a_step_over_pictures_and_videos(kind: str, family: str, tmp_path: Path) -> None:
    model = tiny_model(llm=load(family, tmp_path)).train()
    expected, gradients = one_step(model, Batching(micro_batch_size=1))
    for limits in ({}, {"micro_batch_size": 2}, {"micro_batch_tokens": 150}):
        result, found = one_step(model, Batching(kind, length=model.sample_length(), **limits))
        assert result.loss == pytest.approx(expected.loss, rel=1e-6)
        assert result.loss_by_dataset == pytest.approx(expected.loss_by_dataset, rel=1e-5)
        assert (result.tokens, result.ids) == (expected.tokens, expected.ids)
        assert found.keys() == gradients.keys()
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * largest)
    assert expected.padding_fraction == 0


def test_padding_is_counted() -> None:
    model, images = tiny_model(), tiny_images(len(PROMPTS))
    lengths = [model.sample_length()(p, t, 1) for p, t in zip(PROMPTS, TARGETS, strict=True)]
    padded, packed = (term_and_workload(model, images, PROMPTS, TARGETS, packed=packed)[1] for packed in (False, True))
    assert padded.positions == len(lengths) * max(lengths)
    assert padded.padding == padded.positions - sum(lengths)
    rows = [sum(lengths[k] for k in row) for row in pack_rows(lengths, width=WIDE)]
    assert packed.positions == len(rows) * max(rows) < 0.8 * padded.positions
    assert packed.padding == packed.positions - sum(lengths)
    aligned = term_and_workload(model, images, PROMPTS, TARGETS, objective="alignment")[1]
    assert (aligned.positions, aligned.padding) == (0, 0)


def test_an_encoder_decoder_model_refuses() -> None:
    model = tiny_model(llm=tiny_encoder_decoder_llm())
    with pytest.raises(ValueError, match="one sample each; take bucketed"):
        term_of(model, tiny_images(2), PROMPTS[:2], TARGETS[:2], packed=True)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_of_like_samples() -> None:
    assert pack_rows([7], width=WIDE) == [[0]]
    assert pack_rows([50, 50, 50, 50], width=WIDE) == [[0], [1], [2], [3]]  # full as they are
    assert pack_rows([60, 30, 30], width=WIDE) == [[0], [1, 2]]
    assert pack_rows([100, 60, 60, 60], width=WIDE) == [[0, 1, 2, 3]]
    assert pack_rows([100, 60, 60, 60], width=8) == [[0], [1], [2], [3]]  # so narrow that attention is what costs


def test_every_sample_lies_in_one_row_and_rows_are_full() -> None:
    random = np.random.default_rng(0)
    for count in (2, 5, 17, 64, 192):
        lengths = [int(length) for length in random.integers(40, 300, count)]
        rows = pack_rows(lengths, width=WIDE)
        assert sorted(sample for row in rows for sample in row) == list(range(count))
        assert rows == pack_rows(lengths, width=WIDE)
        filled = [sum(lengths[sample] for sample in row) for row in rows]
        assert max(filled) >= max(lengths)
        assert len(rows) * max(filled) <= 1.05 * sum(lengths)


def test_what_a_place_sees() -> None:
    layout = packed_layout([[2, 0], [1]], [2, 3, 1], device=torch.device("cpu"))
    assert layout.owner_RT.tolist() == [[2, 0, 0], [1, 1, 1]]
    assert layout.position_RT.tolist() == [[0, 0, 1], [0, 1, 2]]
    assert block_causal_mask(layout).int().tolist() == [
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
    ]
    padded = packed_layout([[0], [1]], [1, 3], device=torch.device("cpu"))
    assert padded.owner_RT[0].tolist() == [0, -1, -1]
    assert block_causal_mask(padded)[0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
