"""Train the default model's bases for ranks and bits on one GPU, and bring the artifact back.

    python benchmarks/gpu_train.py --pack runs/parts        where the packages are: what must travel
    python benchmarks/gpu_train.py --parts runs/parts -o trained --minutes 20     where the GPU is
    python benchmarks/gpu_train.py --dry-run -o trained     all of it on a tiny model, on a CPU

Packed are the model's file, the packaged articles, and packages of pure Python that a machine with
torch and transformers may lack: 98 MiB, of which 92 are weights in 4 and 8 bits, which no packer
makes smaller. So they are cut into two parts, each of which travels with this repository under 64
MiB; the first can go along with `gpu.py`. They are joined where they arrive. Nothing is downloaded.

Text: the training articles, and sequences that the model itself writes behind their beginnings, as
many as `--written` tokens ask for: what it will be asked to write is what its cache must serve, and
the articles alone would be read dozens of times. Stages as in the recipe: calibrate, a first search
of bits, training of bases at these tables, the final search.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from matkv import data
from matkv.allocate.config import AllocateConfig
from matkv.allocate.stage import allocate
from matkv.artifact.artifact import Artifact
from matkv.benchmark.decode import random_model
from matkv.calibrate import CalibrateConfig, calibrate
from matkv.data.articles import ARTICLES_FILE
from matkv.distill.config import DistillConfig
from matkv.distill.stage import distill
from matkv.errors import MatkvError
from matkv.models.default import DEFAULT_MODEL, GGUF_FILE, GGUF_PACKAGE
from matkv.models.load import load_model
from matkv.settings import find_recipe

PART = 52 << 20  # with the repository itself under 64 MiB
PURE = ("gguf", "accelerate")  # packages that are copied whole
RECIPE = "default-cpu-codes"
RUNGS = (0.21, 0.14, 0.10, 0.0625)
PROMPT = 32  # tokens of an article that the model goes on from


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much of everything; lengths and tokens are tokens."""

    device: str
    length: int
    batch_size: int
    written: int
    at_once: int
    calibrate_tokens: int
    held_out_tokens: int
    expansions: int
    rungs: tuple[float, ...]
    budgets: tuple[float, ...] | None
    training: dict[str, Any]


def full_plan(minutes: float, written: int) -> Plan:
    """For one H100 or H200; the searches take a few minutes beside the training."""
    return Plan(
        device="cuda",
        length=1024,
        batch_size=32,
        written=written,
        at_once=512,
        calibrate_tokens=131_072,
        held_out_tokens=16_384,
        expansions=36,
        rungs=RUNGS,
        budgets=None,
        training={"minutes": minutes, "warmup_steps": 50, "checkpoint_every": 200},
    )


def dry_plan() -> Plan:
    """Every stage once, in seconds on a CPU."""
    return Plan(
        device="cpu",
        length=48,
        batch_size=2,
        written=192,
        at_once=2,
        calibrate_tokens=384,
        held_out_tokens=96,
        expansions=2,
        rungs=(0.5, 0.25),
        budgets=(0.5, 0.25),
        training={"steps": 2, "minutes": None, "warmup_steps": 1, "recent": 4},
    )


# ---- what travels


