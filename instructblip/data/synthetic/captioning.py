"""Made-up files of the captioning datasets, in the layouts of the official ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instructblip.data.readers.web_capfilt import file_of_url
from instructblip.data.synthetic.scenes import MadeUpSplit, Scene, write_coco_picture, write_picture
from instructblip.files import write_atomically, write_json

_UNLABELLED_SPLIT = "test"  # of TextCaps


def write_coco_karpathy(splits: Sequence[MadeUpSplit]) -> None:
    """Karpathy's `dataset_coco.json`; every other training image is of `restval`, in the second folder."""
    files: dict[Path, list[dict[str, Any]]] = {}
    for split in splits:
        for row, scene in enumerate(split.scenes):
            rest = split.name == "train" and row % 2 == 1
            folder = split.place("images", 1 if rest else 0)
            entry = _karpathy(scene, write_coco_picture(folder, scene), "restval" if rest else split.name)
            files.setdefault(split.place("annotations"), []).append(
                entry | {"filepath": folder.name, "cocoid": scene.number}
            )
    for path, images in files.items():
        write_json(path, {"images": images, "dataset": "coco"})


def _karpathy(scene: Scene, name: str, split: str) -> dict[str, Any]:
    """An image of one of Karpathy's files, with its sentences."""
    sentids = [10 * scene.number + place for place in range(5)]
    sentences = [
        {"tokens": text.lower().strip(".").split(), "raw": text, "imgid": scene.number, "sentid": sentid}
        for sentid, text in zip(sentids, scene.captions(5), strict=True)
    ]
    return {"filename": name, "imgid": scene.number, "split": split, "sentids": sentids, "sentences": sentences}


def write_coco_captions(splits: Sequence[MadeUpSplit]) -> None:
    """COCO's own caption files."""
    for split in splits:
        images = [
            {"id": scene.number, "file_name": write_coco_picture(split.place("images"), scene), "license": 4}
            for scene in split.scenes
        ]
        annotations = _annotations([(scene.number, scene) for scene in split.scenes], 5)
        write_json(split.place("annotations"), {"info": {}, "images": images, "annotations": annotations})


def _annotations(scenes: Sequence[tuple[int, Scene]], count: int) -> list[dict[str, Any]]:
    """Captions in COCO's form of scenes with the ids of their images."""
    return [
        {"image_id": image_id, "id": 10 * image_id + number, "caption": text}
        for image_id, scene in scenes
        for number, text in enumerate(scene.captions(count))
    ]


def write_web_capfilt(splits: Sequence[MadeUpSplit]) -> None:
    """Two lists; every other picture is where `url_to_file.jsonl` says, the others where their urls do."""
    for split in splits:
        lists: dict[Path, list[dict[str, str]]] = {}
        lines = []
        for row, scene in enumerate(split.scenes):
            url = f"https://pictures.example/{scene.number}.jpg"
            for number, text in enumerate(scene.captions(3)):
                lists.setdefault(split.place("captions", number // 2), []).append({"url": url, "caption": text})
            place = file_of_url(url)
            if row % 2 and split.has("url_to_file"):
                place = f"00000/{row:09d}.jpg"
                lines.append(json.dumps({"url": url, "file": place, "status": "success"}))
            write_picture(split.place("images") / place, scene)
        for path, entries in lists.items():
            write_json(path, entries)
        if lines:
            write_atomically(split.place("url_to_file"), "\n".join(lines) + "\n")


def write_textcaps(splits: Sequence[MadeUpSplit]) -> None:
    """One entry a caption; test has no captions."""
    for split in splits:
        entries: list[dict[str, Any]] = []
        for scene in split.scenes:
            image_id = f"{scene.number:016x}"
            fields: dict[str, Any] = {"question": "", "image_id": image_id, "image_name": image_id}
            fields |= {"set_name": split.name, "image_path": f"{split.name}/{image_id}.jpg", "image_classes": ["Sign"]}
            captions = scene.captions(5)
            said = [
                {"caption_id": 10 * scene.number + n, "caption_str": text, "reference_strs": captions}
                for n, text in enumerate(captions)
            ]
            entries += [fields | more for more in ([{}] if split.name == _UNLABELLED_SPLIT else said)]
            write_picture(split.place("images") / f"{image_id}.jpg", scene)
        header = {"dataset_type": split.name, "dataset_name": "textcaps", "dataset_version": "0.1"}
        write_json(split.place("annotations"), {**header, "data": entries})
        write_rosetta(split)


def write_rosetta(split: MadeUpSplit) -> None:
    """The file of OCR tokens that TextCaps and TextVQA share, where the card has one."""
    box = {"top_left_x": 0.1, "top_left_y": 0.4, "width": 0.3, "height": 0.2, "rotation": 0}
    entries = [
        {
            "image_id": f"{scene.number:016x}",
            "ocr_tokens": [scene.text],
            "ocr_info": [{"word": scene.text, "bounding_box": box}],
        }
        for scene in split.scenes
    ]
    if split.has("ocr"):
        write_json(split.place("ocr"), {"data": entries})


def write_nocaps(splits: Sequence[MadeUpSplit]) -> None:
    """COCO's form, ten captions an image with domains in turn; images only where the card has no file of captions."""
    domains = ("in-domain", "near-domain", "out-domain")
    for split in splits:
        images: list[dict[str, Any]] = []
        for row, scene in enumerate(split.scenes):
            name = f"{scene.number:016x}"
            image = {"id": row, "open_images_id": name, "file_name": f"{name}.jpg", "height": 96, "width": 128}
            images.append(image | ({"domain": domains[row % 3]} if split.has("captions") else {}))
            write_picture(split.place("images") / f"{name}.jpg", scene)
        content = {"licenses": [], "info": {}, "images": images}
        if split.has("captions"):
            content["annotations"] = _annotations(list(enumerate(split.scenes)), 10)
        write_json(split.place("captions" if split.has("captions") else "image_info"), content)


def write_flickr30k(splits: Sequence[MadeUpSplit]) -> None:
    """Karpathy's file for the splits, the token file for the captions."""
    files: dict[Path, list[dict[str, Any]]] = {}
    lines: dict[Path, list[str]] = {}
    for split in splits:
        for scene in split.scenes:
            name = f"{scene.number}.jpg"
            files.setdefault(split.place("splits"), []).append(_karpathy(scene, name, split.name))
            if split.has("captions"):
                said = lines.setdefault(split.place("captions"), [])
                said += [f"{name}#{n}\t{text}" for n, text in enumerate(scene.captions(5))]
            write_picture(split.place("images") / name, scene)
    for path, images in files.items():
        write_json(path, {"images": images, "dataset": "flickr30k"})
    for path, texts in lines.items():
        write_atomically(path, "\n".join(texts) + "\n")


WRITERS = {
    "coco_captions": write_coco_captions,
    "coco_karpathy": write_coco_karpathy,
    "flickr30k": write_flickr30k,
    "nocaps": write_nocaps,
    "textcaps": write_textcaps,
    "web_capfilt": write_web_capfilt,
}
