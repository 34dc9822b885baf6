"""A seeded tiny run of calibrate, distill, allocate and evaluate, and what it gave when recorded.

The recording is golden.json beside this file. A change that shall not change results leaves it
alone; one that changes them on purpose records anew, and says so:

    python tests/golden.py --record

That runs everything in fresh processes, with this processor's vector instructions and with those of
AVX2, twice each, and refuses to record what is not the same both times.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lessons import quick, text
from matkv.allocate.config import AllocateConfig
from matkv.allocate.stage import allocate
from matkv.artifact.artifact import Artifact
from matkv.calibrate import CalibrateConfig, calibrate
from matkv.distill.stage import distill
from matkv.evaluate.texts import evaluate
from matkv.ranks import SIDES
from tiny import build, left_padded, seeded, tokens

RECORDING = Path(__file__).with_suffix(".json")
CAPABILITIES = (None, "avx2")
BUDGETS = (0.75, 0.5, 0.25)
MARK = "golden: "  # before the line that holds a run's results: libraries print too

# What a run gave, by name: a digest of every bit, and numbers to compare where bits differ.
Results = dict[str, dict[str, Any]]


def golden_results(seed: int = 0) -> Results:
    """All that the seeded run makes, in one thread.

    Each entry holds the sha256 "digest" of tensors or rank tables, and "numbers" that say the same
    in short: the energy in the leading half of the columns, divergences, perplexities.
    """
    with one_thread():
        model = build("llama", seed)
        return _Run(model, seed).results()


class _Run:
    """The stages, one after the other, on one model."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model, self.seed = model, seed
        self.results_of: Results = {}

    def results(self) -> Results:
        for stage in (self.calibrated, self.distilled, self.allocated):
            for name, artifact in stage().items():
                self.results_of[name] = _of_artifact(artifact)
                self.results_of[f"{name}, evaluated"] = self.evaluated(artifact)
        return self.results_of

    def calibrated(self) -> dict[str, Artifact]:
        """Both kinds of bases, padding and left-out tokens among the batches."""
        ids_BT, mask_BT = left_padded([tokens(1, 24, seed=1), tokens(1, 15, seed=2)])
        padded = {"input_ids": ids_BT, "attention_mask": mask_BT}
        batches = (tokens(4, 32, seed=3), padded)
        configs = {
            "query and output": CalibrateConfig(),
            "pca": CalibrateConfig(key="pca", value="pca", skip_first=2),
            "with exact tokens": CalibrateConfig(sink=2, recent=4),
        }
        made = {name: calibrate(self.model, batches, config) for name, config in configs.items()}
        self.start = made["query and output"]
        self.exact = made["with exact tokens"]
        return made

    def distilled(self) -> dict[str, Artifact]:
        """Each stage by itself, then both with adapters; end to end also with exact tokens."""
        ladder = {"schedule": "ladder", "ce": 0.5, "parametrization": "householder"}
        settings: dict[str, tuple[Artifact, dict[str, Any]]] = {
            "local": (self.start, {"objective": "local"}),
            "end to end": (self.start, {"micro_batch_size": 2}),
            "end to end, exact tokens": (self.exact, ladder),
            "both, adapters": (
                self.start,
                {"objective": "both", "lora_rank": 2, "lora_dropout": 0.1},
            ),
        }
        made = {
            name: distill(
                self.model, start, text(), quick(seed=self.seed, **changes), held_out=text(2)
            )
            for name, (start, changes) in settings.items()
        }
        self.adapted = made["both, adapters"]
        return made

    def allocated(self) -> dict[str, Artifact]:
        """Both searches; the adapters' artifact brings its own loss."""
        settings: dict[str, tuple[Artifact, dict[str, Any]]] = {
            "fisher": (self.start, {"expansions": 5, "budgets": BUDGETS, "max_kl": 0.05}),
            "greedy": (self.start, {"method": "greedy", "budgets": (0.95, 0.9)}),
            "fisher, adapters": (self.adapted, {"expansions": 5, "budgets": BUDGETS}),
        }
        batches = [tokens(2, 24, seed=seed) for seed in range(4)]
        made = {}
        for name, (start, changes) in settings.items():
            sizes: dict[str, Any] = {"search_tokens": 96, "held_out_tokens": 48, "codes": (16,)}
            config = AllocateConfig(**sizes | changes, seed=self.seed)
            made[name] = allocate(self.model, start, batches, config)
        return made

    def evaluated(self, artifact: Artifact) -> dict[str, Any]:
        """Perplexities of the full cache, of equal ranks, and of stored tables."""
        windows_NT = text(4, 24)
        rows = evaluate(self.model, artifact, windows_NT, BUDGETS, uniform=True)
        if artifact.tables:
            rows += evaluate(self.model, artifact, windows_NT, sorted(artifact.tables))
        counts = [[row.budget, row.kept, row.held, row.bytes_per_token, row.tokens] for row in rows]
        errors = [row.stderr for row in rows]
        numbers = [row.perplexity for row in rows]
        bits = json.dumps([counts, errors, numbers]).encode()
        return {"digest": _digest([bits]), "numbers": numbers}


