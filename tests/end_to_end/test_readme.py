"""README.md and docs/ keep their word: the set-up commands stand as agreed, all others run, every path named exists."""

import contextlib
import re
import shlex
import shutil
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from instructblip.config.entry import compose_config
from instructblip.config.schema import DemoConfig, TrainConfig
from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.data.synthetic import write_synthetic
from instructblip.demo import command as demo_command
from instructblip.models.adapters import Adapter
from instructblip.weights.__main__ import main as convert
from instructblip.weights.load import llm_config, load_model
from instructblip.weights.parts import load_llm, train_parts
from instructblip.weights.peft_format import peft_folders
from tests.kit.blip import write_blip
from tests.kit.blip2 import write_captioner, write_retrieval
from tests.kit.connectors import write_llava
from tests.kit.families import write_llm
from tests.kit.hub import hub
from tests.kit.own_data import write_own_data
from tests.kit.runs import REPOSITORY, SECONDS, World, run
from tests.kit.studies import shipped_study
from tests.kit.tiny import tiny_huggingface
from tests.kit.web import caption_web, web_pictures, write_web

SETUP = ("pip install -r requirements.txt && python train.py", "pip install -r requirements.txt && python -m pytest")
SCRIPTS = ("train.py", "evaluate.py", "prepare.py")
ENTRIES = tuple(f"python {script} " for script in SCRIPTS)
ALIGNED, BLIP = STAGES = ("python train.py experiment=align_demo", "python train.py experiment=blip_demo")
ONE_PHASE = ("~recipe.phases", "recipe.phases={short: {steps: 3, batch_size: 2, learning_rate: 1e-3}}")
SWEPT_PHASES = (  # key by key: a section that is given as a whole would replace what is swept
    "recipe.phases.alignment.steps=1",
    "recipe.phases.instruction.steps=1",
    "recipe.phases.instruction.batch_size=2",
    "recipe.final_samples=1",
    "recipe.validation_samples=1",
)
README = REPOSITORY / "README.md"
DOCUMENTS = (README, REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md")))
FEATURES, DEMO, CAPFILT, WEIGHTS, REPORTS, INSPECT, STUDIES, BENCHMARKS, ONE_TEST = KINDS = (
    "python -m instructblip.features ",
    "python -m instructblip.demo ",
    "python -m instructblip.capfilt ",
    "python -m instructblip.weights ",
    "python -m instructblip.evaluation.report.",
    "python -m instructblip.training.inspect ",
    "python -m instructblip.study ",
    "python benchmarks/",
    "python -m pytest ",
)


def bash_lines(markdown: str) -> list[str]:
    """The commands of every fenced bash block: comments dropped, continued lines joined."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", markdown, flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.join(words).replace("'&&'", "&&") for line in lines if (words := shlex.split(line, comments=True))]


LINES = [line for document in DOCUMENTS for line in bash_lines(document.read_text(encoding="utf-8"))]
FIVE_MINUTES = (
    (REPOSITORY / "docs/data.md").read_text(encoding="utf-8").partition("\n## Your own data in five minutes\n")[2]
).partition("\n## ")[0]
IN_ORDER = bash_lines(FIVE_MINUTES)  # which test_five_minutes.py runs one after the other
COMMANDS = list(dict.fromkeys(line for line in LINES if line not in SETUP and line not in IN_ORDER))


def commands(*kinds: str) -> list[str]:
    """Those that begin so."""
    return [line for line in COMMANDS if line.startswith(kinds)]


def test_the_set_up_commands_stand_as_agreed() -> None:
    assert [line for line in LINES if line.startswith("pip ")] == list(SETUP)
    assert set(SETUP) <= set(bash_lines(README.read_text(encoding="utf-8")))


def test_there_is_no_command_that_nobody_tries() -> None:
    tried = (*KINDS, *ENTRIES)
    assert [line for line in COMMANDS if not line.startswith(tried)] == []
    assert [kind for kind in tried if not commands(kind)] == []


def _write_published(folder: Path) -> None:
    """Tiny models by the names of published ones: a folder here goes before the hub's of that name."""
    tiny_huggingface(folder / "instructblip-vicuna-7b")
    write_retrieval(folder / "blip2-itm-vit-g")
    write_captioner(folder / "blip2-opt-2.7b")
    write_llava(folder.parent / "llava-hf/llava-1.5-7b-hf")
    for name, task in {"image-captioning-base": "caption", "vqa-base": "vqa", "itm-base-coco": "retrieval"}.items():
        write_blip(folder / f"blip-{name}", task)


@pytest.mark.slow
@pytest.mark.parametrize("line", commands(FEATURES))
def test_features_are_written(line: str, world: World, untrained_stage1: Path, tmp_path: Path) -> None:
    _, _, module, *arguments = shlex.split(line)
    given = dict(argument.split("=", 1) for argument in arguments)
    shutil.copytree(untrained_stage1, tmp_path / given["checkpoint"])
    (tmp_path / given["images"]).mkdir()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / given["images"] / "a.png")
    assert "1 pictures" in run(world, module, *arguments, cwd=tmp_path)
    assert (tmp_path / given["out"]).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("line", commands(DEMO))
