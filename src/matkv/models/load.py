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

from matkv.errors import ModelError, UnsupportedModelError, first_line
from matkv.files import only_fetched
from matkv.models import gguf
from matkv.models.default import DEFAULT_MODEL, default_model_dir
from matkv.models.dtype import as_device, as_dtype, fastest, say_choice

KINDS = f"a hub id, a directory, a .gguf file or {DEFAULT_MODEL}"


def load_model(
    name: str | Path,
    dtype: torch.dtype | str = "auto",
    *,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, ready for inference, and its tokenizer.

    `name` is a hub id, a local directory, a .gguf file or "smollm2-135m", the default model.
    `dtype` is a torch dtype, its name, or "auto" for the fastest that loses nothing: the one the
    weights are stored in where `device` has fast products of it, else float32. A .gguf file is
    converted on first use, and kept; weights that another library keeps quantized stay as stored.

    Raises:
        ModelError: it cannot be found or loaded, or there is no such dtype or device.
        UnsupportedModelError: it is not a decoder.
    """
    if not str(name).strip():
        raise ModelError(f"no model is named: a model is {KINDS}")
    target = as_device(device)
    wanted = dtype if dtype == "auto" else as_dtype(dtype)
    source = model_source(str(name))
    options = {"trust_remote_code": trust_remote_code, "local_files_only": only_fetched(source)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = _load(source, wanted, target, options)
    except Exception as error:  # damaged and hostile files fail in every way there is
        raise ModelError(f"cannot load {name}: {first_line(error)} (a model is {KINDS})") from error
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; matkv compresses decoders")
    if device is not None:
        model.to(target)  # type: ignore[arg-type]
    model.config._name_or_path = _identity(str(name))
    return model.eval(), tokenizer


def load_config(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load a model's config without its weights; `name` as for `load_model`, or a config file.

    Raises:
        ModelError: it cannot be found or is none.
    """
    path = Path(name)
    packed = path.suffix == ".gguf" and path.is_file()
    source = str(path.parent) if packed else model_source(str(name))
    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "local_files_only": only_fetched(source),
    }
    try:
        if packed:
            options["gguf_file"] = path.name
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # damaged and hostile files fail in every way there is
        raise ModelError(
            f"no config of a model in {name}: {first_line(error)} (a model is {KINDS}, or a "
            "config.json)"
        ) from error
    if packed:
        config.dtype = gguf.DTYPE
    return config


def _load(
    source: str, wanted: torch.dtype | str, device: torch.device, options: dict[str, bool]
) -> PreTrainedModel:
    """The weights in the dtype that `wanted` means on `device`."""

    def load(dtype: torch.dtype | str) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, **options
        )
        return model

    if wanted != "auto":
        return load(wanted)
    config = AutoConfig.from_pretrained(source, **options)
    if getattr(config, "quantization_config", None) is not None:
        return load("auto")
    stored = config.dtype
    if stored is None:  # then the weights say it
        model = load("auto")
        stored = model.dtype
        if fastest(stored, device) == stored:
            return model
    chosen = fastest(stored, device)
    say_choice(Path(source).name, stored, chosen, device)
    return load(chosen)


def model_source(name: str) -> str:
    """What transformers loads: the directory of a converted file, or the name itself.

    Raises:
        ModelError: there is no such file, or it cannot be converted.
    """
    if name == DEFAULT_MODEL:
        return str(default_model_dir())
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise ModelError(f"no file {name}")
        return str(gguf.gguf_model_dir(Path(name)))
    return name


def _identity(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name
