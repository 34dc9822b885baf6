"""The command line: thin commands over the library. `matkv --help` lists them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging as transformers_logging

from matkv import console, data
from matkv.artifact import Artifact, check_target
from matkv.cache import LatentCache
from matkv.calibrate import CalibrateConfig, calibrate
from matkv.demo import demo
from matkv.errors import MatkvError
from matkv.evaluate import evaluate
from matkv.hf import attach, load_model
from matkv.ranks import check_budget

INTERRUPTED = 130

app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="artifact directory")]
ModelOpt = Annotated[
    str | None, typer.Option("--model", help="load the base model from here instead")
]
DtypeOpt = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto, as stored")]
DeviceOpt = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
TrustOpt = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code that comes with the model")
]
BudgetOpt = Annotated[float, typer.Option(help="fraction of cache bytes to keep")]
UniformOpt = Annotated[bool, typer.Option("--uniform", help="ignore stored rank tables")]
SinkOpt = Annotated[int | None, typer.Option(help="first tokens to keep exact")]
RecentOpt = Annotated[int | None, typer.Option(help="last tokens to keep exact")]
JsonOpt = Annotated[bool, typer.Option("--json", help="print JSON to standard output")]
TextOpt = Annotated[
    str,
    typer.Option(help="default, a .txt or .jsonl file, a directory of .txt, or hub:NAME[:CONFIG]"),
]
NewTokensOpt = Annotated[int, typer.Option(help="tokens to generate at most", min=1)]
TemperatureOpt = Annotated[float, typer.Option(help="0 for greedy decoding", min=0.0)]
SeedOpt = Annotated[int, typer.Option(help="seed of sampling")]


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option("-o", "--out", help="where runs go")] = Path("runs/demo"),
    as_json: JsonOpt = False,
) -> None:
    """Run the main job on the default model: calibrate, compress, generate, measure."""
    result = demo(out)
    if as_json:
        console.print_json(result)


@app.command("calibrate")
def calibrate_command(
    model_name: Annotated[
        str, typer.Argument(metavar="MODEL", help="hub id, directory, .gguf or smollm2-135m")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="artifact directory to write")],
    text: TextOpt = "default",
    key: Annotated[str, typer.Option(help="key basis: query or pca")] = "query",
    value: Annotated[str, typer.Option(help="value basis: output or pca")] = "output",
    tokens: Annotated[int, typer.Option(help="tokens to read", min=1)] = 65_536,
    window: Annotated[int, typer.Option(help="tokens of one sequence", min=1)] = 512,
    batch_size: Annotated[int, typer.Option(help="sequences at once", min=1)] = 8,
    skip_first: Annotated[int, typer.Option(help="leave out each sequence's first tokens")] = 0,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Make an artifact from one pass over text: bases for every layer and KV head."""
    config = CalibrateConfig(key=key, value=value, skip_first=skip_first)  # type: ignore[arg-type]
    check_target(out)
    texts = data.read_texts(text, "train")
    model, tokenizer = _load(model_name, dtype, device, trust_remote_code)
    windows = data.text_windows(tokenizer, texts, window, tokens)
    with console.token_progress("calibrating", windows.numel()) as update:
        artifact = calibrate(
            model,
            data.batches(windows, batch_size),
            config,
            on_progress=lambda progress: update(progress.tokens),
        )
    artifact.save(out)
    if as_json:
        console.print_json({"artifact": str(out), "tokens": windows.numel()})
    else:
        console.out.print(f"wrote {out}: bases of {windows.numel():,} tokens")


@app.command("evaluate")
def evaluate_command(
    run: RunArg,
    budget: Annotated[list[float], typer.Option(help="may be given several times")],
    text: TextOpt = "default",
    window: Annotated[int, typer.Option(help="tokens of one sequence", min=2)] = 1024,
    tokens: Annotated[int | None, typer.Option(help="tokens to score; all unless given")] = None,
    uniform: UniformOpt = False,
    sink: SinkOpt = None,
    recent: RecentOpt = None,
    model_name: ModelOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Perplexity and bytes per token of the full cache and of each budget, side by side."""
    for one in budget:
        check_budget(one)
    texts = data.read_texts(text, "validation")
    artifact, model, tokenizer = _open(run, model_name, dtype, device, trust_remote_code)
    windows = data.text_windows(tokenizer, texts, window, tokens)
    passes = [None, *budget]
    with console.token_progress("evaluating", windows.numel() * len(passes)) as update:
        rows = evaluate(
            model,
            artifact,
            windows,
            budget,
            uniform=uniform,
            sink=sink,
            window=recent,
            on_progress=lambda at, done: update(passes.index(at) * windows.numel() + done),
        )
    if as_json:
        console.print_json({"rows": [row.to_json() for row in rows]})
        return
    console.out.print(console.evaluation_table(f"{run} on {text}, windows of {window}", rows))
    fixed = sum(not shape.grows for shape in artifact.geometry.layers)
    if fixed:
        console.out.print(f"{fixed} layers have sliding windows: uncompressed, not in bytes/token")


@app.command("generate")
def generate_command(
    run: RunArg,
    prompt: Annotated[str, typer.Argument(help="what to say to the model")],
    budget: BudgetOpt = 0.5,
    uniform: UniformOpt = False,
    max_new_tokens: NewTokensOpt = 128,
    temperature: TemperatureOpt = 0.0,
    seed: SeedOpt = 0,
    raw: Annotated[bool, typer.Option("--raw", help="no chat template")] = False,
    sink: SinkOpt = None,
    recent: RecentOpt = None,
    model_name: ModelOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Answer a prompt with a compressed cache."""
    check_budget(budget)
    artifact, model, tokenizer = _open(run, model_name, dtype, device, trust_remote_code)
    attach(model, artifact, ranks=artifact.table(budget, uniform=uniform), sink=sink, window=recent)
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer(prompt).input_ids if raw else _chat_ids(tokenizer, chat, prompt)
    cache = LatentCache(model)
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True)
    answer = _generate(
        model, tokenizer, ids, cache, streamer, max_new_tokens, temperature=temperature, seed=seed
    )
    if as_json:
        text = tokenizer.decode(answer, skip_special_tokens=True)
        held = {"tokens_held": cache.get_seq_length(), "cache_bytes": cache.used_nbytes}
        console.print_json({"text": text, "tokens": len(answer), "budget": budget, **held})


