"""What vLLM loads in each of its processes: two names of attention backends, and no more."""

from __future__ import annotations

from importlib import import_module

# The minor versions of vLLM that matkv serves with, each by an adapter of its own: vLLM promises
# plugins no stable interface. Tests run on every one of them.
SUPPORTED = {"0.32": "matkv.vllm.v0_32"}
# Beside it, what loads weights for artifacts with adapters.
ADAPTERS = "_adapters"

# What vLLM calls us, on its command line: --attention-backend CUSTOM.
NAME = "CUSTOM"
# Where options of ours are in --additional-config; and the --load-format that adds adapters.
OPTIONS = "matkv"


def register() -> None:
    """Tell vLLM where to find the backend and the loader; may be called any number of times.

    On the CPU vLLM does not ask which backend is wanted: there we are in its own one's place, and
    hand that back unless ours is wanted.
    """
    registry = import_module("vllm.v1.attention.backends.registry")
    names = registry.AttentionBackendEnum
    registry.register_backend(names.CUSTOM, "matkv.vllm.choice.Custom")
    registry.register_backend(names.CPU_ATTN, "matkv.vllm.choice.Cpu")
    # Loaders go by class, not by name; other versions of vLLM, which we refuse, may have none such.
    module = SUPPORTED.get(minor(import_module("vllm").__version__))
    if module is not None:
        import_module(module + ADAPTERS)


def minor(version: str) -> str:
    """The part of a version of vLLM that an adapter is for."""
    return ".".join(version.split(".")[:2])
