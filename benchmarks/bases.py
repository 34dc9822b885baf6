"""Perplexity of every kind of basis, and of exact sinks and windows, on the default text.

    python benchmarks/bases.py [--tokens 16384] [--calibrate-tokens 65536]

Prints the Markdown table of docs/results.md. Training articles calibrate, held-out ones score.
"""

import argparse
import time

from matkv import data
from matkv.bases.moments import KEY_BASES, VALUE_BASES
from matkv.calibrate import CalibrateConfig, artifact_from
from matkv.evaluate.texts import evaluate
from matkv.hf.observe import collect_moments
from matkv.models.load import load_model

BUDGETS = (0.75, 0.5, 0.375)
EXACT = ((4, 0), (0, 32), (0, 128), (4, 32))  # (sink, recent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--calibrate-tokens", type=int, default=65_536)
    options = parser.parse_args()
    model, tokenizer = load_model("smollm2-135m")
    train, held_out = (data.read_texts("default", split) for split in ("train", "validation"))
    windows_NT = data.text_windows(tokenizer, train, 512, options.calibrate_tokens)
    scored_NT = data.text_windows(tokenizer, held_out, 1024, options.tokens)
    started = time.perf_counter()
    layers, tokens = collect_moments(model, data.batches(windows_NT, 8))
    print(f"calibrated on {tokens} tokens in {time.perf_counter() - started:.0f} s")
    trials = [(key, value, 0, 0) for key in KEY_BASES for value in VALUE_BASES]
    trials += [("pca", "pca", *exact) for exact in EXACT[:1]]
    trials += [("query", "output", *exact) for exact in EXACT]
    print("| keys | values | sink | recent | " + " | ".join(f"{b:.1%}" for b in BUDGETS) + " |")
    print("|---|---|---|---|" + "---|" * len(BUDGETS))
    for index, (key, value, sink, recent) in enumerate(trials):
        config = CalibrateConfig(key=key, value=value)  # type: ignore[arg-type]
        artifact = artifact_from(model, layers, config, tokens=tokens)
        rows = evaluate(
            model, artifact, scored_NT, BUDGETS, sink=sink, recent=recent, full_cache=index == 0
        )
        cells = " | ".join(f"{row.perplexity:.1f}" for row in rows if row.budget is not None)
        print(f"| {key} | {value} | {sink} | {recent} | {cells} |", flush=True)
        if index == 0:
            print(f"| full cache | | | | {rows[0].perplexity:.2f} ± {rows[0].stderr:.1%} | | |")


if __name__ == "__main__":
    main()
