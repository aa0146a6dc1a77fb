"""Float8 layers: their products are those of dequantised weights, on the CPU and as `torch._scaled_mm` has them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from instructblip.errors import UserError
from instructblip.models import fp8
from instructblip.models.fp8 import FP8, check_device, scaled_product, to_fp8
from instructblip.models.quantized import QuantizedLinear, quantize_linears
from instructblip.training.plan.memory import _QUANTIZED
from instructblip.weights.parts import load_llm
from tests.kit.families import llm_config, write_llm
from tests.kit.losses import term_of
from tests.kit.tiny import tiny_images, tiny_model

EPS = torch.finfo(FP8).eps  # 1/8: a value of three bits behind the point


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*shape, generator=generator)
    return rows * torch.logspace(-3, 3, shape[0])[:, None]


def layer_of(outputs: int = 48, inputs: int = 32, *, bias: bool = False) -> tuple[nn.Linear, QuantizedLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    return linear, QuantizedLinear(linear, "fp8")


def test_each_row_is_scaled_to_the_largest_value_that_float8_has() -> None:
    rounded, scale = to_fp8(drawn(7, 64))
    assert rounded.float().abs().amax(dim=1).tolist() == [448.0] * 7
    torch.testing.assert_close(scale[:, 0] * 448, drawn(7, 64).abs().amax(dim=1))
    assert ((rounded.float() * scale - drawn(7, 64)).abs() <= drawn(7, 64).abs() * EPS / 2 + scale / 2**9).all()
    assert to_fp8(torch.zeros(2, 16))[0].float().tolist() == [[0.0] * 16] * 2
    assert not (to_fp8(torch.tensor([[torch.inf] + [1.0] * 15]))[0].float() == 0).all()  # what overflows is not hidden
    assert to_fp8(torch.tensor([[torch.nan] + [1.0] * 15]))[0].float().isnan().all()


def test_the_product_is_that_of_torchs_kernel() -> None:
    """Its layouts too: rows of the right operand lie as columns, scales as a column and a row."""
    left, right = to_fp8(drawn(5, 32)), to_fp8(drawn(48, 32, seed=1))
    found = scaled_product(*left, *right, fast=True)
    kernel = torch._scaled_mm(
        left[0], right[0].t(), scale_a=left[1], scale_b=right[1].t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )
    torch.testing.assert_close(kernel.float(), found, rtol=2**-8, atol=1e-6)
    dequantised = (left[0].float() * left[1]) @ (right[0].float() * right[1]).T
    torch.testing.assert_close(found, dequantised, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_multiplies_with_its_dequantised_weight_both_ways(bias: bool) -> None:
    """A plain layer that holds the rounded weight gives the same within the rounding of one row of inputs, or gradients."""
    linear, layer = layer_of(bias=bias)
    linear.weight.copy_(layer.expanded(torch.bfloat16))
    assert (layer.expanded(torch.float32) - linear.weight.float()).abs().max() <= 2**-8 * linear.weight.abs().max()
    inputs = drawn(6, 32).view(2, 3, 32).to(torch.bfloat16)
    gradient = drawn(6, 48, seed=2).view(2, 3, 48).to(torch.bfloat16)
    found, expected = [], []
    for module, results in ((layer, found), (linear, expected)):
        own = inputs.clone().requires_grad_()
        outputs = module(own)
        outputs.backward(gradient)
        results += [outputs.detach().float(), own.grad.float()]
    for mine, plain in zip(found, expected, strict=True):
        off = (mine - plain).norm(dim=-1) / plain.norm(dim=-1)
        assert 0 < off.max() < 0.05  # each value is off by up to 1/16, at random
    assert found[0].shape == (2, 3, 48) and found[1].shape == inputs.shape


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    _, layer = layer_of()
    rows = drawn(6, 32).to(torch.bfloat16)
    together = layer(rows)
    assert all(torch.equal(together[row], layer(rows[row : row + 1])[0]) for row in range(6))


def test_both_orders_of_a_weight_lie_as_tensor_cores_read_them() -> None:
    _, layer = layer_of()
    assert (layer.weight.dtype, layer.weight.is_contiguous()) == (torch.int8, True)
    assert layer.transposed.is_contiguous() and torch.equal(layer.transposed, layer.weight.t())
    held = sum(buffer.numel() * buffer.element_size() for buffer in (layer.weight, layer.transposed))
    assert held == _QUANTIZED["fp8"] * layer.in_features * layer.out_features
    assert set(layer.state_dict()) == {"weight", "scale"}  # its fingerprint reads a weight once


def test_weights_that_do_not_fit_tensor_cores_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(48, 24\) has sides that are no multiples of 16; use int8"):
        quantize_linears(nn.Sequential(nn.Linear(24, 48)), "fp8")


class TestLanguageModel:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["vicuna_7b", "flan_t5_xl"])
    def test_is_trained_through_within_the_rounding_of_float8(self, name: str, tmp_path: Path) -> None:
        write_llm(name, tmp_path)
        exact, rounded = (
            load_llm(llm_config(name, tmp_path, dtype="bfloat16", quantization=kind)) for kind in (None, "fp8")
        )
        layers = {part: module for part, module in rounded.named_modules() if isinstance(module, QuantizedLinear)}
        for part, layer in layers.items():
            exact.model.get_submodule(part.removeprefix("model.")).weight.data = layer.expanded(torch.bfloat16)
        found, expected = (self.gradients(tiny_model(llm=llm)) for llm in (rounded, exact))
        assert found[0] == pytest.approx(expected[0], rel=0.02)
        assert found[1] @ expected[1] / found[1].norm() / expected[1].norm() > 0.98
        assert not torch.equal(found[1], expected[1])
        before = {part: layer.expanded(torch.float32) for part, layer in layers.items()}
        rounded.half()  # a cast is no second rounding
        assert all(torch.equal(layer.expanded(torch.float32), before[part]) for part, layer in layers.items())

    def gradients(self, model: nn.Module) -> tuple[float, Tensor]:
        loss = term_of(model, tiny_images(2), ["what color?", "is there a circle?"], ["red", "no blue"]).total
        loss.backward()
        found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        return loss.item(), torch.cat(found)

    def test_in_float32_is_refused(self, tmp_path: Path) -> None:
        write_llm("vicuna_7b", tmp_path)
        with pytest.raises(UserError, match=r"^llm\.quantization=fp8 .* set llm\.dtype=bfloat16$"):
            load_llm(llm_config("vicuna_7b", tmp_path, dtype="float32", quantization="fp8"))


def test_an_older_gpu_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(layer_of()[1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, refused in (((8, 0), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if refused:
            with pytest.raises(UserError, match=r"capability 8\.9 .* NVIDIA A100 has 8\.0; use int8, or leave it out"):
                check_device(model, torch.device("cuda"))
        else:
            check_device(model, torch.device("cuda"))
        check_device(model, torch.device("cpu"))
        check_device(nn.Sequential(nn.Linear(16, 16)), torch.device("cuda"))
    assert fp8.CAPABILITY == (8, 9)
