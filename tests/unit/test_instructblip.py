"""The assembled model: its loss is the LLM's own, additive over samples, and trains what is to be trained."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from instructblip.models.instructblip import InstructBLIP
from tests.kit.losses import term_of
from tests.kit.tiny import BOS, EOS, tiny_encoder_decoder_llm, tiny_images, tiny_llm, tiny_model

PROMPTS = ["what color is the shape?", "Q: is there a red circle in the image? A:", "shape"]
TARGETS = ["red", "yes, there is a red circle", ""]
# The last layer's text feed-forward is kept for other codebases, and frozen.
UNUSED = {
    f"qformer.layers.2.text_ffn.{module}.{part}" for module in ("up", "down", "norm") for part in ("weight", "bias")
}


@pytest.fixture(scope="module")
def model() -> InstructBLIP:
    return tiny_model()


def gradients(model: InstructBLIP) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model: InstructBLIP, rows: slice, **options: bool) -> None:
    term_of(model, tiny_images(3)[rows], PROMPTS[rows], TARGETS[rows], **options).total.backward()


def plain_loss(model: InstructBLIP, image: Tensor, prompt: str, target: str) -> Tensor:
    """Summed loss of one sample by transformers: labels only at the answer and its EOS."""
    visual = model.visual_prompt(model.image_tokens(image[None]), [prompt])
    text = model.llm.prompt_format.tokenizer(model.llm.prompt_format.prompt_prefix + prompt)["input_ids"]
    answer = [*model.llm.prompt_format.tokenizer(" " + target)["input_ids"], model.llm.prompt_format.eos_id]
    embed = model.llm.model.get_input_embeddings()
    before = embed(torch.tensor([model.llm.prompt_format.image_prefix_ids], dtype=torch.long))
    embeddings = torch.cat([before, visual, embed(torch.tensor([text + answer]))], dim=1)
    ignored = [-100] * (before.shape[1] + visual.shape[1] + len(text))
    output = model.llm.model(inputs_embeds=embeddings, labels=torch.tensor([ignored + answer]))
    return output.loss * len(answer)


@torch.no_grad()
def test_loss_of_an_encoder_decoder_equals_the_one_of_transformers() -> None:
    torch.manual_seed(0)
    model = tiny_model(llm=tiny_encoder_decoder_llm())
    images, targets = tiny_images(3), TARGETS
    loss, embed = term_of(model, images, PROMPTS, targets), model.llm.model.get_input_embeddings()
    expected = []
    for image, prompt, target in zip(images, PROMPTS, targets, strict=True):
        visual = model.visual_prompt(model.image_tokens(image[None]), [prompt])
        text = torch.tensor([[*model.llm.prompt_format.tokenizer(prompt)["input_ids"], model.llm.prompt_format.eos_id]])
        labels = torch.tensor(
            [[*model.llm.prompt_format.tokenizer(" " + target)["input_ids"], model.llm.prompt_format.eos_id]]
        )
        output = model.llm.model(inputs_embeds=torch.cat([visual, embed(text)], dim=1), labels=labels)
        expected.append(output.loss * labels.numel())
    torch.testing.assert_close(loss.per_sample, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert loss.counts.tolist() == [
        len(model.llm.prompt_format.tokenizer(" " + target)["input_ids"]) + 1 for target in targets
    ]


def test_limits_that_leave_no_text_are_refused() -> None:
    makers: list[Callable[[], Any]] = [
        lambda: tiny_llm(bos_token=BOS, max_target_tokens=1),  # an answer without a token, which would end the run
        lambda: tiny_llm(bos_token=BOS, max_prompt_tokens=1),
        lambda: tiny_encoder_decoder_llm(max_target_tokens=1),
        lambda: tiny_encoder_decoder_llm(max_prompt_tokens=1),
    ]
    for make in makers:
        with pytest.raises(ValueError, match=r"max_(prompt|target)_tokens=1 leaves nothing of a text"):
            make()
    assert tiny_llm(max_target_tokens=1).prompt_format.target_ids("red")  # its first token


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3])
def test_loss_equals_the_one_of_transformers(model: InstructBLIP, frames: int) -> None:
    images = tiny_images(3, frames=frames)
    loss = term_of(model, images, PROMPTS, TARGETS)
    expected = torch.stack([plain_loss(model, *row) for row in zip(images, PROMPTS, TARGETS, strict=True)])
    torch.testing.assert_close(loss.per_sample, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.total, expected.sum(), rtol=1e-5, atol=1e-5)
    tokens = [len(model.llm.prompt_format.tokenizer(" " + target)["input_ids"]) + 1 for target in TARGETS]
    assert loss.counts.tolist() == tokens


@torch.no_grad()
def test_text_around_the_visual_tokens_is_what_its_config_says() -> None:
    torch.manual_seed(0)
    model = tiny_model(llm=tiny_llm(image_prefix=f"{BOS}see ", prompt_prefix="\n"))
    assert model.llm.prompt_format.image_prefix_ids == model.llm.prompt_format.tokenizer(f"{BOS}see ")["input_ids"]
    assert model.llm.prompt_format.image_prefix_ids[0] == model.llm.prompt_format.tokenizer.bos_token_id
    loss = term_of(model, tiny_images(3), PROMPTS, TARGETS).per_sample
    rows = zip(tiny_images(3), PROMPTS, TARGETS, strict=True)
    expected = torch.stack([plain_loss(model, *row) for row in rows])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    ranked = model.rank(tiny_images(3), PROMPTS, [[target] for target in TARGETS])
    torch.testing.assert_close(torch.cat(ranked), -expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_ragged_batch_equals_its_samples_alone(model: InstructBLIP) -> None:
    together = term_of(model, tiny_images(3), PROMPTS, TARGETS).per_sample
    alone = [term_of(model, tiny_images(3)[i : i + 1], [PROMPTS[i]], [TARGETS[i]]).total for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["language_modeling", "alignment"])
def test_gradients_of_a_batch_are_the_sum_of_its_splits(objective: str) -> None:
    model = tiny_model()
    backward(model, slice(0, 3), objective=objective)
    whole = gradients(model)
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 3)):
        backward(model, rows, objective=objective)
    assert whole.keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-5 * float(whole[name].abs().max() + 1))


@pytest.mark.parametrize(("norm", "aware"), [("layer", True), ("channel", True), ("layer", False)])
def test_only_the_trainable_parts_get_gradients(norm: str, aware: bool) -> None:
    model = tiny_model(vision_norm=norm, instruction_aware=aware).train()
    assert not model.llm.model.training
    assert not model.vision.backbone.training
    backward(model, slice(0, 3))
    expected = {name for name, _ in model.named_parameters() if name.startswith(("qformer.", "projection."))}
    expected -= UNUSED
    if norm == "layer":
        expected |= {"vision_norm.weight", "vision_norm.bias"}
    assert gradients(model).keys() == expected
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected


@torch.no_grad()
def test_visual_prompt_of_frames_is_the_prompt_of_each_frame_in_order(model: InstructBLIP) -> None:
    clips = tiny_images(2, frames=3)
    whole = model.visual_prompt(model.image_tokens(clips), PROMPTS[:2])
    assert whole.shape == (2, 3 * 4, 32)
    frames = [model.visual_prompt(model.image_tokens(clips[:, f : f + 1]), PROMPTS[:2]) for f in range(3)]
    torch.testing.assert_close(whole, torch.cat(frames, dim=1), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(frames[0], frames[1], atol=1e-3)


@torch.no_grad()
def test_images_of_every_kind_give_the_same_tokens(model: InstructBLIP) -> None:
    pixels = tiny_images(2)
    pictures = [Image.fromarray(frame[0].permute(1, 2, 0).numpy()) for frame in pixels]
    tokens = model.image_tokens(pixels)
    assert tokens.shape == (2, 1, model.vision.tokens, model.vision.width)
    assert torch.equal(model.image_tokens(pictures), tokens)
    assert torch.equal(model.image_tokens([[picture] for picture in pictures]), tokens)
    assert model.image_tokens(tokens) is tokens
    clip = model.image_tokens([pictures])
    torch.testing.assert_close(clip, tokens.transpose(0, 1), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pictures_of_any_size_and_mode_are_squashed(model: InstructBLIP) -> None:
    wide = Image.new("RGBA", (90, 20), (255, 0, 0, 255))
    square = Image.new("RGB", (32, 32), (255, 0, 0))
    assert torch.equal(model.image_tokens([wide]), model.image_tokens([square]))


@torch.no_grad()
def test_alignment_loss_is_about_the_first_token_alone(model: InstructBLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.llm, "hidden_states", None)  # the LLM's layers are not run
    loss = term_of(model, tiny_images(3), PROMPTS, TARGETS, objective="alignment")
    assert loss.counts.tolist() == [1, 1, 1]
    visual = model.visual_prompt(model.image_tokens(tiny_images(3)), PROMPTS)
    stretch = visual.norm(dim=-1).div(model.llm.embeddings.weight.norm(dim=-1).mean()).log().square()
    torch.testing.assert_close(loss.total, loss.per_sample.sum() + stretch.mean(dim=1).sum())
    same_start = term_of(model, tiny_images(3), PROMPTS, ["red shape", "yes", " "], objective="alignment")
    assert torch.equal(loss.per_sample[:2], same_start.per_sample[:2])
    other_start = term_of(model, tiny_images(3), PROMPTS, ["blue", "no", "x"], objective="alignment")
    assert bool((loss.per_sample[:2] != other_start.per_sample[:2]).all())


@pytest.mark.parametrize("objective", ["language_modeling", "alignment"])
def test_a_language_model_in_half_precision_trains_the_rest_in_full(objective: str) -> None:
    model = tiny_model()
    expected = term_of(model, tiny_images(3), PROMPTS, TARGETS, objective=objective).total
    model.llm.to(torch.bfloat16)
    loss = term_of(model, tiny_images(3), PROMPTS, TARGETS, objective=objective).total
    loss.backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0)
    assert loss != expected


@torch.no_grad()
def test_alignment_loss_is_a_likelihood_over_the_vocabulary(
    model: InstructBLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(model.llm.prompt_format.tokenizer)
    monkeypatch.setattr(model.llm.prompt_format, "target_ids", lambda target, **_: [int(target), 0])
    tokens = model.image_tokens(tiny_images(1)).expand(size, -1, -1, -1)
    loss = term_of(model, tokens, ["shape"] * size, [str(token) for token in range(size)], objective="alignment")
    torch.testing.assert_close(loss.per_sample.neg().exp().sum(), torch.tensor(1.0), rtol=1e-5, atol=0)


def test_cosines_are_with_the_embeddings_that_were_loaded() -> None:
    """As of a run that starts from one that trained its language model, and keeps that frozen."""
    llm, directions = tiny_llm(), nn.functional.normalize(torch.randn(3, 32), dim=-1)
    table = llm.embeddings.weight.detach() * torch.linspace(0.5, 3.0, len(llm.embeddings.weight))[:, None]
    name = next(name for name, value in llm.named_parameters() if value is llm.embeddings.weight)
    llm.requires_grad_(False).load_state_dict({name: table}, strict=False)
    torch.testing.assert_close(llm.embedding_norms, table.norm(dim=-1))
    expected = nn.functional.cosine_similarity(directions[:, None], table[None], dim=-1)
    torch.testing.assert_close(llm.embedding_cosines(directions), expected, atol=1e-5, rtol=1e-5)


def test_prompts_lose_their_beginning_and_targets_their_end() -> None:
    whole, short = tiny_llm(), tiny_llm(max_prompt_tokens=3, max_target_tokens=3)
    prompt, target = whole.prompt_format.prompt_ids(PROMPTS[1]), whole.prompt_format.target_ids(TARGETS[1])
    assert short.prompt_format.prompt_ids(PROMPTS[1], training=True) == prompt[-3:]
    assert short.prompt_format.prompt_ids(PROMPTS[1]) == prompt  # only training cuts, as released
    assert short.prompt_format.target_ids(TARGETS[1]) == target[:3]
    assert whole.prompt_format.eos_id == target[-1]
    assert short.prompt_format.target_ids("") == [
        *whole.prompt_format.tokenizer(" ")["input_ids"],
        whole.prompt_format.eos_id,
    ]
    assert whole.prompt_format.target_ids(TARGETS[1], include_eos=False) == target[:-1]


def test_begin_of_sequence_stays_on_a_cut_prompt() -> None:
    llm = tiny_llm(bos_token=BOS, max_prompt_tokens=3)
    bos = llm.prompt_format.tokenizer.get_vocab()[BOS]
    assert llm.prompt_format.prompt_ids(PROMPTS[1], training=True) == [
        bos,
        *tiny_llm().prompt_format.prompt_ids(PROMPTS[1])[-2:],
    ]
    assert llm.prompt_format.prompt_ids("") == [bos]
    assert bos not in llm.prompt_format.target_ids("red")


def test_the_limit_of_a_target_counts_the_begin_of_sequence() -> None:
    # As released: the answer is cut together with its BOS, which is dropped afterwards.
    with_bos, without = (tiny_llm(bos_token=token, max_target_tokens=4) for token in (BOS, None))
    assert with_bos.prompt_format.target_ids(TARGETS[1]) == without.prompt_format.target_ids(TARGETS[1])[:3]


def test_an_answer_without_a_text_before_it_has_no_prefix() -> None:
    plain, around = tiny_llm().prompt_format, tiny_llm(prompt_suffix=" answer").prompt_format
    words = plain.ids("red one")
    assert plain.answer_ids("", "red one") == [*words, plain.eos_id]
    assert (
        plain.answer_ids("what is it?", "red one")
        == plain.target_ids("red one")
        == [*plain.ids(" red one"), plain.eos_id]
    )
    assert around.answer_ids("", "red one") == plain.target_ids("red one")


def test_candidates_of_an_empty_prompt_begin_a_text() -> None:
    model = tiny_model()
    images, candidates = tiny_images(2), [["red", "blue"]] * 2
    mixed = model.rank(images, ["", "what color?"], candidates)
    alone = [model.rank(images[k : k + 1], [prompt], candidates[:1])[0] for k, prompt in enumerate(["", "what color?"])]
    torch.testing.assert_close(mixed, alone, rtol=0, atol=1e-4)
    model.llm.prompt_format.answer_prefix = ""
    begun = model.rank(images, ["", "what color?"], candidates)
    torch.testing.assert_close(begun[0], mixed[0], rtol=0, atol=1e-4)
    assert not torch.allclose(begun[1], mixed[1])


def test_bos_is_an_answers_first_token_where_it_is_supervised() -> None:
    given, learned = (tiny_llm(bos_token=BOS, supervise_bos=way).prompt_format for way in (False, True))
    (bos,) = given.bos_ids
    for form in (given, learned):
        assert form.prompt_ids("") == [bos]  # at inference
        assert form.prompt_ids("what?", training=True) == form.prompt_ids("what?")
        assert form.answer_ids("what?", "red") == form.target_ids("red")
        assert form.length("", "red", 2, queries=4) == 8 + len(given.answer_ids("", "red"))
    assert (given.prompt_ids("", training=True), learned.prompt_ids("", training=True)) == ([bos], [])
    assert learned.answer_ids("", "red") == [bos, *given.answer_ids("", "red")]
    for wrong in (lambda: tiny_llm(supervise_bos=True), lambda: tiny_encoder_decoder_llm(supervise_bos=True)):
        with pytest.raises(ValueError, match="needs a decoder-only language model with a bos_token"):
            wrong()


def test_only_a_qformer_that_reads_no_text_answers_without_prompts() -> None:
    images = tiny_images(2)
    blip2 = tiny_model(instruction_aware=False)
    assert blip2.generate(images, max_new_tokens=4) == blip2.generate(images, ["", ""], max_new_tokens=4)
    with pytest.raises(ValueError, match="prompts is of type NoneType, and this Q-Former reads them"):
        tiny_model().generate(images)
    with pytest.raises(ValueError, match="reads instructions needs its tokenizer"):
        model = tiny_model()
        InstructBLIP(
            vision=model.vision,
            vision_norm=model.vision_norm,
            qformer=model.qformer,
            qformer_tokenizer=None,
            llm=model.llm,
        )


def test_an_encoder_decoder_ends_prompts_and_cut_texts_with_eos() -> None:
    llm = tiny_encoder_decoder_llm(max_prompt_tokens=4, max_target_tokens=3)
    words, target = (
        tiny_llm().prompt_format.prompt_ids(PROMPTS[1]),
        tiny_llm().prompt_format.target_ids(TARGETS[1], include_eos=False),
    )
    assert llm.prompt_format.prompt_ids(PROMPTS[1]) == [*words, llm.prompt_format.eos_id]
    assert llm.prompt_format.prompt_ids(PROMPTS[1], training=True) == [*words[-3:], llm.prompt_format.eos_id]
    assert llm.prompt_format.target_ids(TARGETS[1]) == [*target[:2], llm.prompt_format.eos_id]
    assert llm.prompt_format.target_ids(TARGETS[1], include_eos=False) == target[:2]


@torch.no_grad()
def test_training_cuts_long_prompts_and_inference_does_not() -> None:
    torch.manual_seed(0)
    whole = tiny_model(llm=tiny_llm())
    torch.manual_seed(0)
    short = tiny_model(llm=tiny_llm(max_prompt_tokens=3))
    images, long = tiny_images(1), PROMPTS[1:2]
    uncut, cut = (term_of(model, images, long, ["red"]).total for model in (whole, short))
    assert not torch.allclose(uncut, cut, atol=1e-4)
    assert torch.equal(whole.rank(images, long, [["red"]])[0], short.rank(images, long, [["red"]])[0])


@torch.no_grad()
def test_a_long_instruction_loses_its_beginning_on_the_way_into_the_qformer() -> None:
    model = tiny_model(max_instruction_tokens=6)
    tokens = model.image_tokens(tiny_images(1))
    ending = "what is the shape"  # four tokens between [CLS] and [SEP]
    expected = model.visual_prompt(tokens, [ending])
    assert torch.equal(model.visual_prompt(tokens, [f"there question {ending}"]), expected)
    assert not torch.allclose(model.visual_prompt(tokens, ["what is the color"]), expected, atol=1e-4)


@torch.no_grad()
def test_the_instruction_reaches_the_visual_prompt_where_it_is_read() -> None:
    for aware in (True, False):
        model = tiny_model(instruction_aware=aware)
        tokens = model.image_tokens(tiny_images(2))
        first, second = (model.visual_prompt(tokens, [prompt] * 2) for prompt in PROMPTS[:2])
        assert torch.equal(first, second) is not aware


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
def test_visual_tokens_start_at_the_scale_of_the_embeddings(seed: int) -> None:
    model = tiny_model(seed, queries=32)
    model.llm.embeddings.weight.mul_(30)
    model._match_embedding_scale()
    visual = model.visual_prompt(model.image_tokens(tiny_images(3)), PROMPTS)
    expected = model.llm.embeddings.weight.norm(dim=1).mean()
    assert 0.7 < float(visual.norm(dim=2).mean() / expected) < 1.4
    assert torch.equal(model.projection.bias, torch.zeros(32))


@torch.no_grad()
@pytest.mark.parametrize("norm", ["layer", "channel"])
def test_trainable_state_is_all_that_is_not_frozen(norm: str) -> None:
    model, other = tiny_model(0, vision_norm=norm), tiny_model(1, vision_norm=norm)
    state = model.held_state()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    buffers = {"vision_norm.mean", "vision_norm.std"} if norm == "channel" else set()
    assert state.keys() == trainable | buffers | UNUSED
    frozen = {tensor.data_ptr() for part in (model.vision, model.llm) for tensor in part.state_dict().values()}
    assert not frozen & {tensor.data_ptr() for tensor in state.values()}
    other.vision, other.llm = model.vision, model.llm
    other.load_state_dict(state, strict=False)
    expected = term_of(model, tiny_images(3), PROMPTS, TARGETS)
    assert torch.equal(term_of(other, tiny_images(3), PROMPTS, TARGETS).per_sample, expected.per_sample)


def test_trainable_state_leaves_the_frozen_parts_alone() -> None:
    """Their hooks may exchange data among processes, of which one alone may ask for the state."""
    model = tiny_model()

    def refuse(module: nn.Module, *_: object) -> None:
        raise AssertionError(f"the state of {type(module).__name__} was asked for")

    for part in (model.vision, model.llm):
        for module in part.modules():
            module.register_state_dict_pre_hook(refuse)
    assert "projection.weight" in model.held_state()


def test_a_seed_gives_the_same_model() -> None:
    first, second, other = (tiny_model(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["qformer.query_tokens"], other["qformer.query_tokens"])


def test_errors(model: InstructBLIP) -> None:
    with pytest.raises(ValueError, match="targets has 1 entries for 2 images"):
        term_of(model, tiny_images(2), PROMPTS[:2], TARGETS[:1])
    llm = tiny_llm()
    with pytest.raises(ValueError, match="the tokenizer has no token '<eos>'"):
        type(llm)(llm.model, llm.prompt_format.tokenizer, eos_token="<eos>", pad_token=EOS)