def _of_artifact(artifact: Artifact) -> dict[str, Any]:
    """Bases, adapters and tables, to the bit; energies, and KLs that allocate measured."""
    parts: list[bytes] = []
    numbers: list[float] = []
    for layer in artifact.geometry.compressed:
        for side in SIDES:
            maps, energy_GD = artifact.maps(layer, side), artifact.bases[layer][side].energy_GD
            parts += map(_bytes, (maps.encode_XDD, maps.decode_XDD, energy_GD))
            numbers += energy_GD[:, : energy_GD.shape[1] // 2].sum(-1).tolist()
    if artifact.lora is not None:
        parts += [_bytes(tensor) for _, tensor in sorted(artifact.lora.tensors.items())]
    ranks = [[budget, table.key, table.value] for budget, table in sorted(artifact.tables.items())]
    parts.append(json.dumps(ranks).encode())
    if artifact.tables:
        numbers += [entry["kl"] for entry in artifact.history[-1]["tables"]]
    return {"digest": _digest(parts), "numbers": numbers}


def _digest(parts: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().float().contiguous().numpy().tobytes())


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums are in another order with more threads, and their last bits differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment() -> str:
    """Where bits can be compared: torch, the vector instructions, and what arithmetic gives.

    The last is a digest of what PyTorch and transformers alone make of a tiny model: libraries of
    linear algebra choose their instructions by the processor, whatever PyTorch says.
    """
    with one_thread():
        model, ids_BT = build("llama"), tokens(4, 32)
        loss = model(ids_BT, labels=ids_BT).loss
        loss.backward()
        parts = [parameter.grad for parameter in model.parameters()]
        with seeded(0):
            square_GDD = torch.randn(2, 16, 16)
        symmetric_GDD = square_GDD @ square_GDD.mT
        parts += [*torch.linalg.eigh(symmetric_GDD), *torch.linalg.qr(square_GDD)]
        parts += [torch.linalg.solve(symmetric_GDD + torch.eye(16), square_GDD)]
    name = _digest(map(_bytes, parts))[:8]
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {name}"


def recorded() -> dict[str, Results]:
    """Results by environment."""
    found: dict[str, Results] = json.loads(RECORDING.read_text(encoding="utf-8"))
    return found


def _fresh(capability: str | None) -> tuple[str, Results]:
    """Environment and results of a process of its own."""
    wanted = {} if capability is None else {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, __file__]
    done = subprocess.run(
        command, env=os.environ | wanted, stdout=subprocess.PIPE, text=True, check=True
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith(MARK))
    name, results = json.loads(line.removeprefix(MARK))
    return name, results


def record() -> None:
    """Record this machine's environments, in place of all others: they hold the results before.

    Raises:
        SystemExit: two processes differ.
    """
    made = {}
    for capability in CAPABILITIES:
        (name, results), again = _fresh(capability), _fresh(capability)
        if (name, results) != again:
            sys.exit(f"two runs differ on {name}: nothing was recorded")
        made[name] = results
    RECORDING.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"recorded {', '.join(made)}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--record"]:
        record()
    else:
        print(MARK + json.dumps([environment(), golden_results()]))
