"""The report of embedding models: what it reads, what it leaves out, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from matkv.artifact.records import weights_digest
from matkv.artifact.results import Kind, Results
from matkv.errors import ArtifactError, MatkvError
from matkv.report import report
from matkv.report.embedders import arm_values, read_embedders
from matkv.report.page import Block, Missing, Table
from matkv.report.pictures.theme import Picture
from matkv.report.sections.sizes import sizes_headline, sizes_sections
from tiny import tiny

MADE = {"date": "2026-01-02", "command": "matkv embed evaluate <b>", "hardware": "a machine"}
CURVE = [{"step": step, "loss": 1.0 / step, "1x8": 0.6 / step, "2x16": 0.4} for step in (1, 2, 3)]


def embedder(folder: Path, *, rows: bool = True) -> Path:
    """A directory that looks like a trained model, with what was measured of it."""
    folder.mkdir()
    (folder / "modules.json").write_text("[]")
    (folder / "model.safetensors").write_bytes(folder.name.encode())
    made = {"base_model": "a <model>", "rungs": [[1, 8], [2, 16]], "curve": CURVE, "made": MADE}
    (folder / "matkv.json").write_text(json.dumps(made))
    if rows:
        digest = weights_digest(folder)
        save_sizes(folder, digest, {(1, 8): 0.5, (1, 16): 0.55, (2, 8): 0.6, (2, 16): 0.75})
        save_sizes(folder, "0ld", {(1, 8): 0.9})
    return folder


def save_sizes(folder: Path, digest: str, values: dict[tuple[int, int], float]) -> None:
    rows: list[dict[str, Any]] = [
        {
            "model": digest, "data": "pairs", "metric": "spearman", "layer": layer, "dim": dim,
            "value": value, "trained": layer * 8 == dim, "made": MADE,
        }
        for (layer, dim), value in values.items()
    ]  # fmt: skip
    Results(folder, Kind("sizes", ("model", "layer", "dim"))).put(rows)


def arms(folder: Path) -> Path:
    rows = [
        {"task": "sts", "arm": arm, "seed": seed, "values": {"1x8": low + seed / 10, "2x16": 0.8}}
        for arm, low in (("untrained", 0.2), ("ladder", 0.5))
        for seed in (0, 1)
    ]
    Results(folder, Kind("arms", ("arm", "seed"))).put(rows)
    return folder


def blocks(folders: Iterable[Path], name: str) -> list[Block]:
    sections = {section.name: section for section in sizes_sections(read_embedders([*folders]))}
    return list(sections[name].blocks)


def cells(table: Block) -> list[list[str]]:
    assert isinstance(table, Table)
    return [[cell.text for cell in row] for row in table.rows]


def test_a_page_is_written_with_its_pictures(tmp_path: Path) -> None:
    page = report([arms(embedder(tmp_path / "run"))], tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    assert "a &lt;model&gt;: embeddings of many sizes" in text
    assert "evaluate &lt;b&gt;" in text
    assert "last measured on 2026-01-02" in text
    names = {path.name for path in page.parent.iterdir()}
    assert names == {"index.html", "sizes-1-1.png", "arms.png", "training-1.png"}


def test_rows_of_other_weights_are_left_out_and_counted(tmp_path: Path) -> None:
    run = embedder(tmp_path / "run")
    picture, table = blocks([run], "sizes")
    assert isinstance(picture, Picture)
    assert cells(table) == [
        ["1x8", "0.500"],
        ["1x16", "0.550"],
        ["2x8", "0.600"],
        ["2x16", "0.750"],
    ]
    head = sizes_headline(read_embedders([run]))
    assert head.notes == ["run: 1 rows were measured with other weights and are left out."]
    assert head.tiles[0].value == "0.625"
    assert "mean of 2 sizes; 1x8 0.500, 2x16 0.750" in head.tiles[0].note


def test_models_stand_side_by_side(tmp_path: Path) -> None:
    table = blocks([embedder(tmp_path / "a"), embedder(tmp_path / "b")], "sizes")[-1]
    assert isinstance(table, Table)
    assert list(table.header) == ["size", "a", "b"]
    assert all(cell.best for cell in table.rows[0][1:])


def test_ways_are_compared_by_their_means_over_seeds(tmp_path: Path) -> None:
    picture, table = blocks([arms(embedder(tmp_path / "run"))], "compared")
    assert isinstance(picture, Picture)
    assert cells(table) == [
        ["untrained", "2", "0.250", "0.800", "0.525"],
        ["ladder", "2", "0.550", "0.800", "0.675"],
    ]
    assert arm_values({"values": {"2x4": 1, "1x8": 0.5, "x": 3, "1x2": None}}) == {
        (1, 8): 0.5,
        (2, 4): 1.0,
    }


def test_comparisons_need_no_model(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    assert report([arms(tmp_path / "only")], tmp_path / "out").is_file()


def test_what_is_missing_is_named_with_its_command(tmp_path: Path) -> None:
    run = embedder(tmp_path / "run", rows=False)
    (run / "matkv.json").unlink()
    for name, command in (
        ("sizes", "matkv embed evaluate RUN"),
        ("compared", "benchmarks/embedding_arms.py"),
        ("training", "matkv embed train"),
    ):
        (missing,) = blocks([run], name)
        assert isinstance(missing, Missing)
        assert command in missing.command


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    run = embedder(tmp_path / "run")
    other = tiny("llama").artifact.save(tmp_path / "artifact")
    with pytest.raises(MatkvError, match="is an embedding model and other runs are not"):
        report([other, run], tmp_path / "out")
    with pytest.raises(MatkvError, match="given twice"):
        report([run, run], tmp_path / "out")
    (run / "matkv.json").write_text("[1]")
    with pytest.raises(MatkvError, match=r"matkv\.json is damaged"):
        report([run], tmp_path / "out")
    (run / "results" / "sizes.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is damaged"):
        report([run], tmp_path / "out")
