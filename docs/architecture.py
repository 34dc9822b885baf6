"""Write the list of files in docs/ARCHITECTURE.md, a line a file: `make docs`.

The line is the first sentence of the file's docstring: change it there, not on the page.
"""

from __future__ import annotations

import ast
from pathlib import Path

PAGE = Path(__file__).with_name("ARCHITECTURE.md")
PACKAGE = Path(__file__).parents[1] / "src" / "matkv"
BEGIN, END = "<!-- files -->\n", "<!-- end of files -->\n"
# The way of the data; test_architecture.py has the floors.
WINGS = (
    *(
        "errors",
        "files",
        "settings",
        "progress",
        "logits",
        "schedule",
        "codes",
        "geometry",
        "ranks",
        "data",
        "models",
    ),
    *("bases", "latents", "artifact", "attention", "cache", "hf", "vllm"),
    *("calibrate", "distill", "allocate", "evaluate", "benchmark", "plan", "embeddings", "report"),
    *("commands", "cli"),
)


def files() -> str:
    """Every wing with its files."""
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    if (
        unknown := found
        - set(WINGS)
        - {"__init__", "__main__", "__pycache__", "recipes", "pretrained"}
    ):
        raise SystemExit(f"{', '.join(sorted(unknown))}: add to WINGS where data passes it")
    return "".join(_wing(name) for name in WINGS if name in found)


def _wing(name: str) -> str:
    folder = PACKAGE / name
    if not folder.is_dir():
        return f"- `{name}.py`: {_sentence(folder.with_suffix('.py'))}\n"
    lines = [f"- **`{name}/`**: {_sentence(folder / '__init__.py')}\n"]
    for path in sorted(folder.rglob("*.py")):
        if path.name != "__init__.py":
            lines.append(f"  - `{path.relative_to(folder)}`: {_sentence(path)}\n")
    return "".join(lines)


def _sentence(path: Path) -> str:
    """The first sentence of a file's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".")


def render() -> str:
    """The page with the files as they are now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{files()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE}")
