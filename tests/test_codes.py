"""What latents cost at a width in bits."""

from __future__ import annotations

import pytest

from matkv.codes import bands_of, code_bytes, has_codes, plain_bands, row_bytes, widths_of


def test_plain_columns_cost_the_dtype_and_nothing_else() -> None:
    assert plain_bands(5) == (5, 0, 0, 0)
    assert not has_codes(plain_bands(5))
    assert row_bytes(plain_bands(5), 2) == 10
    assert row_bytes(plain_bands(5), 4) == 20


@pytest.mark.parametrize(
    ("bands", "nbytes"),
    [
        ((0, 0, 0, 0), 0),
        ((0, 1, 0, 0), 2),
        ((0, 0, 1, 0), 2),
        ((0, 0, 3, 0), 3),
        ((0, 0, 0, 1), 2),
        ((0, 0, 0, 5), 3),
        ((2, 3, 5, 7), 1 + 3 + 3 + 2),
    ],
)
def test_codes_cost_whole_bytes_a_band_and_one_for_the_gain(
    bands: tuple[int, int, int, int], nbytes: int
) -> None:
    assert code_bytes(bands) == nbytes
    assert row_bytes(bands, 2) == nbytes + 2 * bands[0]


def test_bands_and_widths_say_the_same() -> None:
    widths = [16, 8, 8, 4, 2, 2, 2]
    assert bands_of([*widths, 0, 0]) == (1, 2, 1, 3)
    assert widths_of((1, 2, 1, 3)) == widths


@pytest.mark.parametrize("widths", [[4, 8], [0, 2], [16, 3], [1]])
def test_widths_never_rise_and_are_known(widths: list[int]) -> None:
    with pytest.raises(ValueError, match="never rise"):
        bands_of(widths)
