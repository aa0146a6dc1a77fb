"""docs/try_it.ipynb runs from top to bottom; here on tiny parts, which its cell of parameters names."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from tests.kit.blip import write_blip
from tests.kit.own_data import write_own_data
from tests.kit.runs import REPOSITORY, make_world
from tests.kit.untrained import write_untrained_run

NOTEBOOK = REPOSITORY / "docs/try_it.ipynb"


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


def test_the_notebook_is_kept_without_outputs_and_counts() -> None:
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert len(code) >= 8
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1
    assert NOTEBOOK.stat().st_size < 30_000


def test_the_readme_names_it() -> None:
    assert "](docs/try_it.ipynb)" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    world = make_world(tmp_path / "world")
    write_blip(tmp_path / "blip", "retrieval")
    card = load_card(str(write_own_data(tmp_path / "own", count=10)))
    prepare_dataset(card, tmp_path / "own", tmp_path / "shards", progress=False)
    parameters = {
        "CHECKPOINT": str(write_untrained_run(world, tmp_path / "untrained")),
        "MATCHER": str(tmp_path / "blip"),
        "SHARDS": str(tmp_path / "shards/mine/val"),
        "WINTER": ["red"],
        "OUT": str(tmp_path / "out"),
        "SETTINGS": [*world.train, "vision.norm=layer", "mixture=own", "suite=own"],
    }
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (place,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert {ast.unparse(line).split(" = ")[0] for line in ast.parse(place.source).body} == parameters.keys()
    place.source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    for name, value in {**world.environment, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}.items():
        monkeypatch.setenv(name, value)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(REPOSITORY / "docs")}}).execute()
    assert (tmp_path / "out/ten/tuned/curves.png").is_file()
    printed = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "before: " in printed and "after: " in printed
    assert not list(REPOSITORY.glob("docs/*outputs*"))
