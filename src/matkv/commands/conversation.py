"""A conversation with an attached model, whose cache is kept from turn to turn."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from matkv.cache.cache import LatentCache
from matkv.errors import CacheError
from matkv.evaluate.samples import chat_ids, generate
from matkv.hf.attach import attached_table, attachment_of
from matkv.hf.shrink import shrink
from matkv.ranks import RankTable


class AnswerStream(TextStreamer):
    """Prints an answer as it comes, without special tokens, and keeps the tokens that came."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.came: list[int] = []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.came += value.flatten().tolist()
        super().put(value)  # type: ignore[no-untyped-call]


class Conversation:
    """Turns of a user and a model, and the cache of what was read of them.

    The template is applied to all turns anew each time, so that it may rewrite what was said
    before. What it rewrote is read again: from there on where the cache can be cropped so far, else
    from the start.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.turns: list[dict[str, str]] = []
        self.cache = LatentCache(model)
        self.read: list[int] = []

    def reset(self) -> None:
        """Start anew."""
        self.turns.clear()
        self._forget()

    def shrink(self, most: int) -> RankTable | None:
        """Go on at the largest stored budget at which the cache has `most` bytes, or the smallest.

        Returns its table; None where there is no smaller budget.
        """
        attachment = attachment_of(self.model)
        assert attachment is not None
        table = None
        for budget, smaller in sorted(attachment.artifact.tables.items(), reverse=True):
            if smaller.budget < attached_table(self.model).budget:
                table = shrink(self.model, self.cache, budget)
                if self.cache.used_nbytes <= most:
                    break
        return table

    def answer(self, said: str) -> str:
        """Print the model's answer while it comes and keep it as a turn; Ctrl-C cuts it short.

        Raises:
            MatkvError: the conversation cannot be read; the turn is taken back.
        """
        self.turns.append({"role": "user", "content": said})
        stream = AnswerStream(self.tokenizer)
        try:
            self._generate(stream)
        except KeyboardInterrupt:
            stream.end()  # type: ignore[no-untyped-call]
            self._forget()  # some layers may hold a token that others lack
            if not stream.came:
                self.turns.pop()
                return ""
        except BaseException:
            self._forget()
            self.turns.pop()
            raise
        reply = str(self.tokenizer.decode(stream.came, skip_special_tokens=True))
        self.turns.append({"role": "assistant", "content": reply})
        return reply

    def _generate(self, stream: AnswerStream) -> None:
        ids = chat_ids(self.tokenizer, self.turns)
        # One token at least is left to read: the answer starts from its logits.
        self._rewind(min(_common_prefix(self.read, ids), len(ids) - 1))
        sampling: dict[str, Any] = {"temperature": self.temperature, "seed": self.seed}
        generate(
            self.model, self.tokenizer, ids, self.cache, stream, self.max_new_tokens, **sampling
        )
        self.read = [*ids, *stream.came][: self.cache.get_seq_length()]

    def _rewind(self, length: int) -> None:
        """Keep the first `length` tokens of the cache, or none where it cannot go back so far."""
        removed = len(self.read) - max(0, length)
        if not removed:
            return
        try:
            self.cache.crop(-removed)
        except CacheError:  # recent exact tokens, or a sliding window's, are gone
            self._forget()

    def _forget(self) -> None:
        self.cache.reset()
        self.read = []


def _common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens two sequences share."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
