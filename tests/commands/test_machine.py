"""What the machine has, and whether an artifact fits."""

from __future__ import annotations

import pytest
import torch

import matkv
from matkv.commands import machine as doctor
from matkv.errors import ModelError
from tiny import Tiny, tiny


@pytest.mark.parametrize(("fast", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_the_dtype_is_the_one_that_auto_means(
    monkeypatch: pytest.MonkeyPatch, fast: bool, chosen: str
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    monkeypatch.setattr(doctor, "gflops", lambda dtype, device: 2.0)
    found = doctor.examine()
    assert found["dtype"] == chosen
    assert ("no fast products" in found["reason"]) != fast
    assert found["versions"]["matkv"] != "not installed"
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["devices"][0] == found["device"] == "cpu"


def test_products_are_measured_in_milliseconds() -> None:
    cpu = torch.device("cpu")
    assert doctor.gflops(torch.float32, cpu, size=64) > 0
    assert doctor.PROBE_SECONDS <= 0.02


def test_what_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gflops", lambda dtype, device: 2.0)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "peft" else object())
    assert doctor.examine()["missing"] == {"distill": "pip install accelerate peft datasets"}


def test_an_artifact_fits_its_own_model_alone(llama: Tiny) -> None:
    assert doctor.fit(llama.artifact, llama.model) == {"fits": True, "why": None}
    other = doctor.fit(llama.artifact, tiny("qwen2").model)
    assert not other["fits"]
    assert other["why"]


def test_an_attached_model_is_known_too(llama: Tiny) -> None:
    matkv.attach(llama.model, llama.artifact, 0.5)
    assert doctor.fit(llama.artifact, llama.model)["fits"]


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ModelError, match="no device 'cuda:99' here"):
        doctor.examine("cuda:99")
