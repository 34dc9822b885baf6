"""Real vLLM engines: tokens are those of matkv's own attention in transformers, and memory is kept.

A test starts engines in processes of their own: `make test-serve`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
import matkv
from coded import KINDS
from matkv.artifact.lora import Lora
from matkv.ranks import RankTable
from one_artifact import adapters_of
from tiny import Tiny, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
LENGTHS = (1, 2, 3, 5, 8, 15, 16, 17, 30, 31, 32, 33, 40, 47, 48, 49) * 2
NEW = 12
MEMORY = {"kv_cache_memory_bytes": 8 << 20, "max_model_len": 256, "max_num_seqs": 32}


@dataclass(frozen=True)
class Served:
    """A tiny model on disk, its artifact at ragged ranks, prompts, and the tokens they lead to."""

    model: Path
    run: Path
    prompts: list[list[int]]
    wanted: list[list[int]]
    table: RankTable
    exact: bool

    def round(self, chosen: slice = slice(None)) -> list[dict[str, Any]]:
        return [{"tokens": one, "new": NEW} for one in self.prompts[chosen]]

    def start(self, *rounds: list[dict[str, Any]], **changes: Any) -> Any:
        arguments = {"model": str(self.model)} | engine.matkv(self.run, 0.5) | MEMORY
        return engine.run(arguments | changes, list(rounds))


def serve(
    subject: Tiny,
    folder: Path,
    seed: int,
    exact: tuple[int, int] = (0, 0),
    lora: Lora | None = None,
) -> Served:
    table = subject.ragged(seed)
    artifact = replace(
        subject.artifact,
        lora=lora,
        tables={0.5: table},
        base_model=str(folder / "model"),
        sink=exact[0],
        recent=exact[1],
    )
    subject.model.save_pretrained(folder / "model")
    artifact.save(folder / "run")
    prompts = [tokens(1, length, seed=i)[0].tolist() for i, length in enumerate(LENGTHS)]
    matkv.attach(subject.model, artifact, ranks=table)
    try:
        wanted = [
            subject.model.generate(torch.tensor([one]), max_new_tokens=NEW, do_sample=False)[
                0, len(one) :
            ].tolist()
            for one in prompts
        ]
    finally:
        matkv.detach(subject.model)
    return Served(folder / "model", folder / "run", prompts, wanted, table, any(exact))


EXACT = {"latents": (0, 0), "exact": (4, 8)}


@pytest.fixture(scope="module", params=[(kind, exact) for kind in KINDS for exact in EXACT])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    kind, exact = request.param
    return serve(KINDS[kind]("llama"), tmp_path_factory.mktemp(kind), 3, EXACT[exact])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(KINDS["ranks"]("llama"), tmp_path_factory.mktemp("plain"), seed=3)


@pytest.fixture(autouse=True)
def has_vllm() -> Iterator[None]:
    pytest.importorskip("vllm")
    yield


def test_tokens_are_ours_alone_batched_and_from_the_prefix_cache(served: Served) -> None:
    alone = [[one] for one in served.round()]
    found = served.start(*alone, served.round())["rounds"]
    assert [one["tokens"][0] for one in found[:-1]] == served.wanted
    assert found[-1]["tokens"] == served.wanted
    assert sum(found[-1]["cached"]) >= 8 * 16


def test_tokens_are_ours_in_chunks_and_in_larger_pages(served: Served) -> None:
    found = served.start(served.round(), max_num_batched_tokens=32, block_size=64)["rounds"]
    assert found[0]["tokens"] == served.wanted


def test_tokens_are_ours_under_preemption(served: Served) -> None:
    pages = 72 if served.exact else 20  # some requests of all
    found = served.start(
        served.round(),
        kv_cache_memory_bytes=served.table.bytes_per_token(torch.float32) * 16 * pages,
        max_model_len=128,
        enable_prefix_caching=False,
    )
    assert found["preemptions"] > 0
    assert found["rounds"][0]["tokens"] == served.wanted


def test_tokens_are_ours_on_two_processes(served: Served) -> None:
    found = served.start(served.round(), tensor_parallel_size=2, distributed_executor_backend="mp")
    assert found["rounds"][0]["tokens"] == served.wanted


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_holds_what_its_bytes_hold(kind: str, tmp_path: Path) -> None:
    one, memory = serve(KINDS[kind]("llama"), tmp_path, seed=3), 4 << 20
    found = one.start(kv_cache_memory_bytes=memory)
    ideal = memory / one.table.bytes_per_token(torch.float32)
    assert 0.97 * ideal < found["fits"] <= ideal


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"additional_config": {}}, "no artifact is named"),
        ({"attention_backend": None}, "add --attention-backend CUSTOM"),
        ({"additional_config": {"matkv": {"artifact": "/none"}}}, "/none"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        (
            {
                "speculative_config": {
                    "method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2
                }
            },
            "speculative decoding is untried",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_served_ends_at_the_start(
    plain: Served, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(engine.EngineError, match=told):
        plain.start([], **changes)


def test_another_model_ends_at_the_start(plain: Served, tmp_path: Path) -> None:
    KINDS["ranks"]("qwen2").model.save_pretrained(tmp_path)
    with pytest.raises(engine.EngineError, match="the artifact was made for"):
        plain.start([], model=str(tmp_path))


def test_adapters_are_in_the_weights(tmp_path: Path) -> None:
    """On two processes, each of which has a part of the fused weights; or they are refused."""
    subject = KINDS["codes"]("llama")
    lora = adapters_of(subject.model, ("q_proj", "v_proj", "o_proj", "down_proj"))
    one, plain = serve(subject, tmp_path, 3, lora=lora), serve(subject, tmp_path / "plain", 3)
    assert one.wanted != plain.wanted
    found = one.start(one.round(), load_format="matkv", tensor_parallel_size=2,
                      distributed_executor_backend="mp")  # fmt: skip
    assert found["rounds"][0]["tokens"] == one.wanted
    with pytest.raises(engine.EngineError, match="use --load-format matkv"):
        one.start([])


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "granite"])
def test_families_need_no_code_of_their_own(name: str, tmp_path: Path) -> None:
    one = serve(KINDS["ranks"](name), tmp_path, seed=1)
    assert one.start(one.round())["rounds"][0]["tokens"] == one.wanted
