"""What is measured with: token ids alone, so that every environment gets the same.

Shapes: T token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

Ids = list[int]


@dataclass(frozen=True, kw_only=True)
class Material:
    """The items of one column of the table.

    `count` of them are wanted; `data` tells them apart from others of the same name, whatever
    their number: a larger `count` only adds items.
    """

    column: str
    data: str
    count: int

    kind = ""

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind} | asdict(self)


@dataclass(frozen=True, kw_only=True)
class Text(Material):
    """Windows of a text: `context` tokens are read, the others predicted in chunks of `chunk`.

    `reference` is a folder with what the full cache predicted.
    """

    windows: list[Ids]
    context: int
    chunk: int
    reference: str

    kind = "text"


@dataclass(frozen=True, kw_only=True)
class Haystack:
    """A prompt, and the answer to find."""

    prompt: Ids
    answer: Ids


@dataclass(frozen=True, kw_only=True)
class Retrieval(Material):
    """Prompts that hide an answer; `slack` tokens may be written beside it."""

    prompts: list[Haystack]
    slack: int = 4

    kind = "retrieval"


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question, its choices and the right one.

    `question` is read once and the choices after it; where choices differ in what comes first,
    `question` is empty and `scored` says how many tokens at the end of a choice count.
    """

    question: Ids
    choices: list[Ids]
    scored: list[int]
    gold: int


@dataclass(frozen=True, kw_only=True)
class Block:
    """Items that share one text of solved items before the question."""

    shots: Ids
    items: list[Item]


@dataclass(frozen=True, kw_only=True)
class Task(Material):
    """Few-shot questions; item i is in block i // `block`."""

    blocks: list[Block]
    block: int

    kind = "task"


@dataclass(frozen=True, kw_only=True)
class Footprint(Material):
    """A text to read: `few` tokens and all of them for bytes a token, `prompt` of them for time."""

    tokens: Ids
    few: int
    prompt: int
    steps: int

    kind = "footprint"


KINDS: dict[str, type[Material]] = {one.kind: one for one in (Text, Retrieval, Task, Footprint)}
_PARTS: dict[str, Any] = {
    "prompts": lambda its: [Haystack(**one) for one in its],
    "blocks": lambda its: [
        Block(shots=one["shots"], items=[Item(**item) for item in one["items"]]) for one in its
    ],
}


def from_json(content: dict[str, Any]) -> Material:
    """Inverse of `Material.to_json`."""
    fields = {
        name: _PARTS.get(name, lambda value: value)(value)
        for name, value in content.items()
        if name != "kind"
    }
    return KINDS[content["kind"]](**fields)
