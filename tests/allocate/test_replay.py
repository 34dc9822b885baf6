"""Blocks that return what they returned before are not run again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from matkv.allocate.replay import blocks_of, recorded, resumed
from matkv.errors import UnsupportedModelError
from tiny import Tiny, build, tokens


@torch.no_grad()
@pytest.mark.parametrize("copies", [1, 3])
def test_later_blocks_see_what_they_would_see_anyway(family: Tiny, copies: int) -> None:
    model, ids_BT = family.model, tokens(2, 9)
    blocks = blocks_of(model)
    with recorded(blocks) as outputs:
        expected = model(ids_BT, use_cache=False).logits
    assert len(outputs) == len(blocks)
    run: list[int] = []
    hooks = [
        module.register_forward_hook(lambda *_, index=index: run.append(index))
        for index, module in enumerate(block.get_submodule("mlp") for block in blocks)
    ]
    try:
        for layer in range(len(blocks)):
            run.clear()
            with resumed(blocks, outputs, layer, copies):
                logits = model(ids_BT.repeat(copies, 1), use_cache=False).logits
            assert run == list(range(layer, len(blocks)))
            torch.testing.assert_close(logits, expected.repeat(copies, 1, 1), rtol=1e-4, atol=1e-4)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def test_a_model_is_itself_again_afterwards(llama: Tiny) -> None:
    model, blocks = llama.model, blocks_of(llama.model)
    expected = model(tokens(1, 7), use_cache=False).logits
    with recorded(blocks) as outputs:
        model(tokens(1, 7, seed=1), use_cache=False)
    with pytest.raises(RuntimeError, match="stop"), resumed(blocks, outputs, 2, 1):
        raise RuntimeError("stop")
    assert torch.equal(model(tokens(1, 7), use_cache=False).logits, expected)
    assert len(outputs) == len(blocks)


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    model = build("llama")
    model.model.layers = nn.ModuleList(list(model.model.layers)[:2])
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no list of 3 decoder blocks"):
        blocks_of(model)
