"""What a cache took, against the full one, and whether its bases were trained for that."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from matkv.artifact.artifact import Artifact
from matkv.artifact.setting import Setting
from matkv.cache.cache import LatentCache
from matkv.commands import console
from matkv.commands.tables import bytes_text
from matkv.hf.attach import attach, attached_table
from matkv.ranks import RankTable


@dataclass(frozen=True)
class CacheUse:
    """The tokens a cache holds, their bytes, and the bytes that a full cache of them takes."""

    tokens_held: int
    cache_bytes: int
    full_bytes: int

    def __str__(self) -> str:
        share = self.cache_bytes / max(1, self.full_bytes)
        return (
            f"{self.tokens_held:,} tokens: cache of {bytes_text(self.cache_bytes)}, {share:.1%} of "
            f"the full cache's {bytes_text(self.full_bytes)}"
        )


def cache_use(model: PreTrainedModel, cache: LatentCache) -> CacheUse:
    """What `cache` took of an attached model."""
    tokens = cache.get_seq_length()
    full = RankTable.full(attached_table(model).geometry)
    return CacheUse(tokens, cache.used_nbytes, full.nbytes(tokens, model.dtype))


def attach_setting(model: PreTrainedModel, artifact: Artifact, setting: Setting) -> RankTable:
    """Attach at a setting with a budget; returns its ranks.

    Where these are smaller than any that the bases were trained at, a note says so.
    """
    table = setting.table(artifact)
    assert table is not None
    attach(model, artifact, ranks=table, sink=setting.sink, recent=setting.recent)
    smallest = artifact.smallest_trained_rank
    ranks = [rank for *_, rank in table.compressed_ranks()]
    below = sum(rank < smallest for rank in ranks)
    if below:
        console.err.print(
            f"the bases were trained at ranks of {smallest} and more, and {below} of "
            f"{len(ranks)} ranks at {table.budget:.1%} are smaller: quality is unknown there; ask "
            "for a larger budget, or distill with a schedule that goes so far",
            style="yellow",
        )
    return table
