"""lm-eval's model: exact through the truncated pass, and found by lm-eval's own command line.

Shapes: B sequence, T token, V vocabulary.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

import matkv
from matkv import cli
from matkv.artifact.artifact import Artifact
from matkv.cache.layer import LatentLayer
from matkv.data.task_items import load_tasks
from matkv.errors import DataError, MatkvError
from matkv.evaluate.lm_eval_model import LoadedLM, MatkvLM
from matkv.hf.attach import attached_table, attachment_of
from quiz import letters, make_run, write_tasks
from tiny import ragged_table, stepwise

Pairs = list[tuple[str, str]]
PAIRS: Pairs = [
    ("The oak", " stands on the hill"),
    ("The oak", " A"),
    ("The oak", " B"),
    ("A much longer context, which says a good deal about rivers:", " wet"),
    ("", "from nothing"),
    ("x", " y"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lm")


@pytest.fixture(scope="module")
def made(home: Path) -> tuple[Any, Any, Artifact]:
    return make_run(home)


@pytest.fixture
def lm(made: tuple[Any, Any, Artifact]) -> Iterator[LoadedLM]:
    yield LoadedLM(made[0], made[1], batch_size=3)
    matkv.detach(made[0])


@pytest.fixture
def artifact(made: tuple[Any, Any, Artifact]) -> Artifact:
    return made[2]


def ask(lm: Any, pairs: Pairs) -> list[tuple[float, bool]]:
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(pairs)
    ]
    answers: list[tuple[float, bool]] = lm.loglikelihood(requests, disable_tqdm=True)
    return answers


def through_cache(lm: LoadedLM, context: str, continuation: str) -> tuple[float, bool]:
    """The same answer read token by token through the cache that generation uses."""
    before = lm.tok_encode(context) if context else [lm.prefix_token_id]
    after = lm.tok_encode(continuation)
    ids_BT = torch.tensor([before + after])
    log_probs_TV = stepwise(lm.model, ids_BT[:, :-1], (1,))[0].log_softmax(-1)[-len(after) :]
    target_T = torch.tensor(after)
    picked_T = log_probs_TV.gather(-1, target_T[:, None])
    return float(picked_T.sum()), bool((log_probs_TV.argmax(-1) == target_T).all())


EXACT = {"no exact tokens": {}, "exact tokens": {"sink": 2, "recent": 3}}


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_equal_reading_through_the_latent_cache(
    lm: LoadedLM, artifact: Artifact, seed: int, case: str
) -> None:
    table = ragged_table(artifact.geometry, seed)
    matkv.attach(lm.model, artifact, ranks=table, **EXACT[case])
    for (score, greedy), pair in zip(ask(lm, PAIRS), PAIRS, strict=True):
        expected, would_write = through_cache(lm, *pair)
        assert score == pytest.approx(expected, abs=1e-4, rel=1e-5)
        assert greedy == would_write


def test_items_of_a_task_score_as_through_the_latent_cache(
    lm: LoadedLM, artifact: Artifact, tmp_path: Path
) -> None:
    """The whole way: a file, lm-eval's task, its requests, batches, and the verdict on an item."""
    from lm_eval.evaluator import evaluate

    task = load_tasks(["letters"], write_tasks(tmp_path))[0].task
    matkv.attach(lm.model, artifact, ranks=ragged_table(artifact.geometry, 2))
    lm.on_progress = lambda _: None
    found = evaluate(lm, {"tasks": {"letters": task}}, limit=4, bootstrap_iters=0)
    for sample, item in zip(found["samples"]["letters"], letters(4), strict=True):
        scores = [
            through_cache(lm, f"{item['query']}\nAnswer:", f" {choice}")[0]
            for choice in item["choices"]
        ]
        given = [score for score, _ in sample["filtered_resps"]]
        assert given == pytest.approx(scores, abs=1e-4, rel=1e-5)
        assert sample["acc"] == (scores.index(max(scores)) == item["gold"])
        per_byte = [s / len(c.encode()) for s, c in zip(scores, item["choices"], strict=True)]
        assert sample["acc_bytes"] == (per_byte.index(max(per_byte)) == item["gold"])


def test_full_rank_scores_as_the_plain_model(lm: LoadedLM, artifact: Artifact) -> None:
    plain = [score for score, _ in ask(lm, PAIRS)]
    matkv.attach(lm.model, artifact, 1.0)
    assert [score for score, _ in ask(lm, PAIRS)] == pytest.approx(plain, abs=1e-4)
    matkv.attach(lm.model, artifact, 0.25)
    assert [score for score, _ in ask(lm, PAIRS)] != pytest.approx(plain, abs=1e-2)


