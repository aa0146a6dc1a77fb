"""Caption metrics of the COCO scorers: CIDEr, with BLEU, METEOR and ROUGE-L beside it.

Used for COCO Caption, NoCaps, Flickr30K and TextCaps. The scorers (tylin/coco-caption, and pycocoevalcap, its port) first
tokenise by Stanford's PTBTokenizer, a Java program, and drop punctuation. With Java and pycocoevalcap that very program
is used; without, `caption_tokenizer.tokenize`, and the score says so. METEOR is a Java program too and is left out without.

pycocoevalcap's own CIDEr, BLEU and ROUGE-L are plain Python too, but its wheel is 104 MB, nearly all of it Java programs:
it stays optional, and these functions are held to the official scorers' output for 150 captions.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import instructblip.evaluation.metrics.caption_tokenizer as tokenizers
from instructblip.evaluation.metrics.metric import Outputs, Records, texts_of
from instructblip.evaluation.metrics.score import Score, check_references, mean_score, same_length

Tokens = Sequence[str]
NGram = tuple[str, ...]
Tokenize = Callable[[Sequence[str]], list[list[str]]]

TOKENIZERS: dict[str, tuple[str, Tokenize]] = {
    "java": ("PTBTokenizer of Stanford CoreNLP 3.4.1 (Java)", tokenizers.ptb_tokenize),
    "python": ("PTB rules in Python (no Java)", tokenizers.tokenize),
}
# The scorers drop these after lower-casing, so the upper-case names of brackets never match and brackets stay as words.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
_MAX_N = 4
_SIGMA = 6.0  # of the length penalty, in words
_BETA = 1.2  # weight of recall in ROUGE-L
_SMALL, _TINY = 1e-9, 1e-15  # keep BLEU's fractions defined


def cider(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenizer: str = "auto",
    groups: Sequence[Hashable] | None = None,
) -> Score:
    """CIDEr (CIDEr-D) between 0 and 10; papers print it times 100. `details` has BLEU-1 to 4, ROUGE-L and METEOR.

    Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015. Words weigh by how few of *these*
    images' references use them: a subset of the images gives other numbers, one image alone gives 0, and the CIDEr of
    batches must not be averaged. A caption that is empty but for punctuation scores 0 and counts.

    Args:
        predictions: one caption an image.
        references: the reference captions of each image.
        tokenizer: `java` (exact), `python` (see `ptb`), or `auto`: `java` where it can run, else `python`.
            `details["tokenizer"]` names the one used.
        groups: of each image, such as NoCaps' domains: `details["groups"]` has each group's CIDEr with its own word
            weights, `parts` the same with a value an image. Whether NoCaps' server does so is not public; LAVIS does.

    Raises:
        ValueError: different lengths, no images, an image without references, or an unknown tokenizer.
        UserError: `java` was asked for and cannot run.
    """
    check_references("reference captions", predictions, references)
    if not predictions:
        raise ValueError("CIDEr of no images is not defined")
    name, tokenize = _tokenizer(tokenizer)
    texts, given_texts = _tokenized(predictions, tokenize), _tokenized_lists(references, tokenize)
    hypotheses, given_words = _words(texts), [_words(given) for given in given_texts]
    details: dict[str, Any] = {"tokenizer": name}
    details |= {f"Bleu_{n}": value for n, (value, _) in enumerate(bleu(hypotheses, given_words), start=1)}
    details["ROUGE_L"] = sum(rouge_l(texts, given_texts)) / len(predictions)
    details["METEOR"] = tokenizers.meteor(texts, given_texts)[0] if name == TOKENIZERS["java"][0] else None
    parts = {} if groups is None else _cider_of_groups(hypotheses, given_words, groups)
    if groups is not None:
        details["groups"] = {name: {"CIDEr": part.value, "count": part.count} for name, part in parts.items()}
    return mean_score(cider_d(hypotheses, given_words), metric="CIDEr", table_factor=100, details=details, parts=parts)


def cider_of_records(outputs: Outputs, records: Records) -> Score:
    """CIDEr, also by domain where every record has one (NoCaps)."""
    for record in records:
        if not record.captions:
            raise ValueError(f"record {record.id!r} has no reference captions; they may not be public")
    domains = [record.tags.get("domain") for record in records]
    groups = None if None in domains else domains
    return cider(texts_of(outputs), [record.captions for record in records], groups=groups)


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]], *, tokenizer: str = "auto") -> Score:
    """ROUGE-L between 0 and 1, the mean over samples: how much of the nearest reference the text has, in its order.

    As the COCO scorers compute it, tokenisation included. For long answers, where equality says nothing.

    Args:
        predictions: one text a sample.
        references: what stands in the data for each.
        tokenizer: as of `cider`.

    Raises:
        ValueError, UserError: as `cider`.
    """
    check_references("references", predictions, references)
    name, tokenize = _tokenizer(tokenizer)
    texts = _tokenized(predictions, tokenize)
    given = _tokenized_lists(references, tokenize)
    return mean_score(rouge_l(texts, given), metric="ROUGE-L", table_factor=100, details={"tokenizer": name})


def rouge_of_records(outputs: Outputs, records: Records) -> Score:
    """Against the answers of each record, or its captions where it has no answers."""
    for record in records:
        if not (record.answers or record.captions):
            raise ValueError(f"record {record.id!r} has no answers or captions; they may not be public")
    return rouge(texts_of(outputs), [record.answers or record.captions for record in records])


def cider_d(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """CIDEr-D of each tokenised caption, with document frequencies over all these references.

    For n = 1 to 4, tf-idf vectors of n-grams, idf = ln(images) - ln(max(1, images whose references have it)); the dot
    product is clipped at the reference's weight and divided by both norms; times exp(-(length difference)^2 / 72). The mean
    over n and over references, times 10.
    """
    grams = [[_ngrams(tokens) for tokens in given] for given in references]
    images_with = Counter(gram for given in grams for gram in set().union(*given))
    weights = {gram: math.log(len(references)) - math.log(count) for gram, count in images_with.items()}
    unseen = math.log(len(references))
    scores = []
    for tokens, given in zip(hypotheses, grams, strict=True):
        hypothesis = _TfIdf(_ngrams(tokens), weights, unseen)
        similarities = [hypothesis.similarity(_TfIdf(gram, weights, unseen)) for gram in given]
        scores.append(10 * sum(similarities) / len(similarities))
    return scores


def bleu(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[tuple[float, list[float]]]:
    """BLEU-1 to BLEU-4, between 0 and 1: over all captions, and of each.

    Papineni et al., "BLEU", ACL 2002, with the reference length closest to the caption's (the shorter of two as close) and
    without smoothing, as the COCO scorers compute it.
    """
    counts = [_bleu_counts(tokens, given) for tokens, given in zip(hypotheses, references, strict=True)]
    total = [sum(column) for column in zip(*counts, strict=True)]
    overall, each = _bleu_from_counts(total), [_bleu_from_counts(row) for row in counts]
    return [(overall[n], [row[n] for row in each]) for n in range(_MAX_N)]


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L of each tokenised caption, between 0 and 1: F score (recall 1.2) of the best precision and the best recall.

    Lin, "ROUGE", 2004. Best precision and best recall may come from different references. Words are split at spaces alone
    and an empty caption is one empty word, as in the COCO scorers.
    """
    scores = []
    for caption, given in zip(captions, references, strict=True):
        words, others = caption.split(" "), [reference.split(" ") for reference in given]
        common = [_longest_common_subsequence(words, other) for other in others]
        precision = max(common) / len(words)
        recall = max(length / len(other) for length, other in zip(common, others, strict=True))
        both = recall + _BETA**2 * precision
        scores.append((1 + _BETA**2) * precision * recall / both if precision and recall else 0.0)
    return scores


