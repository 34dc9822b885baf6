"""What a checkpoint says before vLLM fuses and shards it: the fingerprint; and adapters, added."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils.hub import cached_file

from matkv.artifact.fingerprint import picks, rounded
from matkv.artifact.lora import Lora
from matkv.errors import ArtifactError, first_line

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def fingerprint(
    model: str, config: PreTrainedConfig, *, revision: str | None = None, cache: str | None = None
) -> tuple[float, ...]:
    """What `matkv.hf` makes of a loaded model: a few weights of every attention module.

    `model` is a directory or a hub id that was fetched, `cache` the hub's folder for these.

    Raises:
        ArtifactError: the checkpoint is quantized, or no safetensors.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ArtifactError(
            f"{model} is quantized, and its weights cannot be compared with the artifact's: serve "
            "the model that the artifact was made for"
        )
    return tuple(
        sample
        for name in _sampled(config)
        for sample in rounded(_picked(model, name, revision, cache))
    )


def with_adapters(
    weights: Iterable[tuple[str, Tensor]], lora: Lora, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors by name, those with an adapter in `dtype`, their updates added.

    Raises:
        ArtifactError: an adapter is of a tensor that never comes, or of another shape.
    """
    left = {f"{path}.weight": path for path in lora.paths}
    for name, tensor in weights:
        known = next((one for one in left if _is_same(one, name)), None)
        if known is not None:
            update = lora.update(left.pop(known))
            if update.shape != tensor.shape:
                raise ArtifactError(
                    f"the adapter of {known} is of shape {tuple(update.shape)}, and the "
                    f"checkpoint's weight of {tuple(tensor.shape)}: is it another model's?"
                )
            tensor = tensor.to(dtype) + update.to(tensor.device, dtype)
        yield name, tensor
    if left:
        raise ArtifactError(
            f"the checkpoint has no {next(iter(left))}, which has an adapter: is the artifact "
            "another model's?"
        )


def _is_same(one: str, other: str) -> bool:
    """Whether names are of one tensor; a checkpoint's may lack what comes before the layers."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


def _sampled(config: PreTrainedConfig) -> list[str]:
    """The parameter of every attention module that is sampled: its first part's."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    found: dict[int, str] = {}
    for prefix, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and hasattr(module, "is_causal"):
            found[layer] = prefix + "." + _first_weight(module)
    return [found[layer] for layer in sorted(found)]


def _first_weight(module: nn.Module) -> str:
    names = (
        f"{part}.{name}"
        for part, inner in module.named_modules()
        for name, one in inner.named_parameters(recurse=False)
        if one.is_floating_point()
    )
    return next(names)


def _picked(model: str, name: str, revision: str | None, cache: str | None) -> Tensor:
    """Some numbers of one tensor, without reading more than their rows."""
    path, stored = _place(model, name, revision, cache)
    with safe_open(path, "pt") as file:
        part = file.get_slice(stored)
        shape = part.get_shape()
        columns = shape[-1] if len(shape) > 1 else 1
        flat = [int(one) for one in picks(int(torch.tensor(shape).prod()))]
        numbers = [part[one // columns].flatten()[one % columns] for one in flat]
    return torch.stack(numbers).float()


def _place(model: str, name: str, revision: str | None, cache: str | None) -> tuple[Path, str]:
    """The file of a tensor and its name there, which may lack what comes before the layers."""
    for stored, file in _files(model, revision, cache):
        if _is_same(stored, name):
            return file, stored
    raise ArtifactError(f"{model} has no tensor {name}: is it a whole checkpoint of this model?")


@lru_cache(maxsize=4)
def _files(model: str, revision: str | None, cache: str | None) -> list[tuple[str, Path]]:
    """Every tensor's name and file."""

    def fetched(file: str) -> Path | None:
        options: dict[str, Any] = {"revision": revision, "cache_dir": cache}
        try:
            found = cached_file(model, file, _raise_exceptions_for_missing_entries=False, **options)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"no checkpoint at {model}: {first_line(error)}") from error
        return None if found is None else Path(found)

    index = fetched(INDEX)
    if index is not None:
        weights: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [(name, index.parent / file) for name, file in weights.items()]
    whole = fetched(WHOLE)
    if whole is None:
        raise ArtifactError(f"{model} has no {WHOLE}: save it anew with save_pretrained")
    with safe_open(whole, "pt") as opened:
        return [(name, whole) for name in opened.keys()]  # noqa: SIM118
