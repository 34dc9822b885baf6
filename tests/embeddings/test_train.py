"""Training by the Trainer: settings, resume, logs by size, and models by name."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from matkv.embeddings import LadderLoss, ladder
from matkv.embeddings.config import EmbedConfig
from matkv.embeddings.load import load_embedder
from matkv.embeddings.run import check_out, read_made, save_model
from matkv.embeddings.serve import trained_sizes
from matkv.embeddings.train import Step, base_loss, fit, ladder_loss
from matkv.errors import MatkvError, ModelError, SizeError, TrainingError
from matkv.schedule import Cycle, Independent, Ladder, Sandwich
from matkv.settings import recipe_names
from tiny_embedders import HIDDEN, LAYERS, TEXTS, build

RUNGS = "1x8,2x16,4x32"
WORDS = [f"{a} {b}" for a in TEXTS for b in ("today", "at night", "again", "in may")]
PAIRS = {"anchor": WORDS, "positive": [f"so {text}" for text in WORDS]}


def settings(**given: Any) -> EmbedConfig:
    small: dict[str, Any] = {
        "rungs": RUNGS,
        "steps": 6,
        "batch_size": 4,
        "save_every": 2,
        "log_every": 2,
    }
    return EmbedConfig(**small | given)


def trained(folder: Path, config: EmbedConfig, **options: Any) -> tuple[SentenceTransformer, Any]:
    model = build("bert")
    return model, fit(model, PAIRS, ladder_loss(model, config), config, folder, **options)


def test_training_logs_every_size_and_records_them(tmp_path: Path) -> None:
    steps: list[Step] = []
    model, done = trained(tmp_path, settings(), on_step=steps.append)
    assert done.steps == 6
    assert not done.interrupted
    assert [point["step"] for point in done.curve] == [2, 4, 6]
    for point in done.curve:
        parts = point["1x8"] + point["2x16"] + point["4x32"]
        assert parts == pytest.approx(point["loss"], abs=2e-3)
    assert [at.step for at in steps] == list(range(1, 7))
    assert steps[-1].seconds_left == 0
    assert set(steps[-1].parts) >= {"1x8", "2x16", "4x32"}
    assert trained_sizes(model) == ((1, 8), (2, 16), (4, 32))
    assert not model.training


def test_training_moves_the_loss_and_not_the_random_state(tmp_path: Path) -> None:
    python, torchs = random.getstate(), torch.get_rng_state()
    arrays: Any = np.random.get_state()
    _, done = trained(tmp_path, settings(steps=30, lr=3e-3, log_every=10))
    assert done.curve[-1]["loss"] < 0.8 * done.curve[0]["loss"]
    assert random.getstate() == python
    now: Any = np.random.get_state()
    assert np.array_equal(now[1], arrays[1])
    assert torch.equal(torch.get_rng_state(), torchs)


@pytest.mark.parametrize("schedule", ["ladder", "cycle", "independent", "sandwich"])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(
    schedule: Any, tmp_path: Path
) -> None:
    config = settings(schedule=schedule, grain=8)
    whole, _ = trained(tmp_path / "whole", config)

    def stop(at: Step) -> None:
        if at.step == 3:
            os.kill(os.getpid(), 2)  # Ctrl-C, after which the step under way is finished

    _, cut = trained(tmp_path / "cut", config, on_step=stop)
    assert cut.interrupted
    assert cut.steps in (3, 4)
    resumed, done = trained(tmp_path / "cut", config, resume=True)
    assert done.steps == 6
    assert not done.interrupted
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_an_earlier_training_is_not_resumed_unless_asked(tmp_path: Path) -> None:
    trained(tmp_path / "run", settings(steps=2))
    first, _ = trained(tmp_path / "run", settings(steps=4))
    again, _ = trained(tmp_path / "other", settings(steps=4))
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))


def test_texts_are_cut_for_training_only(tmp_path: Path) -> None:
    model = build("bert")
    before, seen = model.max_seq_length, []
    hook = model[0].model.encoder.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[1])
    )
    loss = LadderLoss(model, base_loss(model, settings()), ladder(model, [(1, 8)]))
    seen.clear()
    fit(model, PAIRS, loss, settings(steps=2, max_tokens=5), tmp_path)
    hook.remove()
    assert max(seen) <= 5
    assert model.max_seq_length == before


def test_scored_pairs_are_trained_on(tmp_path: Path) -> None:
    model, config = build("bert"), settings(loss="cosent", steps=2)
    columns: dict[str, list[Any]] = {
        "sentence1": WORDS,
        "sentence2": WORDS[::-1],
        "score": [index / 20 for index in range(20)],
    }
    done = fit(model, columns, ladder_loss(model, config), config, tmp_path)
    assert done.steps == 2


def test_training_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="20 examples are less than a batch of 64"):
        trained(tmp_path, settings(batch_size=64))
    with pytest.raises(TrainingError, match="no checkpoint in"):
        trained(tmp_path / "none", settings(), resume=True)
    with pytest.raises(TrainingError, match="the loss is no number at step"):
        trained(tmp_path, settings(lr=1e30, max_grad_norm=0.0, log_every=1))


# ---- settings


def test_settings_make_their_schedule() -> None:
    full = (LAYERS, HIDDEN)
    makes: dict[str, type] = {"ladder": Ladder, "cycle": Cycle, "sandwich": Sandwich}
    for name, kind in (makes | {"independent": Independent}).items():
        config = settings(schedule=name, grain=8, random=3)
        schedule = config.make_schedule(full)
        assert type(schedule) is kind
        assert tuple(axis.size for axis in schedule.axes) == full
    assert settings(rungs=None).make_schedule(full).draw(0, torch.Generator())[-1] == full
    with pytest.raises(SizeError, match="layer 9"):
        settings(rungs="9x8").make_schedule(full)


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"steps": 0}, "steps"),
    "lr": ({"lr": -1.0}, "lr"),
    "warmup": ({"warmup": 1.0}, "warmup"),
    "loss": ({"loss": "triplet"}, "loss"),
    "schedule": ({"schedule": "ladders"}, "schedule"),
    "type": ({"batch_size": 2.5}, "batch_size"),
    "true": ({"steps": True}, "steps"),
    "name": ({"step": 3}, "step"),
    "rungs": ({"rungs": "2,3"}, "LAYERxDIMENSION"),
    "distill": ({"distill": float("nan")}, "distill"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_cannot_be_are_refused(case: str) -> None:
    given, message = BAD_SETTINGS[case]
    with pytest.raises(MatkvError, match=message):
        EmbedConfig.from_dict(given)


def test_settings_come_from_a_file_and_the_command_line_goes_first(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('rungs = "1x8"\nsteps = 3\nlr = 1\n')
    config = EmbedConfig.from_toml(tmp_path / "a.toml", steps=5, batch_size=None)
    assert (config.rungs, config.steps, config.lr, config.batch_size) == ("1x8", 5, 1, 64)
    assert EmbedConfig.from_dict(config.to_json()) == config
    with pytest.raises(TrainingError, match=r"no recipe '.*none.toml': .* one of embed-cpu"):
        EmbedConfig.from_toml(tmp_path / "none.toml")
    (tmp_path / "b.toml").write_text("steps = = 3")
    with pytest.raises(TrainingError, match="cannot read the recipe"):
        EmbedConfig.from_toml(tmp_path / "b.toml")


@pytest.mark.parametrize("recipe", recipe_names("embed"))
def test_every_recipe_can_be_read(recipe: str) -> None:
    config = EmbedConfig.from_toml(recipe)
    assert config.make_schedule((6, 384)).draw(0, torch.Generator())[-1] == (6, 384)


# ---- models by name, and on disk


def test_a_model_is_a_directory_or_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_tiny_embedder"
    build("bert").save_pretrained(str(package / "data" / "model"))
    (package / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("some-tiny-embedder", "some_tiny.embedder", str(package / "data" / "model")):
        assert np.array_equal(load_embedder(name).encode(TEXTS), build("bert").encode(TEXTS))
    assert "some_tiny_embedder" not in sys.modules


def test_a_package_may_have_another_name_than_its_module_and_an_archive_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("bert").save_pretrained(str(tmp_path / "model"))
    (tmp_path / "its_module").mkdir()
    with zipfile.ZipFile(tmp_path / "its_module" / "a.zip", "w") as other:
        other.writestr("readme.txt", "no model")
    shutil.make_archive(str(tmp_path / "its_module" / "model"), "zip", tmp_path, "model")
    about = tmp_path / "named_otherwise-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: named-otherwise\nVersion: 1.0\n")
    (about / "RECORD").write_text("its_module/a.zip,,\nits_module/model.zip,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("named-otherwise", "its-module"):
        assert np.array_equal(load_embedder(name).encode(TEXTS), build("bert").encode(TEXTS))


def test_a_plain_transformers_model_gets_mean_pooling(tmp_path: Path) -> None:
    model = build("qwen3")
    model[0].model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    assert np.array_equal(load_embedder(str(tmp_path)).encode(TEXTS), model.encode(TEXTS))


def test_what_is_no_embedding_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot load .*none"):
        load_embedder(str(tmp_path / "none"))
    with pytest.raises(ModelError, match="holds no model"):
        load_embedder(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        load_embedder(str(tmp_path / "file"))
    (tmp_path / "config.json").write_text('{"base_model": "x", "format_version": 1}')
    with pytest.raises(ModelError, match="is an artifact for key/value caches"):
        load_embedder(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_embedder(str(tmp_path))


def test_saving_keeps_results_and_what_is_no_model(tmp_path: Path) -> None:
    model, out = build("bert"), tmp_path / "run"
    save_model(model, out, {"steps": 1})
    (out / "results").mkdir()
    (out / "results" / "sizes.json").write_text("{}")
    (out / "old").write_text("")
    save_model(model, out, None)
    assert read_made(out) is None
    assert (out / "results" / "sizes.json").exists()
    assert not (out / "old").exists()
    assert json.loads((out / "modules.json").read_text())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    for taken in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(ModelError, match="is no embedding model"):
            check_out(taken)


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "matkv.json").write_text("[]")
    with pytest.raises(ModelError, match="is damaged"):
        read_made(tmp_path)
