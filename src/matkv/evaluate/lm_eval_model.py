"""lm-eval's view of a model: `LoadedLM` scores one that is loaded, `MatkvLM` opens an artifact.

    matkv lm-eval --model matkv --model_args artifact=RUN,budget=0.375 --tasks piqa,arc_easy

That command makes the name `matkv` known to lm-eval. Log-likelihoods come from the forward pass
without a cache, which equals reading through the latent cache; text is generated through the latent
cache itself.

Shapes: B sequence, T token, K last positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matkv.artifact.artifact import Artifact
from matkv.errors import DataError, MatkvError
from matkv.hf.attach import attach
from matkv.models.load import load_model

FULL = "full"
# Arguments of lm-eval's own Hugging Face models that mean something for a model already loaded.
HF_OPTIONS = frozenset(
    {
        "add_bos_token",
        "batch_size",
        "chat_template_args",
        "enable_thinking",
        "max_batch_size",
        "max_length",
        "prefix_token_id",
        "think_end_token",
        "truncation",
    }
)
# A request as lm-eval encodes it: its two texts, the context's tokens, the continuation's tokens.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
# Log-likelihood of a continuation, and whether greedy decoding would have written it.
Answer = tuple[float, bool]


class LoadedLM(HFLM):  # type: ignore[misc]
    """A loaded model, attached or not, with log-likelihoods that cost no more than they must.

    Inputs that differ only in their last token are read once, inputs of like length together, and
    the vocabulary is spread out only over the positions that are scored, in fp32. `on_progress`,
    where it is set, gets the number of requests answered of one call and replaces the bars.
    """

    on_progress: Callable[[int], None] | None = None

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        quiet = disable_tqdm or self.on_progress is not None
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=quiet)
        return answers

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        """What lm-eval calls for every kind of log-likelihood.

        Raises:
            DataError: a continuation is empty, or longer than the model can read.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (texts, context, continuation) in enumerate(requests):
            _check_request(texts, continuation, self.max_length)
            # The last token is only ever predicted; a context too long loses its beginning.
            read = (context + continuation)[:-1][-self.max_length :]
            groups.setdefault(tuple(read), []).append(index)
        answers: dict[int, Answer] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for batch in self._batches(list(groups), requests, override_bs):
            continuations = [[requests[i][2] for i in groups[key]] for key in batch]
            scored = self._score(batch, continuations)
            for key, its_answers in zip(batch, scored, strict=True):
                for index, answer in zip(groups[key], its_answers, strict=True):
                    answers[index] = answer
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
            bar.update(sum(map(len, scored)))
            if self.on_progress is not None:
                self.on_progress(len(answers))
        bar.close()
        return [answers[index] for index in range(len(requests))]

    def _batches(
        self, inputs: list[tuple[int, ...]], requests: Sequence[Request], size: int | None
    ) -> Iterator[list[tuple[int, ...]]]:
        """Inputs of like length together, the longest first: what does not fit fails at once."""
        inputs = sorted(inputs, key=lambda read: (-len(read), read))
        size = size or self.batch_size
        if size == "auto":
            longest = max(requests, key=lambda request: len(request[1]) + len(request[2]))
            size = self._detect_batch_size([longest])
        assert isinstance(size, int)
        for start in range(0, len(inputs), size):
            yield inputs[start : start + size]

    def _score(
        self, batch: Sequence[tuple[int, ...]], continuations: Sequence[Sequence[list[int]]]
    ) -> list[list[Answer]]:
        """Answers for each continuation that ends an input, its last token left off.

        Padding is on the right, where no token of the input sees it.
        """
        longest = len(batch[0])
        starts = [
            len(read) - max(map(len, its)) for read, its in zip(batch, continuations, strict=True)
        ]
        kept = longest - min(starts)
        ids_BT = torch.tensor([[*read, *[0] * (longest - len(read))] for read in batch])
        logits_BKV = self.model(ids_BT.to(self.device), use_cache=False, logits_to_keep=kept).logits
        scored = []
        for logits_KV, read, its in zip(logits_BKV, batch, continuations, strict=True):
            end = len(read) - (longest - kept)
            span = max(map(len, its))
            log_probs_KV = logits_KV[end - span : end].float().log_softmax(-1)
            scored.append([_answer(log_probs_KV[span - len(one) :], one) for one in its])
        return scored


@register_model("matkv")
class MatkvLM(LoadedLM):
    """An artifact's model, attached at a budget; `budget=full` is the plain model.

    `pretrained` loads the base model from elsewhere; `uniform`, `sink` and `recent` are those of
    `matkv evaluate`. Other options are those of lm-eval's own `hf` models.

    Raises:
        MatkvError: no artifact or budget is named, an option is unknown, or see `attach`.
    """

    def __init__(
        self,
        artifact: str | None = None,
        budget: float | str | None = None,
        *,
        pretrained: str | None = None,
        uniform: bool = False,
        sink: int | None = None,
        recent: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        _check_arguments(artifact, budget, options)
        opened = Artifact.load(str(artifact))
        model, tokenizer = load_model(
            pretrained or opened.base_model,
            dtype,
            device=_device(device),
            trust_remote_code=trust_remote_code,
        )
        if isinstance(budget, (int, float)):
            table = opened.table(budget, uniform=uniform)
            attach(model, opened, ranks=table, sink=sink, recent=recent)
        super().__init__(model, tokenizer, **options)


def _device(name: str | None) -> str:
    """The device as lm-eval means it: its command line says cuda:0 wherever nothing is said."""
    if not torch.cuda.is_available() and (name is None or name.startswith("cuda")):
        return "cpu"
    return name or "cuda"


def _check_arguments(artifact: str | None, budget: Any, options: dict[str, Any]) -> None:
    if artifact is None:
        raise MatkvError("matkv needs --model_args artifact=RUN,budget=0.5: no artifact is named")
    if budget != FULL and (isinstance(budget, bool) or not isinstance(budget, (int, float))):
        raise MatkvError(
            f"budget {budget} must be a fraction of the cache's bytes to keep, as budget=0.5, or "
            f"budget={FULL} for the plain model"
        )
    if unknown := sorted(set(options) - HF_OPTIONS):
        raise MatkvError(
            f"matkv takes no argument {unknown[0]!r}: besides artifact, budget, pretrained, "
            "uniform, sink, recent, dtype, device and trust_remote_code it takes "
            + ", ".join(sorted(HF_OPTIONS))
        )


def _check_request(texts: tuple[str, str] | None, continuation: list[int], limit: int) -> None:
    if not 0 < len(continuation) <= limit:
        raise DataError(
            f"a continuation of {len(continuation)} tokens cannot be scored by a model that reads "
            f"{limit}: {texts[1][:60] if texts else ''!r}"
        )


def _answer(log_probs_TV: Tensor, continuation: list[int]) -> Answer:
    target_T = torch.tensor(continuation, device=log_probs_TV.device)
    picked_T = log_probs_TV.gather(-1, target_T[:, None])
    return float(picked_T.sum()), bool((log_probs_TV.argmax(-1) == target_T).all())
