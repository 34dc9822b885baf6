"""What of a model's weights tells it from another: a few numbers of every attention module.

Shapes: P picked weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLES, DIGITS = 8, 7


def picks(size: int) -> Tensor:
    """Which numbers of the first weight of a module, of so many: evenly spread.  [P]"""
    # Whatever the default dtype is: vLLM makes it the model's.
    return torch.linspace(0, size - 1, SAMPLES, dtype=torch.float32).long()


def rounded(weights_P: Tensor) -> list[float]:
    """Picked weights as they are kept."""
    return [round(one, DIGITS) for one in weights_P.tolist()]
