"""Embedding models of many sizes: every size, ways compared, the training, how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matkv.artifact.records import Record
from matkv.report.embedders import Embedder, Size, arm_values, size_of
from matkv.report.page import Block, Cell, Facts, Headline, Missing, Section, Table, Tile
from matkv.report.pictures.figures import Axis, Line, Panel, lines
from matkv.report.pictures.sizes import Ladder, SizeMap, ladder_lines, size_maps
from matkv.report.pictures.theme import Picture
from matkv.report.rows import number
from matkv.report.runs import as_text

EVALUATE = "matkv embed evaluate RUN --pairs PAIRS.jsonl"
REFERENCE = "untrained"
UNREAD = ("loss", "step")


def sizes_headline(models: Sequence[Embedder]) -> Headline:
    """What was trained, and the mean over sizes of what was measured first."""
    base = next((model.made["base_model"] for model in models if model.made.get("base_model")), "")
    title = f"{base or models[0].name}: embeddings of many sizes"
    tiles = []
    for (data, metric), by_model in _tasks(models).items():
        name, values = next(iter(by_model.items()))
        trained = {size: value for size, (value, good) in values.items() if good} or {
            size: value for size, (value, _) in values.items()
        }
        mean = sum(trained.values()) / len(trained)
        small, large = min(trained), max(trained)
        note = f"{_name(small)} {trained[small]:.3f}, {_name(large)} {trained[large]:.3f}"
        label = f"{data}, {metric}" if len(models) == 1 else f"{name}: {data}, {metric}"
        tiles.append(Tile(label, f"{mean:.3f}", f"mean of {len(trained)} sizes; {note}"))
    notes = [
        f"{model.name}: {model.stale} rows were measured with other weights and are left out."
        for model in models
        if model.stale
    ]
    sentence = (
        "One model whose first layers and first dimensions are good smaller models: a size is "
        "written layers x dimensions."
    )
    return Headline(title=title, sentence=sentence, tiles=tiles[:4], notes=notes)


def sizes_sections(models: Sequence[Embedder]) -> list[Section]:
    """All sections of a report of embedding models."""
    return [_measured(models), _compared(models), _training(models), _how(models)]


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


Values = dict[Size, tuple[float, bool]]


def _tasks(models: Sequence[Embedder]) -> dict[tuple[str, str], dict[str, Values]]:
    """Value, and whether it was trained, by (data, metric), model and size."""
    found: dict[tuple[str, str], dict[str, Values]] = {}
    for model in models:
        for row in model.sizes:
            size, value = size_of(row), number(row, "value")
            if size is None or value is None:
                continue
            task = (str(row.get("data")), str(row.get("metric")))
            values = found.setdefault(task, {}).setdefault(model.name, {})
            values[size] = (value, bool(row.get("trained")))
    return found


def _measured(models: Sequence[Embedder]) -> Section:
    blocks: list[Block] = []
    for number_of, ((data, metric), by_model) in enumerate(_tasks(models).items(), start=1):
        for name, values in by_model.items():
            title = f"{data}: {metric}" if len(models) == 1 else f"{name}, {data}: {metric}"
            trained = [size for size, (_, good) in values.items() if good]
            grid = SizeMap(
                title=title, values={size: v for size, (v, _) in values.items()}, marked=trained
            )
            if len(values) > len(trained) > 0:
                slug = f"sizes-{number_of}-{list(by_model).index(name) + 1}"
                text = "A map of what every layer and dimension scores."
                caption = "In frames and bold: the sizes that were trained."
                blocks.append(size_maps(slug, [grid], text=text, caption=caption))
        blocks.append(_table(f"{data}: {metric}", by_model))
    if not blocks:
        blocks = [Missing("No size was measured yet:", EVALUATE)]
    return Section("sizes", "Every size", blocks)


def _table(caption: str, by_model: Mapping[str, Values]) -> Table:
    """A line for each size, a column for each model."""
    sizes = sorted({size for values in by_model.values() for size in values})
    body = []
    for size in sizes:
        found = [values.get(size) for values in by_model.values()]
        best = max(value for value, _ in filter(None, found))
        body.append(
            [
                Cell(_name(size)),
                *(
                    Cell("–")
                    if one is None
                    else Cell(
                        f"{one[0]:.3f}",
                        "" if one[1] else "not trained",
                        best=len(found) > 1 and one[0] == best,
                    )
                    for one in found
                ),
            ]
        )
    return Table(header=("size", *by_model), rows=body, caption=caption)


def _compared(models: Sequence[Embedder]) -> Section:
    """Ways to get models of all sizes, as benchmarks/embedding_arms.py has compared them."""
    blocks: list[Block] = []
    tasks: dict[str, list[Record]] = {}
    for row in (row for model in models for row in model.arms):
        tasks.setdefault(str(row.get("task")), []).append(row)
    if tasks:
        blocks.append(arms_picture(tasks))
        blocks += [_arms_table(task, rows) for task, rows in tasks.items()]
    else:
        text = "Ways to get models of all sizes were not compared:"
        blocks.append(Missing(text, "python benchmarks/embedding_arms.py --out RUN"))
    return Section("compared", "Ways compared", blocks)


def arms_picture(tasks: Mapping[str, Sequence[Record]]) -> Picture:
    """What every way gives at each size, by task; bars from the worst seed to the best."""
    panels = {task: [*map(_way, *zip(*_arms(rows), strict=True))] for task, rows in tasks.items()}
    return ladder_lines(
        "arms",
        {task: _styled(ways) for task, ways in panels.items()},
        y="score",
        text="What every way to get models of all sizes gives at each size.",
        caption="Means over seeds; bars: from the worst seed to the best.",
    )


def _styled(ways: Sequence[Ladder]) -> list[Ladder]:
    styled, style = [], 0
    for way in ways:
        reference = way.label == REFERENCE
        styled.append(
            Ladder(
                label=way.label,
                values=way.values,
                bounds=way.bounds,
                style=None if reference else style,
            )
        )
        style += not reference
    return styled


def _arms(rows: Sequence[Record]) -> list[tuple[str, list[dict[Size, float]]]]:
    """Values by size of every seed, by arm."""
    found: dict[str, list[dict[Size, float]]] = {}
    for row in rows:
        found.setdefault(str(row.get("arm")), []).append(arm_values(row))
    return list(found.items())


def _way(label: str, seeds: Sequence[dict[Size, float]]) -> Ladder:
    values = {size: [one[size] for one in seeds if size in one] for size in seeds[0]}
    return Ladder(
        label=label,
        values={size: sum(its) / len(its) for size, its in values.items()},
        bounds={size: (min(its), max(its)) for size, its in values.items()} if seeds[1:] else {},
    )


def _arms_table(task: str, rows: Sequence[Record]) -> Table:
    ways = [_way(label, seeds) for label, seeds in _arms(rows)]
    counts = {label: len(seeds) for label, seeds in _arms(rows)}
    sizes = sorted({size for way in ways for size in way.values})
    body = [
        [
            Cell(way.label),
            Cell(str(counts[way.label])),
            *(Cell(f"{way.values[s]:.3f}" if s in way.values else "–") for s in sizes),
            Cell(f"{sum(way.values.values()) / len(way.values):.3f}"),
        ]
        for way in ways
    ]
    header = ("way", "seeds", *map(_name, sizes), "mean")
    return Table(header=header, rows=body, caption=task)


def _training(models: Sequence[Embedder]) -> Section:
    blocks: list[Block] = []
    for count, model in enumerate(models, start=1):
        curve = [point for point in model.made.get("curve") or () if isinstance(point, dict)]
        parts = list(dict.fromkeys(name for point in curve for name in point if name not in UNREAD))
        drawn = [
            Line(
                label=part,
                points=[
                    (step, value)
                    for point in curve
                    if (value := number(point, part)) is not None
                    and (step := number(point, "step")) is not None
                ],
                style=style,
                plain=True,
            )
            for style, part in enumerate(parts)
        ]
        if drawn:
            panel = Panel(title=model.name, x=Axis(label="step"), y=Axis(label="loss"), lines=drawn)
            text = "The loss of every size over the steps of the training."
            blocks.append(
                lines(f"training-{count}", [panel], text=text, caption="Parts of the loss.")
            )
    if not blocks:
        blocks.append(
            Missing("These models were not trained by matkv:", "matkv embed train MODEL -o RUN")
        )
    return Section("training", "Training", blocks)


def _how(models: Sequence[Embedder]) -> Section:
    blocks: list[Block] = []
    for model in models:
        made = {name: value for name, value in model.made.items() if name not in ("curve", "made")}
        if made:
            items = [(name, as_text(value)) for name, value in made.items()]
            blocks.append(Facts(f"{model.name}: training", items))
        commands: dict[str, None] = {}
        for row in ({"made": model.made.get("made")}, *model.sizes, *model.arms):
            how = row.get("made")
            if isinstance(how, dict):
                commands[f"{how.get('command')} · {how.get('hardware')} · {how.get('date')}"] = None
        if commands:
            items = [(str(index), text) for index, text in enumerate(commands, start=1)]
            blocks.append(Facts(f"{model.name}: commands", items, code=True))
    return Section("made", "How it was made", blocks)
