"""benchmarks/embedding_arms.py on a tiny model: every arm, kept, shown and drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import embedding_arms
from tiny_embedders import TEXTS, build

WORDS = [f"{a} {b}" for a in TEXTS for b in ("today", "at night", "again", "in may")]


def test_every_arm_is_trained_kept_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build("bert").save_pretrained(str(tmp_path / "model"))
    rows = [{"anchor": word, "positive": f"so {word}"} for word in WORDS]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = [
        {"sentence1": a, "sentence2": b, "score": n % 6}
        for n, (a, b) in enumerate(zip(WORDS, WORDS[::-1], strict=True))
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    arms = [word for arm in embedding_arms.ARMS for word in ("--arm", arm)]
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--model", "model", "--pretrained", "model", "--rungs", "1x8,4x32", "--steps", "2",
        "--batch-size", "4", "--triplets", "t.jsonl", "--pairs", "p.jsonl", "--out", "out",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["embedding_arms.py", *arguments, *arms])
    embedding_arms.main()
    first = capsys.readouterr().out
    kept = json.loads((tmp_path / "out" / "results" / "arms.json").read_text())["rows"]
    assert [row["arm"] for row in kept] == list(embedding_arms.ARMS)
    assert all(set(row["values"]) == {"1x8", "4x32"} for row in kept)
    assert (tmp_path / "out" / "arms.png").read_bytes().startswith(b"\x89PNG")
    embedding_arms.main()  # nothing is measured again
    assert json.loads((tmp_path / "out" / "results" / "arms.json").read_text())["rows"] == kept
    assert capsys.readouterr().out == first


def test_openings_and_neighbours_are_taken_from_paragraphs() -> None:
    long = [f"This is sentence number {n} of a paragraph, long enough." for n in range(5)]
    text = "Title\n\n" + " ".join(long) + "\n\nShort one. And another."
    pairs = list(embedding_arms._neighbours(text))
    assert pairs == [(long[0], long[1]), (long[2], long[3])]
    assert list(embedding_arms._openings([text])) == [(long[0], " ".join(long[1:]))]
