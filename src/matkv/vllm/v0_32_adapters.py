"""Adapters of an artifact, for vLLM 0.32: added to weights as these are read."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import Tensor, nn
from vllm.config import ModelConfig, get_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader

from matkv.vllm.checkpoint import with_adapters
from matkv.vllm.options import options_in
from matkv.vllm.plugin import OPTIONS


@register_model_loader(OPTIONS)
class AdaptedLoader(DefaultModelLoader):
    """vLLM's own loader of checkpoints, with the adapters of the artifact that is served."""

    def __init__(self, load_config: LoadConfig) -> None:
        plain = copy.copy(load_config)
        plain.load_format = "auto"
        super().__init__(plain)

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Iterator[tuple[str, Tensor]]:
        weights: Iterator[tuple[str, Tensor]] = super().get_all_weights(model_config, model)
        artifact, _ = options_in(get_current_vllm_config().additional_config).open()
        if artifact.lora is None:
            return weights
        return with_adapters(weights, artifact.lora, model_config.dtype)
