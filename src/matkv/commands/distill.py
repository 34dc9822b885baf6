"""matkv distill: train the bases of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer
from transformers import PreTrainedTokenizerBase

from matkv import data
from matkv.artifact.storage import check_target
from matkv.commands import console
from matkv.commands.bars import training_progress
from matkv.commands.options import (
    DeviceOpt,
    DtypeOpt,
    JsonOpt,
    ModelOpt,
    OutOpt,
    RunArg,
    TextOpt,
    TrustOpt,
    open_run,
)
from matkv.data.chats import chat_examples, read_chats
from matkv.distill.config import DistillConfig


def distill_command(
    run: RunArg,
    out: OutOpt = None,
    text: TextOpt = "default",
    chats: Annotated[
        Path | None, typer.Option("--data", help=".jsonl of prompt and response, or of messages")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--config", help="settings: a TOML file or a recipe's name")
    ] = None,
    objective: Annotated[str | None, typer.Option(help="local, end-to-end or both")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="independent, ladder, cycle or sandwich")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="end-to-end steps")] = None,
    tokens: Annotated[int | None, typer.Option(help="end-to-end tokens")] = None,
    minutes: Annotated[float | None, typer.Option(help="end-to-end minutes")] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate of the bases")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="rank of LoRA adapters; 0 none")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from a checkpoint")] = False,
    model_name: ModelOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Train the bases of an artifact, so that quality falls slowly as the budget shrinks."""
    # Needs the extra `train`, and takes seconds to import.
    from matkv.distill import distill
    from matkv.distill.checkpoints import finish, start_of

    target = out or run
    check_target(target)
    given = {
        "objective": objective, "schedule": schedule, "steps": steps, "tokens": tokens,
        "minutes": minutes, "lr": lr, "lora_rank": lora_rank,
    }  # fmt: skip
    config = _settings(recipe, given)
    artifact, model, tokenizer = open_run(run, model_name, dtype, device, trust_remote_code)
    examples, held_out = _examples(tokenizer, text, chats, config.sequence_length)
    checkpoints = target.with_name(f".{target.name}.checkpoints")
    in_place = target.resolve() == run.resolve()
    artifact = start_of(artifact, checkpoints, resume=resume, in_place=in_place)
    with training_progress() as update:
        trained = distill(
            model,
            artifact,
            examples,
            config,
            held_out=held_out,
            checkpoints=checkpoints,
            resume=resume,
            on_progress=update,
        )
    if dist.is_initialized() and dist.get_rank() != 0:
        return  # every process has the same bases; the first one writes them
    trained.save(target)
    if trained.history[-1].get("interrupted"):
        console.err.print(f"interrupted: {target} has what was learned; go on with --resume")
        sys.exit(130)
    finish(checkpoints)
    if as_json:
        console.print_json({"artifact": str(target), "history": trained.history[-1]})
    else:
        console.out.print(f"wrote {target}")


def _examples(
    tokenizer: PreTrainedTokenizerBase, text: str, chats: Path | None, length: int
) -> tuple[Any, Any]:
    """What to train on, and four sequences held out where the source has some."""
    if chats is not None:
        return chat_examples(tokenizer, read_chats(chats), length), None
    examples = data.text_windows(tokenizer, data.read_texts(text, "train"), length)
    if text != "default" and not text.startswith("hub:"):
        return examples, None
    held_out = data.read_texts(text, "validation")
    return examples, data.text_windows(tokenizer, held_out, length, 4 * length)


def _settings(recipe: Path | None, given: dict[str, Any]) -> DistillConfig:
    """The recipe's settings, replaced by the command line's; 100 steps if nothing says how long."""
    if recipe is not None:
        return DistillConfig.from_toml(recipe, **given)
    settings = {name: value for name, value in given.items() if value is not None}
    if not {"steps", "tokens", "minutes"} & set(settings):
        settings["steps"] = 100
    return DistillConfig.from_dict(settings)
