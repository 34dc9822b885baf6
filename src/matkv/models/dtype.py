"""Which dtype and which device a model runs in.

"auto" is the fastest dtype that loses nothing: the stored one where the device has fast products
of it, else float32, which holds every number of the smaller ones.
"""

from __future__ import annotations

import logging

import torch

from matkv.errors import ModelError

logger = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16", "float64")


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype, itself or by its name.

    Raises:
        ModelError: a model cannot run in it.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} must be auto, float32, bfloat16, float16 or float64")
    found: torch.dtype = getattr(torch, name)
    return found


def as_device(device: torch.device | str | int | None) -> torch.device:
    """A device of this machine; None for torch's default one, the processor unless set otherwise.

    Raises:
        ModelError: there is no such device here, or it holds no numbers.
    """
    if device is None:
        return torch.get_default_device()
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(f"no device {str(device)!r} here: use {' or '.join(devices())}") from error
    if found.type == "meta":
        raise ModelError(f"device 'meta' holds no numbers: use {' or '.join(devices())}")
    return found


def devices() -> list[str]:
    """The devices of this machine, the processor first."""
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def has_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` multiplies matrices of `dtype` at least about as fast as of float32.

    A processor without instructions for bf16 or fp16 emulates them, fifty times slower; oneDNN,
    which torch multiplies with, knows.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if device.type == "cpu":
        name = "bf16" if dtype == torch.bfloat16 else "fp16"
        supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
        return supported is not None and bool(supported())
    if device.type == "cuda" and dtype == torch.bfloat16:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return True


def fastest(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The fastest dtype on `device` that loses nothing of numbers stored in another."""
    return stored if has_fast(stored, device) else torch.float32


def choose(dtype: torch.dtype | str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that is asked for; for "auto" the fastest that loses nothing of `stored`.

    Raises:
        ModelError: a model cannot run in it.
    """
    return fastest(stored, device) if dtype == "auto" else as_dtype(dtype)


def say_choice(name: str, stored: torch.dtype, chosen: torch.dtype, device: torch.device) -> None:
    """Tell in a line of the log that "auto" is another dtype than the stored one."""
    if chosen != stored:
        logger.warning(
            "%s is stored in %s and runs in %s: this device (%s) has no fast products of the "
            "first; choose a dtype to have it otherwise",
            name, short(stored), short(chosen), device,
        )  # fmt: skip


def short(dtype: torch.dtype) -> str:
    """A dtype as rows and options call it."""
    return str(dtype).removeprefix("torch.")
