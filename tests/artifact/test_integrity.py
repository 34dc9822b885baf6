"""Hostile and damaged artifacts: an error of one line, soon, or all that was saved."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from matkv.artifact.artifact import Artifact
from matkv.artifact.config import sealed
from matkv.errors import ArtifactError
from one_artifact import assert_equal, make

SECONDS = 1.0  # that any load may take
CORRUPTIONS = 250
ODD: tuple[Any, ...] = (
    True, False, None, 0, -1, 0.5, 1e12, 10**12, 10**40, math.nan, math.inf, "", "x", "0.5",
    [], {}, [[]], [1, 2], {"a": 1}, {"key": []}, "é\n" * 50,
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(lora=True).save(tmp_path_factory.mktemp("sound") / "run")


def damage_of(error: ArtifactError) -> str:
    """The message, which is one readable line."""
    text = str(error)
    assert "\n" not in text and 20 < len(text) < 600
    return text


def loaded(run: Path) -> Artifact | None:
    """What is there, or None for an error; either of them soon."""
    started = time.process_time()
    try:
        return Artifact.load(run)
    except ArtifactError as error:
        damage_of(error)
        return None
    finally:
        assert time.process_time() - started < SECONDS


# ---- corruption at random


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 4))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def lengthen(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    at = draw.randrange(len(data))
    path.write_bytes(data[:at] + draw.randbytes(draw.choice((1, 8, 1000))) + data[at:])


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def empty(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def make_a_folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def rename(path: Path, draw: random.Random) -> None:
    path.rename(path.with_name(f"{draw.choice('az')}-{path.name}"))


def exchange(path: Path, draw: random.Random) -> None:
    """Another file of the artifact in its place."""
    others = [one for one in sorted(path.parent.rglob("*")) if one.is_file() and one != path]
    shutil.copyfile(draw.choice(others), path) if others else path.unlink()


def other_tensors(path: Path, draw: random.Random) -> None:
    """Two tensors exchanged, or one with another number; otherwise sound."""
    if path.suffix != ".safetensors":
        return flip(path, draw)
    tensors = load_file(path)
    one, other = draw.sample(sorted(tensors), 2)
    if draw.random() < 0.5:
        tensors[one], tensors[other] = tensors[other], tensors[one]
    else:
        tensors[one].view(-1)[0] += 1
    save_file(tensors, path)


def other_values(path: Path, draw: random.Random) -> None:
    """A value of a JSON file replaced, exchanged or taken out, somewhere in its depth."""
    if path.suffix != ".json":
        return flip(path, draw)
    config = json.loads(path.read_text())
    path.write_text(json.dumps(changed(config, draw)))


DAMAGES = (
    flip, cut, lengthen, remove, empty, make_a_folder, rename, exchange, other_tensors,
    other_values, other_values, other_values, flip,
)  # fmt: skip


def changed(config: Any, draw: random.Random) -> Any:
    """The same JSON but for one place."""
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        keys: Any = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                visit(value[key])

    visit(config)
    holder, key = draw.choice(places)
    how = draw.random()
    if how < 0.5:
        holder[key] = draw.choice(ODD)
    elif how < 0.7:
        del holder[key]
    elif how < 0.85 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    else:
        other, its_key = draw.choice(places)
        holder[key], other[its_key] = other[its_key], holder[key]
    return config


@pytest.mark.parametrize("seed", range(10))
def test_a_corrupted_artifact_is_an_error_or_loads_as_saved(
    sound: Path, tmp_path: Path, seed: int
) -> None:
    draw, refused = random.Random(seed), 0
    for number in range(CORRUPTIONS // 10):
        run = tmp_path / str(number)
        shutil.copytree(sound, run)
        files = sorted(path for path in run.rglob("*") if path.is_file())
        draw.choice(DAMAGES)(draw.choice(files), draw)
        survivor = loaded(run)
        refused += survivor is None
        if survivor is not None:
            assert_equal(survivor, make(lora=True))
    assert refused > CORRUPTIONS // 20


@pytest.mark.parametrize("version", [1, 2])
def test_whatever_a_configuration_says_is_an_error_or_loads(
    sound: Path, tmp_path: Path, version: int
) -> None:
    """No checksum tells: that of version 2 is made anew, version 1 has none."""
    draw, refused = random.Random(version), 0
    run = tmp_path / "run"
    shutil.copytree(sound, run)
    config = json.loads((run / "config.json").read_text())
    if version == 1:
        config = as_version_1(config)
    for _ in range(CORRUPTIONS):
        new = changed(json.loads(json.dumps(config)), draw)
        (run / "config.json").write_text(json.dumps(sealed(new) if version == 2 else new))
        refused += loaded(run) is None
    assert refused > CORRUPTIONS // 2


def as_version_1(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as it was before `recent` and the checksum of all."""
    old = {name: config[name] for name in config if name not in ("recent", "config_sha256")}
    return old | {"format_version": 1, "window": config["recent"]}


