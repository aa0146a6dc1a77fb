"""The shape of the code: imports run downwards and in no circle, every function is annotated and short."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[2]
LONGEST = 70  # lines of a function
# A method of the model for the user's sake; it imports its writer late. pyproject.toml excepts it too.
EXCEPTION = ("instructblip.models.base", "instructblip.weights.transformers_write")


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    """Who imports whom: all imports, those within functions and those for type checkers too, but the exception."""
    graph = grimp.build_graph("instructblip", exclude_type_checking_imports=False, cache_dir=None)
    graph.remove_import(importer=EXCEPTION[0], imported=EXCEPTION[1])
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, the first node again at the end; nothing where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert sorted(set(circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}))) == ["b", "c"]


def test_imports_run_downwards(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # It would switch off all loggers that exist, those that later tests listen to.
    monkeypatch.setattr("importlinter.cli._configure_logging", lambda verbose: None)
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == 0, capsys.readouterr().out


def test_the_exception_is_imported_late() -> None:
    tree = ast.parse((ROOT / "instructblip/models/base.py").read_text(encoding="utf-8"))
    at_once = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    everywhere = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert EXCEPTION[1] in everywhere - at_once


def test_no_file_imports_itself_over_others(imports: grimp.ImportGraph) -> None:
    assert circle({module: imports.find_modules_directly_imported_by(module) for module in imports.modules}) == []


def test_no_package_imports_itself_over_others(imports: grimp.ImportGraph) -> None:
    """Side by side in one package, with all that lies in each: `data` as a whole, `data.readers` as a whole."""
    for package in sorted(imports.modules):
        inside = {
            module: child
            for child in imports.find_children(package)
            for module in (child, *imports.find_descendants(child))
        }
        graph: dict[str, set[str]] = {child: set() for child in inside.values()}
        for module, child in inside.items():
            found = {inside.get(other, child) for other in imports.find_modules_directly_imported_by(module)}
            graph[child] |= found - {child}
        assert circle(graph) == [], f"within {package}"


def _functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the repository with its place."""
    files = [
        *ROOT.glob("*.py"),
        *(file for top in ("instructblip", "tests", "benchmarks") for file in (ROOT / top).rglob("*.py")),
    ]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", node


@pytest.mark.slow
def test_every_function_says_what_it_returns_and_is_short() -> None:
    functions = list(_functions())
    assert len(functions) > 2000
    assert [place for place, node in functions if node.returns is None] == []
    lengths = {place: (node.end_lineno or 0) - node.lineno + 1 for place, node in functions}
    assert {place: lines for place, lines in lengths.items() if lines > LONGEST} == {}
