"""The command line, run in this process as a user would run it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from matkv import cli


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """What `--json` printed, after a command that went well."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    def refusal(self) -> str:
        """The message of a command that refused its input, which must be one line."""
        assert self.code == 2, self.err
        (message,) = [line for line in self.err.splitlines() if "error: " in line]
        assert "Traceback" not in self.err
        return message


Word = str | Path | float


class Program:
    """`matkv`, with whatever pytest captures of its output."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: Word) -> Ended:
        code: Any = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["matkv", *map(str, arguments)])
            patch.setenv("COLUMNS", "200")
            try:
                cli.main()
            except SystemExit as ended:
                code = ended.code or 0
        captured = self.capsys.readouterr()
        return Ended(int(code), captured.out, captured.err)
