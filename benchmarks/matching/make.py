"""Material from a tokenizer, the packaged articles, and files.

Shapes: N window, T token.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matkv import data
from matkv.data.haystacks import RECIPE, TESTS, HaystackConfig, Haystacks, Test
from matkv.data.task_items import prompt, read_items
from matkv.errors import DataError
from matkv.files import digest

from .material import Block, Footprint, Haystack, Ids, Item, Material, Retrieval, Task, Text

ARTICLES = "held-out articles"
LENGTH, CONTEXT, CHUNK = 1024, 768, 32
DEPTHS = (0.1, 0.5, 0.9)
BLOCK = 50  # items that share their solved ones
HELD_BACK = 3  # one item of so many is only ever shown solved
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything is measured.

    `windows` of every text, `samples` of every haystack test at a context of `haystack` tokens,
    `items` of every task behind solved ones of `shots` tokens at most, none of a kind for 0; bytes
    a token between `few` and `tokens`, and times behind a prompt of `prompt` tokens, over `steps`
    steps.
    """

    windows: int
    samples: int
    haystack: int
    items: int
    shots: int
    few: int
    tokens: int
    prompt: int
    steps: int


FULL = Sizes(
    windows=32, samples=24, haystack=1024, items=200, shots=1536,
    few=1024, tokens=5120, prompt=2048, steps=16,
)  # fmt: skip
QUICK = Sizes(
    windows=2, samples=1, haystack=512, items=3, shots=1024,
    few=256, tokens=1024, prompt=512, steps=4,
)  # fmt: skip


def material(
    tokenizer: Any,
    sizes: Sizes,
    *,
    texts: Sequence[Path] = (),
    tasks_dir: Path,
    references: Path,
) -> list[Material]:
    """The columns: texts, haystacks, what a method takes, and all tasks of a directory.

    Raises:
        DataError: a text is too short, or the directory holds no task.
    """
    held_out = data.read_texts("default", "validation")
    found: list[Material] = [text(tokenizer, ARTICLES, held_out, sizes, references)]
    for path in texts:
        found.append(
            text(tokenizer, path.stem, data.read_texts(path, "validation"), sizes, references)
        )
    if sizes.samples:
        found += [retrieval(tokenizer, test, sizes) for test in TESTS]
    found.append(footprint(tokenizer, held_out, sizes))
    files = sorted(tasks_dir.glob("*.jsonl")) if sizes.items else []
    if sizes.items and not files:
        raise DataError(f"{tasks_dir} holds no .jsonl file: name a directory of TASK.jsonl")
    return found + [task(tokenizer, path, sizes) for path in files]


def text(tokenizer: Any, name: str, documents: list[str], sizes: Sizes, references: Path) -> Text:
    """Windows of documents; `references` is the folder of what the full cache predicts."""
    windows_NT = data.text_windows(tokenizer, documents, LENGTH, sizes.windows * LENGTH)
    told = _digest(windows_NT[0].tolist(), CONTEXT, CHUNK)
    return Text(
        column=name, data=told, count=len(windows_NT), windows=windows_NT.tolist(),
        context=CONTEXT, chunk=CHUNK, reference=str(references / told),
    )  # fmt: skip


def retrieval(tokenizer: Any, test: Test, sizes: Sizes) -> Retrieval:
    """Haystacks of a test at three depths in turn, through a chat template if there is one."""
    config = HaystackConfig(chat=tokenizer.chat_template is not None)
    haystacks = Haystacks(tokenizer, config)
    prompts = []
    for index in range(sizes.samples):
        turn, depth = divmod(index, len(DEPTHS))
        one = haystacks.sample(test, sizes.haystack, DEPTHS[depth], turn)
        prompts.append(Haystack(prompt=one.prompt_T.tolist(), answer=one.answer_A.tolist()))
    told = _digest(RECIPE, sizes.haystack, prompts[0].prompt)
    return Retrieval(column=test, data=told, count=len(prompts), prompts=prompts)


def footprint(tokenizer: Any, documents: list[str], sizes: Sizes) -> Footprint:
    tokens = data.text_windows(tokenizer, documents, sizes.tokens, sizes.tokens)[0].tolist()
    told = _digest(tokens, sizes.few, sizes.prompt, sizes.steps)
    return Footprint(
        column="footprint", data=told, count=1, tokens=tokens, few=sizes.few, prompt=sizes.prompt,
        steps=sizes.steps,
    )  # fmt: skip


# ---- tasks


def task(tokenizer: Any, path: Path, sizes: Sizes) -> Task:
    """Items of a file in a random order; a third of them is only ever shown solved."""
    items = read_items(path)
    random.Random(SEED).shuffle(items)
    pool = items[: max(1, len(items) // HELD_BACK)]
    asked = items[len(pool) :][: sizes.items]
    blocks = []
    for start in range(0, len(asked), BLOCK):
        shots = solved(tokenizer, pool, sizes.shots, random.Random(start))
        its = [encoded(tokenizer, item) for item in asked[start : start + BLOCK]]
        blocks.append(Block(shots=shots, items=its))
    told = _digest(digest(path.read_bytes()), sizes.shots, SEED)
    return Task(column=path.stem, data=told, count=len(asked), blocks=blocks, block=BLOCK)


def solved(tokenizer: Any, pool: Sequence[Any], most: int, rng: random.Random) -> Ids:
    """As many solved items as `most` tokens take, in a random order, an empty line after each."""
    found: Ids = []
    for item in rng.sample(list(pool), len(pool)):
        ids = _ids(tokenizer, f"{answered(item)}\n\n")
        if len(found) + len(ids) > most:
            break
        found += ids
    return found or _ids(tokenizer, "\n\n")


def answered(item: Any) -> str:
    """An item with its right answer, as lm-eval writes solved ones."""
    if "query" in item:
        return f"{prompt(item['query'])} {item['choices'][item['gold']]}"
    return f"{item['context_options'][item['gold']]} {item['continuation']}"


def encoded(tokenizer: Any, item: Any) -> Item:
    """An item as tokens; the same continuation after each of several contexts is scored alone."""
    if "query" in item:
        choices = [_ids(tokenizer, f" {choice}") for choice in item["choices"]]
        question = _ids(tokenizer, prompt(item["query"]))
        return Item(
            question=question, choices=choices, scored=list(map(len, choices)), gold=item["gold"]
        )
    after = _ids(tokenizer, f" {item['continuation']}")
    choices = [_ids(tokenizer, option) + after for option in item["context_options"]]
    return Item(question=[], choices=choices, scored=[len(after)] * len(choices), gold=item["gold"])


def _ids(tokenizer: Any, words: str) -> Ids:
    return list(tokenizer(words, add_special_tokens=False, verbose=False).input_ids)


def _digest(*parts: Any) -> str:
    return digest(json.dumps(parts).encode())
