"""The default model itself: what the tiny models promise, on real weights (slow)."""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig

import matkv
from explicit import attend_explicit
from matkv import data
from matkv.artifact.artifact import Artifact
from matkv.cache.cache import full_states, refill
from matkv.distill.config import DistillConfig
from matkv.distill.stage import distill
from matkv.evaluate.texts import evaluate
from matkv.hf import handlers as hf
from matkv.hf.observe import collect_moments
from matkv.latents import compiled
from matkv.ranks import RankTable
from tiny import left_padded, ragged_table, stepwise

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PROMPTS = (
    "The history of the lighthouse begins in",
    "In mathematics, a prime number is a whole number greater than one that",
    "Dear Anna, thank you for your letter. Last week we went to the sea, and",
)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return matkv.load_model("smollm2-135m", torch.float32)


@pytest.fixture(scope="module")
def artifact(loaded: tuple[Any, Any]) -> Artifact:
    model, tokenizer = loaded
    texts = data.read_texts("default", "train")
    windows_NT = data.text_windows(tokenizer, texts, 256, 4096)
    return matkv.calibrate(model, data.batches(windows_NT, 8))


@pytest.fixture
def model(loaded: tuple[Any, Any]) -> Iterator[Any]:
    yield loaded[0]
    matkv.detach(loaded[0])


@pytest.fixture
def prompts(loaded: tuple[Any, Any]) -> list[torch.Tensor]:
    return [loaded[1](prompt, return_tensors="pt").input_ids for prompt in PROMPTS]


@torch.no_grad()
def test_full_rank_gives_the_same_logits(
    model: Any, artifact: Artifact, prompts: list[torch.Tensor]
) -> None:
    """Within 1e-5 of the largest logit; transformers' own sdpa and eager differ by as much."""
    for ids in prompts:
        plain = model(ids).logits
        matkv.attach(model, artifact, 1.0)
        for options in ({"use_cache": False}, {"use_cache": True}):
            difference = (model(ids, **options).logits - plain).abs().max()
            assert float(difference) < 1e-5 * float(plain.abs().max())
        matkv.detach(model)
        assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_full_rank_gives_the_same_tokens(
    model: Any, artifact: Artifact, prompts: list[torch.Tensor], options: dict[str, Any]
) -> None:
    ids_BT, mask_BT = left_padded([prompt.where(prompt != 0, 1) for prompt in prompts])
    how = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, **options}
    alone = [model.generate(ids, attention_mask=torch.ones_like(ids), **how) for ids in prompts]
    batch = model.generate(ids_BT, attention_mask=mask_BT, **how)
    matkv.attach(model, artifact, 1.0)
    for ids, plain in zip(prompts, alone, strict=True):
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **how), plain)
    assert torch.equal(model.generate(ids_BT, attention_mask=mask_BT, **how), batch)


@torch.no_grad()
def test_ragged_cache_equals_the_truncated_forward_pass(
    model: Any, artifact: Artifact, prompts: list[torch.Tensor]
) -> None:
    table = ragged_table(artifact.geometry, seed=5)
    matkv.attach(model, artifact, ranks=table)
    ids = prompts[2]
    whole = model(ids, use_cache=False).logits
    cache = matkv.LatentCache(model)
    pieces = stepwise(model, ids, (5, 3), cache)
    assert float((pieces - whole).abs().max()) < 2e-5 * float(whole.abs().max())
    assert cache.used_nbytes == table.nbytes(ids.shape[1], torch.float32)


@pytest.fixture(scope="module")
def distilled(loaded: tuple[Any, Any], artifact: Artifact) -> Artifact:
    model, tokenizer = loaded
    windows_NT = data.text_windows(tokenizer, data.read_texts("default", "train"), 64, 1024)
    return distill(model, artifact, windows_NT, DistillConfig(steps=2, sequence_length=64))


