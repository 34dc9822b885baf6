"""Maps that are learned, many of them in one tensor, orthogonal by construction or free.

Shapes: D head dim, X matrices learned together, P parameters of a matrix.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from matkv.bases.maps import Maps
from matkv.errors import TrainingError

Parametrization = Literal["cayley", "exp", "householder", "free"]
PARAMETRIZATIONS: tuple[str, ...] = get_args(Parametrization)
# Adam's epsilon for these parameters. Turning columns that are kept or dropped together changes
# nothing; the gradient of such turns is rounding noise, about 1e-9 where others are 1e-3, and with
# the usual 1e-8 Adam would walk along it.
ADAM_EPSILON = 1e-6


class LearnedMaps(nn.Module):
    """Many pairs of D×D maps, learned in one tensor and starting exactly at given ones.

    cayley        U = U_start (I - A)(I + A)^-1, A skew-symmetric  (arXiv 2410.14731, section 4.1)
    exp           U = U_start exp(A), A skew-symmetric
    householder   U = U_start times a product of D reflections
    free          encode_start + E and decode_start + F, not orthogonal

    The orthogonal ones learn the strict lower triangle, from zero. Everything is computed in fp32,
    whatever autocast says.

    Raises:
        TrainingError: `kind` is orthogonal and the start is not.
    """

    start_XDD: Tensor
    decode_start_XDD: Tensor

    def __init__(self, start: Maps, kind: Parametrization) -> None:
        super().__init__()
        self.kind: Parametrization = kind
        matrices, dim = start.encode_XDD.shape[:2]
        self.register_buffer("start_XDD", start.encode_XDD.float(), persistent=False)
        if kind == "free":
            self.register_buffer("decode_start_XDD", start.decode_XDD.float(), persistent=False)
            self.encode_XDD = nn.Parameter(torch.zeros(matrices, dim, dim))
            self.decode_XDD = nn.Parameter(torch.zeros(matrices, dim, dim))
            return
        if not start.is_orthogonal:
            raise TrainingError(
                f"parametrization {kind} needs an orthogonal start, these bases were trained free: "
                "start from a calibrated artifact, or go on with parametrization free"
            )
        self.lower_XP = nn.Parameter(torch.zeros(matrices, dim * (dim - 1) // 2))

    def forward(self) -> Maps:
        """The maps as they are now, [XDD], differentiable."""
        with torch.autocast(self.start_XDD.device.type, enabled=False):
            if self.kind == "free":
                encode_XDD = self.start_XDD + self.encode_XDD
                return Maps(encode_XDD, self.decode_start_XDD + self.decode_XDD)
            lower_XDD = strict_lower(self.lower_XP, self.start_XDD.shape[-1])
            return Maps.orthogonal(self.start_XDD @ rotation(lower_XDD, self.kind))

    @torch.no_grad()
    def export(self) -> Maps:
        """The maps in fp32 on the CPU, the orthogonal ones orthogonal to rounding."""
        if self.kind == "free":
            return self.forward().changed(Tensor.cpu)
        lower_XDD = strict_lower(self.lower_XP.cpu().double(), self.start_XDD.shape[-1])
        basis_XDD = self.start_XDD.cpu().double() @ rotation(lower_XDD, self.kind)
        return Maps.orthogonal(nearest_orthogonal(basis_XDD).float())


def rotation(lower_XDD: Tensor, kind: Parametrization) -> Tensor:
    """The orthogonal matrix that a strict lower triangle stands for; zero is I.  [XDD -> XDD]"""
    if kind == "householder":
        # Reflections at e_i + a_i; at a = 0 their product is -I.
        tau_XD = 2 / (1 + lower_XDD.square().sum(-2))
        reflected_XDD: Tensor = torch.linalg.householder_product(lower_XDD, tau_XD)
        return -reflected_XDD
    skew_XDD = lower_XDD - lower_XDD.mT
    if kind == "exp":
        exponential_XDD: Tensor = torch.linalg.matrix_exp(skew_XDD)
        return exponential_XDD
    eye_DD = torch.eye(skew_XDD.shape[-1], dtype=skew_XDD.dtype, device=skew_XDD.device)
    # (I - A)(I + A)^-1 = 2 (I + A)^-1 - I: one factorization, and matrix products backwards.
    inverse_XDD: Tensor = torch.linalg.inv(eye_DD + skew_XDD)
    return 2 * inverse_XDD - eye_DD


def strict_lower(lower_XP: Tensor, dim: int) -> Tensor:
    """Put parameters below the diagonal.  [XP -> XDD]"""
    row_P, column_P = torch.tril_indices(dim, dim, -1, device=lower_XP.device)
    empty_XE = lower_XP.new_zeros(lower_XP.shape[0], dim * dim)
    index_XP = (row_P * dim + column_P).expand_as(lower_XP)
    lower_XDD: Tensor = empty_XE.scatter(1, index_XP, lower_XP).unflatten(1, (dim, dim))
    return lower_XDD


def nearest_orthogonal(basis_XDD: Tensor) -> Tensor:
    """The orthogonal matrices nearest to almost orthogonal ones (polar factor, by Newton-Schulz).

    Raises:
        TrainingError: a matrix is not finite or far from orthogonal.
    """
    eye_DD = torch.eye(basis_XDD.shape[-1], dtype=basis_XDD.dtype, device=basis_XDD.device)
    for _ in range(3):
        gram_XDD = basis_XDD.mT @ basis_XDD
        if not float((gram_XDD - eye_DD).abs().max()) < 0.1:
            raise TrainingError("a basis has lost its orthogonality: train with a smaller lr")
        basis_XDD = basis_XDD @ (1.5 * eye_DD - 0.5 * gram_XDD)
    return basis_XDD
