"""What is measured of matkv beside the artifact itself: its bases at ranks alone, and no training.

Both are made from packaged training articles by the library's own stages, and kept by a name that
says of what and how, so that a run that goes on does not make them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from matkv import data
from matkv.allocate.config import AllocateConfig, Constraints
from matkv.allocate.stage import allocate
from matkv.artifact.artifact import Artifact
from matkv.calibrate import CalibrateConfig, calibrate
from matkv.files import digest

LENGTH = 1024
STEP = 4  # columns: budgets of 6.25% have ranks of 4 on average where head dims are 64


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Tokens to calibrate on, texts that a search reads, and tokens to check its tables on."""

    calibrate_tokens: int
    expansions: int
    held_out_tokens: int


FULL = Effort(calibrate_tokens=16_384, expansions=36, held_out_tokens=4096)
QUICK = Effort(calibrate_tokens=4096, expansions=1, held_out_tokens=1024)


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Makes variants of an artifact in a folder."""

    model: Any
    tokenizer: Any
    folder: Path
    budgets: tuple[float, ...]
    effort: Effort

    def ranks_alone(self, artifact: Artifact) -> Artifact:
        """The same bases with tables of 16 bits only: `matkv allocate --codes 16`."""
        config = self._search(codes=(16,), constraints=Constraints(step=STEP))
        return self._kept(
            ("ranks", artifact.digest),
            lambda: allocate(self.model, artifact, self._texts(config), config),
        )

    def untrained(self, artifact: Artifact) -> Artifact:
        """New bases and tables of ranks and bits, with as many exact tokens, and no training."""
        how = CalibrateConfig(sink=artifact.sink, recent=artifact.recent)

        def made() -> Artifact:
            windows_NT = self._windows(self.effort.calibrate_tokens)
            fresh = calibrate(self.model, data.batches(windows_NT, 4), how)
            config = self._search()
            return allocate(self.model, fresh, self._texts(config), config)

        return self._kept(("untrained", how.sink, how.recent), made)

    def _search(self, **options: Any) -> AllocateConfig:
        return AllocateConfig(
            budgets=self.budgets,
            expansions=self.effort.expansions,
            held_out_tokens=self.effort.held_out_tokens,
            **options,
        )

    def _texts(self, config: AllocateConfig) -> Iterator[Tensor]:
        tokens = config.held_out_tokens + config.expansions * config.search_tokens
        return data.batches(self._windows(tokens), 1)

    def _windows(self, tokens: int) -> Tensor:
        return data.text_windows(
            self.tokenizer, data.read_texts("default", "train"), LENGTH, tokens
        )

    def _kept(self, name: tuple[Any, ...], make: Callable[[], Artifact]) -> Artifact:
        dtype = str(self.model.dtype)
        told = digest(repr((*name, dtype, self.budgets, self.effort)).encode())
        path = self.folder / f"{name[0]}-{told}"
        if not path.exists():
            make().save(path)
        return Artifact.load(path)
