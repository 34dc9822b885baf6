"""Recent tokens exact, others truncated: blocks of queries against all scores at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from matkv.attention import truncated as window_module
from matkv.attention.truncated import States, attend_near_exact

B, H, G, T, D = 2, 6, 2, 23, 8


def states(seed: int) -> States:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, B, G, T, D, generator=generator)
    return States(key.requires_grad_(), value.requires_grad_())


def queries(count: int) -> Tensor:
    return torch.randn(B, H, count, D, generator=torch.Generator().manual_seed(9))


def oracle(query: Tensor, exact: States, old: States, sees: Tensor, recent: int) -> Tensor:
    """Every score formed; `sees` is boolean [B|1, 1, Q, T]."""
    Q = query.shape[2]
    position_Q1 = torch.arange(T - Q, T)[:, None]
    near_QT = position_Q1 - torch.arange(T) <= recent
    wide = [x.repeat_interleave(H // G, 1) for x in vars(exact).values()]
    wide_old = [x.repeat_interleave(H // G, 1) for x in vars(old).values()]
    scores = torch.where(near_QT, query @ wide[0].mT, query @ wide_old[0].mT) * 0.3
    weights = scores.masked_fill(~sees, -1e9).softmax(-1)
    out: Tensor = (weights * near_QT) @ wide[1] + (weights * ~near_QT) @ wide_old[1]
    return out


def causal(count: int) -> Tensor:
    return torch.ones(count, T, dtype=torch.bool).tril(T - count)[None, None]


def padded(count: int) -> Tensor:
    sees = causal(count).repeat(B, 1, 1, 1)
    sees[0, ..., :5] = False  # left padding
    return sees | torch.eye(T, dtype=torch.bool)[T - count :]  # no row is empty


def looking_ahead(count: int) -> Tensor:
    """Some tokens see up to eleven later ones."""
    sees = causal(count)
    sees[..., 4 - count :, 12:] = True
    sees[..., :-6, :12] = True
    return sees


@pytest.mark.parametrize("block", [1, 7, 8, 64])
@pytest.mark.parametrize("recent", [1, 5, 40])
@pytest.mark.parametrize("count", [T, 9, 1])
@pytest.mark.parametrize("kind", ["causal", "boolean", "additive", "ahead"])
def test_blocks_equal_all_scores_at_once(
    monkeypatch: pytest.MonkeyPatch, block: int, recent: int, count: int, kind: str
) -> None:
    monkeypatch.setattr(window_module, "BLOCK", block)
    sees = {"causal": causal, "ahead": looking_ahead}.get(kind, padded)(count)
    additive = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    mask = {"causal": None, "additive": additive}.get(kind, sees)
    found: list[Tensor | None] = []
    expected: list[Tensor | None] = []
    for attend, results in ((attend_near_exact, found), (oracle, expected)):
        query, exact, old = queries(count).requires_grad_(), states(1), states(2)
        if attend is oracle:
            out = oracle(query, exact, old, sees, recent)
        else:
            out = attend_near_exact(query, exact, old, mask, recent=recent, scaling=0.3)
        out.square().sum().backward()
        results += [out, query.grad, *(x.grad for s in (exact, old) for x in vars(s).values())]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_row_that_sees_nothing_stays_finite() -> None:
    mask = torch.zeros(B, 1, T, T, dtype=torch.bool)
    out = attend_near_exact(queries(T), states(1), states(2), mask, recent=3, scaling=None)
    assert bool(out.isfinite().all())
