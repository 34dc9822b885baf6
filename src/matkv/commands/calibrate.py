"""matkv calibrate: bases from activations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matkv import data
from matkv.artifact.storage import check_target
from matkv.calibrate import CalibrateConfig, calibrate
from matkv.commands import console
from matkv.commands.bars import progress_bar
from matkv.commands.from_fields import from_fields
from matkv.commands.options import JsonOpt, Loading, TextOpt


@from_fields(without=("model",))
def calibrate_command(
    model_name: Annotated[
        str, typer.Argument(metavar="MODEL", help="hub id, directory, .gguf or smollm2-135m")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="artifact directory to write")],
    config: CalibrateConfig,
    loading: Loading,
    text: TextOpt = "default",
    tokens: Annotated[int, typer.Option(help="tokens to read", min=1)] = 65_536,
    length: Annotated[int, typer.Option(help="tokens of one sequence", min=1)] = 512,
    batch_size: Annotated[int, typer.Option(help="sequences at once", min=1, max=2**16)] = 8,
    as_json: JsonOpt = False,
) -> None:
    """Make an artifact from one pass over text: bases for every layer and KV head."""
    check_target(out)
    texts = data.read_texts(text, "train")
    model, tokenizer = loading.load(model_name)
    windows = data.text_windows(tokenizer, texts, length, tokens)
    with progress_bar("calibrating", windows.numel()) as update:
        artifact = calibrate(
            model,
            data.batches(windows, batch_size),
            config,
            on_progress=update,
        )
    artifact.save(out)
    if as_json:
        console.print_json({"artifact": str(out), "tokens": windows.numel()})
    else:
        console.out.print(f"wrote {out}: bases of {windows.numel():,} tokens")
