"""What a language model allows is measured by its own class: scaled logits, trees, packed rows, beams, half precision."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from instructblip.config.entry import compose_config
from instructblip.config.schema import TrainConfig
from instructblip.errors import UserError
from instructblip.models import abilities
from instructblip.models.abilities import limits, measure
from instructblip.models.arguments import Decoding
from instructblip.models.base import blocks_of
from instructblip.models.generation import check_write, write
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM, LLM_KINDS, DecoderLLM, LLMAbilities
from instructblip.models.ranking import rank_candidates
from instructblip.training.setup import make_phases
from instructblip.weights import language_model
from instructblip.weights.language_model import finished_llm
from tests.kit.tiny import EOS, PAD, tiny_images, tiny_llm_tokenizer, tiny_model

TOKENIZER = tiny_llm_tokenizer()
TOKENIZER.add_special_tokens({"pad_token": PAD})
TOKENS: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": TOKENIZER.eos_token_id,
}
SIZES: dict[str, Any] = TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE: dict[str, Any] = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
LINEAR: dict[str, Any] = WIDE | {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
RELATIVE: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
    "decoder_start_token_id": TOKENIZER.pad_token_id,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
FALCON_H1: dict[str, Any] = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "embedding_multiplier": 3.0,
    "lm_head_multiplier": 0.25,
}
LOCAL: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 6,
}

ALL = frozenset({"tree", "packed", "padded_prompts", "shared_beams", "beams", "generates"})

# Each with the savings that its class allows.
DECODERS: dict[str, tuple[Callable[[], Any], frozenset[str]]] = {
    "llama": (lambda: transformers.LlamaConfig(**WIDE), ALL),
    "granite": (lambda: transformers.GraniteConfig(**WIDE, logits_scaling=8.0, embedding_multiplier=4.0), ALL),
    "cohere": (lambda: transformers.CohereConfig(**WIDE, logit_scale=0.25), ALL),
    "gemma2": (lambda: transformers.Gemma2Config(**WIDE, head_dim=8, sliding_window=6, query_pre_attn_scalar=8), ALL),
    "falcon_h1": (
        lambda: transformers.FalconH1Config(**WIDE, **FALCON_H1),
        ALL - {"tree", "packed", "generates"},
    ),
    "mpt": (
        lambda: transformers.MptConfig(**TOKENS, d_model=32, n_heads=4, n_layers=2, max_seq_len=128),
        ALL - {"tree"},
    ),
    "bloom": (
        lambda: transformers.BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4),
        ALL - {"tree", "packed"},
    ),
    "gpt_neo": (
        lambda: transformers.GPTNeoConfig(**TOKENS, hidden_size=32, max_position_embeddings=128, **LOCAL),
        ALL - {"tree"},
    ),
    "qwen3_5": (lambda: transformers.Qwen3_5TextConfig(**LINEAR), ALL - {"tree", "packed", "shared_beams"}),
    "qwen3_next": (
        lambda: transformers.Qwen3NextConfig(**LINEAR, **EXPERTS),
        ALL - {"tree", "packed", "shared_beams"},
    ),
    "lfm2": (
        lambda: transformers.Lfm2Config(**WIDE, layer_types=["conv", "full_attention"]),
        ALL - {"tree", "packed", "shared_beams"},
    ),
    "mamba": (
        lambda: transformers.MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8),
        ALL - {"tree", "packed", "shared_beams"},
    ),
    "llama4": (
        lambda: transformers.Llama4TextConfig(
            **WIDE, head_dim=8, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=6
        ),
        ALL - {"tree", "packed"},
    ),
}
ENCODER_DECODERS: dict[str, tuple[Callable[[], Any], frozenset[str]]] = {
    "t5": (lambda: transformers.T5Config(**RELATIVE), ALL - {"packed"}),
    "umt5": (lambda: transformers.UMT5Config(**RELATIVE), ALL - {"packed", "tree"}),
    "switch": (
        lambda: transformers.SwitchTransformersConfig(**RELATIVE, num_experts=2, num_decoder_layers=2),
        ALL - {"packed"},
    ),
    "bart": (
        lambda: transformers.BartConfig(
            **TOKENS,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=128,
            decoder_start_token_id=TOKENIZER.eos_token_id,
        ),
        ALL - {"packed", "tree"},
    ),
}
FAMILIES = {**DECODERS, **ENCODER_DECODERS}
PROMPT_LENGTHS, ANSWER_LENGTHS = (15, 3, 9), (3, 1, 5)  # others than the measurement's


def draw(model: torch.nn.Module, std: float = 0.15) -> None:
    """Matrices that matter, biases of relative positions more than others."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2 if "relative_attention_bias" in name else std)


