"""Evaluation loss against tokens seen, at every probed budget (the paper's data-efficiency curve).

    python benchmarks/data_efficiency.py RUN [RUN ...] [-o data_efficiency.png]

Reads the curves that `matkv distill` keeps in an artifact; no model is run. The loss is
KL(teacher ‖ student) on held-out articles in nats a token, as the run was told to weigh it.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from matkv.artifact.artifact import Artifact
from matkv.artifact.history import Distilled, entries
from matkv.errors import MatkvError
from matkv.progress import CurvePoint


def curve_of(artifact: Artifact) -> list[CurvePoint]:
    """The points of all distillations that made the artifact, tokens counted on.

    Raises:
        MatkvError: none of them kept a curve.
    """
    points: list[CurvePoint] = []
    for trained in entries(artifact.history, Distilled):
        before = points[-1].tokens if points else 0
        curve = trained.stages["end-to-end"].curve if "end-to-end" in trained.stages else ()
        points += [replace(point, tokens=before + point.tokens) for point in curve]
    if not points:
        raise MatkvError("the artifact keeps no curve: distill it with --config and probe_every")
    return points


def table(points: list[CurvePoint]) -> str:
    budgets = sorted({budget for point in points for budget in point.probes}, key=float)[::-1]
    head = ["sequences of 256 tokens", *(f"{float(budget):.1%}" for budget in budgets)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for point in points:
        cells = [f"{point.tokens // 256:,}"]
        cells += [f"{point.probes[b]:.3f}" if b in point.probes else "" for b in budgets]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(points: list[CurvePoint], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for budget in sorted({budget for point in points for budget in point.probes}, key=float):
        seen = [(p.tokens, p.probes[budget]) for p in points if budget in p.probes]
        axes.plot(*zip(*seen, strict=True), marker="o", markersize=3, label=f"{float(budget):.1%}")
    axes.set(xlabel="tokens seen", ylabel="KL on held-out text, nats a token", title=title)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(title="budget", frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    for run in options.runs:
        points = curve_of(Artifact.load(run))
        print(f"{run.name}\n{table(points)}")
        if options.out is not None:
            plot(points, options.out, f"{run.name}: loss against data")


if __name__ == "__main__":
    main()
