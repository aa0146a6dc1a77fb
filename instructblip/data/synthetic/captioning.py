"""Made-up files of the captioning datasets, in the layouts of the official ones."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instructblip.data.readers.web_capfilt import file_of_url
from instructblip.data.synthetic.scenes import Scene, write_picture
from instructblip.files import write_atomically, write_json


def write_coco_caption(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """Karpathy's `dataset_coco.json`; every other training image is of `restval`, in val2014."""
    images = []
    for split, scenes in splits.items():
        for row, scene in enumerate(scenes):
            rest = split == "train" and row % 2 == 1
            year = "train2014" if split == "train" and not rest else "val2014"
            name = f"COCO_{year}_{scene.number:012d}.jpg"
            images.append(_karpathy(scene, name, "restval" if rest else split, filepath=year, cocoid=scene.number))
            write_picture(raw / year / name, scene)
    write_json(raw / "dataset_coco.json", {"images": images, "dataset": "coco"})


def _karpathy(scene: Scene, name: str, split: str, **more: Any) -> dict[str, Any]:
    """An image of one of Karpathy's files, with its sentences."""
    sentids = [10 * scene.number + place for place in range(5)]
    sentences = [
        {"tokens": text.lower().strip(".").split(), "raw": text, "imgid": scene.number, "sentid": sentid}
        for sentid, text in zip(sentids, scene.captions(5), strict=True)
    ]
    fields = {"filename": name, "imgid": scene.number, "split": split, "sentids": sentids, "sentences": sentences}
    return fields | more


def write_web_capfilt(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """The two lists; every other picture is where `url_to_file.jsonl` says, the others where their urls do."""
    filtered, synthetic, lines = [], [], []
    for row, scene in enumerate(splits["train"]):
        url = f"https://pictures.example/{scene.number}.jpg"
        first, second, third = scene.captions(3)
        filtered += [{"url": url, "caption": first}, {"url": url, "caption": second}]
        synthetic.append({"url": url, "caption": third})
        place = file_of_url(url)
        if row % 2:
            place = f"00000/{row:09d}.jpg"
            lines.append(json.dumps({"url": url, "file": place, "status": "success"}))
        write_picture(raw / "images" / place, scene)
    write_json(raw / "ccs_filtered.json", filtered)
    write_json(raw / "ccs_synthetic_filtered.json", synthetic)
    write_atomically(raw / "url_to_file.jsonl", "\n".join(lines) + "\n")


def write_textcaps(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """One entry a caption; the images of val lie among those of train, test has no captions."""
    for split, scenes in splits.items():
        entries: list[dict[str, Any]] = []
        for scene in scenes:
            image_id = f"{scene.number:016x}"
            fields: dict[str, Any] = {"question": "", "image_id": image_id, "image_name": image_id, "set_name": split}
            fields |= {"image_path": f"{split}/{image_id}.jpg", "image_classes": ["Sign"]}
            captions = scene.captions(5)
            entries += (
                [fields]
                if split == "test"
                else [
                    fields | {"caption_id": 10 * scene.number + n, "caption_str": text, "reference_strs": captions}
                    for n, text in enumerate(captions)
                ]
            )
            write_picture(raw / ("test_images" if split == "test" else "train_images") / f"{image_id}.jpg", scene)
        header = {"dataset_type": split, "dataset_name": "textcaps", "dataset_version": "0.1"}
        write_json(raw / f"TextCaps_0.1_{split}.json", {**header, "data": entries})
        write_rosetta(raw, split, scenes)


def write_rosetta(raw: Path, split: str, scenes: Sequence[Scene]) -> None:
    """The file of OCR tokens that TextCaps and TextVQA share."""
    box = {"top_left_x": 0.1, "top_left_y": 0.4, "width": 0.3, "height": 0.2, "rotation": 0}
    entries = [
        {
            "image_id": f"{scene.number:016x}",
            "ocr_tokens": [scene.text],
            "ocr_info": [{"word": scene.text, "bounding_box": box}],
        }
        for scene in scenes
    ]
    write_json(raw / f"TextVQA_Rosetta_OCR_v0.2_{split}.json", {"data": entries})


def write_nocaps(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """COCO's form, ten captions an image with domains in turn; test has images only."""
    domains = ("in-domain", "near-domain", "out-domain")
    for split, scenes in splits.items():
        images: list[dict[str, Any]] = []
        annotations = []
        for row, scene in enumerate(scenes):
            name = f"{scene.number:016x}"
            images.append({"id": row, "open_images_id": name, "file_name": f"{name}.jpg", "height": 96, "width": 128})
            write_picture(raw / split / f"{name}.jpg", scene)
            if split == "val":
                images[row]["domain"] = domains[row % 3]
                annotations += [
                    {"image_id": row, "id": 10 * row + n, "caption": text} for n, text in enumerate(scene.captions(10))
                ]
        content = {"licenses": [], "info": {}, "images": images}
        if split == "val":
            write_json(raw / "nocaps_val_4500_captions.json", {**content, "annotations": annotations})
        else:
            write_json(raw / "nocaps_test_image_info.json", content)


def write_flickr30k(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """Karpathy's file for the splits, the token file for the captions."""
    images, lines = [], []
    for split, scenes in splits.items():
        for scene in scenes:
            images.append(_karpathy(scene, f"{scene.number}.jpg", split))
            lines += [f"{scene.number}.jpg#{n}\t{text}" for n, text in enumerate(scene.captions(5))]
            write_picture(raw / "flickr30k-images" / f"{scene.number}.jpg", scene)
    write_json(raw / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    write_atomically(raw / "results_20130124.token", "\n".join(lines) + "\n")
