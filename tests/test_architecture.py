"""The house: which wing may import which, how large its parts may be, and what it exports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import matkv

PACKAGE = Path(matkv.__file__).parent

# A wing is a folder, or a file beside the folders. It imports lower floors only; wings of one floor
# never import one another. A wing without a floor has to find its place here first.
FLOORS = """
errors progress logits
files schedule settings codes geometry
ranks data models
bases
artifact latents
attention report embeddings
cache vllm
hf
calibrate distill allocate evaluate benchmark plan
__init__
commands
cli
__main__
"""
ARROWS = 144  # between wings; more of them, and the way of the data is hard to follow
FILE_LINES, FUNCTION_LINES = 330, 60

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """A file by its dotted name below the package; a folder's face bears the folder's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in FILES}


def wing_of(name: str) -> str:
    return name.partition(".")[0]


def floor_of(wing: str) -> int:
    for floor, line in enumerate(FLOORS.strip().splitlines()):
        if wing in line.split():
            return floor
    pytest.fail(f"{wing} has no floor: add it to FLOORS")


def imported(path: Path) -> Iterator[str]:
    """The files of this package that a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            for alias in node.names:
                yield from _ours(f"{module}.{alias.name}") or _ours(module)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield from _ours(alias.name)


def _ours(module: str) -> list[str]:
    """The name of a file of this package; none for what is no such file."""
    if module == "matkv":
        return ["__init__"]
    name = module.removeprefix("matkv.")
    return [name] if name != module and name in NAMES else []


def test_no_wing_has_two_floors() -> None:
    wings = FLOORS.split()
    assert len(wings) == len(set(wings))


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_down(name: str) -> None:
    wing = wing_of(name)
    for other in map(wing_of, imported(NAMES[name])):
        if other != wing:
            assert floor_of(other) < floor_of(wing), f"{name} imports {other}"


def test_no_import_goes_round() -> None:
    graph = {
        name: {other for other in imported(path) if other != name} for name, path in NAMES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_few_arrows_lead_from_wing_to_wing() -> None:
    arrows = {
        (wing_of(name), wing_of(other))
        for name, path in NAMES.items()
        for other in imported(path)
        if wing_of(name) != wing_of(other)
    }
    assert len(arrows) <= ARROWS


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_stay_small(name: str) -> None:
    source = NAMES[name].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{name}.{node.name} has {lines} lines"


def test_only_the_expected_names_and_every_error_are_exported() -> None:
    errors = {name for name in vars(matkv.errors) if name.endswith("Error")}
    assert errors <= {*matkv.__all__}
    assert sorted({*matkv.__all__} - errors) == [
        "Artifact",
        "CalibrateConfig",
        "LatentCache",
        "RankTable",
        "attach",
        "attached",
        "calibrate",
        "detach",
        "load_model",
        "shrink",
    ]
    for name in matkv.__all__:
        assert getattr(matkv, name).__module__.startswith("matkv.")


def test_the_error_tree_is_the_one_its_docstring_draws() -> None:
    from matkv import errors

    drawn: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        name = line.lstrip("│├└─ ").split(" ")[0]
        if name.endswith("Error"):
            drawn.append(((len(line) - len(line.lstrip("│├└─ "))) // 4, name))

    def tree(error: type[BaseException], depth: int = 0) -> Iterator[tuple[int, str]]:
        yield depth, error.__name__
        for child in error.__subclasses__():
            if child.__module__ == errors.__name__:
                yield from tree(child, depth + 1)

    assert drawn == list(tree(errors.MatkvError))
