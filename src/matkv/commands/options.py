"""Arguments and options that several commands share, and how they open a model or a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matkv.artifact.artifact import Artifact
from matkv.artifact.pretrained import resolved
from matkv.commands import console
from matkv.errors import MatkvError, ModelError
from matkv.models.load import load_model
from matkv.settings import NotNegative, Seed, settings


def as_runs(given: Path | list[Path] | None) -> Path | list[Path] | None:
    """Directories of artifacts, those that come along by their names."""
    if given is None:
        return None
    return [resolved(one) for one in given] if isinstance(given, list) else resolved(given)


RunArg = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="artifact directory, or smollm2-135m for the one that comes along",
        callback=as_runs,
    ),
]
BudgetOpt = Annotated[float, typer.Option(help="fraction of cache bytes to keep")]
JsonOpt = Annotated[bool, typer.Option("--json", help="print JSON to standard output")]
TEXT_HELP = "default, a .txt or .jsonl file, a directory of .txt, or hub:NAME[:CONFIG]"
TextOpt = Annotated[str, typer.Option(help=TEXT_HELP)]
NewTokensOpt = Annotated[int, typer.Option(help="tokens to generate at most", min=1, max=2**24)]
OutOpt = Annotated[
    Path | None, typer.Option("-o", "--out", help="artifact to write; RUN itself unless given")
]


@settings(MatkvError)
class Sampling:
    """How tokens are drawn."""

    temperature: NotNegative = Field(default=0.0, description="0 for greedy decoding")
    seed: Seed = Field(default=0, description="seed of sampling")


@settings(ModelError)
class Loading:
    """How the model of a command is loaded."""

    model: str | None = Field(default=None, description="load the base model from here instead")
    dtype: str = Field(
        default="auto", description="float32, bfloat16, float16 or auto: as stored where fast"
    )
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1, ...")
    trust_remote_code: bool = Field(
        default=False, description="run Python code that comes with the model"
    )

    def load(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and tokenizer, with a note while they load."""
        with console.status(f"loading {name}"):
            return load_model(
                name, self.dtype, device=self.device, trust_remote_code=self.trust_remote_code
            )

    def open(self, run: Path) -> tuple[Artifact, PreTrainedModel, PreTrainedTokenizerBase]:
        """An artifact with its base model, or with the one that `--model` names instead."""
        artifact = Artifact.load(run)
        name = artifact.base_model if self.model is None else self.model
        if not name:
            raise ModelError(f"{run} is of a model without a name: say where it is with --model")
        return artifact, *self.load(name)


# Of commands that load something else than a run's model.
DeviceOpt = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
TrustOpt = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code that comes with the model")
]
