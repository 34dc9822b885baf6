"""Documents in, token windows and batches out.

    documents -> token_stream -> tokens_T -> windows -> windows_NT -> batches
    (text_windows joins the middle)

Shapes: B batch, N windows, T tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from matkv.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
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


def windows(tokens_T: Tensor, length: int, limit_tokens: int | None = None) -> Tensor:
    """Cut a token sequence into full windows that do not overlap; the ragged end is dropped.

    Returns:
        int64 [N, length], from the first `limit_tokens` tokens where that is given.

    Raises:
        DataError: there are fewer tokens than one window, or `length` is below 1.
    """
    if length < 1:
        raise DataError(f"window length {length} must be at least 1 token")
    available = tokens_T.numel() if limit_tokens is None else min(limit_tokens, tokens_T.numel())
    if available < length:
        total = tokens_T.numel()
        which = f"{total}" if available == total else f"the first {available} of {total}"
        raise DataError(
            f"{which} tokens are fewer than one window of {length}: "
            "give more text or a smaller length"
        )
    count = available // length
    return tokens_T[: count * length].reshape(count, length)


def text_windows(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    length: int,
    limit_tokens: int | None = None,
) -> Tensor:
    """Documents as full windows of a model's tokens.

    Where the tokenizer starts every text with a special token, as Gemma's does, every window starts
    with it, for such models are at a loss without it.

    Returns:
        int64 [N, length], `limit_tokens` tokens at most.

    Raises:
        DataError: there are fewer tokens than one window, or `length` is below 1.
    """
    tokens_T = token_stream(tokenizer, texts)
    start = tokenizer.bos_token_id
    if start is None or tokenizer("a").input_ids[0] != start:
        return windows(tokens_T, length, limit_tokens)
    limit = None if limit_tokens is None else limit_tokens - limit_tokens // max(length, 1)
    windows_NT = windows(tokens_T, length - 1, limit)
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
