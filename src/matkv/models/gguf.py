"""GGUF files, converted once into ordinary transformers directories that reload in seconds.

A copy is kept in matkv's cache folder (`MATKV_CACHE`, else the XDG cache folder) and recognized by
the sha256 of the file that it was made from.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from matkv.errors import ModelError, first_line
from matkv.files import cache_home, read_json, replacing_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)
# Raise it when the conversion below changes its output: copies of an older one are replaced.
CONVERSION = 1
SOURCE_FILE = "matkv_source.json"
# What a file of any types is converted to: it holds every number of a dequantized block.
DTYPE = torch.float32
INSTALL_CONVERTER = "pip install gguf accelerate"


def gguf_model_dir(path: Path) -> Path:
    """Directory with the model and tokenizer of a .gguf file, converted to fp32 on first use.

    Raises:
        ModelError: the file cannot be read or converted, a package is missing, or the cache folder
            cannot be written.
    """
    sha256 = sha256_of(path)
    final = models_dir() / f"{path.stem}-{sha256[:12]}"
    return converted(path, sha256, final, DTYPE)


def models_dir(cache_dir: Path | None = None) -> Path:
    """Where converted models are kept, in matkv's cache folder or another."""
    return (cache_home() if cache_dir is None else cache_dir) / "models"


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def converted(path: Path, sha256: str, final: Path, dtype: torch.dtype) -> Path:
    """`final`, with the file of that digest converted to `dtype` unless it is there already.

    A copy that is incomplete or was made from another source is replaced. Of processes that want
    the same copy at the same time one converts and the others wait.

    Raises:
        ModelError: see `gguf_model_dir`.
    """
    if is_current(final, sha256):
        return final
    _require_converter(path)
    from filelock import FileLock

    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_name(f".{final.name}.lock")):
            if not is_current(final, sha256):
                _convert(path, sha256, final, dtype)
    except OSError as error:
        raise _unwritable(final, error) from error
    return final


def is_current(directory: Path, sha256: str) -> bool:
    """Whether a copy was made from this very source by this conversion, and no file was cut."""
    try:
        recorded = read_json(directory / SOURCE_FILE)
        sizes = {name: (directory / name).stat().st_size for name in recorded["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return bool(recorded == _record(sha256, sizes))


def _record(sha256: str, sizes: dict[str, int]) -> dict[str, Any]:
    return {"gguf_sha256": sha256, "conversion": CONVERSION, "files": sizes}


def _convert(path: Path, sha256: str, final: Path, dtype: torch.dtype) -> None:
    logger.warning("converting %s, once, into %s", path.name, final)
    try:
        model, tokenizer = load_model(path, dtype), load_tokenizer(path)
    except Exception as error:  # readers of a damaged file fail in every way there is
        raise ModelError(f"cannot convert {path}: {first_line(error)}") from error
    # safetensors reports a full disk with an error of its own that is no OSError.
    from safetensors import SafetensorError

    try:
        with replacing_directory(final, written=None) as building:
            model.save_pretrained(building)
            tokenizer.save_pretrained(building)
            sizes = {file.name: file.stat().st_size for file in sorted(building.iterdir())}
            record = json.dumps(_record(sha256, sizes), indent=2)
            (building / SOURCE_FILE).write_text(record, encoding="utf-8")
    except SafetensorError as error:
        raise _unwritable(final, error) from error


def _unwritable(final: Path, error: Exception) -> ModelError:
    return ModelError(
        f"cannot write the converted model to {final}: {first_line(error)}; free space there or "
        "set MATKV_CACHE to another folder"
    )


def _require_converter(path: Path) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"converting {path.name} needs the package {package}: {INSTALL_CONVERTER}"
            )


# ---- reading


def load_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The file's weights, dequantized."""
    import transformers

    # Newer versions keep GGUF weights packed unless told otherwise; older ones, which have no
    # GgufConfig, always dequantize.
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, **options
    )
    return model


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The file's tokenizer."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    fields = GGUFReader(path).fields
    split = fields.get("tokenizer.ggml.pre")
    if split is not None and split.contents() == "smollm":
        return _smollm_tokenizer(fields)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name
    )
    return tokenizer


def _smollm_tokenizer(fields: Any) -> PreTrainedTokenizerFast:
    """Build the tokenizer from the file's own tables.

    transformers' GGUF tokenizers do not know the "smollm" way of splitting text (every digit
    alone, before anything else), and those of 5.16 take <|im_start|> for the end of sequence.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

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
