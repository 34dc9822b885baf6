"""Every command on a tiny model in a directory, and every error as one line with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import matkv.commands.calibrate as calibrate_command
from matkv import cli
from matkv.artifact.artifact import Artifact
from tiny import save_model

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory, a text file and a calibrated run."""
    home = tmp_path_factory.mktemp("cli")
    save_model(home / "model")
    (home / "text.txt").write_text(TEXT)
    return home


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    if not (folder / "run").exists():
        code, _, err = call(monkeypatch, capsys, *calibrate(folder, folder / "run"))
        assert code == 0, err
    return folder / "run"


def calibrate(folder: Path, out: Path) -> list[str]:
    source = ["--text", str(folder / "text.txt"), "--length", "64", "--tokens", "512"]
    return ["calibrate", str(folder / "model"), "-o", str(out), *source]


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["matkv", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    code: Any = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code or 0
    captured = capsys.readouterr()
    return int(code), captured.out, captured.err


Call = tuple[pytest.MonkeyPatch, pytest.CaptureFixture[str]]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return monkeypatch, capsys


def test_calibrate_writes_an_artifact(run: Path, folder: Path) -> None:
    artifact = Artifact.load(run)
    assert artifact.base_model == str((folder / "model").resolve())
    assert artifact.history[0]["stage"] == "calibrate"
    assert artifact.history[0]["tokens"] == 512


def test_evaluate_prints_rows_as_json(run: Path, folder: Path, tools: Call) -> None:
    text = ["--text", str(folder / "text.txt"), "--length", "32", "--tokens", "64"]
    budgets = ["--budget", "1.0", "--budget", "0.5"]
    code, out, _ = call(*tools, "evaluate", str(run), *budgets, *text, "--json")
    rows = json.loads(out)["rows"]
    assert code == 0
    assert [row["budget"] for row in rows] == [None, 1.0, 0.5]
    assert {"perplexity", "bytes_per_token", "tokens"} <= set(rows[0])
    assert rows[0]["bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    assert rows[2]["bytes_per_token"] * 2 == rows[0]["bytes_per_token"]
    assert rows[1]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-4)


def test_evaluate_prints_a_table(run: Path, folder: Path, tools: Call) -> None:
    text = ["--text", str(folder / "text.txt"), "--length", "32", "--tokens", "64"]
    code, out, _ = call(*tools, "evaluate", str(run), "--budget", "0.25", *text)
    assert code == 0
    assert "full cache" in out
    assert "25.0%" in out


BAD = {
    "no such run": (["evaluate", "{tmp}/none", "--budget", "0.5"], "no artifact at"),
    "not an artifact": (["evaluate", "{model}", "--budget", "0.5"], "not a matkv artifact"),
    "budget 0": (["evaluate", "{run}", "--budget", "0"], "budget 0.0 must be in (0, 1]"),
    "budget 1.5": (["generate", "{run}", "hi", "--budget", "1.5"], "budget 1.5 must be in (0, 1]"),
    "budget nan": (["evaluate", "{run}", "--budget", "nan"], "budget nan must be in (0, 1]"),
    "small budget": (["generate", "{run}", "hi", "--budget", "0.01"], "below one step"),
    "no text file": (["evaluate", "{run}", "--budget", "1", "--text", "{tmp}/no.txt"], "not exist"),
    "empty text": (["evaluate", "{run}", "--budget", "1", "--text", "{tmp}/empty.txt"], "no text"),
    "short text": (["evaluate", "{run}", "--budget", "1", "--text", "{tmp}/a.txt"], "fewer than"),
    "no model": (["calibrate", "{tmp}/none", "-o", "{tmp}/o", "--text", "{text}"], "cannot load"),
    "no gguf": (["calibrate", "{tmp}/x.gguf", "-o", "{tmp}/o", "--text", "{text}"], "no file"),
    "bad basis": (["calibrate", "{model}", "-o", "{tmp}/o", "--key", "x"], "must be one of"),
    "bad dtype": (["generate", "{run}", "hi", "--dtype", "int8"], "must be auto, float32"),
    "empty prompt": (["generate", "{run}", "", "--raw"], "prompt is empty"),
    "unknown option": (["evaluate", "{run}", "--bugdet", "1"], "No such option"),
    "foreign output": (
        ["calibrate", "{model}", "-o", "{model}", "--text", "{text}", "--length", "64"],
        "is not an artifact",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, run: Path, folder: Path, tmp_path: Path, tools: Call
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.txt").write_text("short")
    names = {"run": run, "model": folder / "model", "text": folder / "text.txt", "tmp": tmp_path}
    arguments, message = BAD[case]
    code, _, err = call(*tools, *(part.format(**names) for part in arguments))
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    if case != "unknown option":  # usage errors also print the usage
        assert len([line for line in err.splitlines() if "error" in line]) == 1


def test_ctrl_c_ends_with_one_line(run: Path, folder: Path, tools: Call) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch, _ = tools
    monkeypatch.setattr(calibrate_command, "calibrate", interrupted)
    before = sorted((run / name).read_bytes() for name in ("config.json", "bases.safetensors"))
    code, _, err = call(*tools, *calibrate(folder, run))
    assert code == 130
    assert "interrupted" in err
    after = sorted((run / name).read_bytes() for name in ("config.json", "bases.safetensors"))
    assert before == after


def test_long_contexts_as_json(run: Path, tools: Call) -> None:
    asked = ["--budget", "0.5", "--long-context", "700", "--long-context", "650", "--samples", "1"]
    code, out, err = call(*tools, "evaluate", str(run), *asked, "--seed", "3", "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert {row["context"] for row in rows} == {650, 700}
    assert [row["test"] for row in rows].count("multikey") == 2 * 2 * 3
    assert {row["budget"] for row in rows} == {None, 0.5}
    assert all((row["n"], row["seed"], row["chat"]) == (1, 3, True) for row in rows)
    code, out, _ = call(*tools, "evaluate", str(run), *asked, "--seed", "3", "--json")
    assert json.loads(out)["rows"] == rows  # the same down to when it was made
    kept = json.loads((run / "results" / "needle.json").read_text())["rows"]
    assert [row for row in kept if row["seed"] == 3] == rows


def test_long_contexts_as_a_table(run: Path, tools: Call) -> None:
    asked = ["--budget", "0.5", "--long-context", "650", "--samples", "1", "--plain"]
    code, out, err = call(*tools, "evaluate", str(run), *asked)
    assert code == 0, err
    assert "full cache" in out
    assert "50.0%" in out
    assert "multikey" in out
    assert "perplexity" not in out


def test_positions_as_a_table_and_as_json(run: Path, folder: Path, tools: Call) -> None:
    text = ["--text", str(folder / "text.txt"), "--length", "96", "--tokens", "288"]
    asked = ["evaluate", str(run), "--budget", "0.5", "--by-position", *text]
    code, out, err = call(*tools, *asked)
    assert code == 0, err
    assert "0-63" in out
    assert "64-95" in out
    code, out, _ = call(*tools, *asked, "--json")
    rows = json.loads(out)["rows"]
    assert [(row["budget"], row["start"], row["end"]) for row in rows] == [
        (None, 0, 64),
        (None, 64, 96),
        (0.5, 0, 64),
        (0.5, 64, 96),
    ]
    assert rows[0]["text"] == "text.txt"
    assert rows[0]["tokens"] == 3 * 63


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--long-context", "30"], "context of 30 tokens is too short"),
        (["--long-context", "4000"], "the model has 2048: give a shorter one"),
        (["--long-context", "700", "--samples", "0"], "samples 0 must be above 0"),
    ],
)
def test_bad_contexts_are_refused(run: Path, tools: Call, asked: list[str], message: str) -> None:
    code, _, err = call(*tools, "evaluate", str(run), "--budget", "0.5", *asked)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_programs_help_says_what_the_commands_help_says(name: str) -> None:
    program: Any = typer.main.get_command(cli.app)
    said = program.get_command(None, name).help.partition("\n\n")[0]
    assert " ".join(said.split()).startswith(cli.COMMANDS[name].rstrip("."))


def test_attention_alone_still_goes_by_its_old_name(tools: Call) -> None:
    sizes = [
        "--heads",
        "2",
        "--kv-heads",
        "2",
        "--head-dim",
        "8",
        "--context",
        "16",
        "--steps",
        "1",
    ]
    code, out, err = call(*tools, "benchmark", "--attention", *sizes, "--json")
    assert code == 0, err
    assert json.loads(out)["rounds"] == 1


@pytest.mark.parametrize(
    "code",
    [
        "import matkv",
        "import sys; sys.argv = ['matkv', '--help']; from matkv.cli import main\n"
        "try: main()\nexcept SystemExit: pass",
        "import matkv.distill.config; from matkv.distill import DistillConfig",
    ],
)
def test_what_is_light_stays_light(code: str) -> None:
    heavy = {"transformers.trainer", "transformers.modeling_utils", "matplotlib", "accelerate"}
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "matkv.settings" in loaded and not heavy & loaded


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), "No space left on device: choose another place"),
        (PermissionError(13, "Permission denied", "a/b"), "a/b: Permission denied"),
        (UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogate"), "is not UTF-8"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    tools: Call, folder: Path, tmp_path: Path, error: Exception, told: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    tools[0].setattr(calibrate_command, "check_target", fail)
    code, _, err = call(*tools, *calibrate(folder, tmp_path / "run"))
    assert code == 2
    assert err.startswith("error: ") and told in err and err.count("\n") == 1
