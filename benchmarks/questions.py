"""The paper's questions, asked of the recipe that makes the artifact that comes along.

    python benchmarks/questions.py -o runs/questions [--steps 48] [--seeds 0 1 2] [--only free]
    python benchmarks/questions.py -o runs/questions --table

Are orthogonal bases worth it, each parametrization at its own best rate? Which schedule, at equal
sequences through the student? How many bytes for the keys, how many for the values? How much text?
Every arm changes one thing of the recipe `default-cpu-codes` and starts from the same calibration
and the same tables, made once in OUT/start unless `--start` names an artifact with tables for the
recipe's budgets. All are judged by the divergence from the full cache on held-out articles, at
these tables, first 4 and last 32 tokens exact.

Arms are kept as they end, one under way goes on from its checkpoint. An arm of 48 steps takes about
ten minutes of two idle cores: name with `--only` what there is time for, and what was not measured
is not in the table.

Shapes: N windows, T token.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from matkv import data
from matkv.allocate.config import AllocateConfig
from matkv.allocate.stage import allocate
from matkv.artifact.artifact import Artifact
from matkv.artifact.history import Distilled, entries
from matkv.artifact.results import Kind, Results
from matkv.artifact.setting import Setting
from matkv.calibrate import CalibrateConfig, calibrate
from matkv.distill.config import DistillConfig
from matkv.distill.stage import distill
from matkv.evaluate.divergences import DIVERGENCE, divergences
from matkv.models.default import DEFAULT_MODEL
from matkv.models.load import load_model
from matkv.ranks import RankTable, Side
from matkv.settings import find_recipe

RECIPE = "default-cpu-codes"
RATES = (1e-3, 4e-3, 1.6e-2)  # the recipe's in the middle
FREE_RATES = (2.5e-5, 1e-4, 4e-4, 1.6e-3)
SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)  # of a budget's bytes, for the keys
LENGTH = 1024  # tokens of the windows that arms are judged by
ARMS = Kind("questions", ("arm", "seed", "steps", "length", "batch", "start"))


@dataclass(frozen=True)
class Arm:
    """What is changed of the recipe; `passes` students read every sequence."""

    question: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    passes: int = 1


def arms() -> Iterator[Arm]:
    """All of them, the recipe as it is first."""
    yield Arm("recipe", "as it is")
    for lr in RATES:
        yield Arm("orthogonal", f"cayley, lr {lr:g}", {"lr": lr})
    for lr in FREE_RATES:
        yield Arm("free", f"free, lr {lr:g}", {"parametrization": "free", "lr": lr})
    yield Arm("schedule", "ladder", {"schedule": "ladder"}, passes=4)
    yield Arm("schedule", "independent", {"schedule": "independent"})
    yield Arm("schedule", "cycle, one table a step", {"draw": "step"})
    for budget in (0.21, 0.14, 0.10):
        yield Arm("schedule", f"only {budget:.0%}", {"rungs": (budget,)})
    yield Arm("loss", "divergence alone", {"kl": 1.0, "ce": 0.0})
    yield Arm("exact", "no recent tokens exact", {"recent": 0})


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What all arms share."""

    model: Any
    start: Artifact
    train_NT: Tensor
    scored_NT: Tensor
    budgets: tuple[float, ...]
    folder: Path
    steps: int
    length: int
    batch: int

    def about(self, name: str, seed: int) -> dict[str, Any]:
        """What tells one row from another."""
        return {
            "arm": name, "seed": seed, "steps": self.steps, "length": self.length,
            "batch": self.batch, "start": self.start.digest,
        }  # fmt: skip

    def config(self, arm: Arm, seed: int) -> DistillConfig:
        """The recipe with the arm's change, at equal sequences through the student."""
        steps = max(1, self.steps // arm.passes)
        sizes = {"sequence_length": self.length, "batch_size": self.batch}
        sizes |= {"micro_batch_size": self.batch, "steps": steps, "seed": seed}
        sizes |= {"probe_every": max(1, steps // 4), "warmup_steps": max(1, steps // 6)}
        given = sizes | {"rungs": self.budgets} | arm.settings
        recipe = DistillConfig.from_toml(find_recipe(RECIPE)).to_json()
        return DistillConfig.from_dict(recipe | {"minutes": None} | given)

    def trained(self, arm: Arm, seed: int) -> dict[str, Any]:
        """The row of an arm; an arm cut off goes on from its checkpoint."""
        checkpoints = self.folder / "checkpoints" / f"{arm.name}-{seed}".replace(" ", "-")
        started = time.perf_counter()
        made = distill(
            self.model, self.start, self.train_NT, self.config(arm, seed),
            held_out=self.scored_NT, checkpoints=checkpoints,
            resume=any(checkpoints.glob("checkpoint-*")),
        )  # fmt: skip
        seconds = time.perf_counter() - started
        shutil.rmtree(checkpoints, ignore_errors=True)
        *_, entry = entries(made.history, Distilled)
        stage = entry.stages["end-to-end"]
        curve = [{"tokens": point.tokens, **point.probes} for point in stage.curve]
        return {
            "question": arm.question, "seconds": round(seconds, 1), "curve": curve,
            **self.judged(made),
        }  # fmt: skip

    def judged(self, artifact: Artifact) -> dict[str, Any]:
        """Divergence and its error at every budget."""
        settings = [Setting(budget=budget) for budget in self.budgets]
        kept = Results(None, DIVERGENCE)
        rows = divergences(self.model, artifact, self.scored_NT, "held out", settings, kept)
        return {f"{row['budget']:g}": [row["kl"], row["kl_stderr"]] for row in rows}

    def split(self, artifact: Artifact, budget: float) -> Iterator[dict[str, Any]]:
        """Rows with the bytes of a budget split anew between keys and values."""
        for share in SHARES:
            table = split_table(artifact, budget, share)
            given = replace(artifact, tables={budget: table})
            (row,) = divergences(
                self.model, given, self.scored_NT, "held out", [Setting(budget=budget)],
                Results(None, DIVERGENCE),
            )  # fmt: skip
            keys = table.share("key") / (table.share("key") + table.share("value"))
            yield self.about(f"{keys:.0%} of {table.budget:.1%} for the keys", 0) | {
                "question": "shares", f"{budget:g}": [row["kl"], row["kl_stderr"]],
            }  # fmt: skip


def split_table(artifact: Artifact, budget: float, share: float) -> RankTable:
    """The keys of one table of an artifact and the values of another, nearest to the shares.

    Every side has the columns that the artifact's own search gives it at some budget; no table is
    above `budget` by more than the grain of these.
    """
    wanted: dict[Side, float] = {"key": 2 * budget * share, "value": 2 * budget * (1 - share)}
    bands = {}
    for side, its in wanted.items():
        table = min(artifact.tables.values(), key=lambda one: abs(one.share(side) - its))
        for layer in artifact.geometry.compressed:
            for head, one in enumerate(table.bands(layer, side)):
                bands[layer, side, head] = one
    return RankTable.banded(artifact.geometry, bands)


# ---- material


def make_start(model: Any, windows_NT: Tensor, budgets: tuple[float, ...]) -> Artifact:
    """The recipe's start: calibrated, with tables of ranks and bits for its budgets."""
    how = CalibrateConfig(sink=4, recent=32)
    artifact = calibrate(model, data.batches(windows_NT[:16], 4), how)
    config = AllocateConfig(budgets=budgets)
    return allocate(model, artifact, data.batches(windows_NT, 1), config)


def spread_out(windows_NT: Tensor, count: int) -> Tensor:
    """So many windows, all over a text."""
    step = max(1, len(windows_NT) // count)
    return windows_NT[::step][:count]


def desk(options: argparse.Namespace) -> Desk:
    """The model, the text and the start."""
    model, tokenizer = load_model(DEFAULT_MODEL, options.dtype)
    texts = {split: data.read_texts("default", split) for split in ("train", "validation")}
    train_NT = data.text_windows(tokenizer, texts["train"], LENGTH)
    held_NT = data.text_windows(tokenizer, texts["validation"], LENGTH)
    folder: Path = options.out
    budgets = tuple(DistillConfig.from_toml(find_recipe(RECIPE)).rungs)
    start = options.start or folder / "start"
    if options.start is None and not (folder / "start").exists():
        make_start(model, train_NT, budgets).save(folder / "start")
    lines_NT = data.text_windows(tokenizer, texts["train"], options.length)
    return Desk(
        model=model, start=Artifact.load(start), train_NT=lines_NT,
        scored_NT=spread_out(held_NT, options.scored), budgets=budgets, folder=folder,
        steps=options.steps, length=options.length, batch=options.batch,
    )  # fmt: skip


def measure(options: argparse.Namespace, results: Results) -> None:
    """What is asked for and not there yet, the recipe's own arms first."""
    ours = desk(options)
    if not options.only or any(word in "before training" for word in options.only):
        about = ours.about("before training", 0)
        if results.find(about) is None:
            results.add([about | {"question": "recipe", **ours.judged(ours.start)}])
    for seed in options.seeds:
        for arm in arms():
            named = f"{arm.question}: {arm.name}"
            about = ours.about(named, seed)
            wanted = not options.only or any(word in named for word in options.only)
            if wanted and results.find(about) is None:
                print(f"{named}, seed {seed}", flush=True)
                results.add([about | ours.trained(arm, seed)])
    if not options.only or any(word in "shares" for word in options.only):
        trained = Artifact.load(options.shares_of)
        rows = replace(ours, start=trained).split(trained, options.split)
        results.add([row for row in rows if results.find(row) is None])


# ---- what is printed


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Divergence of every arm, a mean over seeds where there are several, behind ± one error.

    The error is that over windows, or over seeds where there are several.
    """
    budgets = sorted({name for row in rows for name in row if _is_budget(name)}, key=float)[::-1]
    head = ["question", "arm", *(f"KL at {float(one):.4g}" for one in budgets), "steps", "seeds"]
    lines = [head, ["---"] * len(head)]
    names = dict.fromkeys((row["question"], row["arm"], row["steps"]) for row in rows)
    for question, arm, steps in names:
        mine = [row for row in rows if (row["arm"], row["steps"]) == (arm, steps)]
        cells = [_mean([row[one] for row in mine if one in row]) for one in budgets]
        name = arm.removeprefix(f"{question}: ")
        seeds = "" if question == "shares" or name == "before training" else str(len(mine))
        lines.append([question, name, *cells, str(steps) if seeds else "", seeds])
    shown = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([*shown, "", curve(rows)])


def _is_budget(name: str) -> bool:
    return name.replace(".", "", 1).isdecimal()


def _mean(found: Sequence[Sequence[float]]) -> str:
    if not found:
        return ""
    means = [kl for kl, _ in found]
    error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else found[0][1]
    return f"{statistics.fmean(means):.4f} ± {error:.4f}"


def curve(rows: Sequence[dict[str, Any]]) -> str:
    """Held-out loss of the recipe as it is by tokens read: how much text it takes."""
    for row in rows:
        if row["question"] == "recipe" and row.get("curve"):
            names = [name for name in row["curve"][0] if name != "tokens"]
            lines = [["tokens", *(f"loss at {name}" for name in names)]]
            lines.append(["---"] * len(lines[0]))
            for point in row["curve"]:
                cells = [f"{point[name]:.3f}" for name in names]
                lines.append([f"{point['tokens']:,}", *cells])
            return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return ""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/questions"))
    parser.add_argument("--start", type=Path, help="an artifact with the recipe's tables")
    parser.add_argument("--steps", type=int, default=48, help="of students that read a batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--scored", type=int, default=8, help="windows that arms are judged by")
    parser.add_argument("--shares-of", default=DEFAULT_MODEL, help="artifact whose bytes to split")
    parser.add_argument("--split", type=float, default=0.14, help="budget of the shares")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="arms with a word")
    parser.add_argument("--dtype", default="auto", help="bfloat16 where it is fast, else float32")
    parser.add_argument("--table", action="store_true", help="measure nothing, print")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and print all."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(None, ARMS, file=options.out / "questions.json")
    if not options.table:
        measure(options, results)
    print(table(results.rows))


if __name__ == "__main__":
    main()
