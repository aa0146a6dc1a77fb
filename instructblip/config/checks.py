"""What well-typed settings must keep among each other: one verdict for every command, before anything is loaded."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from instructblip.config.schema import (
    AdapterConfig,
    ArchitectureConfig,
    CapFiltConfig,
    ConnectorConfig,
    ConnectorKind,
    DataConfig,
    EvaluateConfig,
    InspectConfig,
    LLMConfig,
    MixtureConfig,
    ModelConfig,
    ModelKind,
    PhaseConfig,
    PrepareConfig,
    QFormerConfig,
    StudyCommandConfig,
    StudyConditionConfig,
    StudyConfig,
    StudyStageConfig,
    TrainConfig,
)
from instructblip.config.validate import nearest
from instructblip.errors import UserError

# Of a start, which knows what `init_from` gives, and before one where it gives nothing.
STAYS_DRAWN = (
    "vision.init=scratch draws the vision encoder, and nothing trains it or gives its weights; set train.vision=full, or "
    "vision.init=file"
)
_PAIRED = ("feature_width", "max_text_tokens", "temperature")
# What each kind of model reads of the section `model`.
ARCHITECTURE: dict[ModelKind, tuple[str, ...]] = {
    "instructblip": (),
    "blip2": (),
    "blip2_stage1": (*_PAIRED, "language_model_head"),
    "blip_caption": ("max_text_tokens", "prompt"),
    "blip_vqa": ("max_text_tokens", "enc_token"),
    "blip_retrieval": (*_PAIRED, "enc_token", "queue_size"),
    "blip_pretrain": (*_PAIRED, "enc_token", "queue_size"),
}
# What each kind of connector reads of the section `connector`.
CONNECTOR: dict[ConnectorKind, tuple[str, ...]] = {
    "qformer": (),
    "mlp": ("match", "class_token", "tokens", "hidden_width"),
    "linear": ("match", "class_token", "tokens"),
    "resampler": ("match", "class_token", "tokens", "hidden_width", "width", "depth", "heads"),
}
# What an equal budget chooses.
CHOSEN_BY = {"parameters": "hidden_width", "tokens": "tokens", "flops": "tokens"}
# Of the section `data`, which evaluations have too.
_OF_TRAINING = ("data.workers", "data.transform", "data.text_processor", "data.prompt_processor", "data.tolerance")
_MARKS = 2  # [CLS] and [SEP], or [DEC] and [SEP]
BLIP_KINDS = tuple(kind for kind in ARCHITECTURE if kind.startswith("blip_"))


def check(config: Any) -> None:
    """Refuse a validated configuration whose settings do not go together.

    Raises:
        UserError: names the keys, and what to set.
    """
    if isinstance(config, TrainConfig):
        _check_training(config)
    elif isinstance(config, EvaluateConfig):
        _check_evaluation(config)
    elif isinstance(config, PrepareConfig):
        _check_preparation(config)
    elif isinstance(config, InspectConfig):
        _check_inspection(config)
    elif isinstance(config, CapFiltConfig):
        _check_capfilt(config)
    elif isinstance(config, StudyCommandConfig):
        _check_study(config.study, config.seeds)


def check_search(config: Any, direction: str) -> None:
    """Refuse a search over settings that give no score.

    Raises:
        UserError: says what has one.
    """
    if not isinstance(config, TrainConfig):
        raise UserError("a search needs a score of each job, which train.py alone gives; sweep instead: -m KEY=A,B")
    if not config.suite.held_in:
        raise UserError("a search compares runs by their validation; name a dataset in suite.held_in")
    if direction != "maximize":
        raise UserError(
            f"a validation score is the better the higher it is, and hydra.sweeper.direction={direction} looks for the "
            "lowest; use hydra/sweeper=search, or set hydra.sweeper.direction=maximize"
        )


def check_batches(phases: dict[str, PhaseConfig], world_size: int) -> None:
    """Refuse a number of processes that a global batch does not divide among.

    Raises:
        UserError: names the phase.
    """
    for name, phase in phases.items():
        if phase.batch_size % world_size:
            raise UserError(
                f"recipe.phases.{name}.batch_size={phase.batch_size} does not divide among {world_size} processes; "
                "start another number of them"
            )


def check_model(config: ModelConfig) -> None:
    """Refuse parts that the wanted model cannot be made of, or settings that it does not read.

    Raises:
        UserError: names the key.
    """
    kind, architecture = config.model.kind, config.model
    plain = asdict(ArchitectureConfig(kind=kind))
    if other := [
        name for name, value in asdict(architecture).items() if value != plain[name] and name not in ARCHITECTURE[kind]
    ]:
        owners = " or ".join(owner for owner, names in ARCHITECTURE.items() if other[0] in names)
        raise UserError(f"model.{other[0]} is none of model={kind}; leave it out, or set model={owners}")
    if "max_text_tokens" in ARCHITECTURE[kind]:
        _check_longest("model.max_text_tokens", architecture.max_text_tokens)
    if architecture.prompt and not architecture.prompt.endswith(" "):
        raise UserError(
            f"model.prompt={architecture.prompt!r} does not end in a space: its last word and a caption's first would be "
            "read as one; add a space"
        )
    if config.llm is not None:
        check_rounding(config.llm)
    if kind in BLIP_KINDS:
        _check_blip(config)
        return
    if config.text is not None:
        raise UserError(f"model={kind} has no text model, and text={config.text.name} is one; leave it out: ~text")
    if config.connector.kind != "qformer":
        _check_connector(config, config.connector)
        return
    check_sizes(config.connector)
    qformer = config.q_former()
    if kind != "blip2_stage1":
        config.language_model()
        if kind == "blip2" and qformer.instruction_aware:
            raise UserError("model=blip2 has a Q-Former that reads no text; set qformer.instruction_aware=false")
        if qformer.instruction_aware:
            _check_longest("qformer.max_instruction_tokens", qformer.max_instruction_tokens)
        return
    if config.llm is not None:
        raise UserError(f"model=blip2_stage1 has no language model, and llm={config.llm.name} is one; set llm=null")
    if not qformer.instruction_aware:
        raise UserError("model=blip2_stage1 reads texts with the Q-Former; set qformer.instruction_aware=true")


def _check_longest(key: str, tokens: int) -> None:
    """Of a text, cut to so many tokens."""
    if tokens <= _MARKS:
        raise UserError(
            f"{key}={tokens} leaves nothing of a text beside its {_MARKS} marks; set it to {_MARKS + 1} or more"
        )


def check_rounding(llm: LLMConfig) -> None:
    """Refuse a quantization of weights in a type that it does not take.

    Raises:
        UserError: names the setting.
    """
    if llm.quantization == "fp8" and llm.dtype == "float32":
        raise UserError(
            "llm.quantization=fp8 multiplies what a model in half precision computes; set llm.dtype=bfloat16"
        )


def _check_connector(config: ModelConfig, connector: ConnectorConfig) -> None:
    """A connector that is no Q-Former: its settings, and a model that can have it."""
    if config.model.kind != "instructblip":
        raise UserError(
            f"model={config.model.kind} is made of a Q-Former, which connector={connector.kind} is not; leave connector= "
            "out, or set model=instructblip"
        )
    config.language_model()
    check_sizes(connector)
    chosen = [CHOSEN_BY[budget] for budget in connector.match]
    for budget, setting in zip(connector.match, chosen, strict=True):
        if setting not in CONNECTOR[connector.kind]:
            raise UserError(
                f"connector.match={budget} chooses {setting}, and connector={connector.kind} has none; match its tokens or "
                "flops"
            )
        if chosen.count(setting) > 1:
            raise UserError(
                f"connector.match={','.join(connector.match)} chooses {setting} twice; leave one of them out"
            )
        if getattr(connector, setting) is not None:
            raise UserError(f"connector.match={budget} chooses connector.{setting}; leave one of the two out")
    if connector.match:
        config.q_former()


def check_sizes(connector: ConnectorConfig) -> None:
    """Refuse settings that a kind of connector does not read.

    Raises:
        UserError: names the first.
    """
    plain, kind = asdict(ConnectorConfig(kind=connector.kind)), connector.kind
    if other := [
        name
        for name, value in asdict(connector).items()
        if value != plain[name] and name != "kind" and name not in CONNECTOR[kind]
    ]:
        owners = " or ".join(owner for owner, names in CONNECTOR.items() if other[0] in names)
        raise UserError(f"connector.{other[0]} is none of connector={kind}; leave it out, or set connector={owners}")


def check_read(config: Any, keys: Iterable[str]) -> None:
    """Refuse keys of the command line that the command has and would not read.

    They set a Q-Former beside a connector which neither is one nor is matched with one; or, of an evaluation, how training
    reads its samples; or, of a look at a mixture, what a run may lose.

    Raises:
        UserError: names the key.
    """
    if isinstance(config, EvaluateConfig):
        for key in keys:
            if ".".join(key.split(".")[:2]) in _OF_TRAINING:
                instead = "give tolerance=NUMBER" if key.startswith("data.tolerance") else "leave it out"
                raise UserError(f"{key}= is of training, and an evaluation does not read it; {instead}")
    if isinstance(config, InspectConfig) and (unread := [key for key in keys if key.startswith("data.tolerance")]):
        raise UserError(f"{unread[0]}= is of a run, which stops past it; a look at a mixture does not: leave it out")
    if not isinstance(config, TrainConfig) or config.connector.kind == "qformer" or config.connector.match:
        return
    if unread := [key for key in keys if key == "qformer" or key.startswith("qformer.")]:
        raise UserError(
            f"{unread[0]}= is of a Q-Former, which connector={config.connector.kind} is not; leave it out, or say what is "
            "to be equal: connector.match=tokens"
        )


def _check_blip(config: ModelConfig) -> None:
    kind = config.model.kind
    if config.connector.kind != "qformer":
        raise UserError(f"model={kind} has no connector, and connector={config.connector.kind} is one; leave it out")
    config.text_model()
    for part in ("qformer", "llm"):
        section = getattr(config, part)
        if section is not None:
            raise UserError(f"model={kind} has no {part}, and {part}={section.name} is one; leave it out: ~{part}")
    if config.vision.norm == "layer" or not config.vision.final_norm:
        raise UserError(
            f"model={kind} reads the vision encoder's last tokens behind its own norm; set vision.final_norm=true and "
            "vision.norm=none, or vision.norm=channel of a CNN"
        )


def _check_training(config: TrainConfig) -> None:
    recipe = config.recipe
    check_model(config)
    for name, phase in recipe.phases.items():
        _check_phase(f"recipe.phases.{name}", phase, config)
    _check_data(config.data)
    _check_stream(config.data, config.mixture)
    _check_mixture(config.mixture)
    for name, phase in recipe.phases.items():
        _check_groups(f"recipe.phases.{name} has", config.mixture, phase.batch_size, phase.micro_batch_size)
    if config.qformer is not None and config.has_qformer():
        _check_qformer(config.qformer)
    by_path = any("/" in name or name.endswith((".yaml", ".yml")) for name in config.suite.held_in)
    named = ("mean", *config.suite.held_in)
    if recipe.keep_best is not None and recipe.keep_best not in named and not by_path:  # a card's path says no name yet
        near = nearest(recipe.keep_best, named)
        raise UserError(f"recipe.keep_best={recipe.keep_best} is no dataset of suite.held_in, nor mean{near}")
    _check_trained(config)
    _check_start(config)
    quantization = None if config.llm is None else config.llm.quantization
    if config.parallel.kind == "fsdp" and quantization is not None:
        raise UserError(
            f"parallel=fsdp shards parameters, and the weights of an {quantization} LLM are none; "
            "use parallel=ddp, or leave llm.quantization out"
        )
    _check_ahead(config)
    packs = any(phase.batching == "packed" for phase in recipe.phases.values())
    if config.parallel.packed_attention == "by_length" and not packs:
        raise UserError(
            "parallel.packed_attention=by_length is of rows of several samples, and no phase packs any; "
            "set recipe.phases.NAME.batching=packed, or leave it out"
        )


def _check_stream(data: DataConfig, mixture: MixtureConfig) -> None:
    if data.stream and data.cache_features:
        raise UserError(
            "data.stream=true reads no image twice, and data.cache_features=true keeps all; set it to false"
        )
    if data.stream and mixture.per == "image":
        raise UserError(
            "mixture.per=image looks for the records of an image, which data.stream=true does not know; set it to sample"
        )


def _check_ahead(config: TrainConfig) -> None:
    if config.parallel.ahead != "vision":
        return
    whys = {
        "parallel=fsdp gathers the encoder's blocks between those of the step": config.parallel.kind == "fsdp",
        f"train.vision={config.train.vision} changes the encoder with each step": config.train.vision != "frozen",
        "data.cache_features=true has encoded all images": config.data.cache_features,
    }
    for why, applies in whys.items():
        if applies:
            raise UserError(
                f"parallel.ahead=vision encodes a step's images before it, and {why}; use parallel.ahead=copies"
            )


def _check_trained(config: TrainConfig) -> None:
    if not config.train.parts(config):
        part = "connector" if config.connector.kind != "qformer" else "text" if config.qformer is None else "qformer"
        raise UserError(f"train has no part that is full or lora, so nothing would be learned; set train.{part}=full")
    for part in ("qformer", "connector", "text"):
        if part in config.absent_parts() and part in config.train.learning_rates:
            raise UserError(f"{config.said()} has no {part} to train; leave train.learning_rates.{part} out")
    for part in config.train.learning_rates:
        if part not in config.absent_parts() and getattr(config.train, part) == "frozen":
            raise UserError(
                f"train.learning_rates.{part} is of what trains, and train.{part}=frozen does not; set train.{part}=full or "
                "lora, or leave it out"
            )
    if config.vision.init == "scratch" and config.train.vision != "full" and not (config.init_from or _stages(config)):
        raise UserError(STAYS_DRAWN)
    if config.train.vision == "frozen" and config.train.layer_decay != 1.0:
        raise UserError(
            f"train.layer_decay={config.train.layer_decay:g} is of the vision encoder's layers, which are frozen; set "
            "train.vision=full, or leave it out"
        )
    if config.train.vision != "frozen" and config.data.cache_features:
        raise UserError(
            f"data.cache_features=true keeps what a frozen vision encoder gives, and train.vision={config.train.vision} "
            "trains it; set data.cache_features=false"
        )
    if config.llm is None:
        if config.train.llm != "frozen" or "llm" in config.train.learning_rates:
            raise UserError(f"model={config.model.kind} has no LLM to train; leave train.llm and its learning rate out")
    elif config.train.llm == "full" and config.llm.quantization is not None:
        raise UserError(
            f"train.llm=full trains weights, and those of an {config.llm.quantization} LLM are rounded; "
            "leave llm.quantization out, or train adapters over them: train.llm=lora"
        )
    for name, section in (("vision", config.vision), ("llm", config.llm)):
        whole = getattr(config.train, name) == "full"  # held in float32
        if section is not None and section.dtype == "float16" and not whole and config.recipe.precision == "bf16":
            raise UserError(
                f"recipe.precision=bf16 computes in bfloat16, and {name}.dtype=float16 holds weights in another half "
                f"precision; set {name}.dtype=bfloat16"
            )
    _check_adapters(config)


def _check_adapters(config: TrainConfig) -> None:
    for part in asdict(config.train.lora):
        if getattr(config.train, part) != "lora" and getattr(config.train.lora, part) != AdapterConfig():
            raise UserError(
                f"train.lora.{part} is of adapters, and train.{part}={getattr(config.train, part)} has none; "
                f"set train.{part}=lora, or leave it out"
            )
    adapted = config.train.adapted(config)
    if adapted and config.model.queue_size is not None:
        raise UserError(
            f"train.{adapted[0]}=lora goes without momentum copies, which follow whole weights; set model.queue_size=null"
        )


def _stages(config: TrainConfig) -> list[str]:
    """Another spelling of `init_from`."""
    if config.qformer is None or not config.has_qformer():
        return []
    return [path for path in (config.qformer.stage1, config.qformer.stage2) if path is not None]


def _check_start(config: TrainConfig) -> None:
    files = _stages(config)
    if files and config.init_from:
        raise UserError(f"qformer.stage1 and stage2 mean init_from=[{', '.join(files)}]; give init_from= alone")


def _check_phase(key: str, phase: PhaseConfig, config: TrainConfig) -> None:
    if phase.batching == "fixed" and phase.micro_batch_tokens is not None:
        raise UserError(f"{key}.micro_batch_tokens limits no fixed batches; set {key}.batching=bucketed or packed")
    if phase.plateau_decay is not None and phase.plateau_steps is None:
        raise UserError(f"{key}.plateau_decay is from plateau to plateau; set {key}.plateau_steps, how long one is")
    if phase.batching == "packed" and (config.llm is None or config.llm.kind != "decoder"):
        found = f"model={config.model.kind} has none" if config.llm is None else f"llm={config.llm.name} is none"
        raise UserError(f"{key}.batching=packed needs a decoder-only LLM, {found}; set it to bucketed")


def _check_mixture(config: MixtureConfig) -> None:
    if (config.temperature is not None) != (config.weights == "temperature"):
        raise UserError(
            f"mixture.weights={config.weights} {'takes no' if config.temperature else 'needs a'} mixture.temperature; "
            "set the two together, as mixture.weights=temperature mixture.temperature=2"
        )


def _check_groups(what_has: str, config: MixtureConfig, batch_size: int, micro_batch_size: int | None) -> None:
    """A micro-batch that comes from one dataset is a group of the mixture's draws: groups fill the batch."""
    if config.per == "image" and batch_size % config.image_records:
        raise UserError(
            f"mixture.per=image draws {config.image_records} records together, but {what_has} a batch_size of "
            f"{batch_size}, which is no multiple of it; change that or mixture.image_records"
        )
    if config.per == "batch" and batch_size % (micro_batch_size or batch_size):
        raise UserError(
            f"mixture.per=batch needs whole micro-batches, but {what_has} a batch_size of {batch_size} "
            f"and a micro_batch_size of {micro_batch_size}; change one of them"
        )


