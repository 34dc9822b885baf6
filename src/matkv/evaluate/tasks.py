"""Score tasks through lm-eval at every setting, and keep each result as soon as it is there."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matkv.artifact.artifact import Artifact
from matkv.artifact.records import Record
from matkv.artifact.results import Kind, Results
from matkv.artifact.setting import CACHE_KEYS, Setting, budget_name
from matkv.data.task_items import LoadedTask, require_lm_eval
from matkv.errors import DataError
from matkv.evaluate.scores import accuracy, bits
from matkv.hf.attach import attached, identified
from matkv.progress import OnProgress, Report
from matkv.settings import Count, Few, Seed, settings

if TYPE_CHECKING:
    from matkv.evaluate.lm_eval_model import LoadedLM

TASKS = Kind("tasks", (*CACHE_KEYS, "task", "data", "limit", "seed"))


@settings(DataError)
class TaskConfig:
    """How tasks are scored, the same items at every setting."""

    limit: Count | None = Field(
        default=None, description="items of each task, drawn at random; all unless given"
    )
    seed: Seed = Field(default=0, description="seed of the draw")
    batch_size: Few = Field(default=16, description="sequences scored at once, of tasks")


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    artifact: Artifact,
    tasks: Sequence[LoadedTask],
    settings: Sequence[Setting],
    config: TaskConfig,
    results: Results,
    *,
    on_progress: OnProgress | None = None,
) -> list[Record]:
    """One row for every setting and task; see `task_scores`.

    Rows that `results` has are not measured again, new ones are kept as soon as they are there. The
    full cache is the plain model: an artifact's adapters take part from budget 1 downwards. The
    model is left detached.

    Raises:
        BudgetError, FingerprintError: see `attach`.
        ArtifactError: the results are damaged or cannot be written.
        MatkvError: lm-eval is not installed.
    """
    require_lm_eval()
    from matkv.evaluate.lm_eval_model import LoadedLM

    identities = identified(model, artifact, settings)
    lm = LoadedLM(model, tokenizer, batch_size=config.batch_size)
    how = {"seed": config.seed, "batch_size": config.batch_size, "lm_eval": version("lm-eval")}
    rows = []
    for setting, cache in identities:
        table = setting.table(artifact)
        kept = 1.0 if table is None else table.budget
        for loaded in tasks:
            what = {"task": loaded.name, "data": loaded.data}
            about = cache | what | {"kept": kept, "limit": config.limit, "seed": config.seed}
            row = results.find(about)
            if row is None:
                with attached(model, artifact, setting):
                    scores = _score(lm, loaded, setting.budget, config, on_progress)
                (row,) = results.add([about | scores], **how)
            rows.append(row)
    return rows


def _score(
    lm: LoadedLM,
    loaded: LoadedTask,
    budget: float | None,
    config: TaskConfig,
    on_progress: OnProgress | None,
) -> Record:
    """Right and wrong of every item picked, as lm-eval finds them."""
    from lm_eval.evaluator import evaluate

    started = time.perf_counter()
    picks = loaded.picks(config.limit, config.seed)
    _build_quietly(loaded.task)

    def report(done: int) -> None:
        total = len(loaded.task.instances)  # known as soon as the first one is answered
        note = f"{loaded.name} · {budget_name(budget)}"
        Report(on_progress, "tasks", total, "requests")(done, note)

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
