"""One column of the table, an item at a time, with any method that reads a context into a cache.

    text        loss, divergence from the full cache and agreement with its next token, of a window
    retrieval   whether greedy decoding finds the answer, and the loss of its tokens
    task        whether the right choice is the likeliest, and the loss of the right one

Every item reads its context once, as the method does, and goes on from copies of that cache. Items
are paired: item i is the same for every method.

Shapes: T token, A token of an answer, Q token fed at once, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peers.protocol import Method, cache_argument, full_bytes_per_token

from .material import Haystack, Ids, Item, Material, Retrieval, Task, Text

Value = dict[str, Any]


def measure(
    model: Any, method: Method, material: Material, first: int, *, is_full: bool = False
) -> Iterator[Value]:
    """Values of the items from `first` on, of a model to which the method is applied.

    `is_full` says that this is the full cache, whose predictions the others are compared with.
    """
    if isinstance(material, Text):
        for index in range(first, material.count):
            yield window(model, method, material, index, is_full=is_full)
    elif isinstance(material, Retrieval):
        for one in material.prompts[first : material.count]:
            yield retrieval(model, method, one, material.slack)
    elif isinstance(material, Task):
        yield from task(model, method, material, first)
    else:
        raise TypeError(f"{material.kind} is not measured an item at a time")


class Reader:
    """A cache being filled: what was read, and logits of what is fed next."""

    def __init__(self, model: Any, cache: Any, length: int) -> None:
        self.model, self.cache, self.length = model, cache, length

    @classmethod
    def of(cls, model: Any, method: Method, ids: Ids) -> Reader:
        """A cache that holds `ids` as the method reads a context."""
        ids_BT = torch.tensor([ids], device=model.device)
        return cls(model, method.read(model, ids_BT), len(ids))

    def copied(self) -> Reader:
        return Reader(self.model, copy.deepcopy(self.cache), self.length)

    def feed(self, ids: Ids) -> Tensor:
        """Logits after each of these tokens.  [QV]"""
        # Positions are given, because a cache that has dropped tokens counts too few.
        end = self.length + len(ids)
        positions_BQ = torch.arange(self.length, end, device=self.model.device)[None]
        logits_QV: Tensor = self.model(
            torch.tensor([ids], device=self.model.device),
            **cache_argument(self.model, self.cache),
            position_ids=positions_BQ,
            use_cache=True,
        ).logits[0]
        self.length = end
        return logits_QV


# ---- text


@torch.inference_mode()
def window(model: Any, method: Method, text: Text, index: int, *, is_full: bool) -> Value:
    """One window: means over its predicted tokens, and the shares of bytes held and added.

    `held` is that of all tokens so far, averaged over the chunks; `grown` that of a further token.
    kl = Σ p_full (log p_full - log p), in nats; agree: both have the same likeliest token.
    """
    ids = text.windows[index]
    reader = Reader.of(model, method, ids[: text.context])
    full = full_bytes_per_token(model)
    path = Path(text.reference) / f"{index}.pt"
    expected_TV = None if is_full else torch.load(path, weights_only=True)
    sums, held, written = torch.zeros(3, dtype=torch.float64), dict[int, float](), []
    for start in range(text.context, len(ids) - 1, text.chunk):
        end = min(start + text.chunk, len(ids) - 1)
        log_p_QV = reader.feed(ids[start:end]).float().log_softmax(-1)
        target_Q = torch.tensor(ids[start + 1 : end + 1], device=model.device)
        sums[0] += F.nll_loss(log_p_QV, target_Q, reduction="sum").cpu()
        if expected_TV is None:
            written.append(log_p_QV.half().cpu())
        else:
            full_QV = expected_TV[start - text.context : end - text.context].float()
            sums[1:] += _compared(log_p_QV.cpu(), full_QV)
        held[end] = method.counted(reader.cache)[0] / full
    count = len(ids) - 1 - text.context
    if is_full:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat(written), path)
        sums[2] = count
    loss, kl, agree = (sums / count).tolist()
    share = sum(held.values()) / sum(held)
    (first, begun), *_, (last, ended) = held.items()
    grown = (ended - begun) / (last - first)
    return {"loss": loss, "kl": kl, "agree": agree, "held": share, "grown": grown}


def _compared(log_p_QV: Tensor, full_QV: Tensor) -> Tensor:
    """Summed divergence from the full cache, and how often the likeliest token is the same.  [2]"""
    full_QV = full_QV.log_softmax(-1)  # kept in 16 bits, which rounds
    kl = F.kl_div(log_p_QV, full_QV, log_target=True, reduction="sum")
    agree = (log_p_QV.argmax(-1) == full_QV.argmax(-1)).sum()
    return torch.stack((kl.double(), agree.double()))


# ---- retrieval


@torch.inference_mode()
def retrieval(model: Any, method: Method, one: Haystack, slack: int) -> Value:
    """Greedy decoding after the prompt, and the loss of the right answer's tokens.

    The method reads all of the prompt but its last token.
    """
    reader = Reader.of(model, method, one.prompt[:-1])
    twin = reader.copied()
    logits_AV = twin.feed([one.prompt[-1], *one.answer[:-1]])
    loss = float(F.cross_entropy(logits_AV.float(), torch.tensor(one.answer).to(model.device)))
    written: Ids = []
    token = one.prompt[-1]
    for _ in range(len(one.answer) + slack):
        token = int(reader.feed([token])[-1].argmax())
        written.append(token)
        if contains(written, one.answer):
            break
    return {"right": int(contains(written, one.answer)), "loss": loss}


def contains(written: Ids, answer: Ids) -> bool:
    """Whether the answer's tokens stand in what was written, in a row."""
    return any(written[at : at + len(answer)] == answer for at in range(len(written)))


# ---- tasks


def task(model: Any, method: Method, material: Task, first: int) -> Iterator[Value]:
    """Items from `first` on; solved ones are read once for all items that share them."""
    reader, current = None, -1
    for index in range(first, material.count):
        at, within = divmod(index, material.block)
        if reader is None or at != current:
            with torch.inference_mode():
                reader, current = Reader.of(model, method, material.blocks[at].shots), at
        yield item(reader, material.blocks[at].items[within])


@torch.inference_mode()
def item(reader: Reader, one: Item) -> Value:
    """Whether the right choice has the largest summed log-likelihood, and its loss a token."""
    start_V = None
    if one.question:
        reader = reader.copied()
        start_V = reader.feed(one.question)[-1]
    scores = [
        _likelihood(reader, start_V, choice, scored)
        for choice, scored in zip(one.choices, one.scored, strict=True)
    ]
    best = max(range(len(scores)), key=scores.__getitem__)
    return {"right": int(best == one.gold), "loss": -scores[one.gold] / one.scored[one.gold]}


def _likelihood(reader: Reader, start_V: Tensor | None, choice: Ids, scored: int) -> float:
    """Summed log-likelihood of the last `scored` tokens of a choice."""
    parts = [] if start_V is None else [start_V[None]]
    if len(choice) > 1:
        parts.append(reader.copied().feed(choice[:-1]))
    logits_AV = torch.cat(parts)[-scored:]
    target_A = torch.tensor(choice[-scored:], device=logits_AV.device)
    return -float(F.cross_entropy(logits_AV.float(), target_A, reduction="sum"))
