"""Long context: what budgets lose far back, by retrieval from haystacks.

Retrieval is measured where users meet it, in greedy generation through the cache, and as the loss
of the right answer's tokens through the same cache, which moves before the accuracy does.

Shapes: T token, A token of the answer, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matkv.artifact.artifact import Artifact
from matkv.artifact.records import Record
from matkv.artifact.results import Kind, Results
from matkv.artifact.setting import CACHE_KEYS, Setting, budget_name
from matkv.cache.cache import new_cache
from matkv.cache.naming import cache_argument
from matkv.data.haystacks import RECIPE, TESTS, HaystackConfig, Haystacks, Sample, Test
from matkv.errors import DataError
from matkv.hf.attach import attached, identified
from matkv.hf.geometry import check_positions
from matkv.progress import OnProgress, Report
from matkv.settings import Few, Length, Many, settings

NEEDLE = Kind(
    "needle",
    (
        *(*CACHE_KEYS, "test", "context", "depth", "n", "recipe"),
        *(setting.name for setting in fields(HaystackConfig)),
    ),
)
SLACK = 4  # tokens of generation beyond the answer's, for models that start on a new line


@settings(DataError)
class NeedleConfig:
    """Which haystacks to search: `samples` of every test, context (tokens) and depth."""

    contexts: Many[Length] = Field(default=(), description="tokens of haystacks to find facts in")
    tests: Many[Test] = TESTS
    depths: Many[Annotated[float, Field(ge=0, le=1)]] = (0.1, 0.5, 0.9)
    samples: Few = Field(default=10, description="haystacks of each test, context and depth")
    haystack: HaystackConfig = Field(default_factory=HaystackConfig)

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
    settings: Sequence[Setting],
    config: NeedleConfig,
    results: Results,
    *,
    on_progress: OnProgress | None = None,
) -> list[Record]:
    """Accuracy and answer loss of every setting, test, context and depth.

    `accuracy` is the share of samples whose greedy continuation holds the answer, `stderr` its
    binomial standard error; `answer_loss` the mean loss of the answer's tokens in nats, and
    `answer_stderr` that of its mean over samples. Rows that `results` has are not measured again,
    new ones are kept as soon as they are there.

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
        check_positions(model, cell[1], len(first.answer_A) + SLACK)
    fixed = {"n": config.samples, **asdict(config.haystack), "recipe": RECIPE}
    rows: list[Record] = []
    done = 0
    report = Report(on_progress, "searching haystacks", config.tokens * len(settings))
    for setting, cache in identified(model, artifact, settings):
        for (test, context, depth), asked in samples.items():
            name = {**cache, "test": test, "context": context, "depth": depth, **fixed}
            row = results.find(name)
            if row is None:
                with attached(model, artifact, setting):
                    scores = _scores(model, tokenizer, asked)
                (row,) = results.add([name | scores])
            rows.append(row)
            done += context * len(asked)
            report(done, budget_name(setting.budget))
    return rows


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
    model.get_decoder()(prompt_T[None, :-1], **cache_argument(model, cache), use_cache=True)
    twin = copy.deepcopy(cache)  # layers with a sliding window could not go back
    rest_A = torch.cat((prompt_T[-1:], answer_A[:-1]))
    logits_AV = model(rest_A[None], **cache_argument(model, cache), use_cache=True).logits[0]
    loss = float(F.cross_entropy(logits_AV.float(), answer_A))
    generate: Any = model.generate
    out_T = generate(
        prompt_T[None],
        attention_mask=torch.ones_like(prompt_T[None]),
        **cache_argument(model, twin),
        max_new_tokens=len(answer_A) + SLACK,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )[0]
    found = tokenizer.decode(out_T[len(prompt_T) :], skip_special_tokens=True)
    return sample.answer in found, loss