class _TfIdf:
    """The tf-idf vectors of one caption's n-grams, by n, and their norms."""

    def __init__(self, grams: Counter[NGram], weights: dict[NGram, float], unseen: float) -> None:
        self.vectors: list[dict[NGram, float]] = [{} for _ in range(_MAX_N)]
        for gram, count in grams.items():
            self.vectors[len(gram) - 1][gram] = count * weights.get(gram, unseen)
        self.norms = [math.sqrt(sum(value * value for value in vector.values())) for vector in self.vectors]
        self.length = sum(
            count for gram, count in grams.items() if len(gram) == 2
        )  # in bigrams, as the scorers have it

    def similarity(self, reference: "_TfIdf") -> float:
        """Clipped cosine, mean over n, under the length penalty."""
        total = 0.0
        for own, other, norm, other_norm in zip(
            self.vectors, reference.vectors, self.norms, reference.norms, strict=True
        ):
            dot = sum(min(value, other[gram]) * other[gram] for gram, value in own.items() if gram in other)
            total += dot / (norm * other_norm) if norm and other_norm else dot
        difference = self.length - reference.length
        return total / _MAX_N * math.exp(-(difference**2) / (2 * _SIGMA**2))


def _cider_of_groups(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], groups: Sequence[Hashable]
) -> dict[str, Score]:
    same_length("groups", hypotheses, groups)
    found = {}
    for group in dict.fromkeys(groups):
        members = [number for number, name in enumerate(groups) if name == group]
        scores = cider_d([hypotheses[number] for number in members], [references[number] for number in members])
        found[str(group)] = mean_score(scores, metric="CIDEr", table_factor=100, scored=tuple(members))
    return found


