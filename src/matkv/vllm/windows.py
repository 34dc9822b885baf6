"""Which pages of exact tokens a request needs."""

from __future__ import annotations

from dataclasses import dataclass

# Another request can go on from every so many tokens of a prompt it shares.
CHECKPOINT = 512


@dataclass(frozen=True)
class Windows:
    """Pages of `size` tokens, of which the first `sink` and the last `recent` are read.

    Another request may go on from a multiple of `grain` tokens.
    """

    size: int
    sink: int
    recent: int
    grain: int

    @property
    def sinks(self) -> int:
        """Pages of the first tokens."""
        return -(-self.sink // self.size)

    def before(self, tokens: int) -> int:
        """Pages that no token after so many reads any more, sinks apart."""
        return max(0, tokens - self.recent) // self.size

    def read_after(self, tokens: int) -> list[int]:
        """The pages that the token after so many reads, the last ones first."""
        last = -(-tokens // self.size)
        recent = range(self.before(tokens), last) if self.recent else range(0)
        return sorted({*range(min(self.sinks, last)), *recent}, reverse=True)

    def needs(self, page: int, tokens: int) -> bool:
        """Whether a page is kept once a request has so many tokens, being new among them."""
        if page < self.sinks:
            return True
        if not self.recent:
            return False
        # The last place before the newest token from where the same prompt may go on.
        if page >= self.before((tokens - 1) // self.grain * self.grain):
            return True
        # The window before a checkpoint: some token of the page is less than `recent` before one.
        first, last = page * self.size, (page + 1) * self.size - 1
        checkpoint = -(-(first + 1) // CHECKPOINT) * CHECKPOINT
        return last >= checkpoint - self.recent

    def most(self, new: int, longest: int) -> int:
        """The most pages that a request has, with `new` tokens in one step."""
        held = self.sinks
        if self.recent:
            before, after = (
                -(-tokens // self.size) + 1 for tokens in (self.recent, self.recent + self.grain)
            )
            held += before + after + before * -(-new // CHECKPOINT)
        return min(held, -(-longest // self.size) + 1)
