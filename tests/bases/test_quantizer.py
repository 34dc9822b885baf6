"""Quantizers: fitted steps, measured errors, and gradients that pass by the rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from matkv.bases.quantizer import fit, gain_codes, gains, levels_of, requantized
from matkv.codes import CODED


@pytest.fixture(scope="module", name="latents_GND")
def heavy_latents() -> Tensor:
    """Heavy-tailed over tokens, columns of falling size."""
    generator = torch.Generator().manual_seed(0)
    z_GND = torch.randn(2, 600, 8, generator=generator)
    size_GN1 = torch.randn(2, 600, 1, generator=generator).exp()
    return z_GND * size_GN1 * torch.logspace(1, -1, 8)


def test_errors_are_those_of_the_trip_and_fall_with_the_width(latents_GND: Tensor) -> None:
    quantizer = fit(latents_GND)
    for width, error_GD in zip(CODED, quantizer.error_WGD, strict=True):
        widths_GD = torch.full((2, 8), width)
        back_GND = requantized(quantizer, latents_GND[None], widths_GD)[0]
        torch.testing.assert_close((back_GND - latents_GND).square().mean(1), error_GD)
    eight, four, two = quantizer.error_WGD / quantizer.scale_GD.square()
    assert bool((eight < four / 50).all() and (four < two / 5).all() and (two < 0.3).all())


def test_a_column_of_16_bits_stays_and_one_of_none_is_zero(latents_GND: Tensor) -> None:
    quantizer = fit(latents_GND)
    widths_GD = torch.tensor([[16] * 4 + [0] * 4] * 2)
    back_GND = requantized(quantizer, latents_GND[None], widths_GD)[0]
    torch.testing.assert_close(back_GND[..., :4], latents_GND[..., :4])
    assert not bool(back_GND[..., 4:].any())


def test_every_sequence_may_have_its_own_widths(latents_GND: Tensor) -> None:
    quantizer, z_BGTD = fit(latents_GND), latents_GND[None].repeat(2, 1, 1, 1)
    widths_BGD = torch.stack([torch.full((2, 8), width) for width in (8, 2)])
    both = requantized(quantizer, z_BGTD, widths_BGD)
    for one, widths_GD in zip(both, widths_BGD, strict=True):
        alone = requantized(quantizer, latents_GND[None], widths_GD)[0]
        torch.testing.assert_close(one, alone)


def test_gradients_pass_by_the_rounding_but_not_through_dropped_columns(
    latents_GND: Tensor,
) -> None:
    z_BGTD = latents_GND[None].clone().requires_grad_()
    widths_GD = torch.tensor([[8, 8, 4, 4, 2, 2, 0, 0]] * 2)
    requantized(fit(latents_GND), z_BGTD, widths_GD).sum().backward()
    assert z_BGTD.grad is not None
    kept_BGTD = (widths_GD > 0).float()[None, :, None].expand_as(z_BGTD)
    torch.testing.assert_close(z_BGTD.grad, kept_BGTD)


def test_a_gain_of_a_byte_is_within_five_percent_and_survives_zeros() -> None:
    y = torch.tensor([[1.0, -3.0], [1e-4, 2e-4], [0.0, 0.0], [9e3, 1.0]])
    back = gains(gain_codes(y))[:, 0]
    assert bool(((back / y.abs().amax(-1) - 1).abs()[[0, 1, 3]] < 0.05).all())
    assert bool(back.isfinite().all() and (back > 0).all())


def test_scales_follow_new_bases(latents_GND: Tensor) -> None:
    quantizer = fit(latents_GND)
    moment_GDD = latents_GND.mT @ latents_GND / latents_GND.shape[1]
    turn_GDD = torch.linalg.qr(torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1)))[0]
    turned = quantizer.rescaled(moment_GDD, turn_GDD)
    torch.testing.assert_close(turned.scale_GD, fit(latents_GND @ turn_GDD).scale_GD)
    assert torch.equal(turned.step_WGD, quantizer.step_WGD)


@pytest.mark.parametrize("width", CODED)
def test_codes_are_as_many_as_the_width_holds(width: int) -> None:
    low, high = levels_of(width)
    assert high - low + 1 == 2**width and low + 0.5 == -(high + 0.5)