def pack(folder: Path) -> list[Path]:
    """Write the parts; returns them.

    Raises:
        MatkvError: a package is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("part-*"):
        old.unlink()
    with TemporaryDirectory() as scratch:
        whole = Path(scratch) / "site.tar"
        with tarfile.open(whole, "w") as archive:
            for name, file in travellers():
                archive.add(file, arcname=name)
        content = whole.read_bytes()
    parts = []
    for number, start in enumerate(range(0, len(content), PART)):
        parts.append(folder / f"part-{number:02}")
        parts[-1].write_bytes(content[start : start + PART])
    return parts


def travellers() -> Iterator[tuple[str, Path]]:
    """Names in a folder of packages, and where the files are now."""
    yield f"{GGUF_PACKAGE}/{GGUF_FILE}", folder_of(GGUF_PACKAGE) / GGUF_FILE
    yield f"gensim/{ARTICLES_FILE}", folder_of("gensim") / ARTICLES_FILE
    for package in PURE:
        for file in sorted(folder_of(package).rglob("*.py")):
            yield f"{package}/{file.relative_to(folder_of(package)).as_posix()}", file


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MatkvError(f"{package} is not installed: pip install '.[default-model,train]'")
    return Path(spec.submodule_search_locations[0])


def unpack(folder: Path) -> Path:
    """Join the parts and let Python find what is in them, after what is installed.

    Raises:
        MatkvError: there are none, or one in between is missing.
    """
    parts = sorted(folder.glob("part-*"))
    if [part.name for part in parts] != [f"part-{number:02}" for number in range(len(parts))]:
        raise MatkvError(f"{folder} lacks a part: it holds {[part.name for part in parts]}")
    if not parts:
        raise MatkvError(f"{folder} holds no part: write them with --pack")
    site, whole = folder / "site", folder / "site.tar"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(whole) as archive:
        archive.extractall(site, filter="data")
    whole.unlink()
    sys.path.append(str(site))
    return site


# ---- training


@torch.inference_mode()
def written(model: Any, windows_NT: Tensor, plan: Plan) -> Tensor:
    """Sequences that the model writes behind the beginnings of windows.  [NT]"""
    count, rows = -(-plan.written // plan.length), []
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(len(windows_NT), (count,), generator=generator)
    for picked in order.split(plan.at_once):
        start_BT = windows_NT[picked, :PROMPT].to(model.device)
        out_BT = model.generate(
            start_BT,
            attention_mask=torch.ones_like(start_BT),
            max_new_tokens=plan.length - start_BT.shape[1],
            min_new_tokens=plan.length - start_BT.shape[1],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            pad_token_id=0,
        )
        rows.append(out_BT.cpu())
    return torch.cat(rows)[:, : plan.length]


def train(model: Any, articles_NT: Tensor, plan: Plan) -> tuple[Artifact, dict[str, Any]]:
    """The artifact, and what was done in which time."""
    took: dict[str, float] = {}

    def timed(name: str, started: float) -> None:
        took[name] = round(time.perf_counter() - started, 1)
        print(f"{name}: {took[name]:.0f} s", flush=True)

    started = time.perf_counter()
    own_NT = written(model, articles_NT, plan) if plan.written else articles_NT[:0]
    timed("writing", started)
    started = time.perf_counter()
    few_NT = articles_NT[: max(1, plan.calibrate_tokens // plan.length)]
    how = CalibrateConfig(sink=4, recent=plan.training.get("recent", 32))
    artifact = calibrate(model, data.batches(few_NT, 8), how)
    artifact = search(model, artifact, articles_NT, replace(plan, budgets=plan.rungs))
    timed("calibrating and a first search", started)
    started = time.perf_counter()
    config = DistillConfig.from_toml(find_recipe(RECIPE), **settings(plan))
    texts_NT = torch.cat((articles_NT, own_NT))
    order = torch.randperm(len(texts_NT), generator=torch.Generator().manual_seed(1))
    artifact = distill(model, artifact, texts_NT[order], config)
    timed("training", started)
    started = time.perf_counter()
    artifact = search(model, artifact, articles_NT, plan)
    timed("the last search", started)
    return artifact, {"seconds": took, "texts": len(texts_NT), "written": own_NT.numel()}


def settings(plan: Plan) -> dict[str, Any]:
    """What the recipe's settings are replaced with."""
    return {
        "rungs": plan.rungs,
        "sequence_length": plan.length,
        "batch_size": plan.batch_size,
        "micro_batch_size": plan.batch_size,
        "probe_every": 50,
        **plan.training,
    }


def search(model: Any, artifact: Artifact, texts_NT: Tensor, plan: Plan) -> Artifact:
    """Tables of ranks and bits."""
    config = AllocateConfig(
        budgets=plan.budgets,
        expansions=plan.expansions,
        search_tokens=2 * plan.length,
        held_out_tokens=plan.held_out_tokens,
    )
    return allocate(model, artifact, data.batches(texts_NT, 1), config)


def dry_model() -> tuple[Any, Tensor]:
    """A tiny random model, and random windows."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    windows_NT = torch.randint(1, 64, (16, dry_plan().length), generator=generator)
    return random_model(config, torch.float32, device="cpu"), windows_NT


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("trained"))
    parser.add_argument("--minutes", type=float, default=20.0, help="of training")
    parser.add_argument("--written", type=int, default=4_000_000, help="tokens the model writes")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="write what must travel")
    parser.add_argument("--parts", type=Path, metavar="FOLDER", help="read what has travelled")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    options = parser.parse_args(arguments)
    if not (options.dry_run or options.pack or torch.cuda.is_available()):
        parser.error("there is no CUDA device: --dry-run tries everything out on the CPU")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Pack, or train and save."""
    options = parse(arguments)
    if options.pack is not None:
        for part in pack(options.pack):
            print(f"{part}: {part.stat().st_size / 2**20:.1f} MiB")
        return
    if options.parts is not None:
        unpack(options.parts)
    plan = dry_plan() if options.dry_run else full_plan(options.minutes, options.written)
    if options.dry_run:
        model, windows_NT = dry_model()
    else:
        model, tokenizer = load_model(DEFAULT_MODEL, torch.bfloat16, device=plan.device)
        windows_NT = data.text_windows(tokenizer, data.read_texts("default", "train"), plan.length)
    artifact, said = train(model, windows_NT, plan)
    artifact.save(options.out)
    (options.out / "gpu_train.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    print(artifact)


if __name__ == "__main__":
    main()
