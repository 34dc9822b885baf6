"""One vLLM engine in a process of its own: prompts in, tokens and figures out, as JSON.

    python benchmarks/engine.py

A line of input is a request, and is answered by a line. The first has vLLM's arguments, and is
answered by the tokens that its cache holds, as vLLM says. Every other is a round: prompts that are
given at once, each {"tokens": [...], "new": n}, answered by their tokens, the seconds of all, the
CPU's seconds of every step, what of the prompts was in the prefix cache, and preemptions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
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
# Answers are told from what libraries print.
MARK = "matkv engine: "

Round = list[dict[str, Any]]


class EngineError(Exception):
    """The engine did not start, or ended; its last words."""


@dataclass(frozen=True)
class Engine:
    """An engine that has started, and the tokens that its cache holds."""

    process: subprocess.Popen[str]
    errors: Path
    fits: int

    def round(self, prompts: Round, *, forget: bool = False) -> Any:
        """Prompts that are given at once, and what came of them.

        `forget` empties the prefix cache first.

        Raises:
            EngineError: the engine ended.
        """
        return _asked(self.process, self.errors, {"prompts": prompts, "forget": forget})


@contextmanager
def started(arguments: dict[str, Any], **settings: str) -> Iterator[Engine]:
    """An engine with vLLM's `arguments` and environment variables, ended at last.

    Raises:
        EngineError: it does not start.
    """
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | SETTINGS | settings,
            cwd=Path(__file__).parents[1],
        )
        try:
            fits = _asked(process, Path(errors.name), DEFAULTS | arguments)["fits"]
            yield Engine(process, Path(errors.name), fits)
        finally:
            process.communicate()  # which ends its input, and so it


def _asked(process: subprocess.Popen[str], errors: Path, request: dict[str, Any]) -> Any:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it ended, and its output says so
    for line in process.stdout:
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    process.wait()
    raise EngineError(errors.read_text(encoding="utf-8")[-4000:])


def run(arguments: dict[str, Any], rounds: list[Round], **settings: str) -> dict[str, Any]:
    """What an engine answers to `rounds`, started and ended for them.

    Raises:
        EngineError: it failed.
    """
    with started(arguments, **settings) as engine:
        answers = [engine.round(prompts) for prompts in rounds]
        preemptions = sum(one["preemptions"] for one in answers)
        return {"rounds": answers, "fits": engine.fits, "preemptions": preemptions}


def matkv(artifact: Path | str, budget: float, **options: Any) -> dict[str, Any]:
    """vLLM's arguments for an artifact."""
    given = {"artifact": str(artifact), "budget": budget} | options
    return {"attention_backend": "CUSTOM", "additional_config": {"matkv": given}}


def main() -> None:
    from vllm import LLM

    llm = LLM(**json.loads(sys.stdin.readline()))
    answer({"fits": llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens})
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        if request["forget"]:
            llm.reset_prefix_cache()
        answer(served(llm, request["prompts"], number))


def served(llm: Any, prompts: Round, number: int) -> dict[str, Any]:
    """One round."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, names = llm.llm_engine, [f"{number}-{index}" for index in range(len(prompts))]
    before, start = preempted(llm), time.perf_counter()
    for name, one in zip(names, prompts, strict=True):
        how = SamplingParams(
            temperature=0, max_tokens=one["new"], detokenize=False, ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        engine.add_request(name, {"prompt_token_ids": one["tokens"]}, how)
    ended: dict[str, Any] = {}
    steps = [time.process_time()]
    while engine.has_unfinished_requests():
        ended |= {out.request_id: out for out in engine.step() if out.finished}
        steps.append(time.process_time())
    outs = [ended[name] for name in names]
    return {
        "seconds": time.perf_counter() - start,
        "steps": [after - before for before, after in pairwise(steps)],
        "tokens": [list(out.outputs[0].token_ids) for out in outs],
        "cached": [out.num_cached_tokens for out in outs],
        "preemptions": preempted(llm) - before,
    }


def preempted(llm: Any) -> int:
    """Preemptions so far."""
    metrics = {one.name: getattr(one, "value", None) for one in llm.get_metrics()}
    return int(metrics["vllm:num_preemptions"] or 0)


def answer(found: dict[str, Any]) -> None:
    print("\n" + MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
