"""What each choice of distillation is worth, at equal numbers of student forward passes.

    python benchmarks/ablations.py -o ablations.json [--passes 96] [--text wikitext2-test.txt]
    python benchmarks/ablations.py -o ablations.json --table

Every variant changes one thing of the first and starts from the same moments. `--passes` counts
sequences of 256 tokens that go through the student: a ladder of four rungs takes four passes of
every sequence. Rows are kept in the file as they come, and a second call goes on where the first
one stopped. Perplexity at uniform ranks, except `shares`.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matkv import data
from matkv.artifact.artifact import Artifact
from matkv.artifact.records import made
from matkv.artifact.results import Kind, Results
from matkv.bases.maps import Maps, SideBases
from matkv.calibrate import CalibrateConfig, artifact_from
from matkv.distill.config import DistillConfig, LocalSettings
from matkv.distill.stage import distill
from matkv.evaluate.texts import evaluate, perplexity
from matkv.hf.attach import attach, detach
from matkv.hf.observe import collect_moments
from matkv.models.load import load_model
from matkv.ranks import SIDES, RankTable

BUDGETS = (0.75, 0.5, 0.375, 0.25)
SHARES = ((0.25, 0.5), (0.375, 0.375), (0.5, 0.25))  # (keys, values) of a 37.5% budget
BATCH, LENGTH, LOCAL_BATCH = 4, 256, 8
ABLATIONS = Kind("ablations", ("variant",))


@dataclass(frozen=True)
class Variant:
    """One change: of the settings, the bases to start from, or the passes a sequence takes."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    start: str = "query/output"
    passes: int = 1


