"""Frozen vision encoders: tokens of ViTs and CNNs, what frozen means, channel statistics, fingerprints."""

import copy

import pytest
import torch
import torch.nn.functional as F

from instructblip.models.fingerprint import fingerprint, fingerprint_tensors
from instructblip.models.vision import ChannelNorm, VisionEncoder
from tests.kit.tiny import tiny_images, tiny_model, tiny_vision


@pytest.fixture(scope="module")
def vit() -> VisionEncoder:
    return tiny_vision("test_vit", layers=(), grid=None, image_size=160)


def pictures(count: int = 2) -> torch.Tensor:
    return tiny_images(count).flatten(0, 1)


def test_tokens_of_a_vit_are_its_final_features(vit: VisionEncoder) -> None:
    assert (vit.tokens, vit.width) == (101, 64)  # 10 x 10 patches and CLS
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    tokens = vit(images)
    assert tokens.shape == (2, 101, 64)
    expected = vit.backbone.forward_features((images.float() - 127) / 128)
    assert torch.equal(tokens, expected)


def test_tokens_of_a_cnn_without_layers_are_its_last_map() -> None:
    encoder = tiny_vision(layers=(), grid=None, image_size=64)
    last = encoder.backbone.forward_features(torch.zeros(1, 3, 64, 64))
    assert (encoder.tokens, encoder.width) == (4, last.shape[1])
    tokens = encoder(torch.full((1, 3, 64, 64), 127, dtype=torch.uint8))
    assert torch.equal(tokens[0, 1], last[0, :, 0, 1])  # row by row


def test_layers_are_pooled_or_interpolated_to_one_grid() -> None:
    encoder = tiny_vision(layers=("bn1", "blocks.2"), grid=8)
    tokens = encoder(pictures())
    plain = tiny_vision(layers=(), grid=None).backbone
    plain.load_state_dict(encoder.backbone.state_dict())
    with torch.no_grad():
        fine = plain.bn1(plain.conv_stem((pictures().float() - 127) / 128))
        coarse = plain.blocks[:3](fine)
    assert (fine.shape[-1], coarse.shape[-1]) == (16, 4)
    assert tokens.shape == (2, 64, fine.shape[1] + coarse.shape[1])
    pooled = fine.unflatten(2, (8, 2)).unflatten(4, (8, 2)).mean(dim=(3, 5))
    torch.testing.assert_close(tokens[..., : fine.shape[1]], pooled.flatten(2).transpose(1, 2))
    stretched = F.interpolate(coarse, size=(8, 8), mode="bilinear")
    torch.testing.assert_close(tokens[..., fine.shape[1] :], stretched.flatten(2).transpose(1, 2))


def test_an_interrupted_pass_leaves_nothing_behind() -> None:
    encoder = tiny_vision()
    expected = encoder(pictures())
    stop = encoder.backbone.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder(pictures())
    stop.remove()
    assert torch.equal(encoder(pictures()), expected)


def test_a_batch_is_encoded_as_its_images_alone() -> None:
    encoder = tiny_vision()
    alone = torch.cat([encoder(image[None]) for image in pictures(3)])
    torch.testing.assert_close(encoder(pictures(3)), alone, atol=1e-5, rtol=1e-5)


def test_frozen_it_stays_in_evaluation_mode_and_gives_no_gradient() -> None:
    model = tiny_model()
    encoder = model.vision
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    before, buffers = encoder(pictures()), copy.deepcopy(dict(encoder.named_buffers()))
    model.train()
    assert not any(module.training for module in encoder.modules())
    after = encoder(pictures())
    assert torch.equal(before, after)
    assert not after.requires_grad
    # Batch-norm statistics would drift in training mode.
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in encoder.named_buffers())


def test_trained_it_gives_a_gradient_and_keeps_its_batch_statistics() -> None:
    model = tiny_model().choose_trained(("vision", "qformer")).train()
    encoder = model.vision
    buffers = copy.deepcopy(dict(encoder.named_buffers()))
    encoder(pictures()).sum().backward()
    assert encoder.training
    assert any(parameter.grad is not None for parameter in encoder.parameters())  # none past the last wanted layer
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in encoder.named_buffers())


def test_building_leaves_batch_norm_statistics_alone() -> None:
    norm = tiny_vision().backbone.get_submodule("bn1")
    assert int(norm.num_batches_tracked) == 0
    assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))


def test_the_gradient_stops_at_the_encoder(vit: VisionEncoder) -> None:
    tokens = vit.requires_grad_(False)(torch.zeros(1, 3, 160, 160, dtype=torch.uint8))
    assert tokens.grad_fn is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "test_efficientnett"}, "knows no backbone 'test_efficientnett'; near: test_"),
        ({"backbone": "qqq_1"}, "knows no backbone 'qqq_1'$"),
        ({"layers": ("bn1", "blocks.9")}, "test_efficientnet has no layer blocks.9"),
        ({"grid": None}, "need a common grid"),
        ({"options": {"depht": 3}}, "timm cannot build test_efficientnet for images of 32 pixels with .*depht"),
        (
            {"backbone": "test_vit", "layers": (), "image_size": 170},
            "no whole number of test_vit's patches of 16; set .* 176",
        ),
        ({"final_norm": False}, "test_efficientnet has no final norm to leave out"),
        ({"backbone": "test_vit", "layers": ("blocks.1",), "image_size": 160}, "must give feature maps"),
        ({"layers": ("bn1", "global_pool")}, "of the vision layers bn1, global_pool only 1 come into use"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_vision(**options)


def test_channel_norm_standardises_what_it_was_calibrated_on() -> None:
    norm = ChannelNorm(3)
    tokens = torch.randn(8, 5, 3) * torch.tensor([1.0, 100.0, 0.0]) + torch.tensor([0.0, 7.0, 2.0])
    assert torch.equal(norm(tokens), tokens)  # before calibration
    norm.calibrate(tokens)
    out = norm(tokens).flatten(0, 1)
    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-4, rtol=0)  # a dead channel stays 0
    assert list(norm.parameters()) == []
    assert set(norm.state_dict()) == {"mean", "std"}  # kept in the checkpoint


def test_fingerprint_changes_with_one_weight_and_with_nothing_else() -> None:
    encoder = tiny_vision()
    before = fingerprint(encoder)
    encoder(pictures())
    assert fingerprint(copy.deepcopy(encoder)) == before
    with torch.no_grad():
        weight = next(encoder.parameters()).view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
    assert fingerprint(encoder) != before


def test_fingerprint_sees_names_types_and_shapes() -> None:
    zeros = torch.zeros(2, 2)
    prints = {
        fingerprint_tensors(tensors)
        for tensors in (
            {"a": zeros},
            {"b": zeros},
            {"a": zeros.view(4)},
            {"a": zeros.to(torch.int32)},
            {"a": zeros, "b": zeros},
        )
    }
    assert len(prints) == 5
    both = {"a": zeros, "b": torch.ones(1, dtype=torch.bfloat16)}
    assert fingerprint_tensors(both) == fingerprint_tensors(dict(reversed(both.items())))
