"""Long context: answers counted through the real cache, positions that add up, rows kept once."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoTokenizer

import matkv
import matkv.evaluate.needles as needles_module
import matkv.evaluate.positions as positions_module
from matkv.artifact.results import Results
from matkv.artifact.setting import Setting
from matkv.cache.cache import LatentCache
from matkv.cache.naming import cache_name
from matkv.data.haystacks import HaystackConfig, Haystacks, Sample
from matkv.errors import ArtifactError, BudgetError, DataError, FingerprintError
from matkv.evaluate.needles import NEEDLE, NeedleConfig, ask, needles
from matkv.evaluate.positions import POSITIONS, _losses, buckets, positions
from matkv.evaluate.texts import perplexity
from matkv.hf.attach import attachment_of
from matkv.logits import token_losses
from matkv.ranks import RankTable
from tiny import COMMON, Tiny, from_config, save_model, tokens

CONFIG = NeedleConfig(contexts=(400,), depths=(0.5,), samples=2, haystack=HaystackConfig(keys=2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("model")
    save_model(directory)
    return AutoTokenizer.from_pretrained(directory)


def reader(**settings: Any) -> Tiny:
    """A tiny model that knows the tokenizer's bytes and has room for a haystack."""
    common = COMMON | {"vocab_size": 257, "max_position_embeddings": 512, **settings}
    model = from_config(transformers.LlamaConfig(**common))
    return Tiny(model, matkv.calibrate(model, [tokens(2, 64)]))


@pytest.fixture(scope="module")
def shared() -> Tiny:
    return reader()


@pytest.fixture
def subject(shared: Tiny) -> Any:
    yield shared
    matkv.detach(shared.model)


def store(run: Path | None = None, **options: Any) -> Results:
    return Results(run, NEEDLE, **options)


def caches(*budgets: float, **way: Any) -> list[Setting]:
    return [Setting(budget=budget, **way) for budget in (None, *budgets)]


def measure(subject: Tiny, tokenizer: Any, kept: Results, **changes: Any) -> list[dict[str, Any]]:
    settings = caches(*changes.pop("budgets", (0.5,)))
    config = replace(CONFIG, **changes)
    return needles(subject.model, tokenizer, subject.artifact, settings, config, kept)


# ------------------------------------------------------------------------------- retrieval


def pretend(monkeypatch: pytest.MonkeyPatch, model: Any, answers: list[Any]) -> None:
    """Let `generate` continue prompts with these answers in turn, over and over."""
    given: list[int] = []

    def generate(prompt_BT: torch.Tensor, **_: Any) -> torch.Tensor:
        answer = answers[len(given) % len(answers)](prompt_BT)
        given.append(0)
        return torch.cat((prompt_BT, answer), dim=1)

    monkeypatch.setattr(model, "generate", generate)


