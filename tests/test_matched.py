"""The matched table: every column of tiny models, resuming, who is best, what is written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import matched
from matching import artifacts, child, columns, footprint, labels, make, notes, rows, sheet, table
from matching.material import (
    Block,
    Footprint,
    Haystack,
    Item,
    Material,
    Retrieval,
    Task,
    Text,
    from_json,
)
from matching.picture import picture
from matching.records import Records
from matching.run import Run, described, references
from matkv import data
from matkv.errors import DataError
from matkv.models.load import load_model
from peers.entries import Calibration
from peers.protocol import Method, full_bytes_per_token
from tiny import Tiny, save_model, tiny, tokens

WINDOWS = tokens(4, 32, seed=5).tolist()


def text(folder: Path, count: int = 2) -> Text:
    return Text(
        column="articles", data="a", count=count, windows=WINDOWS, context=20, chunk=5,
        reference=str(folder / "references"),
    )  # fmt: skip


def retrieval() -> Retrieval:
    one = Haystack(prompt=WINDOWS[0], answer=WINDOWS[1][:3])
    return Retrieval(column="needle", data="n", count=2, prompts=[one, one])


def quiz(count: int = 3) -> Task:
    asked = Item(
        question=WINDOWS[1][:4], choices=[WINDOWS[1][4:5], WINDOWS[1][5:8]], scored=[1, 3], gold=0
    )
    told = Item(question=[], choices=[WINDOWS[2][:6], WINDOWS[2][6:12]], scored=[2, 2], gold=1)
    blocks = [Block(shots=WINDOWS[0], items=[asked, told]), Block(shots=WINDOWS[3], items=[asked])]
    return Task(column="quiz", data="q", count=count, blocks=blocks, block=2)


def weight() -> Footprint:
    ids = tokens(1, 300, seed=3)[0].tolist()
    return Footprint(column="footprint", data="f", count=1, tokens=ids, few=100, prompt=90, steps=2)


def run_of(llama: Tiny, folder: Path, its: list[Material], **options: Any) -> Run:
    calibration = Calibration(llama.model, None, lambda: [], 64)
    calibration.__dict__["batches"] = [tokens(4, 48, seed=7)]
    artifact = replace(llama.artifact, recent=4)
    found = rows.entries(artifact, None, calibration, outside=False, levels=(0.5,))
    shared = {
        "model": "tiny",
        "dtype": "float32",
        "full_bytes_per_token": full_bytes_per_token(llama.model),
        "calibrate_tokens": 64,
    }
    entries = rows.kept_by(list(found), options.pop("only", ()))
    records = Records(folder / "cells.jsonl")
    return Run(
        model=llama.model, shared=shared, entries=entries, columns=its, records=records,
        training=["x"], **options,
    )  # fmt: skip


# ---- columns


def test_a_window_is_compared_with_the_full_cache(llama: Tiny, tmp_path: Path) -> None:
    one = text(tmp_path)
    (full, _) = columns.measure(llama.model, Method(), one, 0, is_full=True)
    with torch.no_grad():
        logits_TV = llama.model(torch.tensor([WINDOWS[0]])).logits[0, 20:-1]
    expected = torch.nn.functional.cross_entropy(logits_TV, torch.tensor(WINDOWS[0][21:]))
    assert full["loss"] == pytest.approx(float(expected), abs=1e-4)
    assert (full["kl"], full["agree"], full["held"], full["grown"]) == pytest.approx((0, 1, 1, 1))
    again = columns.window(llama.model, Method(), one, 0, is_full=False)
    assert again["kl"] == pytest.approx(0, abs=1e-4)
    assert again["agree"] == 1


def test_divergence_is_that_of_the_distributions() -> None:
    p_QV, q_QV = (tokens(3, 9, seed=it).float().softmax(-1) for it in (1, 2))
    kl, agree = columns._compared(q_QV.log(), p_QV.log()).tolist()
    assert kl == pytest.approx(float((p_QV * (p_QV / q_QV).log()).sum()), rel=1e-4)
    assert agree == int((p_QV.argmax(-1) == q_QV.argmax(-1)).sum())


def test_retrieval_decodes_greedily(llama: Tiny) -> None:
    prompt = WINDOWS[0]
    written = llama.model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)
    answer = written[0, len(prompt) + 1 :].tolist()
    right = columns.retrieval(llama.model, Method(), Haystack(prompt=prompt, answer=answer), 4)
    assert right["right"] == 1
    wrong = Haystack(prompt=prompt, answer=[(one + 1) % 60 + 1 for one in answer])
    assert columns.retrieval(llama.model, Method(), wrong, 4)["right"] == 0
    assert columns.retrieval(llama.model, Method(), wrong, 4)["loss"] > right["loss"]


def test_choices_are_scored_after_shots_and_question(llama: Tiny) -> None:
    def log_likelihood(before: list[int], after: list[int]) -> float:
        with torch.no_grad():
            logits_TV = llama.model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        return -float(torch.nn.functional.cross_entropy(logits_TV, torch.tensor(after))) * len(
            after
        )

    values = list(columns.measure(llama.model, Method(), quiz(), 0))
    first = quiz().blocks[0].items[0]
    scores = [log_likelihood(WINDOWS[0] + first.question, one) for one in first.choices]
    assert values[0]["right"] == int(scores[0] > scores[1])
    assert values[0]["loss"] == pytest.approx(-scores[0], abs=1e-4)
    second = quiz().blocks[0].items[1]
    told = [log_likelihood(WINDOWS[0] + one[:4], one[4:]) for one in second.choices]
    assert values[1]["right"] == int(told[1] > told[0])
    assert values[1]["loss"] == pytest.approx(-told[1] / 2, abs=1e-4)
    later = list(columns.measure(llama.model, Method(), quiz(), 2))
    assert later == [values[2]]
    assert later[0]["loss"] != values[0]["loss"]  # other solved items stand before it


def test_a_footprint_is_resident_memory_and_times_in_turns(llama: Tiny) -> None:
    found = child._footprint(llama.model, Method(), weight())
    assert isinstance(found, list)
    (value,) = found
    if Path("/proc/self/clear_refs").exists():
        full = full_bytes_per_token(llama.model)
        assert value["bytes_per_token"] == pytest.approx(full, rel=0.6)  # pages of 4 KiB
        assert value["prompt_peak_bytes"] >= 0
    assert value["first_token_ms"] > 0
    assert value["step_over_full"] > 0


def test_resident_memory_of_a_tensor_is_its_bytes() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells a process's memory")
    with footprint.mapped_allocations():
        before = footprint.resident()
        held = torch.ones(1 << 22)
        assert footprint.resident() - before == pytest.approx(held.nbytes, rel=0.05)
        del held
        assert abs(footprint.resident() - before) < 1 << 20
        assert footprint.transient(lambda: torch.ones(1 << 22)) > 1 << 23


@pytest.mark.parametrize("one", [retrieval(), quiz(), weight()], ids=lambda one: one.kind)
def test_material_travels_as_json(one: Material) -> None:
    assert from_json(json.loads(json.dumps(one.to_json()))) == one


# ---- material


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_model(tmp_path / "model")
    documents = ["The quick brown fox jumps over the lazy dog. " * 2000]
    monkeypatch.setattr(data, "read_texts", lambda source, split: documents)
    return tmp_path


def test_items_are_never_among_the_solved_ones(desk: Path) -> None:
    _, tokenizer = load_model(desk / "model")
    (sizes, path) = replace(make.QUICK, items=40, shots=400), matched.SAMPLES / "arc_style.jsonl"
    found = make.task(tokenizer, path, sizes)
    assert found.count == 20
    (block,) = found.blocks
    assert 0 < len(block.shots) <= 400
    shots = tokenizer.decode(block.shots)
    for item in block.items:
        assert tokenizer.decode(item.question) not in shots
    fewer = make.task(tokenizer, path, replace(sizes, items=5))
    assert (fewer.data, fewer.blocks[0].items) == (found.data, block.items[:5])


def test_a_continuation_alone_is_scored_after_several_contexts(desk: Path) -> None:
    _, tokenizer = load_model(desk / "model")
    item = {"context_options": ["a fox", "a brown dog"], "continuation": "jumps", "gold": 1}
    one = make.encoded(tokenizer, item)
    assert one.question == []
    for choice, scored in zip(one.choices, one.scored, strict=True):
        assert str(tokenizer.decode(choice[-scored:])).strip() == "jumps"
    assert make.answered(item) == "a brown dog jumps"


# ---- running


def test_a_run_fills_every_column_and_goes_on(llama: Tiny, tmp_path: Path) -> None:
    its: list[Material] = [text(tmp_path), retrieval(), weight(), quiz()]
    only = ["matkv", "H2O", "int4", "plain PCA"]
    run = run_of(llama, tmp_path, its, only=only)
    run.measure()
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    for entry in run.entries:
        columns_left = [one.column for one, _ in run.todo(entry, its)]
        assert columns_left == []
    again = run_of(llama, tmp_path, its, only=only)
    again.measure()
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == len(lines) + 1  # the plan
    page = table.markdown(again.records)
    for name in (
        "full cache",
        "matkv, no exact tokens",
        "H2O style",
        "int4 per token",
        "plain PCA",
    ):
        assert f"{name}" in page
    assert "Could not be measured" not in page
    assert picture(again.records) is not None


def test_a_cut_line_is_measured_again_and_items_are_added(llama: Tiny, tmp_path: Path) -> None:
    only = ["H2O"]
    run_of(llama, tmp_path, [text(tmp_path, 1)], only=only).measure()
    file = tmp_path / "cells.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-30])  # as a kill leaves it
    cut = run_of(llama, tmp_path, [text(tmp_path, 1)], only=only)
    assert [first for _, first in cut.todo(cut.entries[1], [text(tmp_path, 1)])] == [0]
    cut.measure()
    more = run_of(llama, tmp_path, [text(tmp_path, 3)], only=only)
    assert [first for _, first in more.todo(more.entries[1], more.columns)] == [1]
    before = more.records.values(more.entries[1].row(more.shared), "articles", "a")
    more.measure()
    after = more.records.values(more.entries[1].row(more.shared), "articles", "a")
    assert len(after) == 3
    assert after[:1] == before


def test_lost_predictions_of_the_full_cache_are_made_again(llama: Tiny, tmp_path: Path) -> None:
    one = text(tmp_path)
    run_of(llama, tmp_path, [one], only=["nobody"]).measure()
    assert references(one) == 2
    (tmp_path / "references" / "1.pt").unlink()
    run = run_of(llama, tmp_path, [one], only=["nobody"])
    assert [first for _, first in run.todo(run.entries[0], [one])] == [1]
    run.measure()
    assert references(one) == 2


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    file.write_text('{"row": {}}\n{"rows": [], "columns": []}\n')
    with pytest.raises(DataError, match="line 1"):
        Records(file)


def test_time_that_is_up_starts_nothing_new(
    llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(llama, tmp_path, [text(tmp_path)], until=0.0)
    run.measure()
    assert run.records.cells == {}
    assert "the time is up" in capsys.readouterr().err


def test_quick_ends_in_time_unless_told_otherwise() -> None:
    asked = [[], ["--quick"], ["--quick", "--minutes", "3"]]
    found = [matched.minutes_of(matched.parse(one)) for one in asked]
    assert found == [math.inf, matched.QUICK_MINUTES, 3]


def test_a_method_that_fails_says_why(llama: Tiny, tmp_path: Path) -> None:
    run = run_of(llama, tmp_path, [text(tmp_path)], only=["H2O"])

    def broken() -> Method:
        raise ImportError("no such package")

    entry = replace(run.entries[1], contestant=replace(run.entries[1].contestant, build=broken))
    replace(run, entries=[run.entries[0], entry]).measure()
    page = table.markdown(run.records)
    assert "ImportError: no such package" in page
    assert [first for _, first in run.todo(entry, run.columns)] == [0]


def test_what_has_lost_everything_is_asked_nothing(llama: Tiny, tmp_path: Path) -> None:
    run = run_of(llama, tmp_path, [text(tmp_path), retrieval(), weight()], only=["H2O"])
    full, own = (entry.row(run.shared) for entry in run.entries)
    for row, loss in ((full, 2.0), (own, 4.0)):
        run.records.add(row, "articles", "a", 0, [{"loss": loss}] * 2)
    assert [one.column for one, _ in run.todo(run.entries[1], run.columns)] == ["footprint"]
    other = replace(text(tmp_path), column="book", data="b")
    two = replace(run, columns=[other, *run.columns])
    for row in (full, own):
        run.records.add(row, "book", "b", 0, [{"loss": 2.0}] * 2)
    left = [one.column for one, _ in two.todo(run.entries[1], two.columns)]
    assert left == ["needle", "footprint"]  # not lost on every text


# ---- rows


def test_every_budget_has_its_rows(llama: Tiny) -> None:
    calibration = Calibration(llama.model, None, lambda: [], 64)
    found = list(rows.entries(llama.artifact, None, calibration, outside=True, levels=(0.5, 0.25)))
    by_level = {
        level: {one.contestant.method for one in found if one.level == level}
        for level in (None, 0.5, 0.25)
    }
    assert by_level[None] == {"full cache"}
    both = {"matkv", "KVTC style", "Palu style", "H2O style", "SnapKV (kvpress)", "QuantizedCache"}
    assert both <= by_level[0.5] & by_level[0.25]
    outside = {one.environment for one in found}
    assert outside == {None, "quantized", "presses", "shrink"}


@pytest.mark.parametrize("level", [0.5, 0.25])
def test_presses_hold_a_budget_on_average(level: float) -> None:
    (dropped,) = rows.dropped_tokens(level)
    ends = [min(at + 32, 1023) for at in range(768, 1023, 32)]
    held = [768 * (1 - dropped) + end - 768 for end in ends]
    assert sum(held) / sum(ends) == pytest.approx(level, abs=1e-3)
    assert rows.dropped_tokens(0.0625) == ()


def test_variants_are_made_once(llama: Tiny, desk: Path) -> None:
    model, tokenizer = load_model(desk / "model")
    effort = artifacts.Effort(calibrate_tokens=2048, expansions=1, held_out_tokens=1024)
    workshop = artifacts.Workshop(
        model=model, tokenizer=tokenizer, folder=desk / "made", budgets=(0.5,), effort=effort
    )
    artifact = workshop.untrained(replace(tiny("llama").artifact, sink=2, recent=4))
    assert (artifact.sink, artifact.recent) == (2, 4)
    assert artifact.tables[0.5].coded
    alone = workshop.ranks_alone(artifact)
    assert not alone.tables[0.5].coded
    assert alone.tables[0.5].budget <= 0.5
    before = sorted((desk / "made").iterdir())
    assert workshop.ranks_alone(artifact).digest == alone.digest
    assert sorted((desk / "made").iterdir()) == before


# ---- the table


def test_the_best_figure_is_bold_and_what_is_over_takes_no_part(tmp_path: Path) -> None:
    records = Records(tmp_path / "cells.jsonl")
    names = {"full cache": (None, 1.0, 2.0), "matkv": (0.5, 0.5, 2.2), "other": (0.5, 0.4, 2.5)}
    names["greedy"] = (0.5, 0.9, 2.1)
    its = [
        {
            "model": "m", "dtype": "d", "method": name, "setting": "", "family": "quantization",
            "level": level, "simulated": True, "full_bytes_per_token": 100,
        }
        for name, (level, _, _) in names.items()
    ]  # fmt: skip
    records.plan(its, [{"column": "articles", "kind": "text", "data": "a", "count": 2}])
    for row, (_, grown, loss) in zip(its, names.values(), strict=True):
        values = [
            {"loss": loss + it, "kl": loss - 2, "agree": 1, "held": grown, "grown": grown}
            for it in (0.0, 0.1)
        ]
        records.add(row, "articles", "a", 0, values)
    page = table.markdown(records)
    assert f"**{math.exp(2.25):.2f} (+0.200 ± 0.000)**" in page
    assert "greedy † ‡" in page
    assert "articles: perplexity | matkv † |" in page
    assert table.summary(records)[1]["articles.loss"] == pytest.approx(2.25)


def test_the_command_writes_its_files(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = load_model(desk / "model")
    tiny_artifact = desk / "artifact"
    from matkv import calibrate

    calibrate(model, [tokens(2, 64)]).save(tiny_artifact)
    monkeypatch.setattr(rows, "LEVELS", (0.5,))
    monkeypatch.setattr(make, "QUICK", replace(make.QUICK, haystack=600, tokens=600, shots=200))
    arguments = ["--model", str(desk / "model"), "--artifact", str(tiny_artifact), "--quick"]
    arguments += ["--windows", "1", "--samples", "1", "--items", "1", "--no-variants"]
    arguments += ["--only", "matkv", "--out", str(desk / "out"), "--minutes", "5"]
    matched.main(arguments)
    printed = capsys.readouterr().out
    assert "### 0.5 of the bytes" in printed
    found = {path.name for path in (desk / "out").iterdir()}
    assert {"cells.jsonl", "matched.md", "matched.json", "matched.png"} <= found
    matched.main(["--table", "--out", str(desk / "out"), "--picture", str(desk / "loss.png")])
    assert (desk / "loss.png").read_bytes() == (desk / "out" / "matched.png").read_bytes()
    assert capsys.readouterr().out == printed


def records_of(folder: Path, rows_: dict[str, list[float]], column: dict[str, Any]) -> Records:
    """Rows of one column by their values: of texts their losses, of tasks who was right."""
    records = Records(folder / "cells.jsonl")
    its = [
        {
            "model": "m", "dtype": "d", "method": name, "setting": "", "simulated": True,
            "family": "matkv" if name == "matkv" else "quantization",
            "level": None if name == "full cache" else 0.5, "full_bytes_per_token": 100,
        }
        for name in rows_
    ]  # fmt: skip
    texts = {"column": "articles", "kind": "text", "data": "a", "count": 9}
    records.plan(its, [texts, column | {"data": "x", "count": 99}])
    for row, numbers in zip(its, rows_.values(), strict=True):
        text = {"loss": 1.0, "kl": 0.0, "agree": 1, "held": 0.5, "grown": 0.5}
        if column["kind"] == "text":
            values = [text | {"loss": one} for one in numbers]
            records.add(row, column["column"], "x", 0, values)
            continue
        records.add(row, "articles", "a", 0, [text, text])
        values = [{"right": int(one), "loss": 1 - one} for one in numbers]
        records.add(row, column["column"], "x", 0, values)
    return records


def test_rows_within_two_paired_errors_of_the_best_are_even_with_it(tmp_path: Path) -> None:
    losses = {
        "full cache": [1.0, 2.0, 3.0, 4.0],
        "best": [1.1, 2.1, 3.1, 4.1],
        "matkv": [1.0, 2.4, 3.0, 4.3],
        "apart": [1.3, 2.35, 3.3, 4.35],
    }
    column = {"column": "book", "kind": "text"}
    page = table.markdown(records_of(tmp_path, losses, column))
    assert "| book: perplexity | best †; even: **matkv †** |" in page
    assert not sheet.even([0.0, 0.0], [1.0, 1.0])
    assert not sheet.even([], [])


def test_who_is_alone_does_not_win(tmp_path: Path) -> None:
    losses = {"full cache": [1.0, 2.0], "matkv": [1.1, 2.2]}
    page = table.markdown(records_of(tmp_path, losses, {"column": "book", "kind": "text"}))
    assert "book: perplexity |" not in page
    assert f"| {math.exp(1.65):.2f} (+0.150" in page


def test_a_row_of_fewer_windows_is_shown_at_its_paired_difference(tmp_path: Path) -> None:
    losses = {"full cache": [1.0, 2.0, 3.0, 4.0], "lost": [3.0, 4.2]}
    page = table.markdown(records_of(tmp_path, losses, {"column": "book", "kind": "text"}))
    assert f"{math.exp(2.5 + 2.1):.2f} (+2.100 ± 0.100)" in page
    assert "book 4 (2 of some rows)" in page


@pytest.mark.parametrize(("right", "told"), [(2, True), (8, False)])
def test_the_notes_say_what_the_full_cache_can_do(tmp_path: Path, right: int, told: bool) -> None:
    answers = {"full cache": [1.0] * right + [0.0] * (8 - right), "other": [1.0, 0.0] * 4}
    column = {"column": "quiz", "kind": "task", "chance": 0.25, "shots": 1500}
    said = notes.head(sheet.Sheet(records_of(tmp_path, answers, column)))
    assert f"{100 * right / 8:.1f} ± " in said
    assert "guessing has 25.0%" in said
    assert "1,500 tokens" in said
    assert ("too near" in said) == told
    assert "kvpress at 12.5%" in said


def test_items_for_a_point_follow_from_the_spread_of_differences(tmp_path: Path) -> None:
    answers = {"full cache": [1.0, 0.0] * 50, "other": [1.0, 1.0] * 50}
    column = {"column": "quiz", "kind": "task"}
    found = sheet.Sheet(records_of(tmp_path, answers, column))
    variance = 0.25 * 100 / 99
    assert notes.items_for_a_point(found) == math.ceil(variance * 4e4 / 100) * 100


def test_the_table_tells_what_guessing_gets_right(tmp_path: Path) -> None:
    assert described(quiz())["chance"] == 0.5
    assert described(quiz())["shots"] == 32
    assert described(retrieval())["context"] == 32


def test_of_what_is_lost_few_windows_are_read(llama: Tiny, tmp_path: Path) -> None:
    run = run_of(llama, tmp_path, [text(tmp_path, 4)], only=["H2O"])
    full, own = (entry.row(run.shared) for entry in run.entries)
    run.records.add(full, "articles", "a", 0, [{"loss": 2.0}] * 4)
    run.records.add(own, "articles", "a", 0, [{"loss": 4.0}])
    assert [first for _, first in run.todo(run.entries[1], run.columns)] == [1]
    run.records.add(own, "articles", "a", 1, [{"loss": 4.0}])
    assert run.todo(run.entries[1], run.columns) == []


def test_a_cache_that_nothing_reaches_is_no_cache(llama: Tiny, tmp_path: Path) -> None:
    class Deaf(Method):
        def held(self, cache: Any) -> tuple[float, float | None]:
            return 0.0, 0.0

    with pytest.raises(ValueError, match="holds nothing"):
        columns.window(llama.model, Deaf(), text(tmp_path), 0, is_full=True)


def test_none_of_a_kind_leaves_the_column_out(desk: Path) -> None:
    _, tokenizer = load_model(desk / "model")
    sizes = replace(make.QUICK, windows=1, samples=0, items=0, tokens=600)
    found = make.material(tokenizer, sizes, tasks_dir=desk / "none", references=desk)
    assert [one.kind for one in found] == ["text", "footprint"]
    for wrong in (["--windows", "0"], ["--budgets", "0.3"]):
        with pytest.raises(SystemExit):
            matched.parse(wrong)


# ---- the picture


def test_a_name_keeps_clear_of_lines_markers_and_other_names() -> None:
    room = labels.Room(labels.Box(0, 0, 400, 300))
    room.add_line([(50, 150), (350, 150)], 4, 1)
    room.lines.append(((200, 150), (200, 300), 1))
    for _ in range(4):
        before = list(room.boxes)
        place = room.place([(200, 150)], (60, 12))
        box = room.boxes[-1]
        assert box.within(room.frame)
        assert not any(box.meets(other) for other in before)
        assert not any(box.crossed(*line) for *line, _ in room.lines)
        assert place.cost < 10


@pytest.mark.parametrize(
    ("start", "end", "crosses"),
    [
        ((0, 5), (20, 5), True),
        ((0, 0), (20, 20), True),
        ((5, -5), (5, 30), True),
        ((0, 12), (20, 12), False),
        ((-5, 0), (0, 20), False),
        ((5, 20), (5, 30), False),
    ],
)
def test_a_line_crosses_a_box_or_not(
    start: tuple[float, float], end: tuple[float, float], crosses: bool
) -> None:
    assert labels.Box(2, 2, 10, 10).crossed(start, end) == crosses


# ---- pages


def test_tables_go_between_the_marks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{matched.MARKS[0]}\nold\n{matched.MARKS[1]}\nafter\n")
    matched.put("new\n", page)
    matched.put("newer\n", page)
    assert page.read_text() == (
        f"before\n{matched.MARKS[0]}\n\nnewer\n\n{matched.MARKS[1]}\nafter\n"
    )
    page.write_text("nothing")
    with pytest.raises(DataError, match="lacks the marks"):
        matched.put("new", page)
