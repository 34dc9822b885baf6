"""Low-rank adapters on the attention's projections, trained beside the bases."""

from __future__ import annotations

import tempfile
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from matkv.artifact.lora import Lora
from matkv.distill.config import LoraSettings
from matkv.errors import TrainingError
from matkv.hf.geometry import attention_modules
from matkv.hf.memory import check_fits


class Adapters:
    """LoRA (arXiv 2106.09685) by peft on every linear map of the attention, put into `model`.

    Raises:
        TrainingError: peft is not installed, or the rank is more than memory holds.
    """

    def __init__(self, model: PreTrainedModel, settings: LoraSettings) -> None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise TrainingError("lora_rank needs the package peft: pip install peft") from error
        names = {module: name for name, module in model.named_modules()}
        targets = {
            f"{names[module]}.{name}": child.in_features + child.out_features
            for module in attention_modules(model)
            for name, child in module.named_modules()
            if isinstance(child, nn.Linear)
        }
        # Weights, gradients and Adam's two moments, all in fp32.
        nbytes = 4 * 4 * settings.rank * sum(targets.values())
        check_fits(nbytes, model.device, f"lora_rank {settings.rank}", TrainingError)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(targets),
            bias="none",
        )
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 by a name that it has deprecated.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            self._peft: Any = get_peft_model(model, config)

    def off(self) -> AbstractContextManager[None]:
        """Leave the adapters out meanwhile: the model is the teacher."""
        context: AbstractContextManager[None] = self._peft.disable_adapter()
        return context

    def export(self) -> Lora:
        """The adapters as they are now, in PEFT's own format."""
        with tempfile.TemporaryDirectory() as folder:
            self._peft.save_pretrained(folder)
            return Lora.read(Path(folder))

    def remove(self) -> None:
        """Take the adapters out of the model again."""
        self._peft.unload()
