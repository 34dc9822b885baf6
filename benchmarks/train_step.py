"""Time of a distillation step over its ideal, and the peak memory of both.

    python benchmarks/train_step.py [--batch 2] [--length 1024] [--recent 0 32] [--rounds 5]

The ideal is the teacher's forward pass and the student's forward and backward with the projections
off: the same loss, and a gradient that passes through every layer. Both take turns.
"""

import argparse
import resource
import statistics
import time

import torch

from matkv import calibrate, data
from matkv.distill.bases import Bases, rank_axes
from matkv.distill.losses import LossWeights
from matkv.distill.student import Student
from matkv.models.load import load_model
from matkv.schedule import Independent


class Ideal(Student):
    """A student that never projects; its gradients end at the embeddings."""

    def _project(self, products: object) -> None:
        super()._project(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--recent", type=int, nargs="+", default=[0, 32])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model, tokenizer = load_model("smollm2-135m")
    texts = data.read_texts("default", "train")
    windows_NT = data.text_windows(tokenizer, texts, options.length, 8 * 1024)
    ids_BT = windows_NT[: options.batch]
    artifact = calibrate(model, data.batches(windows_NT, 1))
    model.requires_grad_(False)
    axes = rank_axes(artifact.geometry)
    draws = Independent(axes).draw(0, torch.Generator().manual_seed(0))
    sizes_BKX = torch.tensor(draws).expand(options.batch, -1, -1)
    bases = Bases(artifact, "cayley")

    def step(student: Student) -> float:
        started = time.perf_counter()
        with student.attending():
            student(ids_BT, ids_BT, sizes_BKX)["loss"].backward()
        return time.perf_counter() - started

    embeddings = model.get_input_embeddings()
    for recent in options.recent:
        student = Student(model, bases, LossWeights(), recent=recent).train()
        ideal = Ideal(model, bases, LossWeights()).train()
        ratios, steps = [], []
        for index in range(options.rounds + 1):
            hook = embeddings.register_forward_hook(lambda *io: io[2].requires_grad_())
            plain = step(ideal)
            hook.remove()
            ours = step(student)
            if index:  # the first round warms up
                ratios.append(ours / plain)
                steps.append(ours)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"recent {recent}: {statistics.median(steps):.2f} s a step, "
            f"{statistics.median(ratios):.3f} of the ideal "
            f"[{min(ratios):.3f} {max(ratios):.3f}], peak so far {peak:.2f} GiB"
        )


if __name__ == "__main__":
    main()
