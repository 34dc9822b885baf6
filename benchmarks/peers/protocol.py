"""The protocol that every method follows: read a context, then score what comes after it.

    window  |----------- context -----------|------ scored, in chunks ------|
                prefilled at once              each chunk goes through the cache
                compressed as the method does  and is predicted from it

Each window of text is cut in two. Its context is read in one pass; the method compresses it at the
time it always does, while it reads or right after. The rest is fed teacher-forced, a chunk at a
time, through the same cache object, as decoding would; only its tokens are scored, so that every
prediction reads the compressed cache. What a method keeps exact it may keep: the recent tokens of
QuantizedCache, those of a kvpress method after the context, matkv's window. But it pays for them:
the bytes of a row are those its cache holds, averaged over the scored chunks, over those of the
full cache at the same lengths. Methods that only act after prefill fit, and so do those that
compress every token at once; the full cache is scored in the same way.

Bytes count codes, scales, zero points, exact tokens and, in `budget`, projections that stay beside
the weights, for one sequence at the scored length; `growing_budget` leaves these out, as their
share falls with context and batch. A simulated method computes what the compressed cache would give
and counts bytes by formula.

Shapes: B batch (1), N windows, T token, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import DynamicCache

Row = dict[str, Any]


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` as a keyword of the model's forward pass, whose name changed in transformers 5.24.

    The environments of peers do not have matkv, which knows more of this.
    """
    if cache is None:
        return {}
    named = "cache" in inspect.signature(type(model).forward).parameters
    return {"cache" if named else "past_key_values": cache}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """`length` tokens a window, the first `context` of them read before scoring starts.

    Raises:
        ValueError: the numbers do not fit one another.
    """

    length: int = 1024
    context: int = 768
    chunk: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.context < self.length - 1 or self.chunk < 1:
            raise ValueError(
                f"length {self.length}, context {self.context}, chunk {self.chunk}: the context "
                "must leave at least two tokens of the window, a chunk has at least one"
            )


class Method:
    """How one method reads a context and what it holds then; as it stands, the full cache.

    `applied` yields the model to score with. `held` gives the bytes to count, and those resident in
    this process, None where the method is simulated.
    """

    note = ""
    packages: tuple[str, ...] = ()

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        yield model

    def new_cache(self, model: Any) -> Any:
        return DynamicCache(config=model.config)

    def read(self, model: Any, context_BT: Tensor) -> Any:
        """A cache that holds `context_BT`."""
        cache = self.new_cache(model)
        model.get_decoder()(context_BT, **cache_argument(model, cache), use_cache=True)
        return cache

    def held(self, cache: Any) -> tuple[float, float | None]:
        nbytes = tensor_nbytes([(layer.keys, layer.values) for layer in cache.layers])
        return nbytes, nbytes

    def counted(self, cache: Any) -> tuple[float, float | None]:
        """`held`, of a cache that something has reached.

        Raises:
            ValueError: nothing has: the model does not use the cache that it is given.
        """
        counted, resident = self.held(cache)
        if counted <= 0:
            raise ValueError("the cache holds nothing: the model does not use what it is given")
        return counted, resident

    def fixed_nbytes(self, model: Any) -> int:
        """Bytes beside the model's own weights that do not depend on the context."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One row to be: its name, and how to make the method, which may import a package."""

    method: str
    setting: str
    family: str
    build: Callable[[], Method]

    @property
    def name(self) -> str:
        return f"{self.method}, {self.setting}" if self.setting else self.method


def control(environment: str) -> Contestant:
    """The full cache scored inside a package's environment: shows that the rows are comparable."""
    setting = f"in the environment of {environment}"
    return Contestant(method="full cache", setting=setting, family="full", build=Method)


