"""The contestants that run beside matkv itself, and the calibration that some of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from typing import Any

from torch import Tensor

from matkv import data
from matkv.artifact.artifact import Artifact
from matkv.calibrate import CalibrateConfig, artifact_from
from matkv.hf.geometry import geometry_of
from matkv.hf.observe import collect_moments
from matkv.ranks import RankTable, Side

from . import coded, eviction, kvtc, low_rank, ours
from .protocol import Contestant, Method

WINDOWS = (32, 128)  # the second is what QuantizedCache may keep exact
CODED_WINDOW = 32  # that of latents in 4 bits
CALIBRATION_WINDOW = 512
FINE = 1 / 8  # below this budget no rank is left of the usual steps


TURBOQUANT, PER_TOKEN_HEAD = "TurboQuant style", "int4 per token and head"
NAMES = {TURBOQUANT: "turboquant", PER_TOKEN_HEAD: "int4"}  # in --methods


@dataclass(frozen=True)
class Entry:
    """A contestant, and what else tells its row apart: the artifact, the calibration."""

    contestant: Contestant
    extra: dict[str, Any] = field(default_factory=dict)


class Calibration:
    """Moments before and after rotary embedding from passes over training text, when needed."""

    def __init__(
        self, model: Any, tokenizer: Any, texts: Callable[[], list[str]], tokens: int
    ) -> None:
        self.model, self.tokenizer, self.texts, self.tokens = model, tokenizer, texts, tokens

    @cached_property
    def shape(self) -> low_rank.HeadShape:
        layer = geometry_of(self.model.config).layers[0]
        return low_rank.HeadShape(layer.kv_heads, layer.head_dim)

    @cached_property
    def batches(self) -> list[Tensor]:
        windows_NT = data.text_windows(
            self.tokenizer, self.texts(), CALIBRATION_WINDOW, self.tokens
        )
        return list(data.batches(windows_NT, 8))

    @cached_property
    def _both(self) -> tuple[Artifact, list[low_rank.PlainMoments]]:
        with low_rank.recording(self.model, self.shape) as recorders:
            layers, tokens = collect_moments(self.model, self.batches)
        config = CalibrateConfig(key="pca", value="pca")
        artifact = artifact_from(self.model, layers, config, tokens=tokens)
        return artifact, [recorder.moments() for recorder in recorders]

    @cached_property
    def joint(self) -> list[Mapping[Side, kvtc.JointBasis]]:
        return kvtc.joint_bases(self.model, self.batches)

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
    yield from (Entry(one) for one in of_heads() if NAMES[one.method] in methods)
    for budget in budgets:
        if "pca" in methods:
            yield Entry(plain_pca(calibration, budget), calibrated)
        if "palu" in methods:
            yield Entry(palu(calibration, budget), calibrated)
        if "eigen" in methods:
            for keys_alone in (False, True):
                yield Entry(eigen(calibration, budget, keys_alone), calibrated)
        if "eviction" in methods:
            yield from (Entry(evicting(rule, budget)) for rule in eviction.RULES)
        if "kvtc" in methods:
            for recent in (kvtc.RECENT, CODED_WINDOW):
                yield Entry(transform_coding(calibration, budget, recent), calibrated)


def tables(
    artifact: Artifact, budgets: Sequence[float], *, ranks_alone: bool = False
) -> list[tuple[str, RankTable, bool]]:
    """Name, table, and whether it is the best known: stored where there are some, and uniform.

    The full rank comes first. Tables of ranks and bits say so.
    """
    found = [("100.0% uniform", RankTable.full(artifact.geometry), True)]
    for budget in (budget for budget in budgets if budget < 1):
        known = [table for key, table in artifact.tables.items() if abs(key - budget) < 1e-9]
        stored = [table for table in known if not (ranks_alone and table.coded)]
        for table in stored:
            kind = ", ranks and bits" if table.coded else ""
            found.append((f"{budget:.1%} adaptive{kind}", table, True))
        found.append((f"{budget:.1%} uniform", uniform(artifact, budget), not stored))
    return found


def uniform(artifact: Artifact, budget: float) -> RankTable:
    """One rank everywhere, by single columns where a budget is below the usual step."""
    return RankTable.uniform(artifact.geometry, budget, step=1 if budget < FINE else None)


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
    for label, table, is_best in tables(artifact, budgets, ranks_alone=True):
        for codes, exact in codings if is_best else ():
            yield Contestant(
                method=f"matkv latents int{codes.bits}",
                setting=f"{name} {label}{', rotated' if codes.rotated else ''}{exact}",
                family="matkv + quantization",
                build=partial(ours.LatentCodes, artifact, table, codes, exact),
            )


def of_heads() -> Iterator[Contestant]:
    """Codes of keys and values a head at a time, without calibration or a budget."""
    forms: list[tuple[str, str, coded.Format]] = [
        (TURBOQUANT, "4 bit", coded.TurboQuant(4)),
        (TURBOQUANT, "3 bit", coded.TurboQuant(3)),
        (PER_TOKEN_HEAD, "", coded.PerTokenHead(4)),
    ]
    for method, setting, form in forms:
        build = partial(coded.CodedHeads, form)
        yield Contestant(method=method, setting=setting, family="quantization", build=build)


def plain_pca(calibration: Calibration, budget: float) -> Contestant:
    def build() -> Method:
        artifact = calibration.pca
        return ours.Latent(artifact, uniform(artifact, budget))

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


def transform_coding(calibration: Calibration, budget: float, recent: int) -> Contestant:
    def build() -> Method:
        return kvtc.Kvtc(calibration.joint, budget, recent=recent)

    return Contestant(
        method="KVTC style",
        setting=f"{budget:.1%}, first {kvtc.SINK} and last {recent} exact",
        family="quantization",
        build=build,
    )


def evicting(rule: eviction.Rule, budget: float) -> Contestant:
    return Contestant(
        method=f"{rule} style",
        setting=f"{100 * budget:.4g}% of the tokens",
        family="eviction",
        build=partial(eviction.Evicting, rule, budget),
    )