def test_the_plain_model_scores_as_lm_evals_own(lm: LoadedLM) -> None:
    theirs = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, backend="causal", batch_size=2)
    expected = ask(theirs, PAIRS)
    ours = ask(lm, PAIRS)
    assert [score for score, _ in ours] == pytest.approx([s for s, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]
    text = Instance(request_type="loglikelihood_rolling", doc={}, arguments=("some text",), idx=0)
    assert lm.loglikelihood_rolling([text], disable_tqdm=True) == pytest.approx(
        theirs.loglikelihood_rolling([text], disable_tqdm=True), abs=1e-4
    )


def test_inputs_that_differ_in_the_last_token_are_read_once(
    lm: LoadedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, kept = [], []
    forward = lm.model.forward

    def spy(input_ids: Any, *, logits_to_keep: int, **options: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        kept.append(logits_to_keep)
        return forward(input_ids, logits_to_keep=logits_to_keep, **options)

    monkeypatch.setattr(lm.model, "forward", spy)
    ask(lm, [("The oak:", f" {letter}") for letter in "ABCD"])
    assert shapes == [(1, len("The oak: "))]
    assert kept == [2]  # the space and the letter: no vocabulary over the rest


def test_contexts_too_long_lose_their_beginning(lm: LoadedLM) -> None:
    short = LoadedLM(lm.model, lm.tokenizer, batch_size=1, max_length=8)
    long = ask(short, [("0123456789abcdef", "gh")])
    assert long[0][0] == pytest.approx(ask(lm, [("9abcdef", "gh")])[0][0], abs=1e-4)
    with pytest.raises(DataError, match="a continuation of 9 tokens"):
        ask(short, [("a", "123456789")])


def test_text_is_generated_through_latents(
    lm: LoadedLM, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = []
    update = LatentLayer.update

    def spy(self: LatentLayer, *inputs: Any, **options: Any) -> Any:
        updates.append(self)
        return update(self, *inputs, **options)

    monkeypatch.setattr(LatentLayer, "update", spy)
    how = {"until": ["\n\n"], "max_gen_toks": 4}
    request = Instance(request_type="generate_until", doc={}, arguments=("Say", how), idx=0)
    lm.generate_until([request], disable_tqdm=True)
    assert not updates
    matkv.attach(lm.model, artifact, 0.5)
    lm.generate_until([request], disable_tqdm=True)
    assert len(updates) >= 2 * len(artifact.geometry.layers)


def test_lm_eval_finds_the_model_by_name(home: Path, artifact: Artifact) -> None:
    lm = get_model("matkv").create_from_arg_string(
        f"artifact={home / 'run'},budget=0.5", {"batch_size": 2, "device": "cuda:0"}
    )
    assert type(lm) is MatkvLM
    table = attached_table(lm.model)
    assert table == artifact.table(0.5)
    plain = get_model("matkv").create_from_arg_string(f"artifact={home / 'run'},budget=full")
    assert attachment_of(plain.model) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("budget=0.5", "no artifact is named"),
        ("artifact={run}", "budget None must be a fraction"),
        ("artifact={run},budget=half", "budget half must be a fraction"),
        ("artifact={run},budget=1.5", r"budget 1\.5 must be in \(0, 1\]"),
        ("artifact={run},budget=0.5,peft=x", "takes no argument 'peft'"),
        ("artifact={run}/none,budget=0.5", "no artifact at"),
    ],
)
def test_bad_arguments_are_refused(
    home: Path, artifact: Artifact, arguments: str, message: str
) -> None:
    with pytest.raises(MatkvError, match=message):
        MatkvLM.create_from_arg_string(arguments.format(run=home / "run"))


TASKS = {
    "letters": """
output_type: multiple_choice
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "words": """
output_type: generate_until
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def test_every_option_is_lm_evals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is registered first, `--help` is not ours, and what was there before comes back."""
    seen: list[list[str]] = []

    def spy() -> None:
        seen.append(sys.argv)
        assert get_model("matkv") is MatkvLM

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", spy)
    given = ["matkv", "lm-eval", "run", "--tasks", "a,b", "--help", "-x"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main()
    assert seen == [["matkv lm-eval", *given[2:]]]
    assert sys.argv is given


def test_no_python_of_the_environment_runs_code_of_ours_at_its_start() -> None:
    code = "import sys; print([name for name in sys.modules if name.startswith('matkv')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_lm_evals_command_line_evaluates_an_artifact(
    home: Path, artifact: Artifact, tmp_path: Path
) -> None:
    """The program as users start it: 20 seconds of processor time, most of them to start."""
    data = write_tasks(tmp_path / "data") / "letters.jsonl"
    for name, rest in TASKS.items():
        source = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {data}}}\n"
        text = f'test_split: train\ndoc_to_text: "{{{{query}}}}"{rest}'
        (tmp_path / f"{name}.yaml").write_text(source + text)
    program = [sys.executable, "-m", "matkv", "lm-eval"]
    model = ["--model", "matkv", "--model_args", f"artifact={home / 'run'},budget=0.375"]
    tasks = ["--tasks", "letters,words", "--include_path", str(tmp_path), "--limit", "4"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [
            *program,
            *model,
            *tasks,
            "--output_path",
            str(tmp_path / "out"),
        ],
        env=os.environ | offline,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "acc" in done.stdout
    written = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())
    assert set(written["results"]) == {"letters", "words"}
    assert written["n-samples"]["letters"]["effective"] == 4
