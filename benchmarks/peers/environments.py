"""A virtual environment for each published package, and contestants scored inside it.

Environments live under the cache folder, are made once and made again when what they should hold
changes. torch is installed first, at the version that runs here, so that no package replaces it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from matkv.files import cache_home

from .protocol import Protocol, Row

ROW = "PEER-ROW "
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "quantized": (
        f"transformers=={transformers.__version__}",
        "optimum-quanto==0.2.7",
        "hqq==0.2.8.post1",
        "accelerate",
    ),
    "presses": ("kvpress==0.5.5",),
    # It takes its cache as `past_key_values`, a name that later versions do not hand on.
    "shrink": ("cacheshrink==0.1.5", "transformers==5.23.0"),
}
STAMP = "requirements.txt"


class PeerEnvironmentError(RuntimeError):
    """An environment could not be built, or what ran inside ended early."""


def python_of(name: str) -> Path:
    """The interpreter of an environment, which is built where it is missing.

    Raises:
        PeerEnvironmentError: pip could not install it.
    """
    folder = cache_home() / "peers" / name
    wanted = [f"torch=={torch.__version__.split('+')[0]}", *REQUIREMENTS[name]]
    stamp, python = folder / STAMP, folder / "bin" / "python"
    if stamp.is_file() and stamp.read_text(encoding="utf-8").split("\n") == wanted:
        return python
    print(f"building the environment {folder}", file=sys.stderr)
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([str(python), "-m", "pip", "install", "--quiet", wanted[0]])
    _run([str(python), "-m", "pip", "install", "--quiet", *wanted])
    stamp.write_text("\n".join(wanted), encoding="utf-8")
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise PeerEnvironmentError(f"{' '.join(command[:6])} failed: {_last_line(done.stderr)}")


def score_inside(
    name: str, wanted: list[tuple[str, str]], windows_NT: Tensor, protocol: Protocol, **job: Any
) -> Iterator[Row]:
    """Score the contestants `wanted`, (method, setting), of one environment; rows as they come.

    `job` goes to the child as it is: model, dtype, device and what a method calibrates on.

    Raises:
        PeerEnvironmentError: it could not be built, or ended before it had scored all of them.
    """
    content = job | {
        "module": name,
        "wanted": wanted,
        "protocol": asdict(protocol),
        "windows": windows_NT.tolist(),
    }
    module = f"{Path(__file__).parent.name}.child"
    yield from rows_inside(name, module, content, len(wanted))


def rows_inside(name: str, module: str, job: dict[str, Any], count: int) -> Iterator[Row]:
    """The `count` rows that a module of this folder prints, run with a job in an environment.

    Raises:
        PeerEnvironmentError: it could not be built, or ended before it had printed them all.
    """
    python = python_of(name)
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "job.json"
        task.write_text(json.dumps(job), encoding="utf-8")
        with (Path(folder) / "stderr").open("w+", encoding="utf-8") as errors:
            yield from _rows([str(python), "-m", module, str(task)], errors, count)


def _rows(command: list[str], errors: Any, count: int) -> Iterator[Row]:
    inside = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    seen = 0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=inside
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(ROW):
                    seen += 1
                    yield json.loads(line.removeprefix(ROW))
        finally:
            if seen < count:
                process.terminate()
    if seen < count:
        errors.seek(0)
        raise PeerEnvironmentError(f"ended early: {_last_line(errors.read())}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "without a message"
