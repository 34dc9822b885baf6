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
from matkv.commands.bars import progress_bar
from matkv.commands.from_fields import Given, from_fields
from matkv.commands.options import JsonOpt, Loading, OutOpt, RunArg, TextOpt
from matkv.data.chats import chat_examples, read_chats
from matkv.distill import DistillConfig, distill
from matkv.distill.checkpoints import finish, start_of

STEPS = 100  # where neither a recipe nor an option says how long


@from_fields(rungs="rung", probe_budgets="probe_budget", trackers="tracker")
def distill_command(
    run: RunArg,
    given: Given[DistillConfig],
    loading: Loading,
    out: OutOpt = None,
    text: TextOpt = "default",
    chats: Annotated[
        Path | None, typer.Option("--data", help=".jsonl of prompt and response, or of messages")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--config", help="settings: a TOML file or a recipe's name")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from a checkpoint")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Train the bases of an artifact, for quality that falls slowly with the budget.

    100 steps, unless --config, --steps, --tokens or --minutes say otherwise.
    """
    target = out or run
    place = target.resolve()
    check_target(target)
    if recipe is None and not {"steps", "tokens", "minutes"} & set(given.values):
        given.values["steps"] = STEPS
    config = given.over(recipe)
    artifact, model, tokenizer = loading.open(run)
    examples, held_out = _examples(tokenizer, text, chats, config.sequence_length)
    checkpoints = place.with_name(f".{place.name}.checkpoints")
    in_place = place == run.resolve()
    artifact = start_of(artifact, checkpoints, resume=resume, in_place=in_place)
    with progress_bar("training") as update:
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
