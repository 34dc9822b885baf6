"""Score tasks through lm-eval at every budget, and keep each result as soon as it is there."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matkv.artifact.artifact import Artifact, digest
from matkv.artifact.records import Record
from matkv.artifact.results import Store
from matkv.data.task_items import LoadedTask, require_lm_eval
from matkv.errors import DataError
from matkv.evaluate.scores import accuracy, bits
from matkv.hf.attach import attach, detach
from matkv.ranks import RankTable, digest_of

if TYPE_CHECKING:
    from matkv.evaluate.lm_eval_model import LoadedLM

KIND = "tasks"
# What a result depends on: equal values of all, and it need not be measured again.
KEYS = (
    "artifact",
    "ranks",
    "budget",
    "uniform",
    "task",
    "data",
    "limit",
    "seed",
    "sink",
    "recent",
    "dtype",
)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """How tasks are scored.

    `limit` items are drawn with `seed`, the same at every budget; None for all. `sink` and `recent`
    are numbers of exact tokens, the artifact's unless given; `uniform` ignores stored rank tables.
    `again` measures what is already known.

    Raises:
        DataError: a number is not positive.
    """

    limit: int | None = None
    seed: int = 0
    uniform: bool = False
    sink: int | None = None
    recent: int | None = None
    batch_size: int = 16
    again: bool = False

    def __post_init__(self) -> None:
        for name, value in (("limit", self.limit), ("batch size", self.batch_size)):
            if value is not None and value < 1:
                raise DataError(f"{name} {value} must be at least 1")


@dataclass(frozen=True)
class At:
    """Where a run is: requests answered of one task at one budget, None for the full cache."""

    budget: float | None
    task: str
    done: int
    total: int


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    artifact: Artifact,
    tasks: Sequence[LoadedTask],
    budgets: Sequence[float | None],
    config: TaskConfig,
    *,
    run: Path | None = None,
    on_progress: Callable[[At], None] | None = None,
) -> list[Record]:
    """One row for every budget, None being the full cache, and task; see `task_scores`.

    With `run` each row is kept in its results as soon as it is made, and what is already there
    is not measured again. The full cache is the plain model: an artifact's adapters take part from
    budget 1 downwards. The model is left detached.

    Raises:
        BudgetError, FingerprintError: see `attach`.
        ArtifactError: the results of `run` are damaged or cannot be written.
        MatkvError: lm-eval is not installed.
    """
    require_lm_eval()
    from matkv.evaluate.lm_eval_model import LoadedLM

    tables = {
        budget: None if budget is None else artifact.table(budget, uniform=config.uniform)
        for budget in budgets
    }
    store = Store(run, KIND, KEYS, again=config.again)
    detach(model)
    lm = LoadedLM(model, tokenizer, batch_size=config.batch_size)
    artifact_digest = digest(artifact)
    how = {"seed": config.seed, "batch_size": config.batch_size, "lm_eval": version("lm-eval")}
    rows = []
    try:
        for budget, table in tables.items():
            for loaded in tasks:
                about = _about(artifact, artifact_digest, model, budget, table, loaded, config)
                row = store.find(about)
                if row is None:
                    _ready(model, artifact, table, config)
                    found = about | _score(lm, loaded, budget, config, on_progress)
                    (row,) = store.add([found], **how)
                rows.append(row)
    finally:
        detach(model)
    return rows


def _about(
    artifact: Artifact,
    digest: str,
    model: PreTrainedModel,
    budget: float | None,
    table: RankTable | None,
    loaded: LoadedTask,
    config: TaskConfig,
) -> Record:
    """What is known of a row before it is measured."""
    exact: dict[str, int | None] = {"sink": None, "recent": None}
    if table is not None:
        exact["sink"] = artifact.sink if config.sink is None else config.sink
        exact["recent"] = artifact.recent if config.recent is None else config.recent
    return {
        "artifact": digest,
        "ranks": digest_of(table),
        "task": loaded.name,
        "data": loaded.data,
        "budget": budget,
        "uniform": config.uniform and table is not None,
        "kept": 1.0 if table is None else table.budget,
        "limit": config.limit,
        "seed": config.seed,
        **exact,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _ready(
    model: PreTrainedModel, artifact: Artifact, table: RankTable | None, config: TaskConfig
) -> None:
    """The model as a budget wants it; attaching again to the same ranks is cheap."""
    if table is None:
        detach(model)
    else:
        attach(model, artifact, ranks=table, sink=config.sink, recent=config.recent)


def _score(
    lm: LoadedLM,
    loaded: LoadedTask,
    budget: float | None,
    config: TaskConfig,
    on_progress: Callable[[At], None] | None,
) -> Record:
    """Right and wrong of every item picked, as lm-eval finds them."""
    from lm_eval.evaluator import evaluate

    started = time.perf_counter()
    picks = loaded.picks(config.limit, config.seed)
    _build_quietly(loaded.task)

    def report(done: int) -> None:
        if on_progress is not None:
            on_progress(At(budget, loaded.name, done, len(loaded.task.instances)))

    lm.on_progress = report
    found = evaluate(
        lm,
        {"tasks": {loaded.name: loaded.task}},
        samples={loaded.name: picks},
        bootstrap_iters=0,
    )
    samples = found["samples"][loaded.name]
    acc, stderr, right = _accuracy(samples, loaded.accuracy)
    acc_norm, norm_stderr, right_norm = _accuracy(samples, loaded.normalized)
    return {
        "n": len(samples),
        "chance": sum(_chance(loaded.task, sample) for sample in samples) / len(samples),
        "acc": acc,
        "stderr": stderr,
        "acc_norm": acc_norm,
        "acc_norm_stderr": norm_stderr,
        "correct": right,
        "correct_norm": right_norm,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _accuracy(
    samples: Sequence[dict[str, Any]], metric: str | None
) -> tuple[float | None, float | None, str | None]:
    if metric is None:
        return None, None, None
    right = bits(sample[metric] for sample in samples)
    return *accuracy(right), right


def _chance(task: Any, sample: dict[str, Any]) -> float:
    """What guessing gives: one over the number of choices, nothing where there are none."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    return 1 / len(task.doc_to_choice(sample["doc"]))


def _build_quietly(task: Any) -> None:
    """Let lm-eval make its requests without a bar of its own for every budget."""
    build = type(task).build_all_requests

    def quiet(**options: Any) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            build(task, **options)

    task.build_all_requests = quiet