VARIANTS = (
    Variant("cayley, independent, KL, from query/output"),
    Variant("exp", {"parametrization": "exp"}),
    Variant("householder", {"parametrization": "householder"}),
    Variant("free (not orthogonal)", {"parametrization": "free"}),
    Variant("one draw a step", {"draw": "step"}),
    Variant("cycle of 25, 37.5, 50, 75%", {"schedule": "cycle"}),
    Variant("ladder of the same", {"schedule": "ladder"}, passes=4),
    Variant("sandwich", {"schedule": "sandwich"}, passes=3),
    Variant("only 37.5%", {"schedule": "cycle", "rungs": (0.375,)}),
    Variant("0.25 KL + 0.75 CE", {"kl": 0.25, "ce": 0.75}),
    Variant("from pca/pca", start="pca/pca"),
    Variant("from query/pca", start="query/pca"),
    Variant("from the identity", start="identity"),
    Variant("local stage", {"objective": "local"}),
    Variant("recent of 32 exact tokens", {"recent": 32}),
    Variant("LoRA of rank 16", {"lora_rank": 16}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--passes", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens to score")
    parser.add_argument("--text", default="default")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    results = Results(None, ABLATIONS, file=options.out)
    if not options.table:
        for row in measured(options, {row["variant"] for row in results.rows}):
            results.put([row])
    print(table(results.rows))


def measured(options: argparse.Namespace, done: set[str]) -> Iterator[dict[str, Any]]:
    model, tokenizer = load_model("smollm2-135m")
    train, held_out = (data.read_texts("default", split) for split in ("train", "validation"))
    scored = held_out if options.text == "default" else data.read_texts(options.text, "validation")
    scored_NT = data.text_windows(tokenizer, scored, 512, options.tokens)
    train_NT = data.text_windows(tokenizer, train, LENGTH)
    starts = make_starts(model, data.text_windows(tokenizer, train, 512, 65_536))
    common = {"tokens_scored": scored_NT.numel(), "text": Path(options.text).name}
    names = ("full cache", *(f"before training, {start}" for start in starts))
    if names[0] not in done:
        full = evaluate(model, starts["query/output"], scored_NT, [])[0]
        yield {"variant": names[0], "full": full.perplexity, **common, "made": made()}
    for name, start in zip(names[1:], starts.values(), strict=True):
        if name not in done:
            yield {"variant": name, **scores(model, start, scored_NT), **common}
    for variant in VARIANTS:
        if variant.name in done:
            continue
        steps = max(1, options.passes // (BATCH * variant.passes))
        config = DistillConfig(
            steps=steps,
            sequence_length=LENGTH,
            batch_size=BATCH,
            warmup_steps=max(1, steps // 10),
            local=LocalSettings(
                steps=max(1, options.passes // LOCAL_BATCH), batch_size=LOCAL_BATCH
            ),
            **variant.settings,
        )
        started = time.perf_counter()
        artifact = distill(model, starts[variant.start], train_NT, config)
        seconds = time.perf_counter() - started
        yield {
            "variant": variant.name,
            "steps": steps,
            "tokens": steps * BATCH * LENGTH,
            "minutes": round(seconds / 60, 2),
            "off_orthogonal": off_orthogonal(artifact),
            **scores(model, artifact, scored_NT),
            **({"shares": shares(model, artifact, scored_NT)} if variant is VARIANTS[0] else {}),
            **common,
            "made": made(seed=config.seed),
        }


def make_starts(model: PreTrainedModel, windows_NT: Tensor) -> dict[str, Artifact]:
    """Artifacts of every kind of basis, from one pass."""
    layers, tokens = collect_moments(model, data.batches(windows_NT, 8))
    kinds = ("query/output", "query/pca", "pca/pca")
    starts = {}
    for kind in kinds:
        key, value = kind.split("/")
        config = CalibrateConfig(key=key, value=value)  # type: ignore[arg-type]
        starts[kind] = artifact_from(model, layers, config, tokens=tokens)
    first = starts[kinds[0]]
    starts["identity"] = replace(
        first,
        bases={
            layer: {side: identity(sides[side]) for side in SIDES}
            for layer, sides in first.bases.items()
        },
    )
    return starts


def identity(bases: SideBases) -> SideBases:
    eye_GDD = torch.eye(bases.energy_GD.shape[1]).expand_as(bases.maps.encode_XDD).clone()
    return SideBases(Maps.orthogonal(eye_GDD), bases.energy_GD)


def scores(model: PreTrainedModel, artifact: Artifact, windows_NT: Tensor) -> dict[str, float]:
    """Perplexity at every budget, uniform ranks; with adapters also at full rank."""
    budgets = (1.0, *BUDGETS) if artifact.lora is not None else BUDGETS
    rows = evaluate(model, artifact, windows_NT, budgets, uniform=True, full_cache=False)
    return {f"{row.budget:g}": row.perplexity for row in rows}


def shares(model: PreTrainedModel, artifact: Artifact, windows_NT: Tensor) -> dict[str, float]:
    """Perplexity at 37.5% with more of the keys, or more of the values."""
    found = {}
    for share in SHARES:
        sides = [RankTable.uniform(artifact.geometry, part) for part in share]
        ranks = RankTable(artifact.geometry, sides[0].key, sides[1].value)
        attach(model, artifact, ranks=ranks)
        found["/".join(f"{part:g}" for part in share)] = perplexity(model, windows_NT)[0]
        detach(model)
    return found


def off_orthogonal(artifact: Artifact) -> float:
    """The largest |U^T U - I| of all bases, in the Frobenius norm."""
    worst = 0.0
    for sides in artifact.bases.values():
        for bases in sides.values():
            encode_GDD = bases.maps.encode_XDD.double()
            eye_DD = torch.eye(encode_GDD.shape[-1], dtype=torch.float64)
            worst = max(worst, float((encode_GDD.mT @ encode_GDD - eye_DD).norm(dim=(1, 2)).max()))
    return worst


def table(rows: list[dict[str, Any]]) -> str:
    head = ["variant", *(f"{b:.1%}" for b in BUDGETS), "steps", "minutes", "off orthogonal"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["variant"], *(_cell(row.get(f"{b:g}"), ".1f") for b in BUDGETS)]
        cells += [_cell(row.get("steps"), "d"), _cell(row.get("minutes"), ".1f")]
        cells.append(_cell(row.get("off_orthogonal"), ".0e"))
        if "full" in row:
            cells[1] = f"{row['full']:.2f}"
        lines.append("| " + " | ".join(cells) + " |")
        if "shares" in row:
            parts = ", ".join(f"{share}: {value:.1f}" for share, value in row["shares"].items())
            lines.append(f"| its 37.5% by shares of keys/values: {parts} |" + " |" * 7)
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    main()
