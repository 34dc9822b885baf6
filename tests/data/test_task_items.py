"""Local items become lm-eval's requests; what is no item is refused with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from matkv.data import task_items
from matkv.data.task_items import load_tasks, prompt, read_items
from matkv.errors import DataError, MatkvError
from quiz import write_tasks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


def asked(folder: Path, name: str) -> list[list[tuple[str, str]]]:
    """(context, continuation) of every request, item by item."""
    task = load_tasks([name], folder)[0].task
    items = []
    for item in task.eval_docs:
        context = task.fewshot_context(item, num_fewshot=0)
        requests = task.construct_requests(item, context, metadata=(name, 0, 1))
        items.append([request.args for request in requests])
    return items


def test_every_choice_is_asked_after_its_question(folder: Path) -> None:
    assert asked(folder, "letters")[1] == [
        ("Question: What of river 1?\nAnswer:", " yes"),
        ("Question: What of river 1?\nAnswer:", " not at all"),
        ("Question: What of river 1?\nAnswer:", " may be so"),
    ]


def test_one_continuation_is_asked_after_each_context(folder: Path) -> None:
    assert asked(folder, "contexts")[0] == [
        ("The oak and so the oak", " was drum."),
        ("The oak and so it", " was drum."),
    ]


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("Question: Why?\n", "Question: Why?\nAnswer:"),
        ("Question: Why?\nA. so\nAnswer:", "Question: Why?\nA. so\nAnswer:"),
        ("The sky is ", "The sky is"),
    ],
)
def test_prompts_end_as_those_of_lm_eval(query: str, text: str) -> None:
    assert prompt(query) == text


def test_a_limit_draws_the_same_items_again_and_not_the_first(folder: Path) -> None:
    task, same = (load_tasks(["letters"], folder)[0] for _ in range(2))
    picks = task.picks(4, seed=0)
    assert picks == same.picks(4, seed=0) == sorted(set(picks))
    assert len(picks) == 4
    assert picks != [0, 1, 2, 3]
    assert picks != task.picks(4, seed=1)
    assert task.picks(None, 0) == task.picks(99, 0) == list(range(10))


def test_another_content_is_another_task(folder: Path) -> None:
    before = load_tasks(["letters"], folder)[0].data
    path = folder / "letters.jsonl"
    path.write_text(path.read_text().replace("yes", "no"))
    assert load_tasks(["letters"], folder)[0].data != before


def test_lines_may_hold_any_unicode(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "a\u2028b", "choices": ["ä", "o"], "gold": 1}\n\n', "utf-8")
    assert read_items(path) == [{"query": "a\u2028b", "choices": ["ä", "o"], "gold": 1}]


BAD_LINES = {
    "{not json": "line 2: not JSON",
    "[1, 2]": "line 2: no record",
    '{"query": "q", "gold": 0}': "lacks 'query', or two or more 'choices'",
    '{"query": "q", "choices": ["a"], "gold": 0}': "two or more 'choices'",
    '{"continuation": "q", "gold": 0}': "two or more 'context_options'",
    '{"query": "q", "choices": ["a", "b"], "gold": 2}': "gold 2 must be in 0..1",
    '{"query": "q", "choices": ["a", "b"], "gold": "a"}': "gold 'a' must be in 0..1",
    '{"query": "q", "choices": ["a", " "], "gold": 0}': "has an empty text",
    '{"continuation": "q", "context_options": ["a", "b"], "gold": 0}': "mixes two kinds",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_that_is_no_item_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read_items(path)
    assert BAD_LINES[line] in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_folders_files_and_names(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no directory"):
        load_tasks(["letters"], tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no \.jsonl file"):
        load_tasks(["letters"], tmp_path)
    with pytest.raises(DataError, match=r"no task 'piqa' in .*: it holds contexts, letters"):
        load_tasks(["letters", "piqa"], folder)
    with pytest.raises(DataError, match="no task is named"):
        load_tasks([" ", ""], folder)
    (folder / "void.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no item"):
        load_tasks(["void"], folder)


def test_without_lm_eval_the_remedy_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_items, "find_spec", lambda _: None)
    with pytest.raises(MatkvError, match=r"pip install lm-eval datasets"):
        load_tasks(["letters"], folder)


class Manager:
    """Stands for lm-eval's own, which takes long to list its thousands of tasks."""

    folder: Path
    all_tasks = ("letters", "far_away", "essay")

    def load(self, names: list[str]) -> dict[str, Any]:
        if names == ["far_away"]:
            raise ConnectionError("Couldn't reach 'far/away' on the Hub\nmore of it")
        task = load_tasks(["letters"], self.folder)[0].task
        task.set_config(key="num_fewshot", value=None)
        if names == ["essay"]:
            task._aggregation_list = {"rouge": None}
        return {"tasks": {names[0]: task}}


def test_names_without_a_folder_are_lm_evals_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    monkeypatch.setattr(Manager, "folder", folder, raising=False)
    (loaded,) = load_tasks(["letters", "letters"])
    assert loaded.data == "lm-eval"  # never taken for a local file of that name
    assert loaded.normalized is None
    assert loaded.task.get_config("num_fewshot") == 0
    with pytest.raises(DataError, match="lm-eval knows no task 'nonsense'"):
        load_tasks(["letters", "nonsense"])
    with pytest.raises(DataError, match=r"data of far_away: Couldn't reach .* give --tasks-dir"):
        load_tasks(["far_away"])
    with pytest.raises(DataError, match="essay has no accuracy but rouge"):
        load_tasks(["essay"])
