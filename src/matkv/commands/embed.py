"""The commands for embedding models of many sizes: train, evaluate, truncate."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from matkv.artifact.records import made, weights_digest
from matkv.artifact.results import Kind, Results
from matkv.commands import console
from matkv.commands.bars import progress_bar
from matkv.commands.options import DeviceOpt, JsonOpt, TrustOpt
from matkv.errors import DataError, MatkvError
from matkv.files import replacing
from matkv.progress import Report

if TYPE_CHECKING:  # the extra is imported when a command runs, so that --help needs none
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.evaluation import BaseEvaluator

    from matkv.embeddings import RungTable, Size
    from matkv.embeddings.config import EmbedConfig
    from matkv.embeddings.train import Step

INTERRUPTED = 130
SIZES = Kind("sizes", ("model", "data", "data_digest", "metric", "layer", "dim"))

embed_app = typer.Typer(
    help="Embedding models whose first layers and dimensions are good smaller models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

ModelArg = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="directory, hub id, or an installed package with a model"),
]
RungsOpt = Annotated[
    str | None, typer.Option(help="sizes LAYERxDIM, separated by commas: 1x32,2x64")
]


@embed_app.command("train")
def train_command(
    model_name: ModelArg,
    data: Annotated[
        Path,
        typer.Option(
            help=".jsonl of anchor, positive and perhaps negative, or sentence1, sentence2, score"
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="directory of the model to write")],
    recipe: Annotated[
        Path | None, typer.Option("--config", help="settings: a TOML file or a recipe's name")
    ] = None,
    rungs: RungsOpt = None,
    loss: Annotated[str | None, typer.Option(help="ranking or cosent (scored pairs)")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="ladder, cycle, sandwich or independent")
    ] = None,
    distill: Annotated[
        float | None, typer.Option(help="weight of what the full size teaches the others")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="training steps")] = None,
    batch_size: Annotated[int | None, typer.Option(help="examples a step")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="tokens of a text; the model's own limit unless given")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of batches, draws and dropout")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from a checkpoint")] = False,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Train a model for a ladder of sizes, all of them at once."""
    from matkv.embeddings.config import EmbedConfig

    given = {
        "rungs": rungs, "loss": loss, "schedule": schedule, "distill": distill, "steps": steps,
        "batch_size": batch_size, "max_tokens": max_tokens, "lr": lr, "seed": seed,
    }  # fmt: skip
    config = EmbedConfig.from_toml(recipe, **given)
    load = partial(_load, model_name, device, trust_remote_code)
    entry = _train(load, model_name, data, out, config, resume=resume)
    if as_json:
        console.print_json({"model": str(out), **entry})
        return
    last = f", loss {entry['curve'][-1]['loss']:.3f}" if entry["curve"] else ""
    console.out.print(f"wrote {out}: {entry['steps']} steps in {entry['seconds']:.0f} s{last}")


def _train(
    load: Callable[[], SentenceTransformer],
    model_name: str,
    data: Path,
    out: Path,
    config: EmbedConfig,
    *,
    resume: bool,
) -> dict[str, Any]:
    """Train and save a model; returns what its folder says of it."""
    from matkv.embeddings.data import read_examples
    from matkv.embeddings.measure import data_digest
    from matkv.embeddings.run import check_out, check_same, save_model, start_checkpoints
    from matkv.embeddings.serve import trained_sizes
    from matkv.embeddings.train import fit, ladder_loss

    check_out(out)
    place = out.resolve()
    columns = read_examples(data, config.loss)
    about = config.to_json() | {"model": model_name, "data": data_digest(columns)}
    checkpoints = place.with_name(f".{place.name}.checkpoints")
    if resume:
        check_same(checkpoints, about)
    model = load()
    objective = ladder_loss(model, config)
    with _training() as update:
        start = None if resume else lambda: start_checkpoints(checkpoints, about)
        done = fit(
            model, columns, objective, config, checkpoints,
            resume=resume, on_start=start, on_step=update,
        )  # fmt: skip
    if done.interrupted:
        console.err.print(f"interrupted after {done.steps} steps: go on with --resume")
        sys.exit(INTERRUPTED)
    entry = {
        "base_model": model_name,
        "data": data.name,
        "config": config.to_json(),
        "rungs": [list(size) for size in trained_sizes(model)],
        **asdict(done),
        "made": made(),
    }
    save_model(model, out, entry)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return entry


