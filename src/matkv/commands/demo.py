"""The demo: the main job end to end on the default model, in minutes on two CPU cores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matkv import data
from matkv.allocate.stage import allocate
from matkv.artifact.artifact import Artifact
from matkv.artifact.pretrained import shipped_names
from matkv.artifact.records import Record
from matkv.artifact.results import Results
from matkv.artifact.setting import Setting
from matkv.artifact.storage import check_target
from matkv.cache.cache import full_states, refill, storage_nbytes
from matkv.calibrate import CalibrateConfig, artifact_from
from matkv.commands import console
from matkv.commands.bars import progress_bar
from matkv.commands.demo_config import DemoConfig
from matkv.commands.evaluate import Opened, measure_texts
from matkv.commands.options import JsonOpt
from matkv.distill.stage import distill
from matkv.evaluate.samples import SAMPLES, sample_texts
from matkv.evaluate.texts import PERPLEXITY
from matkv.hf.attach import attached
from matkv.hf.observe import collect_moments
from matkv.models.load import load_model
from matkv.report.pictures.figures import Axis, Line, lines
from matkv.report.pictures.theme import save
from matkv.report.runs import amount
from matkv.report.sections.quality import perplexity_panel

KINDS = {"pca": CalibrateConfig(key="pca", value="pca"), "calibrated": CalibrateConfig()}
MAIN = "distilled"  # the artifact that ends with all there is
SHIPPED, BEST = "shipped", "comes along"
APART = 9  # the style of the last curve, which lies on the first: none of the blues


def demo(
    out: Path,
    config: DemoConfig | None = None,
    tell: Callable[[RenderableType], None] = console.out.print,
) -> dict[str, Any]:
    """Measure the artifact that comes along; then calibrate, distill, allocate and measure anew.

    Writes `out`/pca, calibrated, distilled and shipped, each with what was measured of it in its
    results, and `out`/perplexity.png; returns what it measured. `tell` gets what is to be read.
    """
    config, started = config or DemoConfig(), time.perf_counter()
    texts, held_out = _prepare(config, out)
    with _stage("loading"), console.status(f"loading {config.model}"):
        model, tokenizer = load_model(config.model)
    windows_NT = data.text_windows(tokenizer, held_out, config.score_length, config.score_tokens)
    scores = Scores(out=out, model=model, tokenizer=tokenizer, windows_NT=windows_NT, config=config)
    plain, near = Setting(uniform=True), Setting(uniform=True, recent=config.recent)
    exact = f"{config.recent} exact"

    _show_shipped(scores, tell)
    with _stage("calibrating"):
        artifacts = _calibrate(model, tokenizer, texts, config, out)
    with _stage("scoring"):
        for name, artifact in artifacts.items():
            scores.add(name, name, artifact, plain)
    tell("perplexity on held-out articles, with bases before training")
    tell(_table(scores.rows))
    with _stage("training"):
        distilled = _distill(model, tokenizer, artifacts["calibrated"], texts, config)
        distilled.save(out / MAIN)
    with _stage("searching ranks and bits"):
        distilled = _allocate(model, tokenizer, distilled, texts, config)
        distilled.save(out / MAIN)
    with _stage("scoring"):
        scores.add(f"calibrated, {exact}", "calibrated", artifacts["calibrated"], near)
        scores.add(f"distilled, {exact}", MAIN, distilled, near)
        scores.add(f"ranks and bits, {exact}", MAIN, distilled, replace(near, uniform=False))
    with _stage("answering"), console.status("reading and answering"):
        resident = _resident(model, distilled, tokenizer, held_out, config)
        answers = _answers(model, tokenizer, distilled, config, out / MAIN)
    for name, answer in answers.items():
        tell(Text(f"\n{name}", style="bold").append(f": {answer}", style="not bold"))
    count = config.resident_tokens
    tell(f"\nperplexity on held-out articles; MB that a cache holds at {count:,} tokens")
    tell(_table(scores.rows, resident))
    plot = _plot(scores.rows, config, out / "perplexity.png")
    seconds = time.perf_counter() - started
    tell(f"artifacts in {out}, plot in {plot}; {seconds:.0f} s in all")
    tell(f"all of it on a page: matkv report {out / MAIN}")
    return {
        "artifacts": str(out),
        "rows": scores.rows,
        "resident_tokens": count,
        "resident_bytes": {str(budget): nbytes for budget, nbytes in resident.items()},
        "answers": answers,
        "plot": str(plot),
        "seconds": seconds,
    }


def _show_shipped(scores: Scores, tell: Callable[[RenderableType], None]) -> None:
    """Measure the artifact that comes along, if the demo's model has one."""
    if scores.config.model not in shipped_names():
        return
    with _stage("scoring what comes along"):
        artifact = Artifact.load(scores.config.model)
        artifact.save(scores.out / SHIPPED)
        scores.add(BEST, SHIPPED, artifact, Setting())
    tell("perplexity on held-out articles, with the artifact that comes with matkv")
    tell(_table(scores.rows))


