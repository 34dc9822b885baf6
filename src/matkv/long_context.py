"""Long context: what budgets lose far back, by retrieval from haystacks and loss by position.

Retrieval is measured where users meet it, in greedy generation through the cache, and as the loss
of the right answer's tokens through the same cache, which moves before the accuracy does.

Shapes: N windows, T token, A token of the answer, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import math
import statistics
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matkv import results
from matkv.artifact import Artifact
from matkv.cache import new_cache
from matkv.errors import DataError
from matkv.haystack import RECIPE, TESTS, HaystackConfig, Haystacks, Sample, Test
from matkv.hf import attach, detach, fingerprint, geometry_of
from matkv.losses import token_losses
from matkv.results import Record
from matkv.store import Store

NEEDLE, POSITIONS = "needle", "positions"
# What a row was measured with: another row with equal values of these is the same measurement.
CACHE_KEYS = ("artifact", "ranks", "budget", "sink", "window", "dtype")
NEEDLE_KEYS = (
    *(*CACHE_KEYS, "test", "context", "depth", "n", "recipe"),
    *(setting.name for setting in fields(HaystackConfig)),
)
POSITIONS_KEYS = (*CACHE_KEYS, "text", "data", "window_tokens", "start", "end")
SLACK = 4  # tokens of generation beyond the answer's, for models that start on a new line
FIRST_BUCKET = 64

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Caches:
    """The caches to measure: the full one, then every budget.

    `uniform` ignores stored rank tables; `sink` and `window`, the first and last tokens kept exact,
    come from the artifact unless given.
    """

    budgets: tuple[float, ...]
    uniform: bool = False
    sink: int | None = None
    window: int | None = None

    def attached(self, model: PreTrainedModel, artifact: Artifact) -> Generator[Record]:
        """Attach one after the other and tell what identifies each; leaves the model detached.

        Raises:
            BudgetError, FingerprintError, RankError: see `attach`; before anything is measured.
        """
        tables = {budget: artifact.table(budget, uniform=self.uniform) for budget in self.budgets}
        dtype = str(model.dtype).removeprefix("torch.")
        common = {"artifact": results.digest(artifact), "dtype": dtype}
        sink = artifact.sink if self.sink is None else self.sink
        window = artifact.window if self.window is None else self.window
        detach(model)
        artifact.check(geometry_of(model.config), fingerprint(model))
        try:
            yield {**common, "ranks": None, "budget": None, "sink": None, "window": None}
            for budget, table in tables.items():
                attach(model, artifact, ranks=table, sink=sink, window=window)
                ranks = results.digest_of(table)
                yield {**common, "ranks": ranks, "budget": budget, "sink": sink, "window": window}
        finally:
            detach(model)


# ---------------------------------------------------------------------------- retrieval


@dataclass(frozen=True, kw_only=True)
class NeedleConfig:
    """Which haystacks to search: `samples` of every test, context (tokens) and depth.

    Raises:
        DataError: a setting is outside its range.
    """

    contexts: tuple[int, ...]
    tests: tuple[Test, ...] = TESTS
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    samples: int = 10
    haystack: HaystackConfig = field(default_factory=HaystackConfig)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise DataError(f"samples {self.samples} must be at least 1")

    def cells(self) -> list[tuple[Test, int, float]]:
        return [(t, c, d) for c in self.contexts for t in self.tests for d in self.depths]

    @property
    def tokens(self) -> int:
        """Tokens that one cache reads."""
        return self.samples * sum(context for _, context, _ in self.cells())


def needles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    artifact: Artifact,
    caches: Caches,
    config: NeedleConfig,
    store: Store,
    *,
    on_progress: Progress | None = None,
) -> list[Record]:
    """Accuracy and answer loss of every cache, test, context and depth.

    `accuracy` is the share of samples whose greedy continuation holds the answer, `stderr` its
    binomial standard error; `answer_loss` the mean loss of the answer's tokens in nats, and
    `answer_stderr` that of its mean over samples. Rows that `store` has are not measured again, new
    ones are kept as soon as they are there. `on_progress` gets the prompt tokens done.

    Raises:
        DataError: a context is too short for its facts, or longer than the model's positions.
        BudgetError, FingerprintError, RankError: see `attach`.
    """
    haystacks = Haystacks(tokenizer, config.haystack)
    samples = {
        cell: [haystacks.sample(*cell, index) for index in range(config.samples)]
        for cell in config.cells()
    }
    for cell, (first, *_) in samples.items():
        _check_positions(model, cell[1], len(first.answer_A) + SLACK)
    fixed = {"n": config.samples, **asdict(config.haystack), "recipe": RECIPE}
    rows: list[Record] = []
    done = 0
    with closing(caches.attached(model, artifact)) as each:
        for cache in each:
            for (test, context, depth), asked in samples.items():
                name = {**cache, "test": test, "context": context, "depth": depth, **fixed}
                row = store.find(name)
                if row is None:
                    row = store.add([{**name, **_scores(model, tokenizer, asked)}])[0]
                rows.append(row)
                done += context * len(asked)
                if on_progress is not None:
                    on_progress(done)
    return rows


def _check_positions(model: PreTrainedModel, tokens: int, extra: int) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and tokens + extra > limit:
        answer = f" and an answer of {extra}" if extra else ""
        raise DataError(
            f"a context of {tokens} tokens{answer} needs {tokens + extra} positions, the model has "
            f"{limit}: give a shorter one"
        )


def _scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]
) -> Record:
    answers = [ask(model, tokenizer, sample) for sample in samples]
    accuracy = sum(right for right, _ in answers) / len(answers)
    losses = [loss for _, loss in answers]
    spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
    return {
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / len(answers)),
        "answer_loss": statistics.fmean(losses),
        "answer_stderr": spread / math.sqrt(len(losses)),
    }


@torch.inference_mode()
def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample
) -> tuple[bool, float]:
    """Whether greedy generation finds the answer, and the mean loss of the answer's tokens.

    Both read the prompt from one cache, which holds all of it but its last token.
    """
    prompt_T, answer_A = sample.prompt_T.to(model.device), sample.answer_A.to(model.device)
    cache = new_cache(model)
    model.get_decoder()(prompt_T[None, :-1], past_key_values=cache, use_cache=True)
    twin = copy.deepcopy(cache)  # layers with a sliding window could not go back
    rest_A = torch.cat((prompt_T[-1:], answer_A[:-1]))
    logits_AV = model(rest_A[None], past_key_values=cache, use_cache=True).logits[0]
    loss = float(F.cross_entropy(logits_AV.float(), answer_A))
    generate: Any = model.generate
    out_T = generate(
        prompt_T[None],
        attention_mask=torch.ones_like(prompt_T[None]),
        past_key_values=twin,
        max_new_tokens=len(answer_A) + SLACK,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )[0]
    found = tokenizer.decode(out_T[len(prompt_T) :], skip_special_tokens=True)
    return sample.answer in found, loss


# --------------------------------------------------------------------------- positions


def buckets(window: int) -> list[tuple[int, int]]:
    """[0, 64), [64, 128), [128, 256) … up to `window`, the last one cut there."""
    edges, end = [0], FIRST_BUCKET
    while edges[-1] < window:
        edges.append(min(end, window))
        end *= 2
    return list(pairwise(edges))


def positions(
    model: PreTrainedModel,
    artifact: Artifact,
    windows_NT: Tensor,
    text: str,
    caches: Caches,
    store: Store,
    *,
    on_progress: Progress | None = None,
) -> list[Record]:
    """Perplexity of every cache by the position of the predicted token in its window.

    exp of the mean loss of the tokens at `start` <= position < `end`; a window's first token is not
    predicted. `stderr` is that of the mean loss, over windows. As `evaluate.perplexity`, it runs
    the truncated forward pass, which equals cached decoding. `on_progress` gets the tokens done.

    Raises:
        DataError: there is no window of at least two tokens, or it exceeds the model's positions.
        BudgetError, FingerprintError, RankError: see `attach`.
    """
    count, length = windows_NT.shape
    if count == 0 or length < 2:
        raise DataError(f"{count} windows of {length} tokens: perplexity needs one of at least 2")
    _check_positions(model, length, 0)
    content = hashlib.sha256(windows_NT.cpu().numpy().tobytes()).hexdigest()[:12]
    fixed = {"text": text, "data": content, "window_tokens": length}
    ranges = buckets(length)
    rows: list[Record] = []
    done = 0
    with closing(caches.attached(model, artifact)) as each:
        for cache in each:
            names = [{**cache, **fixed, "start": start, "end": end} for start, end in ranges]
            found = [row for name in names if (row := store.find(name)) is not None]
            if len(found) < len(names):
                losses_NT = _losses(model, windows_NT, done, on_progress)
                found = store.add([{**name, **_bucket(losses_NT, name)} for name in names])
            rows += found
            done += windows_NT.numel()
            if on_progress is not None:
                on_progress(done)
    return rows


@torch.inference_mode()
def _losses(
    model: PreTrainedModel, windows_NT: Tensor, done: int, on_progress: Progress | None
) -> Tensor:
    """Loss of every token by its position; NaN for the first ones.  [NT]"""
    losses_NT = torch.full(windows_NT.shape, math.nan, dtype=torch.float64)
    for index, window_T in enumerate(windows_NT.to(model.device)):
        logits_TV = model(window_T[None], use_cache=False).logits[0, :-1]
        losses_NT[index, 1:] = token_losses(logits_TV, window_T[1:]).cpu()
        if on_progress is not None:
            on_progress(done + (index + 1) * windows_NT.shape[1])
    return losses_NT


def _bucket(losses_NT: Tensor, name: Record) -> Record:
    part_NT = losses_NT[:, max(name["start"], 1) : name["end"]]
    means_N = part_NT.mean(1)
    spread = float(means_N.std()) if len(means_N) > 1 else math.nan
    return {
        "perplexity": math.exp(float(means_N.mean())),
        "stderr": spread / math.sqrt(len(means_N)),
        "tokens": part_NT.numel(),
    }
