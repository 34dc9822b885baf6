"""The rounds of a search on one model: each drops some units more, from full rank down.

A search cut off goes on from its state file, and an interrupt keeps the path reached.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from matkv.allocate.blend import blended
from matkv.allocate.config import AllocateConfig
from matkv.allocate.descent import Descent, uniform_descent
from matkv.allocate.divergence import Gated, Text, add_teacher
from matkv.allocate.fisher import MEMORY, Sensitivity, expand, fisher_drops
from matkv.allocate.greedy import greedy_round
from matkv.allocate.space import TINY
from matkv.allocate.state import Round, SearchState
from matkv.allocate.verify import Verifier
from matkv.artifact.artifact import Artifact
from matkv.bases.gates import GatedProjection
from matkv.bases.quantizer import Quantizer
from matkv.hf.geometry import attention_modules
from matkv.hf.handlers import truncating
from matkv.hf.merge import merged
from matkv.hf.wrappers import device_of
from matkv.progress import Interrupt, OnProgress, Report
from matkv.ranks import SIDES, RankTable, Side

# Settings that do not change a search's path.
UNSEEN = ("budgets", "max_kl", "max_perplexity_increase", "held_out_tokens", "batched", "blend")
logger = logging.getLogger(__name__)


class Rounds:
    """A method's rounds on one model, from full rank down."""

    def __init__(
        self, model: PreTrainedModel, artifact: Artifact, texts: list[Text], config: AllocateConfig
    ) -> None:
        self.model, self.texts, self.config = model, texts, config
        self.gated = gated_projections(model, artifact)
        self.lora, self.loss_weights = artifact.lora, artifact.loss_weights
        self.recent: dict[int, Sensitivity] = {}

    def run(
        self,
        path: Descent,
        lowest: float,
        state: str | Path | None,
        on_progress: OnProgress | None,
    ) -> tuple[Descent, bool]:
        """`path` down to the budget `lowest`, and whether an interrupt cut it short."""
        if self.config.method == "uniform":
            return uniform_descent(path.space), False
        rounds = SearchState(Path(state) if state is not None else None, self._digest())
        path = path.extended(rounds.drops)
        begun = path.table().budget
        tell = Report(on_progress, "searching", None, "rounds")

        def report(budget: float, kl: float) -> None:
            seconds = time.perf_counter() - tell.started
            # Rounds of greedy are equal steps, those of fisher equal relative steps.
            scale = float if self.config.method == "greedy" else math.log
            now = max(budget, lowest)
            left = seconds * (scale(now) - scale(lowest)) / (scale(begun) - scale(now))
            note, figures = f"budget {budget:.1%} · KL {kl:.3f}", {"budget": budget, "kl": kl}
            tell(len(rounds.rounds), note, seconds=seconds, seconds_left=left, figures=figures)

        with Interrupt() as interrupt:
            while (now := path.table().budget) > lowest + TINY:
                try:
                    path = self._advance(path, rounds)
                    report(path.table().budget, rounds.rounds[-1].kl)
                except KeyboardInterrupt:
                    interrupt.requested = True
                if interrupt.agreed(self.model.device):
                    logger.warning("interrupted at a budget of %.3g: tables below are missing", now)
                    return path, True
        return path, False

    def blend(self, path: Descent, budgets: Sequence[float]) -> tuple[Descent, dict[float, float]]:
        """`path` drawn towards equal ranks, by the loss on the last texts of the search."""
        count = -(-self.config.held_out_tokens // self.config.search_tokens)
        text = Text.of(piece.batch for text in self.texts[-count:] for piece in text.pieces)
        return blended(path, budgets, self.verifier(text).loss)

    def verifier(self, text: Text) -> Verifier:
        return Verifier(self.model, self.gated, text, self.student, self.loss_weights)

    def _advance(self, path: Descent, rounds: SearchState) -> Descent:
        """One round further."""
        since = time.perf_counter()
        if self.config.method == "greedy":
            drops, kl = self._greedy(path)
        else:
            drops, kl = self._fisher(path, rounds.rounds)
        rounds.add(drops, kl, time.perf_counter() - since)
        return path.extended(drops)

    def _greedy(self, path: Descent) -> tuple[list[int], float]:
        text, config = self.texts[0], self.config
        add_teacher(self.model, text)
        with self.student():
            return greedy_round(
                self.model, self.gated, text, path, drops=config.drops, batched=config.batched
            )

    def _fisher(self, path: Descent, rounds: Sequence[Round]) -> tuple[list[int], float]:
        """Expand where the path stands; after a resume also where it stood in the last rounds."""
        index = len(rounds)
        recent: dict[int, Sensitivity] = {}
        for past in range(max(0, index - MEMORY + 1), index + 1):
            count = sum(len(one.drops) for one in rounds[:past])
            recent[past] = self.recent.get(past) or self._expand(past, path.table(count))
        self.recent = recent
        drops = fisher_drops(path, list(recent.values()), expansions=self.config.expansions)
        return drops, recent[index].kl

    def _expand(self, index: int, table: RankTable) -> Sensitivity:
        text = self.texts[index % len(self.texts)]
        add_teacher(self.model, text)
        seed = self.config.seed + (index << 32)
        with self.student():
            sensitivity = expand(
                self.model, self.gated, text, table, samples=self.config.samples, seed=seed
            )
        if len(self.texts) > 1:
            text.forget_teacher()
        return sensitivity

    @contextmanager
    def student(self) -> Iterator[None]:
        """Gates in place and adapters added to the weights meanwhile."""
        with merged(self.model, self.lora), truncating(self.model, self.gated):
            yield

    def _digest(self) -> str:
        """Of all that determines the path: settings, bases, adapters and text."""
        settings = asdict(self.config)
        for name in UNSEEN:
            del settings[name]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for projection in self.gated.values():
            digest.update(str(projection.recent).encode())
        tensors = [piece.batch.ids_BT for text in self.texts for piece in text.pieces]
        for projection in self.gated.values():
            for maps in projection.maps.values():
                tensors += [maps.encode_XDD.float(), maps.decode_XDD.float()]
        if self.lora is not None:
            tensors += [self.lora.tensors[name].float() for name in sorted(self.lora.tensors)]
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def gated_projections(model: PreTrainedModel, artifact: Artifact) -> Gated:
    """A gate on every column of the artifact's bases, where the model's layers are."""
    modules = attention_modules(model)
    gated = {}
    for layer in artifact.geometry.compressed:
        move = partial(Tensor.to, device=device_of(modules[layer]))
        maps = {side: artifact.maps(layer, side).changed(move) for side in SIDES}
        quantizers: dict[Side, Quantizer] = {}
        for side in SIDES:
            quantizer = artifact.bases[layer][side].quantizer
            if quantizer is not None:
                quantizers[side] = quantizer.changed(move)
        gated[layer] = GatedProjection(
            maps, recent=artifact.recent, sink=artifact.sink, quantizers=quantizers
        )
    return gated