def _prepare(config: DemoConfig, out: Path) -> tuple[list[str], list[str]]:
    """Texts to train and to measure on, once it is sure that runs can go to `out`."""
    texts = data.read_texts(config.text, "train")
    held_out = data.read_texts(config.held_out, "validation")
    out.mkdir(parents=True, exist_ok=True)
    for name in (*KINDS, MAIN, SHIPPED):
        check_target(out / name)
    return texts, held_out


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """A line when something is done, where no bar can be seen too."""
    started = time.perf_counter()
    yield
    console.err.print(f"{name}: {time.perf_counter() - started:.0f} s")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Perplexities of the held-out windows by curve, kept in the results of the runs in `out`."""

    out: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    windows_NT: Tensor
    config: DemoConfig
    rows: dict[str, list[Record]] = field(default_factory=dict)

    def add(self, curve: str, run: str, artifact: Artifact, way: Setting) -> None:
        """A curve: the full cache, which is measured once, then every budget."""
        for done in list(self.rows.values())[:1]:
            full = done[0] | Setting().record(artifact, self.model.dtype)
            Results(self.out / run, PERPLEXITY).put([full])
        opened = Opened(
            run=self.out / run,
            artifact=artifact,
            model=self.model,
            tokenizer=self.tokenizer,
            way=way,
            budgets=self.config.budgets,
            again=False,
            shown=False,
        )
        self.rows[curve] = measure_texts(opened, self.windows_NT, self.config.held_out)


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
    with progress_bar("calibrating", windows_NT.numel()) as update:
        layers, tokens = collect_moments(model, data.batches(windows_NT, 8), on_progress=update)
    artifacts = {}
    for name, kind in KINDS.items():
        artifacts[name] = artifact_from(model, layers, kind, tokens=tokens)
        artifacts[name].save(out / name)
    return artifacts


def _distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    start: Artifact,
    texts: list[str],
    config: DemoConfig,
) -> Artifact:
    """A few minutes of training on the training articles."""
    training = replace(config.distill, recent=config.recent)
    train_NT = data.text_windows(tokenizer, texts, training.sequence_length)
    with progress_bar("training") as update:
        return distill(model, start, train_NT, training, on_progress=update)


def _allocate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    artifact: Artifact,
    texts: list[str],
    config: DemoConfig,
) -> Artifact:
    """Tables of ranks and bits for the demo's budgets, searched on training articles."""
    search = replace(config.allocate, budgets=config.budgets)
    tokens = search.held_out_tokens + search.expansions * search.search_tokens
    windows_NT = data.text_windows(tokenizer, texts, search.search_tokens, tokens)
    with progress_bar("searching") as update:
        return allocate(model, artifact, data.batches(windows_NT, 1), search, on_progress=update)


def _resident(
    model: PreTrainedModel,
    artifact: Artifact,
    tokenizer: PreTrainedTokenizerBase,
    held_out: list[str],
    config: DemoConfig,
) -> dict[float | None, int]:
    """Measured bytes of the cache's storages after reading `resident_tokens`, by budget."""
    count = config.resident_tokens
    states = full_states(model, data.text_windows(tokenizer, held_out, count, count)[0])
    resident: dict[float | None, int] = {None: storage_nbytes(refill(model, states))}
    for budget in config.budgets:
        with attached(model, artifact, budget):
            resident[budget] = storage_nbytes(refill(model, states))
    return resident


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    artifact: Artifact,
    config: DemoConfig,
    run: Path,
) -> dict[str, str]:
    """The model's answer to one prompt with the full and with a compressed cache."""
    rows = sample_texts(
        model,
        tokenizer,
        artifact,
        [Setting(), Setting(budget=config.answer_budget)],
        Results(run, SAMPLES),
        [config.prompt],
        max_new_tokens=config.answer_tokens,
    )
    names = ("full cache", f"{config.answer_budget:.0%} of the cache")
    texts = {name: row["text"].strip() for name, row in zip(names, rows, strict=True)}
    return {"prompt": config.prompt} | texts


def _table(rows: dict[str, list[Record]], resident: dict[float | None, int] | None = None) -> Table:
    """Perplexities by budget, and the measured bytes of a cache."""
    table = Table()
    for name in ("budget", *(["MB"] if resident else []), *rows):
        table.add_column(name, justify="right")
    for ways in zip(*rows.values(), strict=True):
        budget = ways[0]["budget"]
        held = [f"{resident[budget] / 1e6:.1f}"] if resident else []
        values = (f"{way['perplexity']:.1f}" for way in ways)
        table.add_row("full" if budget is None else f"{budget:.1%}", *held, *values)
    return table


def _plot(rows: dict[str, list[Record]], config: DemoConfig, path: Path) -> Path:
    full = next(iter(rows.values()))[0]["perplexity"]
    drawn = []
    for index, (name, its_rows) in enumerate(rows.items()):
        points = [(row["budget"], row["perplexity"]) for row in its_rows if row["budget"]]
        labels = [amount(value) for _, value in points]
        style, dash = (APART, 1) if index == len(rows) - 1 else (index, 0)
        drawn.append(Line(label=name, points=points, labels=labels, style=style, dash=dash))
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
    if as_json:
        console.print_json(demo(out, tell=lambda _: None))
    else:
        demo(out)
