"""The one model inside whatever a caller hands over: an adapter's, a compiler's or a composite's.

What matkv keeps of a model is kept on its decoder, so that it is found from every one of them.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from matkv.errors import UnsupportedModelError


def model_in(wrapper: nn.Module) -> PreTrainedModel:
    """The outermost transformers model of `wrapper`: of peft, torch.compile, DDP, or itself.

    Raises:
        UnsupportedModelError: there is none.
    """
    parts = wrapper.modules() if isinstance(wrapper, nn.Module) else ()
    for part in parts:
        if isinstance(part, PreTrainedModel):
            return part
    raise UnsupportedModelError(
        f"a {type(wrapper).__name__} is no model of transformers: load one, with "
        "matkv.load_model(name) for instance"
    )


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """The decoder inside a model or a wrapper, at which forward passes are prepared.

    Raises:
        UnsupportedModelError: there is none.
    """
    outer = model_in(model)
    decoder = outer.get_decoder()
    if not isinstance(decoder, PreTrainedModel):
        raise UnsupportedModelError(f"{outer.config.model_type} has no decoder of its own")
    if decoder is outer and outer.get_output_embeddings() is not None:
        raise UnsupportedModelError(
            f"{outer.config.model_type} does not tell its decoder from the output layer on it"
        )
    return decoder


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate brings them from."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.device("cpu")
