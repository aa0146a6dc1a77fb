"""What all shards make together: manifest, list of captions, report."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from instructblip.capfilt.job import CAPTIONS, DATASET, REPORT, Job
from instructblip.capfilt.pictures import Part
from instructblip.capfilt.settings import Settings
from instructblip.capfilt.texts import SOURCES
from instructblip.data.cards import TRAIN_SPLIT
from instructblip.data.prepare.convert import foreign_files, shards_manifest
from instructblip.data.readers import Losses
from instructblip.data.shards import MANIFEST_NAME
from instructblip.distributed import Ranks
from instructblip.evaluation.journal import Journal
from instructblip.files import atomic_path, errors_for_users, read_json, write_json

# Of synthetic captions, how many the filter took away (BLIP, table 2); percent.
PAPER_NOISE = {"nucleus sampling": 25, "beam search": 19}


def finish(job: Job, parts: Sequence[Part], ranks: Ranks) -> None:
    """Wait for all shards, then write manifest, list and report, in this order.

    Raises:
        UserError: a rank is lost; the disk is full.
    """

    def missing() -> int:
        return sum(not job.done(part).is_file() for part in parts)

    Journal(job.work, (), ranks).wait_until_none(missing, "shards")
    entries, losses = [], Losses()
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("pictures", *SOURCES)}
    with atomic_path(job.out / CAPTIONS) as partial_list, open(partial_list, "w", encoding="utf-8") as file:
        file.write("[")
        before = "\n"
        for part in parts:
            found = read_json(job.done(part))
            entries += [found["shard"]] if found["shard"] else []
            losses.merge(found["lost"])
            for name, own in found["counts"].items():
                counts[name].update(own)
            for caption in found["captions"]:
                file.write(before + json.dumps(caption, ensure_ascii=False))
                before = ",\n"
        file.write("\n]\n")
    _write_manifest(job, parts, entries, losses)
    write_json(job.out / REPORT, _report(job, counts, losses))


def _write_manifest(job: Job, parts: Sequence[Part], entries: Sequence[dict[str, Any]], losses: Losses) -> None:
    manifest = shards_manifest(DATASET, TRAIN_SPLIT, entries)
    licences = sorted({str(part.split.manifest["licence"]) for part in parts if "licence" in part.split.manifest})
    manifest |= {"lost": losses.to_list(), "source": {"capfilt": job.plan}, "licence": "; ".join(licences)}
    with errors_for_users(job.split):
        job.split.mkdir(parents=True, exist_ok=True)
        for path in foreign_files(job.split, {job.split / entry["name"] for entry in entries}):
            path.unlink()
    write_json(job.split / MANIFEST_NAME, manifest)


def _report(job: Job, counts: Mapping[str, Counter[str]], losses: Losses) -> dict[str, Any]:
    report: dict[str, Any] = {name: dict(own) for name, own in counts.items()}
    report |= {"plan": job.plan, "models": dict(job.names), "lost": losses.to_list()}
    if job.settings.kept is None:
        report["noise_percent"] = {name: _noise_ratio(counts[name], job.settings) for name in SOURCES}
        report["paper_noise_percent"] = PAPER_NOISE
    return report


def _noise_ratio(counts: Mapping[str, int], settings: Settings) -> float | None:
    """Of the texts that the filter saw, how many it refused, in percent; None where there were none."""
    refused, kept = counts.get(settings.refusal, 0), counts.get("kept", 0)
    return round(100 * refused / (refused + kept), 2) if refused + kept else None


def summary(report: Mapping[str, Any]) -> list[str]:
    """A report in a few lines."""
    lines = []
    for name, what in (("pictures", "pictures"), ("synthetic", "captions drawn"), ("web", "texts of the web")):
        own = report[name]
        others = ", ".join(f"{count:,} {reason}" for reason, count in sorted(own.items()) if reason != "kept")
        lines.append(f"{sum(own.values()):,} {what}: {own.get('kept', 0):,} kept" + (f"; {others}" if others else ""))
    if "noise_percent" in report:
        shown = {name: "-" if ratio is None else f"{ratio:.1f}%" for name, ratio in report["noise_percent"].items()}
        paper = ", ".join(f"{ratio}% by {how}" for how, ratio in PAPER_NOISE.items())
        lines.append(
            f"noise, the share that the filter took away: {shown['synthetic']} of the captions (BLIP's paper: {paper}), "
            f"{shown['web']} of the web's texts"
        )
    return lines
