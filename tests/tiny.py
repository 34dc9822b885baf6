"""Tiny random models of every family, and what tests need around them.

Shapes: B batch, G KV head, T token, D head dim.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

import matkv
from matkv.artifact.artifact import Artifact
from matkv.bases.maps import Maps
from matkv.cache.layer import LatentLayer
from matkv.ranks import SIDES, Geometry, LayerRanks, LayerShape, RankTable

VOCAB = 96
# Weights large enough that attention is far from even, small enough that fp32 noise stays small.
SPREAD = 0.12
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": SPREAD,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _rotary(share: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=24),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **COMMON | {"num_hidden_layers": 4},
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gemma3_rings": lambda: transformers.Gemma3TextConfig(
        **COMMON | {"num_hidden_layers": 4},
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=9,
        layer_types=["full_attention", "sliding_attention"] * 2,
    ),
    "phi3": lambda: transformers.Phi3Config(**COMMON, rope_parameters=_rotary(0.5)),
    "olmo2": lambda: transformers.Olmo2Config(**COMMON),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **{name: value for name, value in COMMON.items() if name != "num_key_value_heads"},
        rope_parameters=_rotary(0.25),
    ),
    "granite": lambda: transformers.GraniteConfig(**COMMON, attention_multiplier=0.3),
    "cohere": lambda: transformers.CohereConfig(**COMMON, logit_scale=1.0),
    "starcoder2": lambda: transformers.Starcoder2Config(**COMMON),
}


# Like other families as far as matkv can see: only the shortest tests take these too.
RELATED = ("granite", "cohere", "starcoder2")


@dataclass(frozen=True)
class Tiny:
    """A tiny model in evaluation mode, and an artifact calibrated for it."""

    model: Any
    artifact: Artifact

    @property
    def geometry(self) -> Geometry:
        return self.artifact.geometry

    def ragged(self, seed: int = 0) -> RankTable:
        return ragged_table(self.geometry, seed)

    def attach(self, **options: Any) -> Any:
        """Attach at the full budget unless told otherwise."""
        if "ranks" not in options:
            options.setdefault("budget", 1.0)
        return matkv.attach(self.model, self.artifact, **options)


def build(name: str, seed: int = 0) -> Any:
    """A new random model; unlike a fresh one, its biases and norms are random too."""
    return from_config(FAMILIES[name](), seed)


def from_config(config: PreTrainedConfig, seed: int = 0) -> Any:
    with seeded(seed):
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
    return model


@cache
def tiny(name: str) -> Tiny:
    """The model of a family that all tests share; they must leave it as it was."""
    model = build(name)
    with pytest.MonkeyPatch.context() as patch:
        if name.endswith("_rings"):  # windows so short that tiny prompts pass them
            patch.setattr("matkv.hf.geometry.LEAST_WINDOW", 1)
        return Tiny(model, matkv.calibrate(model, [tokens(4, 48, seed=7)]))


def save_model(
    directory: Path, dtype: str = "float32", seed: int = 0, *, family: str | None = None
) -> None:
    """A tiny model with a tokenizer of bytes and a chat template, as a model directory.

    A Llama unless another of `FAMILIES` is named.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0, **{letter: index for index, letter in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    fast.save_pretrained(directory)
    config: PreTrainedConfig = transformers.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        eos_token_id=0,
        bos_token_id=None,
    )
    if family is not None:
        config = FAMILIES[family]()
        config.vocab_size, config.eos_token_id = len(vocab), 0
    with seeded(seed):
        model = AutoModelForCausalLM.from_config(config)
    model.to(getattr(torch, dtype)).save_pretrained(directory)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generator, which model initialization and sampling use, and put it back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids without the padding token.  [BT]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)


def left_padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One batch of prompts [1 T] of several lengths, and its attention mask."""
    longest = max(prompt.shape[1] for prompt in prompts)
    rows = [torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in prompts]
    ids_BT = torch.cat(rows)
    return ids_BT, (ids_BT != 0).long()


def ragged_ranks(rng: random.Random, shape: LayerShape) -> LayerRanks:
    """Random ranks with zeros, ones, odd ones and full ones among them."""
    dim = shape.head_dim
    choices = (0, 1, 3, dim // 4, dim // 2, dim // 2 + 1, dim - 1, dim)
    return tuple(rng.choice(choices) if shape.is_compressed else dim for _ in range(shape.kv_heads))


def ragged_table(geometry: Geometry, seed: int = 0) -> RankTable:
    rng = random.Random(seed)
    key, value = (tuple(ragged_ranks(rng, s) for s in geometry.layers) for _ in SIDES)
    return RankTable(geometry, key, value)


def random_maps(heads: int, dim: int, seed: int, *, oblique: bool = False) -> Maps:
    """Random orthogonal bases, or a random map with its inverse for the way back."""
    generator = torch.Generator().manual_seed(seed)
    random_GDD = torch.randn(heads, dim, dim, generator=generator)
    basis_GDD = torch.linalg.qr(random_GDD).Q
    if not oblique:
        return Maps.orthogonal(basis_GDD)
    scale_D = torch.linspace(0.5, 2, dim)
    return Maps(basis_GDD * scale_D, basis_GDD / scale_D)


def greedy(model: Any, ids: Tensor, new: int = 16, **options: Any) -> Tensor:
    """Token ids of greedy generation, prompt included."""
    out: Tensor = model.generate(ids, max_new_tokens=new, do_sample=False, **options)
    return out


@torch.no_grad()
def stepwise(
    model: Any,
    ids_BT: Tensor,
    steps: tuple[int, ...],
    cache: Any = None,
    mask_BT: Tensor | None = None,
) -> Tensor:
    """Logits of `ids_BT`, fed through a cache in pieces of `steps` tokens, then one by one."""
    cache = matkv.LatentCache(model) if cache is None else cache
    sizes = [*steps, *[1] * (ids_BT.shape[1] - sum(steps))]
    logits, end = [], 0
    for size in sizes:
        start, end = end, end + size
        inputs: dict[str, Any] = {}
        if mask_BT is not None:
            positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)
            inputs = {
                "attention_mask": mask_BT[:, :end],
                "position_ids": positions_BT[:, start:end],
            }
        logits.append(model(ids_BT[:, start:end], past_key_values=cache, **inputs).logits)
    return torch.cat(logits, dim=1)


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def latent_layers(cache: Any) -> list[LatentLayer]:
    return [layer for layer in cache.layers if isinstance(layer, LatentLayer)]
