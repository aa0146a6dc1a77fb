"""Made-up files of the general formats, with captions: a list of records, and tars as img2dataset makes them."""

import io
import json
from collections.abc import Sequence

from instructblip.data.synthetic.scenes import MadeUpSplit, draw_scene, write_picture
from instructblip.data.tars import tar_writer, write_member
from instructblip.files import write_json

_CAPTIONS = 2


def write_records(splits: Sequence[MadeUpSplit]) -> None:
    """One JSON list a split, a caption an entry; pictures in a folder of it."""
    for split in splits:
        entries = []
        for scene in split.scenes:
            name = f"pictures/{scene.number}.jpg"
            write_picture(split.place("images") / name, scene)
            entries += [{"image": name, "caption": text} for text in scene.captions(_CAPTIONS)]
        write_json(split.place("records"), entries)


def write_tars(splits: Sequence[MadeUpSplit]) -> None:
    """One tar a split: picture, text and JSON of each scene."""
    for split in splits:
        path = split.source.raw / f"{split.name}-00000.tar"
        with open(path, "wb") as file, tar_writer(file) as tar:
            for row, scene in enumerate(split.scenes):
                picture = io.BytesIO()
                draw_scene(scene).save(picture, "JPEG", quality=95)
                text = scene.captions(1)[0]
                described = json.dumps({"caption": text, "key": f"{row:09d}", "status": "success"})
                for extension, content in (
                    ("jpg", picture.getvalue()),
                    ("txt", text.encode()),
                    ("json", described.encode()),
                ):
                    write_member(tar, f"{row:09d}", extension, content)


WRITERS = {"records": write_records, "webdataset": write_tars}