def unmeasured(name: str, dtype: torch.dtype = torch.float32) -> LLM:
    kind = "decoder" if name in DECODERS else "encoder_decoder"
    torch.manual_seed(0)
    model = LLM_KINDS[kind].auto_class.from_config(FAMILIES[name][0]()).eval()
    draw(model)
    return LLM_KINDS[kind](model.to(dtype), TOKENIZER, eos_token=EOS, pad_token=PAD)


@cache
def measured(name: str, dtype: torch.dtype = torch.float32) -> LLM:
    llm = unmeasured(name, dtype)
    llm.abilities = measure(llm)
    return llm


def allowed(llm: LLM) -> frozenset[str]:
    return frozenset(name for name in ALL if getattr(llm.abilities, name))


def samples(llm: LLM) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and an answer to each, as tokens."""
    generator = torch.Generator().manual_seed(7)

    def tokens(count: int) -> list[int]:
        return torch.randint(TOKENIZER.eos_token_id + 1, len(TOKENIZER) - 1, (count,), generator=generator).tolist()

    return [tokens(count) for count in PROMPT_LENGTHS], [tokens(count) for count in ANSWER_LENGTHS]


@torch.no_grad()
def own_logits(llm: LLM, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Logits (S, V) that predict an answer, by the class's own pass over the tokens of one sample."""
    if llm.kind == "decoder":
        return llm.model(input_ids=torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :].float()
    return llm.model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).logits[0].float()


def largest_error_of_ranks(llm: LLM) -> float:
    """In nats, over all answers to all prompts."""
    prompts, answers = samples(llm)
    answers = [*answers, [*answers[2][:2], 44, 45]]  # which begins as another and branches
    with torch.no_grad():
        found = rank_candidates(llm, llm.embed(prompts), [answers], [0] * len(prompts))
    errors = []
    for prompt, scores in zip(prompts, found, strict=True):
        for answer, score in zip(answers, scores, strict=True):
            log_probs = own_logits(llm, prompt, answer).log_softmax(-1)
            errors.append(abs(float(log_probs[range(len(answer)), answer].sum() - score)))
    return max(errors)


def largest_error_of_packed_rows(llm: LLM) -> float:
    """Of logits, all samples in one row, or in as few as its class allows."""
    assert isinstance(llm, DecoderLLM)
    prompts, answers = samples(llm)
    rows = [[0, 1, 2]] if llm.abilities.packed else [[0], [1], [2]]
    with torch.no_grad():
        embedded = llm.embed([[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)])
        states = llm.states_in_rows(embedded, rows)
        found = [llm.logits(hidden[len(prompt) - 1 :]) for prompt, hidden in zip(prompts, states, strict=True)]
    pairs = zip(prompts, answers, found, strict=True)
    return max(float((own_logits(llm, prompt, answer) - logits).abs().max()) for prompt, answer, logits in pairs)


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_allowed_what_its_class_can_do(name: str) -> None:
    assert allowed(measured(name)) == FAMILIES[name][1]


@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_are_those_of_its_own_class(name: str) -> None:
    assert largest_error_of_ranks(measured(name)) < 1e-4


@pytest.mark.parametrize("name", DECODERS)
def test_packed_rows_are_those_of_its_own_class(name: str) -> None:
    assert largest_error_of_packed_rows(measured(name)) < 1e-4


@pytest.mark.parametrize("name", ["mpt", "gpt_neo", "umt5", "bloom", "bart", "qwen3_5", "llama4"])
def test_a_tree_that_is_not_allowed_would_be_wrong(name: str) -> None:
    trusting = copy.copy(measured(name))
    trusting.abilities = replace(trusting.abilities, tree=True)
    try:
        error = largest_error_of_ranks(trusting)
    except Exception:  # which is as good a reason
        return
    assert error > 0.02


@pytest.mark.parametrize("name", ["falcon_h1", "qwen3_5", "qwen3_next", "lfm2", "mamba", "bloom", "llama4"])
def test_packing_that_is_not_allowed_would_be_wrong(name: str) -> None:
    trusting = copy.copy(measured(name))
    trusting.abilities = replace(trusting.abilities, packed=True)
    try:
        error = largest_error_of_packed_rows(trusting)
    except Exception:
        return
    assert error > 0.02


