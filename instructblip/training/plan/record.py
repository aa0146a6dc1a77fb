"""The command `python -m instructblip.training.plan.record`: write the outlines of all configurations in `configs`."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from instructblip.config.entry import compose_config
from instructblip.config.schema import CONFIGS, LLMConfig, TrainConfig, VisionConfig
from instructblip.files import write_atomically
from instructblip.models.empty import empty_modules
from instructblip.training.plan.flops import image_flops
from instructblip.weights.modules import language_model_of_sizes, vision_encoder
from instructblip.weights.outlines import (
    RECORD,
    encoder_settings,
    language_model_settings,
    record_of_encoder,
    record_of_language_model,
)

_DATA = "mixture.datasets=[{name: easy_vqa_shape}]"  # of experiments for data that the user names
_NAMED_BY_USERS = frozenset({"timm"})  # vision encoders whose backbone is given on the command line


def shipped_configs() -> Iterator[TrainConfig]:
    """Every experiment, and the demo with every vision encoder and language model."""
    for kind in ("experiment", "vision", "llm"):
        for name in sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml")):
            if name not in _NAMED_BY_USERS:
                yield compose_config("train", TrainConfig, [f"{kind}={name}", _DATA])


def encoder_record(config: VisionConfig) -> dict[str, Any]:
    """What is recorded of a vision encoder, which is built for it."""
    with empty_modules():
        encoder = vision_encoder(config)
    return {"settings": encoder_settings(config), **record_of_encoder(encoder, image_flops(encoder))}


def language_model_record(config: LLMConfig) -> dict[str, Any]:
    """What is recorded of a language model, which is built for it."""
    with empty_modules():
        model = language_model_of_sizes(config)
    return {"settings": language_model_settings(config), **record_of_language_model(model)}


def all_records() -> dict[str, list[dict[str, Any]]]:
    """Those of all shipped configurations, by part."""
    configs = list(shipped_configs())
    models = [config.llm for config in configs if config.llm]
    return {
        "vision": _each(encoder_record, (config.vision for config in configs), encoder_settings),
        "llm": _each(language_model_record, models, language_model_settings),
    }


def main() -> None:
    """Write the record, a line for each encoder and language model."""
    texts = [f'"{part}": [\n' + ",\n".join(map(json.dumps, found)) + "\n]" for part, found in all_records().items()]
    write_atomically(RECORD, "{\n" + ",\n".join(texts) + "\n}\n")
    print(RECORD)


def _each(
    record: Callable[[Any], dict[str, Any]], configs: Iterable[Any], settings: Callable[[Any], dict[str, Any]]
) -> list[dict[str, Any]]:
    """A record of each configuration whose settings no other has had."""
    different: list[Any] = []
    for config in configs:
        if settings(config) not in [settings(other) for other in different]:
            different.append(config)
    return [record(config) for config in different]


if __name__ == "__main__":
    main()
