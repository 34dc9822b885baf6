"""The attention backend, for vLLM 0.32: nothing else here knows vLLM's classes.

Shapes: T token of a step, G KV head of this process, H query head of it, D head dim.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from matkv.artifact.artifact import Artifact
from matkv.latents.layer import LayerProjection
from matkv.ranks import Geometry, LayerShape, RankTable
from matkv.vllm.attention import Near, Step, attend_step
from matkv.vllm.checkpoint import fingerprint
from matkv.vllm.exact import ExactRows
from matkv.vllm.options import Options, options_in
from matkv.vllm.pages import Layout, Pages
from matkv.vllm.plugin import NAME
from matkv.vllm.refusals import check_adapters, check_layer, check_server
from matkv.vllm.shards import Shard, projection_of, widest_row
from matkv.vllm.v0_32_exact import ExactLayer


class Backend(AttentionBackend):
    """What vLLM asks about attention on latents."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", "float32"]

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[LatentAttention]:
        return LatentAttention

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A page of a layer in one piece; they differ in size from layer to layer.
        return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Makes a step's `Step`, one for all layers, though their pages differ."""

    _cudagraph_support = AttentionCGSupport.NEVER
    latest: ClassVar[tuple[weakref.ref[CommonAttentionMetadata], Step] | None] = None

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Step:
        common = common_attn_metadata
        if StepBuilder.latest is not None and StepBuilder.latest[0]() is common:
            return StepBuilder.latest[1]
        lengths = common.seq_lens_cpu_upper_bound
        step = Step.of(
            common.block_table_tensor.int(),
            common.slot_mapping[: common.num_actual_tokens].long(),
            common.seq_lens.int(),
            common.query_start_loc_cpu.tolist(),
            (common.seq_lens if lengths is None else lengths).tolist(),
        )
        StepBuilder.latest = weakref.ref(common), step
        return step


class LatentAttention(AttentionImpl[Step]):
    """Attention of one layer, on the latents of its tokens in vLLM's pages."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Any = None,
        **other: Any,
    ) -> None:
        check_layer(
            alibi=alibi_slopes,
            window=sliding_window,
            cap=logits_soft_cap,
            kind=str(getattr(attn_type, "value", attn_type)),
            shared=kv_sharing_target_layer_name,
            sinks=sinks,
            other=tuple(name for name, value in other.items() if value is not None),
        )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.config = get_current_vllm_config()
        options = options_in(self.config.additional_config)
        self.artifact, self.table = _opened(options, *_model(self.config, head_size))
        self.exact = options.setting.exact(self.artifact)
        check_server(self.config, has_exact=any(self.exact), untried=options.untried)
        self.projection: LayerProjection | None = None
        self.pages: Pages | None = None
        self.rows: ExactRows | None = None
        self.bound: tuple[int, torch.Size] | None = None

    @torch.inference_mode(False)
    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Make the layer's projection, and say how wide its pages are."""
        layers = self.config.compilation_config.static_forward_context
        layer = next(one for one in layers.values() if getattr(one, "impl", None) is self)
        index = extract_layer_index(layer.layer_name)
        shard = Shard(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        projection = projection_of(self.artifact, self.table, index, shard)
        device = self.config.device_config.device
        self.projection = projection.to(device, act_dtype).requires_grad_(False)
        self.layout = Layout.of(projection, act_dtype)
        width = widest_row(self.table, index, shard.processes, act_dtype)
        packing: dict[str, Any] = {"customize_spec": _Packed(width)}
        self.index = index
        if any(self.exact):
            packing["supported_kv_cache_layouts"] = staticmethod(_block_outermost)
            name = f"{ExactLayer.NAME}.{len(self.table.geometry.layers)}"
            if name not in layers:
                layers[name] = _exact_layer(self.table, self.exact, shard, act_dtype)
            self.exact_name, self.exact_layer = name, layers[name]
        layer.attn_backend = type("Backend", (Backend,), packing)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """[T H D] and twice [T G D], of which the last may be padding, into `output`."""
        if attn_metadata is None:  # vLLM measures what a step takes, without a cache
            return output.zero_()
        assert self.projection is not None and output_scale is None and output_block_scale is None
        tokens, pages = attn_metadata.tokens, self._bound(kv_cache)
        near = None
        if self.rows is not None:
            steps: Any = get_forward_context().attn_metadata
            near = Near(self.rows, steps[self.exact_name])
        attend_step(
            pages,
            self.projection,
            attn_metadata,
            query[:tokens],
            key[:tokens],
            value[:tokens],
            output[:tokens],
            scaling=self.scale,
            near=near,
        )
        return output

    def _bound(self, cache: Tensor) -> Pages:
        """The pages in the cache, which vLLM allocates once, after a try or two."""
        place = cache.data_ptr(), cache.shape
        if self.pages is None or self.bound != place:
            self.pages, self.bound = self.layout.bind(cache), place
            if any(self.exact):
                heads, dim, dtype = self.num_kv_heads, self.head_size, self.layout.dtype
                first = self.index * heads * 2 * dim * dtype.itemsize
                cache = self.exact_layer.kv_cache
                self.rows = ExactRows.bind(cache, first, heads, dim, dtype, self.exact)
        return self.pages


def _block_outermost() -> tuple[KVCacheLayout, ...]:
    """Where pages of latents and of exact tokens take turns in one memory."""
    return (KVCacheLayout.BLHNC,)


def _exact_layer(
    table: RankTable, exact: tuple[int, int], shard: Shard, dtype: torch.dtype
) -> ExactLayer:
    """The layer of all layers' exact tokens, of one process."""
    layers = range(len(table.geometry.layers))
    full = RankTable.full(table.geometry)
    backend = type("ExactBackend", (Backend,), {
        "get_supported_kernel_block_sizes": staticmethod(lambda spec=None: [MultipleOf(1)]),
        "supported_kv_cache_layouts": staticmethod(_block_outermost),
    })  # fmt: skip
    token, latent = (
        sum(widest_row(one, layer, shard.processes, dtype) for layer in layers)
        for one in (full, table)
    )
    return ExactLayer(backend, exact, token, latent)


class _Packed:
    """A layer's `customize_spec`: pages of bytes, so many for a token."""

    def __init__(self, token_bytes: int) -> None:
        self.token_bytes = token_bytes

    def __call__(self, spec: AttentionSpec) -> AttentionSpec:
        return replace(
            spec, dtype=torch.uint8, num_head_slots=1, state_content_bytes=self.token_bytes
        )


def _model(config: VllmConfig, head_size: int) -> tuple[Geometry, str, str | None, str | None]:
    """What the model is: its shape, and where its checkpoint is."""
    model, text = config.model_config, config.model_config.hf_text_config
    shape = LayerShape(kv_heads=model.get_total_num_kv_heads(), head_dim=head_size)
    geometry = Geometry(
        query_heads=text.num_attention_heads, layers=(shape,) * model.get_total_num_hidden_layers()
    )
    return geometry, model.model, model.revision, config.load_config.download_dir


@lru_cache(maxsize=1)
def _opened(
    options: Options, geometry: Geometry, model: str, revision: str | None, cache: str | None
) -> tuple[Artifact, RankTable]:
    """The artifact and its ranks, checked against the model."""
    artifact, table = options.open()
    load_format = get_current_vllm_config().load_config.load_format
    check_adapters(artifact.lora, str(load_format), options.artifact)
    config = get_current_vllm_config().model_config.hf_config
    artifact.check(geometry, fingerprint(model, config, revision=revision, cache=cache))
    return artifact, table
