"""Which pages of exact tokens are there: whatever a token reads, and few more."""

from __future__ import annotations

import random

import pytest

from matkv.vllm.windows import CHECKPOINT, Windows


@pytest.mark.parametrize("size", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("sink", [0, 1, 4, 20])
@pytest.mark.parametrize("recent", [0, 1, 8, 32, 100])
def test_a_request_has_what_it_reads_and_no_more_than_is_promised(
    size: int, sink: int, recent: int
) -> None:
    windows, rng = Windows(size, sink, recent, 64), random.Random(size)
    longest = 3000
    for most in (1, 7, 600, 2048):
        held: set[int] = set()
        pages = tokens = 0
        while tokens < longest:
            assert held.issuperset(windows.read_after(tokens)), "what the next token reads is gone"
            new = min(rng.randint(1, most), longest - tokens)
            held = {one for one in held if one < windows.sinks or one >= windows.before(tokens)}
            tokens += new
            total = -(-tokens // size)
            held |= {one for one in range(pages, total) if windows.needs(one, tokens)}
            pages = max(pages, total)
            assert len(held) <= windows.most(most, longest)


def test_every_token_that_is_exact_has_its_page() -> None:
    windows = Windows(4, 6, 10, 16)
    for tokens in range(1, 60):
        read = {*range(min(6, tokens)), *range(max(0, tokens - 10), tokens)}
        assert {token // 4 for token in read} == {*windows.read_after(tokens)}


def test_a_prompt_leaves_windows_from_which_another_goes_on() -> None:
    windows = Windows(4, 4, 32, 16)
    kept = {one for one in range(2000 // 4) if windows.needs(one, 2000)}
    for checkpoint in range(CHECKPOINT, 2000, CHECKPOINT):
        assert kept.issuperset(windows.read_after(checkpoint))
    # Of the last window, 16 tokens more: the prompt may be given again, up to its last token.
    assert kept.issuperset(windows.read_after(1984))
    assert len(kept) == 1 + 3 * 8 + 12
