"""Arguments and options that several commands share, and how they open a model or a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matkv.artifact.artifact import Artifact
from matkv.commands import console
from matkv.models.load import load_model

RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="artifact directory")]
ModelOpt = Annotated[
    str | None, typer.Option("--model", help="load the base model from here instead")
]
DtypeOpt = Annotated[
    str,
    typer.Option(help="float32, bfloat16, float16 or auto: as stored where that is fast"),
]
DeviceOpt = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
TrustOpt = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code that comes with the model")
]
BudgetOpt = Annotated[float, typer.Option(help="fraction of cache bytes to keep")]
UniformOpt = Annotated[bool, typer.Option("--uniform", help="ignore stored rank tables")]
SinkOpt = Annotated[int | None, typer.Option(help="first tokens to keep exact")]
RecentOpt = Annotated[int | None, typer.Option(help="last tokens to keep exact")]
JsonOpt = Annotated[bool, typer.Option("--json", help="print JSON to standard output")]
TextOpt = Annotated[
    str,
    typer.Option(help="default, a .txt or .jsonl file, a directory of .txt, or hub:NAME[:CONFIG]"),
]
NewTokensOpt = Annotated[int, typer.Option(help="tokens to generate at most", min=1)]
TemperatureOpt = Annotated[float, typer.Option(help="0 for greedy decoding", min=0.0)]
SeedOpt = Annotated[int, typer.Option(help="seed of sampling")]


def load(
    name: str, dtype: str, device: str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a command, with a note while they load."""
    with console.err.status(f"loading {name}"):
        return load_model(name, dtype, device=device, trust_remote_code=trust_remote_code)


def open_run(
    run: Path, model_name: str | None, dtype: str, device: str | None, trust_remote_code: bool
) -> tuple[Artifact, PreTrainedModel, PreTrainedTokenizerBase]:
    """An artifact with its base model, or with the one that `--model` names instead."""
    artifact = Artifact.load(run)
    model, tokenizer = load(model_name or artifact.base_model, dtype, device, trust_remote_code)
    return artifact, model, tokenizer


OutOpt = Annotated[
    Path | None, typer.Option("-o", "--out", help="artifact to write; RUN itself unless given")
]
