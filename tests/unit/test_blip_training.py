"""A step of BLIP's training depends on the global batch and on what came before, however it is cut."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from instructblip.data.batching import Batch
from instructblip.distributed import ALONE
from instructblip.errors import UserError
from instructblip.models.base import Partners
from instructblip.models.blip import BLIP, BLIPPretrain, BLIPRetrieval
from instructblip.objectives import Objective, ObjectiveSettings, make_objectives
from instructblip.objectives.base import WholeBatch
from instructblip.objectives.distillation import COPIES, Distillation, PairDistillation
from instructblip.objectives.language_modeling import Answering, Captioning, LanguageModeling
from instructblip.objectives.matching import Matching
from instructblip.training.loop import train_step
from instructblip.training.optim import follow, make_adamw
from instructblip.training.parallel import StepContext, parallelize
from instructblip.training.plan.blip_flops import blip_shape
from instructblip.training.setup import text_parts
from tests.kit.blip import tiny_caption, tiny_vit, tiny_vqa
from tests.kit.blip_training import WatchedPairMatching, momentum_of, tiny_batch, tiny_blip
from tests.kit.stage1 import Step, WatchedMatching, assert_gradients, step

ROWS = list(range(16))
SPLITS = {size: [ROWS[start : start + size] for start in range(0, 16, size)] for size in (2, 4, 8, 16)} | {
    0: [[9, 2, 5], [15, 0, 1, 3, 4, 14], [6], [8, 7, 10, 13, 12, 11]]
}


class Trained(NamedTuple):
    model: BLIPRetrieval
    step: Step
    drawn: dict[int, tuple[int, int]]


def trained(split: Sequence[Sequence[int]], *, among: int | None = None, model: BLIPRetrieval | None = None) -> Trained:
    """A step of pre-training, no objective of weight 1."""
    model, matching = model or tiny_blip(), WatchedPairMatching(0.8, among)
    objectives = (PairDistillation(1.3), matching, Captioning(0.5))
    found = step(model, [tiny_batch(rows) for rows in split], objectives, rate=1e-3)
    return Trained(model, found, matching.drawn)


@pytest.fixture(scope="module")
def whole() -> Trained:
    return trained(SPLITS[16])


# --- any cut ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 2, 4, 8])
def test_any_micro_batches_give_the_same_losses_gradient_negatives_queue_and_copies(size: int, whole: Trained) -> None:
    found = trained(SPLITS[size])
    assert found.drawn == whole.drawn
    assert found.step.result.loss_by_objective == pytest.approx(whole.step.result.loss_by_objective, rel=1e-6)
    assert_gradients(found.step.gradients, whole.step.gradients)
    expected = whole.model.part_state("momentum")
    for name, tensor in found.model.part_state("momentum").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.slow
def test_retrieval_gives_the_same_for_any_micro_batches() -> None:
    def of(split: Sequence[Sequence[int]]) -> tuple[Step, Any]:
        matching = WatchedMatching(0.8)
        return step(tiny_blip(), [tiny_batch(rows) for rows in split], (Distillation(1.3), matching)), matching.drawn

    (expected, drawn), (found, again) = of(SPLITS[16]), of(SPLITS[4])
    assert again == drawn
    assert found.result.loss_by_objective == pytest.approx(expected.result.loss_by_objective, rel=1e-6)
    assert_gradients(found.gradients, expected.gradients)


@pytest.mark.slow
def test_recomputed_activations_give_the_same_gradient(whole: Trained) -> None:
    model = tiny_blip()
    parallelize(model, ALONE, kind="single", activation_checkpointing=True)
    found = trained(SPLITS[8], model=model)
    assert found.drawn == whole.drawn
    assert_gradients(found.step.gradients, whole.step.gradients)


def test_dropout_and_drop_path_draw_the_same_in_both_passes() -> None:
    """Features of the first pass, which the gradient is of, are those of the second."""
    model = tiny_blip(dropout=0.3, drop_path=0.3)
    forward, seen = model.forward, []

    def watched(*arguments: Any, **options: Any) -> Any:
        outputs = forward(*arguments, **options)
        seen.append({name: tensor.detach() for name, tensor in outputs.tensors.items()})
        return outputs

    model.forward = watched  # type: ignore[method-assign]
    trained(SPLITS[8], model=model)
    assert len(seen) == 4
    for before, after in zip(seen[:2], seen[2:], strict=True):
        assert "image_projected_m" in before and "image_projected_m" not in after
        for name in ("image_projected", "text_projected"):
            assert torch.equal(before[name], after[name])


@pytest.mark.slow
def test_steps_are_those_of_the_algorithm_written_down() -> None:
    """Four steps (BLIP, section 3.2; ALBEF, algorithm of its appendix): copies move first, the queue is filled last."""
    ours, theirs, drawn = tiny_blip(queue_size=40), tiny_blip(queue_size=40), list[dict[int, tuple[int, int]]]()
    distil = PairDistillation(ramp=4)
    optimizer = make_adamw(ours.named_parameters(), weight_decay=0.05, betas=(0.9, 0.999))
    for number in range(4):
        matching = WatchedPairMatching()
        batches = [tiny_batch(rows, first=16 * number) for rows in SPLITS[8]]
        objectives = (distil.at(number), matching, Captioning())
        train_step(ours, optimizer, batches, objectives=objectives, rate=1e-3, clip_norm=None)
        drawn.append({row: matching.drawn[16 * number + row] for row in range(16)})
    optimizer, momentum = (
        make_adamw(theirs.named_parameters(), weight_decay=0.05, betas=(0.9, 0.999)),
        momentum_of(theirs),
    )
    pointer = 0
    for number in range(4):
        with torch.no_grad():
            for name, weight in momentum.named_parameters():
                weight.copy_(0.995 * weight + 0.005 * theirs.get_parameter(name))
        wrong = drawn[number]
        inputs = theirs.prepare(tiny_batch(ROWS))
        partners = Partners(
            torch.as_tensor(inputs.images)[[wrong[row][0] - 16 * number for row in ROWS]],
            [inputs.answers[wrong[row][1] - 16 * number] for row in ROWS],
        )
        outputs = theirs(replace(inputs, partners=partners), BLIPPretrain.OUTPUTS).tensors
        image, text, temperature = outputs["image_projected"][:, 0], outputs["text_projected"], outputs["temperature"]
        keys = {
            "image": torch.cat([outputs["image_projected_m"][:, 0], momentum.image_queue.T.clone()]),
            "text": torch.cat([outputs["text_projected_m"], momentum.text_queue.T.clone()]),
        }
        share, losses = 0.4 * number / 4, []
        for query, own_m, key in ((image, keys["image"][:16], "text"), (text, keys["text"][:16], "image")):
            soft = (own_m @ keys[key].T / temperature).softmax(dim=1).detach()
            target = share * soft + (1 - share) * torch.eye(16, 56)
            losses.append(-(target * (query @ keys[key].T / temperature).log_softmax(dim=1)).sum(dim=1).mean())
        labels = torch.tensor([1] * 16 + [0] * 32)
        tokens = torch.tensor([token for ids in inputs.answers for token in ids])
        match = cross_entropy(outputs["match_logits"].flatten(0, 1), labels)
        write = cross_entropy(outputs["answer_logits"], tokens, label_smoothing=0.1)
        optimizer.zero_grad()
        (sum(losses) / 2 + match + write).backward()  # type: ignore[union-attr]
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        places = [(pointer + place) % 40 for place in range(16)]
        momentum.image_queue[:, places], momentum.text_queue[:, places] = keys["image"][:16].T, keys["text"][:16].T
        pointer = (pointer + 16) % 40
    assert int(momentum_of(ours).pointer) == pointer
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        # Biases of keys change nothing: their gradient is rounding, which AdamW makes steps of.
        if name not in ("momentum.pointer", "momentum.image_id_queue") and not name.endswith(("key.bias", "qkv.bias")):
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4, msg=name)


# --- copies ----------------------------------------------------------------------------------------------------------


def test_copies_follow_before_the_pass_and_never_learn(whole: Trained) -> None:
    before, original = momentum_of(tiny_blip()), tiny_blip()
    for name, weight in momentum_of(whole.model).named_parameters():
        start = before.get_parameter(name)
        expected = 0.995 * start + 0.005 * original.get_parameter(name)
        torch.testing.assert_close(weight, expected, msg=name)
        assert weight.grad is None
    assert not any(name.startswith("momentum") for name in whole.step.gradients)


def test_a_copy_that_equals_its_original_stays_as_it_is_bit_for_bit() -> None:
    own = torch.randn(1000)
    copied = own.clone()
    follow([(copied, own)], 0.995)
    assert torch.equal(copied, own)


def test_copies_are_in_evaluation_mode_while_the_rest_trains() -> None:
    model = tiny_blip()
    assert model.training and model.text_encoder.training
    assert not any(module.training for module in momentum_of(model).modules())


def test_the_copies_of_a_frozen_encoder_read_its_tokens() -> None:
    """Which the step computes once: the copies are then of the text model alone."""
    model = tiny_blip(("text",))
    found = trained(SPLITS[4], model=model)
    assert not any(name.startswith("vision.") for name in found.step.gradients)
    fresh = tiny_blip(("text",)).part_state("vision")
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.part_state("vision").items())


# --- queue -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_queue_wraps_where_the_batch_does_not_divide_it() -> None:
    """Of 24 places 16 are filled, then the last 8 and the first 8; the pairs stand in the order of their positions."""
    model = tiny_blip()
    momentum = momentum_of(model)
    for first in (0, 16):
        batches = [tiny_batch(rows, first=first) for rows in SPLITS[0]]
        step(model, batches, (PairDistillation(),))
    assert int(momentum.pointer) == 8
    ids = momentum.image_id_queue[0].tolist()
    assert ids[:8] == [*ids[16:], *ids[8:16]][8:16]
    assert [ids[place] == ids[place - 1] for place in range(9, 16)] == [row % 4 == 3 for row in range(9, 16)]
    assert -100 not in ids


@pytest.mark.parametrize("size", [1, 5, 16, 23])
def test_of_more_pairs_than_places_the_last_stay(size: int) -> None:
    model = tiny_blip(queue_size=size)
    momentum = momentum_of(model)
    features = torch.arange(40.0).view(40, 1).expand(40, 16)
    for start in (0, 20):
        momentum.enqueue(features[start : start + 20], features[start : start + 20], torch.arange(start, start + 20))
    assert int(momentum.pointer) == 40 % size
    assert sorted(momentum.image_id_queue[0].tolist()) == list(range(40 - size, 40))
    oldest = momentum.image_id_queue[0].roll(-int(momentum.pointer))
    assert oldest.tolist() == list(range(40 - size, 40))
    assert torch.equal(momentum.image_queue[0], momentum.image_id_queue[0].float())


def test_a_step_that_is_skipped_leaves_the_queue_alone() -> None:
    model = tiny_blip()
    with torch.no_grad():
        model.text_projection.weight.fill_(torch.nan)
    before = momentum_of(model).image_queue.clone()
    objectives, context = (PairDistillation(),), StepContext(skip_non_finite=True)
    result = step(model, [tiny_batch(ROWS)], objectives, context=context).result
    assert result.skipped
    assert torch.equal(momentum_of(model).image_queue, before)
    assert int(momentum_of(model).pointer) == 0


def test_a_phase_that_contrasts_nothing_leaves_the_queue_alone() -> None:
    model = tiny_blip()
    step(model, [tiny_batch(ROWS)], (Captioning(),))
    assert int(momentum_of(model).pointer) == 0


# --- targets and negatives -------------------------------------------------------------------------------------------


def test_soft_targets_grow_with_the_steps_of_the_phase() -> None:
    objective = Distillation.of(1.0, ObjectiveSettings(soft_targets=0.4, soft_targets_ramp=20))
    assert [objective.at(step).soft_targets for step in (0, 5, 20, 1000)] == pytest.approx([0, 0.1, 0.4, 0.4])
    assert Distillation(soft_targets=0.3).at(0).soft_targets == 0.3
    assert Captioning().at(7).outputs == Captioning.outputs


def test_pairs_are_right_alone_in_pre_training_and_images_in_retrieval() -> None:
    rows = torch.arange(4)
    shared = {"image_id_queue": torch.tensor([[9, 5, -100]])}
    batch = WholeBatch({}, {}, shared, torch.tensor([5, 7, 5, 9]), rows, rows)
    same = torch.tensor([[1, 0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 0, 0]])
    assert torch.equal(Distillation().right(batch), same.bool())
    assert torch.equal(PairDistillation().right(batch).long(), torch.eye(4, 7, dtype=torch.int64))


@pytest.mark.slow
@pytest.mark.parametrize("among", [4, 8])
def test_negatives_come_from_the_samples_of_consecutive_positions(among: int, whole: Trained) -> None:
    for split in (SPLITS[16], SPLITS[0]):
        drawn = trained(split, among=among).drawn
        assert drawn.keys() == set(ROWS)
        assert all(other // among == row // among for row, pair in drawn.items() for other in pair)
    assert any(other // among != row // among for row, pair in whole.drawn.items() for other in pair)


def test_a_group_of_one_image_has_no_partners() -> None:
    rows, ids = torch.arange(4), torch.tensor([1, 1, 2, 3])
    features = {"image_projected": torch.ones(4, 1, 2), "text_projected": torch.ones(4, 2)}
    batch = WholeBatch(features, features, {"temperature": torch.tensor(1.0)}, ids, rows, rows)
    assert len(Matching().draw(batch, 0).images) == 4
    of_another_rank = batch._replace(own={}, own_rows_B=rows[2:])
    for seen in (batch, of_another_rank):
        with pytest.raises(UserError, match=r"4 samples has 2 in a row \(recipe\.phases\.NAME\.negatives_among\)"):
            Matching(among=2).draw(seen, 0)


def test_the_temperature_stays_within_its_bounds_in_a_step() -> None:
    for value, bound in ((3.0, 0.5), (-1.0, 0.001)):
        model = tiny_blip()
        with torch.no_grad():
            model.temperature.fill_(value)
        step(model, [tiny_batch(ROWS)], (PairDistillation(),))
        assert float(model.temperature.detach()) == pytest.approx(bound)


def test_a_frozen_temperature_is_bounded_where_it_is_read_and_stays() -> None:
    model = tiny_blip(("vision",))
    with torch.no_grad():
        model.temperature.fill_(3.0)
    outputs = model(model.prepare(tiny_batch(ROWS[:2])), {"temperature"})
    assert float(outputs.tensors["temperature"]) == 0.5
    assert float(model.temperature) == 3.0


# --- answers ---------------------------------------------------------------------------------------------------------


def answers_step(weights: Sequence[Sequence[float]], split: Sequence[Sequence[int]]) -> Step:
    texts = [("a man", "two dogs", "a cat"), ("a bus",), ("a tree", "people in the snow"), ("a woman is eating",)]
    batches = []
    for rows in split:
        plain = tiny_batch(rows)
        given = [tuple(zip(texts[row], weights[row], strict=True)) for row in rows]
        batches.append(plain._replace(instructions=["a man"] * len(rows), answers=given))
    return step(tiny_vqa().train(), batches, (Answering(),))


@pytest.mark.slow
def test_answers_count_by_their_weights_and_questions_by_one() -> None:
    """The loss is linear in the weights: that of each answer alone adds up to that of all."""
    weights = [[0.5, 0.3, 0.2], [1.0], [0.6, 0.4], [0.2]]
    whole, cut = answers_step(weights, [[0, 1, 2, 3]]), answers_step(weights, [[2, 0], [1], [3]])
    assert cut.result.loss == pytest.approx(whole.result.loss, rel=1e-6)
    assert_gradients(cut.gradients, whole.gradients)
    alone = [
        [[weight * (place == number) for place, weight in enumerate(row)] for row in weights] for number in range(3)
    ]
    losses = [answers_step(each, [[0, 1, 2, 3]]).result.loss for each in alone]
    assert all(loss > 0 for loss in losses)
    assert sum(losses) == pytest.approx(whole.result.loss, rel=1e-5)


def test_a_drawn_answer_counts_alone_where_no_others_are_given() -> None:
    model = tiny_vqa()
    inputs = model.prepare(tiny_batch([0, 1]))
    assert (list(inputs.answer_counts), list(inputs.answer_weights)) == ([1, 1], [1.0, 1.0])
    tokens = [len(ids) for ids in inputs.answers]
    with torch.no_grad():
        outputs = model(inputs, {"answer_logits"}).tensors
    assert LanguageModeling().term(outputs, inputs).counts.tolist() == tokens


# --- frozen parts, prompt --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trains", "stays"), [("text", "vision"), ("vision", "text")])
def test_a_frozen_part_stays_bit_for_bit(trains: str, stays: str) -> None:
    model = tiny_caption().choose_trained((trains,)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = make_adamw(model.named_parameters(), weight_decay=0.05, betas=(0.9, 0.999))
    for first in (0, 16):
        batches = [tiny_batch([0, 1], first=first), tiny_batch([2, 3], first=first)]
        train_step(model, optimizer, batches, objectives=(Captioning(),), rate=1e-2, clip_norm=None)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and {model.part_of(name) for name in changed} == {trains}
    assert not any(name in changed for name in model.part_state(stays))


def test_the_prompt_of_captions_is_given_and_not_learnt() -> None:
    """Its tokens are no units of the loss; they still are what the caption follows."""
    model = tiny_caption()
    batch = tiny_batch([0, 1])
    inputs = model.prepare(batch)
    alone = [model.tokenizer(text)["input_ids"][1:] for text in batch.targets]
    assert [list(ids) for ids in inputs.answers] == alone
    assert Captioning().count(inputs) == sum(map(len, alone))


def test_make_objectives_takes_the_settings_of_a_phase() -> None:
    settings = ObjectiveSettings(soft_targets=0.2, soft_targets_ramp=3, negatives_among=8)
    distil, match, write = make_objectives({"distillation": 1.0, "matching": 2.0, "captioning": 1.0}, settings)
    assert isinstance(distil, Distillation) and isinstance(match, Matching) and isinstance(write, Captioning)
    assert (distil.soft_targets, distil.ramp, match.among, match.weight) == (0.2, 3, 8, 2.0)


def test_images_of_partners_are_encoded_with_gradient() -> None:
    """A wrong image teaches the encoder as a right one does."""
    model = tiny_blip(("vision",))
    found = step(model, [tiny_batch(ROWS)], (WatchedPairMatching(),))
    assert bool(found.gradients["vision.backbone.pos_embed"].any())


# --- work ------------------------------------------------------------------------------------------------------------


def counted_step(model: BLIP, batch: Batch, objectives: Sequence[Objective]) -> tuple[float, float]:
    """FLOPs of a step by the formulas and by torch, which counts attention only where it is made of matrix products.

    Of a first layer the formulas count a gradient that goes on to the pictures, which torch leaves out.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work = step(model, [batch], objectives).result.work
    with torch.device("meta"):
        shape = blip_shape(tiny_vit(), text_parts(model), model.trained_parts)
    outputs = frozenset[str]().union(*(objective.outputs for objective in objectives))
    copied = frozenset[str]().union(*(objective.needed() for objective in objectives)) & COPIES
    found = shape.total(work, outputs | copied) + shape.repeated(work, outputs)
    patches = model.vision.backbone.patch_embed
    trained = len(batch.ids) * (2 if "match_logits" in outputs else 1) * ("vision" in model.trained_parts)
    return found - trained * 2 * patches.num_patches * patches.proj.weight.numel(), float(counter.get_total_flops())


@pytest.mark.slow
@pytest.mark.parametrize("parts", [("vision", "text"), ("text",)])
def test_a_step_of_pre_training_is_counted_as_torch_counts_it(parts: Sequence[str]) -> None:
    """Two samples with captions of one length."""
    batch = tiny_batch([0, 6])._replace(targets=["a man", "a bus"])
    found, expected = counted_step(tiny_blip(parts), batch, (PairDistillation(), WatchedPairMatching(), Captioning()))
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_steps_of_captions_and_of_answers_are_counted_as_torch_counts_them() -> None:
    """The last token of an answer passes through the decoder for nothing, which the formula leaves out."""
    batch = tiny_batch([0, 6])._replace(targets=["a man", "a bus"], instructions=["a man", "a bus"])
    for model, objective, off in ((tiny_caption(), Captioning(), 0.01), (tiny_vqa(), Answering(), 0.04)):
        found, expected = counted_step(model, batch, (objective,))
        assert found == pytest.approx(expected, rel=off)