def test_version_1_loads_as_before(sound: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(sound, run)
    edit(run, as_version_1)
    assert_equal(Artifact.load(run), make(lora=True))


# ---- what once went through


def edit(run: Path, change: Callable[[dict[str, Any]], Any], *, seal: bool = False) -> None:
    path = run / "config.json"
    config = json.loads(path.read_text())
    config = change(config) or config
    path.write_text(json.dumps(sealed(config) if seal else config))


def set_to(*path: Any) -> Callable[[dict[str, Any]], None]:
    *keys, last, value = path

    def change(config: dict[str, Any]) -> None:
        for key in keys:
            config = config[key]
        config[last] = value

    return change


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: {key: config[key] for key in config if key != name}


QUIET: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a rank": set_to("tables", "0.5", "key", 1, 0, 3),
    "sink": set_to("sink", 5),
    "recent": set_to("recent", 17),
    "a budget": lambda c: c["tables"].update({"0.25": c["tables"].pop("0.5")}),
    "no adapters": set_to("lora_sha256", None),
    "adapters not told of": without("lora_sha256"),
    "the model's name": set_to("base_model", "somebody/some-mode1"),
    "history": set_to("history", []),
    "the checksum itself": without("config_sha256"),
}


@pytest.mark.parametrize("name", QUIET)
def test_what_decides_results_cannot_change_unnoticed(
    sound: Path, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(sound, run)
    edit(run, QUIET[name])
    with pytest.raises(ArtifactError, match=r"config\.json is damaged \(it.* checksum"):
        Artifact.load(run)


@pytest.mark.parametrize("value", [True, 0.5, 1e12, 10**12, -1, "4", None, math.nan])
@pytest.mark.parametrize(
    "path",
    [
        ("sink",),
        ("recent",),
        ("geometry", "query_heads"),
        ("geometry", "layers", 1, "kv_heads"),
        ("geometry", "layers", 1, "head_dim"),
        ("geometry", "layers", 0, "window"),
        ("tables", "0.5", "key", 1, 0),
    ],
    ids=lambda path: ".".join(map(str, path)),
)
def test_a_whole_number_is_one(
    sound: Path, tmp_path: Path, path: tuple[Any, ...], value: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(sound, run)
    edit(run, set_to(*path, value), seal=True)
    with pytest.raises(ArtifactError) as error:
        Artifact.load(run)
    damage_of(error.value)


HUGE: dict[str, Callable[[Path], object]] = {
    "10,000 tables": lambda run: edit(
        run,
        lambda c: c.update(tables={str(1 - i / 1e5): c["tables"]["0.5"] for i in range(10_000)}),
        seal=True,
    ),
    "nested deep": lambda run: (run / "config.json").write_text("[" * 100_000),
    "nested deep within": lambda run: (run / "config.json").write_text(
        (run / "config.json").read_text().replace('"\\u00e9"', "[" * 900 + "]" * 900)
    ),
    "50 megabytes": lambda run: (run / "config.json").write_text(
        '{"format": "matkv", "format_version": 2, "x": "' + "x" * 50_000_000 + '"}'
    ),
    "a million brackets": lambda run: (run / "config.json").write_text(
        "[" + "[]," * 1_000_000 + "[]]"
    ),
    "a number of 100,000 digits": lambda run: (run / "config.json").write_text(
        '{"format": "matkv", "format_version": ' + "9" * 100_000 + "}"
    ),
}


@pytest.mark.parametrize("name", HUGE)
def test_hostile_sizes_are_refused_soon(sound: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(sound, run)
    HUGE[name](run)
    assert loaded(run) is None


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    artifact = make()
    for number in range(1001):
        artifact.tables[1 - number / 1e4] = artifact.tables[0.5]
    with pytest.raises(ArtifactError, match=r"1,003 rank tables.*keep fewer tables"):
        artifact.save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_rights_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        run = make(lora=True).save(tmp_path / "run")
    finally:
        os.umask(before)
    rights = {stat.S_IMODE(path.stat().st_mode) for path in run.rglob("*") if path.is_file()}
    assert rights == {0o666 & ~umask}
