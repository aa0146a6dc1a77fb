"""One function per raw format, found by the name a card gives."""

from instructblip.data.readers.aokvqa import read_aokvqa
from instructblip.data.readers.base import MEDIA_ROLES, OCR_ROLE, Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.coco_caption import read_coco_captions, read_coco_karpathy
from instructblip.data.readers.easy_vqa import read_easy_vqa
from instructblip.data.readers.flickr30k import read_flickr30k
from instructblip.data.readers.gqa import read_gqa
from instructblip.data.readers.hateful_memes import read_hateful_memes
from instructblip.data.readers.iconqa import read_iconqa
from instructblip.data.readers.ivqa import read_ivqa
from instructblip.data.readers.llava import read_llava
from instructblip.data.readers.nocaps import read_nocaps
from instructblip.data.readers.ocr_vqa import read_ocr_vqa
from instructblip.data.readers.scienceqa import read_scienceqa_img
from instructblip.data.readers.textcaps import read_textcaps
from instructblip.data.readers.textvqa import read_textvqa
from instructblip.data.readers.video_qa import read_msrvtt_qa, read_msvd_qa
from instructblip.data.readers.visdial import read_visdial
from instructblip.data.readers.vizwiz import read_vizwiz
from instructblip.data.readers.vqa import read_vqa
from instructblip.data.readers.vsr import read_vsr
from instructblip.data.readers.web_capfilt import read_web_capfilt

READERS: dict[str, Reader] = {
    "aokvqa": read_aokvqa,
    "coco_captions": read_coco_captions,
    "coco_karpathy": read_coco_karpathy,
    "llava": read_llava,
    "ocr_vqa": read_ocr_vqa,
    "textcaps": read_textcaps,
    "vqa": read_vqa,
    "web_capfilt": read_web_capfilt,
    "easy_vqa": read_easy_vqa,
    "flickr30k": read_flickr30k,
    "gqa": read_gqa,
    "hateful_memes": read_hateful_memes,
    "iconqa": read_iconqa,
    "ivqa": read_ivqa,
    "msrvtt_qa": read_msrvtt_qa,
    "msvd_qa": read_msvd_qa,
    "nocaps": read_nocaps,
    "scienceqa_img": read_scienceqa_img,
    "textvqa": read_textvqa,
    "visdial": read_visdial,
    "vizwiz": read_vizwiz,
    "vsr": read_vsr,
}

__all__ = ["MEDIA_ROLES", "OCR_ROLE", "READERS", "Losses", "MediaRecords", "RawSplit", "Reader"]