@pytest.mark.parametrize("name", [name for name in FAMILIES if "generates" in FAMILIES[name][1]])
@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_those_of_its_own_class(name: str, beams: int) -> None:
    llm, options = measured(name), {"num_beams": beams, "max_new_tokens": 5, "min_new_tokens": 1}
    prompts = llm.embed(samples(llm)[0])
    own = [llm.model.generate(inputs_embeds=prompt[None], **options) for prompt in prompts]  # type: ignore[operator]
    expected = [TOKENIZER.batch_decode(llm.new_tokens(ids), skip_special_tokens=True)[0].strip() for ids in own]
    assert write(llm, prompts, Decoding(num_beams=beams, max_new_tokens=5)) == expected


@pytest.mark.parametrize("name", ["granite", "mpt", "qwen3_5", "t5"])
def test_a_verdict_does_not_depend_on_the_random_stream(name: str) -> None:
    llm = unmeasured(name)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(measure(llm))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(seed)))
    assert found[0] == found[1] == measured(name).abilities


# --- scaled embeddings -----------------------------------------------------------------------------------------------


def test_a_factor_that_a_class_gives_to_its_own_embeddings_alone_is_found() -> None:
    llm = measured("falcon_h1")
    assert llm.abilities.embedding_factor == 3.0
    assert measured("granite").abilities.embedding_factor == 1.0  # which multiplies what it is given, too
    received: list[Tensor] = []
    handle = blocks_of(llm.model)[0].register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    ids = torch.arange(9)
    with torch.no_grad():
        llm.model(input_ids=ids[None])
    handle.remove()
    torch.testing.assert_close(llm.look_up(ids), received[0][0])
    torch.testing.assert_close(llm.embedding_norms[ids], received[0][0].norm(dim=-1))
    torch.testing.assert_close(llm.embedding_deviation()[0], 3 * llm.embeddings.weight.std())


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_is_allowed_the_same(name: str, dtype: torch.dtype) -> None:
    llm = measured(name, dtype)
    assert allowed(llm) == FAMILIES[name][1]
    assert llm.abilities.embedding_factor == measured(name).abilities.embedding_factor
    assert largest_error_of_ranks(llm) < 0.3  # some rounding; a tree that is wrong is off by up to 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_many_layers_is_no_mistake(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE | {"num_hidden_layers": 32})).eval()
    draw(model, 0.3)
    llm = DecoderLLM(model.to(dtype), TOKENIZER, eos_token=EOS, pad_token=PAD)
    assert measure(llm) == LLMAbilities()