def _check_data(config: DataConfig) -> None:
    if config.cache_features and config.transform != "resize_square":
        drawn = "is not what it keeps" if config.transform == "center_crop" else "draws another view each time"
        raise UserError(
            f"data.cache_features=true keeps the tokens of squashed images, but data.transform={config.transform} {drawn}; "
            "set data.transform=resize_square, or data.cache_features=false"
        )


def _check_qformer(config: QFormerConfig) -> None:
    if config.query_init == "cls" and config.init != "bert":
        raise UserError(f"qformer.query_init=cls needs BERT's embeddings, which init={config.init} has not; use normal")


def _check_evaluation(config: EvaluateConfig) -> None:
    if not (*config.suite.held_in, *config.suite.held_out):
        raise UserError("there is nothing to evaluate; name a dataset in suite.held_in or suite.held_out")
    if config.data.stream:
        raise UserError("data.stream is of training; an evaluation reads by index: leave it out")
    for key in ("normalize", "include_eos"):
        if config.mode in ("generate", "match") and getattr(config, key) is not None:
            raise UserError(
                f"{key}= is of ranked candidates, and mode={config.mode} ranks none; leave one of the two out"
            )


def _check_preparation(config: PrepareConfig) -> None:
    tasks = [name for name in ("check", "show", "audit") if getattr(config, name) is not None]
    if len(tasks) > 1:
        raise UserError(f"{tasks[0]}= and {tasks[1]}= are different tasks; give one of them")


