"""Masked autoencoding over sizes: masks, the loss by hand, and that it learns.

Shapes: B text, T token, H hidden, D dimension.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn import functional as F
from transformers import BertForMaskedLM

from matkv.embeddings.pretrain import (
    IGNORED,
    NestedWholeWordMasks,
    RungMaskedAutoencoder,
    masked_lm,
)
from matkv.errors import SizeError, TrainingError, UnsupportedModelError
from tiny_embedders import HIDDEN, LAYERS, TEXTS, build

RUNGS = ((1, 8), (2, 16), (LAYERS, HIDDEN))
EXAMPLES = [{"text": text} for text in TEXTS]


def masks(**options: Any) -> NestedWholeWordMasks:
    return NestedWholeWordMasks(build("bert").tokenizer, **options)


def test_masks_are_nested_and_of_whole_words() -> None:
    make = masks(encoder=0.3, decoder=0.7)
    tokenizer: Any = make.tokenizer
    for _ in range(10):
        batch = make(EXAMPLES)
        fewer_BT = batch["labels"] != IGNORED
        more_BT = batch["decoder_labels"] != IGNORED
        assert bool((fewer_BT <= more_BT).all())
        assert torch.equal(batch["input_ids"] == tokenizer.mask_token_id, fewer_BT)
        assert torch.equal(batch["decoder_input_ids"] == tokenizer.mask_token_id, more_BT)
        for row, text in enumerate(TEXTS):
            words = text.split()
            read = tokenizer(text)
            for masked_BT, share in ((fewer_BT, 0.3), (more_BT, 0.7)):
                hit = {
                    word: {
                        bool(masked_BT[row, p]) for p, w in enumerate(read.word_ids()) if w == word
                    }
                    for word in range(len(words))
                }
                assert all(len(found) == 1 for found in hit.values())
                count = sum(True in found for found in hit.values())
                assert count == max(1, round(share * len(words)))
            assert not more_BT[row, 0]
        whole = torch.where(fewer_BT, batch["labels"], batch["input_ids"])
        assert torch.equal(whole, tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"])


def test_masks_depend_on_the_seed_alone() -> None:
    first, again, other = masks(seed=1), masks(seed=1), masks(seed=2)
    batches = [
        [make(EXAMPLES)["decoder_labels"] for _ in range(3)] for make in (first, again, other)
    ]
    assert all(map(torch.equal, batches[0], batches[1]))
    assert not all(map(torch.equal, batches[0], batches[2]))
    assert not torch.equal(batches[0][0], batches[0][1])


@pytest.mark.parametrize("shares", [(0.0, 0.4), (0.5, 0.4), (0.2, 1.0)])
def test_shares_that_cannot_be_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(TrainingError, match="must be in"):
        masks(encoder=shares[0], decoder=shares[1])


def test_what_cannot_be_masked_is_refused() -> None:
    with pytest.raises(TrainingError, match="has no word to mask"):
        masks()([{"text": "  "}])
    tokenizer = build("bert").tokenizer
    tokenizer.mask_token = None
    with pytest.raises(TrainingError, match="a mask token"):
        NestedWholeWordMasks(tokenizer)


def test_the_loss_is_the_formula() -> None:
    model = masked_lm(build("bert")).eval()
    learner = RungMaskedAutoencoder(model, RUNGS).eval()
    batch = masks()(EXAMPLES)
    found = learner(**batch)
    assert list(found) == ["loss", "1x8", "2x16", "4x32"]
    torch.testing.assert_close(
        found["loss"], torch.stack([value for size, value in found.items() if "x" in size]).sum()
    )
    # The full size of one rung alone, by the model's own head.
    alone = RungMaskedAutoencoder(model, [(LAYERS, HIDDEN)]).eval()
    mlm = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss
    states_BTH = model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    mae = _reconstructed(alone, states_BTH, batch)
    torch.testing.assert_close(alone(**batch)["loss"], (mlm + mae) / 2)


def _reconstructed(learner: RungMaskedAutoencoder, states_BTH: Tensor, batch: Any) -> Tensor:
    head = learner.model.cls.predictions
    inputs_BTH = learner.model.bert.embeddings.word_embeddings(batch["decoder_input_ids"]).clone()
    inputs_BTH[:, 0] = head.transform(states_BTH[:, 0])
    out = learner.decoder(inputs_embeds=inputs_BTH, attention_mask=batch["attention_mask"])
    logits = head.decoder(head.transform(out.last_hidden_state))
    return F.cross_entropy(logits.flatten(0, 1), batch["decoder_labels"].flatten())


def test_a_size_reads_no_more_than_it_has() -> None:
    embedder = build("bert")
    learner = RungMaskedAutoencoder(masked_lm(embedder), [(2, 8)])
    learner(**masks()(EXAMPLES))["loss"].backward()
    layers = embedder[0].model.encoder.layer
    moved = [any(_reached(p) for p in layer.parameters()) for layer in layers]
    assert moved == [True, True, False, False]
    dense: Tensor = learner.model.cls.predictions.transform.dense.weight
    assert dense.grad is not None
    assert bool(dense.grad[:, :8].any())
    assert _reached(embedder[0].model.embeddings.word_embeddings.weight)


def _reached(parameter: Any) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def test_the_decoder_starts_as_the_first_layer_and_shares_its_embeddings() -> None:
    model = masked_lm(build("bert"))
    learner = RungMaskedAutoencoder(model, RUNGS)
    first = model.bert.encoder.layer[0].state_dict()
    for name, value in learner.decoder.encoder.layer[0].state_dict().items():
        assert torch.equal(value, first[name])
    assert learner.decoder.embeddings is model.bert.embeddings
    weights = {id(p) for p in model.bert.encoder.parameters()}
    assert not any(id(p) in weights for p in learner.decoder.encoder.parameters())


def test_training_it_trains_the_embedding_model() -> None:
    embedder = build("bert").train()
    before = embedder.encode(TEXTS)
    learner = RungMaskedAutoencoder(masked_lm(embedder), RUNGS).train()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    make = masks()
    batch = make(EXAMPLES)
    losses = []
    for _ in range(30):
        loss = learner(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert abs(embedder.encode(TEXTS) - before).max() > 0.01


def test_other_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="MPNetModel is no BertModel"):
        masked_lm(build("mpnet"))
    wrong: Any = build("bert")[0].model
    with pytest.raises(UnsupportedModelError, match="BertModel is no BertForMaskedLM"):
        RungMaskedAutoencoder(wrong, RUNGS)
    with pytest.raises(SizeError, match=r"layer 9 of 9x8 must be in 1\.\.4"):
        RungMaskedAutoencoder(BertForMaskedLM(build("bert")[0].model.config), [(9, 8)])


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("bert").save_pretrained(str(tmp_path / "model"))
    (tmp_path / "a.txt").write_text(
        "\n\n".join(f"{' '.join(TEXTS)} and more of it, number {'i' * n}" for n in range(8))
    )
    root = Path(__file__).parents[2]
    arguments = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "a.txt")]
    arguments += ["--steps", "2", "--batch-size", "2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["smae.py", *arguments])
    runpy.run_path(str(root / "examples" / "smae.py"), run_name="__main__")
    trained = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert abs(trained.encode(TEXTS) - build("bert").encode(TEXTS)).max() > 0
