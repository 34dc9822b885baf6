"""Models and tokenizers by name: a hub id, a local directory, a .gguf file or the default model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from matkv.errors import ModelError, UnsupportedModelError
from matkv.models.default import DEFAULT_MODEL, default_model_dir


def load_model(
    name: str | Path,
    dtype: torch.dtype | str = "auto",
    *,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, ready for inference, and its tokenizer.

    `name` is a hub id, a local directory, a .gguf file or "smollm2-135m", the default model.
    `dtype` is a torch dtype, its name, or "auto" for the one the weights are stored in.

    Raises:
        ModelError: it cannot be found or loaded.
        UnsupportedModelError: it is not a decoder.
    """
    source, options = _source(str(name))
    options["trust_remote_code"] = trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=_dtype(dtype), **options, **_gguf_options(options)
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(
            f"cannot load {name}: {_first_line(error)} (a model is a hub id, a directory, a .gguf "
            f"file or {DEFAULT_MODEL})"
        ) from error
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; matkv compresses decoders")
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    model.config._name_or_path = _identity(str(name))
    return model.eval(), tokenizer


def load_config(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load a model's config without its weights; `name` as for `load_model`, or a config file.

    Raises:
        ModelError: it cannot be found or is none.
    """
    source, options = _source(str(name))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(
            f"no config of a model in {name}: {_first_line(error)} (a model is a hub id, a "
            f"directory, a config.json, a .gguf file or {DEFAULT_MODEL})"
        ) from error
    return config


def _source(name: str) -> tuple[str, dict[str, Any]]:
    if name == DEFAULT_MODEL:
        return str(default_model_dir()), {}
    if name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise ModelError(f"no file {name}")
        return str(path.parent), {"gguf_file": path.name}
    return name, {}


def _gguf_options(options: dict[str, Any]) -> dict[str, Any]:
    """Newer transformers keep GGUF weights quantized unless told otherwise."""
    if "gguf_file" not in options:
        return {}
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _identity(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    return dtype if isinstance(dtype, torch.dtype) or dtype == "auto" else as_dtype(dtype)


def as_dtype(name: str) -> torch.dtype:
    """A floating-point dtype by its name.

    Raises:
        ModelError: there is none of that name.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"dtype {name!r} must be auto, float32, bfloat16 or float16")
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
