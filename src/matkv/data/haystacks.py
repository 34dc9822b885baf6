"""Haystacks: facts hidden in filler text, and a question that asks for one of them.

The retrieval tests of RULER (Hsieh et al., arXiv 2404.06654, section 3) at an exact length:

    start | filler … other fact … filler … asked fact … filler | question     -> answer

"needle" hides the asked fact alone, "multikey" others of other keys beside it. A sample depends on
its own name only (seed, test, context, depth, index): every budget meets the same ones, however
many of them were measured before.

Shapes: T token, A token of the answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from matkv.data.texts import read_texts
from matkv.errors import DataError
from matkv.settings import Seed, settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Test = Literal["needle", "multikey"]
Filler = Literal["noise", "articles"]
TESTS: tuple[Test, ...] = get_args(Test)
MAX_DIGITS = 18
# Kept with results: raise it when samples of the same name change.
RECIPE = 1
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
WORDS = (
    "anchor", "badge", "basket", "blanket", "bridge", "button", "candle", "carpet", "cherry",
    "copper", "desert", "engine", "feather", "garden", "hammer", "helmet", "jacket", "ladder",
    "lemon", "meadow", "napkin", "orange", "paddle", "pencil", "pillow", "rabbit", "river",
    "shadow", "spider", "thunder", "tiger", "turtle", "velvet", "wagon", "window", "split",
)  # fmt: skip
HAYSTACK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the haystack in a chat template
INTRO = "Special magic numbers are hidden within the following text. Make sure to memorize them.\n"
FACT = "The special magic number for {word} is: {number}."
QUESTION = "\nWhat is the special magic number for {word} mentioned in the text above?"
PREFIX = "The special magic number for {word} mentioned in the text above is:"


@settings(DataError)
class HaystackConfig:
    """What a haystack is made of.

    `digits` is the length of the numbers to find, `keys` the facts of "multikey", the asked one
    among them. `filler` is "noise", five sentences over and over, or "articles", the packaged
    validation articles. `chat` asks through the tokenizer's chat template instead of plainly.

    Raises:
        DataError: a setting is outside its range.
    """

    digits: Annotated[int, Field(ge=1, le=MAX_DIGITS)] = 7
    keys: Annotated[int, Field(ge=2, le=len(WORDS))] = 4
    filler: Filler = "noise"
    chat: bool = False
    seed: Seed = 0


@dataclass(frozen=True)
class Sample:
    """A prompt of exactly the asked length, and its answer as tokens and as a string of digits.

    `start` is the token at which the asked fact starts.
    """

    prompt_T: Tensor
    answer_A: Tensor
    answer: str
    start: int


class Haystacks:
    """Makes samples with one tokenizer.

    Raises:
        DataError: the articles are missing, or the tokenizer has no chat template to ask through.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: HaystackConfig) -> None:
        if config.chat and tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template: ask plainly, without chat")
        self.tokenizer = tokenizer
        self.config = config
        self.sentences = [self._after(".", f" {one}") for one in _sentences(config.filler)]

    def sample(self, test: Test, context: int, depth: float, index: int = 0) -> Sample:
        """The sample of a name, `context` tokens long without its answer.

        `depth` is the share of filler that precedes the asked fact, to the nearest sentence.

        Raises:
            DataError: an unknown test, a depth outside 0..1, or a context too short for the facts.
        """
        if test not in TESTS:
            raise DataError(f"test {test!r} must be one of {', '.join(TESTS)}")
        if not 0 <= depth <= 1:
            raise DataError(f"depth {depth} must be in 0..1")
        name = (self.config.seed, test, context, depth, index)
        rng = random.Random(repr(name))
        words = rng.sample(WORDS, self.config.keys if test == "multikey" else 1)
        numbers = [
            str(rng.randrange(10 ** (n := self.config.digits - 1), 10 * 10**n)) for _ in words
        ]
        pairs = zip(words, numbers, strict=True)
        facts = [self._after(".", " " + FACT.format(word=word, number=one)) for word, one in pairs]
        start, end = self._frame(words[0])
        room = context - len(start) - len(end) - sum(map(len, facts))
        if room < 0:
            raise DataError(
                f"a context of {context} tokens is too short for {len(words)} facts and the "
                f"question, {context - room} tokens: give a longer one"
            )
        pieces, place = _hide(self._filler(room, rng), facts, depth, rng)
        return Sample(
            prompt_T=torch.tensor([*start, *pieces, *end]),
            answer_A=torch.tensor(self._after(":", f" {numbers[0]}")),
            answer=numbers[0],
            start=len(start) + place,
        )

    def _filler(self, room: int, rng: random.Random) -> list[list[int]]:
        """Whole sentences of `room` tokens together; the first one lacks its beginning."""
        first = rng.randrange(len(self.sentences)) if self.config.filler == "articles" else 0
        pieces: list[list[int]] = []
        over = -room
        for number in count(first):
            if over >= 0:
                break
            pieces.append(self.sentences[number % len(self.sentences)])
            over += len(pieces[-1])
        while pieces and over:
            cut = min(over, len(pieces[0]))
            pieces[0], over = pieces[0][cut:], over - cut
            pieces = [piece for piece in pieces if piece]
        return pieces

    def _frame(self, word: str) -> tuple[list[int], list[int]]:
        """Tokens before and after the haystack."""
        question, prefix = QUESTION.format(word=word), PREFIX.format(word=word)
        start: list[int] = []
        if self.config.chat:
            messages = [{"role": "user", "content": f"{INTRO}{HAYSTACK}{question}"}]
            text: Any = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            before, _, after = text.partition(HAYSTACK)
        else:
            before, after = INTRO, f"{question} "
            begin = self.tokenizer.bos_token_id
            if begin is not None and self.tokenizer("a").input_ids[0] == begin:
                start = [begin]
        return [*start, *self._ids(before)], self._after(".", f"{after}{prefix}")

    def _after(self, before: str, text: str) -> list[int]:
        """Tokens of `text` where it follows `before`: some tokenizers start a text with a space."""
        head, whole = self._ids(before), self._ids(before + text)
        return whole[len(head) :] if whole[: len(head)] == head else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _hide(
    filler: Sequence[list[int]], facts: Sequence[list[int]], depth: float, rng: random.Random
) -> tuple[list[int], int]:
    """Filler with the facts between its sentences, and where the first fact starts.

    The first fact goes to the boundary nearest to `depth`, the others to random ones.
    """
    ends = [0, *accumulate(map(len, filler))]
    nearest = min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))
    slots = [nearest, *(rng.randrange(len(ends)) for _ in facts[1:])]
    order = sorted(range(len(facts)), key=lambda fact: (slots[fact], rng.random()))
    pieces: list[int] = []
    start = 0
    for slot in range(len(ends)):
        for fact in order:
            if slots[fact] == slot:
                start = len(pieces) if fact == 0 else start
                pieces += facts[fact]
        if slot < len(filler):
            pieces += filler[slot]
    return pieces, start


def _sentences(filler: Filler) -> Sequence[str]:
    if filler == "noise":
        return NOISE
    articles = read_texts("default", "validation")
    found = [one.strip() for text in articles for one in re.split(r"(?<=[.!?])\s+|\n+", text)]
    return [one for one in found if one.endswith((".", "!", "?"))]
