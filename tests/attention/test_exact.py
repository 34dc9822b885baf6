"""Exact tokens beside latents: all at once, in pieces, with padding, and in blocks.

Shapes: B batch, H query head, G KV head, Q query, T token, D head dim.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from explicit import attend_explicit
from matkv.attention import exact
from matkv.attention import parts as parts
from matkv.attention.latent import attend
from matkv.attention.masks import seen_slots
from matkv.cache.exact import ExactTokens
from matkv.cache.layer import LatentLayer, note_padding
from matkv.latents.layer import LayerProjection
from tiny import largest_difference, random_maps

B, G, J, T, D = 2, 3, 2, 41, 8
SCALING = 0.4
KEY, VALUE = random_maps(G, D, 1), random_maps(G, D, 2)
RANKS = (0, 3, 5), (0, 4, 2)  # one head keeps nothing
SIZES = pytest.mark.parametrize(
    ("sink", "recent"), [(3, 0), (0, 1), (0, 5), (3, 5), (2, 16), (0, 60), (60, 3)]
)


def states() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    key_BGTD, value_BGTD = torch.randn(2, B, G, T, D, generator=generator)
    return torch.randn(B, G * J, T, D, generator=generator), key_BGTD, value_BGTD


def layer(sink: int, recent: int) -> LatentLayer:
    return LatentLayer(LayerProjection(KEY, VALUE, *RANKS, sink=sink, recent=recent))


def causal(padding: tuple[int, ...] = (0,) * B) -> Tensor:
    """[B 1 T T], with these numbers of positions of padding on the left."""
    mask = torch.ones(T, T, dtype=torch.bool).tril().repeat(B, 1, 1, 1)
    for row, length in enumerate(padding):
        mask[row, :, :, :length] = False
    return mask


def attend_in_pieces(cache: LatentLayer, sizes: list[int], mask: Tensor | None) -> Tensor:
    query, key, value = states()
    outs, first = [], 0
    for size in sizes:
        place = slice(first, first := first + size)
        if mask is not None:
            note_padding([cache], seen_slots(mask[:, :, place, :first]), B, size)
        latents, _ = cache.update(key[:, :, place], value[:, :, place])
        piece = None if mask is None else mask[:, :, place, :first]
        out = attend(latents, query[:, :, place], piece, scaling=SCALING)
        expected = attend_explicit(latents, query[:, :, place], piece, scaling=SCALING)
        seen = torch.ones(B, size, dtype=torch.bool)
        if piece is not None:
            seen = (piece if piece.dtype == torch.bool else piece == 0).any(-1)[:, 0].expand(B, -1)
        assert bool(out.isfinite().all())
        assert largest_difference(*(x.transpose(1, 2)[seen] for x in (out, expected))) < 1e-5
        outs.append(out)
    return torch.cat(outs, dim=2)


@SIZES
@pytest.mark.parametrize("block", [2, 7, 64])
def test_pieces_of_any_size_give_what_all_at_once_gives(
    sink: int, recent: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "BLOCK", block)
    whole = attend_in_pieces(layer(sink, recent), [T], None)
    for sizes in ([1, 1, 9, 1, 20, 1, 8], [2, 3, 1, 1, 34], [1] * T):
        for mask in (None, causal()):
            in_pieces = attend_in_pieces(layer(sink, recent), sizes, mask)
            assert largest_difference(in_pieces, whole) < 1e-5


@SIZES
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_padding_is_not_attended_and_sinks_come_after_it(
    sink: int, recent: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "BLOCK", 4)
    padding = (0, 6)
    mask = causal(padding)
    if kind == "additive":
        mask = torch.where(mask, 0.0, -torch.inf)
    for sizes in ([T], [3, 1, 12, 25], [9] + [1] * 32):
        cache = layer(sink, recent)
        out = attend_in_pieces(cache, sizes, mask)
        query, key, value = (x[1:, :, padding[1] :] for x in states())
        latents, _ = layer(sink, recent).update(key, value)
        alone = attend(latents, query, None, scaling=SCALING)
        assert largest_difference(out[1:, :, padding[1] :], alone) < 1e-5


def looking_ahead(kind: str) -> Tensor:
    """[B|1 1 T T]: a prefix that sees all of itself, an image within a text, or at random.

    Where nothing sees beyond token 31, the others can be fed later.
    """
    mask = causal()[:1]
    if kind == "prefix":
        mask[..., :9, :9] = True
    elif kind == "image":
        mask[..., 12:30, 12:30] = True
    else:
        generator = torch.Generator().manual_seed(6)
        mask = torch.rand(B, 1, T, T, generator=generator) < 0.3
        mask |= torch.eye(T, dtype=torch.bool)
        mask[..., :31, 31:] = False
    return mask


@SIZES
@pytest.mark.parametrize("kind", ["prefix", "image", "random"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_may_let_a_query_see_later_tokens(
    sink: int, recent: int, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "BLOCK", 4)
    mask = looking_ahead(kind)
    given = mask if dtype == torch.bool else torch.where(mask, 0.0, -torch.inf)
    attend_in_pieces(layer(sink, recent), [T], given)
    attend_in_pieces(layer(sink, recent), [31, 1, 9], given)
    full = LatentLayer(LayerProjection(KEY, VALUE, (D,) * G, (D,) * G, sink=sink, recent=recent))
    query, key, value = states()
    out = attend(full.update(key, value)[0], query, given, scaling=SCALING)
    key, value = (x.repeat_interleave(J, 1) for x in (key, value))
    plain = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALING)
    assert largest_difference(out, plain) < 1e-5


@SIZES
def test_explicit_parts_are_those_of_the_fused_attention(sink: int, recent: int) -> None:
    """Where gradients flow, off the CPU and with dropout; in blocks of queries, too."""
    query, key, value = states()
    latents, _ = layer(sink, recent).update(key, value)
    fused = attend(latents, query, None, scaling=SCALING)
    for most in (1 << 25, B * G * T * 5):
        with mock.patch.object(parts, "MAX_SCORES", most):
            explicit = attend(latents, query.requires_grad_(), None, scaling=SCALING)
        assert largest_difference(explicit.detach(), fused) < 1e-5
    explicit.sum().backward()
    assert query.grad is not None and bool(query.grad.isfinite().all())


def test_a_window_slides_through_its_buffer_and_rarely_moves() -> None:
    tokens = ExactTokens(0, 8)
    moves, place = 0, 0
    for first in range(500):
        state = torch.full((1, 1, 1, 4), float(first))
        seen, turned = tokens.append(state, first, keep_all=False)
        expected = list(range(max(0, first - 8), first + 1))
        assert seen.recent_BGKF[0, 0, :, 0].tolist() == expected
        assert turned[0, 0, :, 0].tolist() == ([first - 8] if first >= 8 else [])
        moves += tokens.tensors[1].data_ptr() != place
        place = tokens.tensors[1].data_ptr()
    assert moves <= 500 / (8 // 2 + 16) + 1
    assert tokens.used_nbytes(500) == 8 * 4 * 4


def test_exact_tokens_cost_no_mask_at_decoding() -> None:
    cache: Any = layer(2, 4)
    query, key, value = states()
    cache.update(key, value)
    latents, _ = cache.update(key[:, :, :1], value[:, :, :1])
    with mock.patch.object(exact, "near_mask", side_effect=AssertionError):
        attend(latents, query[:, :, :1], None, scaling=SCALING)
