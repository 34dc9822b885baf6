"""Commands that make or improve an artifact."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer
from transformers import PreTrainedTokenizerBase

from matkv import console, data
from matkv.allocate import allocate
from matkv.allocate_config import AllocateConfig
from matkv.artifact import Artifact, check_target
from matkv.calibrate import CalibrateConfig, calibrate
from matkv.chat import chat_examples, read_chats
from matkv.errors import BudgetError
from matkv.heatmap import heatmap, save_heatmap
from matkv.options import (
    DeviceOpt,
    DtypeOpt,
    JsonOpt,
    ModelOpt,
    RunArg,
    TextOpt,
    TrustOpt,
    load,
    open_run,
)
from matkv.recipe import DistillConfig
from matkv.search import Constraints
from matkv.task_texts import text_batches, training_texts


def calibrate_command(
    model_name: Annotated[
        str, typer.Argument(metavar="MODEL", help="hub id, directory, .gguf or smollm2-135m")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="artifact directory to write")],
    text: TextOpt = "default",
    key: Annotated[str, typer.Option(help="key basis: query or pca")] = "query",
    value: Annotated[str, typer.Option(help="value basis: output or pca")] = "output",
    tokens: Annotated[int, typer.Option(help="tokens to read", min=1)] = 65_536,
    window: Annotated[int, typer.Option(help="tokens of one sequence", min=1)] = 512,
    batch_size: Annotated[int, typer.Option(help="sequences at once", min=1)] = 8,
    skip_first: Annotated[int, typer.Option(help="leave out each sequence's first tokens")] = 0,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Make an artifact from one pass over text: bases for every layer and KV head."""
    config = CalibrateConfig(key=key, value=value, skip_first=skip_first)  # type: ignore[arg-type]
    check_target(out)
    texts = data.read_texts(text, "train")
    model, tokenizer = load(model_name, dtype, device, trust_remote_code)
    windows = data.text_windows(tokenizer, texts, window, tokens)
    with console.token_progress("calibrating", windows.numel()) as update:
        artifact = calibrate(
            model,
            data.batches(windows, batch_size),
            config,
            on_progress=lambda progress: update(progress.tokens),
        )
    artifact.save(out)
    if as_json:
        console.print_json({"artifact": str(out), "tokens": windows.numel()})
    else:
        console.out.print(f"wrote {out}: bases of {windows.numel():,} tokens")


OutOpt = Annotated[
    Path | None, typer.Option("-o", "--out", help="artifact to write; RUN itself unless given")
]


