"""Tiny random embedding models of several architectures, with a tokenizer of letters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from transformers import AutoModel, PreTrainedConfig

from tiny import SPREAD, seeded

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{x}" for x in LETTERS)]
LAYERS, HIDDEN = 4, 32
TEXTS = ["a plane takes off", "the sun", "two dogs run over a field", "rain", "a man cooks rice"]
COMMON: dict[str, Any] = {
    "vocab_size": len(VOCAB),
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "initializer_range": SPREAD,
    "pad_token_id": 0,
}
DEBERTA: dict[str, Any] = {
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}
DECODER: dict[str, Any] = COMMON | {"num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}

ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: transformers.BertConfig(**COMMON),
    "mpnet": lambda: transformers.MPNetConfig(**COMMON | {"pad_token_id": 1}),
    "modernbert": lambda: transformers.ModernBertConfig(
        **COMMON | {"local_attention": 8}, bos_token_id=2, eos_token_id=3, cls_token_id=2,
        sep_token_id=3,
    ),
    "qwen3": lambda: transformers.Qwen3Config(**DECODER, head_dim=8),
}  # fmt: skip
MORE: dict[str, Callable[[], PreTrainedConfig]] = {
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=len(VOCAB), dim=HIDDEN, hidden_dim=48, n_layers=LAYERS, n_heads=4,
        max_position_embeddings=80, initializer_range=SPREAD,
    ),
    "deberta_v2": lambda: transformers.DebertaV2Config(
        **COMMON, relative_attention=True, pos_att_type=["p2c", "c2p"],
        **DEBERTA,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **DECODER, head_dim=8, query_pre_attn_scalar=8, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
    ),
    "t5": lambda: transformers.T5Config(
        vocab_size=len(VOCAB), d_model=HIDDEN, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=4,
    ),
    "llama": lambda: transformers.LlamaConfig(**DECODER),
    "mistral": lambda: transformers.MistralConfig(**DECODER, head_dim=8, sliding_window=4),
    "roberta": lambda: transformers.RobertaConfig(**COMMON),
}  # fmt: skip
REFUSED: dict[str, Callable[[], PreTrainedConfig]] = {
    "albert": lambda: transformers.AlbertConfig(**COMMON, embedding_size=16),
}


def build(
    name: str, *after: Any, pooling: str = "mean", layers: int | None = None
) -> SentenceTransformer:
    """A model of its own: backbone, pooling, and the modules in `after`."""
    first = copy.deepcopy(_transformer(name, layers))
    pool = modules.Pooling(HIDDEN, pooling)
    return SentenceTransformer(modules=[first, pool, *after], device="cpu").eval()


@cache
def _transformer(name: str, layers: int | None) -> Any:
    config = (ARCHITECTURES | MORE | REFUSED)[name]()
    if layers is not None:
        config.num_hidden_layers = layers
    with TemporaryDirectory() as folder:
        save_backbone(config, Path(folder))
        return modules.Transformer(folder)


def save_backbone(config: PreTrainedConfig, folder: Path) -> None:
    """A random backbone, its biases and norms random too, and its tokenizer."""
    with seeded(0):
        model = AutoModel.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")
    library: Any = transformers
    tokenizer = library.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(folder)


def features(model: SentenceTransformer, *columns: list[str]) -> list[dict[str, Any]]:
    """What the Trainer hands to a loss: one batch of features for each column of texts."""
    return [dict(model.preprocess(column)) for column in columns]
