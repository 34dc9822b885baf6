"""Time of calibration over the time of a plain forward pass over the same tokens.

    python benchmarks/calibrate_overhead.py [--tokens 8192] [--rounds 5]

The two take turns, batch by batch; the ratio of their sums and of each round is printed.
"""

import argparse
import statistics
import time

import torch

from matkv import data
from matkv.hf.observe import collect_moments
from matkv.models.load import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model, tokenizer = load_model("smollm2-135m")
    texts = data.read_texts("default", "train")
    windows_NT = data.text_windows(tokenizer, texts, 512, options.tokens)
    ratios = []
    for index in range(options.rounds + 1):
        started = time.perf_counter()
        with torch.inference_mode():
            for batch_BT in data.batches(windows_NT, 8):
                model.get_decoder()(batch_BT, use_cache=False)
        plain = time.perf_counter() - started
        started = time.perf_counter()
        collect_moments(model, data.batches(windows_NT, 8))
        calibrate = time.perf_counter() - started
        if index:  # the first round warms up
            ratios.append(calibrate / plain)
            print(f"plain {plain:6.2f} s   calibrate {calibrate:6.2f} s   ratio {ratios[-1]:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f} over {len(ratios)} rounds")


if __name__ == "__main__":
    main()
