"""`generate`, `rank` and `forward` refuse wrong arguments by their names, before anything is computed."""

import inspect
import pydoc
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, nn

from instructblip.models.arguments import Decoding, DecodingOptions
from instructblip.models.base import Inputs, Model
from instructblip.models.blip import BLIPVQA, BLIPCaption, BLIPPretrain
from instructblip.models.blip2 import BLIP2
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llava import LLaVA
from tests.kit.blip import tiny_caption, tiny_pretrain, tiny_vqa
from tests.kit.blip2 import tiny_stage1
from tests.kit.losses import Samples
from tests.kit.tiny import IMAGE_SIZE, tiny_encoder_decoder_llm, tiny_images, tiny_llm, tiny_model

PROMPTS = ["what color is it?", "shape"]
CANDIDATES = [["red", "blue"], ["circle"]]


@pytest.fixture(scope="module", params=["decoder", "encoder_decoder"])
def model(request: pytest.FixtureRequest) -> InstructBLIP:
    """A model that must not be run: its parts may be asked for widths and tokens only."""
    made = tiny_model(llm=tiny_llm() if request.param == "decoder" else tiny_encoder_decoder_llm())

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("something was computed before the arguments were checked")

    for part in (made.vision, made.qformer, made.projection, made.llm.model, made.llm.embeddings):
        part.register_forward_pre_hook(run)
    return made


def pictures(count: int, size: tuple[int, int] = (40, 30)) -> list[Image.Image]:
    return [Image.new("RGB", size, "teal") for _ in range(count)]


