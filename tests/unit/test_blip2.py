"""BLIP-2's first stage: nothing depends on batch or padding, frozen parts stay frozen, wrong arguments are named."""

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from instructblip.models.blip2 import BLIP2
from tests.kit.stage1 import tiny_stage1
from tests.kit.tiny import tiny_images, tiny_qformer

TEXTS = [
    "a man riding a horse on the grass",
    "two dogs",
    "the small red car is parked near a big tree and a blue bus",
    "a cat.",
    "people standing in the snow",
    "a",
    "a woman is eating pizza at a table in the kitchen with three people next to her and a dog under it and a cat",
    "a bus",
]


@pytest.fixture(scope="module")
def model() -> BLIP2:
    return tiny_stage1().eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
def test_features_and_scores_do_not_depend_on_the_batch(model: BLIP2) -> None:
    images = tiny_images(8)
    features = model.features(images, TEXTS)
    for row, text in enumerate(TEXTS):
        one = images[row : row + 1]
        alone = model.features(one, [text])
        length = alone.text.shape[1]
        close(features.image[row], alone.image[0])
        close(features.image_projected[row], alone.image_projected[0])
        close(features.text[row, :length], alone.text[0])
        close(features.text_projected[row], alone.text_projected[0])
        close(features.multimodal[row], alone.multimodal[0])
        for head in ("itm", "itc"):
            close(model.match(images, TEXTS, head=head)[row], model.match(one, [text], head=head)[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_do_not_depend_on_the_batch(model: BLIP2, beams: int) -> None:
    images = tiny_images(8)
    options = {"num_beams": beams, "max_new_tokens": 8, "min_new_tokens": 1}
    together = model.generate(images, **options)
    assert together == [model.generate(images[row : row + 1], **options)[0] for row in range(8)]
    assert len(set(together)) > 1


def test_features_of_one_kind_alone(model: BLIP2) -> None:
    images, both = tiny_images(8), model.features(tiny_images(8), TEXTS)
    only_images, only_texts = model.features(images), model.features(texts=TEXTS)
    assert torch.equal(only_images.image_projected, both.image_projected)
    assert torch.equal(only_texts.text_projected, both.text_projected)
    assert only_images.text is only_images.text_mask is only_images.multimodal is None
    assert only_texts.image is only_texts.image_projected is only_texts.multimodal is None
    for projected in (both.image_projected, both.text_projected):
        close(projected.norm(dim=-1), torch.ones(projected.shape[:-1]))


def test_pictures_are_those_pixels(model: BLIP2) -> None:
    side = model.vision.image_size
    images = tiny_images(2)
    assert images.shape[-1] == side
    pictures = [Image.fromarray(image[0].permute(1, 2, 0).numpy()) for image in images]
    close(model.features(pictures).image, model.features(images).image)
    close(model.features(model.image_tokens(images)).image, model.features(images).image)


def test_sampled_captions_follow_the_random_stream(model: BLIP2) -> None:
    images, options = tiny_images(2), {"do_sample": True, "max_new_tokens": 9}
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model.generate(images, **options))
    assert drawn[0] == drawn[1] != drawn[2]


def test_long_texts_lose_their_end_in_matching_and_not_in_features(model: BLIP2) -> None:
    images, long = tiny_images(1), TEXTS[6]
    short = tiny_stage1(max_text_tokens=10).eval()
    other_end = long.replace("cat", "bus")
    assert torch.equal(short.match(images, [long]), short.match(images, [other_end]))
    assert not torch.equal(model.match(images, [long]), model.match(images, [other_end]))
    assert short.features(texts=[long]).text.shape[1] == model.tokenize([long], max_tokens=64)[0].shape[1] > 20


def test_every_trainable_parameter_trains_and_the_vision_encoder_does_not() -> None:
    model, images = tiny_stage1(), tiny_images(8)
    before = {name: tensor.clone() for name, tensor in model.vision.state_dict().items()}
    ids_BT, mask_BT = model.tokenize(TEXTS)
    image, text = model.encode_images(model.image_tokens(images)), model.encode_texts(ids_BT, mask_BT)
    pairs = model.encode_pairs(image.tokens_BPU, ids_BT, mask_BT)
    caption = model.encode_captions(image.cache, ids_BT, mask_BT)
    cosines_BQC = image.projected_BQE @ text.projected_BE.T
    (
        (cosines_BQC / model.temperature).logsumexp(dim=2).sum()
        + pairs.logits_B2.log_softmax(dim=1)[:, 1].sum()
        + caption.logits_NW.log_softmax(dim=1).gather(1, caption.targets_N[:, None]).sum()
    ).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {f"vision.{name}" for name, _ in model.vision.named_parameters()}
    assert not model.vision.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.vision.state_dict().items())
    assert model.held_state().keys() == {name for name in model.state_dict() if not name.startswith("vision.")}


