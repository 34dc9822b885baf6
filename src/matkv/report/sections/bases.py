"""What the bases are: ranks kept by layer and head, spectra, and how training went."""

from __future__ import annotations

from collections.abc import Sequence

from matkv.artifact.history import Allocated, Check, Curve, Distilled, entries
from matkv.ranks import SIDES, RankTable
from matkv.report.page import Block, Cell, Missing, Section, Table, Text
from matkv.report.paper import PAPER_BUDGET, PAPER_SHARES
from matkv.report.pictures.figures import Axis, Line, Panel, Point, lines
from matkv.report.pictures.maps import Fan, fans, rank_maps
from matkv.report.pictures.theme import Picture
from matkv.report.runs import Run, percent, slug, styles, title_of

MAPS = 4
HELD = 0.9
ALLOCATE = "matkv allocate RUN --budget 0.75 --budget 0.5 --budget 0.375"
DISTILL = "matkv distill RUN --config default-cpu"


# ---- ranks


def ranks_section(runs: Sequence[Run]) -> Section:
    """Heat maps of the stored rank tables, and what each side keeps."""
    searched = [run for run in runs if run.artifact.tables]
    if not searched:
        text = "Every layer, head and side keeps the same rank; a search has not been made yet:"
        return Section("ranks", "Ranks", [Missing(text, ALLOCATE)])
    blocks: list[Block] = []
    for run in searched:
        blocks += [_rank_maps(run, runs), _shares(run, runs)]
    coded = any(table.coded for run in searched for table in run.artifact.tables.values())
    return Section("ranks", "Ranks and bits" if coded else "Ranks", blocks)


def shown_budgets(tables: dict[float, RankTable]) -> list[float]:
    """At most four budgets, spread evenly, the paper's among them."""
    budgets = sorted(tables, reverse=True)
    if len(budgets) <= MAPS:
        return budgets
    steps = [round(index * (len(budgets) - 1) / (MAPS - 1)) for index in range(MAPS)]
    chosen = [budgets[step] for step in steps]
    if PAPER_BUDGET in budgets and PAPER_BUDGET not in chosen:
        chosen.remove(min(chosen, key=lambda budget: abs(budget - PAPER_BUDGET)))
        chosen.append(PAPER_BUDGET)
    return sorted(chosen, reverse=True)


def _rank_maps(run: Run, runs: Sequence[Run]) -> Picture:
    shown = {budget: run.artifact.tables[budget] for budget in shown_budgets(run.artifact.tables)}
    kept = "Ranks and bits" if any(table.coded for table in shown.values()) else "Ranks"
    caption = f"{kept} of every layer and KV head, and what each side keeps of all."
    return rank_maps(slug(run, runs, "ranks"), shown, caption=title_of(run, runs, caption))


def _shares(run: Run, runs: Sequence[Run]) -> Table:
    checks = _checks(run)
    # Tables of bits have no equal ranks beside them.
    names = {"kl": "KL, these ranks", "uniform_kl": "KL, uniform ranks"}
    if not any(check.uniform_kl is not None for check in checks.values()):
        names = {"kl": "KL"}
    rows = []
    for budget, table in sorted(run.artifact.tables.items(), reverse=True):
        check = checks.get(round(budget, 6), Check(budget=budget))
        cells = [Cell(percent(budget)), *(Cell(f"{table.share(side):.1%}") for side in SIDES)]
        for value in (getattr(check, name) for name in names):
            cells.append(Cell("–" if value is None else f"{value:.3f}"))
        rows.append(cells)
    paper = [Cell(f"{PAPER_SHARES[side]:.1%}") for side in SIDES]
    lacking = [Cell("–")] * len(names)
    rows.append([Cell(f"paper, LLaMA2-7B, {percent(PAPER_BUDGET)}"), *paper, *lacking])
    return Table(
        header=("budget", "keys kept", "values kept", *names.values()),
        rows=rows,
        caption=title_of(run, runs, "What keys and values keep"),
        notes=("KL: nats a token to the full cache's predictions, on held-out text.",),
    )


def _checks(run: Run) -> dict[float, Check]:
    """What the last search measured of its tables."""
    searches = entries(run.artifact.history, Allocated)
    return {round(one.budget, 6): one for one in searches[-1].checks} if searches else {}


# ---- spectra