def refused(call: Callable[[], Any], name: str, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    said = str(error.value)
    assert said.startswith(name) and "\n" not in said, said
    assert [word for word in words if word not in said] == [], said


IMAGES: dict[str, tuple[Any, str, str]] = {
    "a picture": (pictures(1)[0], "images", "give a list of PIL images"),
    "a path": ("two.png", "images", "give a list"),
    "paths": (["a.png", "b.png"], "images[0]", "is a path; give the picture itself, PIL.Image.open('a.png')"),
    "paths of pathlib": ([Path("a.png"), Path("b.png")], "images[0]", "is a path"),
    "arrays": ([np.zeros((4, 4, 3))] * 2, "images[0]", "ndarray; give a PIL image"),
    "bytes": ([b"x", b"y"], "images[0]", "of type bytes"),
    "a path in a clip": ([pictures(2), [*pictures(1), "b.png"]], "images[1][1]", "is a path"),
    "a clip without frames": ([pictures(1), []], "images[1]", "without frames"),
    "clips of unequal length": ([pictures(1), pictures(2)], "images", "clips of 1 and of 2 frames"),
    "a picture without pixels": ([*pictures(1), *pictures(1, (0, 5))], "images[1]", "no pixels"),
    "nothing": (None, "images", "NoneType"),
    "an empty list": ([], "images", "is empty"),
    "one frame too little": (tiny_images(2)[:, 0], "images", "uint8 frames (B, F, 3, H, W)"),
    "frames of floats": (tiny_images(2).float(), "images", "uint8 frames"),
    "channels last": (tiny_images(2).movedim(2, -1), "images", "uint8 frames"),
    "no frames": (tiny_images(2)[:, :0], "images", "(2, 0, 3"),
    "no samples": (tiny_images(2)[:0], "images", "(0, 1, 3"),
}
TEXTS: dict[str, tuple[Any, str, str]] = {
    "a string": ("ab", "{}", "of type str; give a list of strings"),
    "bytes": ([b"a", b"b"], "{}[0]", "of type bytes; give strings"),
    "lists": ([["a"], ["b"]], "{}[0]", "of type list"),
    "nothing": (None, "{}", "NoneType"),
    "one nothing": (["a", None], "{}[1]", "NoneType"),
    "an iterator": (iter(["a", "b"]), "{}", "give a list"),
    "a set": ({"a", "b"}, "{}", "give a list"),
    "an empty list": ([], "{}", "is empty"),
    "too few": (["a"], "{}", "has 1 entries for 2 images"),
    "too many": (["a", "b", "c"], "{}", "has 3 entries for 2 images"),
    "half a character": (["a", "\ud83d"], "{}[1]", "no text"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images(case: str, model: InstructBLIP) -> None:
    images, name, words = IMAGES[case]
    refused(lambda: model.generate(images, PROMPTS), name, words)
    refused(lambda: model.rank(images, PROMPTS, CANDIDATES), name, words)
    refused(lambda: model(Inputs(images, PROMPTS, [[1], [2]]), ["answer_logits"]), name, words)
    refused(lambda: model.prepare(Samples(images, PROMPTS, ["a", "b"])), name, words)


@pytest.mark.parametrize(
    "images",
    [tiny_images(2)[..., :-2, :-2], tiny_images(2)[:, 0].float()],
    ids=["frames of another size", "float pixels, which have the form of image tokens"],
)
def test_a_tensor_that_the_vision_encoder_does_not_fit(images: Tensor, model: InstructBLIP) -> None:
    for call in (
        lambda: model.generate(images, PROMPTS),
        lambda: model.rank(images, PROMPTS, CANDIDATES),
        lambda: model.attention(images, PROMPTS),
        lambda: model(Inputs(images, PROMPTS, [[1], [2]]), ["answer_logits"]),
    ):
        refused(
            call, "images is a tensor of (2, ", f"this model takes uint8 frames (B, F, 3, {IMAGE_SIZE}, {IMAGE_SIZE})"
        )


@pytest.mark.parametrize("case", TEXTS)
def test_texts(case: str, model: InstructBLIP) -> None:
    texts, name, words = TEXTS[case]
    for images in (pictures(2), tiny_images(2)):
        refused(lambda images=images: model.generate(images, texts), name.format("prompts"), words)  # type: ignore[misc]
    refused(lambda: model.rank(pictures(2), texts, CANDIDATES), name.format("prompts"), words)
    refused(lambda: model(Inputs(tiny_images(2), texts, [[1], [2]]), ["answer_logits"]), name.format("prompts"), words)
    refused(lambda: model.prepare(Samples(tiny_images(2), texts, ["a", "b"])), name.format("instructions"), words)
    refused(lambda: model.prepare(Samples(tiny_images(2), PROMPTS, texts)), name.format("targets"), words)


@pytest.mark.parametrize(
    ("candidates", "name", "words"),
    [
        ("ab", "candidates", "give a list of lists of strings"),
        (["yes", "no"], "candidates[0]", "of type str; give a list of strings"),
        ([["yes"], "no"], "candidates[1]", "of type str"),
        ([["yes"], [1]], "candidates[1][0]", "of type int"),
        ([["yes"], []], "candidates[1]", "is empty"),
        ([], "candidates", "is empty"),
        ([["yes"]], "candidates", "has 1 lists for 2 prompts"),
        ([["yes"]] * 3, "candidates", "has 3 lists for 2 prompts"),
        ([["yes"], ["\udc00"]], "candidates[1][0]", "no text"),
    ],
)
def test_candidates(candidates: Any, name: str, words: str, model: InstructBLIP) -> None:
    refused(lambda: model.rank(pictures(2), PROMPTS, candidates), name, words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalize": "max"}, "give 'sum' or 'mean'"),
        ({"token_budget": 0}, "at least 1"),
        ({"token_budget": 2.5}, "whole number"),
    ],
)
def test_options_of_ranking(options: dict[str, Any], words: str, model: InstructBLIP) -> None:
    refused(lambda: model.rank(pictures(2), PROMPTS, CANDIDATES, **options), next(iter(options)), words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 0}, "give a whole number of at least 1"),
        ({"num_beams": -3}, "at least 1"),
        ({"num_beams": 2.0}, "whole number"),
        ({"num_beams": True}, "whole number"),
        ({"num_beams": "5"}, "whole number"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"min_new_tokens": -1}, "at least 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "more than max_new_tokens (8)"),
        ({"length_penalty": float("nan")}, "give a number"),
        ({"length_penalty": "1"}, "give a number"),
        ({"repetition_penalty": 0}, "above 0"),
        ({"repetition_penalty": float("inf")}, "above 0"),
        ({"temperature": 0}, "above 0"),
        ({"temperature": -1.0}, "above 0"),
        ({"top_p": 0.0}, "probability above 0"),
        ({"top_p": 1.5}, "probability above 0"),
        ({"do_sample": "false"}, "give True or False"),
        ({"do_sample": None}, "give True or False"),
        ({"on_text": "print"}, "of type str; give a function of the text so far"),
        ({"beam_lengths": "old"}, "'new_tokens' or 'transformers_4_33'"),
    ],
)
def test_options_of_decoding(options: dict[str, Any], words: str, model: InstructBLIP) -> None:
    refused(lambda: model.generate(pictures(2), PROMPTS, **options), next(iter(options)), words)


