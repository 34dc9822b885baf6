"""Pages of exact tokens, for vLLM 0.32: which of them are kept, of every request.

vLLM frees pages before a sliding window, but gives one to every token of a prompt first, at full
width. Here only those get pages that are read later: a request's first tokens, its last ones, and
those before every `CHECKPOINT` tokens, from where another request may go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from matkv.vllm.windows import Windows


@dataclass(frozen=True, kw_only=True)
class ExactSpec(SlidingWindowSpec):
    """Pages of the first `sink` and the last `sliding_window` - 1 tokens, and of checkpoints."""

    sink: int = 0
    grain: int = 1

    @property
    def windows(self) -> Windows:
        return Windows(self.block_size, self.sink, self.sliding_window - 1, self.grain)

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        return self.windows.most(min(max_in_flight_tokens, max_model_len), max_model_len)


class ExactManager(SlidingWindowManager):
    """Gives pages to the tokens that are read later, and takes them back."""

    def __init__(self, kv_cache_spec: ExactSpec, **options: Any) -> None:
        super().__init__(kv_cache_spec, **options)
        self.windows = kv_cache_spec.windows
        self.dropped: dict[str, int] = {}

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        held = len(self.req_to_blocks.get(request_id, ()))
        first = max(held, len(new_computed_blocks))
        count = sum(self.windows.needs(one, num_tokens) for one in self._new(first, num_tokens))
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            count = min(count, self.max_admission_blocks_per_request)
        if request_id not in self.num_cached_block:
            count += self._get_num_evictable_blocks(new_computed_blocks)
        return int(count)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[request_id]
        needs = [self.windows.needs(one, num_tokens) for one in self._new(len(blocks), num_tokens)]
        fresh = iter(self.block_pool.get_new_blocks(sum(needs)))
        new = [next(fresh) if need else self._null_block for need in needs]
        blocks.extend(new)
        return new

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        assert not num_external_computed_tokens  # connectors are refused
        if self.enable_caching:
            self.block_pool.touch([one for one in new_computed_blocks if not one.is_null])
        self.req_to_blocks[request_id].extend(new_computed_blocks)
        self.num_cached_block[request_id] = len(new_computed_blocks)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        first = self.dropped.get(request_id, self.windows.sinks)
        last = min(len(blocks), self.windows.before(processed_computed_tokens))
        freed = [index for index in range(first, last) if not blocks[index].is_null]
        self.block_pool.free_blocks([blocks[index] for index in reversed(freed)])
        for index in freed:
            blocks[index] = self._null_block
        self.dropped[request_id] = max(first, last)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.dropped.pop(request_id, None)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks

    @classmethod
    def reachable_block_mask(cls, *arguments: Any, **options: Any) -> None:
        """Every block that is there serves a request that goes on from where it lies."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        windows, size = kv_cache_spec.windows, kv_cache_spec.block_size
        hashes = resolve_block_hashes(
            block_hashes, block_pool.hash_block_size, size, alignment_tokens=alignment_tokens
        )
        for length in range(
            max_length // alignment_tokens * alignment_tokens, 0, -alignment_tokens
        ):
            found: dict[int, Any] = {}
            for index in windows.read_after(length):
                held = block_pool.get_cached_block(hashes[index], kv_cache_group_ids)
                if not held:
                    break
                found[index] = held
            else:
                blocks = tuple(
                    [
                        found[index][place] if index in found else block_pool.null_block
                        for index in range(length // size)
                    ]
                    for place in range(len(kv_cache_group_ids))
                )
                return blocks, length
        return tuple([] for _ in kv_cache_group_ids), 0

    def _new(self, first: int, tokens: int) -> range:
        return range(first, -(-tokens // self.block_size))


class ExactLayer(nn.Module, AttentionLayerBase):
    """What vLLM sees of exact tokens: one more layer, without attention, of all layers' rows."""

    def __init__(
        self,
        backend: type[AttentionBackend],
        exact: tuple[int, int],
        token_bytes: int,
        latent_bytes: int,
    ) -> None:
        super().__init__()
        self.backend, self.exact = backend, exact
        self.token_bytes, self.latent_bytes = token_bytes, latent_bytes
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self.backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> ExactSpec:
        tokens = vllm_config.cache_config.block_size
        size = tokens & -tokens  # the largest power of two in it
        while size > 1 and size * self.token_bytes > tokens * self.latent_bytes:
            size //= 2
        sink, recent = self.exact
        return ExactSpec(
            block_size=size,
            num_kv_heads=1,
            head_size=1,
            dtype=torch.uint8,
            num_head_slots=1,
            state_content_bytes=self.token_bytes,
            sliding_window=recent + 1,
            sink=sink,
            grain=tokens,
        )

    NAME: ClassVar[str] = "matkv.exact"


def register() -> None:
    """Tell vLLM which pages there are; may be called any number of times."""
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # its own ones first
    KVCacheSpecRegistry.register(ExactSpec, ExactManager, uniform_type_base_spec=ExactSpec)


register()
