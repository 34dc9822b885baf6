"""The demo: the main job end to end on the default model, in minutes on two CPU cores."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matkv import data
from matkv.allocate.config import AllocateConfig
from matkv.allocate.stage import allocate
from matkv.artifact.artifact import Artifact
from matkv.artifact.setting import Setting
from matkv.cache.cache import full_states, refill, storage_nbytes
from matkv.calibrate import CalibrateConfig, artifact_from
from matkv.commands import console
from matkv.commands.bars import search_progress, token_progress, training_progress
from matkv.commands.options import JsonOpt
from matkv.distill.config import DistillConfig, ProbeSettings
from matkv.distill.stage import distill
from matkv.errors import MatkvError
from matkv.evaluate.texts import Row, evaluate
from matkv.hf.attach import attach, detach
from matkv.hf.observe import collect_moments
from matkv.models.default import DEFAULT_MODEL
from matkv.models.load import load_model
from matkv.ranks import check_budget
from matkv.report.pictures.figures import Axis, Line, lines
from matkv.report.pictures.theme import save
from matkv.report.runs import amount
from matkv.report.sections.quality import perplexity_panel

BUDGETS = (0.875, 0.75, 0.5, 0.375, 0.25)
DISTILL = DistillConfig(
    objective="end-to-end",
    minutes=3,
    sequence_length=1024,
    batch_size=1,
    kl=0.25,
    ce=0.75,
    lr=1e-2,
    probe=ProbeSettings(every=20),
)
# Less text than `matkv allocate` takes by itself: a minute or two instead of several.
ALLOCATE = AllocateConfig(expansions=12, search_tokens=1024, held_out_tokens=1024)
PROMPT = "What is the capital of France, and what is it known for?"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo runs on, and how much of everything it does.

    model, title           the model as `load_model` takes it, and what the plot calls it
    text, held_out         what is trained on and what is measured on, as `read_texts` takes them
    budgets                curves and rank tables
    recent                 tokens behind every query that training and the last curves keep exact
    distill, allocate      their settings, but for `recent` and `budgets`
    calibrate_tokens       read for calibration, in sequences of `calibrate_length`
    score_tokens           held-out text to score, in sequences of `score_length`
    resident_tokens        tokens in the cache whose bytes are measured
    prompt, answer_budget  what is answered, in `answer_tokens` at most

    Raises:
        BudgetError, MatkvError: a budget is outside (0, 1], or a size below 1.
    """

    model: str = DEFAULT_MODEL
    title: str = "SmolLM2-135M (4-bit weights)"
    text: str = "default"
    held_out: str = "default"
    budgets: tuple[float, ...] = BUDGETS
    recent: int = 32
    distill: DistillConfig = DISTILL
    allocate: AllocateConfig = ALLOCATE
    calibrate_tokens: int = 32_768
    calibrate_length: int = 512
    score_tokens: int = 4096
    score_length: int = 1024
    resident_tokens: int = 4096
    prompt: str = PROMPT
    answer_budget: float = 0.5
    answer_tokens: int = 64

    def __post_init__(self) -> None:
        for budget in (*self.budgets, self.answer_budget):
            check_budget(budget)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise MatkvError(f"{field.name} {value} must be at least 1")


Curve = tuple[Artifact, Setting]  # one line of the plot


