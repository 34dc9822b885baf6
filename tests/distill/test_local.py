"""The local stage's loss is what a layer's attention output loses in the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lessons import text
from matkv.bases.gates import Projected
from matkv.distill.bases import Bases, rank_axes
from matkv.distill.local import Recorder, layer_loss
from matkv.hf.geometry import attention_modules
from matkv.hf.handlers import truncating
from matkv.hf.observe import observe
from matkv.hf.weights import output_projection
from matkv.schedule import uniform_rungs
from tiny import Tiny

DRAWS = (0.5, 0.25)


def output_of(subject: Tiny, layer: int, ids_BT: Tensor, handler: Any) -> Tensor:
    """What a layer's output projection gives, without its bias.  [BTM]"""
    projection = output_projection(attention_modules(subject.model)[layer])
    seen: list[Tensor] = []
    hook = projection.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    try:
        given = {} if handler is None else {layer: handler}
        with truncating(subject.model, given), torch.no_grad():
            subject.model(ids_BT, use_cache=False)
    finally:
        hook.remove()
    bias_M = projection.bias
    assert bias_M is None or isinstance(bias_M, Tensor)
    return seen[0] if bias_M is None else seen[0] - bias_M.detach()


@pytest.mark.parametrize("recent", [0, 4])
def test_the_loss_is_the_relative_error_of_the_layers_output(family: Tiny, recent: int) -> None:
    layer = family.geometry.compressed[0]
    ids_BT, real = text(3, 12), [12, 9, 12]
    recorder = Recorder()
    rows = zip(ids_BT, real, strict=True)
    observe(family.model, {layer: recorder}, (x[None, :n] for x, n in rows))
    keep_BT = (torch.arange(12) < torch.tensor(real)[:, None]).float()
    rungs = torch.tensor(uniform_rungs(rank_axes(family.geometry), DRAWS))
    products = Bases(family.artifact, "cayley")(rungs.repeat_interleave(3, 0))
    projected = Projected(recent)
    projected.key, projected.value = products[layer, "key"], products[layer, "value"]
    module = attention_modules(family.model)[layer]
    found = layer_loss(module, projected, *recorder.pick([0, 1, 2]), keep_BT)

    expected = []
    teacher_BTM = output_of(family, layer, ids_BT, None)
    for draw in range(len(DRAWS)):
        picked = slice(3 * draw, 3 * draw + 3)
        one = Projected(recent)
        one.key, one.value = projected.key[picked].detach(), projected.value[picked].detach()
        error_BTM = output_of(family, layer, ids_BT, one) - teacher_BTM
        sums = [(x * keep_BT[..., None]).square().sum() for x in (error_BTM, teacher_BTM)]
        expected.append(float(sums[0] / sums[1]))
    assert float(found.detach()) == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert expected[0] < expected[1]


def test_exact_recent_tokens_leave_less_to_lose(llama: Tiny) -> None:
    recorder = Recorder()
    observe(llama.model, {0: recorder}, [text(2, 12)])
    sizes = torch.tensor(uniform_rungs(rank_axes(llama.geometry), (0.25,))).expand(2, -1)
    products = Bases(llama.artifact, "cayley")(sizes)
    losses = []
    for recent in (0, 3, 8, 11):
        projected = Projected(recent)
        projected.key, projected.value = products[0, "key"], products[0, "value"]
        module = attention_modules(llama.model)[0]
        states = recorder.pick([0, 1])
        losses.append(float(layer_loss(module, projected, *states, torch.ones(2, 12)).detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 0.01 and losses[-1] < 1e-10