def test_a_page_is_served(
    line: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio", reason="the page needs requirements-demo.txt")
    _, _, _, *arguments = shlex.split(line)
    _write_published(tmp_path / "Salesforce")
    shutil.copytree(finished_run, tmp_path / "outputs/train/demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # the command's own is put back
    pages: list[str] = []

    def visit() -> None:
        address = capsys.readouterr().out.split()[0]
        with urllib.request.urlopen(address, timeout=SECONDS) as answer:
            pages.append(answer.read().decode())

    monkeypatch.setattr(demo_command, "_wait", visit)
    demo_command.demo(compose_config("demo", DemoConfig, arguments), Console())
    assert "InstructBLIP of" in pages[0]


@pytest.mark.slow
@pytest.mark.parametrize("line", commands(CAPFILT))
def test_web_pictures_are_captioned(line: str, world: World, untrained_stage1: Path, tmp_path: Path) -> None:
    _, _, module, *arguments = shlex.split(line)
    given = dict(argument.split("=", 1) for argument in arguments)
    shutil.copytree(write_web(tmp_path / "web", web_pictures(3)), tmp_path / given["shards"])
    for model in ("captioner", "filter"):
        shutil.copytree(untrained_stage1, tmp_path / given[model])
    # Which matches nothing for sure, since it was never trained.
    printed = run(world, module, *arguments, "threshold=0", "max_new_tokens=9", cwd=tmp_path)
    assert "3 pictures: 3 kept" in printed
    assert f"wrote {given['out']}/captions.json" in printed
    assert (tmp_path / given["out"] / "web_capfilt/train/manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("line", commands(WEIGHTS))
def test_a_conversion_runs(line: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, _, *arguments = shlex.split(line)
    _write_published(tmp_path / "Salesforce")
    shutil.copytree(finished_run, tmp_path / "outputs/train/demo")
    monkeypatch.chdir(tmp_path)
    if "--adapter" in arguments:
        pytest.importorskip("peft", reason="adapters need requirements-lora.txt")
        model = load_model(arguments[0], device="cpu").model
        train_parts(model, ("llm",), {"llm": Adapter()})
        peft_folders(model.adapters, model.held_state())["llm"].write(Path(arguments[arguments.index("--adapter") + 1]))
    with hub(monkeypatch, tmp_path / "cache") if "--push" in arguments else contextlib.nullcontext():
        assert convert(arguments) == 0
    assert (tmp_path / arguments[1]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("line", commands(REPORTS))
def test_scores_are_read(line: str, world: World, finished_run: Path, tmp_path: Path) -> None:
    _, _, module, *arguments = shlex.split(line)
    for folder in (word for word in arguments if word.startswith("outputs/")):
        shutil.copytree(finished_run / "evaluation", tmp_path / folder)
    assert "easy_vqa_shape" in run(world, module, *arguments, cwd=tmp_path)
    named = [word for word in arguments if word.endswith((".csv", ".html"))]
    assert [name for name in named if not (tmp_path / name).exists()] == []


@pytest.mark.parametrize("line", commands(INSPECT))
def test_a_mixture_is_looked_at(line: str, world: World, tmp_path: Path) -> None:
    _, _, module, *arguments = shlex.split(line)
    write_shards(world, tmp_path, own="mine.yaml" in line, captions="data/capfilt" in line)
    printed = run(world, module, *arguments, "timed=64", cwd=tmp_path)
    drawn = {"mine/": "mine.yaml" in line, "web_capfilt/": "data/capfilt" in line}
    assert next((name for name, is_drawn in drawn.items() if is_drawn), "easy_vqa_present") in printed


@pytest.mark.slow
@pytest.mark.parametrize("line", commands(STUDIES))
def test_a_study_answers(line: str, world: World, tmp_path: Path) -> None:
    """Two of its conditions on tiny parts; test_study.py has all of each study."""
    _, _, module, *arguments = shlex.split(line)
    given = dict(argument.split("=", 1) for argument in arguments)
    small = shipped_study(given["study"], world, tmp_path)
    parts = next(run.train for run in small.study.conditions.values() if run.evaluates is None)
    train = [
        f"train=[{','.join([*_quoted(parts), *_quoted(small.train)])}]",
        f"evaluate=[{','.join(_quoted(small.evaluate))}]",
    ]
    printed = run(world, module, *arguments, "form=short", "seeds=[1]", *train, cwd=tmp_path)
    if "plan" in given:
        assert "seed 1: to do, outputs/study/runs/photos_known-seed1-" in printed
        return
    for name in ("study.md", "study.png", "study.json"):
        assert f"wrote outputs/study/{given['study']}/{name}" in printed
        assert (tmp_path / "outputs/study" / given["study"] / name).is_file()


def _quoted(overrides: list[str]) -> list[str]:
    """As entries of a list on Hydra's command line."""
    return [f'"{item}"' for item in overrides]


def write_shards(world: World, folder: Path, *, own: bool, captions: bool) -> None:
    """`data/shards` of the demo's dataset; with own data also theirs, beside their card `mine.yaml`; `data/capfilt`, of
    web pictures.
    """
    shutil.copytree(world.shards, folder / "data/shards")
    if own:
        prepare_dataset(load_card(write_own_data(folder)), folder, folder / "data/shards", progress=False)
    if captions:
        caption_web(write_web(folder / "data/web", web_pictures()), folder / "data/capfilt", threshold=0.0)


def _tiny_training(world: World, given: Mapping[str, str], folder: Path) -> tuple[str, ...]:
    """What makes a command of train.py short: tiny parts and few steps. A run that is continued keeps its recipe."""
    if "plan" in given:
        return ()
    if any(key.startswith("recipe.phases") and ("," in value) for key, value in given.items()):  # swept
        return (*(item for item in world.train if "recipe." not in item), *SWEPT_PHASES)
    short = (*ONE_PHASE, "recipe.final_samples=1", "recipe.validation_samples=1")
    if given.get("experiment") in ("photos", "photos_known"):
        write_synthetic(load_card("clothing_small"), folder / "data/clothing", scenes=12)
        short = (*short, "data.sources.clothing_small.path=data/clothing")
    if "experiment" in given:
        return (*(item for item in world.train if item.split(".")[0] in ("vision", "qformer", "llm")), *short)
    if "llm" in given:
        write_llm(given["llm"], folder / "outputs/llm")
        return (*world.train, *short, f"llm.sources.path={folder / 'outputs/llm'}")
    if given.get("connector.match") == "flops":
        short = (*short, "vision.grid=8")  # patches enough for as many FLOPs as the tiny Q-Former's
    keeps = "resume" in given or any(key.startswith("recipe.phases") for key in given)
    return world.train if keeps else (*world.train, *short)


@pytest.mark.slow
def test_the_stages_follow_each_other(world: World, tmp_path: Path) -> None:
    """Each starts from the run of the one before, which its experiment names."""
    parts = [item for item in world.train if item.split(".")[0] in ("vision", "qformer", "llm", "data")]
    for line in commands(ALIGNED):
        _, script, *arguments = shlex.split(line)
        alone = arguments == ["experiment=align_demo_stage1"]
        phase = "instruction" if arguments == ["experiment=align_demo"] else "align"
        tiny = [f"recipe.phases.{phase}.steps=2", "recipe.final_samples=2", "recipe.validation_samples=2"]
        tiny += [item for item in parts if not (alone and item.startswith("llm."))]
        printed = run(world, script, *arguments, *tiny, cwd=tmp_path)
        assert ("starting from outputs/train/align_demo_stage" in printed) != alone
        assert "evaluation/results.json" in printed


@pytest.mark.slow
def test_blip_goes_on_from_its_pre_training(world: World, tmp_path: Path) -> None:
    """Of which the experiments name the run."""
    parts = [item for item in world.train if item.split(".")[0] in ("vision", "data")]
    parts += [item.replace("qformer.", "text.") for item in world.train if item.startswith("qformer.sources.path=")]
    for line in commands(BLIP):
        _, script, *arguments = shlex.split(line)
        first = arguments == ["experiment=blip_demo"]
        phase = "pretrain" if first else "finetune"
        tiny = [f"recipe.phases.{phase}.steps=2", "recipe.final_samples=2", "recipe.validation_samples=2"]
        printed = run(world, script, *arguments, *tiny, *parts, cwd=tmp_path)
        assert ("starting from outputs/train/blip_demo " in printed) != first
        assert "checkpoints" in printed


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in commands(*ENTRIES) if not line.startswith(STAGES)])
def test_a_command_runs(line: str, world: World, finished_run: Path, untrained_stage1: Path, tmp_path: Path) -> None:
    _, script, *arguments = shlex.split(line)
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if "hydra/sweeper" in given:
        pytest.importorskip("optuna", reason="Hydra's sweeper is not installed (requirements-search.txt)")
    own = "mine.yaml" in line
    if {"check", "show", "audit"} & given.keys() or own:
        write_shards(world, tmp_path, own=own, captions="data/capfilt" in line)
    if "checkpoint" in given or "resume" in given:
        pairs = given.get("suite") == "retrieval" or given.get("mode") == "match"
        found = untrained_stage1 if pairs else finished_run
        shutil.copytree(found, tmp_path / given.get("checkpoint", "outputs/train/demo"))
    if "init_from" in given:
        shutil.copytree(finished_run, tmp_path / given["init_from"])
    tiny = {
        "train.py": _tiny_training(world, given, tmp_path),
        "evaluate.py": ("samples=6",) if "data" in given else (*world.evaluate, "samples=3"),
        "prepare.py": (f"sources.easy_vqa.path={world.raw}",),
    }[script]
    if own:
        tiny = tuple(word for word in tiny if not word.startswith("data.shards="))
    ordered = sorted([*tiny, *arguments], key=lambda word: "=" in word or word[0] == "~")  # flags come first
    printed = run(world, script, *ordered, cwd=tmp_path)
    assert printed.strip()
    assert "Traceback" not in printed
    own_files = {"mine.yaml", "train.jsonl", "val.jsonl", "photos"} if own else set()
    assert {path.name for path in tmp_path.iterdir()} <= {"outputs", "data", f"{script}.log", *own_files}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_python_examples_run(
    document: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert bool(examples) == (document.name in ("evaluate.md", "models.md"))
    _write_published(tmp_path / "Salesforce")
    shutil.copytree(finished_run, tmp_path / "outputs/train/demo")
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    for example in examples:
        exec(compile(example, document.name, "exec"), {})


def test_the_yaml_of_a_language_model_of_ones_own_is_a_whole_one(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs/models.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    write_llm("qwen3_8b", tmp_path / "files")  # which has these tokens
    file = tmp_path / "llm/mine.yaml"
    file.parent.mkdir()
    file.write_text(block.replace("/models/mine", str(tmp_path / "files")), encoding="utf-8")
    config = compose_config("train", TrainConfig, [f"hydra.searchpath=[file://{tmp_path}]", "llm=mine"])
    assert config.llm == llm_config(str(file), None)
    assert load_llm(config.llm).width == 32


def test_the_reading_list_is_short_and_every_path_exists() -> None:
    section = re.search(r"^#+ Reading the code\n(.*?)(?=^#|\Z)", README.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert section, "README.md has no section 'Reading the code'"
    paths = re.findall(r"\]\(([^)#]+)\)", section.group(1))
    assert 3 <= len(paths) <= 6
    assert [path for path in paths if not (REPOSITORY / path).is_file()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_that_is_named_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    assert [link for link in links if not (document.parent / link).exists()] == []
    own = r"`((?:instructblip|tests|configs|datasets|docs|benchmarks|launch)/[\w./-]+|[\w-]+\.(?:toml|txt))`"
    assert [path for path in re.findall(own, text) if not (REPOSITORY / path.removesuffix("NAME.yaml")).exists()] == []


@pytest.mark.parametrize("line", commands(ONE_TEST))
def test_one_test_file_is_named_that_exists(line: str) -> None:
    assert [word for word in shlex.split(line) if word.endswith(".py") and not (REPOSITORY / word).is_file()] == []
    assert "-n 0" in line  # a test within a test would cost more than it tells
