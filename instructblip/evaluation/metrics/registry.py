"""The metrics there are, by the names that dataset cards use. A new one is its function and an entry here."""

from functools import partial

from instructblip.evaluation.metrics.accuracy import (
    accuracy_of_records,
    anls_of_letters,
    aokvqa_direct_answer_of_records,
    aokvqa_multiple_choice_of_records,
    exact_match_of_records,
    ivqa_accuracy_of_records,
    letter_accuracy_of_records,
    multiple_choice_accuracy_of_records,
)
from instructblip.evaluation.metrics.auroc import auroc_of_records
from instructblip.evaluation.metrics.captions import cider_of_records, rouge_of_records
from instructblip.evaluation.metrics.leaderboards import answer_row, caption_row, ranks_row, vizwiz_row
from instructblip.evaluation.metrics.metric import (
    Interval,
    Metric,
    Outcome,
    captions_of_record,
    label_of_record,
    texts_of_record,
)
from instructblip.evaluation.metrics.retrieval import recall_of_records
from instructblip.evaluation.metrics.visdial import chance_of_options, visdial_of_records
from instructblip.evaluation.metrics.vqa import (
    FEWEST_ANNOTATORS,
    VQA_ANNOTATORS,
    gqa_accuracy_of_records,
    ocr_vqa_accuracy_of_records,
    vqa_accuracy_of_records,
)

_ALL = (
    Metric("accuracy", "accuracy", accuracy_of_records),
    Metric(
        "multiple_choice_accuracy",
        "multiple choice accuracy",
        multiple_choice_accuracy_of_records,
        references=label_of_record,
    ),
    Metric(
        "aokvqa_multiple_choice",
        "A-OKVQA multiple choice",
        aokvqa_multiple_choice_of_records,
        references=label_of_record,
    ),
    Metric(
        "aokvqa_direct_answer",
        "A-OKVQA direct answer",
        aokvqa_direct_answer_of_records,
        annotators=VQA_ANNOTATORS,
        fewest_annotators=3,  # min(1, equal answers / 3)
    ),
    Metric("exact_match", "exact match", exact_match_of_records),
    Metric(
        "vqa_accuracy",
        "VQA accuracy",
        partial(vqa_accuracy_of_records, variant="official"),
        submissions={"vqav2": answer_row, "vqav2_blip": answer_row},
        annotators=VQA_ANNOTATORS,
        fewest_annotators=FEWEST_ANNOTATORS,
    ),
    Metric(
        "vqa_accuracy_lavis",
        "VQA accuracy as in LAVIS",
        partial(vqa_accuracy_of_records, variant="lavis"),
        submissions={"vqav2": answer_row, "vqav2_blip": answer_row, "textvqa": answer_row, "vizwiz": vizwiz_row},
        annotators=VQA_ANNOTATORS,
        fewest_annotators=FEWEST_ANNOTATORS,
    ),
    Metric(
        "textvqa_accuracy",
        "TextVQA accuracy",
        partial(vqa_accuracy_of_records, variant="textvqa"),
        annotators=VQA_ANNOTATORS,
        fewest_annotators=VQA_ANNOTATORS,  # its scorer insists on ten
        submissions={"textvqa": answer_row},
    ),
    Metric(
        "vizwiz_accuracy",
        "VizWiz accuracy",
        partial(vqa_accuracy_of_records, variant="vizwiz"),
        submissions={"vizwiz": vizwiz_row},
        annotators=VQA_ANNOTATORS,
        fewest_annotators=FEWEST_ANNOTATORS,
    ),
    Metric(
        "vizwiz_accuracy_lmms_eval",
        "VizWiz accuracy as in lmms-eval",
        partial(vqa_accuracy_of_records, variant="lmms_eval"),
        submissions={"vizwiz": vizwiz_row},
        annotators=VQA_ANNOTATORS,
        fewest_annotators=FEWEST_ANNOTATORS,
    ),
    Metric("gqa_accuracy", "GQA accuracy", partial(gqa_accuracy_of_records, variant="official")),
    Metric("gqa_accuracy_lavis", "GQA accuracy as in LAVIS", partial(gqa_accuracy_of_records, variant="lavis")),
    Metric(
        "gqa_accuracy_lmms_eval", "GQA accuracy as in lmms-eval", partial(gqa_accuracy_of_records, variant="lmms_eval")
    ),
    Metric("anls_lmms_eval", "ANLS as in lmms-eval", anls_of_letters, references=label_of_record),
    Metric(
        "letter_accuracy_lmms_eval",
        "letter accuracy as in lmms-eval",
        letter_accuracy_of_records,
        references=label_of_record,
    ),
    Metric("ocr_vqa_accuracy", "OCR-VQA accuracy", ocr_vqa_accuracy_of_records),
    Metric(
        "ivqa_accuracy",
        "iVQA accuracy",
        ivqa_accuracy_of_records,
        annotators=5,
        fewest_annotators=2,  # min(1, equal answers / 2)
    ),
    Metric(
        "cider",
        "CIDEr",
        cider_of_records,
        references=captions_of_record,
        interval=Interval.MEAN,
        best=1000.0,  # CIDEr-D is 10 at most, and papers print it times 100
        outcome=Outcome.NONE,
        groups="domain",
        submissions={"nocaps": caption_row},
    ),
    Metric("rouge_l", "ROUGE-L", rouge_of_records, references=texts_of_record, outcome=Outcome.NONE),
    Metric(
        "auroc",
        "AUROC",
        auroc_of_records,
        references=label_of_record,
        interval=Interval.PAIRS,
        chance=lambda _: 50.0,  # whatever the classes
        needs_scores=True,
        needs_both_labels=True,
        outcome=Outcome.CHOICE,
    ),
    Metric(
        "retrieval_recall",
        "mean recall",
        recall_of_records,
        references=captions_of_record,
        interval=Interval.PAIRS,
        needs_ranks=True,
        outcome=Outcome.CHOICE,
    ),
    Metric(
        "visdial",
        "mean reciprocal rank",
        visdial_of_records,
        references=label_of_record,
        chance=chance_of_options,
        needs_scores=True,
        outcome=Outcome.CHOICE,
        submissions={"visdial": ranks_row},
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
