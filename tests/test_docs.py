"""The pages are true: code runs, commands parse, links lead somewhere, formats are as described."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file

import matkv
from hub import Hub
from matkv import data
from matkv.artifact.artifact import Artifact
from matkv.artifact.results import Results
from matkv.artifact.setting import FULL, Setting
from matkv.benchmark import decode
from matkv.evaluate import needles, samples, tasks, texts
from matkv.evaluate.positions import POSITIONS, positions
from matkv.settings import recipe_names
from pages import (
    GUIDE,
    PAGES,
    README,
    RECIPES,
    ROOT,
    blocks,
    commands,
    links,
    mentioned,
    messages,
    parse,
    unknown_options,
)
from tiny import Tiny, save_model

TEXT = "The quick brown fox jumps over the lazy dog. " * 240
CHAT = {"prompt": "What is a fox?", "response": "A quick, brown animal that jumps."}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which every model is a tiny one and the default text is short."""
    save_model(tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text(json.dumps(CHAT) + "\n")
    model = matkv.load_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matkv, "load_model", lambda name, **options: model)
    monkeypatch.setattr(data, "read_texts", lambda source, split: [TEXT])
    # Tracing takes long; test_static_cache.py compiles a step for real.
    monkeypatch.setattr(torch, "compile", lambda model, *, fullgraph: model)
    return tmp_path


@pytest.mark.parametrize(("script", "page"), [("cli", "cli"), ("architecture", "ARCHITECTURE")])
def test_written_pages_are_what_the_code_says(script: str, page: str) -> None:
    render = runpy.run_path(str(ROOT / "docs" / f"{script}.py"))["render"]
    if (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") != render():
        pytest.fail(f"docs/{page}.md is stale: run `make docs`, and commit it")


def test_the_code_of_the_readme_runs(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(README, "python"):
        exec(compile(block, str(README), "exec"), {"__name__": "readme"})
    assert "The lighthouse was built in" in capsys.readouterr().out


def test_the_code_of_the_guide_runs_from_top_to_bottom(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(desk / "hub").install(monkeypatch)
    names: dict[str, Any] = {"__name__": "guide"}
    for number, block in enumerate(blocks(GUIDE, "python"), start=1):
        exec(compile(block, f"{GUIDE}, block {number}", "exec"), names)
    pushed = Artifact.load(hub.repo("you/smollm2-matkv"))
    assert pushed.history[-1]["stage"] == "allocate"


@pytest.mark.parametrize("page", [README, GUIDE], ids=lambda page: page.name)
def test_commands_can_be_typed_as_they_stand(page: Path) -> None:
    found = [words for block in blocks(page, "sh") for words in commands(block)]
    assert found
    for words in found:
        parse(words)


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=lambda page: page.name)
def test_commands_and_links_exist(page: Path) -> None:
    for words in mentioned(page):
        assert not unknown_options(words), f"{page.name}: matkv {' '.join(words)}"
    for target in links(page):
        assert target.exists(), f"{page.name} links to {target}"


def test_every_recipe_that_is_named_exists() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"--config ([a-z][\w.-]+)", pages))
    assert named
    assert named <= {*recipe_names(), *recipe_names("embed")}
    table = GUIDE.read_text(encoding="utf-8").partition("| recipe |")[2].partition("\n\n")[0]
    rows = re.findall(r"(?m)^\| (`[^|]*`) \|", table)
    assert sorted(re.findall(r"`([^`]+)`", " ".join(rows))) == recipe_names()


def test_the_errors_that_the_guide_explains_are_raised_somewhere() -> None:
    section = GUIDE.read_text(encoding="utf-8").partition("## When something is refused")[2]
    explained = re.findall(r"(?m)^\| `([^`]+)`", section)
    said = messages()
    assert len(explained) > 10
    for message in explained:
        for part in re.split("…", message):
            assert part.strip() in said, message


def test_the_artifact_page_lists_the_fields_that_are_saved(llama: Tiny, tmp_path: Path) -> None:
    saved = llama.artifact.save(tmp_path / "run")
    page = (ROOT / "docs" / "artifact.md").read_text(encoding="utf-8")
    section = page.partition("## config.json")[2].partition("\n## ")[0]
    documented = re.findall(r"(?m)^\| `(\w+)` \|", section)
    assert documented == list(json.loads((saved / "config.json").read_text()))
    patterns = [
        re.escape(name).replace("<layer>", r"\d+").replace("<side>", "(key|value)")
        for name in re.findall(r"(?m)^\| `(layers\.[^`]+)` \|", page)
    ]
    assert len(patterns) == 3
    for name in load_file(saved / "bases.safetensors"):
        assert any(re.fullmatch(pattern, name) for pattern in patterns), name


def test_the_artifact_page_lists_what_makes_a_row_one_of_its_kind() -> None:
    page = (ROOT / "docs" / "artifact.md").read_text(encoding="utf-8")
    section = page.partition("## results/")[2].partition("\n## ")[0]
    common = re.findall(r"`(\w+)`", " ".join(re.findall(r"(?m)^\| (`[^|]+) \| ", section)[:6]))
    kinds = (
        texts.PERPLEXITY, tasks.TASKS, needles.NEEDLE, POSITIONS, decode.BENCHMARK, samples.SAMPLES,
    )  # fmt: skip
    for kind in kinds:
        (row,) = re.findall(rf"(?m)^\| `{kind.name}` \|.*$", section)
        own = re.findall(r"\*\*`(\w+)`", row)
        assert sorted([*common, *own]) == sorted([*kind.keys, "uniform"]), kind


def test_the_artifact_page_lists_all_fields_of_a_row(desk: Path) -> None:
    page = (ROOT / "docs" / "artifact.md").read_text(encoding="utf-8")
    model, tokenizer = matkv.load_model("model")
    windows = data.text_windows(tokenizer, [TEXT], 64, 128)
    run = matkv.calibrate(model, [windows]).save("run")
    artifact, settings = Artifact.load(run), [Setting(budget=0.5)]
    scored = Results(run, texts.PERPLEXITY)
    (row,) = texts.perplexity_rows(model, artifact, windows, "a.txt", settings, scored)
    placed = positions(model, artifact, windows, "a.txt", settings, Results(run, POSITIONS))[-1]
    for kind, fields in ((texts.PERPLEXITY, row), (POSITIONS, placed)):
        (line,) = re.findall(rf"(?m)^\| `{kind.name}` \|.*$", page)
        for name in set(fields) - {"artifact", *FULL, "dtype"}:
            assert name == "made" or f"`{name}`" in line, f"{kind}: {name}"


def test_the_index_leads_to_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    for page in set(PAGES) - {README, index}:
        assert page in links(index), f"docs/index.md has no link to {page.name}: add one"


def test_the_tutorial_runs(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tutorial.py", "--out", "runs/mine"])
    runpy.run_path(str(ROOT / "examples" / "tutorial.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "full cache" in out
    assert "bytes hold" in out
    assert Artifact.load("runs/mine").history[-1]["stage"] == "distill"


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []

    def ended() -> NoReturn:
        called.append(True)
        raise SystemExit(0)

    monkeypatch.setattr("matkv.cli.main", ended)
    with pytest.raises(SystemExit):
        runpy.run_module("matkv", run_name="__main__")
    assert called
