"""Buffers of rows that grow as tokens come."""

from __future__ import annotations

from torch import Tensor

# Buffers grow by a quarter and in steps of this many tokens: appending one token copies nothing,
# a token is copied four times in its life, and spare room stays under a quarter.
GRAIN = 64


def reusable(old: Tensor | None, new_BNTC: Tensor) -> Tensor:
    """The old buffer if new rows fit it but for their number, else an empty one."""
    if (
        old is not None
        and (old.shape[0], old.shape[1], old.shape[3])
        == (new_BNTC.shape[0], new_BNTC.shape[1], new_BNTC.shape[3])
        and (old.dtype, old.device) == (new_BNTC.dtype, new_BNTC.device)
        and not old.requires_grad
    ):
        return old
    return new_BNTC[:, :, :0]


def pair_up(buffers: list[Tensor], rows: list[Tensor]) -> list[tuple[Tensor | None, Tensor]]:
    """Every bucket's buffer with its new rows; no buffer before the first token."""
    if not buffers:
        return [(None, new) for new in rows]
    return list(zip(buffers, rows, strict=True))