@pytest.mark.parametrize("recent", [0, 8])
@pytest.mark.parametrize("made", ["calibrated", "distilled"])
def test_the_fast_path_generates_the_tokens_of_the_reference(
    model: Any,
    artifact: Artifact,
    distilled: Artifact,
    prompts: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    made: str,
    recent: int,
) -> None:
    """Left-padded, with ragged ranks, in fp32."""
    chosen = artifact if made == "calibrated" else distilled
    ids, mask = left_padded(prompts)
    matkv.attach(model, chosen, ranks=ragged_table(artifact.geometry), recent=recent)
    settings = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    fast = model.generate(input_ids=ids, attention_mask=mask, **settings)
    monkeypatch.setattr(hf, "attend", attend_explicit)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **settings), fast)


def test_perplexity_never_improves_as_rank_shrinks(
    loaded: tuple[Any, Any], model: Any, artifact: Artifact
) -> None:
    texts = data.read_texts("default", "validation")
    windows_NT = data.text_windows(loaded[1], texts, 512, 2048)
    rows = evaluate(model, artifact, windows_NT, [1.0, 0.875, 0.75, 0.5, 0.25])
    values = [row.perplexity for row in rows]
    assert values[1] == pytest.approx(values[0], rel=1e-4)
    for larger, smaller in pairwise(values):
        assert smaller > larger * 0.995


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 1.0), ("float32", 1.1)])
def test_decoding_at_full_rank_is_not_slower(artifact: Artifact, dtype: str, most: float) -> None:
    """One step on latents against one with DynamicCache and sdpa, in turns, context 2,048.

    bf16, the dtype of the stored weights, is faster; fp32 is on a par, give or take noise.
    """
    plain, tokenizer = matkv.load_model("smollm2-135m", dtype)
    latent, _ = matkv.load_model("smollm2-135m", dtype)
    texts = data.read_texts("default", "validation")
    tokens_T = data.text_windows(tokenizer, texts, 2048, 2048)[0]
    states = full_states(plain, tokens_T)
    matkv.attach(latent, artifact, 1.0)
    caches = refill(plain, states), refill(latent, states)
    ratios = []
    with torch.inference_mode():
        for _ in range(20):
            times = []
            for model, cache in zip((plain, latent), caches, strict=True):
                started = time.perf_counter()
                model(tokens_T[None, -1:], past_key_values=cache, use_cache=True)
                times.append(time.perf_counter() - started)
            ratios.append(times[1] / times[0])
    assert statistics.median(ratios[4:]) < most


