"""Rows of new tokens by the compiled kernel, rows.c: numbers and codes in one call.

Torch takes a few dozen small operations a layer for the codes of one token.

Shapes: B batch, G KV head, N heads of one bucket, T token, D head dim, F = 2 D, [key | value],
C row columns, P columns without codes, Y bytes. In pages: K page, N token of a page, P and Y of all
heads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from matkv.codes import plain_bands
from matkv.latents.coding import Coder, row_layout
from matkv.latents.compiled import kernel

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Of a head: address, bytes to the next block and to the next token, of numbers and then of codes;
# then `row_layout` of key and value.
PLACES, HEAD = 6, 20
# With more tokens than this at once torch's matrix products are faster.
MOST_TOKENS = 64

Heads = ctypes.Array[ctypes.c_int64]
Layout = tuple[tuple[int, ...], ...]
Storage = tuple[int, int, torch.dtype]


class _Encoding(ctypes.Structure):
    """`struct encoding` of rows.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("states", "maps", "steps", "order", "heads")),
        *((name, ctypes.c_int64) for name in ("B", "G", "T", "D", "dtype", "map_dtype")),
        *((name, ctypes.c_int64) for name in ("state_b", "state_g", "state_t")),
        *((name, ctypes.c_int64) for name in ("gain_zero", "gain_steps")),
        ("slots", ctypes.c_void_p),
        ("page", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Paged:
    """Rows of many sequences' tokens in pages, as serving engines keep them.

    A token in slot s is at place s % N of page s // N: its columns without codes in `numbers_KNP`,
    in the model's dtype, and its bytes in `codes_KNY`, uint8. In both heads follow one another in
    the projection's order, each with its key and its value, as `row_layout` says; only the last
    axis must be dense, so both may be views of one buffer. `heads` tells the kernel all that.
    """

    numbers_KNP: Tensor
    codes_KNY: Tensor
    heads: Heads

    @classmethod
    def of(
        cls, numbers_KNP: Tensor, codes_KNY: Tensor, layout: Layout, storages: Sequence[Storage]
    ) -> Paged:
        """`storages` are a bucket's one or two, see `LayerProjection.storages`."""
        heads = heads_of(layout)
        planes = {False: (0, numbers_KNP), True: (3, codes_KNY)}
        places = {False: (0, numbers_KNP.data_ptr()), True: (0, codes_KNY.data_ptr())}
        for count, columns, dtype in storages:
            is_codes = dtype == torch.uint8
            first, plane = planes[is_codes]
            size, (page, token, dense) = plane.element_size(), plane.stride()
            assert dense == 1 or plane.shape[2] < 2, "columns are not dense"
            assert dtype == plane.dtype, f"pages hold {plane.dtype}, not {dtype}"
            g, address = places[is_codes]
            for one in range(g, g + count):
                start = HEAD * one + first
                heads[start : start + 3] = [address, page * size, token * size]
                address += columns * size
            places[is_codes] = g + count, address
        return cls(numbers_KNP, codes_KNY, heads)

    @classmethod
    def whole(cls, rows_KNGF: Tensor) -> Paged:
        """Keys and values at full width: to the kernel, heads of so many columns without codes."""
        G, F = rows_KNGF.shape[2:]
        layout = tuple(row_layout((plain_bands(F // 2), plain_bands(F // 2)))) * G
        none_KNY = rows_KNGF.new_empty(*rows_KNGF.shape[:2], 0, dtype=torch.uint8)
        return cls.of(rows_KNGF.flatten(2), none_KNY, layout, [(G, F, rows_KNGF.dtype)])

    @property
    def tokens(self) -> int:
        """N."""
        return self.numbers_KNP.shape[1]


def can_encode(coder: Coder, states_BGTF: Tensor) -> bool:
    """Whether `encode` takes these states, and is the faster way."""
    return (
        states_BGTF.device.type == "cpu"
        and states_BGTF.shape[0] * states_BGTF.shape[2] <= MOST_TOKENS
        and states_BGTF.dtype in DTYPES
        and coder.encode.dtype in DTYPES
        and coder.encode.dtype == coder.step.dtype
        and not torch.compiler.is_compiling()
        and kernel() is not None
    )


def encode(
    coder: Coder,
    states_BGTF: Tensor,
    order_G: Tensor,
    layout: Layout,
    storages: Sequence[Storage],
    buckets: Sequence[slice],
) -> list[Tensor]:
    """Rows of new tokens, heads in the model's order, as `LayerProjection.encode_states` gives."""
    B, _, T, _ = states_BGTF.shape
    rows = [torch.empty(B, heads, T, columns, dtype=dtype) for heads, columns, dtype in storages]
    heads = heads_of(layout)
    fill(heads, rows, buckets)
    _encode(coder, states_BGTF, order_G, heads)
    return rows


def encode_paged(
    coder: Coder, states_TGF: Tensor, order_G: Tensor, paged: Paged, slots_T: Tensor
) -> None:
    """`encode` into pages: every token into its slot, an int64."""
    states_BGTF, slots_T = states_TGF.transpose(0, 1)[None], slots_T.contiguous()
    assert slots_T.dtype == torch.int64, "slots are not int64"
    _encode(coder, states_BGTF, order_G, paged.heads, slots=slots_T.data_ptr(), page=paged.tokens)


def _encode(
    coder: Coder, states_BGTF: Tensor, order_G: Tensor, heads: Heads, **places: int
) -> None:
    found = kernel()
    assert found is not None
    states_BGTF = states_BGTF.detach()
    if states_BGTF.stride(3) != 1:
        states_BGTF = states_BGTF.contiguous()
    B, G, T, F = states_BGTF.shape
    state_b, state_g, state_t, _ = states_BGTF.stride()
    zero, steps = coder.gain_scale
    maps, step = coder.encode.contiguous(), coder.step.contiguous()
    call = _Encoding(
        states=states_BGTF.data_ptr(), maps=maps.data_ptr(), steps=step.data_ptr(),
        order=order_G.data_ptr(), heads=ctypes.addressof(heads),
        B=B, G=G, T=T, D=F // 2, dtype=DTYPES[states_BGTF.dtype], map_dtype=DTYPES[maps.dtype],
        state_b=state_b, state_g=state_g, state_t=state_t, gain_zero=zero, gain_steps=steps,
        **places,
    )  # fmt: skip
    if found.encode(ctypes.byref(call)):
        raise MemoryError("no memory to encode tokens")


def fill(heads: Heads, rows: Sequence[Tensor], buckets: Sequence[slice]) -> None:
    """Tell every head where its rows are: one tensor [BNTC] a bucket, two if there are codes."""
    kinds = len(rows) // len(buckets)
    for index, bucket in enumerate(buckets):
        for kind, row in enumerate(rows[kinds * index : kinds * (index + 1)]):
            address, size = row.data_ptr(), row.element_size()
            block, head, token, _ = row.stride()
            for n, g in enumerate(range(bucket.start, bucket.stop)):
                first = HEAD * g + 3 * kind
                heads[first : first + 3] = [address + n * head * size, block * size, token * size]


def heads_of(layout: Layout) -> Heads:
    """Places yet to be filled in, and the layout of every head."""
    template, number = _template(layout)
    return (ctypes.c_int64 * number).from_buffer_copy(template)


@lru_cache(maxsize=4096)
def _template(layout: Layout) -> tuple[bytes, int]:
    numbers = [
        number
        for key, value in zip(layout[::2], layout[1::2], strict=True)
        for number in (*(0,) * PLACES, *key, *value)
    ]
    return bytes((ctypes.c_int64 * len(numbers))(*numbers)), len(numbers)