def test_sampling_with_beams_is_refused(model: InstructBLIP) -> None:
    refused(
        lambda: model.generate(pictures(2), PROMPTS, do_sample=True, num_beams=2),
        "sampling draws one text: num_beams=1",
    )


# What `generate` takes beside pictures and prompts, and where a class begins: num_beams, max_new_tokens, min_new_tokens,
# repetition_penalty, top_p.
GENERATE: dict[type[Model], tuple[set[str], tuple[Any, ...]]] = {
    InstructBLIP: ({"beam_lengths", "at_once"}, (1, 10, 1, 1.0, 1.0)),
    LLaVA: ({"beam_lengths", "at_once"}, (1, 10, 1, 1.0, 1.0)),
    BLIP2: (set(), (3, 29, 9, 1.0, 0.9)),
    BLIPCaption: (set(), (3, 16, 1, None, 0.9)),
    BLIPPretrain: (set(), (3, 16, 1, None, 0.9)),
    BLIPVQA: ({"attend_padding"}, (3, 9, 0, 1.0, 0.9)),
}


@pytest.mark.parametrize("kind", GENERATE)
def test_notebooks_and_help_show_what_each_class_takes(kind: type[Model]) -> None:
    own, defaults = GENERATE[kind]
    taken = inspect.signature(kind.generate).parameters
    shared = set(DecodingOptions.__annotations__)
    assert shared == {field.name for field in fields(Decoding)} and len(shared) == 10
    assert set(taken) == {"self", "images", "prompts"} | own | shared
    names = ("num_beams", "max_new_tokens", "min_new_tokens", "repetition_penalty", "top_p")
    assert tuple(taken[name].default for name in names) == defaults
    assert f"num_beams: int = {defaults[0]}" in pydoc.render_doc(kind.generate)


@pytest.mark.parametrize(
    ("make", "prompted"),
    [(tiny_model, True), (tiny_vqa, True), (tiny_caption, False), (tiny_pretrain, False), (tiny_stage1, False)],
)
def test_an_unknown_option_is_named(make: Callable[[], Model], prompted: bool) -> None:
    model, prompts = make(), [PROMPTS] if prompted else []
    theirs = {"beam_lengths": "new_tokens", "at_once": 2, "attend_padding": True}
    for name, value in ({"temprature": 0.5} | theirs).items():
        if name not in GENERATE[type(model)][0]:
            with pytest.raises(TypeError, match=rf"generate\(\) got an unexpected keyword argument '{name}'"):
                model.generate(pictures(2), *prompts, **{name: value})


def test_numbers_of_numpy_are_numbers() -> None:
    model = tiny_model()
    options: dict[str, Any] = {
        "num_beams": np.int64(2),
        "max_new_tokens": np.int32(3),
        "min_new_tokens": np.int64(2),
        "length_penalty": np.float32(0.5),
        "do_sample": np.bool_(False),
    }
    found = model.generate(pictures(2), PROMPTS, **options)
    plain: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 3, "min_new_tokens": 2, "length_penalty": 0.5}
    assert found == model.generate(pictures(2), PROMPTS, **plain)


@pytest.mark.parametrize(
    ("answers", "name", "words"),
    [
        ([[1]], "answers", "has 1 entries for 2 images"),
        ([[1], []], "answers[1]", "is empty"),
        (["a", "b"], "answers[0]", "of type str; give a list of token ids"),
        ([[1], ["b"]], "answers[1]", "token ids; give whole numbers"),
        ("ab", "answers", "give a list of lists of token ids"),
    ],
)
def test_answers_of_a_forward_pass(answers: Any, name: str, words: str, model: InstructBLIP) -> None:
    refused(lambda: model(Inputs(tiny_images(2), PROMPTS, answers), ["answer_logits"]), name, words)


