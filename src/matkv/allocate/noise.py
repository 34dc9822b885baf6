"""What noise in every column would cost, and how large the noise of codes is.

Shapes: B batch, G KV head, T token, N kept token, D head dim, V vocabulary, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matkv.allocate.divergence import Text, set_gates
from matkv.allocate.fisher import frozen, toward_samples
from matkv.allocate.rounds import gated_projections
from matkv.artifact.artifact import Artifact
from matkv.bases.gates import Projected
from matkv.bases.quantizer import Quantizer, fit
from matkv.hf.handlers import Traced, tracing
from matkv.hf.merge import merged
from matkv.progress import OnProgress, Report
from matkv.ranks import SIDES, Cell, RankTable, Side

# Tokens whose latents a quantizer is fitted to: more change its steps by less than they differ.
FITTED = 4096


class Trace:
    """One side of one layer: latents of some tokens, and summed squares of gradients by them.

    `kept_BT` says which tokens of the batch under way count: no padding, and none that stays exact.
    """

    kept_BT: Tensor

    def __init__(self, encode_GDD: Tensor, decode_GDD: Tensor) -> None:
        self.encode_GDD, self.decode_GDD = encode_GDD, decode_GDD
        self.latents: list[Tensor] = []
        self.seen = 0
        self.squares_GD = torch.zeros(encode_GDD.shape[:2])

    def see(self, x_BGTD: Tensor) -> None:
        """Keep the latents of a batch, of the first `FITTED` tokens in all."""
        if self.seen >= FITTED:
            return
        z_GBTD = (x_BGTD.float() @ self.encode_GDD).transpose(0, 1)
        z_GND = z_GBTD[:, self.kept_BT][:, : FITTED - self.seen].cpu()
        self.latents.append(z_GND)
        self.seen += z_GND.shape[1]

    def add(self, grad_BGTD: Tensor) -> None:
        """Add a batch's gradients by the states."""
        by_latent_BGTD = grad_BGTD.float() @ self.decode_GDD
        squares_BGTD = by_latent_BGTD.square() * self.kept_BT[:, None, :, None]
        self.squares_GD += squares_BGTD.sum((0, 2)).cpu()


def measure_noise(
    model: PreTrainedModel,
    artifact: Artifact,
    texts: list[Text],
    *,
    seed: int,
    at: RankTable | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[Artifact, dict[Cell, Tensor]]:
    """Quantizers for the artifact's bases, and the damage of every column at every width [DW].

    One backward pass over each text, at the full cache or at a table of codes, in which only what
    queries see of tokens that are exact no more counts; damage is in nats a token. Every process
    reads all of it, so that all fit the same quantizers.
    """
    traces: dict[tuple[int, Side], Trace] = {}
    for layer in artifact.geometry.compressed:
        for side in SIDES:
            maps = artifact.maps(layer, side).changed(lambda x: x.to(model.device))
            traces[layer, side] = Trace(maps.encode_XDD, maps.decode_XDD)
    report, tokens = Report(on_progress, "measuring", len(texts), "texts"), 0
    far: Mapping[int, Projected] = {
        layer: Projected(artifact.recent, artifact.sink) for layer in artifact.geometry.compressed
    }
    if at is not None:
        far = gated = gated_projections(model, artifact)
        set_gates(gated, at)
    handlers = {
        layer: Traced(traces[layer, "key"], traces[layer, "value"], one)
        for layer, one in far.items()
    }
    with merged(model, artifact.lora), tracing(model, handlers), frozen(model):
        for done, text in enumerate(texts, 1):
            for piece in text.pieces:
                real_BT = piece.batch.real.bool()
                for trace in traces.values():
                    trace.kept_BT = real_BT & (real_BT.cumsum(-1) > artifact.sink)
                logits_BTV = model(**piece.batch.inputs(), use_cache=False).logits
                generator = torch.Generator(model.device)
                generator.manual_seed(seed + done * 1_000_003 + piece.first)
                logits_BTV.backward(toward_samples(logits_BTV.detach(), piece, generator))
                tokens += piece.batch.tokens
            report(done)
    quantizers = {name: fit(torch.cat(trace.latents, dim=1)) for name, trace in traces.items()}
    damage = dict(_damages(traces, quantizers, tokens))
    return with_quantizers(artifact, quantizers), damage


def _damages(
    traces: dict[tuple[int, Side], Trace],
    quantizers: dict[tuple[int, Side], Quantizer],
    tokens: int,
) -> Iterator[tuple[Cell, Tensor]]:
    for (layer, side), trace in traces.items():
        quantizer = quantizers[layer, side]
        none_GD, dropped_GD = torch.zeros_like(quantizer.scale_GD), quantizer.scale_GD.square()
        error_WGD = torch.stack((none_GD, *quantizer.error_WGD, dropped_GD))
        damage_WGD = 0.5 * trace.squares_GD / tokens * error_WGD
        for head in range(damage_WGD.shape[1]):
            yield (layer, side, head), damage_WGD[:, head].T


def with_quantizers(artifact: Artifact, quantizers: dict[tuple[int, Side], Quantizer]) -> Artifact:
    """A copy of the artifact whose bases have these quantizers."""
    bases = {
        layer: {
            side: replace(one, quantizer=quantizers[layer, side]) for side, one in sides.items()
        }
        for layer, sides in artifact.bases.items()
    }
    return replace(artifact, bases=bases)
