"""Generation: logits that are not finite are refused, and what changes the lengths of beams leaves no trace."""

from collections.abc import Callable

import pytest
import torch

from instructblip.errors import UserError
from instructblip.models.generation import beam_lengths
from instructblip.models.llm import LLM
from tests.kit.tiny import tiny_encoder_decoder_llm, tiny_images, tiny_llm, tiny_model


@pytest.mark.parametrize("make", [tiny_llm, tiny_encoder_decoder_llm])
def test_weights_that_are_nan_do_not_write(make: Callable[[], LLM]) -> None:
    model = tiny_model(llm=make())
    images = tiny_images(2)
    assert len(model.generate(images, ["a?", "b?"], max_new_tokens=3)) == 2
    with torch.no_grad():
        model.projection.weight[0, 0] = float("nan")
    for beams in (1, 3):
        with pytest.raises(UserError, match="the language model's logits are not finite"):
            model.generate(images, ["a?", "b?"], max_new_tokens=3, num_beams=beams)
    assert not model.llm.model._forward_hooks


def test_the_model_is_as_before_when_beams_were_counted_otherwise() -> None:
    model = tiny_model().llm.model
    before = dict(vars(model))
    with beam_lengths(model, "transformers_4_33"):
        assert vars(model).keys() - before.keys() == {"_update_finished_beams", "_check_early_stop_heuristic"}
    assert vars(model).keys() == before.keys()
    with (
        pytest.raises(ValueError, match="beam_lengths is new_tokens or transformers_4_33, not 'x'"),
        beam_lengths(model, "x"),
    ):
        pass
