"""A cache of latents in tensors whose shapes and addresses never change.

What `torch.compile` and CUDA graphs ask for: attention reads the whole buffer at every step, and
the mask hides what is not yet written, as with transformers' StaticCache.

Shapes: B batch, G KV head, N heads of one bucket, T token, D head dim, C row columns.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from matkv.cache.cache import attached_projections, decoder_config, storage_nbytes
from matkv.cache.layer import HoldsLatents, tokens_removed
from matkv.errors import CacheError
from matkv.latents.latents import Latents
from matkv.latents.layer import LayerProjection


class StaticLatentLayer(HoldsLatents, StaticLayer):  # type: ignore[misc]
    """A buffer [B N max_cache_len C] per bucket of equal row widths, allocated at the first token.

    Raises:
        CacheError: the projection keeps some tokens exact.
    """

    def __init__(self, projection: LayerProjection, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        if projection.keeps_exact:
            raise CacheError("a static cache keeps no exact tokens: attach with sink=0, recent=0")
        self.projection = projection
        self.buffers: list[Tensor] = []

    def emptied(self, projection: LayerProjection) -> Self:
        return self.__class__(projection, self.max_cache_len)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.buffers = [
            key_states.new_zeros(self.batch_size, heads, self.max_cache_len, columns, dtype=dtype)
            for heads, columns, dtype in self.projection.storages(key_states.dtype)
        ]
        if not torch.compiler.is_compiling():
            for tensor in (*self.buffers, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Write new tokens after the others.  [B G T D, B G T D -> (Latents, the same Latents)]"""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        position_T = torch.arange(tokens, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(tokens)
        for buffer, rows_BNTC in zip(
            self.buffers, self.projection.encode(key_states, value_states), strict=True
        ):
            if torch.promote_types(buffer.dtype, rows_BNTC.dtype) != buffer.dtype:
                raise CacheError(
                    f"a static cache filled in {buffer.dtype} cannot take {rows_BNTC.dtype}: use "
                    "one dtype throughout, or LatentCache(model)"
                )
            buffer.index_copy_(2, position_T, rows_BNTC.to(buffer.dtype))
        latents = Latents(self.projection, self.buffers, is_static=True)
        return latents, latents

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens: later ones are written over them."""
        self.cumulative_length.sub_(tokens_removed(tokens_to_remove)).clamp_(min=0)

    def reset(self) -> None:
        self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for buffer in self.buffers:
            buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))

    def offload(self) -> None:
        raise CacheError("a static cache stays on its device: use LatentCache(model) to offload")

    def prefetch(self) -> None:
        pass

    def _tensors(self) -> list[Tensor]:
        return self.buffers


class StaticLatentCache(Cache):
    """A cache of latents for an attached model with room for `max_cache_len` tokens, for good.

    Layers with a sliding window are transformers' own static ones, at full width.

    Raises:
        CacheError: the model is not attached, or keeps some tokens exact.
    """

    def __init__(self, model: PreTrainedModel, max_cache_len: int) -> None:
        projections = attached_projections(model)
        if not projections:
            raise CacheError("the model has no bases: call matkv.attach(model, artifact, budget)")
        text = decoder_config(model)
        layers: list[Any] = StaticCache(config=text, max_cache_len=max_cache_len).layers
        for index, projection in projections.items():
            layers[index] = StaticLatentLayer(projection, max_cache_len)
        super().__init__(layers=layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens of every layer, or of none.

        Raises:
            CacheError: `tokens_to_remove` is positive, or a layer has a sliding window.
        """
        if not all(isinstance(layer, StaticLatentLayer) for layer in self.layers):
            raise CacheError(
                "a static cache with a sliding window cannot be cropped: use LatentCache(model)"
            )
        super().crop(tokens_to_remove)

    @property
    def nbytes(self) -> int:
        """Bytes of all storages the cache holds, room for later tokens included."""
        return storage_nbytes(self)