def _check_inspection(config: InspectConfig) -> None:
    _check_data(config.data)
    if config.data.cache_features:
        raise UserError("data.cache_features=true leaves nothing to decode; inspect with data.cache_features=false")
    _check_stream(config.data, config.mixture)
    _check_mixture(config.mixture)
    _check_groups("there is", config.mixture, config.batch_size, config.micro_batch_size)


def _check_capfilt(config: CapFiltConfig) -> None:
    if config.variant == "blip2" and config.threshold is not None:
        raise UserError("threshold= is of variant=blip; variant=blip2 keeps the best of each picture, as many as kept=")
    if config.variant == "blip" and config.kept is not None:
        raise UserError("kept= is of variant=blip2; variant=blip keeps all that match with more than threshold=")
    most, least = config.max_new_tokens, config.min_new_tokens
    if most is not None and least is not None and least > most:
        raise UserError(f"min_new_tokens={least} is more than max_new_tokens={most}; lower it")


def _check_study(study: StudyConfig, seeds: list[int] | None) -> None:
    runs: dict[str, StudyStageConfig] = {**study.stages, **study.conditions}
    if both := study.stages.keys() & study.conditions.keys():
        raise UserError(f"study.stages and study.conditions both have {min(both)}; give one of them another name")
    used = study.seeds if seeds is None else seeds
    if not used or len(set(used)) < len(used):
        raise UserError(f"seeds {used} of the study must differ, and there must be one")
    for name, run in runs.items():
        _check_condition(name, run, study)
    for name in runs:
        _check_chain(name, runs)


