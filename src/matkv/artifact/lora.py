"""Low-rank adapters as PEFT stores them, so that PEFT can load them from an artifact.

Shapes: M input dim, N output dim, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from matkv.files import save_tensors

LORA_CONFIG, LORA_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
WRAPPER = "base_model.model."  # before every name


@dataclass(frozen=True)
class Lora:
    """PEFT's adapter configuration, and its tensors by PEFT's names."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def __str__(self) -> str:
        maps = sum(name.endswith(DOWN) for name in self.tensors)
        return f"rank {self.config.get('r')} in {maps} linear maps"

    @property
    def paths(self) -> list[str]:
        """The names of the linear maps, as the model with its head has them."""
        names = (name for name in self.tensors if name.endswith(DOWN))
        return [name.removeprefix(WRAPPER).removesuffix(DOWN) for name in names]

    def update(self, path: str) -> Tensor:
        """What to add to the weight of a linear map, in fp32.  [NM]

        W' = W + alpha/r B A  (arXiv 2106.09685)
        """
        scale = self.config["lora_alpha"] / self.config["r"]
        up_NR, down_RM = (self.tensors[f"{WRAPPER}{path}{part}"] for part in (UP, DOWN))
        update_NM: Tensor = scale * (up_NR.float() @ down_RM.float())
        return update_NM

    def updates(self) -> Iterator[tuple[str, Tensor]]:
        """Every linear map's name and update."""
        return ((path, self.update(path)) for path in self.paths)

    def write(self, directory: Path) -> None:
        directory.mkdir()
        text = json.dumps(self.config, indent=1)
        (directory / LORA_CONFIG).write_text(text, encoding="utf-8")
        tensors = {name: tensor.detach().cpu() for name, tensor in self.tensors.items()}
        save_tensors(tensors, directory / LORA_WEIGHTS, {"format": "pt"})

    @classmethod
    def read(cls, directory: Path) -> Lora:
        """The adapters of a directory.

        Raises:
            OSError, ValueError, KeyError, TypeError, SafetensorError: they are damaged.
        """
        config = json.loads((directory / LORA_CONFIG).read_text(encoding="utf-8"))
        if not (type(config["r"]) is int and config["r"] > 0 and config["lora_alpha"] >= 0):
            raise ValueError(f"r {config['r']} and lora_alpha {config['lora_alpha']} are no scale")
        lora = cls(config, load_file(directory / LORA_WEIGHTS))
        for path, update_NM in lora.updates():
            if not bool(update_NM.isfinite().all()):
                raise ValueError(f"the adapter of {path} holds numbers that are not finite")
        return lora
