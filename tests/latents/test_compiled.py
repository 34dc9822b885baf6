"""The kernel's compiling: once, safely beside others, and what happens where it cannot be."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch

from layers import MIXED, coded_layer
from matkv.attention import latent as attention
from matkv.attention.kernels import cpu, native
from matkv.errors import MatkvError
from matkv.latents import compiled
from one_query import SCALING, G, queries

PROGRAM = "from matkv.latents import compiled; print(compiled.kernel() is not None)"


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of its own, and nothing remembered before or after."""
    monkeypatch.setenv("MATKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    with (
        mock.patch.object(compiled, "_found", cache(compiled._found.__wrapped__)),
        mock.patch.object(compiled, "built", cache(compiled.built.__wrapped__)),
    ):
        yield


@pytest.fixture
def has_compiler() -> None:
    try:
        compiled.compiler()
    except compiled.NoKernelError as error:
        pytest.skip(str(error))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("cache/kernels/*"))


def fake_compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_it_is_compiled_once(has_compiler: None, tmp_path: Path) -> None:
    assert compiled.kernel() is not None and compiled.trouble() is None
    (kept,) = files(tmp_path)
    assert kept.suffix == ".so"
    compiled.built.cache_clear()
    with mock.patch.object(subprocess, "run", side_effect=AssertionError("compiled again")):
        assert compiled.built(torch.backends.cpu.get_cpu_capability()).decode


def test_several_processes_may_start_at_once(has_compiler: None, tmp_path: Path) -> None:
    programs = [
        subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [one.communicate()[0].strip() for one in programs] == ["True"] * 3
    assert [path.suffix for path in files(tmp_path)] == [".so"]


def test_other_instructions_are_other_files(has_compiler: None, tmp_path: Path) -> None:
    """Only compiled: the processor need not have them."""
    command = compiled.compiler()
    for name, flags in {**compiled.INSTRUCTIONS, "DEFAULT": ()}.items():
        try:
            compiled._compile([*command, *compiled.FLAGS, *flags], tmp_path / f"{name}.so")
        except compiled.NoKernelError as error:  # a compiler for another kind of processor
            assert name != "DEFAULT", error
    assert (tmp_path / "DEFAULT.so").is_file()


def test_without_a_compiler_torch_decodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert compiled.kernel() is None
    trouble = compiled.trouble()
    assert trouble is not None and "no C compiler (cc, gcc, clang)" in trouble
    assert trouble.endswith("install a C compiler (gcc or clang), or name one in CC")
    assert len(caplog.records) == 1  # said once
    latents = coded_layer(MIXED, 1, 5)
    assert attention._decoder(queries(1, 1), latents) is attention._decode_stretches
    with mock.patch.object(cpu, "decode", wraps=cpu.decode) as called, torch.no_grad():
        attention.attend(latents, queries(1, 1), None, scaling=SCALING)
    assert called.call_count == 1


def test_calling_it_without_a_kernel_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    latents = coded_layer(MIXED, 1, 5)
    query_BGXM = torch.zeros(1, G, 1, latents.projection.width)
    with pytest.raises(RuntimeError, match="matkv doctor"):
        native.decode(query_BGXM, latents.rows, latents.projection, None, SCALING)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 'rows.c:1: error: no such thing' >&2; exit 1", "rows.c:1: error: no such thing"),
        ("exit 3", "exit code 3"),
    ],
)
def test_a_compiler_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, why: str
) -> None:
    monkeypatch.setenv("CC", fake_compiler(tmp_path, script))
    assert compiled.kernel() is None
    assert why in str(compiled.trouble())
    assert files(tmp_path) == []


def test_what_cannot_be_loaded_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that writes something else."""
    write = 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"'
    monkeypatch.setenv("CC", fake_compiler(tmp_path, write))
    assert compiled.kernel() is None
    assert "MATKV_CACHE" in str(compiled.trouble())


def test_a_folder_that_cannot_be_written_is_told(
    has_compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    monkeypatch.setenv("MATKV_CACHE", str(blocked))
    assert compiled.kernel() is None
    assert "set MATKV_CACHE to another folder" in str(compiled.trouble())


def test_a_compiler_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", fake_compiler(tmp_path, "exec sleep 60"))
    monkeypatch.setattr(compiled, "SECONDS", 0.2)
    assert compiled.kernel() is None
    assert "took longer" in str(compiled.trouble())


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.SWITCH, "torch")
    assert compiled.kernel() is None and compiled.trouble() is None


def test_the_switch_knows_two_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.SWITCH, "fast")
    with pytest.raises(MatkvError, match="MATKV_KERNEL='fast' must be torch or compiled"):
        compiled.kernel()


def test_threads_are_those_of_torch() -> None:
    """Torch on Linux brings its OpenMP; without it the kernel stays in one thread."""
    if sys.platform == "linux" and "OpenMP" in torch.__config__.parallel_info():
        assert compiled._parallel()
