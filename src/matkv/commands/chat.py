"""matkv chat: talk with a model whose cache is compressed."""

from __future__ import annotations

from typing import Any

from transformers import TextStreamer

from matkv.cache.cache import LatentCache
from matkv.commands import console
from matkv.commands.options import (
    BudgetOpt,
    DeviceOpt,
    DtypeOpt,
    ModelOpt,
    NewTokensOpt,
    RunArg,
    SeedOpt,
    TemperatureOpt,
    TrustOpt,
    UniformOpt,
    open_run,
)
from matkv.evaluate.samples import chat_ids, generate
from matkv.hf.attach import attach
from matkv.ranks import check_budget


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
    artifact, model, tokenizer = open_run(run, model_name, dtype, device, trust_remote_code)
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
        ids = chat_ids(tokenizer, turns, said)
        cache.crop(min(_common_prefix(held, ids), len(ids) - 1) - len(held))
        how: dict[str, Any] = {"temperature": temperature, "seed": seed}
        answer = generate(model, tokenizer, ids, cache, streamer, max_new_tokens, **how)
        held = [*ids, *answer][: cache.get_seq_length()]
        reply = str(tokenizer.decode(answer, skip_special_tokens=True))
        turns.append({"role": "assistant", "content": reply})
        note = f"{cache.used_nbytes:,} bytes of cache for {len(held):,} tokens"
        console.err.print(note, style="dim")


def _common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens two sequences share."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
