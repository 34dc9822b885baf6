"""What a server is told: the artifact, and how its cache is set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from matkv.artifact.artifact import Artifact
from matkv.artifact.setting import Setting
from matkv.errors import ArtifactError
from matkv.ranks import Budget, RankTable
from matkv.settings import Number, settings
from matkv.vllm.plugin import NAME, OPTIONS


@settings(ArtifactError)
class Options:
    """`--additional-config '{"matkv": {...}}'`.

    Raises:
        ArtifactError, BudgetError: a name is unknown or a value outside its range.
    """

    artifact: str = Field(min_length=1, description="artifact directory")
    budget: Budget = Field(default=0.5, description="fraction of cache bytes to keep")
    uniform: bool = Field(default=False, description="ignore stored rank tables")
    sink: Number | None = Field(default=None, description="first tokens to keep exact")
    recent: Number | None = Field(default=None, description="last tokens to keep exact")
    untried: bool = Field(default=False, description="serve on a GPU, where nothing was run yet")

    @property
    def setting(self) -> Setting:
        """The cache."""
        return Setting(budget=self.budget, uniform=self.uniform, sink=self.sink, recent=self.recent)

    def open(self) -> tuple[Artifact, RankTable]:
        """The artifact and its ranks.

        Raises:
            ArtifactError: there is none.
            BudgetError: no table holds the budget.
        """
        artifact = Artifact.load(self.artifact)
        table = self.setting.table(artifact)
        assert table is not None
        return artifact, table


def options_in(additional: Any) -> Options:
    """Our part of vLLM's additional config.

    Raises:
        ArtifactError, BudgetError: it is missing, or not as `Options` says.
    """
    values = additional.get(OPTIONS) if isinstance(additional, Mapping) else None
    if not isinstance(values, Mapping):
        raise ArtifactError(
            f"the attention backend {NAME} is matkv's, and no artifact is named: add "
            f'--additional-config \'{{"{OPTIONS}": {{"artifact": ..., "budget": 0.5}}}}\''
        )
    return Options(**values)
