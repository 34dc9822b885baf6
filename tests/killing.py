"""Commands killed before one of their changes to the disk, and run again: what is left is whole.

    python tests/killing.py HOME FOLDER KILLS STAGE...

HOME is the commands' fixture. Runs each stage's command in child processes of its own, each killed
a little later than the one before, and then again, as a user would. Prints how that ended as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "os.truncate")
KILLED = 9
RECIPE = """
sequence_length = 32
batch_size = 2
steps = 5
warmup_steps = 1
checkpoint_every = 1
"""


@dataclass(frozen=True)
class Stage:
    """A command on a run, the options that it takes when it goes on, and what it leaves."""

    words: Callable[[Path, Path], list[str]]
    state: Callable[[Path], Any]
    going_on: tuple[str, ...] = ()
    may_refuse: bool = False


def calibrate(home: Path, run: Path) -> list[str]:
    text = ["--text", str(home / "text.txt"), "--tokens", "128", "--length", "32"]
    return ["calibrate", str(home / "model"), "-o", str(run), *text, "--key", "pca"]


def distill(home: Path, run: Path) -> list[str]:
    (home / "killing.toml").write_text(RECIPE)
    text = ["--text", str(home / "text.txt")]
    return ["distill", str(run), "--config", str(home / "killing.toml"), *text]


def allocate(home: Path, run: Path) -> list[str]:
    sizes = ["--search-tokens", "64", "--length", "32", "--expansions", "4"]
    return ["allocate", str(run), "--text", str(home / "text.txt"), "--budget", "0.5", *sizes]


def evaluate(home: Path, run: Path) -> list[str]:
    sizes = ["--length", "32", "--tokens", "64", "--budget", "0.5", "--budget", "0.25"]
    return ["evaluate", str(run), "--text", str(home / "text.txt"), *sizes]


def artifact_state(run: Path) -> Any:
    """All of an artifact but times, and entries before the last, which a second run repeats."""
    from matkv.artifact import Artifact

    artifact = Artifact.load(run)
    energy = [
        bases.energy_GD.tolist() for sides in artifact.bases.values() for bases in sides.values()
    ]
    tables = {budget: table.to_json() for budget, table in artifact.tables.items()}
    return [artifact.digest, energy, tables, artifact.recent, timeless(artifact.history[-1])]


def rows_state(run: Path) -> Any:
    from matkv.artifact import load_rows

    return [artifact_state(run), timeless(load_rows(run, "perplexity"))]


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        times = ("seconds", "minutes", "made")
        return {name: timeless(value[name]) for name in value if name not in times}
    return [timeless(one) for one in value] if isinstance(value, (list, tuple)) else value


STAGES = {
    "calibrate": Stage(calibrate, artifact_state),
    "distill": Stage(distill, artifact_state, ("--resume",), may_refuse=True),
    "allocate": Stage(allocate, artifact_state),
    "evaluate": Stage(evaluate, rows_state),
}


def called(words: list[str], log: Path, kill_before: int | None = None) -> tuple[int, int]:
    """A command's exit code in a child of its own, and how often it changed the disk."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        counted = counting(kill_before)
        code = 0
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            sys.argv = ["matkv", *words]
            from matkv import cli

            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        os.write(writer, str(counted[0]).encode())
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as told:
        changes = int(told.read() or 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), changes


def counting(kill_before: int | None) -> list[int]:
    """Counts changes to the disk from now on; ends the process before one of them."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and "r" not in arguments[1]
        if event in CHANGES or (writes and "/dev/" not in str(arguments[0])):
            if count[0] == kill_before:
                os._exit(KILLED)
            count[0] += 1

    sys.addaudithook(hook)
    return count


def prepared(home: Path, folder: Path, name: str) -> Path:
    return Path(shutil.copytree(home / "run", folder / name / "run"))


def moments(changes: int, kills: int) -> list[int]:
    """Changes to kill before: evenly over the run, and its very last ones."""
    last = min(changes, max(1, kills // 4))
    rest, count = changes - last, min(changes, kills) - last
    return [i * rest // count for i in range(count)] + list(range(rest, changes))


def tried(stage: Stage, home: Path, folder: Path, kills: int) -> dict[str, int]:
    """How often going on after a kill gave an equal result, and how often it was refused."""
    log = folder / "log"
    whole = prepared(home, folder, "whole")
    before = stage.state(whole)
    code, changes = called(stage.words(home, whole), log)
    assert code == 0, log.read_text()
    after = stage.state(whole)
    assert after != before
    outcomes: Counter[str] = Counter()
    for number in moments(changes, kills):
        run = prepared(home, folder, str(number))
        words = stage.words(home, run)
        code, _ = called(words, log, number)
        assert code == KILLED, f"{number}: {code}, {log.read_text()}"
        code, _ = called([*words, *stage.going_on], log)
        if code == 0:
            assert stage.state(run) == after, f"killed before change {number}: another result"
            outcomes["equal"] += 1
        else:
            said = log.read_text()
            assert stage.may_refuse and code == 2, f"{number}: {code}, {said}"
            assert said.count("error: ") == 1 and "Traceback" not in said, said
            assert stage.state(run) in (before, after), f"{number}: neither the old nor the new"
            outcomes["refused"] += 1
        shutil.rmtree(run.parent)
    return {"changes": changes, "equal": outcomes["equal"], "refused": outcomes["refused"]}


def main() -> None:
    home, folder, kills, names = (
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        int(sys.argv[3]),
        sys.argv[4:],
    )
    import matkv.distill.stage  # noqa: F401  takes seconds to import: once, before all forks

    outcomes = {}
    for name in names:
        (folder / name).mkdir()
        outcomes[name] = tried(STAGES[name], home, folder / name, kills)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
