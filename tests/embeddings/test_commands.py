"""`matkv embed` on a tiny model: train, evaluate, truncate, and every error as one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from bad_values import (
    DIGITS,
    LONG,
    NOT_COUNTS,
    NOT_DEVICES,
    NOT_NUMBERS,
    NOT_SEEDS,
    assert_refused,
)
from matkv.embeddings import rung_table
from matkv.embeddings.data import read_scored
from matkv.embeddings.measure import similarity_evaluator
from program import Ended, Program
from tiny_embedders import TEXTS, build

RUNGS = "1x8,2x16,4x32"
WORDS = [f"{a} {b}" for a in TEXTS for b in ("today", "at night", "again", "in may")]
Call = Callable[..., Ended]


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and data."""
    home = tmp_path_factory.mktemp("embed")
    build("bert").save_pretrained(str(home / "model"))
    lines(home / "train.jsonl", [{"anchor": w, "positive": f"so {w}"} for w in WORDS])
    scored = [
        {"sentence1": a, "sentence2": b, "score": n % 6}
        for n, (a, b) in enumerate(zip(WORDS, WORDS[::-1], strict=True))
    ]
    lines(home / "pairs.jsonl", scored)
    lines(home / "corpus.jsonl", [{"_id": n, "text": w} for n, w in enumerate(WORDS)])
    lines(home / "queries.jsonl", [{"_id": "q", "text": "a plane", "relevant": [0, 3]}])
    return home


