"""Adapters, trained beside the bases."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import matkv
from lessons import quick, text
from matkv.artifact.artifact import Artifact
from matkv.distill.stage import distill
from matkv.errors import TrainingError
from tiny import Tiny


def test_adapters_learn_with_the_bases_and_are_merged_at_attach(
    llama: Tiny, tmp_path: Path
) -> None:
    model, ids_BT = llama.model, text(2)
    config = quick(lora_rank=2, lora_lr=1e-2, steps=20, ce=1.0)
    made = distill(model, llama.artifact, text(), config)
    loaded = Artifact.load(made.save(tmp_path / "run"))
    assert made.lora is not None and loaded.lora is not None
    assert set(loaded.lora.tensors) == set(made.lora.tensors)
    with torch.no_grad():
        plain = model(ids_BT).logits
        for artifact in (loaded, loaded, llama.artifact):
            matkv.attach(model, artifact, 1.0)
            changed = float((model(ids_BT, use_cache=False).logits - plain).abs().max())
            assert (changed > 1e-3) == (artifact is loaded)
        matkv.detach(model)
        assert torch.equal(model(ids_BT).logits, plain)
    with pytest.raises(TrainingError, match="has adapters"):
        distill(model, loaded, text(), config)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_loads_the_adapters_of_an_artifact(llama: Tiny, tmp_path: Path) -> None:
    from peft import PeftModel

    made = distill(llama.model, llama.artifact, text(), quick(lora_rank=2, lora_lr=1e-2))
    made.save(tmp_path / "run")
    model, ids_BT = copy.deepcopy(llama.model), text(2)
    matkv.attach(model, made, 1.0)
    with torch.no_grad():
        merged = model(ids_BT, use_cache=False).logits
        matkv.detach(model)
        by_peft = PeftModel.from_pretrained(model, tmp_path / "run" / "lora")(ids_BT).logits
    torch.testing.assert_close(by_peft, merged, rtol=1e-4, atol=1e-4)
