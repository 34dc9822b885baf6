"""The comparison with other methods: its protocol, byte counts, simulations and tables."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, QuantizedCache

import matkv
from matkv.artifact.lora import Lora
from matkv.artifact.results import Results
from matkv.bases.maps import Maps
from matkv.cache.cache import attached_projections
from matkv.ranks import RankTable
from peer_rows import PROTOCOL
from peers import environments, low_rank, ours, presses, quantized, shrink
from peers.entries import Calibration, entries, of_artifact, of_latents
from peers.protocol import (
    Contestant,
    Method,
    Protocol,
    Row,
    attempt,
    control,
    full_bytes_per_token,
    score,
    tensor_nbytes,
)
from peers.table import PEERS, front, level, markdown
from tiny import Tiny, build, tokens


@pytest.fixture
def windows() -> torch.Tensor:
    return tokens(3, 32, seed=5)


def plain_losses(model: Any, windows_NT: torch.Tensor) -> list[float]:
    """Losses of the scored tokens from one forward pass without a cache."""
    with torch.no_grad():
        logits_NTV = model(windows_NT, use_cache=False).logits[:, PROTOCOL.context : -1]
    targets_NT = windows_NT[:, PROTOCOL.context + 1 :]
    loss_NT = torch.nn.functional.cross_entropy(logits_NTV.mT, targets_NT, reduction="none")
    return [float(mean) for mean in loss_NT.mean(-1)]


# ---- protocol


def test_the_full_cache_scores_what_one_forward_pass_gives(
    llama: Tiny, windows: torch.Tensor
) -> None:
    row = score(llama.model, windows, PROTOCOL, Method())
    assert row["losses"] == pytest.approx(plain_losses(llama.model, windows), abs=1e-5)
    assert row["budget"] == row["growing_budget"] == pytest.approx(1)
    assert row["bytes_per_token"] == full_bytes_per_token(llama.model) == 3 * 2 * 2 * 16 * 4
    assert row["tokens"] == 3 * 11
    # Bytes are counted where chunks end: after 25, 30 and 31 tokens.
    assert row["context"] == pytest.approx((25 + 30 + 31) / 3)


def test_bytes_of_sliding_windows_are_refused_not_miscounted(gemma3: Tiny) -> None:
    with pytest.raises(ValueError, match="sliding window"):
        full_bytes_per_token(gemma3.model)


def test_a_protocol_must_leave_something_to_score() -> None:
    with pytest.raises(ValueError, match="context"):
        Protocol(length=32, context=31)


def test_a_method_that_fails_leaves_a_row_that_says_why(llama: Tiny, windows: torch.Tensor) -> None:
    def broken() -> Method:
        raise ImportError("no such package\nmore")

    contestant = Contestant(method="x", setting="y", family="z", build=broken)
    row = attempt(contestant, llama.model, windows, PROTOCOL)
    assert row["perplexity"] is None
    assert row["note"] == "failed: ImportError: no such package"


def test_bytes_count_every_storage_once_and_wrapped_tensors() -> None:
    base = torch.zeros(4, 8)
    assert tensor_nbytes([base, base[1:], {"scale": torch.zeros(3)}, (None, 7)]) == 128 + 12


# ---- matkv and its quantized latents


def test_full_rank_scores_as_the_full_cache(llama: Tiny, windows: torch.Tensor) -> None:
    method = ours.Latent(llama.artifact, RankTable.full(llama.geometry))
    row = score(llama.model, windows, PROTOCOL, method)
    assert row["losses"] == pytest.approx(plain_losses(llama.model, windows), abs=1e-4)
    assert row["growing_budget"] == pytest.approx(1)
    assert row["budget"] > 1  # the bases come on top


@pytest.mark.parametrize("exact_prefill", [False, True])
def test_ranks_and_windows_cost_their_bytes(
    llama: Tiny, windows: torch.Tensor, exact_prefill: bool
) -> None:
    table = RankTable.uniform(llama.geometry, 0.5)
    exact = ours.Exact(recent=4)
    method = ours.Latent(llama.artifact, table, exact=exact, exact_prefill=exact_prefill)
    row = score(llama.model, windows, PROTOCOL, method)
    expected = sum(table.nbytes(n, torch.float32, recent=4) for n in (25, 30, 31)) / (25 + 30 + 31)
    assert row["bytes_per_token"] == pytest.approx(expected)
    assert row["resident_bytes_per_token"] >= row["bytes_per_token"]


def test_exact_prefill_changes_what_the_context_is_read_with(
    llama: Tiny, windows: torch.Tensor
) -> None:
    table = RankTable.uniform(llama.geometry, 0.5)
    shipped, exact = (
        score(llama.model, windows, PROTOCOL, ours.Latent(llama.artifact, table, exact_prefill=it))
        for it in (False, True)
    )
    assert shipped["losses"] != pytest.approx(exact["losses"], abs=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [8, 16, 21])
def test_quantizing_is_off_by_half_a_step_at_most(bits: int, width: int) -> None:
    z_BTR = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(1))
    codes = ours.Codes(bits=bits, group=8)
    error_BTR = (ours.fake_quantize(z_BTR, codes) - z_BTR).abs()
    for error, part in zip(error_BTR.split(8, -1), z_BTR.split(8, -1), strict=True):
        spread = part.amax(-1) - part.amin(-1)
        # Half a step, and what 16 bits round off the scale and the zero point.
        bound = spread / (2**bits - 1) / 2 + spread * 2**-10 + part.abs().amax(-1) * 2**-10
        assert (error.amax(-1) <= bound).all()
    assert len(ours.fake_quantize(z_BTR[:1, :1, :8], codes).unique()) <= 2**bits


def test_bytes_of_quantized_latents() -> None:
    assert ours.Codes(bits=4).nbytes(0) == 0
    assert ours.Codes(bits=8).nbytes(32) == 32 + 4
    assert ours.Codes(bits=4).nbytes(48) == 24 + 2 * 4
    assert ours.Codes(bits=4).nbytes(3) == 2 + 4


@pytest.mark.parametrize("rotated", [False, True])
def test_fine_codes_score_as_the_latents_themselves(
    llama: Tiny, windows: torch.Tensor, rotated: bool
) -> None:
    table = llama.ragged()
    latents = score(llama.model, windows, PROTOCOL, ours.Latent(llama.artifact, table))
    codes = ours.Codes(bits=16, rotated=rotated)
    coded = score(llama.model, windows, PROTOCOL, ours.LatentCodes(llama.artifact, table, codes))
    assert coded["losses"] == pytest.approx(latents["losses"], abs=5e-3)
    coarse = score(
        llama.model,
        windows,
        PROTOCOL,
        ours.LatentCodes(llama.artifact, table, ours.Codes(bits=2, rotated=rotated)),
    )
    assert coarse["losses"] != pytest.approx(latents["losses"], abs=5e-3)
    assert coarse["bytes_per_token"] < coded["bytes_per_token"]
    assert coded["fixed_bytes"] == latents["fixed_bytes"]


EXACT = [ours.Exact(recent=6), ours.Exact(sink=3, recent=6), ours.Exact(recent=32)]


@pytest.mark.parametrize("exact", EXACT, ids=lambda exact: str(exact)[2:])
@pytest.mark.parametrize("rotated", [False, True])
def test_fine_codes_with_exact_tokens_score_as_matkv_with_them(
    llama: Tiny, windows: torch.Tensor, rotated: bool, exact: ours.Exact
) -> None:
    table, artifact = llama.ragged(), llama.artifact
    shipped = score(llama.model, windows, PROTOCOL, ours.Latent(artifact, table, exact=exact))
    fine = ours.Codes(bits=16, rotated=rotated)
    coded = score(llama.model, windows, PROTOCOL, ours.LatentCodes(artifact, table, fine, exact))
    assert coded["losses"] == pytest.approx(shipped["losses"], abs=5e-3)
    without = score(llama.model, windows, PROTOCOL, ours.LatentCodes(artifact, table, fine))
    assert coded["losses"] != pytest.approx(without["losses"], abs=2e-2)


@pytest.mark.parametrize("exact", EXACT, ids=lambda exact: str(exact)[2:])
def test_without_quantization_exact_tokens_are_matkvs_own(
    llama: Tiny, windows: torch.Tensor, exact: ours.Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "fake_quantize", lambda z_BTR, codes: z_BTR)
    table, artifact, codes = llama.ragged(), llama.artifact, ours.Codes(bits=4)
    shipped = score(llama.model, windows, PROTOCOL, ours.Latent(artifact, table, exact=exact))
    coded = score(llama.model, windows, PROTOCOL, ours.LatentCodes(artifact, table, codes, exact))
    assert coded["losses"] == pytest.approx(shipped["losses"], abs=1e-5)


def test_exact_tokens_pay_for_full_width_and_codes_for_the_others(
    llama: Tiny, windows: torch.Tensor
) -> None:
    table, codes, exact = llama.ragged(), ours.Codes(bits=4), ours.Exact(sink=3, recent=6)
    method = ours.LatentCodes(llama.artifact, table, codes, exact)
    row = score(llama.model, windows, PROTOCOL, method)
    a_token = sum(codes.nbytes(rank) for *_, rank in table.compressed_ranks())
    full, lengths = full_bytes_per_token(llama.model), (25, 30, 31)
    expected = sum((tokens - 9) * a_token + 9 * full for tokens in lengths) / sum(lengths)
    assert row["bytes_per_token"] == pytest.approx(expected)
    short = DynamicCache(config=llama.model.config)
    llama.model(windows[:1, :5], past_key_values=short)
    assert method.held(short)[0] == 5 * full


def test_what_an_artifact_stores_is_used_only_where_a_row_names_it(llama: Tiny) -> None:
    settings: dict[tuple[int, int], tuple[str, ...]] = {
        (0, 0): ("", "last 32", "last 128"),
        (0, 32): ("", "last 32", "last 128"),
        (4, 32): ("", "last 32", "last 128", "first 4 and last 32"),
    }
    for (sink, recent), wanted in settings.items():
        artifact = replace(llama.artifact, sink=sink, recent=recent)
        used: dict[str, tuple[int, int]] = {}
        for one in of_artifact("run", artifact, (0.5,)):
            with one.build().applied(llama.model) as model:
                projections = attached_projections(model).values()
                ((its_sink, its_window),) = {(p.sink, p.recent) for p in projections}
            if not one.setting.endswith("exact prefill"):
                used[one.setting.partition("uniform")[2]] = its_sink, its_window
            else:
                assert (its_sink, its_window) == (0, 0)
        every = {"first 4 and last 32": (4, 32), "last 32": (0, 32), "last 128": (0, 128)}
        assert used == {
            f", {name} exact" if name else "": every.get(name, (0, 0)) for name in wanted
        }


def test_rows_of_latents_do_not_depend_on_what_an_artifact_stores(
    llama: Tiny, windows: torch.Tensor
) -> None:
    stored = replace(llama.artifact, recent=32)
    rows = {
        recent: {
            one.name: attempt(one, llama.model, windows[:1], PROTOCOL)
            for one in of_latents("run", artifact, (0.5,))
            if "50" in one.name
        }
        for recent, artifact in ((0, llama.artifact), (32, stored))
    }
    assert [name.partition(" run ")[2] for name in rows[32]] == [
        "50.0% uniform",
        "50.0% uniform",
        "50.0% uniform, last 32 exact",
        "50.0% uniform, rotated",
        "50.0% uniform, rotated, last 32 exact",
    ]
    for name, row in rows[0].items():
        assert row["losses"] == rows[32][name]["losses"]
        # Every token of these windows is within the last 32.
        assert (row["growing_budget"] == 1) == name.endswith("last 32 exact")


def test_latents_of_an_adapted_model_are_those_of_matkv(llama: Tiny, windows: torch.Tensor) -> None:
    weight = llama.model.model.layers[0].self_attn.k_proj.weight
    before, path = weight.detach().clone(), "base_model.model.model.layers.0.self_attn.k_proj"
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"{path}.lora_A.weight": torch.randn(1, weight.shape[1], generator=generator),
        f"{path}.lora_B.weight": torch.randn(weight.shape[0], 1, generator=generator),
    }
    artifact = replace(llama.artifact, lora=Lora({"r": 1, "lora_alpha": 0.2}, tensors))
    table, fine = RankTable.uniform(llama.geometry, 0.5), ours.Codes(bits=16)
    shipped = score(llama.model, windows, PROTOCOL, ours.Latent(artifact, table))
    coded = score(llama.model, windows, PROTOCOL, ours.LatentCodes(artifact, table, fine))
    assert coded["losses"] == pytest.approx(shipped["losses"], abs=5e-3)
    assert torch.equal(weight, before)
    plain = score(llama.model, windows, PROTOCOL, ours.LatentCodes(llama.artifact, table, fine))
    assert coded["losses"] != pytest.approx(plain["losses"], abs=1e-2)


def test_rotation_keeps_the_projection() -> None:
    basis_GDD = torch.linalg.qr(torch.randn(2, 8, 8)).Q
    pairs = ours.turned(Maps.orthogonal(basis_GDD), (5, 0))
    encode_DR, decode_DR = pairs[0]
    kept_DR = basis_GDD[0, :, :5]
    assert torch.allclose(encode_DR @ decode_DR.T, kept_DR @ kept_DR.T, atol=1e-5)
    assert pairs[1][0].shape == (8, 0)


# ---- low rank before rotary embedding


@pytest.fixture
def calibration(llama: Tiny) -> Calibration:
    calibration = Calibration(llama.model, None, lambda: [], 0)
    shape = low_rank.HeadShape(kv_heads=2, head_dim=16)
    with low_rank.recording(llama.model, shape) as recorders, torch.no_grad():
        llama.model(tokens(4, 48, seed=7))
    plain = [recorder.moments() for recorder in recorders]
    calibration.__dict__["_both"] = (llama.artifact, plain)
    return calibration


def bases_of(calibration: Calibration, kind: str) -> list[Any]:
    shape = calibration.shape
    if kind == "palu":
        return [low_rank.palu_bases(moments, shape) for moments in calibration.plain]
    keys_alone = kind == "eigen, keys alone"
    return [
        low_rank.eigen_bases(moments, shape, keys_alone=keys_alone) for moments in calibration.plain
    ]


@pytest.mark.parametrize("kind", ["palu", "eigen", "eigen, keys alone"])
def test_full_rank_before_rotary_embedding_is_the_full_cache(
    llama: Tiny, windows: torch.Tensor, calibration: Calibration, kind: str
) -> None:
    method = low_rank.LowRank(bases_of(calibration, kind), 1.0)
    row = score(llama.model, windows, PROTOCOL, method)
    assert row["losses"] == pytest.approx(plain_losses(llama.model, windows), abs=1e-4)
    assert row["growing_budget"] == pytest.approx(1)
    half = score(llama.model, windows, PROTOCOL, low_rank.LowRank(bases_of(calibration, kind), 0.5))
    assert half["growing_budget"] == pytest.approx(0.5)
    assert half["losses"] != pytest.approx(row["losses"], abs=1e-3)
    # Detached again, nothing is left of it.
    assert plain_losses(llama.model, windows) == pytest.approx(row["losses"], abs=1e-4)


def test_palu_is_the_best_low_rank_product_of_its_group(
    llama: Tiny, calibration: Calibration
) -> None:
    """No other matrix of that rank is nearer to X W^T: the truncated SVD is not."""
    module = llama.model.model.layers[0].self_attn
    seen: list[torch.Tensor] = []
    handle = module.k_proj.register_forward_hook(lambda *a: seen.append(a[2].detach()))
    with torch.no_grad():
        llama.model(tokens(4, 48, seed=7))
    handle.remove()
    y_EN = seen[0].flatten(0, 1)
    basis_YR = bases_of(calibration, "palu")[0][0][0][:, :16]
    error = (y_EN - y_EN @ basis_YR @ basis_YR.T).norm()
    assert float(error) == pytest.approx(float(torch.linalg.svdvals(y_EN)[16:].norm()), rel=1e-3)


def test_low_rank_refuses_fused_projections() -> None:
    model = build("phi3")
    shape = low_rank.HeadShape(kv_heads=2, head_dim=16)
    with pytest.raises(matkv.MatkvError, match="q_proj"), low_rank.recording(model, shape):
        pass


# ---- peers' packages, as far as they need none


def test_eight_bit_floats_are_close_and_half_the_bytes(llama: Tiny, windows: torch.Tensor) -> None:
    options = quantized.SETTINGS["fp8"]
    if not hasattr(__import__("transformers").cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no fp8 cache")
    row = score(llama.model, windows, PROTOCOL, quantized.Quantized(options))
    assert row["losses"] == pytest.approx(plain_losses(llama.model, windows), abs=0.1)
    full = full_bytes_per_token(llama.model)
    assert row["bytes_per_token"] == pytest.approx(full / 4, rel=0.05)  # of fp32


def test_think_counts_the_channels_its_paper_keeps(llama: Tiny) -> None:
    method = presses.ThinK.__new__(presses.ThinK)  # without the package
    method.dropped, method.saved = 0.5, 0.0
    cache = DynamicCache(config=llama.model.config)

    class Nothing:
        def __call__(self, model: Any) -> Any:
            from contextlib import nullcontext

            return nullcontext()

    method.press = Nothing()
    with torch.no_grad():
        cache = method.read(llama.model, tokens(1, 20))
    counted, resident = method.held(cache)
    full = full_bytes_per_token(llama.model) * 20
    assert resident == full
    assert counted == full * 0.75 + 3 * 2 * 16 / 8  # a bit a channel


def test_converted_attention_gets_the_models_rotary_base(llama: Tiny) -> None:
    class MLAAttention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._uses_rope, self._rope_config = False, {"base": 10_000.0}

    base = shrink.rope_theta(llama.model.config)
    assert base == 10_000.0
    converted = torch.nn.Sequential(MLAAttention())
    assert shrink.rotary_corrected(converted, 5.0)
    assert converted[0]._uses_rope and converted[0]._rope_config == {"base": 5.0}
    assert not shrink.rotary_corrected(converted, 5.0)


def test_contestants_are_known_without_their_packages(tmp_path: Path) -> None:
    names = [
        (one.method, one.setting)
        for one in (
            *quantized.contestants(),
            *presses.contestants(),
            *shrink.contestants("model", str(tmp_path / "texts")),
        )
    ]
    assert len(names) == len(set(names)) > 20


def test_the_entries_of_this_process(llama: Tiny) -> None:
    calibration = Calibration(llama.model, None, lambda: [], 4096)
    methods = ("full", "matkv", "latents", "pca", "palu", "eigen")
    found = list(entries(methods, {"run": llama.artifact}, (0.5,), calibration))
    names = [entry.contestant.name for entry in found]
    assert len(names) == len(set(names))
    assert "matkv, run 50.0% uniform, last 32 exact" in names
    assert all(
        entry.extra.get("calibrated_on") == 4096
        for entry in found
        if entry.contestant.family == "low rank"
    )


def test_stored_tables_come_with_the_variants(llama: Tiny) -> None:
    artifact = replace(llama.artifact, tables={0.5: llama.ragged()})
    settings = [one.setting for one in of_artifact("run", artifact, (0.5, 0.25))]
    assert settings == [
        "run 100.0% uniform",
        "run 50.0% adaptive",
        "run 50.0% adaptive, last 32 exact",
        "run 50.0% adaptive, last 128 exact",
        "run 50.0% adaptive, exact prefill",
        "run 50.0% uniform",
        "run 25.0% uniform",
        "run 25.0% uniform, last 32 exact",
        "run 25.0% uniform, last 128 exact",
        "run 25.0% uniform, exact prefill",
    ]


# ---- another environment


def test_an_environment_gives_rows_and_says_what_failed(
    llama: Tiny, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "python_of", lambda name: Path(sys.executable))
    llama.model.save_pretrained(tmp_path / "model")
    job = {"model": str(tmp_path / "model"), "dtype": "float32", "device": "cpu", "options": {}}
    same = control("quantized")
    refused = ("QuantizedCache", "quanto 8 bit")  # with or without the package
    wanted = [(same.method, same.setting), refused, ("no such", "contestant")]
    given = environments.score_inside("quantized", wanted, windows, PROTOCOL, **job)
    row = next(given)
    assert row["losses"] == pytest.approx(plain_losses(llama.model, windows), abs=1e-5)
    assert next(given)["note"].startswith("failed: ")
    with pytest.raises(environments.PeerEnvironmentError, match="ended early"):
        next(given)


# ---- table


def a_row(method: str, family: str, budget: float, losses: list[float], **more: Any) -> Row:
    return {
        "method": method,
        "setting": "",
        "family": family,
        "budget": budget,
        "growing_budget": budget / 2,
        "bytes_per_token": 1000 * budget,
        "perplexity": math.exp(sum(losses) / len(losses)),
        "losses": losses,
        "seconds_per_window": 1.0,
        "note": "",
    } | more


FULL = a_row("full cache", "full", 1.0, [3.0, 3.2, 2.9])
GOOD = a_row("Peer", "low rank", 0.5, [3.1, 3.3, 3.0])
BAD = a_row("matkv", "matkv", 0.5, [3.5, 3.7, 3.4])
SMALL = a_row("matkv latents", "matkv + quantization", 0.2, [3.2, 3.4, 3.1])
FAILED = {"method": "Broken", "setting": "", "family": "x", "perplexity": None, "note": "failed: e"}


def test_the_winner_at_each_level_may_be_a_peer() -> None:
    rows = [FULL, GOOD, BAD, SMALL, FAILED]
    at_half = level(rows, 0.5)
    assert at_half.winner == "Peer"
    gain = at_half.ours["matkv"].gain
    assert gain is not None and gain == pytest.approx(-0.4)
    assert level(rows, 0.25).winner == "matkv + quantization"
    assert level([FULL], 0.5).winner == "nobody"
    assert level(rows, 0.25, "growing_budget").winner == "Peer"
    noisy = a_row("Peer", "low rank", 0.5, [3.0, 4.2, 2.9])
    assert level([noisy, BAD], 0.5).winner == "even"


def test_the_front_holds_what_nothing_smaller_beats() -> None:
    rows = [FULL, GOOD, BAD, SMALL]
    assert len(front(rows)) == 3  # all but BAD
    table = markdown([*rows, FAILED])
    line = next(line for line in table.splitlines() if line.startswith("| matkv |"))
    assert "●" not in line and "+0.500 ± 0.000" in line
    assert "**Peer**" in table
    assert "failed: e" in table


def test_rows_are_replaced_by_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "peers.json"
    first: Row = {name: 1 for name in PEERS.keys} | {"perplexity": None}
    results = Results(None, PEERS, file=path)
    for row in (first, first | {"windows": 2}, first | {"perplexity": 5.0}):
        results.put([row])
    assert [row["perplexity"] for row in Results(None, PEERS, file=path).rows] == [5.0, None]
    assert json.loads(path.read_text())["kind"] == "peers"
    assert [file.name for file in path.parent.iterdir()] == ["peers.json"]


def test_quantized_cache_takes_the_options_that_are_given() -> None:
    """The signature that settings rely on; unknown options would be a TypeError there."""
    import inspect

    known = set(inspect.signature(QuantizedCache.__init__).parameters)
    assert all(set(options) <= known for options in quantized.SETTINGS.values())


def test_what_runs_in_a_peers_environment_needs_no_matkv() -> None:
    """Its modules are imported by a Python that has transformers and the peer, and not matkv."""
    folder = Path(environments.__file__).parent
    for name in ("protocol", "child", "quantized", "presses", "shrink"):
        source = (folder / f"{name}.py").read_text(encoding="utf-8")
        assert not re.search(r"(?m)^\s*(from|import) matkv", source), name
