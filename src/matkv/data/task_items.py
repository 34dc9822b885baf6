"""Tasks to score: items of local JSONL files, or lm-eval's own tasks by name.

    {"query": "Question: …", "choices": ["…", "…"], "gold": 0}
    {"context_options": ["…", "…"], "continuation": "…", "gold": 1}

Each line is one item. Of the first kind every choice is scored after the query, of the second the
same continuation after each context. Both become tasks of lm-eval, which asks the model and decides
what is right.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from matkv.data.hub import hub_or_fetched
from matkv.errors import DataError, MatkvError
from matkv.files import digest, read_json_lines

Item = dict[str, Any]
HUB = "lm-eval"
FORMAT = (
    'an item is {"query": text, "choices": [texts], "gold": index} or '
    '{"context_options": [texts], "continuation": text, "gold": index}'
)


@dataclass(frozen=True, kw_only=True)
class LoadedTask:
    """A task of lm-eval with its items.

    `data` tells a local file's contents from another's, and both from lm-eval's own task of the
    same name; `accuracy` and `normalized` are lm-eval's names of acc and acc_norm, the second None
    where lengths make no difference.
    """

    name: str
    task: Any
    data: str
    accuracy: str
    normalized: str | None

    def picks(self, limit: int | None, seed: int) -> list[int]:
        """Indices of the items to score: all, or `limit` drawn with `seed`, in their order."""
        count = len(self.task.eval_docs)
        if limit is None or limit >= count:
            return list(range(count))
        return sorted(random.Random(seed).sample(range(count), limit))


def require_lm_eval() -> None:
    """Fail early and clearly where the extra is missing.

    Raises:
        MatkvError: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise MatkvError(
            "tasks are scored by lm-eval, which is missing: pip install lm-eval datasets"
        )


def load_tasks(names: Sequence[str], folder: Path | None = None) -> list[LoadedTask]:
    """The named tasks, from `folder`/NAME.jsonl, or lm-eval's own where no folder is given.

    A name of lm-eval's that stands for several tasks, as a group does, gives all of them.

    Raises:
        DataError: the folder, a task or its data is missing, or a line is no item.
        MatkvError: lm-eval is not installed.
    """
    require_lm_eval()
    names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not names:
        raise DataError("no task is named: --tasks piqa,arc_easy")
    if folder is None:
        return _hub_tasks(names)
    return [_local_task(name, _file(folder, name)) for name in names]


# ---- local files


def _file(folder: Path, name: str) -> Path:
    found = sorted(path.stem for path in folder.glob("*.jsonl"))
    if not found:
        reason = "holds no .jsonl file" if folder.is_dir() else "is no directory"
        raise DataError(f"{folder} {reason}: name one with a file TASK.jsonl for every task")
    if name not in found:
        raise DataError(f"no task {name!r} in {folder}: it holds {', '.join(found)}")
    return folder / f"{name}.jsonl"


def read_items(path: Path) -> list[Item]:
    """The items of a file, all of one kind.

    Raises:
        DataError: it cannot be read, holds none, or a line is no item.
    """
    items = [_item(*line) for line in read_json_lines(path)]
    if not items:
        raise DataError(f"{path} holds no item: {FORMAT}")
    if len({"query" in item for item in items}) > 1:
        raise DataError(f"{path} mixes two kinds of items: keep each in a file of its own")
    return items


def _item(where: str, item: Any) -> Item:
    if not isinstance(item, dict):
        raise DataError(f"{where}: no record: {FORMAT}")
    one, many = ("query", "choices") if "query" in item else ("continuation", "context_options")
    text, texts, gold = item.get(one), item.get(many), item.get("gold")
    if not isinstance(text, str) or not isinstance(texts, list) or len(texts) < 2:
        raise DataError(f"{where}: lacks {one!r}, or two or more {many!r}: {FORMAT}")
    if not all(isinstance(part, str) and part.strip() for part in (text, *texts)):
        raise DataError(f"{where}: has an empty text, which cannot be scored: {FORMAT}")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(texts):
        raise DataError(f"{where}: gold {gold!r} must be in 0..{len(texts) - 1}, the right index")
    return {one: text, many: texts, "gold": gold}


def _local_task(name: str, path: Path) -> LoadedTask:
    """A task of lm-eval over the items of a file, with no examples before the question."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    items = read_items(path)
    by_context = "continuation" in items[0]
    metrics = ["acc"] if by_context else ["acc", "acc_bytes"]
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(items)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
        **(BY_CONTEXT if by_context else BY_CHOICE),
    }
    return LoadedTask(
        name=name,
        task=ConfigurableTask(config=config),
        data=digest(path.read_bytes()),
        accuracy="acc",
        # One continuation has one length: dividing by it changes no order.
        normalized="acc" if by_context else "acc_bytes",
    )


def prompt(query: str) -> str:
    """The text before a choice, as lm-eval's own tasks of this kind end: "Question: …\\nAnswer:".

    A query that ends in "Answer:", or asks in no such form, stays as it is.
    """
    asks = query.startswith("Question:") and not query.rstrip().endswith("Answer:")
    return f"{query.rstrip()}\nAnswer:" if asks else query.rstrip()


# How lm-eval reads an item. That the "text" is a number tells it to score the one target after each
# of the choices.
BY_CHOICE = {
    "doc_to_text": lambda item: prompt(item["query"]),
    "doc_to_target": lambda item: item["gold"],
    "doc_to_choice": lambda item: item["choices"],
}
BY_CONTEXT = {
    "doc_to_text": lambda item: item["gold"],
    "doc_to_target": lambda item: item["continuation"],
    "doc_to_choice": lambda item: item["context_options"],
}


# ---- lm-eval's own tasks


def _hub_tasks(names: Sequence[str]) -> list[LoadedTask]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known]:
        raise DataError(
            f"lm-eval knows no task {unknown[0]!r}: `lm_eval ls tasks` lists them; local files "
            "need --tasks-dir"
        )
    loaded = []
    for name in names:
        try:
            with hub_or_fetched():
                tasks = manager.load([name])["tasks"]
        except (OSError, ValueError, RuntimeError) as error:  # what datasets raises offline
            raise DataError(
                f"cannot load the data of {name}: {str(error).splitlines()[0][:200]}; without a "
                "network give --tasks-dir with JSONL files"
            ) from error
        loaded += [_hub_task(one, task) for one, task in tasks.items()]
    return loaded


def _hub_task(name: str, task: Any) -> LoadedTask:
    metrics = task.aggregation()
    if "acc" not in metrics:
        raise DataError(
            f"{name} has no accuracy but {', '.join(metrics)}: score it with "
            "lm_eval --model matkv --model_args artifact=RUN,budget=0.5"
        )
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1234)  # as lm-eval does
    return LoadedTask(
        name=name,
        task=task,
        data=HUB,
        accuracy="acc",
        normalized="acc_norm" if "acc_norm" in metrics else None,
    )
