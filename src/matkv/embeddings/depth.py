"""Where a backbone keeps its layers, and how it is cut: the only file that looks into one.

No table of architectures. The layers are the one `nn.ModuleList` as long as the config says that
there are layers; the final norm is the norm that turns the last layer's output into what the
backbone returns. Both are tried out on a few tokens: a model whose first layers alone do not give
what the whole model has after them is refused.

Shapes: B text, T token, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from matkv.errors import UnsupportedModelError, first_line

PROBE = ["two words", "and a few more of them"]
CLOSE = 1e-4  # kernels may round a cut model differently; a missing norm is off by far more


@dataclass(frozen=True)
class Backbone:
    """The layers of a model: `holder` keeps the stack under `name`, `norm` follows the last one."""

    config: Any
    holder: nn.Module
    name: str
    norm: nn.Module

    @property
    def stack(self) -> nn.ModuleList:
        stack = getattr(self.holder, self.name)
        assert isinstance(stack, nn.ModuleList)
        return stack

    @property
    def layers(self) -> int:
        return len(self.stack)


def backbone_of(model: SentenceTransformer) -> Backbone:
    """The layers and the final norm of `model`, tried out.

    Raises:
        UnsupportedModelError: there are no layers to cut, or cutting them gives something else than
            what the whole model has after as many layers.
    """
    config, backbone = _text_backbone(model)
    holder, name = _stack_of(backbone, config)
    raw_BTH, last_BTH = _last_layer(model, getattr(holder, name))
    norm = _norm_between(raw_BTH, last_BTH, backbone, getattr(holder, name))
    found = Backbone(config, holder, name, norm)
    _check_cut(model, found)
    return found


def apply_cut(backbone: Backbone, layer: int) -> None:
    """Leave only the first `layer` layers, for good."""
    for name, value in _cut_settings(backbone, layer).items():
        setattr(backbone.config, name, value)
    setattr(backbone.holder, backbone.name, backbone.stack[:layer])


@contextmanager
def cut(backbone: Backbone, layer: int) -> Iterator[None]:
    """Run with the first `layer` layers only; afterwards, and after an error, all are back."""
    if layer == backbone.layers:
        yield
        return
    stack = backbone.stack
    settings = {name: getattr(backbone.config, name) for name in _cut_settings(backbone, layer)}
    try:
        apply_cut(backbone, layer)
        yield
    finally:
        setattr(backbone.holder, backbone.name, stack)
        for name, value in settings.items():
            setattr(backbone.config, name, value)


@contextmanager
def recording(backbone: Backbone, layers: Sequence[int]) -> Iterator[None]:
    """Run up to the highest of `layers`, and have what lies below it kept."""
    config, before = backbone.config, backbone.config.output_hidden_states
    with cut(backbone, max(layers)):
        try:
            config.output_hidden_states = len(set(layers)) > 1
            yield
        finally:
            config.output_hidden_states = before


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# ---- finding


def _text_backbone(model: SentenceTransformer) -> tuple[Any, nn.Module]:
    """The backbone's config and the backbone, where embeddings are made of its tokens."""
    first = model[0]
    kind = type(first).__name__
    if not isinstance(first, modules.Transformer) or first.module_output_name != "token_embeddings":
        raise UnsupportedModelError(
            f"the model starts with {kind}, which gives no states of tokens layer by layer: "
            "sizes need a text transformer with pooling"
        )
    if any(isinstance(module, modules.WeightedLayerPooling) for module in model):
        raise UnsupportedModelError("the model pools all its layers, so none of them can go")
    backbone = first.model
    if not isinstance(backbone, nn.Module) or not isinstance(
        getattr(backbone.config, "num_hidden_layers", None), int
    ):
        raise UnsupportedModelError(
            f"{type(backbone).__name__} does not say how many layers it has (num_hidden_layers)"
        )
    return backbone.config, backbone


def _stack_of(backbone: nn.Module, config: Any) -> tuple[nn.Module, str]:
    """The module that holds the list of layers, and its name there."""
    found: list[tuple[nn.Module, str]] = []

    def search(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers:
                found.append((module, name))
            else:
                search(child)

    search(backbone)
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(backbone).__name__} has {len(found)} lists of {config.num_hidden_layers} "
            "layers, not one (layers that share their weights cannot be cut): choose another model"
        )
    return found[0]


@torch.no_grad()
def _probe(model: SentenceTransformer) -> dict[str, Any]:
    """What the first module gives for a few tokens."""
    with evaluating(model[0]):
        features = batch_to_device(model.preprocess(list(PROBE)), model.device)
        try:
            out: dict[str, Any] = model[0](features)
        except Exception as error:  # every backbone has errors of its own
            raise UnsupportedModelError(
                f"the backbone cannot read two short texts: {first_line(error)}"
            ) from error
    return out


def _last_layer(model: SentenceTransformer, stack: nn.ModuleList) -> tuple[Tensor, Tensor]:
    """The last layer's own output, and what the backbone makes of it.  [BTH, BTH]"""
    seen: list[Tensor] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    hook = stack[-1].register_forward_hook(note)
    try:
        last_BTH: Tensor = _probe(model)["token_embeddings"]
    finally:
        hook.remove()
    if not seen:
        raise UnsupportedModelError("the backbone did not run its last layer: choose another model")
    return seen[-1], last_BTH


@torch.no_grad()
def _norm_between(
    raw_BTH: Tensor, last_BTH: Tensor, backbone: nn.Module, stack: nn.ModuleList
) -> nn.Module:
    """The norm that makes `last` of `raw`; the identity where they are the same."""
    if raw_BTH.shape == last_BTH.shape and torch.equal(raw_BTH, last_BTH):
        return nn.Identity()
    inside = set(stack.modules())
    for module in backbone.modules():
        weight = getattr(module, "weight", None)
        is_norm = isinstance(weight, Tensor) and weight.shape == raw_BTH.shape[-1:]
        if module in inside or not is_norm or next(module.children(), None) is not None:
            continue
        if torch.equal(module(raw_BTH), last_BTH):
            return module
    raise UnsupportedModelError(
        f"{type(backbone).__name__} does more after its last layer than a norm: it cannot be cut"
    )


def _check_cut(model: SentenceTransformer, backbone: Backbone) -> None:
    """Make sure that the first layers alone give what the whole model has after them."""
    if backbone.layers == 1:
        return
    layer = backbone.layers // 2
    with recording(backbone, [layer, backbone.layers]):
        hidden = _probe(model).get("all_layer_embeddings")
    if hidden is None or len(hidden) <= layer:
        raise UnsupportedModelError("the backbone does not return the states of its layers")
    with cut(backbone, layer):
        cut_BTH = _probe(model)["token_embeddings"]
    with torch.no_grad():
        whole_BTH = backbone.norm(hidden[layer])
    if whole_BTH.shape != cut_BTH.shape or not torch.allclose(
        whole_BTH, cut_BTH, rtol=CLOSE, atol=CLOSE
    ):
        raise UnsupportedModelError(
            f"the first {layer} layers alone give something else than the whole model has after "
            "them: it cannot be cut"
        )


def _cut_settings(backbone: Backbone, layer: int) -> dict[str, Any]:
    """The config's values for `layer` layers; lists with an entry a layer come first."""
    config = backbone.config
    lists = {
        name: value[:layer]
        for name, value in vars(config).items()
        if name.endswith("layer_types")
        and isinstance(value, (list, tuple))
        and len(value) == backbone.layers
    }
    return {**lists, "num_hidden_layers": layer}