@embed_app.command("evaluate")
def evaluate_command(
    model_name: ModelArg,
    pairs: Annotated[
        list[Path] | None,
        typer.Option(help=".jsonl of sentence1, sentence2, score: Spearman; repeatable"),
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help=".jsonl of _id, title, text; with --queries")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help=".jsonl of _id, text, relevant: nDCG@10")
    ] = None,
    rungs: RungsOpt = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="every layer at the dimensions of the sizes")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="texts at once", min=1, max=2**16)] = 32,
    picture: Annotated[Path | None, typer.Option(help="heat map of a grid, PNG")] = None,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Measure every size of a model, from one encode of each text."""
    from matkv.embeddings import parse, rung_table
    from matkv.embeddings.run import read_made
    from matkv.embeddings.serve import trained_sizes, warn_untrained

    sizes: tuple[Size, ...] | None = None if rungs is None else parse(rungs)
    measures = _measures(pairs or [], corpus, queries, batch_size)
    model = _load(model_name, device, trust_remote_code)
    if sizes is not None and trained_sizes(model):
        warn_untrained(model, sizes)
    weights = weights_digest(Path(model_name)) if Path(model_name).is_dir() else model_name
    rows: list[dict[str, Any]] = []
    tables: dict[str, RungTable] = {}
    for about, evaluator in measures:
        with console.status(f"measuring with {about['data']}"):
            table = rung_table(model, evaluator, sizes, grid=grid)
        tables[about["data"]] = table
        rows += [{"model": weights, **about, **row} for row in table.to_json()]
    # Only where a training of ours has written it: other directories stay as they are.
    ours = Path(model_name).is_dir() and read_made(Path(model_name)) is not None
    rows = Results(model_name if ours else None, SIZES).add(rows)
    if picture is not None:
        _save_picture(tables, picture)
    if as_json:
        means = {data: table.mean for data, table in tables.items()}
        console.print_json({"rows": rows, "mean": means})
    else:
        for data, table in tables.items():
            console.out.print(_shown(data, table))


@embed_app.command("truncate")
def truncate_command(
    model_name: ModelArg,
    size: Annotated[str, typer.Argument(metavar="SIZE", help="LAYERxDIM, as 2x64")],
    out: Annotated[Path, typer.Option("-o", "--out", help="directory of the model to write")],
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Write one size of a model as an ordinary, smaller model that loads and serves anywhere."""
    from matkv.embeddings import parse, truncate
    from matkv.embeddings.run import check_out, save_model
    from matkv.errors import SizeError

    sizes = parse(size)
    if len(sizes) > 1:
        raise SizeError(f"{size!r} is {len(sizes)} sizes: a model is written for one")
    check_out(out)
    model = _load(model_name, device, trust_remote_code)
    small = truncate(model, *sizes[0])
    save_model(small, out, None)
    before, after = (sum(p.numel() for p in one.parameters()) for one in (model, small))
    if as_json:
        config = small[0].model.config
        console.print_json(
            {
                "model": str(out),
                "layers": sizes[0][0],
                "dim": sizes[0][1],
                "parameters": after,
                "rungs": config.matkv_rungs,
                "matryoshka_dimensions": config.matryoshka_dimensions,
            }
        )
    else:
        console.out.print(f"wrote {out}: {after:,} of {before:,} parameters")


def _load(name: str, device: str | None, trust_remote_code: bool) -> SentenceTransformer:
    """The model of a command, with a note while it loads."""
    from matkv.embeddings.load import load_embedder

    with console.status(f"loading {name}"):
        return load_embedder(name, device=device, trust_remote_code=trust_remote_code)


@contextmanager
def _training() -> Iterator[Callable[[Step], None]]:
    """A bar that follows a training: step, loss, and time left."""
    with progress_bar("training") as follow:

        def update(at: Step) -> None:
            note = "" if at.loss != at.loss else f"loss {at.loss:.3f}"
            report = Report(follow, "training", at.steps, "steps")
            report(at.step, note, seconds=at.seconds, seconds_left=at.seconds_left)

        yield update


def _measures(
    pairs: list[Path], corpus: Path | None, queries: Path | None, batch_size: int
) -> list[tuple[dict[str, Any], BaseEvaluator]]:
    """What to measure with: what a row says of it, and the evaluator."""
    from matkv.embeddings.data import read_retrieval, read_scored
    from matkv.embeddings.measure import data_digest, retrieval_evaluator, similarity_evaluator

    if (corpus is None) != (queries is None):
        raise typer.BadParameter("--corpus and --queries go together")
    if corpus is None and not pairs:
        raise typer.BadParameter("give --pairs, or --corpus with --queries")
    if len({path.name for path in pairs}) < len(pairs):
        raise DataError("two files of --pairs have the same name: rename one")
    found: list[tuple[dict[str, Any], BaseEvaluator]] = []
    for path in pairs:
        scored = read_scored(path)
        about = {"data": path.name, "data_digest": data_digest(scored), "n": len(scored.scores)}
        found.append((about, similarity_evaluator(scored, batch_size)))
    if corpus is not None and queries is not None:
        data = read_retrieval(corpus, queries)
        digest = data_digest(data.corpus, data.queries, *map(sorted, data.relevant.values()))
        about = {"data": queries.name, "data_digest": digest, "n": len(data.queries)}
        found.append((about, retrieval_evaluator(data, batch_size)))
    return found


def _save_picture(tables: dict[str, RungTable], path: Path) -> None:
    """Draw the tables as heat maps, one below the other, as PNG.

    Raises:
        MatkvError: matplotlib is not installed, or `path` cannot be written.
    """
    from matkv.report.pictures.sizes import SizeMap, size_maps

    shown = [
        SizeMap(title=f"{data}: {table.metric}", values=table.values, marked=table.trained)
        for data, table in tables.items()
    ]
    drawn = size_maps("sizes", shown, text="What every size scores.")
    try:
        with replacing(path) as new:
            new.write_bytes(drawn.png)
    except OSError as error:
        raise MatkvError(f"cannot write {path}: {error}") from error


def _shown(data: str, table: RungTable) -> Table:
    """Layers down, dimensions across; what was trained is bold, the best darkest."""
    shown = Table(title=f"{data}: {table.metric}, trained sizes bold", title_justify="left")
    for column in ("layer", *map(str, table.dims)):
        shown.add_column(column, justify="right")
    values = table.values
    for layer in table.layers:
        cells = []
        for dim in table.dims:
            text = f"{values[layer, dim]:.3f}" if (layer, dim) in values else ""
            cells.append(Text(text, style="bold" if (layer, dim) in table.trained else ""))
        shown.add_row(str(layer), *cells)
    shown.caption = f"mean {table.mean:.3f}"
    return shown
