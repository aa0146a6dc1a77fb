"""The plan of a run: what it says of memory against what autograd keeps, of every experiment, and that it opens nothing."""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from instructblip.config.schema import CONFIGS, LLMConfig, TrainConfig, VisionConfig
from instructblip.config.validate import read_config
from instructblip.errors import UserError
from instructblip.models.base import Inputs, Partners
from instructblip.models.blip import BLIPPretrain
from instructblip.models.blip2 import BLIP2
from instructblip.models.facts import skills_of
from instructblip.training.plan import flops
from instructblip.training.plan.memory import Plan, PlanLayout, what_fits
from instructblip.training.plan.parts import adapters_of, make_plan
from instructblip.training.plan.start import plan_start
from instructblip.training.plan.tables import plan_summary
from instructblip.training.planned import print_plan
from instructblip.weights import modules as architecture
from instructblip.weights.modules import (
    adapt_without_weights,
    blip_without_weights,
    connector_without_weights,
    language_model_of_sizes,
    qformer_of_sizes,
)
from instructblip.weights.outlines import OutlinedEncoder, outlined_encoder
from instructblip.weights.parts import load_llm
from tests.kit.families import WIDTH, llm_config, write_llm
from tests.kit.runs import compose
from tests.kit.tiny import redraw, tiny_vision
from tests.kit.vectors import bert_tokenizer, blip_tokenizer

PAPER = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
OWN = ("mixture.datasets=[{name: easy_vqa_shape}]",)  # of an experiment for data that the user names
SMALL = (
    "vision=eva_vit_g",
    "vision.options.depth=2",
    "++vision.options.embed_dim=128",
    "++vision.options.num_heads=4",
    "vision.image_size=112",
    "qformer=bert_base",
    "qformer.dropout=0",
    *(f"qformer.sizes.{key}={value}" for key, value in {"hidden_size": 192, "intermediate_size": 768}.items()),
    "qformer.sizes.num_hidden_layers=4",
    "llm.added_tokens=[]",
    "llm.sizes.vocab_size=500",
    "recipe=paper",
    "recipe.phases.instruction.batch_size=4",
    "parallel=single",
    "plan=true",
)
LLAMA = ("hidden_size=256", "intermediate_size=688", "num_hidden_layers=4", "num_attention_heads=4")
SIZES = {
    "phi3": ("model_type=phi3", "pad_token_id=0", *LLAMA),  # which has one matrix for queries, keys and values
    "vicuna_7b": LLAMA,
    # Whose GELU is a formula, and whose norms are called ln_1 and ln_2.
    "gpt2": ("model_type=gpt2", "pad_token_id=0", *LLAMA),
    "qwen2_moe": (
        "model_type=qwen2_moe",
        "num_key_value_heads=4",
        "num_experts=4",
        "moe_intermediate_size=344",
        "shared_expert_intermediate_size=344",
        *LLAMA,
    ),
    "qwen3_8b": (*LLAMA, "num_key_value_heads=1", "head_dim=64"),
    # Embeddings narrower than its layers, as OPT-350M has.
    "opt_of_two_widths": ("hidden_size=256", "word_embed_proj_dim=128", "ffn_dim=1024", "num_hidden_layers=4"),
    "opt_2_7b": ("hidden_size=256", "word_embed_proj_dim=256", "ffn_dim=1024", "num_hidden_layers=4"),
    "flan_t5_xl": ("d_model=256", "d_ff=640", "num_layers=4", "num_heads=4"),
}


_ENCODERS: dict[str, Any] = {}  # by their configurations: the large one takes a second to lay out
_COUNTED: dict[int, float] = {}


