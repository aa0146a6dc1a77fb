"""LLaVA and its kin: image tokens -> connector -> LLM; the instruction reaches the LLM alone (arXiv:2304.08485).

Shape legend: B batch, F frames, P image tokens, V vision width, L language-model width.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from instructblip.models.base import PartStructure, blocks_of
from instructblip.models.connector import Connector
from instructblip.models.llm import LLM
from instructblip.models.vision import VisionEncoder
from instructblip.models.vision_language import VisionLanguageModel


class LLaVA(VisionLanguageModel):
    """A vision encoder, a connector that is no Q-Former, and a language model; with an MLP it is LLaVA-1.5.

    Args:
        vision: image encoder.
        vision_norm: normalisation between the encoder and the connector; LLaVA has none.
        connector: into the language model's width; its last layer is drawn anew, as large as the LLM's embeddings.
        llm: the language model.
        trained: the parts that train; the others are frozen.
    """

    PARTS = {"vision": ("vision",), "connector": ("vision_norm", "connector"), "llm": ("llm",)}  # noqa: RUF012
    held_parts = frozenset({"connector"})
    connector_part = "connector"

    def __init__(
        self,
        *,
        vision: VisionEncoder,
        vision_norm: nn.Module,
        connector: Connector,
        llm: LLM,
        trained: Collection[str] = ("connector",),
    ) -> None:
        super().__init__()
        self.vision = vision
        self.vision_norm = vision_norm
        self.connector = connector
        self.llm = llm
        connector.start(llm.embedding_deviation())
        self.choose_trained(trained)

    @property
    def title(self) -> str:
        """Named after the connector."""
        return f"a model of connector={self.connector.kind}"

    @property
    def device(self) -> torch.device:
        """That of the connector, which stands between all parts."""
        return self.connector.output.weight.device

    @property
    def frame_tokens(self) -> int:
        """The connector's."""
        return self.connector.tokens

    def tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """The LLM's."""
        return {"llm": self.llm.prompt_format.tokenizer}

    def conventions(self) -> list[Any]:
        """Tokens around image, prompt and answer, and how the connector reads image tokens."""
        return [self.text_conventions(), self.connector.settings()]

    def structure(self) -> dict[str, PartStructure]:
        """The vision encoder and the LLM may be sharded; the connector is small."""
        return {
            "vision": self.vision_structure(),
            "connector": PartStructure(self.connector.layers()),
            "llm": PartStructure(blocks_of(self.llm.model), self.llm.roots()),
        }

    def _visual_prompt(self, tokens_BFPV: Tensor, instructions: Sequence[str]) -> tuple[Tensor, int]:
        """Each frame alone, in the type of what trains: float32, unless the model was cast; no text is read."""
        tokens_NPV = tokens_BFPV.flatten(0, 1).to(self.connector.output.weight.dtype)
        visual_NQL = self.connector(self.vision_norm(tokens_NPV))
        return visual_NQL.view(len(tokens_BFPV), -1, self.llm.width), 0

    def _no_prompts(self, count: int) -> list[str]:
        """Captions without a prompt."""
        return [""] * count
