"""Rows of new tokens by the compiled kernel against those by torch.

Shapes: B batch, G KV head, T token, D head dim.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from layers import BANDS, banded
from matkv.latents import compiled, native
from matkv.latents import layer as layers
from matkv.ranks import LayerBands
from one_query import D, G


@pytest.fixture(params=[*compiled.INSTRUCTIONS, "DEFAULT"])
def instructions(request: pytest.FixtureRequest) -> str:
    if compiled.kernel() is None:
        pytest.skip(f"no compiled kernel: {compiled.trouble()}")
    able, known = torch.backends.cpu.get_cpu_capability(), [*compiled.INSTRUCTIONS, "DEFAULT"]
    if request.param not in known[known.index(able) if able in known else -1 :]:
        pytest.skip(f"this processor, or torch on it, has no {request.param}")
    return str(request.param)


@pytest.mark.parametrize("bands", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_those_of_torch(
    instructions: str, bands: tuple[LayerBands, LayerBands], dtype: torch.dtype
) -> None:
    """All but codes of coordinates that sums in another order put over an edge."""
    projection = banded(bands).to(dtype)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, G, 4, 2 * D, generator=generator)
    states *= torch.rand(2, G, 4, 1, generator=generator) * 3
    states[0, :, 0] = 0  # as padding may be
    states = states.to(dtype)
    with mock.patch.object(layers, "can_encode", lambda *_: False):
        expected = projection.encode_states(states)
    one = compiled.built(instructions)
    with mock.patch.object(native, "kernel", lambda: one):
        assert native.can_encode(projection.coder, states)  # type: ignore[arg-type]
        rows = projection.encode_states(states)
        apart = projection.encode_states(states.mT.contiguous().mT)  # another layout, by torch
    assert all(map(torch.equal, rows, apart))
    differing = total = 0
    for own, other in zip(rows, expected, strict=True):
        assert (own.shape, own.dtype) == (other.shape, other.dtype)
        if own.dtype == torch.uint8:
            differing, total = differing + int((own != other).sum()), total + own.numel()
        else:
            torch.testing.assert_close(
                own, other, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-5
            )
    assert differing <= 0.002 * total


def test_many_tokens_are_left_to_torch() -> None:
    projection = banded(BANDS["mixed"])
    states = torch.zeros(2, G, native.MOST_TOKENS, 2 * D)
    assert not native.can_encode(projection.coder, states)  # type: ignore[arg-type]