def test_vision_tokens_of_other_types_give_the_same_features(model: BLIP2) -> None:
    tokens = model.image_tokens(tiny_images(4))
    expected = model.features(tokens).image
    for dtype in (torch.float16, torch.bfloat16):
        found = model.features(tokens.to(dtype)).image
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=0.3, rtol=0)
        assert torch.equal(found, model.features(tokens.to(dtype).float()).image)


def test_wrong_arguments(model: BLIP2) -> None:
    images, qformer = tiny_images(2), tiny_qformer(vision_width=8)
    parts = {"vision": model.vision, "vision_norm": model.vision_norm}
    cases: list[tuple[str, Callable[[], object]]] = [
        ("texts has 3 entries for 2 images", lambda: model.match(images, TEXTS[:3])),
        ("texts has 8 entries for 2 images", lambda: model.features(images, TEXTS)),
        ("texts is of type str", lambda: model.features(texts="a cat")),
        ("both missing", lambda: model.features()),
        ("head is 'itg'; give 'itm' or 'itc'", lambda: model.match(images, TEXTS[:2], head="itg")),  # type: ignore[arg-type]
        ("captions without a prompt", lambda: model.generate(images, ["a", "b"])),  # type: ignore[arg-type]
        ("num_beams is 0", lambda: model.generate(images, num_beams=0)),
        ("min_new_tokens is 9, more than max_new_tokens", lambda: model.generate(images, max_new_tokens=5)),
        (r"images\[0\] is a path", lambda: model.generate(["a.png"])),  # type: ignore[list-item]
        ("one picture a sample, not 3 frames", lambda: model.match(tiny_images(2, frames=3), TEXTS[:2])),
        ("text outputs", lambda: BLIP2(**parts, qformer=qformer, tokenizer=model.tokenizer)),
        (
            r"no \[BOS\], which begins a caption",
            lambda: BLIP2(**parts, qformer=model.qformer, tokenizer=model.tokenizer, start_token="[BOS]"),
        ),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_an_image_is_read_once_for_all_its_texts(model: BLIP2) -> None:
    ids_BT, mask_BT = model.tokenize(TEXTS)
    for rows in ([0, 0, 1, 2, 2, 2, 0, 1], [0] * 8):  # in any order; and one image for all
        rows_B = torch.tensor(rows)
        tokens_NPU = model.normalised(model.image_tokens(tiny_images(max(rows) + 1)))
        work, outputs = {}, {}
        for name, asked in (
            ("copied", (tokens_NPU[rows_B], ids_BT, mask_BT)),
            ("once", (tokens_NPU, ids_BT, mask_BT, rows_B)),
        ):
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                outputs[name] = model.encode_pairs(*asked)
            work[name] = counter.get_total_flops()
        for found, expected in zip(outputs["once"], outputs["copied"], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        readers = [layer.cross_attention for layer in model.qformer.layers if layer.cross_attention is not None]
        image = sum(2 * 2 * tokens_NPU[0].numel() * reader.key.out_features for reader in readers)  # keys and values
        assert work["copied"] - work["once"] == (len(rows) - len(tokens_NPU)) * image > 0


def test_rows_of_images_are_as_many_as_texts(model: BLIP2) -> None:
    ids_BT, mask_BT = model.tokenize(TEXTS)
    tokens_NPU = model.normalised(model.image_tokens(tiny_images(2)))
    for images, rows in ((tokens_NPU, [0, 1]), (None, [0] * 8)):
        with pytest.raises(ValueError, match="are as many as the texts"):
            model.qformer(images, ids_BT, mask_BT, text_states=True, image_rows_B=torch.tensor(rows))
