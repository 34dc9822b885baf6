"""Peers that keep codes a head at a time, and matkv's own rows of ranks and bits.

Shapes: B batch, G KV head, T token, D head dim, C code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from coded import coded as coded_model
from matkv.artifact.artifact import Artifact
from matkv.cache.naming import cache_argument
from matkv.ranks import RankTable
from peer_rows import LENGTHS, PROTOCOL, distance, heavy, states
from peers import coded, ours
from peers.entries import Calibration, entries, of_artifact, of_latents
from peers.protocol import Method, Row, score
from tiny import Tiny, tokens


@pytest.fixture
def windows() -> torch.Tensor:
    return tokens(3, 32, seed=5)


@pytest.fixture
def full(llama: Tiny, windows: torch.Tensor) -> Row:
    return score(llama.model, windows, PROTOCOL, Method())


# ---- a head at a time


FORMS = [coded.TurboQuant, coded.PerTokenHead]


def test_bytes_of_the_formats() -> None:
    assert coded.TurboQuant(4).nbytes(64) == 32 + 2
    assert coded.TurboQuant(3).nbytes(64) == 24 + 2
    assert coded.TurboQuant(3).nbytes(5) == 2 + 2  # 15 bits
    assert coded.PerTokenHead(4).nbytes(64) == 32 + 4
    assert coded.PerTokenHead(4).nbytes(128) == 64 + 4
    assert coded.TurboQuant(4).fixed(64) == 64 * 64 + 16
    assert coded.PerTokenHead(4).fixed(64) == 0


@pytest.mark.parametrize("form", FORMS)
def test_the_error_of_a_format_falls_with_its_bits(form: Any) -> None:
    x_BGTD = heavy(1, 2, 50, 64)
    errors = [float((form(bits)(x_BGTD) - x_BGTD).norm() / x_BGTD.norm()) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 < 0.2 < errors[0]


def test_the_codebook_is_the_one_of_least_error_for_a_normal_distribution() -> None:
    """Known levels and errors (Max, 1960)."""
    assert coded.codebook(1).tolist() == pytest.approx([-0.7979, 0.7979], abs=1e-4)
    assert coded.codebook(2).tolist() == pytest.approx([-1.5104, -0.4528, 0.4528, 1.5104], abs=1e-3)
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(3))
    for bits, known in ((2, 0.1175), (3, 0.03454), (4, 0.009497)):
        levels_C = coded.codebook(bits)
        nearest = levels_C[(x[:, None] - levels_C).abs().argmin(-1)]
        assert float((nearest - x).square().mean()) == pytest.approx(known, rel=0.02)


def test_turboquant_depends_on_a_tokens_norm_by_its_16_bits_alone() -> None:
    """Each token and head by itself, whatever its size; the rotation spreads what is one column."""
    form, x_BGTD = coded.TurboQuant(4), heavy(1, 2, 9, 64)
    assert torch.allclose(form(8 * x_BGTD), 8 * form(x_BGTD), rtol=1e-3)
    assert torch.allclose(form(x_BGTD)[:, 1:, 3:4], form(x_BGTD[:, 1:, 3:4]), atol=1e-5)
    spike_BGTD = torch.zeros(1, 1, 1, 64)
    spike_BGTD[..., 5] = 100.0
    assert float((form(spike_BGTD) - spike_BGTD).norm()) < 0.15 * 100
    assert torch.equal(form(torch.zeros(1, 1, 2, 64)), torch.zeros(1, 1, 2, 64))
    turn_DD = coded.rotation(64)
    assert torch.allclose(turn_DD @ turn_DD.T, torch.eye(64), atol=1e-5)


def test_turboquant_loses_what_its_codebook_loses() -> None:
    x_BGTD = heavy(1, 4, 500, 64)
    for bits, known in ((3, 0.03454), (4, 0.009497)):
        error_BGT = (coded.TurboQuant(bits)(x_BGTD) - x_BGTD).square().sum(-1)
        relative = float((error_BGT / x_BGTD.square().sum(-1)).mean())
        assert relative == pytest.approx(known, rel=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_codes_of_heads_count_their_bytes_and_come_near_the_full_cache(
    llama: Tiny, windows: torch.Tensor, full: Row, form: Any
) -> None:
    rows = {
        bits: score(llama.model, windows, PROTOCOL, coded.CodedHeads(form(bits))) for bits in (2, 8)
    }
    for bits, row in rows.items():
        assert row["bytes_per_token"] == 3 * 2 * 2 * form(bits).nbytes(16)
        assert row["fixed_bytes"] == form(bits).fixed(16) * 4
        assert row["note"] == "simulated" and row["resident_bytes_per_token"] is None
    assert distance(rows[8], full) < 0.02 < distance(rows[2], full)
    # Detached again, nothing is left of it.
    assert score(llama.model, windows, PROTOCOL, Method())["losses"] == full["losses"]


def test_the_context_is_read_with_the_full_cache(llama: Tiny, windows: torch.Tensor) -> None:
    method = coded.CodedHeads(coded.TurboQuant(2))
    context_BT, plain = windows[:1, :20], DynamicCache(config=llama.model.config)
    with torch.inference_mode(), method.applied(llama.model) as model:
        for _ in range(2):  # a window after another one, too
            cache = method.read(model, context_BT)
            after = model(windows[:1, 20:21], **cache_argument(model, cache)).logits
        model = llama.model
    with torch.inference_mode():
        model(context_BT, **cache_argument(model, plain))
        exact = model(windows[:1, 20:21], **cache_argument(model, plain)).logits
    for x_BGTD, same_BGTD in zip(states(cache), states(plain), strict=True):
        # The last token of deeper layers has read codes.
        assert torch.allclose(x_BGTD[:, :, :20], same_BGTD[:, :, :20], atol=1e-6)
    assert not torch.allclose(after, exact, atol=1e-3)


# ---- entries


def test_entries_of_codes(llama: Tiny) -> None:
    calibration = Calibration(llama.model, None, lambda: [], 4096)
    found = list(entries(("turboquant", "int4", "kvtc"), {}, (0.25, 0.1), calibration))
    assert [entry.contestant.name for entry in found] == [
        "TurboQuant style, 4 bit",
        "TurboQuant style, 3 bit",
        "int4 per token and head",
        "KVTC style, 25.0%, first 4 and last 128 exact",
        "KVTC style, 25.0%, first 4 and last 32 exact",
        "KVTC style, 10.0%, first 4 and last 128 exact",
        "KVTC style, 10.0%, first 4 and last 32 exact",
    ]
    assert {entry.contestant.family for entry in found} == {"quantization"}
    assert [entry.extra for entry in found] == [{}] * 3 + [{"calibrated_on": 4096}] * 4
    assert [e.contestant.name for e in entries(("int4",), {}, (0.25,), calibration)] == [
        "int4 per token and head"
    ]


# ---- matkv's own rows of ranks and bits


@pytest.fixture
def with_bits(llama: Tiny) -> Artifact:
    cells = [cell[:3] for cell in RankTable.full(llama.geometry).compressed_ranks()]
    table = RankTable.banded(llama.geometry, dict.fromkeys(cells, (0, 4, 4, 4)))
    return replace(llama.artifact, tables={0.25: table, 0.5: llama.ragged()})


def test_rows_of_ranks_and_bits_say_so(with_bits: Artifact) -> None:
    settings = [one.setting for one in of_artifact("run", with_bits, (0.5, 0.25, 0.1))]
    assert "run 25.0% adaptive, ranks and bits, last 32 exact" in settings
    assert "run 50.0% adaptive, last 32 exact" in settings
    assert "run 10.0% uniform" in settings  # below the usual step of ranks
    assert len(settings) == len(set(settings))


def test_latents_are_not_quantized_twice(with_bits: Artifact) -> None:
    settings = [one.setting for one in of_latents("run", with_bits, (0.5, 0.25))]
    assert not any("ranks and bits" in setting for setting in settings)
    assert "run 25.0% uniform, rotated" in settings
    assert "run 50.0% adaptive, rotated" in settings
    assert "run 50.0% uniform, rotated" not in settings


def test_a_row_of_ranks_and_bits_counts_its_codes(windows: torch.Tensor) -> None:
    subject = coded_model("llama")
    table = subject.ragged()
    exact = ours.Exact(sink=2, recent=5)
    row = score(subject.model, windows, PROTOCOL, ours.Latent(subject.artifact, table, exact=exact))
    held = sum(table.nbytes(n, torch.float32, sink=2, recent=5) for n in LENGTHS)
    assert table.coded
    assert row["bytes_per_token"] == pytest.approx(held / sum(LENGTHS))
    assert row["resident_bytes_per_token"] >= row["bytes_per_token"]
