"""BLIP: a vision encoder that trains, and a BERT that reads images, writes, or both (BLIP, section 3).

Four models of the same parts: `BLIPCaption` writes captions, `BLIPVQA` answers questions, `BLIPRetrieval` contrasts and
matches, and `BLIPPretrain`, which the others start from, does all of it with one text model. They give outputs; losses are
made of them elsewhere.

Shape legend: B batch, F frames, P image tokens, U vision width, T text tokens, D text width, E width of the projected
features, Q projected rows of an image (one here), N rows of any kind, R rows of text (those of a sample stand one after the
other), S supervised tokens in the batch, V vocabulary, K places in a queue.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from instructblip.models.arguments import (
    Decoding,
    DecodingOptions,
    check_candidates,
    check_choice,
    check_counts,
    check_images,
    check_texts,
    shows_options,
)
from instructblip.models.base import Inputs, Outputs, PartStructure, PassWorkload, Samples
from instructblip.models.decoding import decode
from instructblip.models.facts import ANSWERS, PRETRAINING, QUEUED_PAIRS, TEMPERATURES
from instructblip.models.med import BLIP_TOKENS, CAPTION_PROMPT, TextLayer, TextModel
from instructblip.models.pairs import BertBased, ImageOutputs, PairModel, PairOutputs, TextOutputs
from instructblip.models.ranking import TOKEN_BUDGET, deduplicated, length_groups
from instructblip.models.streaming import on_ids
from instructblip.models.transformer import KeyValueCache
from instructblip.models.vision import Images, VisionEncoder, as_frames

_HEADS = ("vision_projection", "text_projection", "matching_head", "temperature")
_LOGIT_ROWS = 1024  # vocabulary rows in memory at a time


class BLIP(BertBased):
    """What the models of BLIP share: pictures, tokens, and names of parts.

    Args:
        vision: image encoder, with its final norm.
        tokenizer: BERT's, with `[DEC]` and `[ENC]`.
        max_text_tokens: longer texts lose their end, but for [SEP].
        enc_token: whether a text that reads an image begins with `[ENC]`, as released; transformers' classes leave [CLS].
            May be set later.

    Attributes:
        vision_norm: none behind a ViT, which has its own. What reads a CNN's tokens is built with a `ChannelNorm` here.

    Raises:
        ValueError: a tokenizer without the tokens.
    """

    text_encoder: TextModel
    text_decoder: TextModel
    held_parts = frozenset({"text"})

    def __init__(
        self,
        *,
        vision: VisionEncoder,
        tokenizer: PreTrainedTokenizerBase,
        max_text_tokens: int,
        enc_token: bool = True,
    ) -> None:
        super().__init__()
        vocabulary = tokenizer.get_vocab()
        for token in BLIP_TOKENS:
            if token not in vocabulary:
                raise ValueError(f"the tokenizer has no {token}, which begins a text that reads an image; add it")
        self.vision = vision
        self.vision_norm = nn.Identity()
        self.tokenizer = tokenizer
        self.max_text_tokens = max_text_tokens
        self.enc_token = enc_token
        self.start_id: int = vocabulary[BLIP_TOKENS[0]]
        self.enc_id: int = vocabulary[BLIP_TOKENS[1]]

    @property
    def encode_id(self) -> int:
        """What a text that reads an image begins with."""
        return self.enc_id if self.enc_token else self.tokenizer.cls_token_id

    @property
    def device(self) -> torch.device:
        """That of the text models; all parts lie together."""
        return self.text_models()[0].word_embeddings.weight.device

    def tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """The text models'."""
        return {"text": self.tokenizer}

    def conventions(self) -> list[Any]:
        """Tokens of a text, and of its beginning where it reads an image or is written."""
        return [self.token_ids(["A word."]), self.max_text_tokens, self.start_id, self.encode_id]

    def structure(self) -> dict[str, PartStructure]:
        """The vision encoder may be sharded; the text models are small."""
        blocks = [layer for model in self.text_models() for layer in model.layers]
        known = {"vision": self.vision_structure(), "text": PartStructure(blocks)}
        return known | {part: PartStructure() for part in self.PARTS.keys() - known.keys()}

    @property
    def _read_dtype(self) -> torch.dtype:
        return self.text_models()[0].norm.weight.dtype

    def uses_every_weight(self, wanted: Collection[str]) -> bool:
        """Where the vision encoder is frozen: it may end early."""
        return self.full_parts == self.trained_parts <= {"text"} and self._every_task() <= set(wanted)

    def _every_task(self) -> frozenset[str]:
        """Outputs that together need all weights of the text models and their heads."""
        return self.OUTPUTS

    def text_models(self) -> list[TextModel]:
        """Encoder and decoder, or whichever it has."""
        names = ("text_encoder", "text_decoder")
        return [model for name in names if isinstance(model := getattr(self, name, None), TextModel)]

    def _written(
        self,
        decoder: TextModel,
        prompt: Sequence[int],
        answers: Sequence[Sequence[int]],
        source_BPU: Tensor,
        source_mask_BP: Tensor | None = None,
    ) -> Tensor:
        """Logits (S, V), in float32, of each token of each answer behind the prompt; source, answer: one each."""
        ids_BT, mask_BT = self.padded([[*prompt, *answer] for answer in answers])
        states_BTD = decoder(ids_BT, mask_BT, source_BPU, source_mask_BP, causal=True)
        predicting = mask_BT[:, len(prompt) :].bool()
        return decoder.logits(states_BTD[:, len(prompt) - 1 : -1][predicting]).float()

    def _decoded(
        self,
        decoder: TextModel,
        start_BT: Tensor,
        source_BPU: Tensor,
        source_mask_BP: Tensor | None,
        decoding: Decoding,
    ) -> Tensor:
        """Start and new tokens (B, T), by `decoding.decode`."""
        source = decoder.keys_values(source_BPU)  # once, for all beams and steps
        places = decoder.max_text_tokens - start_BT.shape[1]

        def step(new_RT: Tensor, cache: KeyValueCache) -> Tensor:
            states_RTD = decoder(new_RT, torch.ones_like(new_RT), source, source_mask_BP, causal=True, cache=cache)
            return decoder.logits(states_RTD[:, -1])

        return decode(
            step,
            start_BT,
            KeyValueCache(),
            replace(decoding, max_new_tokens=min(decoding.max_new_tokens, places)),
            eos_id=self.tokenizer.sep_token_id,
            pad_id=self.tokenizer.pad_token_id,
            on_ids=on_ids(decoding.on_text, self._texts),
        )


