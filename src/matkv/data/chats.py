"""Conversations in, sequences to learn responses from out: the data of supervised fine-tuning.

Shapes: T token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from matkv.data.batch import IGNORED
from matkv.errors import DataError
from matkv.files import read_json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


def read_chats(path: str | Path) -> list[Messages]:
    """Conversations of a JSONL file, one a line.

    A line holds `messages`, a list of {"role", "content"}, or `prompt` and `response`.

    Raises:
        DataError: the file is missing or empty, or a line holds neither.
    """
    source = Path(path)
    chats = [_chat(*line) for line in read_json_lines(source)]
    if not chats:
        raise DataError(f"{source} holds no conversation: put one JSON object on each line")
    return chats


def chat_examples(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Messages], max_tokens: int
) -> list[dict[str, Tensor]]:
    """Token ids and labels [T] of every conversation, by the tokenizer's chat template.

    Labels are the tokens of the assistant's messages, and -100 elsewhere. What exceeds `max_tokens`
    is cut off; a conversation without a label left is dropped.

    Raises:
        DataError: the tokenizer has no chat template, or nothing is left.
    """
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template: use an instruction-tuned model")
    examples = []
    for messages in chats:
        ids, labels = _tokens(tokenizer, messages)
        if any(label != IGNORED for label in labels[1:max_tokens]):
            examples.append(
                {
                    "input_ids": torch.tensor(ids[:max_tokens]),
                    "labels": torch.tensor(labels[:max_tokens]),
                }
            )
    if not examples:
        raise DataError(f"no conversation has a response within {max_tokens} tokens: raise it")
    return examples


def _tokens(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[int]]:
    """Ids and labels of one conversation.

    Each assistant message is what the template adds when the message follows its prompt.
    """
    ids = _template(tokenizer, messages, prompt=False)
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _template(tokenizer, messages[:index], prompt=True)
        after = _template(tokenizer, messages[: index + 1], prompt=False)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise DataError(
                "the chat template changes earlier messages when later ones follow, so responses "
                "cannot be told apart: give conversations of one prompt and one response"
            )
        labels[len(before) : len(after)] = after[len(before) :]
    return ids, labels


def _template(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, prompt: bool) -> list[int]:
    text: Any = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _chat(where: str, record: Any) -> Messages:
    if isinstance(record, dict) and "messages" not in record:
        turns = (("user", "prompt"), ("assistant", "response"))
        messages: Any = [{"role": role, "content": record.get(name)} for role, name in turns]
    else:
        messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise DataError(
            f'{where}: every line must hold "prompt" and "response", or "messages", a list of '
            '{"role": ..., "content": ...}'
        )
    return [{"role": one["role"], "content": one["content"]} for one in messages]


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )
