"""What is kept with every figure: how, where and with which versions it was made."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from matkv.files import digest

Record = dict[str, Any]


def made(**settings: Any) -> Record:
    """When, where and by which command something was measured; `settings` as seeds are added."""
    return {
        "date": date.today().isoformat(),
        "command": command_line(),
        "hardware": hardware(),
        "versions": versions(),
        **settings,
    }


def weights_digest(model: Path) -> str:
    """A short name of the weights in a model's directory: equal only where these are bit-equal."""
    files = sorted(model.rglob("*.safetensors"))
    names = (path.relative_to(model).as_posix().encode() for path in files)
    return digest(*names, *(path.read_bytes() for path in files))


def versions() -> dict[str, str]:
    """Of matkv, of what it stands on, and of Python; torch's says which build it is."""
    return {
        "matkv": _version("matkv"),
        "torch": str(torch.__version__),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
    }


def command_line() -> str:
    """The command as a user would type it, without the directory of the program."""
    program = Path(sys.argv[0]).name
    return shlex.join([program, *sys.argv[1:]])


@cache
def hardware() -> str:
    """The accelerator, or the processor and its threads, in a few words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