def test_calibration_costs_little_over_a_forward_pass(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    windows_NT = data.text_windows(tokenizer, data.read_texts("default", "train"), 256, 2048)
    ratios = []
    for _ in range(4):
        started = time.perf_counter()
        with torch.inference_mode():
            model.get_decoder()(windows_NT, use_cache=False)
        plain = time.perf_counter() - started
        started = time.perf_counter()
        collect_moments(model, [windows_NT])
        ratios.append((time.perf_counter() - started) / plain)
    assert statistics.median(ratios[1:]) < 1.3


def test_peak_memory_falls_with_the_budget() -> None:
    """The process's own high-water mark, of a model with many layers at a long context."""
    command = [sys.executable, str(ROOT / "benchmarks" / "peak_memory.py")]
    options = ["--tokens", "8192", "--budget", "0.25", "--json"]
    result = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    full, quarter = (row["peak_bytes"] for row in json.loads(result.stdout)["rows"])
    assert quarter < 0.45 * full


def test_uniform_tables_of_the_default_model(artifact: Artifact) -> None:
    table = RankTable.uniform(artifact.geometry, 0.375)
    assert {rank for *_, rank in table.compressed_ranks()} == {24}
    assert table.bytes_per_token(torch.bfloat16) == 30 * 3 * 2 * 24 * 2


def test_tutorial_runs(tmp_path: Path) -> None:
    tutorial = str(ROOT / "examples" / "tutorial.py")
    result = subprocess.run(
        [sys.executable, tutorial], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert "full cache" in result.stdout
    assert (tmp_path / "runs" / "tutorial" / "config.json").is_file()


def test_items_score_as_through_the_latent_cache(
    model: Any, artifact: Artifact, loaded: Any
) -> None:
    """Log-likelihoods of a padded batch, and the same choices read token by token."""
    from lm_eval.api.instance import Instance

    from matkv.evaluate.lm_eval_model import LoadedLM

    tokenizer = loaded[1]
    pairs = [
        ("Question: What melts when it is warm?\nAnswer:", " ice"),
        ("Question: What melts when it is warm?\nAnswer:", " the colour of a number"),
        ("The lighthouse keeper lit the lamp because", " the night was dark."),
    ]
    matkv.attach(model, artifact, ranks=ragged_table(artifact.geometry, 1))
    lm = LoadedLM(model, tokenizer, batch_size=3)
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs
    ]
    for (score, _), (context, choice) in zip(
        lm.loglikelihood(requests, disable_tqdm=True), pairs, strict=True
    ):
        start = len(tokenizer(context).input_ids)
        ids_BT = tokenizer(context + choice, return_tensors="pt").input_ids
        log_probs_TV = stepwise(model, ids_BT[:, :-1], (1,))[0].log_softmax(-1)
        expected = log_probs_TV.gather(-1, ids_BT[0, 1:, None])[start - 1 :].sum()
        assert score == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("budget", [0.5, 0.25, 0.125])
def test_64_greedy_tokens_of_kernel_oracle_and_static_caches(
    loaded: tuple[Any, Any], model: Any, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact that comes along: codes, sinks and recent tokens; static also compiled."""
    text = data.read_texts("default", "validation")[0]
    ids = loaded[1](text, return_tensors="pt").input_ids[:, :150]
    matkv.attach(model, "smollm2-135m", budget)
    how: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    how["attention_mask"] = torch.ones_like(ids)
    growing = model.generate(ids, **how)
    assert compiled.kernel() is not None
    with monkeypatch.context() as patch:
        patch.setenv("MATKV_KERNEL", "torch")
        compiled._found.cache_clear()
        assert compiled.kernel() is None
        assert torch.equal(model.generate(ids, **how), growing)
    compiled._found.cache_clear()
    with torch.no_grad():  # and what the same codes predict in one pass, without a cache
        uncached = model(growing[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :]
    assert torch.equal(uncached.argmax(-1), growing[:, ids.shape[1] :])
    how["cache_implementation"] = "static"
    assert torch.equal(model.generate(ids, **how, disable_compile=True), growing)
    pieces = model.generate(ids, **how, disable_compile=True, prefill_chunk_size=64)
    assert torch.equal(pieces, growing)
    eager: Any = CompileConfig(backend="eager", fullgraph=True)
    eager.mode, eager._compile_all_devices = None, True
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(model.generate(ids, **how, compile_config=eager), growing)


def test_what_transformers_does_to_a_cache_is_done_to_codes(
    loaded: tuple[Any, Any], model: Any
) -> None:
    """Left padding, beams, drafts that are taken back, a prefix that serves twice."""
    tokenizer, how = loaded[1], {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    matkv.attach(model, "smollm2-135m", 0.25)
    prompts = [tokenizer(3 * one, return_tensors="pt").input_ids for one in PROMPTS]
    alone = [model.generate(ids, **how)[0, ids.shape[1] :] for ids in prompts]
    ids, mask = left_padded(prompts)
    batch = model.generate(ids, attention_mask=mask, **how)[:, ids.shape[1] :]
    assert torch.equal(batch, torch.stack(alone))
    beams = model.generate(ids[:2], attention_mask=mask[:2], num_beams=3, **how)
    plain = model.generate(ids[:2], attention_mask=mask[:2], num_beams=3, **how, use_cache=False)
    assert torch.equal(beams, plain)
    drafted = model.generate(prompts[0], prompt_lookup_num_tokens=6, **how)
    assert torch.equal(drafted[0, prompts[0].shape[1] :], alone[0])
    prefix = matkv.LatentCache(model)
    with torch.no_grad():
        model(prompts[1][:, :30], past_key_values=prefix)
    for _ in range(2):
        reused = model.generate(prompts[1], past_key_values=copy.deepcopy(prefix), **how)
        assert torch.equal(reused[0, prompts[1].shape[1] :], alone[1])
