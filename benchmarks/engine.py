"""One vLLM engine in a process of its own: prompts in, tokens and figures out, as JSON.

    python benchmarks/engine.py < request.json

The request has `engine`, vLLM's arguments; and `rounds`, lists of prompts that are given at once,
each {"tokens": [...], "new": n}. The answer has for every round tokens, seconds and what of the
prompts was cached; the tokens that the cache holds, as vLLM says; and preemptions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# vLLM's scheduler in this process, so that nothing outlives it; threads where they are put.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
}
DEFAULTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 16,
    "disable_log_stats": False,
}


class EngineError(Exception):
    """The engine did not start; its last words."""


def run(engine: dict[str, Any], rounds: list[list[dict[str, Any]]], **settings: str) -> Any:
    """What an engine answers, started and ended for it.

    Raises:
        EngineError: it failed.
    """
    ended = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps({"engine": DEFAULTS | engine, "rounds": rounds}),
        capture_output=True,
        text=True,
        env=os.environ | SETTINGS | settings,
        cwd=Path(__file__).parents[1],
    )
    if ended.returncode:
        raise EngineError(ended.stderr[-4000:])
    return json.loads(ended.stdout.splitlines()[-1])


def matkv(artifact: Path | str, budget: float, **options: Any) -> dict[str, Any]:
    """vLLM's arguments for an artifact."""
    given = {"artifact": str(artifact), "budget": budget} | options
    return {"attention_backend": "CUSTOM", "additional_config": {"matkv": given}}


def main() -> None:
    request = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    llm = LLM(**request["engine"])
    answers = []
    for prompts in request["rounds"]:
        how = [
            SamplingParams(temperature=0, max_tokens=one["new"], detokenize=False, ignore_eos=True)
            for one in prompts
        ]
        start = time.perf_counter()
        outs = llm.generate(
            [{"prompt_token_ids": one["tokens"]} for one in prompts], how, use_tqdm=False
        )
        answers.append(
            {
                "seconds": time.perf_counter() - start,
                "tokens": [list(out.outputs[0].token_ids) for out in outs],
                "cached": [out.num_cached_tokens for out in outs],
            }
        )
    metrics = {one.name: getattr(one, "value", None) for one in llm.get_metrics()}
    found = {
        "rounds": answers,
        "fits": llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens,
        "preemptions": metrics["vllm:num_preemptions"],
    }
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
