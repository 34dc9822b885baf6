"""What is refused before a server answers: one line each, with a remedy."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from matkv.errors import ArtifactError, BudgetError, MatkvError, UnsupportedModelError
from matkv.vllm import choice
from matkv.vllm.options import options_in
from matkv.vllm.plugin import SUPPORTED
from matkv.vllm.refusals import check_adapters, check_layer, check_server


def server(**changes: Any) -> SimpleNamespace:
    """What matkv reads of vLLM's config, with some of it changed."""
    known: dict[str, Any] = {
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "model_config": SimpleNamespace(dtype="torch.bfloat16"),
        "device_config": SimpleNamespace(device_type="cpu"),
        "speculative_config": None,
        "kv_transfer_config": None,
        "parallel_config": SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        "load_config": SimpleNamespace(load_format="auto"),
        "scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=None),
    }
    return SimpleNamespace(**known | changes)


def test_a_plain_server_and_a_plain_layer_pass() -> None:
    check_server(server())
    check_server(server(cache_config=SimpleNamespace(cache_dtype="bfloat16")))
    check_layer()
    check_adapters(None, "auto", "run")
    check_adapters(object(), "matkv", "run")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cache_config": SimpleNamespace(cache_dtype="fp8")}, "--kv-cache-dtype fp8"),
        ({"cache_config": SimpleNamespace(cache_dtype="float16")}, "--kv-cache-dtype float16"),
        ({"device_config": SimpleNamespace(device_type="cuda")}, "serving on cuda is untried"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": SimpleNamespace(kv_connector="Some")}, "names Some"),
        ({"load_config": SimpleNamespace(load_format="dummy")}, "--load-format dummy"),
        (
            {
                "parallel_config": SimpleNamespace(
                    pipeline_parallel_size=2,
                    decode_context_parallel_size=1,
                    prefill_context_parallel_size=1,
                )
            },
            "--pipeline-parallel-size 2",
        ),
    ],
)
def test_what_a_server_cannot_do_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(MatkvError, match=told) as refused:
        check_server(server(**changes))
    assert "\n" not in str(refused.value)


def test_a_gpu_may_be_tried() -> None:
    check_server(server(device_config=SimpleNamespace(device_type="cuda")), untried=True)


def test_exact_tokens_need_pages_of_their_own() -> None:
    alike = server(scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=True))
    check_server(alike)
    with pytest.raises(ArtifactError, match="--disable-hybrid-kv-cache-manager"):
        check_server(alike, has_exact=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"alibi": [0.5]}, "ALiBi"),
        ({"window": 128}, "sliding window of 128"),
        ({"cap": 50.0}, "caps its attention scores at 50.0"),
        ({"kind": "encoder_decoder"}, "has encoder_decoder attention"),
        ({"shared": "layers.3"}, "shares the cache of layers.3"),
        ({"sinks": object()}, "learned attention sinks"),
        ({"other": ("chunk_lookback",)}, "chunk_lookback"),
    ],
)
def test_what_a_layer_does_beside_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UnsupportedModelError, match=told):
        check_layer(**change)


def test_adapters_that_are_not_added_are_refused() -> None:
    with pytest.raises(ArtifactError, match="use --load-format matkv"):
        check_adapters(object(), "auto", "run")


@pytest.mark.parametrize(
    ("additional", "error", "told"),
    [
        (None, ArtifactError, "no artifact is named"),
        ({}, ArtifactError, "no artifact is named"),
        ({"matkv": {}}, ArtifactError, "artifact is missing"),
        ({"matkv": {"artifact": "x", "budget": 2.0}}, BudgetError, r"budget 2.0 must be in \(0, 1"),
        ({"matkv": {"artifact": "x", "budjet": 0.5}}, ArtifactError, "unknown setting 'budjet'"),
    ],
)
def test_options_are_checked(additional: Any, error: type[MatkvError], told: str) -> None:
    with pytest.raises(error, match=told):
        options_in(additional)


def test_a_missing_artifact_is_refused() -> None:
    with pytest.raises(ArtifactError, match="none"):
        options_in({"matkv": {"artifact": "/none", "budget": 0.5}}).open()


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0", "0.3"])
def test_other_versions_of_vllm_are_refused_by_name(version: str) -> None:
    with pytest.raises(UnsupportedModelError, match=version.replace(".", r"\.")) as refused:
        choice.adapter(version)
    assert all(one in str(refused.value) for one in SUPPORTED)


def test_a_patch_of_a_known_minor_is_taken() -> None:
    for minor, module in SUPPORTED.items():
        assert choice.adapter(f"{minor}.7") == choice.adapter(f"{minor}.0+cpu") == module


def fake_vllm(monkeypatch: pytest.MonkeyPatch, backend: str | None, additional: Any) -> None:
    """As much of vLLM as the choice on the CPU asks."""
    wanted = None if backend is None else SimpleNamespace(name=backend)
    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=wanted), additional_config=additional
    )
    parts: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.1.0"},
        "vllm.config": {"get_current_vllm_config": lambda: config},
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.cpu_attn": {"CPUAttentionBackend": "vLLM's own"},
    }
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)


def test_vllm_keeps_its_own_attention_where_ours_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_vllm(monkeypatch, None, {})
    assert choice.Cpu == "vLLM's own"


def test_an_artifact_without_the_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm(monkeypatch, None, {"matkv": {"artifact": "x"}})
    with pytest.raises(UnsupportedModelError, match="--attention-backend CUSTOM"):
        _ = choice.Cpu


def test_the_backend_asks_for_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm(monkeypatch, "CUSTOM", {})
    with pytest.raises(UnsupportedModelError, match=r"vLLM 0\.1\.0"):
        _ = choice.Cpu
    with pytest.raises(AttributeError):
        _ = choice.other
