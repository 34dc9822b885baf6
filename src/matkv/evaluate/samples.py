"""Answers to prompts, with one cache or another, and side by side at several budgets.

Shapes: B batch, T token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from matkv.artifact.artifact import Artifact
from matkv.artifact.records import Record
from matkv.artifact.results import Kind, Results
from matkv.artifact.setting import CACHE_KEYS, Setting
from matkv.cache.cache import LatentCache
from matkv.cache.naming import cache_argument
from matkv.errors import DataError, MatkvError
from matkv.hf.attach import attached, identified
from matkv.hf.geometry import check_positions
from matkv.progress import own_randomness

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

SAMPLES = Kind("samples", (*CACHE_KEYS, "prompt", "max_new_tokens"))
# Knowledge, arithmetic, prose and a list: what compression breaks first differs among them.
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "A train leaves at 9:40 and arrives at 12:15. How long is the journey?",
    "Write the opening of a story about a lighthouse keeper.",
    "List three uses of a paper clip.",
)
BUDGETS = (1.0, 0.75, 0.5, 0.25)


def chat_ids(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to the answer; without a chat template, of its plain lines.

    Raises:
        DataError: it holds bytes that were no UTF-8.
        MatkvError: the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        return text_ids(tokenizer, "\n".join(turn["content"] for turn in turns))
    from jinja2 import TemplateError  # transformers needs it for templates alone

    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        reason = " ".join(str(error).split())
        raise MatkvError(
            f"the model's chat template refuses the conversation: {reason}; generate --raw goes "
            "without it"
        ) from error
    return text_ids(tokenizer, str(text), special=False)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text, with the tokenizer's own beginning unless `special` is false.

    Raises:
        DataError: it holds bytes that were no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        cut = text[max(0, error.start - 20) : error.end + 20]
        raise DataError(f"{cut!r} is not UTF-8: write it in UTF-8") from error
    return list(tokenizer(text, add_special_tokens=special).input_ids)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    cache: Cache | None,
    streamer: TextStreamer | None,
    max_new_tokens: int,
    *,
    temperature: float,
    seed: int,
) -> list[int]:
    """Generate after `ids`, filling `cache`; returns the new tokens.

    Raises:
        DataError: the model has not as many positions as the prompt and `max_new_tokens` need.
        MatkvError: `ids` is empty.
    """
    if not ids:
        raise MatkvError("the prompt is empty: say something to the model")
    check_positions(model, len(ids), max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    ids_BT = torch.tensor([ids], device=model.device)
    with own_randomness(seed):
        output_BT = model.generate(  # type: ignore[operator]
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            **cache_argument(model, cache),
            streamer=streamer,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **sampling,
        )
    return [int(token) for token in output_BT[0, len(ids) :]]


def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    artifact: Artifact,
    settings: Sequence[Setting],
    results: Results,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = 96,
) -> list[Record]:
    """Greedy answers to every prompt at every setting, kept in `results`.

    The model is left detached.

    Raises:
        BudgetError, FingerprintError: see `attach`.
        MatkvError: a prompt is empty.
    """
    rows = []
    for setting, cache in identified(model, artifact, settings):
        with attached(model, artifact, setting):
            for prompt in prompts:
                ids = chat_ids(tokenizer, [{"role": "user", "content": prompt}])
                held = None if setting.budget is None else LatentCache(model)
                answer = generate(
                    model, tokenizer, ids, held, None, max_new_tokens, temperature=0.0, seed=0
                )
                text = str(tokenizer.decode(answer, skip_special_tokens=True))
                said = {"prompt": prompt, "max_new_tokens": max_new_tokens, "text": text}
                rows.append(cache | said)
    return results.add(rows)