@pytest.fixture
def encoders_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay out each vision encoder once for all tests."""
    build, count = architecture.vision_encoder, flops.image_flops

    def encoder(config: VisionConfig) -> Any:
        if repr(config) not in _ENCODERS:
            _ENCODERS[repr(config)] = build(config)
        return _ENCODERS[repr(config)]

    def counted(vision: Any) -> float:
        if isinstance(vision, OutlinedEncoder):  # whose place another one takes
            return count(vision)
        if id(vision) not in _COUNTED:
            _COUNTED[id(vision)] = count(vision)
        return _COUNTED[id(vision)]

    monkeypatch.setattr(architecture, "vision_encoder", encoder)
    monkeypatch.setattr(flops, "image_flops", counted)


def plan(*overrides: str) -> Plan:
    return make_plan(compose("train", TrainConfig, ["plan=true", *overrides]))


def printed(*overrides: str) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=120)
    status = print_plan(compose("train", TrainConfig, ["plan=true", *overrides]), console)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue()


def small(name: str, *overrides: str) -> TrainConfig:
    llm = {"opt_of_two_widths": "opt_2_7b", **dict.fromkeys(("phi3", "gpt2", "qwen2_moe"), "vicuna_7b")}.get(name, name)
    return compose("train", TrainConfig, [f"llm={llm}", *SMALL, *(f"llm.sizes.{s}" for s in SIZES[name]), *overrides])


def saved_bytes(work: Callable[[], object], *own: nn.Module) -> int:
    """Bytes of the tensors that autograd keeps, without those of the modules themselves."""
    tables = {t.untyped_storage().data_ptr() for m in own for t in (*m.parameters(), *m.buffers())}
    kept: dict[int, Tensor] = {}  # which keeps their addresses theirs

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = work()
    del result
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in tables)


@pytest.mark.slow
@pytest.mark.usefixtures("encoders_once")
@pytest.mark.parametrize("name", SIZES)
def test_activations_of_the_llm_are_those_that_autograd_keeps(name: str) -> None:
    config = small(name)
    planned = make_plan(config)
    llm = language_model_of_sizes(config.llm).requires_grad_(False).eval()
    length = 32 + 35 + (1 if name.startswith("flan") else 15)
    width = llm.get_input_embeddings().weight.shape[1]
    embedded = torch.randn(4, length, width, dtype=torch.bfloat16, requires_grad=True)

    def forward() -> Any:
        if not llm.config.is_encoder_decoder:
            return llm.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        encoded = llm.get_encoder()(inputs_embeds=embedded).last_hidden_state
        answers = torch.ones(4, 16, dtype=torch.long)
        return llm.get_decoder()(input_ids=answers, encoder_hidden_states=encoded, use_cache=False).last_hidden_state

    expected = saved_bytes(forward, llm)
    found = {row.part: row.usual for row in planned.memory()}["activations, language model"]
    assert found == pytest.approx(expected, rel=0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("encoders_once")
def test_all_matrices_of_a_language_model_that_trains_have_copies() -> None:
    """GPT-2's are no linear layers; its head is the table of its embeddings."""
    copies = [
        {row.part: row.usual for row in make_plan(config).memory()}["bfloat16 copies"]
        for config in (small("gpt2"), small("gpt2", "train.llm=full"))
    ]
    llm = language_model_of_sizes(small("gpt2").llm)
    matrices = sum(p.numel() for name, p in llm.named_parameters() if p.ndim == 2 and "wpe" not in name)
    assert copies[1] - copies[0] == 2 * matrices


