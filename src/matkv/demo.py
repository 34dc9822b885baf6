"""The demo: the main job end to end on the default model, in minutes on two CPU cores."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matkv import console, data
from matkv.allocate import allocate
from matkv.allocate_config import AllocateConfig
from matkv.artifact import Artifact
from matkv.cache import refill, storage_nbytes
from matkv.calibrate import CalibrateConfig, artifact_from, collect_moments
from matkv.default_model import DEFAULT_MODEL
from matkv.distill import distill
from matkv.evaluate import Row, evaluate, full_states
from matkv.hf import attach, detach
from matkv.models import load_model
from matkv.plots import plot_quality
from matkv.recipe import DistillConfig

BUDGETS = (0.875, 0.75, 0.5, 0.375, 0.25)
WINDOW = 32  # tokens behind every query that training and the last curves keep exact
DISTILL = DistillConfig(
    objective="end-to-end",
    window=WINDOW,
    minutes=3,
    sequence_length=1024,
    batch_size=1,
    kl=0.25,
    ce=0.75,
    lr=1e-2,
    probe_every=20,
)
# Less text than `matkv allocate` takes by itself: a minute or two instead of several.
ALLOCATE = AllocateConfig(budgets=BUDGETS, expansions=12, search_tokens=1024, held_out_tokens=1024)
PROMPT = "What is the capital of France, and what is it known for?"
ANSWER_BUDGET = 0.5
RESIDENT_TOKENS = 4096
CALIBRATE_TOKENS = 32_768
SCORE_TOKENS = 4096


@dataclass(frozen=True)
class Curve:
    """One line of the plot: an artifact, with its own rank tables or equal ranks.

    `window` tokens are exact, as many as the artifact says unless given.
    """

    artifact: Artifact
    uniform: bool = True
    window: int | None = None


def demo(out: Path) -> dict[str, Any]:
    """Calibrate, distill and allocate on the default model, compress its cache, and measure.

    Prints as it goes, writes `out`/pca, `out`/calibrated, `out`/distilled and `out`/perplexity.png,
    and returns what it measured.
    """
    started = time.perf_counter()
    with console.err.status(f"loading {DEFAULT_MODEL} (converted once, about 20 s)"):
        model, tokenizer = load_model(DEFAULT_MODEL)
    artifacts = _calibrate(model, tokenizer, out)
    distilled = _distill(model, tokenizer, artifacts["calibrated"])
    distilled.save(out / "distilled")
    distilled = _allocate(model, tokenizer, distilled)
    distilled.save(out / "distilled")
    curves = {name: Curve(artifact) for name, artifact in artifacts.items()} | {
        f"calibrated, {WINDOW} exact": Curve(artifacts["calibrated"], window=WINDOW),
        f"distilled, {WINDOW} exact": Curve(distilled),
        f"own ranks, {WINDOW} exact": Curve(distilled, uniform=False),
    }
    held_out = data.text_windows(
        tokenizer, data.read_texts("default", "validation"), 1024, SCORE_TOKENS
    )
    rows = _evaluate(model, curves, held_out)
    tokens_T = data.text_windows(
        tokenizer, data.read_texts("default", "validation"), RESIDENT_TOKENS, RESIDENT_TOKENS
    )[0]
    resident = _resident(model, distilled, tokens_T)
    answers = _answers(model, tokenizer, distilled)
    for name, answer in answers.items():
        console.out.print(f"\n[bold]{name}[/bold]: {answer}")
    console.out.print()
    console.out.print(_table(rows, resident))
    full = rows["pca"][0].perplexity
    points = {
        name: [(row.budget, row.perplexity) for row in its_rows if row.budget is not None]
        for name, its_rows in rows.items()
    }
    title = f"SmolLM2-135M (4-bit weights), held-out articles, {SCORE_TOKENS:,} tokens"
    plot = plot_quality(points, full, out / "perplexity.png", title)
    seconds = time.perf_counter() - started
    console.out.print(f"artifacts in {out}, plot in {plot}; {seconds:.0f} s in all")
    return {
        "rows": {name: [row.to_json() for row in its_rows] for name, its_rows in rows.items()},
        "resident_bytes": {str(budget): nbytes for budget, nbytes in resident.items()},
        "answers": answers,
        "plot": str(plot),
        "seconds": seconds,
    }


def _calibrate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path
) -> dict[str, Artifact]:
    """One pass over training articles gives both artifacts."""
    texts = data.read_texts("default", "train")
    windows_NT = data.text_windows(tokenizer, texts, 512, CALIBRATE_TOKENS)
    with console.token_progress("calibrating", windows_NT.numel()) as update:
        layers, tokens = collect_moments(
            model, data.batches(windows_NT, 8), on_progress=lambda progress: update(progress.tokens)
        )
    kinds = {
        "pca": CalibrateConfig(key="pca", value="pca"),
        "calibrated": CalibrateConfig(),
    }
    artifacts = {}
    for name, config in kinds.items():
        artifacts[name] = artifact_from(model, layers, config, tokens=tokens)
        artifacts[name].save(out / name)
    return artifacts


def _distill(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: Artifact
) -> Artifact:
    """A few minutes of training on the training articles."""
    length = DISTILL.sequence_length
    train, held_out = (
        data.text_windows(tokenizer, data.read_texts("default", split), length)
        for split in ("train", "validation")
    )
    with console.training_progress() as update:
        return distill(model, start, train, DISTILL, held_out=held_out[:2], on_progress=update)


def _allocate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, artifact: Artifact
) -> Artifact:
    """Rank tables for the demo's budgets, searched on training articles."""
    tokens = ALLOCATE.held_out_tokens + ALLOCATE.expansions * ALLOCATE.search_tokens
    texts = data.read_texts("default", "train")
    windows_NT = data.text_windows(tokenizer, texts, 1024, tokens)
    with console.search_progress() as update:
        return allocate(model, artifact, data.batches(windows_NT, 1), ALLOCATE, on_progress=update)


