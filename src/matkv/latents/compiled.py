"""The CPU's kernel in C, rows.c: compiled at first use for this processor's instructions, and kept.

Built by the C compiler at hand (`CC`, else cc, gcc or clang) into matkv's cache folder, under a
name that tells source, flags and compiler. Where there is none, or it fails, torch computes the
same more slowly: `trouble` says why. `MATKV_KERNEL=torch` asks for that.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from matkv.errors import MatkvError, first_line
from matkv.files import cache_home, digest

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("rows.c")
SWITCH = "MATKV_KERNEL"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared")
# By the instructions that torch uses, which ATEN_CPU_CAPABILITY may hold back.
INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
SECONDS = 120.0  # for a compiler to finish
REMEDY = "install a C compiler (gcc or clang), or name one in CC"


@dataclass(frozen=True)
class Kernel:
    """The compiled functions, and the start of a parallel region of torch's own OpenMP."""

    decode: ctypes._NamedFuncPointer
    encode: ctypes._NamedFuncPointer
    step: ctypes._NamedFuncPointer
    parallel: int


class NoKernelError(Exception):
    """Why there is no kernel, and what helps."""


def kernel() -> Kernel | None:
    """The kernel for the instructions that torch uses; None where torch has to do without."""
    return _found()[0]


def trouble() -> str | None:
    """Why there is no kernel, with the remedy; None where there is one, or none is wanted."""
    return _found()[1]


def is_wanted() -> bool:
    """Whether `MATKV_KERNEL` leaves the kernel on.

    Raises:
        MatkvError: it has another value than "torch" or "compiled".
    """
    value = os.environ.get(SWITCH, "") or "compiled"
    if value not in ("torch", "compiled"):
        raise MatkvError(f"{SWITCH}={value!r} must be torch or compiled")
    return value == "compiled"


@cache
def _found() -> tuple[Kernel | None, str | None]:
    if not is_wanted():
        return None, None
    try:
        return built(torch.backends.cpu.get_cpu_capability()), None
    except NoKernelError as error:
        logger.warning("decoding on the CPU without the compiled kernel, slower: %s", error)
        return None, str(error)


@cache
def built(instructions: str) -> Kernel:
    """The kernel for some instructions, compiled unless it was before."""
    command, flags = compiler(), (*FLAGS, *INSTRUCTIONS.get(instructions, ()))
    try:
        program = Path(command[0]).resolve()
        stamp = f"{program} {program.stat().st_mtime_ns} {command[1:]} {platform.machine()} {flags}"
        target = cache_home() / "kernels" / f"rows-{digest(SOURCE.read_bytes(), stamp.encode())}.so"
        if not target.is_file():
            _compile([*command, *flags], target)
        library = ctypes.CDLL(str(target))
        functions = library.matkv_decode, library.matkv_encode, library.matkv_step
    except OSError as error:
        raise NoKernelError(
            f"{first_line(error)}; free space or set MATKV_CACHE to another folder"
        ) from error
    for function in functions:
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
    return Kernel(*functions, _parallel())


def compiler() -> list[str]:
    """The C compiler's command, its program with its whole path.

    Raises:
        NoKernelError: there is none.
    """
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if program := shutil.which(command[0]):
            return [program, *command[1:]]
    tried = named[0] if named else ", ".join(COMPILERS)
    raise NoKernelError(f"no C compiler ({tried}) was found: {REMEDY}")


def _compile(command: Sequence[str], target: Path) -> None:
    """Under a name of its own first, so that nobody loads a file half written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f"{target.stem}-{uuid.uuid4().hex}.tmp")
    logger.info("compiling %s, once, into %s", SOURCE.name, target)
    try:
        subprocess.run(
            [*command, "-o", str(building), str(SOURCE), "-lm"],
            check=True,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        building.replace(target)
    except subprocess.CalledProcessError as error:
        said = [line.strip() for line in error.stderr.splitlines() if "error" in line.lower()]
        why = said[0] if said else f"exit code {error.returncode}"
        raise NoKernelError(f"{command[0]} failed: {why}; {REMEDY}") from error
    except subprocess.TimeoutExpired as error:
        raise NoKernelError(f"{command[0]} took longer than {SECONDS:.0f} s; {REMEDY}") from error
    finally:
        building.unlink(missing_ok=True)


def _parallel() -> int:
    """Address of GOMP_parallel in the OpenMP library that torch runs on, whose threads are shared.

    0 where there is none: the kernel then runs in the calling thread alone.
    """
    near = [Path(torch.__file__).parent / "lib", Path(torch.__file__).parents[1] / "torch.libs"]
    shipped = [
        path
        for folder in near
        for pattern in ("libgomp*", "libiomp5*", "libomp*")
        for path in sorted(folder.glob(pattern))
    ]
    for path in [*shipped, *_loaded()]:
        try:
            library = ctypes.CDLL(str(path), mode=getattr(os, "RTLD_NOLOAD", 0) | os.RTLD_NOW)
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0


def _loaded() -> list[Path]:
    """OpenMP libraries of this process, as far as the system lists them."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = dict.fromkeys(Path(line.split()[-1]) for line in lines if "/" in line)
    return [path for path in paths if path.name.startswith(("libgomp", "libiomp5", "libomp"))]
