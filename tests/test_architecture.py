"""The house: which module may import which, and what the package exports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import matkv

PACKAGE = Path(matkv.__file__).parent

# A module imports only from lower floors; modules of one floor never import one another. A name
# without a file is planned; a file without a name has to find its floor here first.
FLOORS: tuple[frozenset[str], ...] = tuple(
    frozenset(floor.split())
    for floor in (
        "errors progress lora timing",
        "files replay",
        "articles task_files task_scores ranks schedule projection losses plots search_state chat",
        "default_model data moments latents search artifact examples heatmap recipe task_texts",
        "haystack kernels divergence checkpoints results models blend allocate_config",
        "exact window",
        "attention exact_tokens sensitivity verify store",
        "cache rank_search",
        "static_cache",
        "hf",
        "rounds",
        "calibrate allocate evaluate benchmark benchmark_attention report plan adapters "
        "long_context lm_eval_model answers",
        "student tasks console vllm_plugin benchmark_plots",
        "local training options commands_context",
        "distill",
        "demo commands_evaluate commands_make commands_measure commands_report commands_use",
        "cli __init__",
        "__main__",
    )
)
# The stages meet in the artifact: none imports another, whatever their floors.
STAGES = {"calibrate", "distill", "allocate", "evaluate", "benchmark", "report", "plan"}


def modules() -> list[tuple[str, Path]]:
    """Every file with its module; a folder such as `kernels/` is one module."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return [(path.relative_to(PACKAGE).with_suffix("").parts[0], path) for path in paths]


def imported(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            parts = (node.module or "").split(".")
            if parts == ["matkv"]:
                for alias in node.names:
                    is_module = (PACKAGE / alias.name).with_suffix(".py").is_file()
                    yield alias.name if is_module else "__init__"
            elif parts[0] == "matkv":
                yield parts[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "matkv":
                    yield parts[1] if len(parts) > 1 else "__init__"


def floor_of(module: str) -> int:
    for floor, names in enumerate(FLOORS):
        if module in names:
            return floor
    pytest.fail(f"{module} has no floor: add it to FLOORS")


def test_no_module_has_two_floors() -> None:
    names = [name for floor in FLOORS for name in floor]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_go_down(module: str, path: Path) -> None:
    floor = floor_of(module)
    for other in imported(path):
        if other == module:  # files of one folder
            continue
        assert floor_of(other) < floor, f"{module} imports {other}"
        assert not STAGES >= {module, other}, f"the stage {module} imports the stage {other}"


def test_only_the_expected_names_are_exported() -> None:
    assert sorted(matkv.__all__) == [
        "Artifact",
        "CalibrateConfig",
        "LatentCache",
        "MatkvError",
        "RankTable",
        "attach",
        "calibrate",
        "detach",
        "load_model",
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
