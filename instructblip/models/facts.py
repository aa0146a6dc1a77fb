"""What is asked of models before any is imported: the names of their outputs, their skills, how they rank."""

from typing import Any, Literal

from instructblip.config.schema import ModelConfig, ModelKind

# Of `arguments.Decoding`, all that decides a text that is not drawn.
SEARCH = ("max_new_tokens", "num_beams", "min_new_tokens", "length_penalty", "repetition_penalty")
Skill = Literal["rank", "generate", "caption", "retrieve", "match"]

# What is counted, where the paper and the released code differ. The released decoder-only code divides by the padded
# length as well, which is one number for all candidates of a forward pass and so changes no order within it; it scores
# long candidate lists in several passes whose numbers do not compare, which is not repeated here.
RANKING_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "decoder": {"normalize": "sum", "include_eos": True},
        "encoder_decoder": {"normalize": "sum", "include_eos": True},
    },
    "lavis": {
        "decoder": {"normalize": "sum", "include_eos": False},
        "encoder_decoder": {"normalize": "sum", "include_eos": True},
    },
}

TEMPERATURES = (0.001, 0.5)  # bounds of BLIP's learnt temperature, as released

ANSWERS = frozenset({"answer_logits"})
LANGUAGE = ANSWERS | {"visual_prompt", "visual_cosines", "embedding_length"}  # of a connector in front of an LLM
PAIRS = frozenset({"image_projected", "text_projected", "temperature", "match_logits"})
STAGE1 = PAIRS | ANSWERS
QUEUED_PAIRS = PAIRS | {"image_projected_m", "text_projected_m", "image_queue", "text_queue", "image_id_queue"}
PRETRAINING = QUEUED_PAIRS | ANSWERS
OUTPUTS: dict[ModelKind, frozenset[str]] = {
    "instructblip": LANGUAGE,
    "blip2": LANGUAGE,
    "blip2_stage1": STAGE1,
    "blip_caption": ANSWERS,
    "blip_vqa": ANSWERS,
    "blip_retrieval": QUEUED_PAIRS,
    "blip_pretrain": PRETRAINING,
}


def outputs_of(config: ModelConfig) -> frozenset[str]:
    """Those of a configured model: `OUTPUTS` has them for each kind with a Q-Former, and for BLIP's."""
    if config.connector.kind != "qformer":
        return LANGUAGE
    given = OUTPUTS[config.model.kind]
    return given if config.model.language_model_head else given - ANSWERS


def skills_of(skills: frozenset[Skill], config: ModelConfig) -> frozenset[Skill]:
    """Of a class's skills those of a configured model: without a language-model head it writes no captions."""
    return skills if config.model.language_model_head else skills - {"caption"}
