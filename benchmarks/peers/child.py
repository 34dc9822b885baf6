"""What runs inside a package's own environment: score its contestants, print a row for each.

python -m peers.child job.json
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .protocol import Contestant, Protocol, attempt, control

ROW = "PEER-ROW "


def contestants(job: dict[str, Any]) -> list[Contestant]:
    """All contestants of the job's module, and the control."""
    module = importlib.import_module(f".{job['module']}", __package__)
    known: list[Contestant] = module.contestants(**job["options"])
    return [control(job["module"]), *known]


def main() -> None:
    warnings.simplefilter("ignore")  # of packages that are not ours
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model: Any = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"])
    )
    model.to(job["device"]).eval()
    windows_NT, protocol = torch.tensor(job["windows"]), Protocol(**job["protocol"])
    wanted = {tuple(names) for names in job["wanted"]}
    for contestant in contestants(job):
        if (contestant.method, contestant.setting) in wanted:
            row = attempt(contestant, model, windows_NT, protocol)
            print(ROW + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