def distill_command(
    run: RunArg,
    out: OutOpt = None,
    text: TextOpt = "default",
    chats: Annotated[
        Path | None, typer.Option("--data", help=".jsonl of prompt and response, or of messages")
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--config", help="settings as TOML")] = None,
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
    from matkv.distill import distill  # needs the extra `train`, and takes seconds to import

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
    artifact = _start(
        artifact, checkpoints / "start", resume, keep=target.resolve() == run.resolve()
    )
    with console.training_progress() as update:
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
    shutil.rmtree(checkpoints, ignore_errors=True)
    if as_json:
        console.print_json({"artifact": str(target), "history": trained.history[-1]})
    else:
        console.out.print(f"wrote {target}")


def _start(artifact: Artifact, kept: Path, resume: bool, *, keep: bool) -> Artifact:
    """What a training starts from: kept beside its checkpoints, if it writes over the artifact."""
    if resume and kept.is_dir():
        return Artifact.load(kept)
    if not resume and os.environ.get("RANK", "0") == "0":  # no process group is there yet
        shutil.rmtree(kept, ignore_errors=True)
        if keep:
            artifact.save(kept)
    return artifact


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


# Sequences searched together have at most this many tokens: their logits are in memory at once.
BATCH_TOKENS = 2048


def allocate_command(
    run: RunArg,
    out: OutOpt = None,
    budget: Annotated[
        list[float] | None, typer.Option(help="may be given several times; every eighth by default")
    ] = None,
    method: Annotated[str, typer.Option(help="fisher, greedy or uniform")] = "fisher",
    text: TextOpt = "default",
    tasks: Annotated[
        str | None, typer.Option(help="search on training items of these tasks, comma-separated")
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="directory of TASK.jsonl; lm-eval's own unless given")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="grain of ranks, an eighth of the head dim")
    ] = None,
    multiple: Annotated[int, typer.Option(help="ranks are multiples of this", min=1)] = 1,
    min_rank: Annotated[
        int | None, typer.Option(help="smallest rank; the smallest trained unless given", min=0)
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="largest rank")] = None,
    equal_sides: Annotated[
        bool, typer.Option("--equal-sides", help="key rank = value rank")
    ] = False,
    equal_heads: Annotated[
        bool, typer.Option("--equal-heads", help="one rank for a layer's heads of a side")
    ] = False,
    protect: Annotated[list[int] | None, typer.Option(help="layer to keep at full rank")] = None,
    max_kl: Annotated[float | None, typer.Option(help="smallest cache within this KL")] = None,
    max_perplexity_increase: Annotated[
        str | None, typer.Option(help="smallest cache within this increase, as 5% or 0.05")
    ] = None,
    expansions: Annotated[int, typer.Option(help="fisher: points on the way down", min=1)] = 36,
    search_tokens: Annotated[int, typer.Option(help="tokens read at a time", min=1)] = 2048,
    window: Annotated[int, typer.Option(help="tokens of one sequence", min=2)] = 1024,
    drops: Annotated[int, typer.Option(help="greedy: drops a round", min=1)] = 1,
    picture: Annotated[Path | None, typer.Option(help="heat map of the first budget, PNG")] = None,
    model_name: ModelOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Find the rank of every layer, head and side, for a whole curve of budgets at once."""
    target = out or run
    check_target(target)
    config = AllocateConfig(
        method=method,  # type: ignore[arg-type]
        budgets=tuple(budget) if budget else None,
        constraints=Constraints(
            step=step,
            multiple=multiple,
            min_rank=min_rank,
            max_rank=max_rank,
            equal_sides=equal_sides,
            equal_heads=equal_heads,
            protected=tuple(protect or ()),
        ),
        max_kl=max_kl,
        max_perplexity_increase=_fraction(max_perplexity_increase),
        search_tokens=search_tokens,
        expansions=expansions,
        drops=drops,
    )
    artifact, model, tokenizer = open_run(run, model_name, dtype, device, trust_remote_code)
    solved = training_texts(tasks.split(","), tasks_dir) if tasks is not None else None
    batches = _search_batches(tokenizer, data.read_texts(text, "train"), solved, window, config)
    state = target.with_name(f".{target.name}.allocate.jsonl")
    with console.search_progress() as update:
        found = allocate(model, artifact, batches, config, state=state, on_progress=update)
    found.save(target)
    entry = found.history[-1]
    if entry["interrupted"]:
        console.err.print(f"interrupted: {target} has the tables reached; run again to go on")
        sys.exit(130)
    state.unlink(missing_ok=True)
    _show_tables(found, budget, picture, entry, as_json)


def _search_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    solved: list[str] | None,
    window: int,
    config: AllocateConfig,
) -> Iterator[Any]:
    """Held-out text, then text to search on: `solved` tasks where they are given."""
    limit = config.held_out_tokens
    if solved is None:
        limit += config.expansions * config.search_tokens
    windows = data.text_windows(tokenizer, texts, window, limit)
    at_once = max(1, min(BATCH_TOKENS, config.search_tokens) // window)
    yield from data.batches(windows, at_once)
    if solved is not None:
        yield from text_batches(tokenizer, solved, 8)


def _show_tables(
    found: Artifact,
    budget: list[float] | None,
    picture: Path | None,
    entry: dict[str, Any],
    as_json: bool,
) -> None:
    first = budget[0] if budget else min(found.tables, key=lambda one: abs(one - 0.375))
    if picture is not None:
        save_heatmap(found.tables[first], picture, title=f"ranks at {first:.1%}")
    if as_json:
        console.print_json({"tables": entry["tables"], "seconds": entry["seconds"]})
        return
    console.out.print(heatmap(found.tables[first]))
    console.out.print(console.tables_table(entry["tables"]))


def _fraction(text: str | None) -> float | None:
    """0.05 from "5%" or "0.05"."""
    if text is None:
        return None
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise BudgetError(f"{text!r} must be a percentage, as 5%, or a fraction, as 0.05") from None
