"""The work of `python -m instructblip.capfilt`."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console

from instructblip.capfilt.captioning import Captioning
from instructblip.capfilt.job import CAPTIONS, REPORT, Job, refuse_other
from instructblip.capfilt.models import find_models, load_models
from instructblip.capfilt.pictures import parts_of, web_splits
from instructblip.capfilt.results import finish, summary
from instructblip.capfilt.settings import settle
from instructblip.capfilt.shards import make_captions
from instructblip.config.schema import CapFiltConfig
from instructblip.data.shards import MANIFEST_NAME
from instructblip.distributed import Ranks, choose_device
from instructblip.errors import UserError
from instructblip.evaluation.heartbeat import watched
from instructblip.files import claimed_folder, read_json


def capfilt(config: CapFiltConfig, console: Console) -> None:
    """Write captions as configured. Everything that may be wrong is checked before a model is loaded.

    Raises:
        UserError: no such models or shards, a folder with other results, a lost rank, a full disk; nothing was kept.
    """
    ranks = Ranks.from_environment()
    if not ranks.is_first:
        console = Console(quiet=True)
    shards, out = Path(config.shards).expanduser(), Path(config.out).expanduser()
    inner, outer = out.resolve(), shards.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(f"out={out} and shards={shards} lie within each other; give another out=")
    splits = web_splits(shards, config.split)
    found = find_models(config)
    settings = settle(config, found.captioner.kind)
    device = str(choose_device(ranks.device(config.device)))
    plan = asdict(settings) | {"pictures": [[split.dataset, split.split, split.fingerprint] for split in splits]}
    with (
        claimed_folder(out, "capfilt", locked=ranks.is_first, setting="out"),
        watched(out, ranks, "capfilt") as ranks,
    ):
        refuse_other(out, plan)
        models = load_models(config, found, device)
        job = Job(out, settings, {**plan, **models.identities}, models.names, config.tolerance)
        job.claim(ranks)
        parts = parts_of(splits)
        if job.is_finished():
            job.check_whole()
        else:
            make_captions(job, parts, Captioning(models, settings, config.batch_size), ranks)
        if ranks.is_first:
            if not job.is_finished():
                finish(job, parts, ranks)
            job.clear_up()
    if ranks.is_first:
        _say(job, console)


def _say(job: Job, console: Console) -> None:
    """Print what there is now.

    Raises:
        UserError: no text of any picture was kept.
    """
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    report = read_json(job.out / REPORT)
    for line in summary(report):
        say(line)
    for path in (job.split / MANIFEST_NAME, job.out / CAPTIONS, job.out / REPORT):
        say(f"wrote {path}")
    if not report["pictures"].get("kept"):
        raise UserError(f"no text of any picture was kept, so {job.split} is empty; {job.out / REPORT} says why")
    say(f"look at them: python prepare.py show={job.out}")
