"""How one language model's texts become tokens: special tokens, what stands before a prompt and an answer, where they end.

Nothing here holds weights, so it goes to worker processes, which count tokens with it.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from transformers import PreTrainedTokenizerBase


class PromptFormat(ABC):
    """The text conventions of a language model; the tokenizer is used without special tokens, which are added here.

    Args:
        tokenizer: the model's.
        eos_token: token that ends an answer, in training targets and in ranking.
        pad_token: token that fills batches.
        bos_token: token before the prompt, or None where the model has none.
        image_prefix: text in front of the visual tokens. A model that always saw some token first sends much of its
            attention there; a visual token in that place is heard badly and disturbs the rest.
        prompt_prefix: text between the visual tokens and the prompt.
        prompt_suffix: text after the prompt, such as a cue to answer or the opening of a chat's next turn.
        answer_prefix: put before every target and candidate that follows a text; byte-level vocabularies need the space.
        image_in_text: image prefix and prompt are cut as one text with the image in it, BOS in front of all, as LLaVA's
            processor does; else BOS begins the prompt, and each is cut as a text of its own, which may get a space in front.
        supervise_bos: where no text stands between the visual tokens and the answer, BOS is the answer's first token in
            training: the last visual token learns to give it, as in BLIP-2's released OPT models.
        max_prompt_tokens: in training, longer prompts lose their beginning (as released: truncation side left).
        max_target_tokens: longer targets lose their end; BOS counts, which the released code cuts with and then drops.

    Raises:
        ValueError: a token that the tokenizer does not know, no BOS to supervise, limits that leave no text.
    """

    answer_continues_prompt: ClassVar[bool]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_token: str,
        pad_token: str,
        bos_token: str | None = None,
        image_prefix: str = "",
        prompt_prefix: str = "",
        prompt_suffix: str = "",
        answer_prefix: str = "",
        image_in_text: bool = False,
        supervise_bos: bool = False,
        max_prompt_tokens: int = 128,
        max_target_tokens: int = 256,
    ) -> None:
        self.tokenizer = tokenizer
        self.eos_id = _token_id(tokenizer, eos_token)
        self.pad_id = _token_id(tokenizer, pad_token)
        self.bos_ids = [] if bos_token is None else [_token_id(tokenizer, bos_token)]
        self.image_prefix = image_prefix
        self.prompt_prefix = prompt_prefix
        self.prompt_suffix = prompt_suffix
        self.answer_prefix = answer_prefix
        self.image_in_text = image_in_text
        self.supervise_bos = supervise_bos
        if supervise_bos and (image_in_text or not (self.answer_continues_prompt and self.bos_ids)):
            raise ValueError("supervise_bos needs a decoder-only language model with a bos_token behind the image")
        self.max_prompt_tokens = max_prompt_tokens
        self.max_target_tokens = max_target_tokens
        self._check_limits()

    def _check_limits(self) -> None:
        """Refuse limits that special tokens fill: no text would be left, and no answer without any token can be learnt."""
        bos, end = len(self.bos_ids), 0 if self.answer_continues_prompt else 1
        marks = {"max_prompt_tokens": bos + end, "max_target_tokens": end or bos}
        for name, count in marks.items():
            if getattr(self, name) <= count:
                raise ValueError(
                    f"{name}={getattr(self, name)} leaves nothing of a text beside special tokens; raise it"
                )

    @property
    def image_prefix_ids(self) -> list[int]:
        """Token ids in front of the visual tokens."""
        return (self.bos_ids if self.image_in_text else []) + self.ids(self.image_prefix)

    @abstractmethod
    def prompt_ids(self, prompt: str, *, training: bool = False) -> list[int]:
        """Token ids of a prompt.

        In training its beginning is cut to `max_prompt_tokens`, special tokens stay; `supervise_bos` counts then, too.
        """

    @abstractmethod
    def target_ids(self, target: str, include_eos: bool = True, *, follows_text: bool = True) -> list[int]:
        """Token ids of an answer and its EOS, cut on the right to `max_target_tokens`.

        Args:
            target: the answer.
            include_eos: end with EOS.
            follows_text: a text stands between the visual tokens and the answer; without one it has no `answer_prefix`.
        """

    def answer_ids(self, prompt: str, target: str) -> list[int]:
        """Token ids that training on a prompt and its answer supervises."""
        return self._supervised_bos(prompt) + self.target_ids(target, follows_text=bool(self.text_before(prompt)))

    @abstractmethod
    def length(self, prompt: str, target: str, frames: int, *, queries: int) -> int:
        """Positions that a training sample fills in the model: `queries` visual tokens a frame, prompt and answer."""

    def ids(self, text: str) -> list[int]:
        """Token ids of a text alone."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def text_before(self, prompt: str) -> str:
        """All text between the visual tokens and the answer."""
        return self.prompt_prefix + prompt + self.prompt_suffix

    def _behind_image(self, prompt: str) -> list[int]:
        """Token ids of all text between the visual tokens and the answer."""
        text = self.text_before(prompt)
        if not self.image_in_text:
            return self.ids(text)
        mark = str(self.tokenizer.convert_ids_to_tokens(self.eos_id))  # any special token parts texts as the image does
        return self.ids(mark + text)[1:]

    def _first_ids(self) -> list[int]:
        """BOS, where it begins the prompt."""
        return [] if self.image_in_text else self.bos_ids

    def _answer(self, target: str, follows_text: bool) -> list[int]:
        return self.ids(self.answer_prefix + target if follows_text else target)

    def _supervised_bos(self, prompt: str) -> list[int]:
        return self.bos_ids if self.supervise_bos and not self.text_before(prompt) else []


