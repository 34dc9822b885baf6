"""The latents of a layer with a sliding window: where the cache grows, of its last tokens alone.

Shapes: B batch, G KV head, F = 2 D, D head dim.
"""

from __future__ import annotations

from matkv.cache.exact import ExactTokens
from matkv.cache.layer import LatentLayer
from matkv.cache.static import StaticLatentLayer
from matkv.errors import CacheError
from matkv.latents.latents import Exact, Latents
from matkv.latents.layer import LayerProjection


class SlidingStaticLatentLayer(StaticLatentLayer):
    """A static layer whose masks, of all its room, hide what is before the window.

    Its latents are not dropped: a ring would save room only where that is of many windows.
    """

    is_sliding = True


class SlidingLatentLayer(LatentLayer):
    """A layer whose queries read the last `window` tokens up to their own, by the mask they get.

    As transformers' own, it holds the last window - 1 tokens, and masks count slots from the first
    of these on. What is in the slots before `gone` is there no more; while the past is recorded all
    stays until the next `crop`. The first tokens of a sequence are exact as long as they are there.
    """

    is_sliding = True

    def __init__(self, projection: LayerProjection, max_cache_len: int | None = None) -> None:
        assert projection.window is not None
        self.window, self.gone = projection.window, 0
        super().__init__(projection, min(max_cache_len or 0, self.window))
        if self.exact is not None:
            self.exact = ExactTokens(projection.sink, min(projection.recent, self.window - 1))

    def get_max_length(self) -> int:
        return self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many slots a mask is of, and the first of them."""
        begin = self._begin(self.length)
        return self.length - begin + query_length, begin

    def _begin(self, length: int) -> int:
        """The first slot that is held of `length`."""
        return max(0, length - self.window + 1)

    def _first_row(self, slot: int) -> int:
        """The slot of the first row where those before `slot` are gone."""
        return slot if self.exact is None else max(self.exact.sink, slot)

    def _seen(self, exact: Exact | None, first: int) -> Latents:
        begin, end = self._begin(first), self.length
        if self.exact is not None:
            end = self.exact.sink + self.exact.far(self.length)
        there = self._first_row(self.gone)
        rows = self.rows.span(self._first_row(begin) - there, end - there)
        if self.exact is not None and exact is not None:
            exact = exact.since(begin, self.exact.slots.settled)
        latents = Latents(self.projection, rows, exact)
        if not self.record_past:
            self._forget()
        return latents

    def _forget(self) -> None:
        """Let go of what is before the window."""
        begin = max(self.gone, self._begin(self.length))
        self.rows.drop(self._first_row(begin) - self._first_row(self.gone))
        self.gone = begin

    def _row_count(self) -> int:
        return super()._row_count() - (self._first_row(self.gone) - self._first_row(0))

    def check_crop(self, removed: int) -> None:
        """Raises:
        CacheError: tokens that would be needed are there no more.
        """
        if self._begin(self.length - min(removed, self.length)) < self.gone:
            raise CacheError(
                f"cannot crop {removed} tokens of a cache with a sliding window of {self.window}: "
                "call activate_past_recording() before the tokens are added"
            )
        super().check_crop(removed)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens, and what is before the window then.

        Raises:
            CacheError: `tokens_to_remove` is positive, or tokens were dropped that are needed.
        """
        self.check_crop(max(0, -int(tokens_to_remove)))
        super().crop(tokens_to_remove)
        self._forget()

    def reset(self) -> None:
        super().reset()
        self.gone = 0

    @property
    def used_nbytes(self) -> int:
        """Bytes of the tokens held, without spare room and without sinks that are gone."""
        if self.exact is None or self.exact.sink_BGSF is None:
            return super().used_nbytes
        B, G, _, F = self.exact.sink_BGSF.shape
        gone = min(self.gone, self.exact.sink)
        return super().used_nbytes - B * G * gone * F * self.exact.sink_BGSF.element_size()