@pytest.mark.parametrize("wanted", [["logits"], "answer_logits", None])
def test_outputs_of_a_forward_pass(wanted: Any, model: InstructBLIP) -> None:
    refused(lambda: model(Inputs(tiny_images(2), PROMPTS, [[1], [2]]), wanted), "wanted")


# --- positions -------------------------------------------------------------------------------------------------------


LIMIT, QUERIES = 40, 4


@pytest.fixture
def short() -> InstructBLIP:
    """A model of few positions."""
    model = tiny_model()
    model.llm.model.config.max_position_embeddings = LIMIT
    return model


def prompt_of(model: InstructBLIP, tokens: int) -> str:
    text = "x" * tokens
    assert len(model.llm.prompt_format.prompt_ids(text)) == tokens
    return text


def test_a_prompt_beyond_the_positions_is_named_and_one_that_just_fits_is_taken(short: InstructBLIP) -> None:
    fits, longer = prompt_of(short, LIMIT - QUERIES - 2), prompt_of(short, LIMIT - QUERIES - 1)
    images = tiny_images(2)
    assert len(short.generate(images, ["a", fits], max_new_tokens=3)) == 2
    refused(
        lambda: short.generate(images, ["a", longer], max_new_tokens=3),
        f"prompts[1] needs {LIMIT + 1} positions with its visual tokens and its answer",
        f"the language model has {LIMIT}",
    )
    words = [["red"], ["xyz"]]  # two and three tokens with their end
    tokens = [len(short.llm.prompt_format.target_ids(text)) for (text,) in words]
    room = LIMIT - QUERIES - max(tokens) + 1
    assert len(short.rank(images, [prompt_of(short, room)] * 2, words)) == 2
    refused(
        lambda: short.rank(images, ["a", prompt_of(short, room + 1)], words), f"prompts[1] needs {LIMIT + 1} positions"
    )
    frames = tiny_images(1, frames=LIMIT // QUERIES)
    refused(lambda: short.generate(frames, ["a"], max_new_tokens=1), "prompts[0] needs", "fewer frames")


def test_rows_of_a_table_end_where_rotary_positions_go_on(short: InstructBLIP) -> None:
    frames = tiny_images(2, frames=LIMIT // QUERIES)
    inputs = short.prepare(Samples(frames, ["a", "b"], ["c", "d"]))
    assert len(short(inputs, ["answer_logits"]).tensors["answer_logits"]) == sum(map(len, inputs.answers))
    short.llm.model.positions = nn.Embedding(LIMIT + 2, 4)  # as OPT's
    refused(
        lambda: short.prepare(Samples(frames, ["a", "b"], ["c", "d"])),
        "prompts[0] needs",
        f"the language model has {LIMIT}",
    )
    fits, longer = prompt_of(short, LIMIT - QUERIES - 4), prompt_of(short, LIMIT)
    images = tiny_images(2)
    assert len(short.prepare(Samples(images, ["a", fits], ["c", "d"])).prompts) == 2
    refused(lambda: short.prepare(Samples(images, [fits, longer], ["c", "d"])), "prompts[1] needs")


def test_an_encoder_and_a_decoder_have_positions_each() -> None:
    model = tiny_model(llm=tiny_encoder_decoder_llm())
    model.llm.model.config.max_position_embeddings = LIMIT
    fits = "x" * (LIMIT - QUERIES - 1)  # an end follows
    assert len(model.generate(tiny_images(1), [fits], max_new_tokens=LIMIT)) == 1
    refused(lambda: model.generate(tiny_images(1), [fits + "x"], max_new_tokens=2), f"prompts[0] needs {LIMIT + 1}")
    refused(lambda: model.generate(tiny_images(1), ["x"], max_new_tokens=LIMIT + 1), f"prompts[0] needs {LIMIT + 1}")


def test_a_model_without_a_limit_takes_any_prompt(short: InstructBLIP) -> None:
    short.llm.model.config.max_position_embeddings = -1
    assert len(short.generate(tiny_images(1), [prompt_of(short, LIMIT)], max_new_tokens=1)) == 1
