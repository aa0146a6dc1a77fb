"""`datasets/` and `evaluate.py` share their names with two Hugging Face packages and stand in the way of neither."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_hugging_face_datasets_imports_from_the_repository_root() -> None:
    pytest.importorskip("datasets", reason="in requirements.txt")
    code = (
        "import json, datasets; rows = datasets.Dataset.from_dict({'a': [1, 2]})['a'];"
        "import instructblip.data.cards as cards; title = cards.load_card('easy_vqa').title;"
        "print(json.dumps([datasets.__file__, list(rows), title]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, rows, title = json.loads(done.stdout.splitlines()[-1])
    assert "site-packages" in Path(file).parts
    assert not Path(file).is_relative_to(ROOT / "datasets")
    assert rows == [1, 2]
    assert "easy-VQA" in title  # our cards, beside it


def test_the_folder_datasets_holds_no_code() -> None:
    files = [path for path in (ROOT / "datasets").rglob("*") if path.is_file()]
    assert files
    assert {path.suffix for path in files} <= {".yaml", ".md"}


@pytest.mark.slow
def test_nothing_imports_datasets_or_evaluate() -> None:
    files = [*ROOT.glob("*.py"), *(ROOT / "instructblip").rglob("*.py")]
    assert len(files) > 30
    imported = {(path.name, name.split(".")[0]) for path in files for name in _imports(path)}
    assert [pair for pair in imported if pair[1] in ("datasets", "evaluate", "prepare", "train")] == []
    assert any(name == "torch" for _, name in imported)


def _imports(path: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return names + [
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
    ]
