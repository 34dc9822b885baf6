"""The contestants that run beside matkv itself, and the calibration that some of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from typing import Any

from matkv import data
from matkv.artifact.artifact import Artifact
from matkv.calibrate import CalibrateConfig, artifact_from
from matkv.hf.geometry import geometry_of
from matkv.hf.observe import collect_moments
from matkv.ranks import RankTable

from . import low_rank, ours
from .protocol import Contestant, Method

WINDOWS = (32, 128)  # the second is what QuantizedCache may keep exact
CODED_WINDOW = 32  # that of latents in 4 bits
CALIBRATION_WINDOW = 512


@dataclass(frozen=True)
class Entry:
    """A contestant, and what else tells its row apart: the artifact, the calibration."""

    contestant: Contestant
    extra: dict[str, Any] = field(default_factory=dict)


class Calibration:
    """Moments before and after rotary embedding from one pass over training text, when needed."""

    def __init__(
        self, model: Any, tokenizer: Any, texts: Callable[[], list[str]], tokens: int
    ) -> None:
        self.model, self.tokenizer, self.texts, self.tokens = model, tokenizer, texts, tokens

    @cached_property
    def shape(self) -> low_rank.HeadShape:
        layer = geometry_of(self.model.config).layers[0]
        return low_rank.HeadShape(layer.kv_heads, layer.head_dim)

    @cached_property
    def _both(self) -> tuple[Artifact, list[low_rank.PlainMoments]]:
        windows_NT = data.text_windows(
            self.tokenizer, self.texts(), CALIBRATION_WINDOW, self.tokens
        )
        with low_rank.recording(self.model, self.shape) as recorders:
            layers, tokens = collect_moments(self.model, data.batches(windows_NT, 8))
        config = CalibrateConfig(key="pca", value="pca")
        artifact = artifact_from(self.model, layers, config, tokens=tokens)
        return artifact, [recorder.moments() for recorder in recorders]

    @property
    def pca(self) -> Artifact:
        return self._both[0]

    @property
    def plain(self) -> list[low_rank.PlainMoments]:
        return self._both[1]


def entries(
    methods: Sequence[str],
    artifacts: Mapping[str, Artifact],
    budgets: Sequence[float],
    calibration: Calibration,
) -> Iterator[Entry]:
    """The contestants of `methods` that run in this process."""
    if "full" in methods:
        yield Entry(Contestant(method="full cache", setting="", family="full", build=Method))
    calibrated = {"calibrated_on": calibration.tokens}
    for name, artifact in artifacts.items():
        extra = {"artifact": artifact.digest}
        if "matkv" in methods:
            yield from (Entry(one, extra) for one in of_artifact(name, artifact, budgets))
        if "latents" in methods:
            yield from (Entry(one, extra) for one in of_latents(name, artifact, budgets))
    for budget in budgets:
        if "pca" in methods:
            yield Entry(plain_pca(calibration, budget), calibrated)
        if "palu" in methods:
            yield Entry(palu(calibration, budget), calibrated)
        if "eigen" in methods:
            for keys_alone in (False, True):
                yield Entry(eigen(calibration, budget, keys_alone), calibrated)


def tables(artifact: Artifact, budgets: Sequence[float]) -> list[tuple[str, RankTable, bool]]:
    """Name, ranks, and whether they are the best known: stored where there are some, and uniform.

    The full rank comes first.
    """
    found = [("100.0% uniform", RankTable.full(artifact.geometry), True)]
    for budget in (budget for budget in budgets if budget < 1):
        stored = any(abs(known - budget) < 1e-9 for known in artifact.tables)
        if stored:
            found.append((f"{budget:.1%} adaptive", artifact.table(budget), True))
        found.append((f"{budget:.1%} uniform", artifact.table(budget, uniform=True), not stored))
    return found


def exact_choices(artifact: Artifact, windows: Sequence[int]) -> list[ours.Exact]:
    """None, these windows, and what the artifact stores where that is something else."""
    choices = [ours.NONE, *(ours.Exact(recent=recent) for recent in windows)]
    stored = ours.Exact(sink=artifact.sink, recent=artifact.recent)
    return choices if stored in choices else [*choices, stored]


def of_artifact(name: str, artifact: Artifact, budgets: Sequence[float]) -> Iterator[Contestant]:
    """matkv without exact tokens; at the best ranks also with some, and with an exact prefill."""
    variants: dict[str, dict[str, Any]] = {
        str(exact): {"exact": exact} for exact in exact_choices(artifact, WINDOWS)
    }
    variants[", exact prefill"] = {"exact_prefill": True}
    for label, table, is_best in tables(artifact, budgets):
        for variant, options in variants.items():
            if variant and (not is_best or table.budget == 1):
                continue
            yield Contestant(
                method="matkv",
                setting=f"{name} {label}{variant}",
                family="matkv",
                build=partial(ours.Latent, artifact, table, **options),
            )


def of_latents(name: str, artifact: Artifact, budgets: Sequence[float]) -> Iterator[Contestant]:
    """Latents in 8 and 4 bits at the best ranks, the full one too; 4 also with exact tokens."""
    choices = exact_choices(artifact, [CODED_WINDOW])
    fours = [ours.Codes(bits=4), ours.Codes(bits=4, rotated=True)]
    # Not 8 bits with exact tokens: 4 bits at a larger budget lose less in as many bytes.
    codings = [(ours.Codes(bits=8), ours.NONE), *product(fours, choices)]
    for label, table, is_best in tables(artifact, budgets):
        for codes, exact in codings if is_best else ():
            yield Contestant(
                method=f"matkv latents int{codes.bits}",
                setting=f"{name} {label}{', rotated' if codes.rotated else ''}{exact}",
                family="matkv + quantization",
                build=partial(ours.LatentCodes, artifact, table, codes, exact),
            )


def plain_pca(calibration: Calibration, budget: float) -> Contestant:
    def build() -> Method:
        artifact = calibration.pca
        return ours.Latent(artifact, artifact.table(budget, uniform=True))

    return Contestant(
        method="plain PCA", setting=f"{budget:.1%} uniform", family="low rank", build=build
    )


def palu(calibration: Calibration, budget: float) -> Contestant:
    def build() -> Method:
        shape = calibration.shape
        bases = [low_rank.palu_bases(moments, shape) for moments in calibration.plain]
        return low_rank.LowRank(bases, budget)

    return Contestant(
        method="Palu style", setting=f"{budget:.1%} uniform", family="low rank", build=build
    )


def eigen(calibration: Calibration, budget: float, keys_alone: bool) -> Contestant:
    def build() -> Method:
        shape = calibration.shape
        bases = [
            low_rank.eigen_bases(moments, shape, keys_alone=keys_alone)
            for moments in calibration.plain
        ]
        return low_rank.LowRank(bases, budget)

    variant = ", keys alone" if keys_alone else ""
    return Contestant(
        method="Eigen Attention style",
        setting=f"{budget:.1%} uniform{variant}",
        family="low rank",
        build=build,
    )
