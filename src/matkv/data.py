"""Text in, token batches out: files, hub data sets and the packaged default articles.

The path of the data is the order of this file:

    read_texts -> documents -> token_stream -> tokens_T -> windows -> windows_NT -> batches
    (text_windows joins the middle)

Shapes: B batch, N windows, T tokens.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from matkv.articles import Split, default_articles
from matkv.errors import DataError
from matkv.files import read_json_lines, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ------------------------------------------------------------------------------- documents


def read_texts(source: str | Path, split: Split) -> list[str]:
    """Documents of `source`, none of them blank.

    `source` is "default" (the packaged articles), "hub:NAME[:CONFIG]" (a hub data set with a
    column "text"), a .txt file (one document), a .jsonl file (field "text" of every line) or a
    directory of .txt files. Only the default and hub data sets have splits: a file or directory
    is read whole whatever `split` says, so name different ones for training and validation.

    Raises:
        DataError: `source` is missing, empty, malformed or of an unknown kind.
    """
    if source == "default":
        return default_articles(split)
    if isinstance(source, str) and source.startswith("hub:"):
        texts = _read_hub(source, split)
    else:
        texts = _read_path(Path(source))
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise DataError(f"{source} holds no text: name a source with at least one document")
    return documents


def _read_path(path: Path) -> list[str]:
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise DataError(f"directory {path} has no .txt file: put the documents there as .txt")
        return [read_text(file) for file in files]
    if not path.exists():
        raise DataError(
            f'{path} does not exist: name a .txt or .jsonl file, a directory of .txt, "default" '
            'or "hub:NAME[:CONFIG]"'
        )
    if path.suffix == ".txt":
        return [read_text(path)]
    if path.suffix == ".jsonl":
        return [_text_field(*line) for line in read_json_lines(path)]
    raise DataError(f"{path} has suffix {path.suffix!r}: only .txt and .jsonl files are read")


def _text_field(where: str, record: Any) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where}: every line must be an object with a string field "text"')
    return text


def _read_hub(source: str, split: Split) -> list[str]:
    name, _, config = source.removeprefix("hub:").partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"{source} needs the package datasets: pip install 'matkv[train]'"
        ) from error
    try:
        dataset: Any = load_dataset(name, config or None, split=split)
    # Unknown names and lost connections are OSErrors, unknown configurations and splits ValueErrors
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load split {split!r} of {source}: {error}") from error
    if "text" not in dataset.column_names:
        raise DataError(f'{source} has columns {dataset.column_names}: one must be called "text"')
    return [text for text in dataset["text"] if isinstance(text, str)]


# ---------------------------------------------------------------------------------- tokens


def token_stream(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> Tensor:
    """All documents as one int64 sequence, with the end-of-sequence token between two of them.

    No other special token is added; a tokenizer without an end-of-sequence token joins the
    documents directly.

    Raises:
        DataError: the documents give no token at all.
    """
    if not texts:
        raise DataError("0 documents give no tokens: name a source with at least one document")
    # verbose=False: documents longer than the model's context are cut into windows later.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[Tensor] = []
    for i, tokens in enumerate(encoded["input_ids"]):
        pieces.append(torch.tensor([*(separator if i else []), *tokens], dtype=torch.int64))
    tokens_T = torch.cat(pieces)
    if tokens_T.numel() == 0:
        raise DataError(f"{len(texts)} documents give no tokens: they are all empty")
    return tokens_T


def windows(tokens_T: Tensor, window: int, limit_tokens: int | None = None) -> Tensor:
    """Cut a token sequence into full windows that do not overlap; the ragged end is dropped.

    Returns:
        int64 [N, window], from the first `limit_tokens` tokens where that is given.

    Raises:
        DataError: there are fewer tokens than one window, or `window` is below 1.
    """
    if window < 1:
        raise DataError(f"window {window} must be at least 1 token")
    available = tokens_T.numel() if limit_tokens is None else min(limit_tokens, tokens_T.numel())
    if available < window:
        total = tokens_T.numel()
        which = f"{total}" if available == total else f"the first {available} of {total}"
        raise DataError(
            f"{which} tokens are fewer than one window of {window}: "
            "give more text or a smaller window"
        )
    count = available // window
    return tokens_T[: count * window].reshape(count, window)


def text_windows(
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    window: int,
    limit_tokens: int | None = None,
) -> Tensor:
    """Documents as full windows of a model's tokens.

    Where the tokenizer starts every text with a special token, as Gemma's does, every window starts
    with it, for such models are at a loss without it.

    Returns:
        int64 [N, window], `limit_tokens` tokens at most.

    Raises:
        DataError: there are fewer tokens than one window, or `window` is below 1.
    """
    tokens_T = token_stream(tokenizer, texts)
    start = tokenizer.bos_token_id
    if start is None or tokenizer("a").input_ids[0] != start:
        return windows(tokens_T, window, limit_tokens)
    limit = None if limit_tokens is None else limit_tokens - limit_tokens // max(window, 1)
    windows_NT = windows(tokens_T, window - 1, limit)
    return torch.cat((torch.full((len(windows_NT), 1), start), windows_NT), dim=1)


def batches(
    windows_NT: Tensor, batch_size: int, *, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yield every window once as [B, T] batches, the last one possibly smaller.

    The order is shuffled only when a generator is given.

    Raises:
        DataError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise DataError(f"batch size {batch_size} must be at least 1")
    if generator is not None:
        order_N = torch.randperm(len(windows_NT), generator=generator, device=generator.device)
        windows_NT = windows_NT[order_N.to(windows_NT.device)]
    return iter(windows_NT.split(batch_size))
