"""A tiny model with a tokenizer and a calibrated run, and two small tasks in JSONL, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matkv
from matkv.artifact.artifact import Artifact
from tiny import save_model, tokens

WORDS = ("oak", "river", "stone", "cloud", "bread", "lamp", "goat", "wheel", "salt", "drum")


def letters(count: int = 10) -> list[dict[str, Any]]:
    """Questions with two to four choices of different lengths."""
    return [
        {
            "query": f"Question: What of {WORDS[i % 10]} {i}?",
            "choices": ["yes", "not at all", "may be so", "I"][: 2 + i % 3],
            "gold": i % 2,
        }
        for i in range(count)
    ]


def contexts(count: int = 8) -> list[dict[str, Any]]:
    """One continuation after each of two contexts."""
    return [
        {
            "context_options": [f"The {WORDS[i]} and so the oak", f"The {WORDS[i]} and so it"],
            "continuation": f"was {WORDS[-i - 1]}.",
            "gold": i % 2,
        }
        for i in range(count)
    ]


def write_tasks(folder: Path) -> Path:
    """`letters.jsonl` and `contexts.jsonl` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in (("letters", letters()), ("contexts", contexts())):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    return folder


def make_run(home: Path) -> tuple[Any, Any, Artifact]:
    """A model in `home`/model, its tokenizer, and its artifact, saved in `home`/run."""
    save_model(home / "model")
    model, tokenizer = matkv.load_model(home / "model")
    artifact = matkv.calibrate(model, [tokens(4, 48, seed=7)])
    artifact.save(home / "run")
    return model, tokenizer, artifact
