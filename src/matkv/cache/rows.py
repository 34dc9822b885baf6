"""The latents of one layer's tokens, in buffers that grow as tokens come.

Shapes: B batch, N heads of one bucket, T token, C row columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Buffers grow by a quarter and in steps of this many tokens: appending one token copies nothing,
# a token is copied four times in its life, and spare room stays under a quarter.
GRAIN = 64


class Rows:
    """A buffer [B N capacity C] per bucket of equal row widths; `count` tokens are in them.

    They are those from `start` on. Room for `reserve` tokens is made at the first one. Tokens
    forgotten at the end leave their room for later ones; of those dropped at the front it is given
    back from time to time.
    """

    def __init__(self, reserve: int = 0) -> None:
        self.reserve = reserve
        self.buffers: list[Tensor] = []
        self.start = self.count = 0

    def append(self, rows: list[Tensor]) -> None:
        """Add new tokens, a tensor [B N T C] per bucket."""
        if self.count == 0:
            self.start = 0
            old: list[Tensor | None] = [*self.buffers] or [None] * len(rows)
            self.buffers = [_reusable(o, new) for o, new in zip(old, rows, strict=True)]
        elif self.start and not all(
            self._has_room(*pair) for pair in zip(self.buffers, rows, strict=True)
        ):
            self._compact()
        pairs = zip(self.buffers, rows, strict=True)
        self.buffers = [self._appended(buffer, new) for buffer, new in pairs]
        self.count += rows[0].shape[2]

    def first(self, count: int) -> list[Tensor]:
        """The first `count` tokens, a view [B N count C] per bucket."""
        return self.span(0, count)

    def span(self, first: int, last: int) -> list[Tensor]:
        """The tokens from `first` to before `last`, a view [B N T C] per bucket."""
        first, last = self.start + first, self.start + max(first, last)
        return [buffer[:, :, first:last] for buffer in self.buffers]

    def drop(self, count: int) -> None:
        """Forget the first `count` tokens; views of them stay as they are."""
        self.start, self.count = self.start + count, self.count - count
        if self.start > self.count // 4 + GRAIN:
            self._compact()

    def crop(self, count: int) -> None:
        """Keep the first `count` tokens."""
        self.count = count

    def select(self, index_B: Tensor) -> None:
        """Keep these sequences, in this order."""
        buffers = []
        for buffer in self.buffers:
            used = buffer[:, :, self.start : self.start + self.count].index_select(0, index_B)
            moved = used.new_empty(used.shape[0], used.shape[1], *buffer.shape[2:])
            moved[:, :, : self.count] = used
            buffers.append(moved)
        self.buffers, self.start = buffers, 0

    def move(self, device: torch.device | str) -> None:
        self.buffers = [buffer.to(device, non_blocking=True) for buffer in self.buffers]

    @property
    def used_nbytes(self) -> int:
        """Bytes of the tokens held, without spare room."""
        return sum(rows.numel() * rows.element_size() for rows in self.first(self.count))

    def _compact(self) -> None:
        """Move the tokens to the start of smaller buffers."""
        room = -(-max(self.count + self.count // 8, self.reserve) // GRAIN) * GRAIN
        compact = []
        for buffer, used in zip(self.buffers, self.first(self.count), strict=True):
            if not buffer.requires_grad:
                moved = used.new_empty(*used.shape[:2], room, used.shape[3])
                moved[:, :, : self.count] = used
                used = moved
            compact.append(used)
        self.buffers, self.start = compact, 0

    def _has_room(self, buffer: Tensor, new_BNTC: Tensor) -> bool:
        """Whether new tokens can be written behind the others."""
        end = self.start + self.count + new_BNTC.shape[2]
        # As torch.cat would: a step under autocast must not round what came before it, nor after.
        dtype = torch.promote_types(buffer.dtype, new_BNTC.dtype)
        is_frozen = buffer.is_inference() and not torch.is_inference_mode_enabled()
        is_free = not (buffer.requires_grad or new_BNTC.requires_grad or is_frozen)
        return is_free and end <= buffer.shape[2] and dtype == buffer.dtype

    def _appended(self, buffer: Tensor, new_BNTC: Tensor) -> Tensor:
        if new_BNTC.requires_grad or buffer.requires_grad:
            # Writing in place would break the graph of earlier tokens.
            return torch.cat((buffer[:, :, : self.count], new_BNTC), dim=2)
        B, N, tokens, C = new_BNTC.shape
        capacity, end = buffer.shape[2], self.start + self.count + tokens
        if tokens and not self._has_room(buffer, new_BNTC):
            dtype = torch.promote_types(buffer.dtype, new_BNTC.dtype)
            wanted = max(end, capacity + capacity // 4, self.reserve)
            grown = new_BNTC.new_empty(B, N, -(-wanted // GRAIN) * GRAIN, C, dtype=dtype)
            grown[:, :, : self.count] = buffer[:, :, : self.count]
            buffer = grown
        buffer[:, :, end - tokens : end] = new_BNTC
        return buffer


def _reusable(old: Tensor | None, new_BNTC: Tensor) -> Tensor:
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
