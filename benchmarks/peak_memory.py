"""Peak memory of a long context: the process's own high-water mark, full cache against latents.

    python benchmarks/peak_memory.py [--tokens 16384] [--budget 1.0 0.5 0.25] [--run RUN] [--json]

A small random model with many layers at equal ranks, or the model of RUN at its tables, codes and
exact tokens, reads the tokens in chunks, each configuration in a process of its own. The same
process with one token gives the base that is subtracted.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from matkv import Artifact, calibrate, load_model
from matkv.cache.cache import new_cache
from matkv.cache.naming import cache_argument
from matkv.hf.attach import attach
from matkv.ranks import RankTable

CHUNK = 256


def child(tokens: int, budget: float, run: str | None) -> int:
    """Peak bytes of this process after reading `tokens`; budget 0 stands for the full cache."""
    torch.manual_seed(0)
    model, artifact, table = given(run, budget) if run else random_model(tokens, budget)
    model.eval()
    if table is not None:
        attach(model, artifact, ranks=table)
    ids_BT = torch.randint(0, model.config.vocab_size, (1, max(tokens, 1)))
    cache = new_cache(model)
    with torch.inference_mode():
        for part_BT in ids_BT[:, :tokens].split(CHUNK, dim=1):
            if part_BT.numel():
                model.get_decoder()(part_BT, **cache_argument(model, cache), use_cache=True)
    return high_water_mark()


def given(run: str, budget: float) -> tuple[Any, Artifact, RankTable | None]:
    """The model of an artifact in the processor's fast dtype, and its table for a budget."""
    artifact = Artifact.load(run)
    model, _ = load_model(artifact.base_model)
    return model, artifact, artifact.table(budget) if budget else None


def random_model(tokens: int, budget: float) -> tuple[Any, Artifact, RankTable | None]:
    """Many layers, and little else."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=48,
        num_attention_heads=1, num_key_value_heads=1, head_dim=64,
        max_position_embeddings=tokens + 1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    artifact = calibrate(model, [torch.randint(0, 64, (1, 256))])
    return model, artifact, RankTable.uniform(artifact.geometry, budget) if budget else None


def high_water_mark() -> int:
    """Peak resident bytes of this process; getrusage would count its parent before exec too."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(tokens: int, budget: float, run: str | None) -> int:
    command = [
        sys.executable,
        __file__,
        "--child",
        "--tokens",
        str(tokens),
        "--budget",
        str(budget),
        *(("--run", run) if run else ()),
    ]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}  # no heap of its own for every thread
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--budget", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--run", help="an artifact, as smollm2-135m")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(child(options.tokens, options.budget[0], options.run))
        return
    base, budgets = measure(1, 0, options.run), (0.0, *options.budget)
    peaks = {budget: measure(options.tokens, budget, options.run) - base for budget in budgets}
    if options.json:
        rows = [{"budget": budget or None, "peak_bytes": peak} for budget, peak in peaks.items()]
        print(json.dumps({"tokens": options.tokens, "rows": rows}))
        return
    for budget, peak in peaks.items():
        name = f"{budget:.1%}" if budget else "full cache"
        print(f"{name:>10}  {peak / 2**20:8.1f} MiB  {peak / peaks[0.0]:.2f}")


if __name__ == "__main__":
    main()
