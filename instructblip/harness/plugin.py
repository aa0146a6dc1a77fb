"""The class that lmms-eval makes and asks; it is imported when the model of this name is wanted."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, unwrap_generation_output
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from lmms_eval.api.task import ConfigurableTask

import instructblip
from instructblip.errors import UserError
from instructblip.harness import NAME
from instructblip.harness.requests import MAX_NEW_TOKENS, Request, score_texts, write_answers
from instructblip.progress import progress_bar

Result = TypeVar("Result")


@register_model(NAME)
class InstructBLIPNative(lmms):
    """Any checkpoint that `instructblip.load` takes: `--model instructblip_native --model_args pretrained=SOURCE`.

    Args:
        pretrained: a run, a transformers folder, a hub id, a `.pth` of LAVIS.
        llm, llm_path, vision_path, qformer_path, adapter: as of `instructblip.load`.
        device: `auto` takes a GPU where there is one; of several processes each takes its own.
        batch_size: requests at a time; changes no answer.
        max_batch_size: of an automatic size, which there is none of here.
        max_new_tokens: of an answer whose task does not say it.
        include_eos: count the end of a text in its log-likelihood.

    Raises:
        UserError: as `instructblip.load`, or a batch size that is no number.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        llm: str | None = None,
        llm_path: str | None = None,
        vision_path: str | None = None,
        qformer_path: str | None = None,
        adapter: str | None = None,
        device: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        include_eos: bool = False,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size is {batch_size!r}; give a number of requests, 1 or more")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        parts = {"llm": llm, "llm_path": llm_path, "vision_path": vision_path, "qformer_path": qformer_path}
        place = _own_device(device, self.accelerator)
        self.model = instructblip.load(pretrained, adapter=adapter, device=place, **parts)
        self.device = self.model.device
        self._max_new_tokens, self._include_eos = int(max_new_tokens), include_eos

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """The text that the model writes for each request: see `write_answers`."""
        return self._asked(write_answers, "answers", requests, max_new_tokens=self._max_new_tokens)

    def loglikelihood(self, requests: Sequence[Request]) -> list[Any]:
        """Log-likelihood of each request's text, and whether it is the greedy one: see `score_texts`.

        Of the texts of a multiple choice lmms-eval takes the one with the smallest value, as its models return losses: these
        get the negative. Version 0.7.3 turns a pair into a text, but for one in the wrapper of generated texts.
        """
        sign = -1.0 if takes_smallest() else 1.0
        found = self._asked(score_texts, "log-likelihoods", requests, include_eos=self._include_eos)
        pairs = [
            (score if callable(request.args[1]) else sign * score, greedy)
            for request, (score, greedy) in zip(requests, found, strict=True)
        ]
        kept = all(unwrap_generation_output(pair)[0] == pair for pair in pairs[:1])
        return list(pairs) if kept else [GenerationResult(pair) for pair in pairs]  # type: ignore[arg-type, unused-ignore]

    def generate_until_multi_round(self, requests: Sequence[Request]) -> list[str]:
        """Refused.

        Raises:
            UserError: the model answers one prompt.
        """
        raise UserError(f"{NAME} answers one prompt and holds no dialogue of several rounds; take other tasks")

    def _asked(
        self, ask: Callable[..., list[Result]], what: str, requests: Sequence[Request], **options: Any
    ) -> list[Result]:
        """What `ask` gives for the requests, with a progress bar on the first rank."""
        with progress_bar(what, show=self._rank == 0) as progress:
            bar = progress.add_task(f"{what} of {NAME}", total=len(requests))
            return ask(
                self.model,
                requests,
                self.task_dict,
                batch_size=self.batch_size,
                answered=lambda done: progress.advance(bar, done),
                **options,
            )


def takes_smallest() -> bool:
    """Whether this lmms-eval takes, of a multiple choice, the text with the smallest value; found by asking it."""
    config = SimpleNamespace(process_results=None)
    task = SimpleNamespace(
        OUTPUT_TYPE="multiple_choice",
        config=config,
        _metric_fn_list={"acc": None},
        multiple_input=0,
        multiple_target=0,
        doc_to_choice=lambda _: ["one", "two"],
        doc_to_target=lambda _: 0,
    )
    found: dict[str, Any] = ConfigurableTask.process_results(task, {}, [(-2.0, False), (-1.0, False)])
    return bool(found["acc"])


def _own_device(device: str, accelerator: Accelerator) -> str:
    """The GPU of a process's number, where there are several processes and GPUs; else as it was said."""
    if accelerator.num_processes == 1 or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return "cpu" if accelerator.num_processes > 1 and device == "auto" else device
    return f"cuda:{accelerator.local_process_index}"