def demo(out: Path, config: DemoConfig | None = None) -> dict[str, Any]:
    """Calibrate, distill and allocate, compress the cache, and measure.

    Writes `out`/pca, `out`/calibrated, `out`/distilled and `out`/perplexity.png,
    and returns what it measured.
    """
    config = config or DemoConfig()
    started = time.perf_counter()
    note = " (converted once, about 20 s)" if config.model == DEFAULT_MODEL else ""
    with console.status(f"loading {config.model}{note}"):
        model, tokenizer = load_model(config.model)
    texts = data.read_texts(config.text, "train")
    held_out = data.read_texts(config.held_out, "validation")
    artifacts = _calibrate(model, tokenizer, texts, config, out)
    distilled = _distill(model, tokenizer, artifacts["calibrated"], texts, held_out, config)
    distilled.save(out / "distilled")
    distilled = _allocate(model, tokenizer, distilled, texts, config)
    distilled.save(out / "distilled")
    plain, near = Setting(uniform=True), Setting(uniform=True, recent=config.recent)
    curves: dict[str, Curve] = {name: (artifact, plain) for name, artifact in artifacts.items()} | {
        f"calibrated, {config.recent} exact": (artifacts["calibrated"], near),
        f"distilled, {config.recent} exact": (distilled, near),
        f"own ranks, {config.recent} exact": (distilled, replace(near, uniform=False)),
    }
    windows_NT = data.text_windows(tokenizer, held_out, config.score_length, config.score_tokens)
    rows = _evaluate(model, curves, windows_NT, config.budgets)
    count = config.resident_tokens
    tokens_T = data.text_windows(tokenizer, held_out, count, count)[0]
    resident = _resident(model, distilled, tokens_T, config.budgets)
    answers = _answers(model, tokenizer, distilled, config)
    plot = _plot(rows, config, out / "perplexity.png")
    return {
        "artifacts": str(out),
        "rows": {name: [row.to_json() for row in its_rows] for name, its_rows in rows.items()},
        "resident_tokens": count,
        "resident_bytes": {str(budget): nbytes for budget, nbytes in resident.items()},
        "answers": answers,
        "plot": str(plot),
        "seconds": time.perf_counter() - started,
    }


def show(result: dict[str, Any]) -> None:
    """Print what the demo measured."""
    for name, answer in result["answers"].items():
        console.out.print(Text(f"\n{name}", style="bold").append(f": {answer}", style="not bold"))
    console.out.print()
    console.out.print(_table(result))
    where = f"artifacts in {result['artifacts']}, plot in {result['plot']}"
    console.out.print(f"{where}; {result['seconds']:.0f} s in all")


def _calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    config: DemoConfig,
    out: Path,
) -> dict[str, Artifact]:
    """One pass over training articles gives both artifacts."""
    length, count = config.calibrate_length, config.calibrate_tokens
    windows_NT = data.text_windows(tokenizer, texts, length, count)
    with token_progress("calibrating", windows_NT.numel()) as update:
        layers, tokens = collect_moments(
            model, data.batches(windows_NT, 8), on_progress=lambda progress: update(progress.tokens)
        )
    kinds = {
        "pca": CalibrateConfig(key="pca", value="pca"),
        "calibrated": CalibrateConfig(),
    }
    artifacts = {}
    for name, kind in kinds.items():
        artifacts[name] = artifact_from(model, layers, kind, tokens=tokens)
        artifacts[name].save(out / name)
    return artifacts


def _distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    start: Artifact,
    texts: list[str],
    held_out: list[str],
    config: DemoConfig,
) -> Artifact:
    """A few minutes of training on the training articles."""
    settings = replace(config.distill, recent=config.recent)
    train_NT, probe_NT = (
        data.text_windows(tokenizer, source, settings.sequence_length)
        for source in (texts, held_out)
    )
    with training_progress() as update:
        return distill(model, start, train_NT, settings, held_out=probe_NT[:2], on_progress=update)


def _allocate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    artifact: Artifact,
    texts: list[str],
    config: DemoConfig,
) -> Artifact:
    """Rank tables for the demo's budgets, searched on training articles."""
    settings = replace(config.allocate, budgets=config.budgets)
    tokens = settings.held_out_tokens + settings.expansions * settings.search_tokens
    windows_NT = data.text_windows(tokenizer, texts, config.score_length, tokens)
    with search_progress() as update:
        return allocate(model, artifact, data.batches(windows_NT, 1), settings, on_progress=update)


