"""Allocate: the right rank for every layer, KV head and side, for a whole curve of budgets at once.

Every method makes one path of drops from full rank downwards (descent.py); the table of a budget
is the first on the path that holds it, so that tables are nested.

fisher    expand the KL around the ranks of the moment (see fisher.py), take the cheapest
          drops, and expand again there: a few backward passes in all; then draw the tables towards
          equal ranks as far as that measures better (see blend.py)
greedy    Algorithm 1 of the paper (arXiv 2410.14731): measure the KL of every single drop, take
          the cheapest, and again
uniform   the same rank everywhere, to compare with
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from matkv.allocate.bits import check_within
from matkv.allocate.coded import CURVE, allocate_codes, smallest_with_codes
from matkv.allocate.config import AllocateConfig
from matkv.allocate.descent import Descent
from matkv.allocate.divergence import Text, logits_nbytes, take_text
from matkv.allocate.rounds import Rounds
from matkv.allocate.space import TINY, Space
from matkv.allocate.verify import Verifier, own_budget
from matkv.artifact.artifact import Artifact
from matkv.artifact.history import Allocated, Check
from matkv.data.batch import Tokens
from matkv.errors import DataError
from matkv.hf.geometry import geometry_of
from matkv.hf.memory import check_fits
from matkv.hf.weights import fingerprint
from matkv.progress import OnProgress
from matkv.ranks import RankTable

EIGHTHS = tuple(eighth / 8 for eighth in range(7, 0, -1))


def allocate(
    model: PreTrainedModel,
    artifact: Artifact,
    batches: Iterable[Tokens],
    config: AllocateConfig | None = None,
    *,
    state: str | Path | None = None,
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
        MatkvError: a size is more than the device's memory holds.
        RankError: the constraints do not fit the model.
        FingerprintError: the artifact was made for another model.
    """
    config = _never_below_training(config or AllocateConfig(), artifact)
    artifact.check(geometry_of(model.config), fingerprint(model))
    space = None if config.has_codes else Space.of(artifact.geometry, config.constraints)
    budgets = _coded_budgets(artifact, config) if space is None else _budgets(space, config)
    held_out, texts = _texts(model, batches, config)
    if space is not None:
        _check_search(model, config, space, texts)
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        if space is None:
            artifact, tables, checks = allocate_codes(
                model, artifact, held_out, texts, config, budgets, on_progress
            )
            entry = Allocated(settings=asdict(config), checks=checks)
        else:
            rounds = Rounds(model, artifact, texts, config)
            tables, entry = _search(rounds, space, budgets, held_out, state, on_progress)
    finally:
        model.train(was_training)
    seconds = round(time.perf_counter() - started, 1)
    return replace(artifact, tables=tables).with_history(replace(entry, seconds=seconds))


def _search(
    rounds: Rounds,
    space: Space,
    budgets: Sequence[float],
    held_out: Text,
    state: str | Path | None,
    on_progress: OnProgress | None,
) -> tuple[dict[float, RankTable], Allocated]:
    """Tables of ranks alone by budget, and what is said of their search but its time."""
    config = rounds.config
    path, interrupted = rounds.run(Descent(space), min(budgets), state, on_progress)
    shares: dict[float, float] = {}
    if config.method == "fisher" and config.blend and not interrupted:
        path, shares = rounds.blend(path, budgets)
    tables = _tables(path, budgets)
    checks: tuple[Check, ...] = ()
    if interrupted and path.drops:
        tables[own_budget(path.table())] = path.table()
    elif not interrupted:
        checks = _verified(rounds.verifier(held_out), path, tables, config)
    entry = Allocated(
        settings=asdict(config), interrupted=interrupted, shares=shares, checks=checks
    )
    return tables, entry


def _check_search(
    model: PreTrainedModel, config: AllocateConfig, space: Space, texts: Sequence[Text]
) -> None:
    """Make sure that the gradients of all gates fit in memory, or tables that run together."""
    for text in texts:
        if config.method == "fisher":
            grads = text.sequences * (config.samples + 1) * space.geometry.columns
            check_fits(grads * torch.float32.itemsize, model.device, f"samples {config.samples}")
        else:
            tokens = max(piece.batch.ids_BT.numel() for piece in text.pieces)
            nbytes = min(config.batched, len(space.units)) * tokens * logits_nbytes(model)
            check_fits(nbytes, model.device, f"batched {config.batched}")


def _never_below_training(config: AllocateConfig, artifact: Artifact) -> AllocateConfig:
    """The same settings, but no rank is smaller than those that the last training drew."""
    constraints = config.constraints.above(artifact.smallest_trained_rank)
    return replace(config, constraints=constraints)


def _coded_budgets(artifact: Artifact, config: AllocateConfig) -> tuple[float, ...]:
    smallest = smallest_with_codes(artifact.geometry, config)
    budgets = config.budgets or tuple(one for one in CURVE if one >= smallest)
    for budget in budgets:
        check_within(smallest, budget)
    return budgets or (smallest,)


def _budgets(space: Space, config: AllocateConfig) -> tuple[float, ...]:
    if config.budgets is None:
        allowed = tuple(budget for budget in EIGHTHS if budget >= space.smallest - TINY)
        return allowed or (space.smallest,)
    for budget in config.budgets:
        space.check_budget(budget)
    return config.budgets


def _texts(
    model: PreTrainedModel, batches: Iterable[Tokens], config: AllocateConfig
) -> tuple[Text, list[Text]]:
    """Held-out text, and one text or more to search on."""
    source = iter(batches)
    held_out = take_text(source, config.held_out_tokens, model, "verify")
    if config.method == "uniform":
        return held_out, []
    texts = [take_text(source, config.search_tokens, model, "search")]
    with suppress(DataError):
        while config.method == "fisher" and len(texts) < config.expansions:
            texts.append(take_text(source, config.search_tokens, model, "search"))
    return held_out, texts


def _tables(path: Descent, budgets: Iterable[float]) -> dict[float, RankTable]:
    """The table of every budget that the path reaches."""
    counts = {budget: path.count_for(budget) for budget in budgets}
    return {budget: path.table(n) for budget, n in counts.items() if n is not None}


def _verified(
    verifier: Verifier, path: Descent, tables: dict[float, RankTable], config: AllocateConfig
) -> tuple[Check, ...]:
    """What is measured of `tables`, after the smallest ones within limits of error joined them."""
    for error in ("kl", "perplexity_increase"):
        limit = getattr(config, f"max_{error}")
        if limit is not None:
            table = verifier.smallest(path, error, limit)
            tables[own_budget(table)] = table
    return tuple(verifier.entry(path.space, *named) for named in sorted(tables.items()))
