"""What a cache hands to attention: rows of latents, and the tokens that are exact.

Shapes: B batch, N heads of one bucket, G KV head, Q query, T token, S sink token, K recent token,
C row columns, or exact tokens, F = 2 D, [key | value]."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

from torch import Tensor

from matkv.errors import CacheError
from matkv.latents.layer import LayerProjection


@dataclass
class Latents:
    """What the cache hands to the attention function in place of full keys and values.

    `rows` holds a tensor [B N T C] per bucket of `projection`. When tokens are kept exact they are
    in `exact`, and the rows are those of the tokens between, as far as the last query reads them.
    With `fixed` shapes the rows have room for later tokens. A mask may cover room for later tokens
    where the cache has it, `has_room`.
    """

    projection: LayerProjection
    rows: list[Tensor]
    exact: Exact | None = None
    fixed: Fixed | None = None
    has_room: bool = False

    @property
    def tokens(self) -> int:
        exact = self.fixed or self.exact
        return self.rows[0].shape[2] if exact is None else exact.tokens

    def __getattr__(self, name: str) -> NoReturn:
        """Another attention function, of a model no longer attached, takes this for a tensor."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"'Latents' object has no attribute {name!r}")
        raise CacheError("the cache holds latents, but the model is not attached: use a new cache")


@dataclass(frozen=True)
class Exact:
    """Tokens at full width, a row [key | value] each, heads in the model's order.

    `recent_BGKF` are those in the last K of all `tokens` slots, of this step and what was recent
    before it; of them a query reads the last `reach` up to its own: 1 + recent, or 0. `sink_BGSF`
    are the first tokens, which `recent_BGKF` may hold as well.

    In a padded batch the sinks are in the slots `sink_BS`, and what is before the last of them is
    no token but a sink. Where padding also lies among tokens, `count_BT` counts the tokens up to
    each slot, and a query's last `reach` tokens are among its last `reach + gaps` slots.

    The rows are those from the slot `begin` on. A sink in a slot below zero has left a sliding
    window, and is not read.
    """

    recent_BGKF: Tensor
    sink_BGSF: Tensor
    tokens: int
    reach: int
    sink_BS: Tensor | None = None
    count_BT: Tensor | None = None
    gaps: int = 0
    rows_from: int | None = None

    @property
    def begin(self) -> int:
        """Slot of the first row: after as many as there are sinks, unless told."""
        return self.sink if self.rows_from is None else self.rows_from

    def since(self, slot: int, settled: int) -> Exact | None:
        """What is in the slots from `slot` on, the first of a sliding window; None for nothing.

        From the slot `settled` on there is no sink.
        """
        if slot == 0:
            return self
        tokens, sink = self.tokens - slot, self.sink
        is_padded = self.sink_BS is not None and slot < settled
        gone = 0 if is_padded else min(slot, sink)
        if gone == sink and not self.reach:
            return None
        sink_BS = self.sink_BS - slot if self.sink_BS is not None and is_padded else None
        return replace(
            self,
            recent_BGKF=self.recent_BGKF[:, :, max(0, self.recent_BGKF.shape[2] - tokens) :],
            sink_BGSF=self.sink_BGSF[:, :, gone:],
            tokens=tokens,
            sink_BS=sink_BS,
            count_BT=None if self.count_BT is None else self.count_BT[:, slot:],
            rows_from=max(0, sink - slot),
        )

    @property
    def sink(self) -> int:
        return self.sink_BGSF.shape[2]

    @property
    def first(self) -> int:
        """Slot of the first recent token."""
        return self.tokens - self.recent_BGKF.shape[2]

    @property
    def is_padded(self) -> bool:
        return self.sink_BS is not None or self.count_BT is not None


@dataclass(frozen=True)
class Fixed:
    """The same in tensors whose shapes say nothing of how many tokens there are.

    `columns_BGCF` are the sinks, in the slots `sink_BS` of `tokens`, and other tokens at full
    width, in the slots `place_C`, below zero where there is none. Of these a query, in one of the
    slots `query_Q`, reads the last `reach` up to its own, and of the rows, from slot `sink` on, the
    earlier ones. Without exact tokens there are no columns, and `reach` is 0.
    """

    columns_BGCF: Tensor
    sink_BS: Tensor
    place_C: Tensor
    query_Q: Tensor
    tokens: int
    reach: int
    sink: int