def _check_condition(name: str, run: StudyStageConfig, study: StudyConfig) -> None:
    key = f"study.{'stages' if name in study.stages else 'conditions'}.{name}"
    if run.starts_from is not None and run.starts_from not in {**study.stages, **study.conditions}:
        near = nearest(run.starts_from, [*study.stages, *study.conditions])
        raise UserError(f"{key}.starts_from={run.starts_from} is none of the study's{near}")
    if not isinstance(run, StudyConditionConfig):
        return
    if run.evaluates is None:
        if run.evaluate:
            raise UserError(
                f"{key}.evaluate is of a condition that trains nothing; set {key}.evaluates, whose run it is"
            )
        return
    if run.evaluates not in study.conditions or study.conditions[run.evaluates].evaluates is not None:
        trained = [other for other, condition in study.conditions.items() if condition.evaluates is None]
        raise UserError(f"{key}.evaluates={run.evaluates} is no condition that trains{nearest(run.evaluates, trained)}")
    if run.train or run.starts_from is not None or run.forms:
        raise UserError(f"{key} evaluates the run of {run.evaluates}; leave its train, starts_from and forms out")


def _check_chain(name: str, runs: dict[str, StudyStageConfig]) -> None:
    """A run begins after those that it starts from, so none of them may start from it."""
    seen, step = [name], runs[name].starts_from
    while step is not None:
        if step in seen:
            raise UserError(f"the study's {' starts from '.join([*seen, step])}, in a circle; change one starts_from")
        seen.append(step)
        source = runs[step]
        if isinstance(source, StudyConditionConfig) and source.evaluates is not None:
            raise UserError(f"the study's {seen[-2]} starts from {step}, which trains nothing; name {source.evaluates}")
        step = source.starts_from