class DecoderPromptFormat(PromptFormat):
    """Decoder-only: the answer continues the prompt."""

    answer_continues_prompt = True

    def prompt_ids(self, prompt: str, *, training: bool = False) -> list[int]:
        """BOS and the prompt."""
        ids = self._behind_image(prompt)
        if not training:
            return self._first_ids() + ids
        room = self.max_prompt_tokens - len(self.bos_ids)
        return [] if self._supervised_bos(prompt) else self._first_ids() + ids[max(len(ids) - room, 0) :]

    def target_ids(self, target: str, include_eos: bool = True, *, follows_text: bool = True) -> list[int]:
        """The answer and EOS; an answer that was cut has no EOS."""
        ids = self._answer(target, follows_text) + [self.eos_id] * include_eos
        return ids[: self.max_target_tokens - len(self.bos_ids)]

    def length(self, prompt: str, target: str, frames: int, *, queries: int) -> int:
        """The answer's last token is only ever predicted and fills no position."""
        before = len(self.image_prefix_ids) + frames * queries + len(self.prompt_ids(prompt, training=True))
        return before + len(self.answer_ids(prompt, target)) - 1


class EncoderDecoderPromptFormat(PromptFormat):
    """Encoder-decoder: the prompt is encoded, the answer decoded beside it."""

    answer_continues_prompt = False

    def prompt_ids(self, prompt: str, *, training: bool = False) -> list[int]:
        """BOS where the model has one, the prompt, EOS."""
        ids = self._behind_image(prompt)
        room = self.max_prompt_tokens - len(self.bos_ids) - 1
        return [*self._first_ids(), *(ids[max(len(ids) - room, 0) :] if training else ids), self.eos_id]

    def target_ids(self, target: str, include_eos: bool = True, *, follows_text: bool = True) -> list[int]:
        """The answer and EOS, which stays when the answer is cut."""
        ids = self._answer(target, follows_text)[: self.max_target_tokens - 1]
        return ids + [self.eos_id] * include_eos

    def length(self, prompt: str, target: str, frames: int, *, queries: int) -> int:
        """Those of the encoder and of the decoder, whose start token stands for the answer's last."""
        before = len(self.image_prefix_ids) + frames * queries + len(self.prompt_ids(prompt, training=True))
        return before + len(self.answer_ids(prompt, target))


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token!r}; name one of its own in the llm config")
    return found