@pytest.fixture
def call(desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`matkv embed` in the directory."""
    monkeypatch.chdir(desk)
    program = Program(capsys)
    return lambda *arguments: program("embed", *arguments)


TRAIN = ("train", "model", "--data", "train.jsonl", "--rungs", RUNGS, "--batch-size", "4")


@pytest.fixture
def run(desk: Path, call: Call) -> Path:
    if not (desk / "run").exists():
        ended = call(*TRAIN, "-o", "run", "--steps", "3")
        assert ended.code == 0, ended.err
    return desk / "run"


def test_train_writes_a_model_and_how_it_was_made(run: Path, desk: Path) -> None:
    made = json.loads((run / "matkv.json").read_text())
    assert made["base_model"] == "model"
    assert made["rungs"] == [[1, 8], [2, 16], [4, 32]]
    assert made["config"]["steps"] == made["steps"] == 3
    assert made["made"]["command"].startswith("matkv embed train model --data train.jsonl")
    trained = SentenceTransformer(str(run), device="cpu")
    assert abs(trained.encode(TEXTS) - build("bert").encode(TEXTS)).max() > 0
    assert not list(desk.glob(".run*"))


def test_train_as_json_from_a_recipe(desk: Path, call: Call) -> None:
    (desk / "a.toml").write_text(f'rungs = "{RUNGS}"\nsteps = 9\nbatch_size = 4\nlog_every = 1\n')
    found = call(
        "train", "model", "--data", "train.jsonl", "-o", "other", "--config", "a.toml",
        "--steps", "2", "--distill", "1", "--json",
    ).json()  # fmt: skip
    assert found["steps"] == 2
    assert {"1x8", "2x16", "4x32", "distill", "loss"} <= set(found["curve"][0])


def test_evaluate_measures_the_sizes_that_were_trained(run: Path, call: Call) -> None:
    data = ["--pairs", "pairs.jsonl", "--corpus", "corpus.jsonl", "--queries", "queries.jsonl"]
    rows = call("evaluate", "run", *data, "--json").json()["rows"]
    assert [(row["layer"], row["dim"]) for row in rows] == [(1, 8), (2, 16), (4, 32)] * 2
    assert all(row["trained"] for row in rows)
    assert {row["metric"] for row in rows} == {"spearman_cosine", "cosine_ndcg@10"}
    evaluator = similarity_evaluator(read_scored(Path("pairs.jsonl")))
    model = SentenceTransformer(str(run), device="cpu")
    wanted = rung_table(model, evaluator, [(1, 8), (2, 16), (4, 32)]).values
    assert [row["value"] for row in rows[:3]] == list(wanted.values())
    kept = json.loads((run / "results" / "sizes.json").read_text())["rows"]
    assert [row["value"] for row in kept] == [row["value"] for row in rows]
    call("evaluate", "run", *data, "--json")
    assert len(json.loads((run / "results" / "sizes.json").read_text())["rows"]) == 6


def test_evaluate_shows_a_grid_and_draws_it(run: Path, desk: Path, call: Call) -> None:
    arguments = ("evaluate", "run", "--pairs", "pairs.jsonl", "--grid")
    ended = call(*arguments, "--picture", "grid.png")
    assert ended.code == 0, ended.err
    assert "spearman_cosine" in ended.out
    assert all(f" {layer} " in ended.out for layer in (1, 2, 3, 4))
    assert (desk / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert len(call(*arguments, "--json").json()["rows"]) == 12


def test_evaluate_leaves_other_directories_alone(desk: Path, call: Call) -> None:
    ended = call("evaluate", "model", "--pairs", "pairs.jsonl", "--rungs", "2x8")
    assert ended.code == 0, ended.err
    assert not (desk / "model" / "results").exists()


def test_sizes_that_were_never_trained_warn(
    run: Path, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    assert call("evaluate", "run", "--pairs", "pairs.jsonl", "--rungs", "3x8,4x32").code == 0
    assert "size 3x8 was never trained (trained: 1x8, 2x16, 4x32)" in caplog.text


def test_truncate_writes_an_ordinary_model(run: Path, desk: Path, call: Call) -> None:
    found = call("truncate", "run", "2x16", "-o", "small", "--json").json()
    assert (found["layers"], found["dim"]) == (2, 16)
    assert found["rungs"] == [[1, 8], [2, 16]]
    small = SentenceTransformer(str(desk / "small"), device="cpu")
    whole = SentenceTransformer(
        str(run), device="cpu", truncate_dim=16, config_kwargs={"num_hidden_layers": 2}
    )
    assert np.array_equal(small.encode(TEXTS), whole.encode(TEXTS))
    assert found["parameters"] == sum(p.numel() for p in small.parameters())
    rows = call("evaluate", "small", "--pairs", "pairs.jsonl", "--json").json()["rows"]
    assert [(row["layer"], row["dim"]) for row in rows] == [(1, 8), (2, 16)]


def test_an_interrupted_training_goes_on(
    desk: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matkv.embeddings import train

    original = train._Watch.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 2:
            self.stop.requested = True
        original(self, args, state, control, **given)

    monkeypatch.setattr(train._Watch, "on_step_end", stop)
    ended = call(*TRAIN, "-o", "cut", "--steps", "4")
    assert ended.code == 130
    assert "interrupted after 2 steps: go on with --resume" in ended.err
    assert not (desk / "cut").exists()
    monkeypatch.setattr(train._Watch, "on_step_end", original)
    other = call(*TRAIN, "-o", "cut", "--steps", "5", "--resume")
    assert "steps 4 (now 5)" in other.refusal()
    ended = call(*TRAIN, "-o", "cut", "--steps", "4", "--resume")
    assert ended.code == 0, ended.err
    assert json.loads((desk / "cut" / "matkv.json").read_text())["steps"] == 4


BAD: dict[str, tuple[list[str], str]] = {
    "no model": (["truncate", "{desk}/none", "2x8", "-o", "o"], "cannot load"),
    "no size": (["truncate", "model", "2", "-o", "o"], "must be LAYERxDIMENSION"),
    "two sizes": (["truncate", "model", "1x8,2x8", "-o", "o"], "is 2 sizes"),
    "too deep": (["truncate", "model", "5x8", "-o", "o"], "layer 5 of 5x8 must be in 1..4"),
    "too wide": (["truncate", "model", "2x33", "-o", "o"], "dimension 33 of 2x33 must be in 1..32"),
    "foreign output": (["truncate", "model", "2x8", "-o", "{desk}"], "is no embedding model"),
    "no data": (["train", "model", "--data", "none.jsonl", "-o", "o"], "cannot read none.jsonl"),
    "malformed data": (["train", "model", "--data", "bad.jsonl", "-o", "o"], "bad.jsonl, line 2"),
    "wrong fields": (["train", "model", "--data", "pairs.jsonl", "-o", "o"], "line 1: 'anchor'"),
    "wrong loss": (
        ["train", "model", "--data", "train.jsonl", "-o", "o", "--loss", "x"],
        "must be one of ranking, cosent",
    ),
    "nothing to resume": (
        ["train", "model", "--data", "train.jsonl", "-o", "o", "--resume"],
        "/.o.checkpoints: start without --resume",
    ),
    "no recipe": (
        ["train", "model", "--data", "train.jsonl", "-o", "o", "--config", "none.toml"],
        "none.toml",
    ),
    "nothing to measure": (["evaluate", "model"], "give --pairs"),
    "half a retrieval": (["evaluate", "model", "--corpus", "corpus.jsonl"], "go together"),
    "sizes out of range": (
        ["evaluate", "model", "--pairs", "pairs.jsonl", "--rungs", "9x9"],
        "layer 9 of 9x9 must be in 1..4",
    ),
    "no layers": (["evaluate", "albert", "--pairs", "pairs.jsonl"], "share their weights"),
    "another kind of config": (["truncate", "listed", "2x8", "-o", "o"], "not an object"),
    "a deep config": (["truncate", "nested", "2x8", "-o", "o"], "nested too deeply"),
    "half a character": (
        ["train", "model", "--data", "half.jsonl", "-o", "o"],
        "half.jsonl, line 1: half of a surrogate pair",
    ),
    "too many digits": (
        ["train", "model", "--data", "digits.jsonl", "-o", "o"],
        "digits.jsonl, line 1: not JSON",
    ),
    "a cache artifact": (["truncate", "artifact", "2x8", "-o", "o"], "key/value caches"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case: str, desk: Path, call: Call) -> None:
    (desk / "bad.jsonl").write_text('{"anchor": "a", "positive": "b"}\n{"anchor": ')
    if not (desk / "albert").exists():
        build("albert").save_pretrained(str(desk / "albert"))
    (desk / "half.jsonl").write_text('{"anchor": "a", "positive": "\\ud800"}')
    (desk / "digits.jsonl").write_text(f'{{"anchor": {DIGITS}}}')
    for name, config in (("listed", "[1]"), ("nested", "[" * 100_000)):
        (desk / name).mkdir(exist_ok=True)
        (desk / name / "config.json").write_text(config)
    (desk / "artifact").mkdir(exist_ok=True)
    (desk / "artifact" / "config.json").write_text('{"base_model": "x"}')
    arguments, message = BAD[case]
    ended = call(*(part.format(desk=desk) for part in arguments))
    assert ended.code == 2, ended.err
    assert message in " ".join(ended.err.split())
    assert "Traceback" not in ended.err
    assert not (desk / "o").exists()


NOT_SIZES = ("", "x", "2", "0x8", "9x9", "2x33", "-1x8", f"{DIGITS}x8", "[/red]")
NOT_FILES = ("", ".", "/", "none.jsonl", "/dev/null", LONG)
NOT_MODELS = ("", ".", "none-at-all", "train.jsonl", "[/red]", LONG)
VALUES: dict[str, dict[str, tuple[str, ...]]] = {
    "train model --data train.jsonl -o o": {
        "--rungs": (*NOT_SIZES, "1x8,1x8"),
        "--loss": ("", "x", "[/red]"),
        "--schedule": ("", "x"),
        "--distill": ("", "x", "nan", "inf", "-1"),
        "--steps": NOT_COUNTS,
        "--batch-size": NOT_COUNTS,
        "--max-tokens": NOT_COUNTS,
        "--lr": (*NOT_NUMBERS, "0"),
        "--seed": NOT_SEEDS,
        "--data": NOT_FILES,
        "--config": ("", ".", "none.toml", "train.jsonl", LONG),
        "--device": NOT_DEVICES,
        "-o": ("/", ".", "train.jsonl", "/dev/null", LONG),
    },
    "evaluate model --pairs pairs.jsonl": {
        "--rungs": (*NOT_SIZES, "1x8,1x8"),
        "--pairs": NOT_FILES,
        "--corpus": NOT_FILES,
        "--batch-size": NOT_COUNTS,
        "--picture": ("", ".", "/", "/dev/null/x.png", LONG),
        "--device": NOT_DEVICES,
    },
    "evaluate --pairs pairs.jsonl --": {"": NOT_MODELS},
    "truncate model 2x8 -o o": {"--device": NOT_DEVICES, "-o": ("/", ".", "/dev/null", LONG)},
    "truncate model -o o --": {"": NOT_SIZES},
}
CASES = [
    (command, option, value)
    for command, options in VALUES.items()
    for option, values in options.items()
    for value in values
]


@pytest.mark.parametrize(("command", "option", "value"), CASES)
def test_a_bad_value_is_one_line_and_exit_code_2(
    call: Call, desk: Path, command: str, option: str, value: str
) -> None:
    assert_refused(call(*command.split(), *([option] if option else []), value))
    assert not (desk / "o").exists()
