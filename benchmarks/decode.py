"""Time of one decoding step on latents over transformers' DynamicCache with sdpa, same prompt.

    python benchmarks/decode.py RUN [--context 2048 8192] [--budget 1.0 0.5 0.25] [--steps 24]

Full and latent steps take turns in one process; the medians and the median of the step-by-step
ratios are printed. Below 1 the latent cache is faster.
"""

import argparse
import statistics
import time

import torch
from transformers import Cache, PreTrainedModel

from matkv import Artifact, attach, data, detach, load_model
from matkv.cache import refill
from matkv.evaluate import full_states


def step(model: PreTrainedModel, cache: Cache, token: torch.Tensor) -> float:
    started = time.perf_counter()
    model(token, past_key_values=cache, use_cache=True)
    return time.perf_counter() - started


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--budget", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    artifact = Artifact.load(options.run)
    plain, tokenizer = load_model(artifact.base_model, options.dtype)
    latent, _ = load_model(artifact.base_model, options.dtype)
    texts = data.read_texts("default", "validation")
    print(f"{torch.get_num_threads()} threads, {plain.dtype}")
    for context in options.context:
        tokens_T = data.text_windows(tokenizer, texts, context, context)[0]
        states = full_states(plain, tokens_T)
        token = tokens_T[None, -1:]
        for budget in options.budget:
            detach(latent)
            attach(latent, artifact, budget)
            caches = refill(plain, states), refill(latent, states)
            times = [
                (step(plain, caches[0], token), step(latent, caches[1], token))
                for _ in range(options.steps + 4)
            ][4:]
            full_ms, latent_ms = (
                1e3 * statistics.median(column) for column in zip(*times, strict=True)
            )
            ratio = statistics.median(ours / theirs for theirs, ours in times)
            print(
                f"context {context:6}  budget {budget:6.1%}  full {full_ms:7.2f} ms  "
                f"latent {latent_ms:7.2f} ms  ratio {ratio:.3f}"
            )


if __name__ == "__main__":
    main()
