"""The journal of an evaluation on a disk that is not to be trusted, and what it costs to wait beside it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from instructblip.distributed import Ranks
from instructblip.errors import UserError
from instructblip.evaluation import journal as module
from instructblip.evaluation.journal import Journal
from instructblip.evaluation.outcomes import Failure, Prediction

KEYS = [f"{number:032x}" for number in range(6)]
ANSWERS = [Prediction(key, f"vqa/{key[-1]}", f"answer {key[-1]}", (-0.1 - 0.2, -1e-7), (1, 0)) for key in KEYS]
FIRST, SECOND = Ranks(0, 2), Ranks(1, 2)


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


def test_what_is_appended_is_read_exactly(tmp_path: Path) -> None:
    written = Journal(tmp_path, KEYS)
    written.append(ANSWERS[:3], [Failure(KEYS[3], "vqa/3", "image is truncated")])
    read = Journal(tmp_path, KEYS)
    assert read.predictions == {answer.key: answer for answer in ANSWERS[:3]}
    assert read.failures == {KEYS[3]: Failure(KEYS[3], "vqa/3", "image is truncated")}
    assert read.missing == 2


def test_no_flipped_bit_changes_an_answer(tmp_path: Path) -> None:
    """Each byte of a line, one bit of it: the answer is as it was, or it is none and asked again."""
    Journal(tmp_path, KEYS).append(ANSWERS[:2])
    path, stream = tmp_path / "journal-0.jsonl", random.Random(0)
    whole = path.read_bytes()
    first = whole.index(b"\n", 1)  # the end of the first answer's line
    lost = 0
    for place in range(1, first):
        path.write_bytes(flipped(whole, place, stream.randrange(8)))
        found = Journal(tmp_path, KEYS).predictions
        assert found.items() <= {answer.key: answer for answer in ANSWERS}.items()
        assert KEYS[1] in found or whole[place] == ord("\n")
        lost += KEYS[0] not in found
    assert lost >= first - 2  # 1e-07 may become 1E-07


def test_damage_is_said_and_answered_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Journal(tmp_path, KEYS).append(ANSWERS)
    path = tmp_path / "journal-0.jsonl"
    path.write_bytes(path.read_bytes().replace(b"answer 2", b"answer 3"))
    again = Journal(tmp_path, KEYS)
    assert again.predictions.keys() == set(KEYS) - {KEYS[2]}
    assert "journal-0.jsonl: lines that are damaged, or of another version: 1; they are answered" in caplog.text
    again.append([ANSWERS[2]])
    assert Journal(tmp_path, KEYS).missing == 0


def test_lines_without_a_checksum_are_answered_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line = {"key": KEYS[0], "id": "vqa/0", "prediction": "yes", "scores": []}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    assert Journal(tmp_path, KEYS).missing == len(KEYS)
    assert "of another version: 1" in caplog.text


def test_waiting_reads_what_is_new_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    loads = json.loads
    monkeypatch.setattr(module.json, "loads", lambda text, **options: parsed.append(text) or loads(text, **options))
    put_together = "".join(module._prediction_line(answer) + "\n" for answer in ANSWERS[:3])
    (tmp_path / "predictions.jsonl").write_text(put_together)
    first = Journal(tmp_path, KEYS, FIRST)
    assert len(parsed) == 3
    other = Journal(tmp_path, KEYS, SECOND)
    parsed.clear()
    for number, answer in enumerate(ANSWERS[3:], start=1):
        other.append([answer])
        for _ in range(20):
            first.read()
        assert len(parsed) == number
    assert first.missing == 0
    (tmp_path / "new").write_text(put_together)
    (tmp_path / "new").replace(tmp_path / "predictions.jsonl")
    first.read()
    assert len(parsed) == 6  # another file, if of the same lines


def test_a_journal_that_was_begun_anew_is_read_from_its_beginning(tmp_path: Path) -> None:
    first, other = Journal(tmp_path, KEYS, FIRST), Journal(tmp_path, KEYS, SECOND)
    other.append(ANSWERS[:4])
    first.read()
    (tmp_path / "journal-1.jsonl").unlink()
    Journal(tmp_path, KEYS, SECOND).append(ANSWERS[4:5])
    first.read()
    assert first.predictions.keys() == set(KEYS[:5])


def test_a_folder_that_was_deleted_ends_the_evaluation(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "vqa", KEYS)
    journal.append(ANSWERS[:1])
    (tmp_path / "vqa/journal-0.jsonl").unlink()
    (tmp_path / "vqa").rmdir()
    with pytest.raises(UserError, match=r"vqa/journal-0\.jsonl was deleted or moved while the evaluation was writing"):
        journal.append(ANSWERS[1:2])
    assert not (tmp_path / "vqa").exists()


@pytest.mark.parametrize("line", ['{"question_id": 1}', "[" * 10_000, "[1]"])
def test_a_foreign_line_among_answers_hides_none_of_them(tmp_path: Path, line: str) -> None:
    Journal(tmp_path, KEYS).append(ANSWERS[:2])
    path = tmp_path / "journal-0.jsonl"
    path.write_text(line + "\n" + path.read_text())
    assert Journal(tmp_path, KEYS).predictions.keys() == set(KEYS[:2])


def test_the_lines_that_compare_reads_have_a_checksum_too(tmp_path: Path) -> None:
    sample: Any = type("Sample", (), {"image_key": "a.tar/0", "prompt": "what?"})()
    sample.record = type("Record", (), {"answers": ("yes",), "captions": ()})()
    journal = Journal(tmp_path, KEYS[:2])
    journal.append(ANSWERS[:2])
    journal.finish((sample, answer, 100.0) for answer in ANSWERS[:2])
    path = tmp_path / "predictions.jsonl"
    assert Journal(tmp_path, KEYS[:2]).missing == 0
    path.write_bytes(path.read_bytes().replace(b"100.0", b"900.0", 1))
    assert Journal(tmp_path, KEYS[:2]).missing == 1


def test_an_answer_takes_the_place_of_a_failure(tmp_path: Path) -> None:
    journal = Journal(tmp_path, KEYS)
    journal.append([], [Failure(KEYS[0], "vqa/0", "image is truncated")])
    journal.append(ANSWERS[:1])
    for found in (journal, Journal(tmp_path, KEYS)):
        assert (found.predictions, found.failures, found.missing) == ({KEYS[0]: ANSWERS[0]}, {}, 5)
