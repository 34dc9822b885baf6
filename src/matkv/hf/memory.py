"""Sizes that no memory holds, told before the work starts instead of after hours or by a kill."""

from __future__ import annotations

import os

import torch

from matkv.errors import MatkvError

GB = 10**9


def memory_of(device: torch.device) -> int | None:
    """All bytes of a device's memory; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= names.keys():
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_fits(
    nbytes: int, device: torch.device, what: str, error: type[MatkvError] = MatkvError
) -> None:
    """Make sure that `nbytes`, of what a stage keeps at the least, fit all of a device's memory.

    Raises:
        MatkvError: they do not; `what` names the setting and its value.
    """
    memory = memory_of(device)
    if memory is not None and nbytes > memory:
        raise error(
            f"{what} takes {nbytes / GB:,.1f} GB at least, and {device.type} has "
            f"{memory / GB:,.1f} GB: choose less"
        )
