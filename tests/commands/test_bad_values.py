"""Bad values of options: every one is an error in one line with exit code 2, within seconds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bad_values import (
    HUGE,
    LONG,
    NOT_BUDGETS,
    NOT_COUNTS,
    NOT_DEVICES,
    NOT_NUMBERS,
    NOT_RUNS,
    NOT_SEEDS,
    NOT_SOME,
    assert_refused,
)
from program import Program

LOADING = {
    "--device": NOT_DEVICES,
    "--dtype": ("", "int8", "float", "bfloat17", "[/red]"),
}
WAY = {"--sink": ("-1", "x", HUGE), "--recent": ("-1", "1.5", HUGE)}
NOT_MODELS = ("", "no-model-at-all", "{tmp}/none", "{text}", "[/red]", LONG)
TAKE_RUNS = ("inspect", "doctor", "report", "evaluate", "benchmark", "distill", "allocate")
NO_BUDGET = ("inspect", "doctor")
BAD: dict[str, dict[str, tuple[str, ...]]] = {
    "calibrate {model} -o {out} --text {text}": {
        **LOADING,
        "--key": ("", "svd", "[/red]"),
        "--value": ("query",),
        "--skip-first": ("-1", "x", HUGE),
        "--tokens": NOT_SOME,
        "--length": (*NOT_COUNTS, "1000000000"),
        "--batch-size": NOT_COUNTS,
        "--text": ("", "hub:none", LONG, "{tmp}/none.txt", "{tmp}/[/red].txt", "hub:"),
        "-o": ("{model}", "/", ".", LONG),
    },
    "distill {run} -o {out} --text {text}": {
        **LOADING,
        "--objective": ("", "all", "[/red]"),
        "--schedule": ("x",),
        "--steps": NOT_COUNTS,
        "--tokens": ("0", "x"),
        "--minutes": (*NOT_NUMBERS, "0"),
        "--lr": (*NOT_NUMBERS, "0"),
        "--lora-rank": ("-1", "x", HUGE),
        "--lora-dropout": ("-0.1", "1", "2", "nan"),
        "--rung": NOT_BUDGETS,
        "--seed": ("-1", HUGE, "x"),
        "--batch-size": ("0", "1000000000"),
        "--tracker": ("paper", ""),
        "--recent": ("-1", "1000000"),
        "--kl": ("-1", "nan"),
        "--config": ("{tmp}/none.toml", "{tmp}/latin.toml", "{tmp}/deep.toml", "{tmp}/seed.toml"),
        "--data": ("{tmp}/none.jsonl", "{text}", "{tmp}/nested.jsonl", "{tmp}/half.jsonl"),
    },
    "allocate {run} -o {out} --text {text} --length 64": {
        "--method": ("", "magic"),
        "--budget": NOT_BUDGETS,
        "--step": ("0", "x", HUGE),
        "--multiple": ("0", "-3"),
        "--min-rank": ("-1", "x"),
        "--max-rank": ("-1", "x"),
        "--protect": ("-1", "9", "x"),
        "--max-kl": (*NOT_NUMBERS, "0"),
        "--max-perplexity-increase": ("", "much", "%", "nan%", "-5%", "0"),
        "--expansions": ("0", "1000000000", "x"),
        "--search-tokens": ("0", "x", HUGE),
        "--drops": ("0", "1000000000"),
        "--length": ("0", "1", "1000000000"),
    },
    "evaluate {run} --text {text} --budget 0.5": {
        **WAY,
        "--budget": NOT_BUDGETS,
        "--length": ("0", "1", "x", "1000000000"),
        "--tokens": ("0", "-1", "x"),
        "--tasks-dir": ("{tmp}",),
        "--limit": ("0", "3"),
        "--long-context": ("0", "10", "x", "1000000000"),
        "--samples": ("0", "x", HUGE),
        "--seed": ("-1", HUGE),
        "--batch-size": ("0", "1000000000"),
    },
    "benchmark {run} --steps 1": {
        **WAY,
        "--context": ("0", "-1", "x", "1000000000"),
        "--batch": ("0", "x", "1000000000"),
        "--budget": NOT_BUDGETS,
        "--steps": ("0", "x"),
        "--threads": ("0", "x", HUGE),
        "--memory": ("", "much", "0", "-1GB"),
    },
    "benchmark-attention --heads 2 --kv-heads 2 --context 16 --steps 1": {
        **LOADING,
        "--kv-heads": ("0", "3", "x"),
        "--context": ("0", "x", "1000000000"),
        "--budget": NOT_BUDGETS,
    },
    "plan {model} --context 100": {
        **LOADING,
        "--context": NOT_COUNTS,
        "--batch": ("0", "x"),
        "--budget": NOT_BUDGETS,
        "--memory": ("", "much", "0"),
        "--bandwidth": ("", "fast", "0", "-1"),
    },
    "generate {run} hello": {
        **LOADING,
        **WAY,
        "--budget": (*NOT_BUDGETS, "0.01"),
        "--max-new-tokens": NOT_COUNTS,
        "--temperature": NOT_NUMBERS,
        "--seed": NOT_SEEDS,
        "--model": NOT_MODELS,
    },
    "chat {run}": {
        **LOADING,
        **WAY,
        "--budget": (*NOT_BUDGETS, "0.01"),
        "--max-new-tokens": NOT_COUNTS,
        "--temperature": NOT_NUMBERS,
        "--seed": NOT_SEEDS,
        "--model": NOT_MODELS,
    },
    "doctor {run}": {"--device": NOT_DEVICES, "--model": NOT_MODELS},
    "demo": {"-o": ("{text}", "{text}/in", "/dev/null", LONG)},
    **{f"{command} --json": {"--": NOT_RUNS} for command in TAKE_RUNS},
    **{f"{command} {{run}}": {"--budget": ("1",), "--nothing": ("",)} for command in NO_BUDGET},
    "report {run} -o {out}": {
        "--budget": ("0.5", "x"),
        "--prompt": ("hello",),
        "--max-new-tokens": ("0", "x"),
    },
}
CASES = [
    (command, option, value)
    for command, options in BAD.items()
    for option, values in options.items()
    for value in values
]


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipes that cannot be read."""
    tmp = tmp_path_factory.mktemp("spoilt")
    (tmp / "latin.toml").write_bytes(b"# caf\xe9\nsteps = 1\n")
    (tmp / "deep.toml").write_text("steps = " + "[" * 50_000)
    (tmp / "nested.jsonl").write_text('{"prompt": ' + "[" * 100_000)
    (tmp / "half.jsonl").write_text('{"prompt": "a", "response": "\\ud800"}')
    (tmp / "seed.toml").write_text(f"seed = {HUGE}\n")
    return tmp


@pytest.mark.parametrize(("command", "option", "value"), CASES)
def test_a_bad_value_is_one_line_and_exit_code_2(
    home: Path, spoilt: Path, tmp_path: Path, matkv: Program, command: str, option: str, value: str
) -> None:
    names = {
        **{"model": home / "model", "run": home / "run", "text": home / "text.txt"},
        **{"out": tmp_path / "out", "tmp": spoilt},
    }
    words = [word.format(**names) for word in (*command.split(), option, value)]
    started = time.perf_counter()
    ended = matkv(*words)
    assert_refused(ended)
    assert time.perf_counter() - started < 30
    assert not (tmp_path / "out").exists()


def test_there_are_many() -> None:
    assert len(CASES) >= 400
