"""Weights of a model's attention, wherever they are and however they are packed.

Plain weights are read. Those packed in 4 or 8 bits, and those that accelerate keeps elsewhere until
they are needed, are told by what the linear map makes of unit vectors.

Shapes: M output dim, X input dim, P picked weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from matkv.artifact.fingerprint import picks, rounded
from matkv.errors import UnsupportedModelError
from matkv.hf.geometry import attention_modules
from matkv.hf.wrappers import device_of, model_in

OUTPUT_NAMES = ("o_proj", "dense", "out_proj")
BLOCK = 1024  # unit vectors at a time


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module is a linear map, of whatever package."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def is_plain(linear: nn.Module) -> bool:
    """Whether the weights of a linear map are numbers at hand, and all there is to it."""
    weight = getattr(linear, "weight", None)
    return (
        isinstance(linear, nn.Linear)
        and type(weight) is nn.Parameter
        and type(weight.data) is Tensor
        and weight.is_floating_point()
        and weight.device.type != "meta"
        and weight.shape == (linear.out_features, linear.in_features)
    )


def output_projection(module: nn.Module) -> nn.Module:
    """The linear map after a layer's attention.

    Raises:
        UnsupportedModelError: it has none of the usual names.
    """
    for name in OUTPUT_NAMES:
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Module) and is_linear(projection):
            return projection
    raise UnsupportedModelError(
        f"{type(module).__name__} has no linear output projection named "
        f"{', '.join(OUTPUT_NAMES[:-1])} or {OUTPUT_NAMES[-1]}"
    )


def weight_of(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a linear map, where it computes.  [MX]

    `dtype` is that of the model, which packed weights are asked in.
    """
    if is_plain(linear):
        assert isinstance(linear.weight, Tensor)
        return linear.weight.detach()
    X = int(linear.in_features)  # type: ignore[arg-type]
    blocks = torch.arange(X).split(BLOCK)
    return torch.cat([_columns(linear, block, dtype) for block in blocks], dim=1)


@torch.no_grad()
def _columns(linear: nn.Module, column_P: Tensor, dtype: torch.dtype) -> Tensor:
    """Some columns of the weight: W e_x = (W e_x + b) - (W 0 + b).  [MP]"""
    X = int(linear.in_features)  # type: ignore[arg-type]
    device = device_of(linear)
    unit_PX = torch.zeros(len(column_P) + 1, X, dtype=dtype, device=device)
    unit_PX[torch.arange(len(column_P)), column_P] = 1
    out_PM: Tensor = linear(unit_PX)
    return (out_PM[:-1] - out_PM[-1:]).mT


def fingerprint(model: nn.Module) -> tuple[float, ...]:
    """A few weights of every attention module, by which a model is recognized."""
    model = model_in(model)
    samples: list[float] = []
    for module in attention_modules(model):
        samples += rounded(_samples(module, model.dtype))
    return tuple(samples)


def _samples(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """Weights of the first part of a module that has any, evenly spread."""
    part = next(p for p in module.modules() if is_linear(p) or _own_weight(p) is not None)
    if not is_linear(part) or is_plain(part):
        flat = _own_weight(part)
        if flat is None or flat.device.type == "meta":
            raise UnsupportedModelError(f"the weights of {type(part).__name__} are not loaded")
        picks_P = picks(flat.numel())
        return flat.detach().flatten()[picks_P.to(flat.device)].float().cpu()
    M, X = int(part.out_features), int(part.in_features)  # type: ignore[arg-type]
    picks_P = picks(M * X)
    columns_MP = _columns(part, picks_P % X, dtype).float().cpu()
    return columns_MP[picks_P // X, torch.arange(len(picks_P))]


def _own_weight(part: nn.Module) -> Tensor | None:
    """The first parameter of a module itself, without its parts'."""
    floating = (p for p in part.parameters(recurse=False) if p.is_floating_point())
    return next(floating, None)
