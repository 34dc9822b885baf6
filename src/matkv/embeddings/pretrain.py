"""SMAE: masked autoencoding over a ladder of sizes, before they are trained for embeddings.

Starbucks, arXiv 2410.13230, section 3.3. The encoder is a BERT; every size has to fill in what is
masked for it, and to hold in its first token what a weak decoder needs to fill in more:

    L = 1/k Σ_(n,d) ( MLM(n,d) + MAE(n,d) ) / 2

    MLM(n,d)   the head on H_n[..., :d], its dense weight cut to the first d columns
    MAE(n,d)   t = the head's transform of H_n's first token, cut likewise, takes the place of the
               first input embedding of a one-layer decoder, which reads the same text masked harder

The decoder starts as the encoder's first layer and shares its embeddings and head.

Shapes: B text, T token, H hidden, D dimension, M masked token, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForMaskedLM, BertModel, PreTrainedTokenizerBase

from matkv.embeddings.rungs import Size, check, name
from matkv.errors import TrainingError, UnsupportedModelError
from matkv.progress import own_randomness

IGNORED = -100  # a label that no loss reads


class RungMaskedAutoencoder(nn.Module):
    """A BERT with its language head, trained to reconstruct text at every size of `rungs`.

    `forward` takes what `NestedWholeWordMasks` makes and gives the loss and its parts by size, as
    the Trainer of transformers wants it.

    Raises:
        SizeError: a rung is outside of the model.
        UnsupportedModelError: the model is no BERT with a language head.
    """

    def __init__(self, model: BertForMaskedLM, rungs: Sequence[Size]) -> None:
        super().__init__()
        if not isinstance(model, BertForMaskedLM):
            raise UnsupportedModelError(
                f"{type(model).__name__} is no BertForMaskedLM: masked autoencoding needs one"
            )
        full = (model.config.num_hidden_layers, model.config.hidden_size)
        self.model, self.rungs = model, check(rungs, full)
        self.decoder = _decoder_of(model.bert)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        decoder_input_ids: Tensor,
        decoder_labels: Tensor,
    ) -> dict[str, Tensor]:
        """{"loss": L, "1x32": …}: the sum over sizes, and each size's part of it.

        All tensors are [BT]; labels are IGNORED wherever nothing is masked.
        """
        out = self.model.bert(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True
        )
        parts = {}
        for layer, dim in self.rungs:
            states_BTD = out.hidden_states[layer][..., :dim]
            mlm = self._mlm(states_BTD, labels)
            mae = self._mae(states_BTD, decoder_input_ids, attention_mask, decoder_labels)
            parts[name((layer, dim))] = (mlm + mae) / (2 * len(self.rungs))
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def _transform(self, states_XD: Tensor) -> Tensor:
        """The head's transform, its dense weight cut to as many columns as there are.  [XH]"""
        transform = self.model.cls.predictions.transform
        dense = transform.dense
        hidden_XH = F.linear(states_XD, dense.weight[:, : states_XD.shape[-1]], dense.bias)
        out_XH: Tensor = transform.LayerNorm(transform.transform_act_fn(hidden_XH))
        return out_XH

    def _mlm(self, states_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """The mean loss of the masked tokens; their logits only are computed.  [MV]"""
        masked_BT = labels_BT != IGNORED
        logits_MV = self.model.cls.predictions.decoder(self._transform(states_BTD[masked_BT]))
        loss: Tensor = F.cross_entropy(logits_MV.float(), labels_BT[masked_BT])
        return loss

    def _mae(
        self, states_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor, labels_BT: Tensor
    ) -> Tensor:
        """The mean loss of what the decoder fills in, given one token of this size."""
        inputs_BTH = self.model.bert.embeddings.word_embeddings(ids_BT)
        first_B1H = self._transform(states_BTD[:, 0]).unsqueeze(1)
        inputs_BTH = torch.cat([first_B1H, inputs_BTH[:, 1:]], dim=1)
        out = self.decoder(inputs_embeds=inputs_BTH, attention_mask=mask_BT)
        return self._mlm(out.last_hidden_state, labels_BT)


def masked_lm(embedder: SentenceTransformer, *, seed: int = 0) -> BertForMaskedLM:
    """A language model around the backbone of `embedder`, whose weights it trains.

    The head is new: its transform random, its output the input embeddings.

    Raises:
        UnsupportedModelError: the backbone is no BERT.
    """
    backbone = embedder[0].model
    if not isinstance(backbone, BertModel):
        raise UnsupportedModelError(
            f"{type(backbone).__name__} is no BertModel: masked autoencoding needs one"
        )
    with own_randomness(seed):
        model = BertForMaskedLM(copy.deepcopy(backbone.config))
    moved: nn.Module = model  # whose `to` has the usual types
    moved.to(device=backbone.device, dtype=backbone.dtype)
    model.bert = backbone
    model.cls.predictions.decoder.weight = backbone.embeddings.word_embeddings.weight
    return model


def _decoder_of(encoder: BertModel) -> BertModel:
    """One layer that starts as the encoder's first and reads with the encoder's embeddings."""
    config = copy.deepcopy(encoder.config)
    config.num_hidden_layers = 1
    decoder = BertModel(config, add_pooling_layer=False)
    decoder.embeddings = encoder.embeddings
    decoder.encoder.layer[0] = copy.deepcopy(encoder.encoder.layer[0])
    return decoder


@dataclass
class NestedWholeWordMasks:
    """Makes batches of texts: whole words masked for the encoder, those and more for the decoder.

    `encoder` and `decoder` are shares of a text's words, at least one word each; a masked word is
    the mask token everywhere. Texts are cut to `max_tokens`, and masks are drawn from `seed`.

    Raises:
        TrainingError: a share is outside of (0, 1), the decoder's is the smaller one, or the
            tokenizer has no mask token or cannot tell words.
    """

    tokenizer: PreTrainedTokenizerBase
    encoder: float = 0.2
    decoder: float = 0.4
    max_tokens: int = 128
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.encoder <= self.decoder < 1:
            raise TrainingError(
                f"shares {self.encoder} and {self.decoder} must be in (0, 1), the encoder's first "
                "and not above the decoder's"
            )
        if self.tokenizer.mask_token_id is None or not self.tokenizer.is_fast:
            raise TrainingError("whole-word masks need a fast tokenizer with a mask token")
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of the texts under "text".  [BT each]

        Raises:
            TrainingError: a text has no word.
        """
        texts = [str(example["text"]) for example in examples]
        read = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.max_tokens,
            padding=True,
            return_tensors="pt",
        )
        ids_BT = read["input_ids"]
        fewer_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        more_BT = torch.zeros_like(fewer_BT)
        for row, text in enumerate(texts):
            words = _words(read.word_ids(row))
            if not words:
                raise TrainingError(f"the text {text[:40]!r} has no word to mask: leave it out")
            order = torch.randperm(len(words), generator=self._generator).tolist()
            for share, masked_BT in ((self.encoder, fewer_BT), (self.decoder, more_BT)):
                # The first words of one order: the encoder's are among the decoder's.
                for index in order[: max(1, round(share * len(words)))]:
                    masked_BT[row, words[index]] = True
        mask = self.tokenizer.mask_token_id
        return {
            "input_ids": ids_BT.masked_fill(fewer_BT, mask),
            "attention_mask": read["attention_mask"],
            "labels": ids_BT.masked_fill(~fewer_BT, IGNORED),
            "decoder_input_ids": ids_BT.masked_fill(more_BT, mask),
            "decoder_labels": ids_BT.masked_fill(~more_BT, IGNORED),
        }


def _words(word_ids: Sequence[int | None]) -> list[list[int]]:
    """The positions of every word's tokens; special tokens belong to none."""
    words: dict[int, list[int]] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            words.setdefault(word, []).append(position)
    return list(words.values())