def _evaluate(
    model: PreTrainedModel,
    curves: dict[str, Curve],
    windows_NT: Tensor,
    budgets: tuple[float, ...],
) -> dict[str, list[Row]]:
    """Rows of every curve; the full cache is scored once and heads each list."""
    rows: dict[str, list[Row]] = {}
    total = windows_NT.numel() * (len(curves) * len(budgets) + 1)
    with token_progress("scoring held-out articles", total) as update:
        done = 0
        for name, (artifact, way) in curves.items():
            first = not rows
            passes = [None, *budgets] if first else list(budgets)
            rows[name] = evaluate(
                model,
                artifact,
                windows_NT,
                budgets,
                uniform=way.uniform,
                recent=way.recent,
                full_cache=first,
                on_progress=lambda at, tokens, passes=passes, done=done: update(  # type: ignore[misc]
                    done + passes.index(at) * windows_NT.numel() + tokens
                ),
            )
            done += windows_NT.numel() * len(passes)
    full = next(iter(rows.values()))[0]
    return {name: its if its[0].budget is None else [full, *its] for name, its in rows.items()}


def _resident(
    model: PreTrainedModel, artifact: Artifact, tokens_T: Tensor, budgets: tuple[float, ...]
) -> dict[float | None, int]:
    """Measured bytes of the cache's storages after reading `tokens_T`, by budget."""
    with console.status(f"reading {tokens_T.numel():,} tokens"):
        states = full_states(model, tokens_T)
    resident: dict[float | None, int] = {None: storage_nbytes(refill(model, states))}
    for budget in budgets:
        resident[budget] = storage_nbytes(refill(attach(model, artifact, budget), states))
    detach(model)
    return resident


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    artifact: Artifact,
    config: DemoConfig,
) -> dict[str, str]:
    """The model's answer to one prompt with the full and with a compressed cache."""
    chat = [{"role": "user", "content": config.prompt}]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    input_ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    answers = {"prompt": config.prompt}
    for name in ("full cache", f"{config.answer_budget:.0%} of the cache"):
        if name != "full cache":
            attach(model, artifact, config.answer_budget)
        with console.status(f"answering with {name}"):
            output = model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=config.answer_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        new = output[0, input_ids.shape[1] :]
        answers[name] = str(tokenizer.decode(new, skip_special_tokens=True)).strip()
    detach(model)
    return answers


def _table(result: dict[str, Any]) -> Table:
    """Perplexities by budget, and the measured bytes of a cache."""
    count, rows = result["resident_tokens"], result["rows"]
    title = f"perplexity on held-out articles; MB that a cache holds at {count:,} tokens"
    table = Table(title=title, title_justify="left")
    for name in ("budget", "MB", *rows):
        table.add_column(name, justify="right")
    for ways in zip(*rows.values(), strict=True):
        budget = ways[0]["budget"]
        table.add_row(
            "full" if budget is None else f"{budget:.1%}",
            f"{result['resident_bytes'][str(budget)] / 1e6:.1f}",
            *(f"{way['perplexity']:.1f}" for way in ways),
        )
    return table


def _plot(rows: dict[str, list[Row]], config: DemoConfig, path: Path) -> Path:
    full = next(iter(rows.values()))[0].perplexity
    drawn = []
    for style, (name, its_rows) in enumerate(rows.items()):
        points = [(row.budget, row.perplexity) for row in its_rows if row.budget is not None]
        labels = [amount(value) for _, value in points]
        drawn.append(Line(label=name, points=points, labels=labels, style=style))
    title = f"{config.title}, held-out articles, {config.score_tokens:,} tokens"
    x = Axis(label="cache bytes kept", percent=True)
    panel = perplexity_panel(title, x, drawn, full)
    text = "Perplexity against the share of cache bytes kept, a line for each way to make bases."
    return save(lines("perplexity", [panel], text=text), path)


def demo_command(
    out: Annotated[Path, typer.Option("-o", "--out", help="where runs go")] = Path("runs/demo"),
    as_json: JsonOpt = False,
) -> None:
    """Run the main job on the default model: calibrate, compress, generate, measure."""
    result = demo(out)
    if as_json:
        console.print_json(result)
    else:
        show(result)
