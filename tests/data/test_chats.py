"""Conversations: the labels are the responses and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from matkv.data.chats import chat_examples, read_chats
from matkv.errors import DataError

WORDS = [
    "<user>",
    "<assistant>",
    "<end>",
    "<none>",
    "hi",
    "there",
    "how",
    "are",
    "you",
    "fine",
    "thanks",
    "bye",
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
CHAT = [
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "how are you"},
    {"role": "user", "content": "fine"},
    {"role": "assistant", "content": "bye"},
]


def tokenizer(template: str | None = TEMPLATE) -> Any:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<none>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


def words(ids: torch.Tensor) -> str:
    return " ".join("_" if index == -100 else WORDS[index] for index in ids.tolist())


def test_labels_are_the_assistants_messages() -> None:
    (example,) = chat_examples(tokenizer(), [CHAT], 99)
    assert words(example["input_ids"]) == (
        "<user> hi there <end> <assistant> how are you <end> "
        "<user> fine <end> <assistant> bye <end>"
    )
    assert words(example["labels"]) == "_ _ _ _ _ how are you <end> _ _ _ _ bye <end>"


def test_what_is_too_long_is_cut_and_what_has_no_response_left_is_dropped() -> None:
    short = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "bye"}]
    cut, *rest = chat_examples(tokenizer(), [short, CHAT], 5)
    assert words(cut["labels"]) == "_ _ _ _ bye"
    assert not rest
    with pytest.raises(DataError, match="within 2 tokens"):
        chat_examples(tokenizer(), [CHAT], 2)


def test_both_kinds_of_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    lines = [{"prompt": "hi", "response": "bye\u2028"}, {"messages": CHAT}]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert read_chats(path) == [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "bye\u2028"}],
        CHAT,
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"prompt": "hi"}', "line 1: every line must hold"),
        ('{"messages": []}', "line 1: every line must hold"),
        ('{"messages": [{"role": "user"}]}', "line 1: every line must hold"),
        ("[1]", "line 1: every line must hold"),
        ("", "holds no conversation"),
    ],
)
def test_other_lines_are_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "chats.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        read_chats(tmp_path / "chats.jsonl")


def test_a_missing_file_and_a_missing_template_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_chats(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no chat template"):
        chat_examples(tokenizer(None), [CHAT], 99)


def test_a_template_that_rewrites_earlier_messages_is_refused() -> None:
    rewriting = "{{ messages | length }} " + TEMPLATE
    with pytest.raises(DataError, match="changes earlier messages"):
        chat_examples(
            tokenizer(
                rewriting.replace(
                    "{{ messages | length }}", "{% if messages | length > 2 %}thanks{% endif %}"
                )
            ),
            [CHAT],
            99,
        )
