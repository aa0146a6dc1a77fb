"""How fast preparation is, and how much memory it takes while streaming a large list of captions, or a large table.

    python benchmarks/prepare.py                                          400 pictures, a list of 1,000 MB, a million rows
    python benchmarks/prepare.py --images 100 --megabytes 50 --rows 10000   a small version

The pictures are JPEGs of 640 x 480 made on the spot, about as large as COCO's. The list is like those of BLIP's CapFilt,
and web_capfilt's reader reads it; one url in a hundred has a picture, a small one, the others are counted as dead links.
The table is a CSV of questions about small pictures of one's own, twenty for each, whose rows stand anywhere.
Each run of preparation is a process of its own, so that its peak memory is its own.
"""

import argparse
import csv
import dataclasses
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import provenance
from instructblip.data.cards import Card, SplitCounts, load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.data.readers import READERS, Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.web_capfilt import file_of_url
from instructblip.data.records import Record
from instructblip.files import read_json

PICTURE_EVERY = 100  # urls
ROWS_OF_A_PICTURE = 20  # of the CSV
OWN_CARD = """
name: own
reader: records
task: vqa
splits:
  train: {records: questions.csv, images: images}
"""
VARIANTS = ("kept as they are", "all there already", "image_size=256")


def read_folder(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """A picture a file, one caption each."""
    for number, path in enumerate(sorted(source.path("images").iterdir())):
        yield MediaRecords(f"i{number}", path.name, path, [Record(f"{number}", "caption", answers=("a picture",))])


def folder_card() -> Card:
    """A card of the pictures, for `read_folder`."""
    READERS["folder"] = Reader(read_folder)
    splits = {"train": SplitCounts(None, None, files={"images": ("images",)})}
    return dataclasses.replace(load_card("web_capfilt"), name="pictures", reader="folder", splits=splits)


def picture(generator: np.random.Generator, width: int = 640, height: int = 480) -> bytes:
    """A JPEG with the fine structure of a photograph."""
    coarse = generator.integers(0, 256, (15, 20, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = (smooth + generator.normal(0, 14, smooth.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_list(raw: Path, megabytes: int) -> int:
    """Write `ccs_filtered.json` and the pictures of some of its urls; return the number of entries."""
    generator = np.random.default_rng(0)
    words = [
        "a",
        "red",
        "small",
        "house",
        "near",
        "the",
        "lake",
        "with",
        "two",
        "dogs",
        "on",
        "its",
        "old",
        "wooden",
        "roof",
    ]
    content = picture(generator, 64, 48)  # tens of thousands of them
    folder = raw / "images"
    number = written = 0
    with open(raw / "ccs_filtered.json", "w", encoding="utf-8") as file:
        file.write("[")
        while written < megabytes * 1_000_000:
            # Every tenth url comes again later with another caption, as in the real lists.
            place = number if number % 10 else number // 20
            url = f"https://images.example.org/{place % 977}/{place * 7919}/picture-of-something-{place}.jpg"
            if number % 10_000 == 0:
                chosen = generator.integers(len(words), size=(10_000, 12))
            caption = " ".join(words[place] for place in chosen[number % 10_000])
            written += file.write((", " if number else "") + json.dumps({"url": url, "caption": caption}))
            if number % PICTURE_EVERY == 1:
                path = folder / file_of_url(url)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            number += 1
        file.write("]")
    return number


def write_table(raw: Path, rows: int) -> None:
    """Write `questions.csv`, the pictures that it asks about, and a card of both."""
    pictures = max(1, rows // ROWS_OF_A_PICTURE)
    content = picture(np.random.default_rng(0), 64, 48)
    for number in range(pictures):
        path = raw / f"images/{number % 1000:03d}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with open(raw / "questions.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "question", "answer"])
        for row in range(rows):
            number = row * 7919 % pictures
            question = f"what is said about this picture, of all that might be, by row {row}?"
            writer.writerow([f"{number % 1000:03d}/{number}.jpg", question, f"answer {row}"])
    (raw / "own.yaml").write_text(OWN_CARD, encoding="utf-8")


def measured(card: Card, raw: Path, out: Path, image_size: int | None = None) -> tuple[float, float, dict[str, int]]:
    """Prepare with one worker in a process of its own: seconds, peak memory in MB, and the manifest's numbers."""
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            prepare_dataset(card, raw, out, image_size=image_size, progress=False)
            code = 0
        finally:
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"preparing {card.name} failed")
    seconds = time.perf_counter() - started
    manifest = read_json(out / card.name / "train/manifest.json")
    lost = sum(loss["records"] for loss in manifest["lost"])
    return seconds, usage.ru_maxrss / 1e3, {"images": manifest["images"], "records": manifest["records"], "lost": lost}


def speed_table(folder: Path, images: int, rounds: int) -> Table:
    """Images per second and core of each variant, all rounds in turns."""
    raw, generator = folder / "raw", np.random.default_rng(0)
    (raw / "images").mkdir(parents=True)
    size = 0
    for number in range(images):
        size += (raw / f"images/{number:06d}.jpg").write_bytes(picture(generator))
    card = folder_card()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(rounds):
        for name in VARIANTS:
            out = folder / f"out{number}{' small' if name.startswith('image_size') else ''}"
            seconds[name].append(measured(card, raw, out, 256 if name.startswith("image_size") else None)[0])
    table = Table(
        title=f"{images} JPEGs of 640 x 480, {size / images / 1e3:.0f} kB each, one core", title_justify="left"
    )
    for heading in ("variant", "images a second", "min-max", "ms an image", "times faster"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    first = 0.0
    for name, values in seconds.items():
        rates = sorted(images / value for value in values)
        middle = rates[len(rates) // 2]
        first = first or middle
        table.add_row(
            name, f"{middle:.0f}", f"{rates[0]:.0f}-{rates[-1]:.0f}", f"{1e3 / middle:.1f}", f"{middle / first:.2f}"
        )
    return table


def memory_table(folder: Path, megabytes: int) -> Table:
    """Peak memory of a list, and of one a quarter as long."""
    table = Table(title="Web CapFilt list, one process", title_justify="left")
    for heading in ("list, MB", "entries", "pictures kept", "records lost", "seconds", "peak memory, MB"):
        table.add_column(heading, justify="right")
    for size in sorted({max(1, megabytes // 4), megabytes}):
        raw = folder / f"list{size}"
        raw.mkdir()
        entries = write_list(raw, size)
        seconds, peak, counts = measured(load_card("web_capfilt"), raw, folder / f"shards{size}")
        row = (
            f"{size:,}",
            f"{entries:,}",
            f"{counts['images']:,}",
            f"{counts['lost']:,}",
            f"{seconds:.0f}",
            f"{peak:.0f}",
        )
        table.add_row(*row)
    return table


def rows_table(folder: Path, rows: int) -> Table:
    """Peak memory of a CSV, and of one a quarter as long."""
    table = Table(title="CSV of one's own, one process", title_justify="left")
    for heading in ("rows", "MB", "pictures", "records", "seconds", "rows a second", "peak memory, MB"):
        table.add_column(heading, justify="right")
    for count in sorted({max(1, rows // 4), rows}):
        raw = folder / f"table{count}"
        raw.mkdir()
        write_table(raw, count)
        seconds, peak, counts = measured(load_card(raw / "own.yaml"), raw, folder / f"rows{count}")
        size = (raw / "questions.csv").stat().st_size / 1e6
        numbers = (count, size, counts["images"], counts["records"], seconds, count / seconds, peak)
        table.add_row(*(f"{number:,.0f}" for number in numbers))
    return table


def main() -> None:
    """Print all tables, the machine and the date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as folder:
        console.print(speed_table(Path(folder) / "speed", arguments.images, arguments.rounds))
        console.print(memory_table(Path(folder), arguments.megabytes))
        console.print(rows_table(Path(folder), arguments.rows))
    console.print(provenance(packages=["Pillow"]), highlight=False)


if __name__ == "__main__":
    main()
