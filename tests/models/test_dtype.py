"""Which dtype "auto" means, and which devices and dtypes there are."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import matkv
from matkv.errors import ModelError
from matkv.models import dtype as dtypes
from tiny import save_model

CPU = torch.device("cpu")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """What this processor is taken to have fast products of."""
    fast = {"bf16": True, "fp16": False}
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast["bf16"])
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: fast["fp16"])
    return fast


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("fp16", [True, False])
def test_auto_is_the_fastest_that_loses_nothing(
    products: dict[str, bool], bf16: bool, fp16: bool
) -> None:
    products |= {"bf16": bf16, "fp16": fp16}
    half = torch.bfloat16 if bf16 else torch.float32
    assert dtypes.choose("auto", torch.bfloat16, CPU) == half
    assert dtypes.choose("auto", torch.float16, CPU) == (torch.float16 if fp16 else torch.float32)
    assert dtypes.choose("auto", torch.float32, CPU) == torch.float32  # bf16 would lose
    assert dtypes.choose("bfloat16", torch.float32, CPU) == torch.bfloat16  # as asked


def test_a_build_without_onednn_has_no_fast_products(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        pass

    monkeypatch.setattr(torch.ops, "mkldnn", Nothing())
    assert dtypes.fastest(torch.bfloat16, CPU) == torch.float32


@pytest.mark.parametrize("stored", ["bfloat16", "float16", None])
def test_a_model_is_loaded_so_and_the_log_says_it_once(
    tmp_path: Path,
    products: dict[str, bool],
    caplog: pytest.LogCaptureFixture,
    stored: str | None,
) -> None:
    products["bf16"] = False
    path = tmp_path / "model"
    save_model(path, stored or "bfloat16")
    if stored is None:  # a config that leaves it to the weights
        settings = json.loads((path / "config.json").read_text())
        del settings["dtype"]
        (path / "config.json").write_text(json.dumps(settings))
    with caplog.at_level(logging.WARNING, "matkv"):
        model, _ = matkv.load_model(path)
    assert model.dtype == torch.float32
    (line,) = [one.getMessage() for one in caplog.records]
    assert f"model is stored in {stored or 'bfloat16'} and runs in float32" in line
    asked, _ = matkv.load_model(path, "bfloat16")
    assert asked.dtype == torch.bfloat16
    assert len(caplog.records) == 1


def test_nothing_is_said_where_the_stored_dtype_is_fast(
    tmp_path: Path, products: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tmp_path / "model", "bfloat16")
    model, _ = matkv.load_model(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert not caplog.records


@pytest.mark.parametrize("dtype", ["float64x", "int8", "nonsense", "Tensor", torch.int8, None])
def test_a_dtype_that_is_none_is_named(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(ModelError, match=r"dtype '.*' must be auto, float32, bfloat16, float16"):
        matkv.load_model(tmp_path, dtype)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "mps:7", "meta", 1.5, ""])
def test_a_device_that_is_not_there_is_named(tmp_path: Path, device: Any) -> None:
    with pytest.raises(ModelError, match=r"device '.*: use cpu") as caught:
        matkv.load_model(tmp_path, device=device)
    assert "\n" not in str(caught.value)
