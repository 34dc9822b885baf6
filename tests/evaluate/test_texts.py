"""Perplexity and bytes: right against a direct computation, ordered by rank, honest about bytes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import matkv
from matkv.cache.cache import full_states, new_cache, refill, storage_nbytes
from matkv.errors import BudgetError, DataError
from matkv.evaluate.texts import evaluate, perplexity
from matkv.hf.attach import attachment_of
from matkv.ranks import RankTable
from tiny import Tiny, tokens


def test_perplexity_is_the_mean_over_windows(llama: Tiny) -> None:
    windows_NT = tokens(3, 20)
    with torch.no_grad():
        logits = llama.model(windows_NT).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), windows_NT[:, 1:].flatten())
    value, stderr, count = perplexity(llama.model, windows_NT)
    assert value == pytest.approx(math.exp(float(loss)), rel=1e-5)
    assert count == 3 * 19
    assert stderr > 0


def test_perplexity_in_blocks_is_the_same(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    windows_NT = tokens(2, 33)
    whole = perplexity(llama.model, windows_NT)
    monkeypatch.setattr("matkv.logits.CACHED_ELEMENTS", 96 * 5)
    assert perplexity(llama.model, windows_NT) == pytest.approx(whole, rel=1e-6)


def test_rows_hold_bytes_and_leave_the_model_detached(llama: Tiny) -> None:
    seen: list[tuple[str, int, int | None]] = []
    rows = evaluate(
        llama.model,
        llama.artifact,
        tokens(2, 24),
        [1.0, 0.5],
        on_progress=lambda at: seen.append((at.note, at.done, at.total)),
    )
    full = RankTable.full(llama.geometry).bytes_per_token(torch.float32)
    assert [row.budget for row in rows] == [None, 1.0, 0.5]
    assert [row.bytes_per_token for row in rows] == [full, full, full // 2]
    assert rows[1].perplexity == pytest.approx(rows[0].perplexity, rel=1e-5)
    assert rows[2].perplexity != pytest.approx(rows[0].perplexity, rel=1e-5)
    assert attachment_of(llama.model) is None
    names = [name for name in ("full cache", "100.0%", "50.0%") for _ in range(2)]
    assert seen == [(name, 24 * (done + 1), 6 * 24) for done, name in enumerate(names)]


def test_tokens_kept_exact_count_as_held(llama: Tiny) -> None:
    row = evaluate(llama.model, llama.artifact, tokens(2, 24), [0.5], sink=2, recent=4)[1]
    assert row.kept == 0.5
    assert row.held == pytest.approx((6 * 1.0 + 18 * 0.5) / 24)
    over = evaluate(llama.model, llama.artifact, tokens(2, 24), [0.5], recent=99)[1]
    assert over.held == 1.0


def test_uniform_ignores_stored_tables(llama: Tiny) -> None:
    from dataclasses import replace

    skewed = RankTable.uniform_sides(llama.geometry, 0.25, 0.75)
    artifact = replace(llama.artifact, tables={0.5: skewed})
    windows_NT = tokens(2, 24)
    stored, uniform = (
        evaluate(llama.model, artifact, windows_NT, [0.5], uniform=flag, full_cache=False)[0]
        for flag in (False, True)
    )
    assert stored.bytes_per_token == uniform.bytes_per_token
    assert stored.perplexity != uniform.perplexity


def test_scores_equal_decoding_through_the_cache(llama: Tiny) -> None:
    """What `perplexity` scores without a cache is what generation meets with one."""
    llama.attach(ranks=llama.ragged(3))
    window_T = tokens(1, 24)
    scored, _, _ = perplexity(llama.model, window_T)
    cache, losses = matkv.LatentCache(llama.model), []
    with torch.no_grad():
        for position in range(23):
            logits = llama.model(window_T[:, position : position + 1], past_key_values=cache).logits
            losses.append(F.cross_entropy(logits[:, -1], window_T[:, position + 1]))
    assert scored == pytest.approx(math.exp(float(torch.stack(losses).mean())), rel=1e-5)


def test_refilled_cache_equals_a_read_one(family: Tiny) -> None:
    # What the window of a compressed layer has passed cannot fill it.
    count = min((shape.held(21) for shape in family.geometry.layers if shape.ring), default=21)
    tokens_T = tokens(1, count)[0]
    states = full_states(family.model, tokens_T)
    family.attach(ranks=family.ragged(1))
    read = new_cache(family.model)
    table = family.ragged(1)
    refilled = refill(family.model, states)
    assert refilled.used_nbytes == table.nbytes(count, torch.float32)  # type: ignore[attr-defined]
    with torch.no_grad():
        family.model(tokens_T[None], past_key_values=read)
    assert storage_nbytes(refilled) >= refilled.used_nbytes  # type: ignore[attr-defined]
    if all(shape.is_compressed for shape in family.geometry.layers):
        assert storage_nbytes(read) == storage_nbytes(refilled)


@pytest.mark.parametrize("budget", [0, 1.5, -1, math.nan])
def test_bad_budgets_are_refused_before_any_work(llama: Tiny, budget: float) -> None:
    with pytest.raises(BudgetError, match=r"must be in \(0, 1\]"):
        evaluate(llama.model, llama.artifact, tokens(1, 8), [budget])


def test_too_short_windows_are_refused(llama: Tiny) -> None:
    with pytest.raises(DataError, match="at least 2"):
        perplexity(llama.model, tokens(1, 1))
