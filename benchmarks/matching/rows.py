"""Who is measured at which budget.

A budget is what a further token costs: its bytes over those of a full cache in 16 bits. A method
with a knob is set to it; one without stands at the smallest budget that holds it. Presses of
kvpress drop tokens of the context alone and keep what follows, so that they are set to hold the
budget's bytes on average over what is scored of a window of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from matkv.artifact.artifact import Artifact
from peers import coded, eviction, ours, presses, quantized, shrink
from peers.entries import (
    CODED_WINDOW,
    PER_TOKEN_HEAD,
    TURBOQUANT,
    Calibration,
    eigen,
    evicting,
    palu,
    plain_pca,
    transform_coding,
)
from peers.protocol import Contestant, Method

from .artifacts import Workshop
from .make import CHUNK, CONTEXT, LENGTH
from .records import Json

LEVELS = (0.25, 0.125, 0.0625, 0.5)
# The most bits that a budget holds: with a norm, or a scale and a zero point, of 64 columns.
TURBOQUANT_BITS = {0.5: 7, 0.25: 3, 0.125: 1}
INTEGER_BITS = {0.5: 4, 0.25: 3, 0.125: 1}
QUANTIZED = {
    0.5: ("fp8", "quanto 4 bit", "quanto 4 bit, keys by channel", "hqq 4 bit"),
    0.25: ("quanto 2 bit", "quanto 2 bit, keys by channel", "hqq 2 bit"),
}
PRESSES = ("SnapKV", "expected attention")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row to be: at which budget, what else tells it apart, and where it runs.

    A simulated one computes what its cache would give and holds another: it has no footprint.
    """

    level: float | None
    contestant: Contestant
    extra: Json = field(default_factory=dict)
    environment: str | None = None
    simulated: bool = False

    def row(self, shared: Json) -> Json:
        names = {name: getattr(self.contestant, name) for name in ("method", "setting", "family")}
        return shared | names | self.extra | {"level": self.level, "simulated": self.simulated}


def entries(
    artifact: Artifact,
    workshop: Workshop | None,
    calibration: Calibration,
    *,
    outside: bool,
    levels: Sequence[float] | None = None,
) -> Iterator[Entry]:
    """The full cache, then every method at every budget.

    Variants of the artifact if there is a workshop, peers of other packages if `outside`.
    """
    full = Contestant(method="full cache", setting="", family="full", build=Method)
    yield Entry(level=None, contestant=full)
    for level in LEVELS if levels is None else levels:
        yield from matkv(artifact, workshop, level)
        calibrated = {"calibrated_on": calibration.tokens}
        for one in simulated(calibration, level):
            yield Entry(level=level, contestant=one, extra=calibrated, simulated=True)
        yield Entry(level=level, contestant=plain_pca(calibration, level), extra=calibrated)
        for rule in eviction.RULES:
            yield Entry(level=level, contestant=evicting(rule, level))
        if outside:
            yield from packages(level)
        else:
            yield from in_transformers(level)


def matkv(artifact: Artifact, workshop: Workshop | None, level: float) -> Iterator[Entry]:
    """The artifact, without exact tokens, at ranks alone, and without training."""
    stored = ours.Exact(sink=artifact.sink, recent=artifact.recent)
    found: list[tuple[str, Artifact, ours.Exact]] = [("", artifact, stored)]
    if str(stored):
        found.append(("no exact tokens", artifact, ours.NONE))
    if workshop is not None:
        found.append(("ranks alone", workshop.ranks_alone(artifact), stored))
        found.append(("no training", workshop.untrained(artifact), stored))
    for setting, its, exact in found:
        table = its.table(level)
        build = partial(ours.Latent, its, table, exact=exact)
        told = ", ".join(part for part in (setting, str(exact).removeprefix(", ")) if part)
        yield Entry(
            level=level,
            contestant=Contestant(method="matkv", setting=told, family="matkv", build=build),
            extra={"artifact": its.digest, "ranks": table.digest},
        )


def simulated(calibration: Calibration, level: float) -> Iterator[Contestant]:
    """Peers written from their papers."""
    yield transform_coding(calibration, level, CODED_WINDOW)
    for name, form, bits in (
        (TURBOQUANT, coded.TurboQuant, TURBOQUANT_BITS.get(level)),
        (PER_TOKEN_HEAD, coded.PerTokenHead, INTEGER_BITS.get(level)),
    ):
        if bits is not None:
            build = partial(coded.CodedHeads, form(bits))
            named = name.replace("int4", "integers") if bits != 4 else name
            yield Contestant(
                method=named, setting=f"{bits} bit", family="quantization", build=build
            )
    yield palu(calibration, level)
    yield eigen(calibration, level, keys_alone=False)


def packages(level: float) -> Iterator[Entry]:
    """What runs in the environment of its own package."""
    for one in quantized.contestants():
        if one.setting in QUANTIZED.get(level, ()):
            yield Entry(level=level, contestant=one, environment="quantized")
    for one in presses.contestants(dropped_tokens(level), PRESSES):
        if one.family == "eviction":  # ThinK alone keeps more than half
            yield Entry(level=level, contestant=one, environment="presses")
    for one in shrink.contestants("", ""):
        if one.setting == f"auto, ratio {1 / level:.3g}":
            yield Entry(level=level, contestant=one, environment="shrink")


def in_transformers(level: float) -> Iterator[Entry]:
    """What transformers can do by itself."""
    for one in quantized.contestants():
        if level == 0.5 and one.setting == "fp8":
            yield Entry(level=level, contestant=one)


def options_of(environment: str, model: str, texts: str) -> Json:
    """What the module of an environment needs to make its contestants."""
    if environment == "presses":
        dropped = [one for level in LEVELS for one in dropped_tokens(level)]
        return {"dropped_tokens": dropped, "eviction": list(PRESSES)}
    return {"model": model, "texts": texts} if environment == "shrink" else {}


def dropped_tokens(level: float) -> tuple[float, ...]:
    """The share of the context to drop, so that on average as many tokens are held as a budget."""
    ends = [min(at + CHUNK, LENGTH - 1) for at in range(CONTEXT, LENGTH - 1, CHUNK)]
    mean = sum(ends) / len(ends)
    kept = (level * mean - (mean - CONTEXT)) / CONTEXT
    return (round(1 - kept, 4),) if kept > 0 else ()


def kept_by(entries_: Sequence[Entry], words: Sequence[str]) -> list[Entry]:
    """The full cache, and the entries that one of the words is in."""
    if not words:
        return list(entries_)
    return [
        one
        for one in entries_
        if one.level is None or any(word in one.contestant.name for word in words)
    ]
