"""GGUF files: converted once, recognized by their content, never half written."""

from __future__ import annotations

import errno
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import matkv
from matkv.errors import ModelError
from matkv.models import gguf, load_config
from matkv.models.gguf import SOURCE_FILE, converted, gguf_model_dir, is_current

WIDTH, HIDDEN, LAYERS, HEADS = 32, 48, 2, 2
VOCAB = ["<|endoftext|>", "<|im_start|>", *(chr(code) for code in range(33, 127)), "Ġ", "th"]


def write_gguf(path: Path, seed: int = 0) -> np.ndarray[Any, Any]:
    """A tiny random Llama as a .gguf file of fp32; returns its embeddings."""
    from gguf import GGUFWriter

    generator = np.random.default_rng(seed)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCAB))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCAB)
    writer.add_token_types([3, 3, *[1] * (len(VOCAB) - 2)])
    writer.add_token_merges(["t h"])
    for number, name in enumerate(("bos", "eos", "unk", "pad")):
        getattr(writer, f"add_{name}_token_id")(int(number == 0))
    writer.add_chat_template("{{ messages[0].content }}")
    shapes = {"token_embd": (len(VOCAB), WIDTH), "output": (len(VOCAB), WIDTH)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{part}": (HIDDEN, WIDTH) for part in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down"] = (WIDTH, HIDDEN)
    weights = {name: 0.1 * generator.standard_normal(shape) for name, shape in shapes.items()}
    for layer in range(LAYERS):
        weights |= {f"blk.{layer}.{norm}_norm": np.ones(WIDTH) for norm in ("attn", "ffn")}
    weights["output_norm"] = np.ones(WIDTH)
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights["token_embd"].astype(np.float32)


class Source:
    """A file in a cache folder of its own; counts conversions, may fail or take its time."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = home / "a.gguf"
        self.embeddings = write_gguf(self.path)
        self.conversions, self.error, self.wait = 0, None, 0.0
        self.read = gguf.load_model
        monkeypatch.setenv("MATKV_CACHE", str(home / "cache"))
        monkeypatch.setattr(gguf, "load_model", self.load)

    error: BaseException | None

    def load(self, path: Path, dtype: torch.dtype) -> Any:
        self.conversions += 1
        time.sleep(self.wait)
        model: Any = self.read(path, dtype)
        if self.error is not None:
            model.save_pretrained = self.fail
        return model

    def fail(self, directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half of it")
        assert self.error is not None
        raise self.error


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    return Source(tmp_path, monkeypatch)


def beside(directory: Path) -> list[str]:
    """What is in the folder of a copy, but for the file that processes wait at."""
    return sorted(path.name for path in directory.parent.iterdir() if path.suffix != ".lock")


def test_a_file_is_converted_once_and_loads_as_it_is(source: Source) -> None:
    model: Any
    again: Any
    model, tokenizer = matkv.load_model(source.path)
    again, _ = matkv.load_model(str(source.path))
    assert source.conversions == 1
    assert model.dtype == torch.float32
    expected_VD = torch.from_numpy(source.embeddings)
    for one in (model, again):
        assert torch.equal(one.get_input_embeddings().weight, expected_VD)
        assert one.config._name_or_path == str(source.path)
    assert tokenizer.tokenize("the 12") == ["th", "e", "Ġ", "1", "2"]  # digits alone
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1)
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_the_content_names_the_copy(source: Source) -> None:
    first = gguf_model_dir(source.path)
    moved = source.path.rename(source.path.with_name("a-moved.gguf"))
    write_gguf(source.path, seed=1)
    assert gguf_model_dir(source.path) != first
    assert source.conversions == 2
    assert moved.with_name("a.gguf").is_file()
    assert len(beside(first)) == 2


def test_a_config_needs_no_conversion_and_has_the_dtype_it_will_run_in(source: Source) -> None:
    config = load_config(source.path)
    assert (config.num_hidden_layers, config.dtype) == (LAYERS, torch.float32)
    assert source.conversions == 0


@pytest.mark.parametrize(
    "damage", ["cut weights", "no tokenizer", "no source", "odd source", "old"]
)
def test_a_damaged_or_old_copy_is_replaced(
    source: Source, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = gguf_model_dir(source.path)
    weights = (directory / "model.safetensors").read_bytes()
    if damage == "cut weights":
        (directory / "model.safetensors").write_bytes(weights[:-1])
    elif damage == "no tokenizer":
        (directory / "tokenizer.json").unlink()
    elif damage == "no source":
        (directory / SOURCE_FILE).unlink()
    elif damage == "odd source":
        (directory / SOURCE_FILE).write_text("[]")
    else:
        monkeypatch.setattr(gguf, "CONVERSION", gguf.CONVERSION + 1)
    (directory / "left over").touch()
    assert gguf_model_dir(source.path) == directory
    assert source.conversions == 2
    assert (directory / "model.safetensors").read_bytes() == weights
    assert not (directory / "left over").exists()
    assert beside(directory) == [directory.name]


def test_of_two_at_once_one_converts_and_the_other_waits(source: Source) -> None:
    source.wait = 0.3
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(gguf_model_dir(source.path)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.conversions == 1
    assert results[0] == results[1]
    assert is_current(results[0], gguf.sha256_of(source.path))


@pytest.mark.parametrize("kind", ["os", "safetensors"])
def test_a_full_disk_names_the_remedy_and_keeps_the_old_copy(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from safetensors import SafetensorError

    final = converted(source.path, "0" * 64, tmp_path / "models" / "it", torch.float32)
    monkeypatch.setattr(gguf, "CONVERSION", gguf.CONVERSION + 1)
    full = "No space left on device"
    source.error = OSError(errno.ENOSPC, full) if kind == "os" else SafetensorError(full)
    with pytest.raises(ModelError, match=r"No space left.*free space.*MATKV_CACHE"):
        converted(source.path, "0" * 64, final, torch.float32)
    assert beside(final) == [final.name]
    assert json.loads((final / SOURCE_FILE).read_text())["conversion"] == gguf.CONVERSION - 1


def test_interruption_leaves_nothing_behind(source: Source, tmp_path: Path) -> None:
    source.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        gguf_model_dir(source.path)
    assert beside(tmp_path / "cache" / "models" / "it") == []


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"PK"])
def test_a_file_that_is_none_is_an_error_of_one_line(
    source: Source, tmp_path: Path, content: bytes
) -> None:
    source.path.write_bytes(content)
    with pytest.raises(ModelError, match=r"a\.gguf") as caught:
        matkv.load_model(source.path)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "models").glob("a-*")) == []


def test_a_missing_package_is_named(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs the package gguf: pip install gguf accelerate"):
        gguf_model_dir(source.path)
