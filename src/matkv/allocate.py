"""Allocate: the right rank for every layer, KV head and side, for a whole curve of budgets at once.

Every method makes one path of drops from full rank downwards (see search.py); the table of a budget
is the first on the path that holds it, so that tables are nested.

fisher    expand the KL around the ranks of the moment (see sensitivity.py), take the cheapest
          drops, and expand again there: a few backward passes in all; then draw the tables towards
          equal ranks as far as that measures better (see blend.py)
greedy    Algorithm 1 of the paper (arXiv 2410.14731): measure the KL of every single drop, take
          the cheapest, and again
uniform   the same rank everywhere, to compare with
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path as FilePath
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matkv.artifact import Artifact
from matkv.blend import blended
from matkv.divergence import Batch, Gated, Text, add_teacher, joined, take_text
from matkv.errors import BudgetError, DataError, MatkvError
from matkv.hf import attention_modules, fingerprint, geometry_of, handled
from matkv.latents import GatedProjection
from matkv.progress import Interrupt
from matkv.projection import Maps
from matkv.rank_search import MEMORY, fisher_drops, greedy_round
from matkv.ranks import SIDES, RankTable, check_budget
from matkv.search import TINY, Constraints, Path, Space, uniform_path
from matkv.search_state import Round, SearchState
from matkv.sensitivity import Sensitivity, expand
from matkv.verify import Verifier, own_budget

Method = Literal["fisher", "greedy", "uniform"]
METHODS: tuple[str, ...] = get_args(Method)
# Settings that do not change a search's path.
UNSEEN = ("budgets", "max_kl", "max_perplexity_increase", "held_out_tokens", "batched", "blend")
EIGHTHS = tuple(eighth / 8 for eighth in range(7, 0, -1))

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AllocateConfig:
    """How to allocate.

    budgets                   tables to store; None for every eighth that the constraints allow
    max_kl                    also store the smallest cache whose KL, in nats a token, stays below
    max_perplexity_increase   the same for perplexity: 0.05 for 5%
    search_tokens             text a search reads in one go: fisher's expansions, greedy's rounds
    held_out_tokens           text after it on which the tables are verified
    expansions                fisher: points on the way from 100% to 12.5%, in equal relative steps
    samples                   fisher: label sequences drawn for a sequence of text
    blend                     fisher: draw the tables towards equal ranks where that is better, by
                              the loss that trained the bases
    drops                     greedy: drops taken a round; the paper takes one
    batched                   greedy: tables that go through the model together
    """

    method: Method = "fisher"
    budgets: tuple[float, ...] | None = None
    constraints: Constraints = field(default_factory=Constraints)
    max_kl: float | None = None
    max_perplexity_increase: float | None = None
    search_tokens: int = 2048
    held_out_tokens: int = 4096
    expansions: int = 36
    samples: int = 1
    blend: bool = True
    drops: int = 1
    batched: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MatkvError(f"method {self.method!r} must be one of {', '.join(METHODS)}")
        if self.budgets is not None and not self.budgets:
            raise BudgetError("no budget is given: name one, or leave budgets out for all eighths")
        for budget in self.budgets or ():
            check_budget(budget)
        for name in (
            "search_tokens",
            "held_out_tokens",
            "expansions",
            "samples",
            "drops",
            "batched",
        ):
            if getattr(self, name) < 1:
                raise MatkvError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("max_kl", "max_perplexity_increase"):
            limit = getattr(self, name)
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                raise BudgetError(f"{name} {limit} must be a number above 0")


@dataclass(frozen=True)
class Progress:
    """Where a search stands after a round.

    `budget` is what the round reached, `kl` the KL in nats a token where it started; `seconds_left`
    is a guess from the rounds so far.
    """

    rounds: int
    budget: float
    kl: float
    seconds: float
    seconds_left: float


OnProgress = Callable[[Progress], None]


def allocate(
    model: PreTrainedModel,
    artifact: Artifact,
    batches: Iterable[Batch],
    config: AllocateConfig | None = None,
    *,
    state: str | FilePath | None = None,
    on_progress: OnProgress | None = None,
) -> Artifact:
    """A copy of `artifact` with rank tables by budget, searched on `batches`.

    A batch is a tensor [BT] of token ids, or a mapping with `input_ids` and `attention_mask`. The
    first batches, of `held_out_tokens`, verify the tables; the rest is searched on, `search_tokens`
    a round: greedy reads the same ones in every round, fisher the next ones, over and over. Under
    accelerate or torchrun all processes give the same batches and share the work.

    `state` names a file that a search cut off goes on from. An interrupt (Ctrl-C) ends the search
    and stores the tables reached, the last one by its own budget; the history entry says so.

    Raises:
        BudgetError: the constraints allow no table for a budget, or none holds an error limit.
        DataError: there is too little text.
        RankError: the constraints do not fit the model.
        FingerprintError: the artifact was made for another model.
    """
    config = config or AllocateConfig()
    constraints = config.constraints.above(artifact.smallest_trained_rank)
    config = replace(config, constraints=constraints)
    artifact.check(geometry_of(model.config), fingerprint(model))
    space = Space.of(artifact.geometry, constraints)
    budgets = _budgets(space, config)
    held_out, texts = _texts(model, batches, config)
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        search = _Search(model, artifact, texts, config)
        path, interrupted = search.run(Path(space), min(budgets), state, on_progress)
        shares: dict[float, float] = {}
        if config.method == "fisher" and config.blend and not interrupted:
            path, shares = search.blend(path, budgets)
        tables = _tables(path, budgets)
        checks = []
        if interrupted and path.drops:
            tables[own_budget(path.table())] = path.table()
        elif not interrupted:
            verifier = search.verifier(held_out)
            for error, limit in _limits(config):
                table = verifier.smallest(path, error, limit)
                tables[own_budget(table)] = table
            checks = [verifier.entry(space, *named) for named in sorted(tables.items())]
    finally:
        model.train(was_training)
    return replace(artifact, tables=tables).with_history(
        "allocate",
        **asdict(config),
        seconds=round(time.perf_counter() - started, 1),
        interrupted=interrupted,
        shares=[{"budget": budget, "share": share} for budget, share in sorted(shares.items())],
        tables=checks,
    )


class _Search:
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
        path: Path,
        lowest: float,
        state: str | FilePath | None,
        on_progress: OnProgress | None,
    ) -> tuple[Path, bool]:
        """`path` down to the budget `lowest`, and whether an interrupt cut it short."""
        if self.config.method == "uniform":
            return uniform_path(path.space), False
        rounds = SearchState(FilePath(state) if state is not None else None, self._digest())
        path = path.extended(rounds.drops)
        begun, started = path.table().budget, time.perf_counter()

        def report(budget: float, kl: float) -> None:
            seconds = time.perf_counter() - started
            # Rounds of greedy are equal steps, those of fisher equal relative steps.
            scale = float if self.config.method == "greedy" else math.log
            now = max(budget, lowest)
            left = seconds * (scale(now) - scale(lowest)) / (scale(begun) - scale(now))
            if on_progress is not None:
                on_progress(Progress(len(rounds.rounds), budget, kl, seconds, left))

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

    def blend(self, path: Path, budgets: Sequence[float]) -> tuple[Path, dict[float, float]]:
        """`path` drawn towards equal ranks, by the loss on the last texts of the search."""
        count = -(-self.config.held_out_tokens // self.config.search_tokens)
        text = joined(self.texts[-count:])
        return blended(path, budgets, self.verifier(text).loss)

    def verifier(self, text: Text) -> Verifier:
        return Verifier(self.model, self.gated, text, self.student, self.loss_weights)

    def _advance(self, path: Path, rounds: SearchState) -> Path:
        """One round further."""
        since = time.perf_counter()
        if self.config.method == "greedy":
            drops, kl = self._greedy(path)
        else:
            drops, kl = self._fisher(path, rounds.rounds)
        rounds.add(drops, kl, time.perf_counter() - since)
        return path.extended(drops)

    def _greedy(self, path: Path) -> tuple[list[int], float]:
        text, config = self.texts[0], self.config
        add_teacher(self.model, text)
        with self.student():
            return greedy_round(
                self.model, self.gated, text, path, drops=config.drops, batched=config.batched
            )

    def _fisher(self, path: Path, rounds: Sequence[Round]) -> tuple[list[int], float]:
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
            found = expand(
                self.model, self.gated, text, table, samples=self.config.samples, seed=seed
            )
        if len(self.texts) > 1:
            text.forget_teacher()
        return found

    @contextmanager
    def student(self) -> Iterator[None]:
        """Gates in place and adapters added to the weights meanwhile."""
        before: dict[str, Tensor] = {}
        try:
            for path, update in self.lora.updates() if self.lora is not None else ():
                weight = self.model.get_parameter(f"{path}.weight").data
                before[f"{path}.weight"] = weight.clone()
                weight.add_(update.to(weight.device, weight.dtype))
            with handled(self.model, self.gated):
                yield
        finally:
            for name, weight in before.items():
                self.model.get_parameter(name).data.copy_(weight)

    def _digest(self) -> str:
        """Of all that determines the path: settings, bases, adapters and text."""
        settings = asdict(self.config)
        for name in UNSEEN:
            del settings[name]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for projection in self.gated.values():
            digest.update(str(projection.window).encode())
        tensors = [piece.ids_BT for text in self.texts for piece in text.pieces]
        for projection in self.gated.values():
            for maps in (projection.key_maps, projection.value_maps):
                tensors += [maps.encode_GDD.float(), maps.decode_GDD.float()]
        if self.lora is not None:
            tensors += [self.lora.tensors[name].float() for name in sorted(self.lora.tensors)]
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


# ---- gates


def gated_projections(model: PreTrainedModel, artifact: Artifact) -> Gated:
    """A gate on every column of the artifact's bases, where the model's layers are."""
    modules = attention_modules(model)
    gated = {}
    for layer in artifact.geometry.growing:
        device = next(modules[layer].parameters()).device
        key, value = (_moved(artifact.maps(layer, side), device) for side in SIDES)
        gated[layer] = GatedProjection(key, value, window=artifact.window)
    return gated


def _moved(maps: Maps, device: torch.device) -> Maps:
    encode_GDD = maps.encode_GDD.to(device)
    if maps.is_orthogonal:
        return Maps.orthogonal(encode_GDD)
    return Maps(encode_GDD, maps.decode_GDD.to(device))


# ---- budgets, text and tables


def _budgets(space: Space, config: AllocateConfig) -> tuple[float, ...]:
    if config.budgets is None:
        allowed = tuple(budget for budget in EIGHTHS if budget >= space.smallest - TINY)
        return allowed or (space.smallest,)
    for budget in config.budgets:
        space.check_budget(budget)
    return config.budgets


def _texts(
    model: PreTrainedModel, batches: Iterable[Batch], config: AllocateConfig
) -> tuple[Text, list[Text]]:
    """Held-out text, and one text or more to search on."""
    source = iter(batches)
    held_out = take_text(source, config.held_out_tokens, model.device, "verify")
    if config.method == "uniform":
        return held_out, []
    texts = [take_text(source, config.search_tokens, model.device, "search")]
    with suppress(DataError):
        while config.method == "fisher" and len(texts) < config.expansions:
            texts.append(take_text(source, config.search_tokens, model.device, "search"))
    return held_out, texts


def _tables(path: Path, budgets: Iterable[float]) -> dict[float, RankTable]:
    """The table of every budget that the path reaches."""
    counts = {budget: path.count_for(budget) for budget in budgets}
    return {budget: path.table(n) for budget, n in counts.items() if n is not None}


def _limits(config: AllocateConfig) -> Iterator[tuple[str, float]]:
    for error in ("kl", "perplexity_increase"):
        limit = getattr(config, f"max_{error}")
        if limit is not None:
            yield error, limit