class _Captioner(BLIP):
    """A model whose decoder writes captions behind a prompt.

    Attributes:
        prompt: begins every caption, in training and in generation; it is given, not learnt.
    """

    DECODING = Decoding(num_beams=3, max_new_tokens=16, top_p=0.9)
    prompt: str

    @property
    def decoder(self) -> TextModel:
        """The text model that writes."""
        return self.text_decoder

    def conventions(self) -> list[Any]:
        """Those of all, and the prompt."""
        return [*super().conventions(), self.caption_start()]

    def prepare(self, samples: Samples) -> Inputs:
        """Answers are the captions' tokens behind the prompt, with [SEP]; too long ones lose their end."""
        sizes = len(samples.images), len(samples.targets)
        if len(set(sizes)) > 1:
            raise ValueError(f"{sizes[0]} images and {sizes[1]} captions do not make pairs")
        return self._prepared(samples, self.caption_ids(samples.targets))

    def caption_ids(self, captions: Sequence[str]) -> list[list[int]]:
        """The captions' tokens behind the prompt, with [SEP] at their end."""
        prompt = len(self.caption_start())
        return [ids[prompt:] for ids in self.token_ids([self.prompt + caption for caption in captions])]

    def sample_length(self) -> Callable[[str, str, int], int]:
        """A picklable function: tokens of prompt and caption, from its (prompt, target, frames)."""
        return partial(_caption_length, self.tokenizer, self.max_text_tokens, self.prompt)

    def caption_start(self) -> list[int]:
        """What every caption begins with: [DEC] and the prompt's tokens."""
        return self._prompt_ids(self.prompt)

    def caption_logits(self, tokens_BPU: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
        """Logits (S, V), in float32, of each token of each caption behind the prompt."""
        return self._written(self.decoder, self.caption_start(), answers, tokens_BPU)

    @torch.inference_mode()
    @shows_options(DECODING, repetition_penalty=None)
    def generate(
        self, images: Images, prompts: Sequence[str] | None = None, **options: Unpack[DecodingOptions]
    ) -> list[str]:
        """Caption each image; the returned text does not hold the prompt.

        The defaults are the released ones: 20 and 5 tokens at most and at least, which count the 4 of the prompt "[DEC] a
        picture of"; `repetition_penalty`, left out or None, 1.1 where tokens are drawn, else 1.

        Args:
            images: B pictures, or their image tokens.
            prompts: beginnings of the B captions in place of `prompt`; "" begins with [DEC] alone, as transformers does.
            options: of `arguments.Decoding`, which says what they are; sampling draws one text, whatever `num_beams`.

        Raises:
            ValueError: a wrong argument by its name, before anything is computed.
        """
        count = check_images(images)
        if prompts is not None:
            check_texts("prompts", prompts, count)
        if options.get("repetition_penalty") is None:
            options["repetition_penalty"] = 1.1 if options.get("do_sample") else 1.0
        decoding = self.DECODING.given(options, count, draws_one=True)
        starts = [self._prompt_ids(text) for text in ([self.prompt] * count if prompts is None else prompts)]
        self._check_room("prompts", starts)
        tokens_BPU = self.normalised(self.image_tokens(images))
        found = [""] * count
        for rows in _of_equal_length(starts):  # no row is padded in front of what it writes
            start_NT = torch.tensor([starts[row] for row in rows], device=self.device)
            ids_NT = self._decoded(self.decoder, start_NT, tokens_BPU[rows], None, decoding.of_rows(rows))
            for row, text in zip(rows, self._texts(ids_NT[:, start_NT.shape[1] :]), strict=True):
                found[row] = text
        return found

    def _check_room(self, name: str, rows: Sequence[Sequence[int]]) -> None:
        limit = self.decoder.max_text_tokens
        for number, ids in enumerate(rows):
            if len(ids) >= limit:
                raise ValueError(
                    f"{name}[{number}] has {len(ids)} tokens; the text model has {limit} places: shorten it"
                )

    def _prompt_ids(self, prompt: str) -> list[int]:
        """Those that a caption begins with: of the prompt, [DEC] in the place of [CLS], without [SEP]."""
        return [self.start_id, *self.tokenizer(prompt)["input_ids"][1:-1]]


class BLIPCaption(_Captioner):
    """A vision encoder and an image-grounded decoder: it writes captions.

    Outputs by name: `answer_logits` (S, V), for each token of each caption behind the prompt, sample after sample, in
    float32.

    Args:
        vision, tokenizer, max_text_tokens: see `BLIP`; 40 tokens as released, those of the prompt included.
        text_decoder: with a language-model head; it reads image tokens.
        prompt: begins every caption.
        trained: the parts that train; the others are frozen.

    Raises:
        ValueError: a tokenizer without the start tokens, a decoder without a head, a prompt that leaves no room.
    """

    PARTS = {"vision": ("vision",), "text": ("vision_norm", "text_decoder")}  # noqa: RUF012
    OUTPUTS = ANSWERS
    SKILLS = frozenset({"caption"})

    def __init__(
        self,
        *,
        vision: VisionEncoder,
        text_decoder: TextModel,
        tokenizer: PreTrainedTokenizerBase,
        max_text_tokens: int = 40,
        prompt: str = CAPTION_PROMPT,
        trained: Collection[str] = ("vision", "text"),
    ) -> None:
        super().__init__(vision=vision, tokenizer=tokenizer, max_text_tokens=max_text_tokens)
        _check_writes(text_decoder)
        self.text_decoder = text_decoder
        self.prompt = prompt
        if len(self.caption_start()) >= max_text_tokens:
            raise ValueError(f"the prompt {prompt!r} fills all {max_text_tokens} tokens of a caption; shorten it")
        self.choose_trained(trained)

    @property
    def title(self) -> str:
        """BLIP for captions."""
        return "BLIP for captions"

    def forward(self, inputs: Inputs, wanted: Collection[str], *, packed: bool = False) -> Outputs:
        """See the class for the outputs."""
        self._check_forward(packed)
        tokens_BPU = self.normalised(self.image_tokens(inputs.images, inputs.pixel_ids))
        tensors = {"answer_logits": self.caption_logits(tokens_BPU, inputs.answers)}
        text = sum(map(len, inputs.answers)) + len(inputs) * len(self.caption_start())
        return Outputs({name: tensors[name] for name in wanted}, PassWorkload(text=text))


class BLIPVQA(BLIP):
    """A vision encoder, an encoder that reads the question in the light of the image, a decoder that reads its states.

    Outputs by name: `answer_logits` (S, V), for each token of each answer, sample after sample, in float32.

    Args:
        vision, tokenizer, enc_token: see `BLIP`.
        text_encoder: of questions; it reads image tokens.
        text_decoder: of answers, with a language-model head; it reads the states of the questions.
        max_text_tokens: of a question, 35 as released.
        trained: the parts that train; the others are frozen.

    Raises:
        ValueError: a tokenizer without the start tokens, a decoder without a head.
    """

    PARTS = {"vision": ("vision",), "text": ("vision_norm", "text_encoder", "text_decoder")}  # noqa: RUF012
    OUTPUTS = ANSWERS
    SKILLS = frozenset({"rank", "generate"})
    DECODING = Decoding(num_beams=3, max_new_tokens=9, min_new_tokens=0, top_p=0.9)
    RELEASED_RANKING = {"label_smoothing": 0.1, "preselect": 128}  # noqa: RUF012

    def __init__(
        self,
        *,
        vision: VisionEncoder,
        text_encoder: TextModel,
        text_decoder: TextModel,
        tokenizer: PreTrainedTokenizerBase,
        max_text_tokens: int = 35,
        enc_token: bool = True,
        trained: Collection[str] = ("vision", "text"),
    ) -> None:
        super().__init__(vision=vision, tokenizer=tokenizer, max_text_tokens=max_text_tokens, enc_token=enc_token)
        _check_writes(text_decoder)
        self.text_encoder = text_encoder
        self.text_decoder = text_decoder
        self.choose_trained(trained)

    @property
    def title(self) -> str:
        """BLIP for questions."""
        return "BLIP for visual question answering"

    def prepare(self, samples: Samples) -> Inputs:
        """Answers end with [SEP], all of a question where they are given; questions are tokenised in `forward`."""
        sizes = len(samples.images), len(samples.instructions), len(samples.targets)
        if len(set(sizes)) > 1:
            raise ValueError(f"{sizes[0]} images, {sizes[1]} questions and {sizes[2]} answers do not make samples")
        answers = samples.answers or [[(target, 1.0)] for target in samples.targets]
        inputs = self._prepared(samples, self.answer_ids([text for given in answers for text, _ in given]))
        weights = [weight for given in answers for _, weight in given]
        return replace(inputs, answer_counts=list(map(len, answers)), answer_weights=weights)

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """The answers' tokens as the decoder learns them, with [SEP] at their end."""
        return [ids[1:] for ids in self.token_ids(answers, self.text_decoder.max_text_tokens)]

    def sample_length(self) -> Callable[[str, str, int], int]:
        """A picklable function: tokens of question and answer, from its (prompt, target, frames)."""
        return partial(_question_length, self.tokenizer, self.max_text_tokens)

    def forward(self, inputs: Inputs, wanted: Collection[str], *, packed: bool = False) -> Outputs:
        """See the class for the outputs."""
        self._check_forward(packed)
        states_BTD, mask_BT = self.encode_questions(self.image_tokens(inputs.images, inputs.pixel_ids), inputs.prompts)
        work = PassWorkload(text=int(mask_BT.sum()), positions=sum(map(len, inputs.answers)))
        if inputs.answer_counts:
            counts_B = torch.tensor(inputs.answer_counts, device=self.device)
            states_BTD, mask_BT = (rows.repeat_interleave(counts_B, dim=0) for rows in (states_BTD, mask_BT))
        logits_SV = self._written(self.text_decoder, [self.start_id], inputs.answers, states_BTD, mask_BT)
        tensors = {"answer_logits": logits_SV}
        return Outputs({name: tensors[name] for name in wanted}, work)

    def encode_questions(self, tokens_B1PU: Tensor, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (B, T, D) of questions in the light of their images, and their mask (B, T)."""
        ids_BT, mask_BT = self.padded([[self.encode_id, *ids[1:]] for ids in self.token_ids(questions)])
        return self.text_encoder(ids_BT, mask_BT, self.normalised(tokens_B1PU)), mask_BT

    @torch.inference_mode()
    @shows_options(DECODING)
    def generate(
        self,
        images: Images,
        prompts: Sequence[str],
        *,
        attend_padding: bool = False,
        **options: Unpack[DecodingOptions],
    ) -> list[str]:
        """Answer each question freely; the defaults are the released ones, whose length limits count the start token.

        Args:
            images: B pictures, or their image tokens.
            prompts: B questions.
            attend_padding: the decoder reads a question's padding too, as the released code's does when it generates: the
                answer then depends on the batch's longest question.
            options: of `arguments.Decoding`, which says what they are; sampling draws one text, whatever `num_beams`.

        Raises:
            ValueError: a wrong argument by its name, before anything is computed.
        """
        count = check_images(images)
        check_texts("prompts", prompts, count)
        decoding = self.DECODING.given(options, count, draws_one=True)
        states_BTD, mask_BT = self.encode_questions(self.image_tokens(images), prompts)
        start_B1 = torch.full((count, 1), self.start_id, device=self.device)
        mask = None if attend_padding else mask_BT
        return self._texts(self._decoded(self.text_decoder, start_B1, states_BTD, mask, decoding)[:, 1:])

    @torch.inference_mode()
    def rank(
        self,
        images: Images,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        *,
        normalize: str = "sum",
        include_eos: bool = True,
        label_smoothing: float = 0.0,
        preselect: int | None = None,
        token_budget: int = TOKEN_BUDGET,
    ) -> list[Tensor]:
        """Log-likelihood (nats) of every candidate answer: one float32 tensor a sample, in the candidates' order.

        Args:
            images: B pictures, or their image tokens.
            prompts: B questions.
            candidates: B lists, of any lengths.
            normalize: `sum` over a candidate's tokens, or their `mean`.
            include_eos: count [SEP], without which a candidate that begins another always wins over it.
            label_smoothing: share of each token's likelihood that is taken evenly from the whole vocabulary. The released
                score is the training loss, with 0.1.
            preselect: rank only so many candidates, those whose first token is the likeliest, the first of equals; the
                others get -inf. 128 as released.
            token_budget: tokens that one pass through the decoder may hold; bounds memory, changes no score.

        Raises:
            ValueError: a wrong argument, by its name, before anything is computed.
        """
        count = check_images(images)
        check_texts("prompts", prompts, count)
        check_candidates(candidates, count)
        check_choice("normalize", normalize, ("sum", "mean"))
        check_counts(
            {"token_budget": token_budget} | ({} if preselect is None else {"preselect": preselect}), at_least=1
        )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing!r}; give a share of at least 0 and below 1")
        lists, list_of = deduplicated([tuple(texts) for texts in candidates])
        ids = [self.answer_ids(texts) for texts in lists]
        if not include_eos:
            ids = [[tokens[:-1] for tokens in rows] for rows in ids]
        if not all(tokens for rows in ids for tokens in rows):
            raise ValueError("candidates holds a text without tokens; set include_eos=True, or leave it out")
        states_BTD, mask_BT = self.encode_questions(self.image_tokens(images), prompts)
        first_BV = None if preselect is None else self._first_log_probs(states_BTD, mask_BT)
        scores = []
        for row, number in enumerate(list_of):
            kept = list(range(len(ids[number])))
            if first_BV is not None and preselect is not None:
                first_A = first_BV[row, [tokens[0] for tokens in ids[number]]]
                kept = first_A.sort(descending=True, stable=True).indices[:preselect].tolist()
            found = torch.full((len(ids[number]),), -torch.inf)
            question = states_BTD[row : row + 1], mask_BT[row : row + 1]
            own = [ids[number][place] for place in kept]
            found[kept] = self._scores(*question, own, normalize, label_smoothing, token_budget)
            scores.append(found)
        return scores

    def _first_log_probs(self, states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Log-probabilities (B, V) of an answer's first token."""
        start_B1 = torch.full((len(states_BTD), 1), self.start_id, device=self.device)
        first_B1D = self.text_decoder(start_B1, torch.ones_like(start_B1), states_BTD, mask_BT, causal=True)
        return self.text_decoder.logits(first_B1D[:, 0]).float().log_softmax(dim=1)

    def _scores(
        self,
        states_1TD: Tensor,
        mask_1T: Tensor,
        answers: Sequence[Sequence[int]],
        normalize: str,
        label_smoothing: float,
        token_budget: int,
    ) -> Tensor:
        """Scores of one question's answers, those of like length together."""
        source, scores = self.text_decoder.keys_values(states_1TD), torch.empty(len(answers))
        for group in length_groups([len(tokens) for tokens in answers], token_budget):
            rows = [answers[place] for place in group]
            ids_RT, tokens_RT = self.padded([[self.start_id, *row[:-1]] for row in rows])
            hidden_RTD = self.text_decoder(ids_RT, tokens_RT, source, mask_1T, causal=True)
            targets_S = torch.tensor([token for row in rows for token in row], device=self.device)
            losses_S = self._losses(hidden_RTD[tokens_RT.bool()], targets_S, label_smoothing)
            for place, losses_T in zip(group, losses_S.split([len(row) for row in rows]), strict=True):
                scores[place] = -(losses_T.sum() if normalize == "sum" else losses_T.mean())
        return scores

    def _losses(self, hidden_SD: Tensor, targets_S: Tensor, label_smoothing: float) -> Tensor:
        parts = zip(hidden_SD.split(_LOGIT_ROWS), targets_S.split(_LOGIT_ROWS), strict=True)
        return torch.cat(
            [
                F.cross_entropy(
                    self.text_decoder.logits(hidden_ND).float(),
                    targets_N,
                    reduction="none",
                    label_smoothing=label_smoothing,
                )
                for hidden_ND, targets_N in parts
            ]
        ).cpu()


class Momentum(nn.Module):
    """A slowly moving copy of what contrast compares, and the features that it gave last (BLIP, section 3.2; MoCo).

    It never trains, so its passes are those of evaluation; the released code draws dropout there, too.

    Args:
        vision, text_encoder, vision_projection, text_projection: what is copied.
        queue_size: K, pairs whose features are kept.

    Attributes:
        image_queue, text_queue: (E, K), unit length; drawn at random before the first pair.
        image_id_queue: (1, K), numbers of the images; -100 before the first.
        pointer: (1,), the place of the oldest pair, which the next one takes.
    """

    COPIED = ("vision", "text_encoder", "vision_projection", "text_projection")
    image_queue: Tensor
    text_queue: Tensor
    image_id_queue: Tensor
    pointer: Tensor

    def __init__(
        self,
        vision: VisionEncoder,
        text_encoder: TextModel,
        vision_projection: nn.Linear,
        text_projection: nn.Linear,
        queue_size: int,
    ) -> None:
        super().__init__()
        self.vision = copy.deepcopy(vision)
        self.text_encoder = _reading_half(text_encoder)
        self.vision_projection = copy.deepcopy(vision_projection)
        self.text_projection = copy.deepcopy(text_projection)
        width = vision_projection.out_features
        self.register_buffer("image_queue", F.normalize(torch.randn(width, queue_size), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(width, queue_size), dim=0))
        self.register_buffer("image_id_queue", torch.full((1, queue_size), -100))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        self.requires_grad_(False)

    @torch.no_grad()
    def copy_from(self, model: "BLIPRetrieval") -> None:
        """Take the model's weights as they are, for a start."""
        for own, theirs in self.pairs(model):
            own.copy_(theirs)

    @torch.no_grad()
    def enqueue(self, image_NE: Tensor, text_NE: Tensor, image_ids_N: Tensor) -> None:
        """Put the pairs of a global batch in the place of the oldest ones, around the end where it is reached."""
        size, count = self.image_queue.shape[1], len(image_NE)
        # Of more pairs than there are places the last ones stay.
        kept = torch.arange(max(0, count - size), count, device=self.pointer.device)
        places = (self.pointer + kept) % size
        self.image_queue[:, places] = image_NE[kept].T.to(self.image_queue.dtype)
        self.text_queue[:, places] = text_NE[kept].T.to(self.text_queue.dtype)
        self.image_id_queue[0, places] = image_ids_N[kept]
        self.pointer.copy_((self.pointer + count) % size)

    def pairs(self, model: "BLIPRetrieval") -> Iterator[tuple[Tensor, Tensor]]:
        """Each weight of the copies, and the model's."""
        for child in self.COPIED:
            theirs = dict(getattr(model, child).named_parameters())
            yield from ((own, theirs[name]) for name, own in getattr(self, child).named_parameters())


class BLIPRetrieval(PairModel, BLIP):
    """A vision encoder and an encoder that reads texts alone and in the light of images: it contrasts and matches.

    Outputs by name: `image_projected` (B, 1, E) and `text_projected` (B, E), unit length, and `temperature` (), which their
    scalar products are divided by; `image_projected_m` and `text_projected_m`, the same of the momentum copies, without
    gradient; `image_queue`, `text_queue` and `image_id_queue`, see `Momentum`; `match_logits` (3, B, 2): no match, match, of
    each sample's own pair, of its text with its partner's image, of its image with its partner's text. Logits are float32.

    Args:
        vision, tokenizer, max_text_tokens, enc_token: see `BLIP`; 35 tokens as released.
        text_encoder: it reads image tokens.
        feature_width: E.
        temperature: starting value of what similarities are divided by.
        queue_size: K, pairs whose momentum features are kept; None: no momentum copies, for a model that is not trained.
        trained: the parts that train; the others are frozen.

    Raises:
        ValueError: a tokenizer without the start tokens.
    """

    PARTS = {  # noqa: RUF012
        "vision": ("vision",),
        "text": ("vision_norm", "text_encoder", *_HEADS),
        "momentum": ("momentum",),
    }
    held_parts = frozenset({"text", "momentum"})
    OUTPUTS = QUEUED_PAIRS
    SKILLS = frozenset({"retrieve", "match"})
    FOLLOWERS = frozenset({"momentum"})
    copy_momentum = 0.995  # as released

    def __init__(
        self,
        *,
        vision: VisionEncoder,
        text_encoder: TextModel,
        tokenizer: PreTrainedTokenizerBase,
        feature_width: int = 256,
        max_text_tokens: int = 35,
        enc_token: bool = True,
        temperature: float = 0.07,
        queue_size: int | None = None,
        trained: Collection[str] = ("vision", "text"),
    ) -> None:
        super().__init__(vision=vision, tokenizer=tokenizer, max_text_tokens=max_text_tokens, enc_token=enc_token)
        self.text_encoder = text_encoder
        self._add_heads(vision.width, text_encoder.width, feature_width, temperature)
        self.momentum: nn.Module = nn.Identity()
        if queue_size is not None:
            copied = vision, text_encoder, self.vision_projection, self.text_projection
            self.momentum = Momentum(*copied, queue_size)
        self.choose_trained(trained)

    @property
    def title(self) -> str:
        """BLIP for retrieval."""
        return "BLIP for retrieval"

    @property
    def _longest_text(self) -> int:
        return self.text_encoder.max_text_tokens

    @property
    def queue_size(self) -> int | None:
        """K; None without momentum copies."""
        return self.momentum.image_queue.shape[1] if isinstance(self.momentum, Momentum) else None

    def fixed_parameters(self) -> Iterator[nn.Parameter]:
        """The momentum copies, which follow and never learn."""
        return self.momentum.parameters()

    def copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of the momentum encoders."""
        return self.momentum.pairs(self) if isinstance(self.momentum, Momentum) else iter(())

    def remember(self, rows: Mapping[str, Tensor], image_ids_N: Tensor) -> None:
        """Momentum features join the queue."""
        if "image_projected_m" in rows and isinstance(self.momentum, Momentum):
            self.momentum.enqueue(rows["image_projected_m"][:, 0], rows["text_projected_m"], image_ids_N)

    def sample_length(self) -> Callable[[str, str, int], int]:
        """A picklable function: tokens of a sample's text, from its (prompt, target, frames)."""
        return partial(_caption_length, self.tokenizer, self.max_text_tokens, "")

    def forward(self, inputs: Inputs, wanted: Collection[str], *, packed: bool = False) -> Outputs:
        """See the class for the outputs. `match_logits` needs partners."""
        self._check_forward(packed)
        ids_BT, mask_BT = self._texts_of(inputs.answers)
        tensors = {"temperature": self._bounded_temperature()}
        if {"image_projected_m", "text_projected_m"} & set(wanted):
            tensors |= self._momentum_features(inputs.images, ids_BT, mask_BT)
        if queues := [name for name in ("image_queue", "text_queue", "image_id_queue") if name in wanted]:
            tensors |= {name: getattr(self._copies(), name) for name in queues}
        if "text_projected" in wanted:
            tensors["text_projected"] = self.encode_texts(ids_BT, mask_BT).projected_BE
        if {"image_projected", "match_logits", "answer_logits"} & set(wanted):
            tensors |= self._image_outputs(inputs, wanted)
        return Outputs({name: tensors[name] for name in wanted}, PassWorkload(text=int(mask_BT.sum())))

    def _image_outputs(self, inputs: Inputs, wanted: Collection[str]) -> dict[str, Tensor]:
        image = self.encode_images(self.image_tokens(inputs.images, inputs.pixel_ids))
        tensors = {"image_projected": image.projected_BQE}
        if "match_logits" in wanted:
            tensors["match_logits"] = self._match_logits(image.tokens_BPU, inputs)
        return tensors | self._further_outputs(image.tokens_BPU, inputs, wanted)

    def _further_outputs(self, image_BPU: Tensor, inputs: Inputs, wanted: Collection[str]) -> dict[str, Tensor]:
        """What a kind of this model gives besides."""
        return {}

    def _bounded_temperature(self) -> Tensor:
        if self.training and not self.temperature.requires_grad:
            return self.temperature.clamp(*TEMPERATURES)  # what is frozen stays as it is
        if self.training:
            with torch.no_grad():
                self.temperature.clamp_(*TEMPERATURES)
        # Not the parameter itself: DDP looks for what is used by walking back from the outputs.
        return self.temperature.clone()

    def _copies(self) -> Momentum:
        if not isinstance(self.momentum, Momentum):
            raise ValueError(f"{self.title} was built without momentum copies: queue_size")
        return self.momentum

    @torch.no_grad()
    def _momentum_features(self, images: Images, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
        copies = self._copies()
        if isinstance(images, Tensor) and images.dtype != torch.uint8:
            tokens_B1PU = images.to(self.device)  # of a feature cache: the encoder is frozen, and its copy is its like
        else:
            frames = as_frames(images, self.vision.image_size).to(self.device)
            tokens_B1PU = copies.vision(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        image = _projected(copies.vision_projection, self._gathered(self.normalised(tokens_B1PU)))
        text = _projected(copies.text_projection, copies.text_encoder(ids_BT, mask_BT))
        return {"image_projected_m": image[:, None], "text_projected_m": text}

    def _every_task(self) -> frozenset[str]:
        return frozenset({"image_projected", "text_projected", "temperature", "match_logits"})

    def encode_images(self, tokens_B1PU: Tensor) -> ImageOutputs:
        """Image tokens (B, 1, P, U) as `image_tokens` gives them, and the projection of what stands for them all.

        Raises:
            ValueError: clips of several frames.
        """
        tokens_BPU = self.normalised(tokens_B1PU)
        projected_BE = _projected(self.vision_projection, self._gathered(tokens_BPU))
        return ImageOutputs(tokens_BPU, tokens_BPU, projected_BE[:, None])

    def _gathered(self, tokens_BPU: Tensor) -> Tensor:
        """What stands for the image: its [CLS] in front, or the mean of the tokens where the encoder has none."""
        return tokens_BPU if self.vision.class_token else tokens_BPU.mean(dim=1, keepdim=True)

    def encode_texts(self, ids_BT: Tensor, mask_BT: Tensor) -> TextOutputs:
        """Text alone."""
        text_BTD = self.text_encoder(ids_BT, mask_BT)
        return TextOutputs(text_BTD, _projected(self.text_projection, text_BTD))

    def encode_pairs(
        self, tokens_NPU: Tensor, ids_BT: Tensor, mask_BT: Tensor, image_rows_B: Tensor | None = None
    ) -> PairOutputs:
        """Texts in the light of their images; the first token's state tells a match. Arguments as of `PairModel`."""
        ids_BT = torch.cat([torch.full_like(ids_BT[:, :1], self.encode_id), ids_BT[:, 1:]], dim=1)
        text_BTD = self.text_encoder(ids_BT, mask_BT, tokens_NPU, source_rows_R=image_rows_B)
        return PairOutputs(text_BTD, self.matching_head(text_BTD[:, 0]))

    def _cosines(self, image_BQE: Tensor, text_BE: Tensor) -> Tensor:
        return (image_BQE[:, 0] * text_BE).sum(dim=1)


class BLIPPretrain(BLIPRetrieval, _Captioner):
    """What all tasks start from: it contrasts, matches and writes with one text model.

    Encoder and decoder are one but for their self-attention (`decoder_attention`). Outputs are those of `BLIPRetrieval` and
    `answer_logits` (S, V), for each token of each text behind [DEC], sample after sample, in float32.

    Args:
        text_encoder: encoder and decoder in one, with a language-model head.
        max_text_tokens: 30 as released.
        others: see `BLIPRetrieval`.

    Raises:
        ValueError: a tokenizer without the start tokens, a text model without a head.
    """

    OUTPUTS = PRETRAINING
    SKILLS = frozenset({"retrieve", "match", "caption"})
    prompt = ""  # pre-training knows none

    def __init__(self, *, text_encoder: TextModel, max_text_tokens: int = 30, **others: Any) -> None:
        _check_writes(text_encoder)
        super().__init__(text_encoder=text_encoder, max_text_tokens=max_text_tokens, **others)

    @property
    def title(self) -> str:
        """BLIP's pre-training."""
        return "BLIP's pre-training model"

    @property
    def decoder(self) -> TextModel:
        """The one text model."""
        return self.text_encoder

    def _further_outputs(self, image_BPU: Tensor, inputs: Inputs, wanted: Collection[str]) -> dict[str, Tensor]:
        return {"answer_logits": self.caption_logits(image_BPU, inputs.answers)} if "answer_logits" in wanted else {}

    def _every_task(self) -> frozenset[str]:
        return super()._every_task() | {"answer_logits"}


def _reading_half(text_model: TextModel) -> TextModel:
    """A copy without what only a decoder needs."""
    half = copy.deepcopy(text_model)
    half.lm_head = None
    for layer in half.layers:
        assert isinstance(layer, TextLayer)
        layer.decoder_attention = None
    return half


def _projected(projection: nn.Linear, states_BTD: Tensor) -> Tensor:
    """The first token's state, which stands for them all, projected to unit length: (B, E)."""
    return F.normalize(projection(states_BTD[:, 0]), dim=-1)


def _of_equal_length(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """The places of sequences, those of one length together."""
    places: dict[int, list[int]] = {}
    for place, sequence in enumerate(sequences):
        places.setdefault(len(sequence), []).append(place)
    return list(places.values())


def _check_writes(decoder: TextModel) -> None:
    if decoder.lm_head is None:
        raise ValueError("a text model that writes needs a language-model head")


def _caption_length(
    tokenizer: PreTrainedTokenizerBase, limit: int, beginning: str, prompt: str, target: str, frames: int
) -> int:
    return min(len(tokenizer(beginning + target)["input_ids"]), limit)


def _question_length(tokenizer: PreTrainedTokenizerBase, limit: int, prompt: str, target: str, frames: int) -> int:
    return min(len(tokenizer(prompt)["input_ids"]), limit) + len(tokenizer(target)["input_ids"])
