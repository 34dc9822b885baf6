"""Every method at the same bytes: loss, retrieval, tasks, memory and time, in one table.

    python benchmarks/matched.py --quick                        20 minutes on two cores
    python benchmarks/matched.py --text wikitext2-test.txt --tasks-dir TASKS     within hours
    python benchmarks/matched.py --table                        print again what was measured

Writes OUT/cells.jsonl as it goes, and goes on from there; then OUT/matched.md, OUT/matched.json and
OUT/matched.png. A run with larger numbers adds items to those that are there, one with 0 of a kind
leaves it out; another artifact is measured beside the peers that are there. `--page` puts the
tables into a page, between its marks.

`--quick` measures a few items of everything and, of the peers, what needs no package of its own.
Tasks are those of `benchmarks/samples` unless a directory of TASK.jsonl is named.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from matching import artifacts, make, rows
from matching.picture import picture
from matching.records import Records
from matching.run import Run
from matching.table import markdown, summary
from matkv import data
from matkv.artifact.artifact import Artifact
from matkv.errors import DataError
from matkv.files import replacing
from matkv.models.default import DEFAULT_MODEL
from matkv.models.load import load_model
from matkv.report.pictures.theme import Picture, save
from peers.entries import Calibration
from peers.protocol import full_bytes_per_token

SAMPLES = Path(__file__).parent / "samples"
CALIBRATE_TOKENS = {True: 4096, False: 16_384}
SIZES = ("windows", "samples", "items")
QUICK_MINUTES = 18  # after which `--quick` starts nothing new, whatever else the machine does
MARKS = "<!-- matched -->", "<!-- /matched -->"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="hub id, directory or the default")
    parser.add_argument("--artifact", default=DEFAULT_MODEL, help="a name that comes along, or RUN")
    parser.add_argument("--text", type=Path, action="append", default=[], help="besides articles")
    parser.add_argument("--tasks-dir", type=Path, default=SAMPLES, help="directory of TASK.jsonl")
    parser.add_argument("--quick", action="store_true", help="a few items, no peers' packages")
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, help="of each text, test or task")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="rows with a word")
    parser.add_argument("--budgets", type=float, nargs="*", metavar="SHARE", help="these alone")
    parser.add_argument("--no-variants", action="store_true", help="only the artifact as it is")
    parser.add_argument("--minutes", type=float, help="start nothing new after so long")
    parser.add_argument("--dtype", default="auto", help="bfloat16 where it is fast, else float32")
    parser.add_argument("--out", type=Path, default=Path("runs/matched"))
    parser.add_argument("--picture", type=Path, help="draw loss against bytes there too, PNG")
    parser.add_argument("--page", type=Path, help="put the tables there too, between its marks")
    parser.add_argument("--table", action="store_true", help="measure nothing, print")
    options = parser.parse_args(arguments)
    if options.windows is not None and options.windows < 1:
        parser.error(f"--windows {options.windows}: everything is compared on one at least")
    if unknown := sorted(set(options.budgets or ()) - set(rows.LEVELS)):
        parser.error(f"--budgets {unknown[0]:g}: choose among {sorted(rows.LEVELS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write and print the table."""
    options = parse(arguments)
    records = Records(options.out / "cells.jsonl")
    if not options.table:
        measure(options, records)
    text = markdown(records)
    drawn = write(options.out, records, text)
    if drawn is not None and options.picture is not None:
        save(drawn, options.picture)
    if options.page is not None:
        put(text, options.page)
    print(text)


def measure(options: argparse.Namespace, records: Records) -> None:
    """All cells that the options ask for and the file lacks."""
    started = time.monotonic()
    model, tokenizer = load_model(options.model, options.dtype)
    artifact = Artifact.load(options.artifact)
    columns = make.material(
        tokenizer,
        sizes_of(options),
        texts=options.text,
        tasks_dir=options.tasks_dir,
        references=options.out / "references",
    )
    training = partial(data.read_texts, "default", "train")
    workshop = artifacts.Workshop(
        model=model,
        tokenizer=tokenizer,
        folder=options.out / "artifacts",
        budgets=rows.LEVELS,
        effort=artifacts.QUICK if options.quick else artifacts.FULL,
    )
    tokens = CALIBRATE_TOKENS[options.quick]
    calibration = Calibration(model, tokenizer, training, tokens)
    variants = None if options.no_variants else workshop
    found = rows.entries(
        artifact, variants, calibration, outside=not options.quick, levels=options.budgets
    )
    shared = {
        "model": options.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "full_bytes_per_token": full_bytes_per_token(model),
        "calibrate_tokens": tokens,
    }
    Run(
        model=model,
        shared=shared,
        entries=rows.kept_by(list(found), options.only),
        columns=columns,
        records=records,
        training=training(),
        until=started + 60 * minutes_of(options),
    ).measure()


def sizes_of(options: argparse.Namespace) -> make.Sizes:
    """How much of everything, as the options say."""
    given = {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    return replace(make.QUICK if options.quick else make.FULL, **given)


def minutes_of(options: argparse.Namespace) -> float:
    """How long something new may start."""
    if options.minutes is not None:
        return float(options.minutes)
    return QUICK_MINUTES if options.quick else float("inf")


def write(out: Path, records: Records, text: str) -> Picture | None:
    """The table, its figures and its picture, in files; returns the picture."""
    contents = {"matched.md": text, "matched.json": json.dumps(summary(records), indent=1)}
    for name, content in contents.items():
        with replacing(out / name) as new:
            new.write_text(content, encoding="utf-8")
    drawn = picture(records)
    if drawn is not None:
        save(drawn, out / "matched.png")
    return drawn


def put(text: str, page: Path) -> None:
    """Replace what stands between the marks of a page.

    Raises:
        DataError: it has none.
    """
    before, mark, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise DataError(f"{page} lacks the marks {MARKS[0]} and {MARKS[1]}: add them, a line each")
    with replacing(page) as new:
        new.write_text(f"{before}{mark}\n\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
