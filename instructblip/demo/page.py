"""The page: what stands where, and which button does what. Made with gradio, which is imported when a page is made.

Nothing on it is fetched from elsewhere, and nothing is reported to anybody.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instructblip.config.schema import DemoConfig
from instructblip.demo.asking import Ability, Subject
from instructblip.demo.buttons import Buttons
from instructblip.demo.examples import Example
from instructblip.errors import UserError

_FONTS = ["system-ui", "sans-serif"]  # gradio's own themes fetch theirs
_TURN = "model"  # requests of all buttons wait in one line
_TOKENS = 30  # of an answer, to begin with


class Page:
    """The page over some checkpoints.

    Args:
        subjects: one, or two side by side.
        examples: pictures to begin with.
        config: address, queue and limits.
    """

    def __init__(self, subjects: Sequence[Subject], examples: Sequence[Example], config: DemoConfig) -> None:
        self._gradio: Any = importlib.import_module("gradio")
        self._examples, self._config = examples, config
        self.buttons = Buttons(subjects, config.limits)
        self.blocks = self._layout()

    def open(self) -> tuple[str, str | None]:
        """Serve it; return its address and, where it is shared, its public one.

        Raises:
            UserError: the address is taken, or there is none like it.
        """
        theme = self._gradio.themes.Default(font=_FONTS, font_mono=["ui-monospace", "monospace"])
        self.blocks.queue(max_size=self._config.queue, api_open=False)
        try:
            _, local, public = self.blocks.launch(
                server_name=self._config.host,
                server_port=self._config.port,
                share=self._config.share,  # said in full: gradio also reads it from the environment
                max_file_size=self._config.limits.bytes,
                theme=theme,
                css_paths=[Path(__file__).parent / "page.css"],
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
            )
        except OSError as error:
            raise UserError(
                f"{self._config.host} and port={self._config.port} cannot be had ({error}); give another port, or none"
            ) from None
        return local, public

    def close(self) -> None:
        """End it."""
        self.blocks.close(verbose=False)

    # --- what stands where -------------------------------------------------------------------------------------------

    def _layout(self) -> Any:
        gr, buttons = self._gradio, self.buttons
        title = " and ".join(subject.label for subject in buttons.subjects)
        with gr.Blocks(title=title, analytics_enabled=False) as blocks:
            gr.HTML(buttons.header(), padding=False)
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    picture = self._picture()
                    prompt = self._prompt()
                    examples = self._show_examples()
                with gr.Column(scale=3, min_width=300), gr.Tabs():
                    candidates = None
                    if buttons.able("generate"):
                        with gr.Tab("Answer", elem_id="tab-answer"):
                            self._answer(picture, prompt)
                    if buttons.able("rank"):
                        with gr.Tab("Candidates", elem_id="tab-rank"):
                            candidates = self._rank(picture, prompt)
                    if buttons.able("attention"):
                        with gr.Tab("Attention", elem_id="tab-attention"):
                            self._look(picture, prompt)
                    if buttons.able("match"):
                        with gr.Tab("Match", elem_id="tab-match"):
                            self._match(picture)
            if examples is not None:
                self._fill_from(examples, [picture, prompt, *([candidates] if candidates is not None else [])])
        return blocks

    def _picture(self) -> Any:
        """A picture by upload, camera or the clipboard. It comes as a file, whatever is in it: reading it is bounded."""
        found = self._gradio.Image(
            label="Picture",
            type="filepath",
            image_mode=None,
            sources=["upload", "webcam", "clipboard"],
            height=320,
            elem_id="picture",
        )
        found.preprocess = lambda given: None if given is None else given.path
        return found

    def _prompt(self) -> Any:
        """A prompt, where a checkpoint reads one."""
        kinds = {subject.prompting for subject in self.buttons.subjects}
        label = "Prompt" if kinds <= {"must", "none"} else "Prompt (or none, for a caption)"
        return self._gradio.Textbox(label=label, lines=2, elem_id="prompt", visible=kinds != {"none"})

    def _answer(self, picture: Any, prompt: Any) -> None:
        gr, limits = self._gradio, self._config.limits
        with gr.Row():
            beams = gr.Slider(1, limits.beams, value=1, step=1, label="Beams (1: greedy)", elem_id="beams")
            most = min(_TOKENS, limits.new_tokens)
            tokens = gr.Slider(1, limits.new_tokens, value=most, step=1, label="New tokens at most", elem_id="tokens")
        with gr.Row():
            start = gr.Button("Ask", variant="primary", elem_id="ask")
            stop = gr.Button("Stop", scale=0, min_width=96, elem_id="stop")
        how = gr.HTML(self.buttons.how(1, most), padding=False, elem_id="how")
        wrong = gr.HTML(padding=False, elem_id="wrong-answer")
        answers = self._columns(
            "generate",
            lambda name, label: gr.Textbox(label=label, lines=3, interactive=False, buttons=["copy"], elem_id=name),
        )
        given = [picture, prompt, beams, tokens]
        for slider in (beams, tokens):
            slider.change(
                self.buttons.how, [beams, tokens], how, queue=False, show_progress="hidden", api_visibility="private"
            )
        events = [
            happens(self.buttons.answer, given, [wrong, *answers], **self._turn())
            for happens in (start.click, prompt.submit)
        ]
        stop.click(None, cancels=events, api_visibility="private")

    def _rank(self, picture: Any, prompt: Any) -> Any:
        gr = self._gradio
        candidates = gr.Textbox(label="Candidates, one a line", lines=5, max_lines=12, elem_id="candidates")
        normalize = gr.Radio(
            [("sum of its tokens", "sum"), ("mean of its tokens", "mean")],
            value="sum",
            label="A candidate's log-likelihood",
            elem_id="normalize",
        )
        start = gr.Button("Rank", variant="primary", elem_id="rank")
        self._connect("rank", self.buttons.rank, start.click, [picture, prompt, candidates, normalize])
        return candidates

    def _look(self, picture: Any, prompt: Any) -> None:
        gr = self._gradio
        query = gr.Slider(0, self.buttons.queries, value=0, step=1, label="Query (0: the mean of all)", elem_id="query")
        start = gr.Button("Show", variant="primary", elem_id="look")
        self._connect("attention", self.buttons.look, start.click, [picture, prompt, query], query.release)

    def _match(self, picture: Any) -> None:
        gr = self._gradio
        text = gr.Textbox(label="Text", lines=2, elem_id="text")
        start = gr.Button("Match", variant="primary", elem_id="match")
        self._connect("match", self.buttons.match, start.click, [picture, text], text.submit)

    def _show_examples(self) -> Any:
        """Pictures to click on; None where there are none."""
        if not self._examples:
            return None
        return self._gradio.Dataset(
            components=[self._gradio.Image(visible=False)],
            samples=[[str(example.picture)] for example in self._examples],
            type="index",
            layout="gallery",
            label="Examples",
            elem_id="examples",
        )

    def _fill_from(self, examples: Any, filled: list[Any]) -> None:
        """A click on an example gives the picture, its prompt and its candidates."""

        def fill(number: int) -> list[Any]:
            example = self._examples[number]
            return [str(example.picture), example.prompt, "\n".join(example.candidates)][: len(filled)]

        examples.click(fill, examples, filled, queue=False, show_progress="hidden", api_visibility="private")

    # --- what they share ---------------------------------------------------------------------------------------------

    def _connect(self, ability: Ability, work: Any, happens: Any, given: list[Any], *also: Any) -> None:
        """A place for what is wrong, one for each checkpoint, and the events that fill them."""
        wrong = self._gradio.HTML(padding=False, elem_id=f"wrong-{ability}")
        places = self._columns(ability, lambda name, label: self._gradio.HTML(padding=False, elem_id=name))
        for event in (happens, *also):
            event(work, given, [wrong, *places], **self._turn())

    def _columns(self, ability: Ability, make: Any) -> list[Any]:
        """A component for each checkpoint that is able, side by side with what the others say of it."""
        made = []
        with self._gradio.Row():
            for number, subject in enumerate(self.buttons.subjects):
                with self._gradio.Column(min_width=240):
                    if ability in subject.abilities:
                        made.append(make(f"{ability}-{number}", subject.label))
                    else:
                        self._gradio.HTML(self.buttons.lack(subject, ability), elem_id=f"{ability}-{number}")
        return made

    def _turn(self) -> dict[str, Any]:
        """One request at a time, of whatever button; none by the API of the page."""
        return {"concurrency_id": _TURN, "concurrency_limit": 1, "api_visibility": "private"}
