"""The work of `python -m instructblip.demo`."""

import importlib.util
import os
import signal
import tempfile
import threading
from functools import partial
from pathlib import Path

from rich.console import Console

from instructblip.config.schema import DemoConfig, LLMConfig
from instructblip.demo.asking import Subject
from instructblip.demo.examples import Example, examples_of_pictures, examples_of_run, find_pictures
from instructblip.demo.page import Page
from instructblip.errors import UserError
from instructblip.weights.load import LoadedModel, find_source, load_model

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def demo(config: DemoConfig, console: Console) -> None:
    """Show the page until a Ctrl-C. Uploaded pictures lie in a folder of their own, which goes with it.

    Raises:
        UserError: gradio is missing, nothing there that can be loaded, or an address that is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page is made with gradio, which is not installed; pip install -r requirements-demo.txt")
    given = [] if config.examples is None else find_pictures(Path(config.examples).expanduser())
    subjects = _load(config, console)
    with tempfile.TemporaryDirectory(prefix="instructblip-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when gradio is imported
        examples = examples_of_pictures(given, Path(folder)) if given else _examples(subjects, Path(folder))
        page = Page(subjects, examples, config)
        address, public = page.open()
        say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
        say(f"{address} shows {' and '.join(subject.label for subject in subjects)}; stop it with Ctrl-C")
        if config.host not in _LOOPBACK:
            say(f"whoever reaches {config.host} can use it")
        if public:
            say(f"{public} is open to everybody")
        try:
            _wait()
        finally:
            page.close()


def _wait() -> None:
    """Until a Ctrl-C or a request to end."""
    asked_to_end = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked_to_end.set())
    try:
        asked_to_end.wait()
    except KeyboardInterrupt:
        return


def _load(config: DemoConfig, console: Console) -> list[Subject]:
    """The checkpoints, found both before the first is loaded.

    Raises:
        UserError: as `find_source` and `load_model`.
    """
    wanted: list[tuple[str, LLMConfig | None, str | None]] = [(config.checkpoint, config.llm, config.adapter)]
    if config.beside is not None:
        wanted.append((config.beside, config.beside_llm, config.beside_adapter))
    elif config.beside_llm is not None or config.beside_adapter is not None:
        raise UserError("beside_llm and beside_adapter are of a second checkpoint; name it with beside=")
    sources = [find_source(checkpoint, llm) for checkpoint, llm, _ in wanted]
    paths = {"vision_path": config.vision_path, "qformer_path": config.qformer_path}
    loaded = []
    for source, (_, llm, adapter) in zip(sources, wanted, strict=True):
        given = {} if source.format == "huggingface" else paths  # which has all of its parts
        with console.status(f"loading {source.name}"):
            loaded.append(load_model(source, llm=llm, adapter=adapter, device=config.device, **given))
    return [Subject(model, label) for model, label in zip(loaded, _labels(loaded), strict=True)]


def _labels(loaded: list[LoadedModel]) -> list[str]:
    """Names, told apart where they are the same: by the adapter, by the step, or by their places."""
    names = [model.name for model in loaded]
    for mark in (_adapter, _step):
        if len(set(names)) < len(names):
            names = [name + mark(model) for name, model in zip(names, loaded, strict=True)]
    return names if len(set(names)) == len(names) else [f"{name} ({n})" for n, name in enumerate(names, start=1)]


def _adapter(model: LoadedModel) -> str:
    return f" with {Path(model.adapter).name}" if model.adapter else ""


def _step(model: LoadedModel) -> str:
    return f", step {model.step:,}" if model.step else ""


def _examples(subjects: list[Subject], folder: Path) -> list[Example]:
    """Of the first checkpoint that has any."""
    for subject in subjects:
        if found := examples_of_run(subject.loaded, folder):
            return found
    return []