def _tokenizer(wanted: str) -> tuple[str, Tokenize]:
    """What a tokenizer is called in results, and the tokenizer."""
    name = ("java" if tokenizers.missing() is None else "python") if wanted == "auto" else wanted
    if name not in TOKENIZERS:
        raise ValueError(f"the caption tokenizer is auto, {' or '.join(TOKENIZERS)}, not {wanted!r}")
    return TOKENIZERS[name]


def _tokenized_lists(references: Sequence[Sequence[str]], tokenize: Tokenize) -> list[list[str]]:
    flat = iter(_tokenized([text for given in references for text in given], tokenize))  # starting Java takes a second
    return [[next(flat) for _ in given] for given in references]


def _tokenized(captions: Sequence[str], tokenize: Tokenize) -> list[str]:
    return [" ".join(word for word in words if word not in PUNCTUATION) for words in tokenize(captions)]


def _words(captions: Sequence[str]) -> list[list[str]]:
    """Words of tokenised captions; a number such as "5 1/2", one token with a no-break space, is two."""
    return [caption.split() for caption in captions]


def _ngrams(tokens: Tokens) -> Counter[NGram]:
    return Counter(
        tuple(tokens[start : start + n]) for n in range(1, _MAX_N + 1) for start in range(len(tokens) - n + 1)
    )


def _bleu_counts(tokens: Tokens, references: Sequence[Tokens]) -> list[int]:
    """Length, closest reference length, then n-grams made and n-grams right for each n."""
    _, closest = min((abs(len(reference) - len(tokens)), len(reference)) for reference in references)
    most: Counter[NGram] = Counter()
    for reference in references:
        most |= _ngrams(reference)
    right = [0] * _MAX_N
    for gram, count in (_ngrams(tokens) & most).items():
        right[len(gram) - 1] += count
    return [len(tokens), closest, *(max(0, len(tokens) - n) for n in range(_MAX_N)), *right]


def _bleu_from_counts(counts: Sequence[int]) -> list[float]:
    length, closest = counts[:2]
    ratio = (length + _TINY) / (closest + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(_MAX_N):
        product *= (counts[2 + _MAX_N + n] + _TINY) / (counts[2 + n] + _SMALL)
        scores.append(product ** (1 / (n + 1)) * penalty)
    return scores


def _longest_common_subsequence(words: Tokens, others: Tokens) -> int:
    row = [0] * (len(others) + 1)  # row[j]: of the words so far and the first j others
    for word in words:
        before = 0
        for place, other in enumerate(others, start=1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]