@app.command("chat")
def chat_command(
    run: RunArg,
    budget: BudgetOpt = 0.5,
    uniform: UniformOpt = False,
    max_new_tokens: NewTokensOpt = 512,
    temperature: TemperatureOpt = 0.0,
    seed: SeedOpt = 0,
    model_name: ModelOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Talk with the model; the compressed cache is kept from turn to turn. Ends with Ctrl-D."""
    check_budget(budget)
    artifact, model, tokenizer = _open(run, model_name, dtype, device, trust_remote_code)
    attach(model, artifact, ranks=artifact.table(budget, uniform=uniform))
    cache, held = LatentCache(model), list[int]()
    turns: list[dict[str, str]] = []
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    while True:
        try:
            said = console.out.input("[bold]you:[/bold] ")
        except EOFError:
            return
        turns.append({"role": "user", "content": said})
        ids = _chat_ids(tokenizer, turns, said)
        cache.crop(min(_common_prefix(held, ids), len(ids) - 1) - len(held))
        how: dict[str, Any] = {"temperature": temperature, "seed": seed}
        answer = _generate(model, tokenizer, ids, cache, streamer, max_new_tokens, **how)
        held = [*ids, *answer][: cache.get_seq_length()]
        reply = str(tokenizer.decode(answer, skip_special_tokens=True))
        turns.append({"role": "assistant", "content": reply})
        note = f"{cache.used_nbytes:,} bytes of cache for {len(held):,} tokens"
        console.err.print(note, style="dim")


@app.command("inspect")
def inspect_command(run: RunArg, as_json: JsonOpt = False) -> None:
    """Show what an artifact holds: its base model, its tables, and each layer's energy."""
    artifact = Artifact.load(run)
    if not as_json:
        console.out.print(f"base model {artifact.base_model}")
        for entry in artifact.history:
            console.out.print(" · ".join(f"{name} {value}" for name, value in entry.items()))
        for budget, table in sorted(artifact.tables.items(), reverse=True):
            keys, values = table.share("key"), table.share("value")
            console.out.print(f"table {budget:.1%}: keys {keys:.1%}, values {values:.1%}")
        console.out.print(console.energy_picture(artifact))
        return
    energy = {
        str(layer): {side: bases.energy_GD.tolist() for side, bases in sides.items()}
        for layer, sides in artifact.bases.items()
    }
    console.print_json(
        {
            "base_model": artifact.base_model,
            "history": artifact.history,
            "budgets": sorted(artifact.tables),
            "energy": energy,
        }
    )


def _load(
    name: str, dtype: str, device: str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with console.err.status(f"loading {name}"):
        return load_model(name, dtype, device=device, trust_remote_code=trust_remote_code)


def _open(
    run: Path, model_name: str | None, dtype: str, device: str | None, trust_remote_code: bool
) -> tuple[Artifact, PreTrainedModel, PreTrainedTokenizerBase]:
    artifact = Artifact.load(run)
    model, tokenizer = _load(model_name or artifact.base_model, dtype, device, trust_remote_code)
    return artifact, model, tokenizer


def _chat_ids(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], prompt: str
) -> list[int]:
    if not tokenizer.chat_template:
        return list(tokenizer(prompt).input_ids)
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(str(text), add_special_tokens=False).input_ids)


def _common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens two sequences share."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    cache: LatentCache,
    streamer: TextStreamer | None,
    max_new_tokens: int,
    *,
    temperature: float,
    seed: int,
) -> list[int]:
    """Generate after `ids`, filling `cache`; returns the new tokens."""
    if not ids:
        raise MatkvError("the prompt is empty: say something to the model")
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    input_ids = torch.tensor([ids], device=model.device)
    output = model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        past_key_values=cache,
        streamer=streamer,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **sampling,
    )
    return [int(token) for token in output[0, len(ids) :]]


def main() -> None:
    """Entry point: every expected error is one line on standard error and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        app()
    except MatkvError as error:
        console.err.print(f"[red]error:[/red] {error}", soft_wrap=True)
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # how typer reports Ctrl-C
            console.err.print("interrupted; nothing half-written was left")
        raise