def spectra_section(runs: Sequence[Run]) -> Section:
    """How the energy of each layer falls over its ordered columns."""
    text = (
        "The share of the energy, as the bases were made to order it, that lies beyond a number of "
        "columns. A line that falls early is a layer that compresses well."
    )
    blocks: list[Block] = [Text(text)]
    for run in runs:
        blocks.append(_spectra(run, runs))
    blocks.append(_holding(runs))
    return Section("spectra", "Spectra", blocks)


def _spectra(run: Run, runs: Sequence[Run]) -> Picture:
    shown = []
    for side in SIDES:
        curves = []
        for layer in run.artifact.geometry.compressed:
            energy_D = run.artifact.bases[layer][side].energy_GD.double().mean(0)
            beyond_D = (1 - energy_D.cumsum(0) / energy_D.sum()).clamp(min=0).tolist()
            curves.append([(i + 1.0, rest) for i, rest in enumerate(beyond_D) if rest > 1e-6])
        shown.append(Fan(title=f"{side}s", curves=curves))
    return fans(
        slug(run, runs, "spectra"),
        shown,
        x="columns kept",
        y="energy beyond them",
        bar="layer",
        text="Energy beyond the columns kept, for keys and for values, a line for each layer.",
        caption=title_of(run, runs, "Mean over KV heads."),
    )


def _holding(runs: Sequence[Run]) -> Picture:
    panels = []
    for side in SIDES:
        drawn = []
        for index, run in enumerate(runs):
            points: list[Point] = []
            bounds: list[Point | None] = []
            for layer in run.artifact.geometry.compressed:
                energy_GD = run.artifact.bases[layer][side].energy_GD.double()
                reached_GD = energy_GD.cumsum(1) < HELD * energy_GD.sum(1, keepdim=True)
                counts = (reached_GD.sum(1) + 1).tolist()
                points.append((float(layer), sum(counts) / len(counts)))
                bounds.append((min(counts), max(counts)))
            drawn.append(Line(label=run.name, points=points, bounds=bounds, style=index))
        panels.append(
            Panel(
                title=f"{side}s",
                x=Axis(label="layer"),
                y=Axis(label=f"columns that hold {HELD:.0%}", zero=True),
                lines=drawn,
            )
        )
    return lines(
        "columns",
        panels,
        text=f"Columns that hold {HELD:.0%} of the energy, by layer, for keys and for values.",
        caption=f"Columns that hold {HELD:.0%} of the energy: mean over KV heads; bars: from the "
        "smallest to the largest head.",
    )


# ---- training


def training_section(runs: Sequence[Run]) -> Section:
    """Losses while the bases were trained, of every run that kept them."""
    blocks: list[Block] = []
    for run in runs:
        for number, points in enumerate(training_curves(run), start=1):
            blocks.append(_training(run, runs, number, points))
    if not blocks:
        trained = any(entries(run.artifact.history, Distilled) for run in runs)
        text = "No curve was kept of the training:" if trained else "These bases are not trained:"
        blocks.append(Missing(text, DISTILL))
    return Section("training", "Training", blocks)


def training_curves(run: Run) -> list[Curve]:
    """The points of every stage of a run's distillations that kept some."""
    trained = entries(run.artifact.history, Distilled)
    return [spent.curve for one in trained for spent in one.stages.values() if spent.curve]


def _training(run: Run, runs: Sequence[Run], count: int, points: Curve) -> Picture:
    looks = styles(runs)
    steps = [(float(point.tokens), point.loss) for point in points]
    probes: dict[float, list[Point]] = {}
    for point in points:
        for budget, loss in point.probes.items():
            probes.setdefault(float(budget), []).append((float(point.tokens), loss))
    x = Axis(label="tokens seen")
    y = Axis(label="nats a token", log=10)
    held_out = [
        Line(
            label=percent(budget),
            points=its,
            style=looks.get(budget, len(looks) + order),
        )
        for order, (budget, its) in enumerate(sorted(probes.items(), reverse=True))
    ]
    panels = [Panel(title="held-out text, by budget", x=x, y=y, lines=held_out)] if held_out else []
    spare = len(looks) + len(probes)
    steps_line = Line(label="training loss", points=steps, style=spare, plain=True)
    panels.append(Panel(title="training, mean of the steps between", x=x, y=y, lines=[steps_line]))
    name = "training" if count == 1 else f"training-{count}"
    return lines(
        slug(run, runs, name),
        panels,
        text="Loss while training: on held-out text at several budgets, and of the steps.",
        caption=title_of(run, runs, "Loss of the training's own objective, in nats a token."),
    )