@pytest.mark.parametrize(("right", "accuracy"), [(4, 1.0), (0, 0.0), (3, 0.75)])
def test_right_answers_are_counted(
    subject: Tiny, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, right: int, accuracy: float
) -> None:
    made = Haystacks(tokenizer, CONFIG.haystack)
    samples = [made.sample("needle", 400, 0.5, index) for index in range(4)]
    wrong = tokenizer(" 0000000", return_tensors="pt").input_ids
    answers = [
        lambda _, a=(sample.answer_A[None] if index < right else wrong): a
        for index, sample in enumerate(samples)
    ]
    pretend(monkeypatch, subject.model, answers)
    scores = needles_module._scores(subject.model, tokenizer, samples)
    assert scores["accuracy"] == accuracy
    assert scores["stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 4))
    assert scores["answer_loss"] > 0
    assert scores["answer_stderr"] > 0


def test_an_answer_in_the_prompt_alone_does_not_count(
    subject: Tiny, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, subject.model, [lambda prompt: prompt[:, :0]])
    sample = Haystacks(tokenizer, CONFIG.haystack).sample("needle", 400, 0.5)
    assert ask(subject.model, tokenizer, sample)[0] is False


def test_generation_and_loss_go_through_the_latent_cache(
    subject: Tiny, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache handed to generation holds the prompt but for its last token, at the ranks' bytes;
    the loss is that of one pass over prompt and answer."""
    table = subject.ragged(2)
    subject.attach(ranks=table)
    sample = Haystacks(tokenizer, CONFIG.haystack).sample("needle", 400, 0.5)
    held: list[tuple[type, int, int]] = []
    original = subject.model.generate

    def spy(prompt: Any, **how: Any) -> Any:
        cache = how[cache_name(type(subject.model).forward)]
        held.append((type(cache), cache.get_seq_length(), cache.used_nbytes))
        assert how["do_sample"] is False
        return original(prompt, **how)

    monkeypatch.setattr(subject.model, "generate", spy)
    _, loss = ask(subject.model, tokenizer, sample)
    assert held == [(LatentCache, 399, table.nbytes(399, torch.float32))]
    whole_T = torch.cat((sample.prompt_T, sample.answer_A))
    with torch.no_grad():
        logits_TV = subject.model(whole_T[None], use_cache=False).logits[0]
    direct = F.cross_entropy(logits_TV[399:-1], sample.answer_A)
    assert loss == pytest.approx(float(direct), rel=1e-5)


def test_full_rank_answers_as_the_plain_model(
    subject: Tiny, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy tokens, not only scores: a random model answers wrongly in its own way."""
    outputs: list[list[int]] = []
    original = subject.model.generate

    def spy(prompt: Any, **how: Any) -> Any:
        out = original(prompt, **how)
        outputs.append(out[0, prompt.shape[1] :].tolist())
        return out

    monkeypatch.setattr(subject.model, "generate", spy)
    rows = measure(subject, tokenizer, store(), budgets=(1.0, 0.25))
    full, whole, quarter = rows[:2], rows[2:4], rows[4:]
    for plain, attached, truncated in zip(full, whole, quarter, strict=True):
        assert attached["answer_loss"] == pytest.approx(plain["answer_loss"], rel=1e-5)
        assert attached["accuracy"] == plain["accuracy"]
        assert truncated["answer_loss"] != pytest.approx(plain["answer_loss"], rel=1e-4)
    assert outputs[:4] == outputs[4:8]
    assert all(len(one) == 8 + needles_module.SLACK for one in outputs)


def test_layers_with_sliding_windows_answer_too(tokenizer: Any) -> None:
    common = COMMON | {"vocab_size": 257, "max_position_embeddings": 512, "num_hidden_layers": 2}
    layers = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(
        **common, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, layer_types=layers
    )
    model = from_config(config)
    subject = Tiny(model, matkv.calibrate(model, [tokens(2, 64)]))
    rows = measure(subject, tokenizer, store(), budgets=(1.0,), tests=("needle",))
    assert rows[1]["answer_loss"] == pytest.approx(rows[0]["answer_loss"], rel=1e-5)


def test_rows_name_what_was_measured(subject: Tiny, tokenizer: Any, tmp_path: Path) -> None:
    seen: list[int] = []
    rows = needles(
        subject.model,
        tokenizer,
        subject.artifact,
        caches(0.5, sink=2),
        CONFIG,
        store(tmp_path),
        on_progress=lambda at: seen.append(at.done),
    )
    assert [(row["budget"], row["test"], row["sink"]) for row in rows] == [
        (None, "needle", None),
        (None, "multikey", None),
        (0.5, "needle", 2),
        (0.5, "multikey", 2),
    ]
    asked = {"context": 400, "depth": 0.5, "n": 2, "digits": 7, "keys": 2, "seed": 0, "recipe": 1}
    assert all(asked.items() <= row.items() for row in rows)
    assert rows[0]["ranks"] is None
    assert rows[2]["recent"] == 0
    assert len(rows[2]["ranks"]) == 12
    assert rows[0]["made"]["versions"]["torch"]
    assert seen == [800, 1600, 2400, 3200]
    assert seen[-1] == CONFIG.tokens * 2
    assert attachment_of(subject.model) is None
    written = json.loads((tmp_path / "results" / "needle.json").read_text())["rows"]
    assert written == rows


def test_measured_rows_are_not_measured_again(
    subject: Tiny, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure(subject, tokenizer, store(tmp_path))
    asked: list[Sample] = []

    def count(model: Any, tokenizer: Any, sample: Sample) -> tuple[bool, float]:
        asked.append(sample)
        return True, 0.5

    monkeypatch.setattr(needles_module, "ask", count)
    assert measure(subject, tokenizer, store(tmp_path)) == first
    assert asked == []
    more = measure(subject, tokenizer, store(tmp_path), budgets=(0.5, 0.25))
    assert (more[:4], len(asked)) == (first, 4)
    assert measure(subject, tokenizer, store(tmp_path), samples=3)[0]["n"] == 3
    assert len(asked) == 4 + 4 * 3
    other_seed = HaystackConfig(keys=2, seed=1)
    measure(subject, tokenizer, store(tmp_path), haystack=other_seed)
    assert len(asked) == 16 + 8
    again = measure(subject, tokenizer, store(tmp_path, again=True))
    assert len(asked) == 24 + 8
    assert [row["answer_loss"] for row in again] == [0.5] * 4
    kept = json.loads((tmp_path / "results" / "needle.json").read_text())["rows"]
    assert len(kept) == 4 + 2 + 4 + 4  # replaced, not added


def test_a_kill_loses_only_the_row_under_way(
    subject: Tiny, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sample] = []

    def interrupted(model: Any, tokenizer: Any, sample: Sample) -> tuple[bool, float]:
        asked.append(sample)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return True, 0.5

    monkeypatch.setattr(needles_module, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt) as held:  # its traceback must not keep the model attached
        measure(subject, tokenizer, store(tmp_path))
    assert held.traceback
    assert attachment_of(subject.model) is None
    assert len(json.loads((tmp_path / "results" / "needle.json").read_text())["rows"]) == 2
    assert len(measure(subject, tokenizer, store(tmp_path))) == 4
    assert len(asked) == 6 + 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": (400, 30)}, "context of 30 tokens is too short"),
        ({"contexts": (400, 505)}, "and an answer of 12 needs 517 positions, the model has 512"),
        ({"depths": (2.0,)}, r"depths 2\.0 must be at most"),
    ],
)
def test_bad_contexts_are_refused_before_any_work(
    subject: Tiny,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(needles_module, "ask", lambda *_: pytest.fail("measured"))
    with pytest.raises(DataError, match=message):
        measure(subject, tokenizer, store(), **changes)


def test_other_bad_settings_are_refused_before_any_work(
    subject: Tiny, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="samples 0 must be above 0"):
        replace(CONFIG, samples=0)
    monkeypatch.setattr(needles_module, "ask", lambda *_: pytest.fail("measured"))
    with pytest.raises(BudgetError, match=r"budget 1\.5 must be in"):
        measure(subject, tokenizer, store(), budgets=(0.5, 1.5))
    stranger = replace(subject.artifact, fingerprint=subject.artifact.fingerprint[::-1])
    with pytest.raises(FingerprintError):
        needles(subject.model, tokenizer, stranger, caches(0.5), CONFIG, store())
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "needle.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        store(tmp_path)


# ------------------------------------------------------------------------------- positions


def test_buckets_double_up_to_the_window() -> None:
    assert buckets(512) == [(0, 64), (64, 128), (128, 256), (256, 512)]
    assert buckets(300) == [(0, 64), (64, 128), (128, 256), (256, 300)]
    assert buckets(64) == [(0, 64)]
    assert buckets(20) == [(0, 20)]


def by_position(subject: Tiny, run: Path | None = None, **options: Any) -> list[dict[str, Any]]:
    windows_NT = tokens(3, 150, seed=options.pop("seed", 0))
    kept = Results(run, POSITIONS, again=options.pop("again", False))
    settings = caches(1.0, 0.25)
    return positions(subject.model, subject.artifact, windows_NT, "text", settings, kept, **options)


def test_positions_recombine_to_the_perplexity_of_all(subject: Tiny) -> None:
    seen: list[int] = []
    rows = by_position(subject, on_progress=lambda at: seen.append(at.done))
    assert [(row["start"], row["end"]) for row in rows[:3]] == [(0, 64), (64, 128), (128, 150)]
    assert [row["tokens"] for row in rows[:3]] == [3 * 63, 3 * 64, 3 * 22]
    for budget in (None, 1.0, 0.25):
        matkv.detach(subject.model)
        if budget is not None:
            subject.attach(ranks=RankTable.uniform(subject.geometry, budget))
        mine = [row for row in rows if row["budget"] == budget]
        total = sum(row["tokens"] * math.log(row["perplexity"]) for row in mine)
        value, _, count = perplexity(subject.model, tokens(3, 150))
        assert sum(row["tokens"] for row in mine) == count
        assert math.exp(total / count) == pytest.approx(value, rel=1e-5)
    assert seen[-1] == 3 * 450
    assert seen == sorted(seen)


def test_a_bucket_holds_the_tokens_of_its_positions(subject: Tiny) -> None:
    windows_NT = tokens(3, 150)
    with torch.no_grad():
        logits_NTV = subject.model(windows_NT).logits
    expected = F.cross_entropy(logits_NTV[:, 63:127].flatten(0, 1), windows_NT[:, 64:128].flatten())
    row = by_position(subject)[1]
    assert row["perplexity"] == pytest.approx(math.exp(float(expected)), rel=1e-5)
    assert row["stderr"] > 0


def test_positions_are_kept_and_tied_to_their_text(
    subject: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = by_position(subject, tmp_path)
    runs: list[int] = []
    original = _losses

    def count(*arguments: Any) -> torch.Tensor:
        runs.append(0)
        return original(*arguments)

    monkeypatch.setattr(positions_module, "_losses", count)
    assert by_position(subject, tmp_path) == rows
    assert runs == []
    assert by_position(subject, tmp_path, seed=1) != rows  # the text changed under its name
    assert len(runs) == 3
    by_position(subject, tmp_path, again=True)
    assert len(runs) == 6


@pytest.mark.parametrize("shape", [(0, 8), (2, 1)])
def test_too_little_text_is_refused(subject: Tiny, shape: tuple[int, int]) -> None:
    windows_NT = torch.zeros(shape, dtype=torch.int64)
    kept = Results(None, POSITIONS)
    with pytest.raises(DataError, match="at least 2"):
        positions(subject.model, subject.artifact, windows_NT, "t", caches(), kept)


def test_windows_beyond_the_positions_are_refused(subject: Tiny) -> None:
    kept = Results(None, POSITIONS)
    with pytest.raises(DataError, match="513 tokens needs 513 positions, the model has 512"):
        positions(subject.model, subject.artifact, tokens(1, 513), "t", caches(), kept)


def test_token_losses_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_NV, target_N = torch.randn(7, 5), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    expected_N = F.cross_entropy(logits_NV, target_N, reduction="none")
    monkeypatch.setattr("matkv.logits.CACHED_ELEMENTS", 12)
    assert torch.equal(token_losses(logits_NV, target_N), expected_N)
