"""What runs inside a package's own environment: measure cells, print each as it is there.

python -m matching.child job.json
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from peers.child import ROW
from peers.protocol import Contestant, Method

from .columns import Value, measure
from .footprint import memory, speed
from .material import Footprint, Material, from_json

Todo = list[tuple[Material, int]]  # columns, and the item that each goes on from
Cell = tuple[Material, int, list[Value] | str]  # what was measured from there on, or why not


def cells(model: Any, contestant: Contestant, todo: Todo) -> Iterator[Cell]:
    """What is missing of a row, a cell at a time; where a method fails, why."""
    is_full = contestant.family == "full"
    try:
        method = contestant.build()
    except Exception as error:  # a peer may fail in any way; the others go on
        for material, first in todo:
            yield material, first, told(error)
        return
    apart = [(one, first) for one, first in todo if isinstance(one, Footprint)]
    together = [(one, first) for one, first in todo if not isinstance(one, Footprint)]
    if together:
        yield from _applied(model, method, together, is_full)
    for material, first in apart:
        yield material, first, _footprint(model, method, material)


def _applied(model: Any, method: Method, todo: Todo, is_full: bool) -> Iterator[Cell]:
    left = list(todo)
    try:
        with method.applied(model) as used:
            while left:
                material, first = left.pop(0)
                try:
                    found = list(measure(used, method, material, first, is_full=is_full))
                except Exception as error:
                    yield material, first, told(error)
                else:
                    yield material, first, found
    except Exception as error:  # it could not be applied
        for material, first in left:
            yield material, first, told(error)


def _footprint(model: Any, method: Method, material: Material) -> list[Value] | str:
    assert isinstance(material, Footprint)
    try:
        with method.applied(model) as used:
            found = memory(used, method, material)
        return [found | speed(model, method, material)]
    except Exception as error:
        return told(error)


def told(error: BaseException) -> str:
    """An error in one line."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"[:300]


def main() -> None:
    """Print a line for every cell."""
    warnings.simplefilter("ignore")  # of packages that are not ours
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"])
    ).eval()
    columns = {one["column"]: from_json(one) for one in job["columns"]}
    module = importlib.import_module(f"peers.{job['module']}")
    known = {(one.method, one.setting): one for one in module.contestants(**job["options"])}
    for method, setting, wanted in job["wanted"]:
        todo = [(columns[column], first) for column, first in wanted]
        for material, first, found in cells(model, known[method, setting], todo):
            cell = {"method": method, "setting": setting, "column": material.column}
            row = cell | {"first": first, "found": found}
            print(ROW + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