def _evaluate(
    model: PreTrainedModel, curves: dict[str, Curve], windows_NT: Tensor
) -> dict[str, list[Row]]:
    """Rows of every curve; the full cache is scored once and heads each list."""
    rows: dict[str, list[Row]] = {}
    total = windows_NT.numel() * (len(curves) * len(BUDGETS) + 1)
    with console.token_progress("scoring held-out articles", total) as update:
        done = 0
        for name, curve in curves.items():
            first = not rows
            passes = [None, *BUDGETS] if first else list(BUDGETS)
            rows[name] = evaluate(
                model,
                curve.artifact,
                windows_NT,
                BUDGETS,
                uniform=curve.uniform,
                window=curve.window,
                full_cache=first,
                on_progress=lambda at, tokens, passes=passes, done=done: update(  # type: ignore[misc]
                    done + passes.index(at) * windows_NT.numel() + tokens
                ),
            )
            done += windows_NT.numel() * len(passes)
    full = next(iter(rows.values()))[0]
    return {name: its if its[0].budget is None else [full, *its] for name, its in rows.items()}


def _resident(
    model: PreTrainedModel, artifact: Artifact, tokens_T: Tensor
) -> dict[float | None, int]:
    """Measured bytes of the cache's storages after reading `tokens_T`, by budget."""
    with console.err.status(f"reading {tokens_T.numel():,} tokens"):
        states = full_states(model, tokens_T)
    resident: dict[float | None, int] = {None: storage_nbytes(refill(model, states))}
    for budget in BUDGETS:
        resident[budget] = storage_nbytes(refill(attach(model, artifact, budget), states))
    detach(model)
    return resident


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, artifact: Artifact
) -> dict[str, str]:
    """The model's answer to one prompt with the full and with a compressed cache."""
    chat = [{"role": "user", "content": PROMPT}]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    input_ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    answers = {"prompt": PROMPT}
    for name in ("full cache", f"{ANSWER_BUDGET:.0%} of the cache"):
        if name != "full cache":
            attach(model, artifact, ANSWER_BUDGET)
        with console.err.status(f"answering with {name}"):
            output = model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=64,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        new = output[0, input_ids.shape[1] :]
        answers[name] = str(tokenizer.decode(new, skip_special_tokens=True)).strip()
    detach(model)
    return answers


def _table(rows: dict[str, list[Row]], resident: dict[float | None, int]) -> Table:
    title = f"perplexity on held-out articles; MB that a cache holds at {RESIDENT_TOKENS:,} tokens"
    table = Table(title=title, title_justify="left")
    for name in ("budget", "MB", *rows):
        table.add_column(name, justify="right")
    for lines in zip(*rows.values(), strict=True):
        budget = lines[0].budget
        table.add_row(
            "full" if budget is None else f"{budget:.1%}",
            f"{resident[budget] / 1e6:.1f}",
            *(f"{line.perplexity:.1f}" for line in lines),
        )
    return table