@pytest.mark.parametrize("at_once", [10**9, 0])
@pytest.mark.parametrize("name", ["llama", "mpt", "t5", "qwen3_next"])
def test_a_model_is_bit_for_bit_as_before(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abilities, "_AT_ONCE", at_once)
    monkeypatch.setattr(abilities, "_SMALL", 500)
    llm = unmeasured(name, torch.bfloat16)
    before = {key: value.clone() for key, value in llm.state_dict().items()}
    places = {key: value.data_ptr() for key, value in llm.state_dict().items()}
    assert allowed_by(measure(llm)) == FAMILIES[name][1]
    after = llm.state_dict()
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in before)
    assert places == {key: value.data_ptr() for key, value in after.items()}  # mapped files stay mapped
    assert not [module for module in llm.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert llm.abilities == LLMAbilities()


def allowed_by(found: LLMAbilities) -> frozenset[str]:
    return frozenset(name for name in ALL if getattr(found, name))


def test_a_large_model_is_widened_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are then those of a copy in float32, and no block's matrices stay wide behind it."""
    monkeypatch.setattr(abilities, "_AT_ONCE", 0)
    monkeypatch.setattr(abilities, "_SMALL", 100)
    llm = unmeasured("llama", torch.bfloat16)
    wide = copy.deepcopy(llm.model).float()
    blocks = blocks_of(llm.model)
    seen: list[list[torch.dtype]] = []
    with abilities._in_float32(llm.model), torch.inference_mode():
        for block in blocks:
            block.mlp.register_forward_hook(lambda *_: seen.append([b.mlp.up_proj.weight.dtype for b in blocks]))
        found = llm.model(input_ids=torch.arange(9)[None]).logits
    torch.testing.assert_close(found, wide(input_ids=torch.arange(9)[None]).logits)
    assert seen == [[torch.float32, torch.bfloat16], [torch.bfloat16, torch.float32]]
    assert llm.embeddings.weight.dtype == torch.bfloat16


def test_half_precision_counts_where_it_breaks_a_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class whose packed rows are right in float32 alone, as one with a kernel of its own for half precision."""
    llm = unmeasured("llama", torch.bfloat16)
    whole = DecoderLLM.states_in_rows

    def leaking(self: DecoderLLM, rows_of: Sequence[Tensor], rows: Any) -> list[Tensor]:
        states = whole(self, rows_of, rows)
        together = len(rows) < len(rows_of) and states[0].dtype == torch.bfloat16
        return [states[0], *(state + states[0][-1] for state in states[1:])] if together else states

    monkeypatch.setattr(DecoderLLM, "states_in_rows", leaking)
    assert allowed_by(measure(llm)) == ALL - {"packed"}


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(llm: LLM) -> str:
    with pytest.raises(UserError) as error:
        measure(llm)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_weights_that_are_nan_are_named_as_such(name: str) -> None:
    llm = unmeasured(name)
    with torch.no_grad():
        llm.model.get_output_embeddings().weight[3] = torch.nan
    assert "logits are not finite numbers in float32; its weights are damaged" in refusal(llm)


def test_weights_that_overflow_in_half_precision_are_named_as_such() -> None:
    llm = unmeasured("llama", torch.float16)
    with torch.no_grad():
        llm.model.get_output_embeddings().weight.fill_(6e4)
    assert "not finite numbers in float16" in refusal(llm)


def test_padding_that_overflows_in_half_precision_is_named_as_such() -> None:
    """In float32 all is well, and so is each row alone: what is wrong is no weight and no class."""
    llm = unmeasured("llama", torch.float16)

    def overflow(_module: Any, _inputs: Any, named: dict[str, Any]) -> None:
        rows = named.get("inputs_embeds")
        if rows is not None and rows.dtype == torch.float16:
            rows[(rows == 0).all(dim=-1)] = torch.inf

    llm.body.register_forward_pre_hook(overflow, with_kwargs=True)
    assert refusal(llm).endswith(
        "logits of padded rows are not finite numbers in float16; the padding overflows there: take bfloat16 or float32"
    )


def test_a_model_that_sees_what_follows_is_refused() -> None:
    torch.manual_seed(0)
    settings = transformers.BertConfig(**SIZES, intermediate_size=64, is_decoder=False)
    model = transformers.BertLMHeadModel(settings).eval()
    draw(model)
    llm = DecoderLLM(model, TOKENIZER, eos_token=EOS, pad_token=PAD)
    assert "BertLMHeadModel gives other logits for padded rows of embeddings" in refusal(llm)


def test_a_class_that_fails_on_embeddings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = unmeasured("llama")

    def failing(*_: Any, **named: Any) -> Any:
        raise RuntimeError("pixel_values\nare needed")

    monkeypatch.setattr(llm.model, "forward", failing)
    assert "LlamaForCausalLM cannot be run on embeddings (RuntimeError: pixel_values are needed)" in refusal(llm)


def test_an_encoder_decoder_without_a_first_token_is_refused() -> None:
    settings = transformers.T5Config(**{k: v for k, v in RELATIVE.items() if k != "decoder_start_token_id"})
    with pytest.raises(UserError, match=r"^llm=x: .*no decoder_start_token_id"):
        finished_llm(
            "encoder_decoder",
            transformers.T5ForConditionalGeneration(settings),
            TOKENIZER,
            {"eos_token": EOS, "pad_token": PAD},
            "llm=x: ",
        )


def test_what_does_not_write_says_so() -> None:
    llm = measured("falcon_h1")
    with pytest.raises(UserError, match="FalconH1ForCausalLM does not generate from embeddings"):
        check_write(llm, Decoding(), "new_tokens")
    torch.manual_seed(0)
    settings = transformers.RwkvConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, context_length=64)
    recurrent = DecoderLLM(transformers.RwkvForCausalLM(settings).eval(), TOKENIZER, eos_token=EOS, pad_token=PAD)
    recurrent.abilities = measure(recurrent)
    prompts = recurrent.embed([[1, 2, 3], [4, 5]])
    assert len(write(recurrent, prompts, Decoding(max_new_tokens=2))) == 2
    with pytest.raises(UserError, match="RwkvForCausalLM does not search with several beams; set num_beams=1"):
        check_write(recurrent, Decoding(num_beams=2), "new_tokens")


# --- said once, measured once ----------------------------------------------------------------------------------------


CONVENTIONS = {"eos_token": EOS, "pad_token": PAD}


def finished(name: str, seed: int = 0) -> LLM:
    torch.manual_seed(seed)
    model = LLM_KINDS["decoder"].auto_class.from_config(FAMILIES[name][0]()).eval()
    draw(model)
    return finished_llm("decoder", model, TOKENIZER, CONVENTIONS, f"llm={name}: ")


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where abilities are kept."""
    monkeypatch.setenv("INSTRUCTBLIP_CACHE", str(tmp_path))
    return tmp_path / "abilities"


@pytest.mark.usefixtures("own_folder")
def test_what_is_done_the_plain_way_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        finished("llama")
        assert caplog.messages == []
        finished("qwen3_5")
    (said,) = caplog.messages
    assert said.startswith(
        "llm=qwen3_5: Qwen3_5ForCausalLM allows no shortcuts here: candidates are ranked one by one, "
    )
    assert said.endswith("packed batches are bucketed instead, each beam runs its prompt")


@pytest.mark.parametrize(("packs", "kinds"), [(True, ["fixed", "packed"]), (False, ["fixed", "bucketed"])])
def test_a_model_that_cannot_pack_has_its_batches_bucketed(packs: bool, kinds: list[str]) -> None:
    """Rows of one sample each would hold many times the tokens that a pass may."""
    config = compose_config("train", TrainConfig, ["recipe.phases.instruction.batching=packed"])
    phases = make_phases(config, lambda prompt, target, frames: frames, packs=packs)
    assert [phase.batching.kind for phase in phases] == kinds


def test_a_model_packs_where_its_language_model_does() -> None:
    assert whole_model("mpt").packs() and not whole_model("qwen3_5").packs()


def test_every_ability_has_its_words() -> None:
    lacking = copy.copy(measured("llama"))
    lacking.abilities = LLMAbilities(**dict.fromkeys(ALL, False))
    assert {field.name for field in fields(LLMAbilities)} == ALL | {"embedding_factor"}
    assert len(limits(lacking)) == len(ALL)
    assert limits(measured("llama")) == []


def test_a_model_is_measured_once(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = finished("mpt").abilities
    (file,) = own_folder.glob("*.json")

    def again(_: LLM) -> LLMAbilities:
        raise AssertionError("it was measured already")

    monkeypatch.setattr(language_model, "measure", again)
    assert finished("mpt").abilities == found != LLMAbilities()
    with pytest.raises(AssertionError, match="already"):
        finished("mpt", seed=1)  # other weights
    with pytest.raises(AssertionError, match="already"):
        finished("llama")
    for damaged in ("{}", "[]", "{", '{"tree": true}', file.read_text().replace("false", "0")):
        file.write_text(damaged)
        with pytest.raises(AssertionError, match="already"):
            finished("mpt")


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTBLIP_CACHE", "/dev/null/cache")
    assert allowed(finished("mpt")) == FAMILIES["mpt"][1]


def test_a_measurement_is_a_few_short_passes() -> None:
    """A model of 135 M parameters takes less than a second for them: some 30 billion operations in float32."""
    llm, positions = unmeasured("llama"), []
    assert isinstance(llm, DecoderLLM)
    handle = blocks_of(llm.model)[0].register_forward_hook(
        lambda _module, inputs, _outputs: positions.append(inputs[0].shape[0] * inputs[0].shape[1])
    )
    measure(llm)
    handle.remove()
    assert len(positions) <= 10
    assert sum(positions) <= 120


# --- in a whole model ------------------------------------------------------------------------------------------------


def whole_model(name: str) -> InstructBLIP:
    return tiny_model(llm=measured(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["granite", "mpt", "umt5", "qwen3_5", "lfm2"])
def test_a_whole_model_ranks_and_writes_the_same_in_any_batch(name: str) -> None:
    model, images = whole_model(name), tiny_images(3)
    prompts, candidates = ["what color is it?", "shape", "is there a circle?"], [["red", "red circle", "blue"]] * 3
    scores, texts = model.rank(images, prompts, candidates), model.generate(images, prompts, num_beams=2)
    for row in range(3):
        alone = slice(row, row + 1)
        torch.testing.assert_close(
            scores[row], model.rank(images[alone], prompts[alone], candidates[alone])[0], atol=1e-4, rtol=0
        )
        assert texts[row] == model.generate(images[alone], prompts[alone], num_beams=2)[0]
