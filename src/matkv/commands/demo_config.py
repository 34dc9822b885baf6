"""What the demo runs on, and how much of everything it does."""

from __future__ import annotations

from matkv.allocate.config import AllocateConfig
from matkv.distill.config import DistillConfig
from matkv.errors import MatkvError
from matkv.evaluate.samples import PROMPTS
from matkv.models.default import DEFAULT_MODEL
from matkv.ranks import Budget
from matkv.settings import Count, Length, Many, settings

BUDGETS = (0.75, 0.5, 0.375, 0.25)
# Ended by the clock: a slow machine takes as long as a fast one, and short sequences give it steps.
DISTILL = DistillConfig(
    objective="end-to-end",
    minutes=3,
    sequence_length=512,
    batch_size=1,
    kl=0.25,
    ce=0.75,
    lr=1e-2,
    warmup_steps=5,
)
# Less text than `matkv allocate` takes by itself, in sequences as long as those that are scored:
# tables found on shorter ones lose to uniform ranks there.
ALLOCATE = AllocateConfig(expansions=8, search_tokens=1024, held_out_tokens=1024)
PROMPT = PROMPTS[0]


@settings(MatkvError)
class DemoConfig:
    """What the demo runs on, and how much of everything it does.

    model, title           the model as `load_model` takes it, and what the plot calls it
    text, held_out         what is trained on and what is measured on, as `read_texts` takes them
    budgets                curves and rank tables
    recent                 tokens behind every query that training and the last curves keep exact
    distill, allocate      their settings, but for `recent` and `budgets`
    calibrate_tokens       read for calibration, in sequences of `calibrate_length`
    score_tokens           held-out text to score, in sequences of `score_length`
    resident_tokens        tokens in the cache whose bytes are measured
    prompt, answer_budget  what is answered, in `answer_tokens` at most
    """

    model: str = DEFAULT_MODEL
    title: str = "SmolLM2-135M (4-bit weights)"
    text: str = "default"
    held_out: str = "default"
    budgets: Many[Budget] = BUDGETS
    recent: Count = 32
    distill: DistillConfig = DISTILL
    allocate: AllocateConfig = ALLOCATE
    calibrate_tokens: Count = 8192
    calibrate_length: Length = 512
    score_tokens: Count = 2048
    score_length: Length = 1024
    resident_tokens: Count = 4096
    prompt: str = PROMPT
    answer_budget: Budget = 0.25
    answer_tokens: Count = 64