@torch.inference_mode()
def score(model: Any, windows_NT: Tensor, protocol: Protocol, method: Method) -> Row:
    """Follow the protocol with one method; the figures of its row.

    `losses` are mean negative log-likelihoods, one a window, `stderr` the standard error of their
    mean; `seconds` the time of all windows, the first of which may compile kernels.
    """
    windows_NT = windows_NT[:, : protocol.length]
    starts = range(protocol.context, protocol.length - 1, protocol.chunk)
    losses, held, resident, lengths, times = [], [], [], [], []
    with method.applied(model) as used:
        for window_T in windows_NT.to(used.device):
            started = time.perf_counter()
            cache, total = method.read(used, window_T[None, : protocol.context]), 0.0
            for start in starts:
                end = min(start + protocol.chunk, protocol.length - 1)
                total += _chunk_loss(used, cache, window_T, start, end)
                counted, present = method.counted(cache)
                held.append(counted)
                resident.append(present)
                lengths.append(end)
            losses.append(total / (protocol.length - 1 - protocol.context))
            times.append(time.perf_counter() - started)
        fixed = method.fixed_nbytes(used)
    full = full_bytes_per_token(model)
    mean_held, mean_length = _mean(held), _mean(lengths)
    known = [x for x in resident if x is not None]
    return {
        "bytes_per_token": mean_held / mean_length,
        "resident_bytes_per_token": _mean(known) / mean_length if known else None,
        "full_bytes_per_token": full,
        "fixed_bytes": fixed,
        "budget": (mean_held + fixed) / (mean_length * full),
        "growing_budget": mean_held / (mean_length * full),
        "context": mean_length,
        **summary(losses),
        "tokens": len(losses) * (protocol.length - 1 - protocol.context),
        "seconds": math.fsum(times),
        "seconds_per_window": statistics.median(times),
        "note": method.note,
        "version": versions("torch", "transformers", *method.packages),
    }


def _chunk_loss(model: Any, cache: Any, window_T: Tensor, start: int, end: int) -> float:
    """Feed tokens start..end-1 through the cache; the summed loss of the tokens after each."""
    # Positions are given, because a cache that has dropped tokens counts too few.
    positions_BT = torch.arange(start, end, device=window_T.device)[None]
    logits_TV = model(
        window_T[None, start:end],
        **cache_argument(model, cache),
        position_ids=positions_BT,
        use_cache=True,
    ).logits[0]
    target_T = window_T[start + 1 : end + 1]
    return float(F.cross_entropy(logits_TV.float(), target_T, reduction="sum"))


def attempt(contestant: Contestant, model: Any, windows_NT: Tensor, protocol: Protocol) -> Row:
    """The contestant's row; where it fails, one without figures that says why."""
    names = {name: getattr(contestant, name) for name in ("method", "setting", "family")}
    try:
        method = contestant.build()
        return names | score(model, windows_NT, protocol, method)
    except Exception as error:  # a peer may fail in any way; the others go on
        return names | failure(error)


def failure(error: BaseException | str) -> Row:
    """The figures of a row that could not be measured."""
    if isinstance(error, BaseException):
        first = (str(error).strip() or "no message").splitlines()[0]
        error = f"{type(error).__name__}: {first}"
    return {"perplexity": None, "stderr": None, "losses": [], "note": f"failed: {error[:300]}"}


def summary(losses: list[float]) -> Row:
    """Perplexity, and the standard error of the mean loss over windows."""
    mean = _mean(losses)
    spread = sum((loss - mean) ** 2 for loss in losses)
    count = len(losses)
    stderr = math.sqrt(spread / (count - 1) / count) if count > 1 else None
    finite = math.isfinite(mean) and mean < 700
    return {"perplexity": math.exp(mean) if finite else None, "stderr": stderr, "losses": losses}


def full_bytes_per_token(model: Any) -> int:
    """Bytes that one more token adds to the full cache of a model without sliding windows.

    Raises:
        ValueError: the model has such windows, behind which a token adds less.
    """
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    if any(getattr(layer, "is_sliding", False) for layer in layers):
        raise ValueError(
            f"{config.model_type} has layers with a sliding window, whose bytes this comparison "
            "does not count: compare on a model without any"
        )
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * kv_heads * head_dim * model.dtype.itemsize)


def tensor_nbytes(value: Any) -> int:
    """Bytes of the storages of all tensors in a value, each once; wrapped tensors are opened."""
    storages: dict[int, int] = {}

    def visit(item: Any) -> None:
        if hasattr(item, "__tensor_flatten__"):
            for name in item.__tensor_flatten__()[0]:
                visit(getattr(item, name))
        elif isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            visit(list(item.values()))
        elif isinstance(item, (list, tuple)):
            for part in item:
                visit(part)

    visit(value)
    return sum(storages.values())


def versions(*packages: str) -> str:
    """Installed versions in one line."""
    found = []
    for package in packages:
        known = {"torch": torch.__version__, "transformers": transformers.__version__}
        try:
            found.append(f"{package} {known.get(package) or version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def _mean(values: list[Any]) -> float:
    return math.fsum(values) / len(values)