@pytest.mark.slow
@pytest.mark.usefixtures("encoders_once")
def test_activations_of_the_qformer_are_those_that_autograd_keeps() -> None:
    config = small("vicuna_7b")
    qformer, norm = qformer_of_sizes(config.qformer, vision_width=128), nn.LayerNorm(128)
    tokens, image = torch.ones(4, 37, dtype=torch.long), torch.randn(4, 65, 128)

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return qformer(norm(image), tokens, torch.ones_like(tokens)).query_BQD

    rows = {row.part: row.usual for row in make_plan(config).memory()}
    # The copies of the matrices in bfloat16 are kept as well.
    expected = saved_bytes(forward, qformer, norm)
    assert rows["activations, Q-Former"] + rows["bfloat16 copies"] == pytest.approx(expected, rel=0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("encoders_once")
def test_activations_of_the_first_stage_are_those_that_autograd_keeps() -> None:
    """All four ways through the Q-Former, with three pairs a sample."""
    options = [item for item in SMALL if not item.startswith(("llm.", "recipe", "plan"))]
    config = compose(
        "train",
        TrainConfig,
        ["experiment=blip2_stage1", *options, "qformer.sizes.vocab_size=198", "recipe.phases.align.batch_size=4"],
    )
    planned = make_plan(config)
    qformer = qformer_of_sizes(config.qformer, vision_width=128, reads_and_writes=True)
    model = BLIP2(
        vision=tiny_vision(),
        vision_norm=nn.LayerNorm(128),
        qformer=qformer,
        tokenizer=bert_tokenizer(),
        feature_width=64,
    )
    tokens, captions = torch.randn(4, 1, 65, 128), [[5] * 13] * 4
    inputs = Inputs(tokens, [""] * 4, captions, partners=Partners(tokens.clone(), captions))

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(inputs, BLIP2.OUTPUTS)

    rows = {row.part: row.usual for row in planned.memory()}
    expected = saved_bytes(forward, qformer, model.vision_norm)
    assert rows["activations, Q-Former"] + rows["bfloat16 copies"] == pytest.approx(expected, rel=0.2)
    assert rows["image tokens of a step"] == 2 * 4 * 65 * 128 * 2
    assert "language model" not in rows


BLIP_SMALL = (
    "vision.options={embed_dim: 128, depth: 2, num_heads: 4, drop_path_rate: 0.0}",
    "vision.image_size=112",
    "text.dropout=0",
    *(f"text.sizes.{key}={value}" for key, value in {"hidden_size": 192, "intermediate_size": 768}.items()),
    "text.sizes.num_hidden_layers=4",
    "text.sizes.vocab_size=198",
    "model.feature_width=64",
    "model.queue_size=10",
    "parallel=single",
    "plan=true",
)


@pytest.mark.slow
def test_memory_of_blips_pre_training_is_what_modules_hold_and_autograd_keeps() -> None:
    """Contrast, matching with three pairs a sample, captions; two images a sample pass through the encoder."""
    phase = ("recipe.phases.pretrain.batch_size=4", "recipe.phases.pretrain.negatives_among=4")
    config = compose("train", TrainConfig, ["experiment=blip_pretrain", *BLIP_SMALL, *phase])
    rows = {row.part: row.usual for row in make_plan(config).memory()}
    parts, tokenizer = blip_without_weights(config), blip_tokenizer()
    assert parts.encoder is not None
    model = BLIPPretrain(
        vision=parts.vision.to_empty(device="cpu"),
        text_encoder=parts.encoder.to_empty(device="cpu"),
        tokenizer=tokenizer,
        feature_width=64,
        queue_size=10,
    )
    model.vision.mean, model.vision.std = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    redraw(model)
    trained = [p for name in ("vision", "text") for m in model.part_modules(name) for p in m.parameters()]
    assert rows["gradients"] == 4 * sum(p.numel() for p in trained)
    assert rows["AdamW's moments"] == 2 * rows["gradients"]
    assert rows["momentum copies and queue"] == pytest.approx(
        sum(tensor.numel() * tensor.element_size() for tensor in model.part_state("momentum").values()), abs=64
    )
    images, captions = torch.zeros(4, 1, 3, 112, 112, dtype=torch.uint8), [[5] * 13] * 4
    inputs = Inputs(images, [""] * 4, captions, partners=Partners(images.clone(), captions))
    wanted = {"image_projected", "text_projected", "temperature", "answer_logits", "match_logits"}

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model.train()(inputs, wanted)

    expected = saved_bytes(forward, model)
    found = sum(rows[f"activations, {part}"] for part in ("vision encoder", "text models")) + rows["bfloat16 copies"]
    assert found == pytest.approx(expected, rel=0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("encoders_once")
def test_static_memory_of_the_7b_model() -> None:
    rows = {row.part: row.usual for row in plan("experiment=paper_vicuna_7b", "plan_gpus=8").memory()}
    trained = 188_837_376 - 4_723_968
    assert rows["language model"] == 2 * 6_738_423_808
    assert rows["vision encoder"] == 2 * 985_894_528
    assert rows["Q-Former and projection"] == 4 * 188_837_376
    assert (rows["gradients"], rows["AdamW's moments"]) == (4 * trained, 8 * trained)


@pytest.mark.slow
@pytest.mark.usefixtures("encoders_once")
def test_sharding_recomputing_and_rounding_save_memory() -> None:
    base = plan("experiment=paper_vicuna_13b", "plan_gpus=8", "parallel=ddp")

    def rows(**changes: Any) -> dict[str, float]:
        changed = replace(base, layout=replace(base.layout, **changes))
        return {row.part: row.largest for row in changed.memory()}

    whole = rows()
    sharded, paired = rows(kind="fsdp"), rows(kind="fsdp", shard_size=2)
    assert whole["language model"] == 2 * 13_015_874_560
    assert 1 / 8 < sharded["language model"] / whole["language model"] < 1 / 5  # token tables and two blocks are whole
    assert 1 / 2 < paired["language model"] / whole["language model"] < 0.6
    recomputed = rows(activation_checkpointing=True)
    assert recomputed["activations, language model"] < whole["activations, language model"] / 5
    assert 0.5 < rows(quantization="int8")["language model"] / whole["language model"] < 0.52
    assert rows(quantization="fp8")["language model"] == whole["language model"]  # in two orders, of a byte each
    assert 0.28 < rows(quantization="nf4")["language model"] / whole["language model"] < 0.31


@pytest.mark.slow
@pytest.mark.usefixtures("encoders_once")
def test_time_follows_from_work_and_peak() -> None:
    once = plan("experiment=paper_vicuna_7b", "plan_gpu=h200", "plan_gpus=8", "plan_mfu=0.25")
    twice = replace(once, layout=replace(once.layout, gpus=16, mfu=0.5))
    work = sum(part.forward + part.backward for part in once.sample_flops())
    assert 2.5e12 < work < 3e12
    rate = once.samples_per_second(once.phases[0])
    assert rate == pytest.approx(8 * 0.25 * 989.4e12 / work)
    assert once.hours() == pytest.approx(60_000 * 128 / rate / 3600)
    assert once.hours() == pytest.approx(4 * twice.hours())
    recomputing = replace(once, layout=replace(once.layout, activation_checkpointing=True))
    assert recomputing.hours() == pytest.approx(1.4 * once.hours(), rel=0.03)


def test_blocks_of_an_encoder_that_trains_are_computed_twice_too() -> None:
    planned = plan("experiment=blip_caption_coco")
    assert planned.layout.activation_checkpointing
    parts = {part.part: part for part in planned.sample_flops()}
    again = parts["vision encoder"].forward + parts["text models and heads"].forward
    work = sum(part.forward + part.backward for part in parts.values()) + again
    layout = planned.layout
    rate = layout.gpus * layout.mfu * layout.gpu.flops / work
    assert planned.samples_per_second(planned.phases[0]) == pytest.approx(rate)
    frozen = replace(planned, shape=replace(planned.shape, trained=frozenset({"text"})))
    assert [part.part for part in frozen.sample_flops() if part.recompute] == ["text models and heads"]


@pytest.mark.slow
def test_phases_of_unlike_work_are_added_up() -> None:
    demo = plan("experiment=demo", "parallel=single")
    alignment, instruction = demo.phases
    assert demo.samples_per_second(alignment) > 5 * demo.samples_per_second(instruction)
    assert demo.heaviest is instruction
    seconds = sum(p.steps * p.batch_size / demo.samples_per_second(p) for p in demo.phases)
    assert demo.hours() == pytest.approx(seconds / 3600)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", PAPER)
def test_every_experiment_is_planned_and_nothing_is_opened(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = OWN if experiment == "finetune_demo" else ()
    config = compose("train", TrainConfig, [f"experiment={experiment}", "plan=true", f"output={tmp_path}/out", *own])

    def refuse(*arguments: object, **_: object) -> Any:
        raise AssertionError(f"a plan opened {arguments}")

    outlined_encoder(config.vision)  # the record is read once, with the code

    for name in ("builtins.open", "io.open", "os.open", "socket.socket.connect", "torch.load"):
        monkeypatch.setattr(name, refuse)
    monkeypatch.setattr("instructblip.weights.parts.part_folder", refuse)
    monkeypatch.setattr("instructblip.training.run_cards.load_cards", refuse)
    console = Console(file=io.StringIO(), width=100)
    status = print_plan(config, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert re.search(rf"{experiment} on \d+ x A100 40 GB", text)
    assert "hours" in text
    assert ("It fits" in text, "It does not fit" in text) == (status == 0, status == 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("encoders_once")
@pytest.mark.parametrize(
    "overrides",
    [
        ("experiment=paper_vicuna_13b", "parallel=ddp", "plan_gpus=8"),
        ("experiment=paper_vicuna_7b", "plan_gpus=2", "recipe.phases.instruction.micro_batch_size=64"),
        ("experiment=paper_vicuna_7b", "plan_gpus=2", "plan_gpu=rtx_4090"),
        ("experiment=paper_vicuna_13b", "plan_gpus=1", "plan_gpu=rtx_4090"),
    ],
)
def test_what_does_not_fit_is_told_what_would(overrides: tuple[str, ...]) -> None:
    status, text = printed(*overrides)
    assert status == 1
    advised = text.partition("; with ")[2].partition(" it does")[0].split()
    assert advised
    assert printed(*overrides, *advised)[0] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("encoders_once")
def test_nothing_helps_a_gpu_that_is_too_small() -> None:
    huge = plan("llm=vicuna_13b", "llm.sizes.num_hidden_layers=200", "plan_gpus=1", "plan_gpu=rtx_4090")
    assert what_fits(huge) is None
    assert "take GPUs with more memory" in plan_summary(huge)[-1]


def test_what_is_configured_is_what_is_planned_with() -> None:
    settings = {
        "plan_gpu": "h200",
        "plan_gpus": 2,
        "plan_mfu": 0.3,
        "parallel.kind": "ddp",
        "parallel.activation_checkpointing": True,
        "recipe.precision": "bf16",
        "recipe.average_decay": 0.9,
        "llm.quantization": "int8",
        "llm.max_prompt_tokens": 50,
        "llm.max_target_tokens": 60,
        "data.cache_features": True,
    }
    layout = PlanLayout(
        gpu=flops.GPUS["h200"],
        gpus=2,
        mfu=0.3,
        kind="ddp",
        shard_size=None,
        activation_checkpointing=True,
        autocast=True,
        average=True,
        quantization="int8",
        cached=True,
        longest=flops.SampleLengths(50, 60),
    )
    found = plan(*(f"{key}={value}" for key, value in settings.items()))
    assert found.layout == layout
    assert found.sample_flops()[0].forward == 0  # of the encoder: its tokens are cached
    sharded = {"parallel.kind": "fsdp", "parallel.shard_size": 2, "train.vision": "full", "data.cache_features": False}
    found = plan(*(f"{key}={value}" for key, value in (settings | sharded | {"llm.quantization": "null"}).items()))
    changes: dict[str, Any] = {"kind": "fsdp", "shard_size": 2, "quantization": None, "cached": False}
    assert found.layout == replace(layout, trained=frozenset({"vision", "qformer"}), **changes)


@pytest.mark.usefixtures("encoders_once")
def test_only_the_first_of_torchruns_processes_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert printed("experiment=paper_vicuna_7b") == (0, "")


@pytest.mark.usefixtures("encoders_once")
@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("plan_gpu=h300", "plan_gpu=h300 is none of a100_40"),
        ("plan_gpus=0", "plan_gpus=0 is too small"),
        ("plan_gpus=3", "does not divide among 3 processes"),
        ("plan_mfu=1.5", "plan_mfu=1.5 is too large; give 1 or less"),
        ("parallel=single plan_gpus=2", "parallel=single, but there are 2"),
        ("parallel=fsdp parallel.shard_size=3", "parallel.shard_size=3 does not divide 8"),
        ("llm.sizes.model_type=lama", "llm.sizes of smollm2_135m"),
        ("llm.kind=encoder_decoder", "is no encoder_decoder language model; set llm.kind=decoder"),
        ("llm.quantization=fp8 llm.dtype=float32", "set llm.dtype=bfloat16"),
    ],
)
def test_a_mistake_is_one_line(override: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        printed(*override.split())
    assert says in str(error.value)
    assert "\n" not in str(error.value)


OWN_LLM = """\
name: mine
sources: {path: FOLDER}
dtype: float32
eos_token: "</s>"
pad_token: "</s>"
image_prefix: "Look: "
prompt_suffix: " Answer:"
answer_prefix: " "
"""


def test_an_own_language_model_needs_eight_keys(tmp_path: Path) -> None:
    write_llm("vicuna_7b", tmp_path / "llm")
    (tmp_path / "mine.yaml").write_text(OWN_LLM.replace("FOLDER", str(tmp_path / "llm")), encoding="utf-8")
    config = read_config(tmp_path / "mine.yaml", LLMConfig)
    loaded = load_llm(config)
    planned = language_model_of_sizes(config)
    shapes = {name: tensor.shape for name, tensor in loaded.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in planned.state_dict().items()} == shapes


@pytest.mark.parametrize("name", ["flan_t5_xl", "gemma_3_4b", "qwen3_8b"])
def test_sizes_that_no_yaml_states_are_read_from_the_models_config(name: str, tmp_path: Path) -> None:
    write_llm(name, tmp_path)
    config = replace(llm_config(name, tmp_path), sizes={}, added_tokens=[])
    planned = sum(p.numel() for p in language_model_of_sizes(config).parameters())
    assert planned == pytest.approx(sum(p.numel() for p in load_llm(config).model.parameters()), rel=1e-3)


def test_a_folder_that_is_given_is_planned_whatever_the_yaml_states(tmp_path: Path) -> None:
    """A larger model of the family, say; before it is copied to this machine, the YAML is all that is known."""
    write_llm("qwen3_8b", tmp_path / "here")
    config = compose("train", TrainConfig, ["connector=linear", "llm=qwen3_8b"])
    for folder, width in (("here", WIDTH), ("elsewhere", 4096)):
        config.llm = llm_config("qwen3_8b", tmp_path / folder)
        planned = connector_without_weights(config, outlined=True)
        assert planned.llm.get_input_embeddings().embedding_dim == width
        assert planned.connector.output.out_features == width


def test_a_first_stage_without_captions_is_planned_without_their_head() -> None:
    head = "model.language_model_head=false"
    objectives = "recipe.phases.align.objectives.captioning=0"
    more = ["experiment=blip2_stage1", *OWN, "plan=true"]
    whole, without = (compose("train", TrainConfig, [*more, *others]) for others in ([], [head, objectives]))
    plans = [make_plan(config) for config in (whole, without)]
    sizes = [{row.part: row.usual for row in plan.memory()}["Q-Former and heads"] for plan in plans]
    assert sizes[0] - sizes[1] == 4 * (768 * 768 + 768 + 2 * 768 + 30523)  # dense, norm, a bias for each word
    with pytest.raises(
        UserError, match=r"objectives\.captioning needs answer_logits, which model=blip2_stage1 does not"
    ):
        print_plan(compose("train", TrainConfig, [*more, head]), Console(quiet=True))
    assert [skills_of(BLIP2.SKILLS, config) for config in (whole, without)] == [BLIP2.SKILLS, {"retrieve", "match"}]
    assert plan_start(whole, plans[0]) == []
    assert whole.qformer is not None
    whole.qformer.init = "given"
    assert plan_start(whole, plans[0])[0].startswith("At the start: qformer.init=given has no weights of its own")


@pytest.mark.slow
def test_the_hub_is_asked_for_the_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llm("qwen3_8b", tmp_path)
    asked = []

    def download(repository: str, file: str, revision: str | None) -> str:
        asked.append((repository, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setenv("INSTRUCTBLIP_CACHE", str(tmp_path / "cache"))
    config = compose("train", TrainConfig, ["llm=qwen3_8b", "~llm.sizes"]).llm
    assert language_model_of_sizes(config).config.model_type == "qwen3"
    assert asked == [("Qwen/Qwen3-8B", "config.json", None)]


@pytest.mark.slow
def test_a_language_model_whose_sizes_are_nowhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTBLIP_CACHE", str(tmp_path / "cache"))
    config = compose("train", TrainConfig, ["plan=true", "~llm.sizes", "llm.sources.hub=null"])
    with pytest.raises(UserError, match=r"llm=smollm2_135m states no llm\.sizes .*set llm\.sources\.path=FOLDER"):
        make_plan(config)
    config = compose("train", TrainConfig, ["plan=true", "~llm.sizes", f"llm.sources.path={tmp_path}"])
    with pytest.raises(UserError, match=r"config\.json is missing; correct llm\.sources\.path"):
        make_plan(config)


@pytest.mark.slow
@pytest.mark.usefixtures("encoders_once")
def test_main_memory_for_building_the_model_is_named() -> None:
    planned = plan("experiment=paper_vicuna_13b", "plan_gpus=8")
    assert planned.loading() / 2**30 == pytest.approx(26.8, abs=0.1)  # 13.0 B and 1.0 B in bfloat16, 0.2 B in float32
    assert "26.8 GiB for every GPU of a node" in " ".join(plan_summary(planned))
    full = plan("experiment=paper_vicuna_13b", "plan_gpus=8", "train.llm=full")
    assert full.loading() - planned.loading() == 2 * 13_015_874_560  # which trains in float32


def test_adapters_on_a_model_that_reads_and_writes_are_counted_once() -> None:
    pytest.importorskip("peft", reason="adapters need requirements-lora.txt")
    config = compose("train", TrainConfig, ["experiment=blip_pretrain", "train.text=lora", "model.queue_size=null"])
    parts = blip_without_weights(config)
    adapt_without_weights(parts, adapters_of(config))
    assert parts.encoder is parts.decoder and parts.encoder is not None
    names = [name for name, _ in parts.encoder.named_parameters() if ".lora_A." in name]
    assert {name.split(".")[-4] for name in names} == {"query", "value"}


@pytest.mark.slow
def test_adapters_need_the_memory_of_adapters(encoders_once: None) -> None:
    pytest.importorskip("peft", reason="adapters need requirements-lora.txt")
    plans = {
        mode: make_plan(small("vicuna_7b", *more))
        for mode, more in {
            "frozen": [],
            "lora": ["train.llm=lora", "train.lora.llm.rank=8"],
            "rounded": ["train.llm=lora", "train.lora.llm.rank=8", "llm.quantization=int8", "parallel=ddp"],
            "full": ["train.llm=full"],
        }.items()
    }
    rows = {mode: {row.part: row.usual for row in plan.memory()} for mode, plan in plans.items()}
    adapters = 4 * 2 * 8 * (256 + 256)  # query and value of each layer, as peft has it for LLaMA
    assert rows["lora"]["gradients"] - rows["frozen"]["gradients"] == 4 * adapters
    assert rows["lora"]["AdamW's moments"] - rows["frozen"]["AdamW's moments"] == 8 * adapters
    assert rows["full"]["gradients"] > 1.3 * rows["lora"]["gradients"]
    whole = 4 * adapters + rows["frozen"]["language model"]
    assert rows["lora"]["language model"] == whole  # the adapters in float32 over the LLM in half precision
    assert rows["rounded"]["language model"] < 0.6 * rows["lora"]["language model"]
    assert rows["lora"]["activations, language model"] > rows["frozen"]["activations, language model"]
    flops = {mode: sum(part.forward + part.backward for part in plan.sample_flops()) for mode, plan in plans.items()}
    assert flops["frozen"] < flops["lora"] < 1.05 * flops["frozen"] < flops["full"]
