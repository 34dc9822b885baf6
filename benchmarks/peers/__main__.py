"""Score every method on the same model, windows and order, then print who wins at which bytes.

    python -m benchmarks.peers [--artifact RUN ...] [--methods full,matkv,quantized] [--out FILE]

Rows go to the file as they come, and finished ones are not measured again, so that a run goes on
where it stopped. A method that fails leaves a row that says why.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from matkv import data
from matkv.artifact.artifact import Artifact
from matkv.artifact.results import Results
from matkv.files import digest
from matkv.models.default import DEFAULT_MODEL, default_model_dir
from matkv.models.load import load_model

from . import environments, presses, quantized, shrink
from .entries import CALIBRATION_WINDOW, Calibration, entries
from .protocol import Contestant, Protocol, Row, attempt, control, failure
from .table import PEERS, is_finished, markdown

MODULES: dict[str, Any] = {"quantized": quantized, "presses": presses, "shrink": shrink}
OWN = ("full", "matkv", "pca", "latents", "palu", "eigen", "turboquant", "int4", "kvtc", "eviction")
METHODS = (*OWN, *MODULES)
BUDGETS = (0.75, 0.5, 0.375, 0.25)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every row of a run shares."""

    results: Results
    protocol: Protocol
    windows_NT: Tensor
    shared: Row

    def row(self, row: Row, **extra: Any) -> Row:
        return self.shared | {"artifact": None, "calibrated_on": None} | extra | row

    def is_done(self, contestant: Contestant, **extra: Any) -> bool:
        names = {"method": contestant.method, "setting": contestant.setting}
        found = self.results.find(self.row(names, **extra))
        return found is not None and is_finished(found)

    def keep(self, row: Row, **extra: Any) -> None:
        command = shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]])
        (complete,) = self.results.add([self.row(row, **extra)], command=command)
        value = complete["perplexity"]
        figure = complete["note"] if value is None else f"perplexity {value:.2f}"
        budget = f"{complete['budget']:.3f}  " if "budget" in complete else ""
        print(f"{complete['method']}, {complete['setting']}: {budget}{figure}", file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="hub id, directory or the default")
    parser.add_argument("--artifact", action="append", default=[], help="may be given repeatedly")
    parser.add_argument("--text", default="default", help="a text file, or default")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--context", type=int, default=768, help="tokens read before scoring")
    parser.add_argument("--chunk", type=int, default=32, help="tokens fed at once when scoring")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--calibrate-tokens", type=int, default=32_768)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/peers.json"))
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    options = parser.parse_args()
    unknown = set(options.methods.split(",")) - set(METHODS)
    if unknown:
        parser.error(f"unknown methods {', '.join(sorted(unknown))}: choose of {METHODS}")
    return options


def main() -> None:
    options = parse()
    results = Results(None, PEERS, file=options.out)
    if not options.table:
        measure(options, results)
    print(markdown(results.rows))


def measure(options: argparse.Namespace, results: Results) -> None:
    """Score what the options name and is not finished yet."""
    protocol = Protocol(length=options.length, context=options.context, chunk=options.chunk)
    model, tokenizer = load_model(options.model, options.dtype, device=options.device)
    texts = data.read_texts(options.text, "validation")
    tokens = options.windows * options.length
    windows_NT = data.text_windows(tokenizer, texts, options.length, tokens)
    content = digest(windows_NT.numpy().tobytes())[:8]
    shared = {
        "model": options.model,
        "dtype": options.dtype,
        "text": f"{Path(options.text).name} ({content})",
        "windows": len(windows_NT),
        "length": protocol.length,
        "prefill": protocol.context,
        "chunk": protocol.chunk,
    }
    run = Run(results=results, protocol=protocol, windows_NT=windows_NT, shared=shared)
    chosen = options.methods.split(",")
    training = partial(data.read_texts, "default", "train")
    calibration = Calibration(model, tokenizer, training, options.calibrate_tokens)
    artifacts = {Path(path).name: Artifact.load(path) for path in options.artifact}
    for entry in entries(chosen, artifacts, options.budgets, calibration):
        if not run.is_done(entry.contestant, **entry.extra):
            row = attempt(entry.contestant, model, windows_NT, protocol)
            run.keep(row, **entry.extra)
    for name in MODULES:
        if name in chosen:
            outside(run, name, options, training())


def outside(run: Run, name: str, options: argparse.Namespace, texts: list[str]) -> None:
    """Score the contestants of one environment that are not finished yet."""
    source = str(default_model_dir()) if options.model == DEFAULT_MODEL else options.model
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, str] = {}
        if name == "shrink":
            path = Path(folder) / "calibration.txt"
            samples = max(1, options.calibrate_tokens // CALIBRATION_WINDOW)
            path.write_text("\f".join(texts[:samples]), encoding="utf-8")
            settings = {"model": source, "texts": str(path)}
        contestants: list[Contestant] = MODULES[name].contestants(**settings)
        left = [one for one in (control(name), *contestants) if not run.is_done(one)]
        job = {"model": source, "dtype": options.dtype, "device": options.device}
        if left:
            score_outside(run, name, left, job | {"options": settings})


def score_outside(run: Run, name: str, left: list[Contestant], job: dict[str, Any]) -> None:
    """Keep the rows of `left` as they come, and say of the others why they did not."""
    unseen = {(one.method, one.setting): one for one in left}
    try:
        inside = environments.score_inside(name, list(unseen), run.windows_NT, run.protocol, **job)
        for row in inside:
            unseen.pop((row["method"], row["setting"]), None)
            run.keep(row)
    except (environments.PeerEnvironmentError, OSError) as error:
        for lost in unseen.values():
            names = {"method": lost.method, "setting": lost.setting, "family": lost.family}
            run.keep(names | failure(error))


if __name__ == "__main__":
    main()
