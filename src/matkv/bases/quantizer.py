"""Quantizers: the static scale and steps of every column's codes, fitted to real latents.

    y = z / scale                     every column of mean square one
    code = floor(y / (gain step))     gain: the largest |y| of the head's columns, one a token
    z' = gain step (code + ½) scale

The gain follows the size of a token, for latents are heavy-tailed over tokens; being of all columns
of a head, it does not depend on which of them a table keeps.

Shapes: G KV head, N token, D head dim, W width in bits: 8, 4, 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from matkv.codes import CODED

# A gain is 2^(code / 8 - 16): codes of a byte span 2^-16 to 2^16 in steps of 9%.
GAIN_STEPS, GAIN_ZERO = 8, 128
# Steps tried, as multiples of what reaches half of the largest column.
HALF_STEPS = {8: 2**-8, 4: 2**-4, 2: 2**-2}
TRIED = 21
TINY = 1e-12


@dataclass(frozen=True)
class Quantizer:
    """One side of one layer; all in fp32.

    `scale_GD` is the root mean square of the latents it was fitted to, `step_WGD` is in units of
    it. `error_WGD` is the mean squared error of a column's codes at each width on these latents; of
    a dropped column it is the square of the scale.
    """

    scale_GD: Tensor
    step_WGD: Tensor
    error_WGD: Tensor

    def changed(self, change: Callable[[Tensor], Tensor]) -> Quantizer:
        """Every tensor changed alike."""
        return Quantizer(*(change(getattr(self, one.name)) for one in fields(self)))

    def rescaled(self, moment_GDD: Tensor, encode_GDD: Tensor) -> Quantizer:
        """The same steps for other bases, of states with this second moment.  [GDD, GDD]"""
        square_GD = torch.einsum("gdr,gde,ger->gr", encode_GDD, moment_GDD, encode_GDD)
        return replace(self, scale_GD=square_GD.clamp_min(TINY**2).sqrt())


def levels_of(width: int) -> tuple[int, int]:
    """The smallest and the largest code of a width; the value of a code is code + ½ steps."""
    half = 1 << (width - 1)
    return -half, half - 1


def gain_codes(y: Tensor) -> Tensor:
    """The gain of tokens as a byte: the largest of their columns.  [...D -> ...1], uint8"""
    size = y.abs().amax(-1, keepdim=True).clamp_min(TINY)
    return (size.log2() * GAIN_STEPS).round().add(GAIN_ZERO).clamp(0, 255).to(torch.uint8)


def gains(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gains from their bytes."""
    return ((codes.float() - GAIN_ZERO) / GAIN_STEPS).exp2().to(dtype)


def coded(y: Tensor, step: Tensor | float, width: int) -> Tensor:
    """Codes of coordinates over their gain, as whole numbers in y's dtype."""
    return (y / step).floor().clamp(*levels_of(width))


def requantized(quantizer: Quantizer, z_BGTD: Tensor, width_XGD: Tensor) -> Tensor:
    """Latents after a trip through codes of some widths, [GD] or one table a sequence [BGD].

    A column of width 16 stays as it is, one of width 0 becomes zero. Gradients pass by the
    rounding as if it were not there.
    """
    width_XG1D = width_XGD[..., :, None, :]
    scale_G1D = quantizer.scale_GD[:, None]
    y_BGTD = z_BGTD.float() / scale_G1D
    with torch.no_grad():
        gain_BGT1 = gains(gain_codes(y_BGTD))
        back_BGTD = torch.where(width_XG1D == 16, y_BGTD, 0.0)
        for width, step_GD in zip(CODED, quantizer.step_WGD, strict=True):
            is_width = width_XG1D == width
            if bool(is_width.any()):
                step_BGTD = step_GD[:, None] * gain_BGT1
                coded_BGTD = (coded(y_BGTD, step_BGTD, width) + 0.5) * step_BGTD
                back_BGTD = torch.where(is_width, coded_BGTD, back_BGTD)
    if y_BGTD.requires_grad:
        kept_BGTD = torch.where(width_XG1D > 0, y_BGTD, 0.0)
        back_BGTD = kept_BGTD + (back_BGTD - kept_BGTD).detach()
    return (back_BGTD * scale_G1D).to(z_BGTD.dtype)


def fit(latents_GND: Tensor) -> Quantizer:
    """The quantizer of a layer's side from some tokens' latents, steps of least squared error."""
    z_GND = latents_GND.float()
    scale_GD = z_GND.square().mean(1).sqrt().clamp_min(TINY)
    y_GND = z_GND / scale_GD[:, None]
    gain_GN1 = gains(gain_codes(y_GND))
    unit_GND = y_GND / gain_GN1
    steps, errors = [], []
    for width in CODED:
        best_GD = torch.full_like(scale_GD, torch.inf)
        step_GD = torch.ones_like(scale_GD)
        for power in torch.linspace(-2, 2, TRIED).tolist():
            step = HALF_STEPS[width] * 2**power
            back_GND = (coded(unit_GND, step, width) + 0.5) * step * gain_GN1
            error_GD = (back_GND - y_GND).square().mean(1)
            is_better_GD = error_GD < best_GD
            step_GD = torch.where(is_better_GD, step, step_GD)
            best_GD = torch.minimum(error_GD, best_GD)
        steps.append(step_GD)
        errors.append(best_GD * scale_GD.square())
    return Quantizer(scale_GD, torch.stack(steps), torch.stack(errors))
