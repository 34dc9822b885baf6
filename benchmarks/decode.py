"""Time on latents over transformers' DynamicCache with sdpa: a decoding step, or a whole prompt.

    python benchmarks/decode.py RUN [--context 2048 8192] [--budget 1.0 0.5 0.25] [--recent 0 32]
        [--steps 24] [--prompt] [--processor-time]

The full cache and every budget with every number of exact recent tokens take turns in one process;
medians are printed, and medians of the turn-by-turn ratios over the full cache and over the first
number of recent tokens. Below 1 is faster. Caches hold random states, prompts random tokens.
Processor time, with one thread, tells more than wall time where other jobs run.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import Cache, PreTrainedModel

from matkv.artifact.artifact import Artifact
from matkv.benchmark.decode import twin
from matkv.benchmark.timing import Spread
from matkv.cache.cache import new_cache
from matkv.cache.naming import cache_argument
from matkv.hf.attach import attach
from matkv.hf.geometry import geometry_of
from matkv.models.load import load_model


def candidates(
    plain: PreTrainedModel, artifact: Artifact, budgets: list[float], recents: list[int]
) -> dict[str, PreTrainedModel]:
    """The plain model and attached copies that share its weights, by name."""
    models = {"full cache": plain}
    for budget in budgets:
        for recent in recents:
            copied = twin(plain, share_weights=artifact.lora is None)
            name = f"budget {budget:6.1%} recent {recent:4}"
            models[name] = attach(copied, artifact, budget, recent=recent)
    return models


def read(model: PreTrainedModel, tokens_BT: torch.Tensor) -> None:
    """From a prompt to its cache and the logits after it."""
    model(tokens_BT, **cache_argument(model, new_cache(model)), use_cache=True, logits_to_keep=1)


def step(model: PreTrainedModel, cache: Cache, token_B1: torch.Tensor) -> None:
    """One more token."""
    model(token_B1, **cache_argument(model, cache), use_cache=True)


def filled(model: PreTrainedModel, context: int) -> Cache:
    """A cache of random states, which take the time of real ones."""
    cache, generator = new_cache(model), torch.Generator().manual_seed(0)
    for index, shape in enumerate(geometry_of(model.config).layers):
        states = torch.randn(2, 1, shape.kv_heads, context, shape.head_dim, generator=generator)
        key_BGTD, value_BGTD = states.to(model.dtype)
        cache.update(key_BGTD, value_BGTD, index)
    return cache


def take_turns(
    turns: dict[str, Callable[[], object]], rounds: int, warm_up: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Milliseconds of every candidate in every round but the first ones."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for index in range(warm_up + rounds):
        for name, work in turns.items():
            started = clock()
            work()
            if index >= warm_up:
                times[name].append(1e3 * (clock() - started))
    return times


def show(times: dict[str, list[float]], recents: int) -> None:
    """A line a candidate; those of one budget follow one another."""
    full, *latent = times
    print(f"  {full:25} {Spread.of(times[full]).median:8.2f} ms")
    for place, name in enumerate(latent):
        first = latent[place - place % recents]
        over_full, over_first = (
            Spread.of_ratios(times[name], times[other]) for other in (full, first)
        )
        print(
            f"  {name:25} {Spread.of(times[name]).median:8.2f} ms"
            f"  over full {over_full.median:.3f} [{over_full.low:.3f} {over_full.high:.3f}]"
            f"  over first {over_first.median:.3f} [{over_first.low:.3f} {over_first.high:.3f}]"
        )


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--budget", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--recent", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--prompt", action="store_true", help="time prompts instead of steps")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    if options.processor_time:
        torch.set_num_threads(1)
    artifact = Artifact.load(options.run)
    plain, _ = load_model(artifact.base_model, options.dtype)
    models = candidates(plain, artifact, options.budget, options.recent)
    print(f"{torch.get_num_threads()} threads, {plain.dtype}")
    for context in options.context:
        ids_BT = torch.randint(plain.config.vocab_size, (1, context))
        turns: dict[str, Callable[[], object]] = {
            name: partial(read, model, ids_BT)
            if options.prompt
            else partial(step, model, filled(model, context), ids_BT[:, -1:])
            for name, model in models.items()
        }
        print(f"{'prompt' if options.prompt else 'step'}, context {context}")
        warm_up = 1 if options.prompt else 4
        show(take_turns(turns, options.steps, warm_up, clock), len(options.recent))


if __name__ == "__main__":
    main()
