"""The artifact: loaded as saved, damage is named, and a save that fails leaves the old one."""

from __future__ import annotations

import errno
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import matkv
from matkv.artifact.artifact import Artifact
from matkv.artifact.config import sealed
from matkv.artifact.history import Distilled
from matkv.artifact.storage import checksum
from matkv.bases.maps import Maps, SideBases
from matkv.errors import ArtifactError, BudgetError, FingerprintError
from matkv.progress import Spent
from matkv.ranks import Geometry, RankTable
from one_artifact import GEOMETRY, assert_equal, make
from tiny import Tiny


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make().save(tmp_path / "runs" / "demo")


# ---- saving and loading


def test_loaded_is_bit_equal_to_saved(saved: Path) -> None:
    assert_equal(Artifact.load(saved), make())


def test_saving_again_replaces_the_artifact_and_leaves_nothing_beside_it(saved: Path) -> None:
    make(1).save(saved)
    assert_equal(Artifact.load(saved), make(1))
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_other_files_survive_a_save(saved: Path) -> None:
    others = ["results/eval.json", "extra/config.json", "extra/bases.safetensors", "notes.txt"]
    for other in others:
        (saved / other).parent.mkdir(exist_ok=True)
        (saved / other).write_text(other)
    (saved / "link").symlink_to("notes.txt")
    make(1).save(saved)
    assert [(saved / other).read_text() for other in others] == others
    assert (saved / "link").is_symlink()
    assert_equal(Artifact.load(saved), make(1))


def test_an_empty_directory_a_link_and_the_current_one_can_be_saved_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    make().save(empty)
    link = tmp_path / "link"
    link.symlink_to(empty)
    make(1).save(link)
    assert link.is_symlink()
    assert_equal(Artifact.load(empty), make(1))
    monkeypatch.chdir(empty)
    make(2).save(".")
    monkeypatch.chdir(tmp_path)
    assert_equal(Artifact.load("empty"), make(2))


def test_bases_that_share_memory_can_be_saved(tmp_path: Path) -> None:
    eye = SideBases(Maps.orthogonal(torch.eye(8).repeat(2, 1, 1)), torch.ones(2, 8))
    shared = replace(make(), bases={layer: {"key": eye, "value": eye} for layer in (1, 2)})
    assert_equal(Artifact.load(shared.save(tmp_path / "run")), shared)


def test_tables_are_found_by_budget() -> None:
    artifact = make()
    assert artifact.table(0.5) == artifact.tables[0.5]
    assert artifact.table(0.6) == artifact.tables[0.5]
    assert artifact.table(0.49) == artifact.tables[1 / 3]
    assert artifact.table(0.25) == RankTable.uniform(GEOMETRY, 0.25)
    assert artifact.table(1) == RankTable.full(GEOMETRY)
    assert artifact.table(0.5, uniform=True) == RankTable.uniform(GEOMETRY, 0.5)
    for budget in (0, 1.5, math.nan):
        with pytest.raises(BudgetError):
            artifact.table(budget)


def test_a_smaller_table_than_asked_for_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    make().table(0.6)
    assert "using the one for 0.5" in caplog.text


def test_history_grows_in_a_copy() -> None:
    artifact = make()
    entry = Distilled(stages={"local": Spent(3, 96, 60.0)})
    longer = artifact.with_history(entry)
    assert longer.history == (*artifact.history, entry.to_json())
    assert len(artifact.history) == 1


# ---- bad input


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    """Damage that the checksum does not show: a configuration sealed with other contents."""

    def damage(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(sealed(config)))

    return damage


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], object]:
    """Damage that the checksum does not show: a file written whole, with other contents."""

    def damage(directory: Path) -> None:
        path = directory / "bases.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        found = checksum(path)
        edit_config(lambda config: config.update(bases_sha256=found))(directory)

    return damage


def truncate(name: str) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: len(data) // 2])

    return damage


def flip_a_bit(directory: Path) -> None:
    data = bytearray((directory / "bases.safetensors").read_bytes())
    data[-5] ^= 1
    (directory / "bases.safetensors").write_bytes(data)


def forged_safetensors(directory: Path) -> None:
    path = directory / "bases.safetensors"
    path.write_bytes(b"not a safetensors file")
    edit_config(lambda c: c.update(bases_sha256=checksum(path)))(directory)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "directory missing": (shutil.rmtree, "no artifact at .*: make one with matkv calibrate"),
    "config missing": (lambda d: (d / "config.json").unlink(), "not a matkv artifact"),
    "config truncated": (truncate("config.json"), r"config\.json is damaged"),
    "config not text": (
        lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"),
        r"config\.json is damaged",
    ),
    "config of another program": (
        lambda d: (d / "config.json").write_text('{"model_type": "llama"}'),
        "another program's",
    ),
    "config a list": (
        lambda d: (d / "config.json").write_text("[]"),
        "another program's",
    ),
    "newer format": (
        edit_config(lambda c: c.update(format_version=3)),
        "format version 3, this matkv reads 1 to 2: upgrade",
    ),
    "format version missing": (
        edit_config(lambda c: c.pop("format_version")),
        "format version None",
    ),
    "geometry missing": (edit_config(lambda c: c.pop("geometry")), "damaged"),
    "geometry of another shape": (
        edit_config(lambda c: c["geometry"]["layers"][1].update(head_dim=16)),
        "damaged",
    ),
    "a layer too many": (
        edit_config(lambda c: c["geometry"]["layers"].append(c["geometry"]["layers"][1])),
        "damaged",
    ),
    "table out of range": (
        edit_config(lambda c: c["tables"]["0.5"]["key"][1].__setitem__(0, 9)),
        "damaged.*rank 9",
    ),
    "table of half a budget": (
        edit_config(lambda c: c["tables"].update(half=c["tables"]["0.5"])),
        "damaged",
    ),
    "tables a list": (edit_config(lambda c: c.update(tables=[])), "damaged"),
    "fingerprint a word": (edit_config(lambda c: c.update(fingerprint="abc")), "damaged"),
    "sink a word": (edit_config(lambda c: c.update(sink="many")), "damaged"),
    "bases missing": (lambda d: (d / "bases.safetensors").unlink(), "is missing"),
    "bases truncated": (truncate("bases.safetensors"), "checksum"),
    "bases with a flipped bit": (flip_a_bit, "checksum"),
    "bases that are no safetensors": (forged_safetensors, r"bases\.safetensors is damaged"),
    "a basis missing": (edit_tensors(lambda t: t.pop("layers.1.key.encode")), "damaged"),
    "a basis of another shape": (
        edit_tensors(lambda t: t.update({"layers.1.key.encode": torch.zeros(2, 4, 4)})),
        r"layers\.1\.key is \(2, 4, 4\)",
    ),
    "a basis in bf16": (
        edit_tensors(lambda t: t.update({"layers.1.key.encode": torch.zeros(2, 8, 8).bfloat16()})),
        "bfloat16",
    ),
    "a basis that is not a number": (
        edit_tensors(lambda t: t["layers.2.value.decode"].fill_(math.nan)),
        "not finite",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(saved: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(saved)
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(saved)


@pytest.mark.parametrize("foreign", ["file", "directory"])
def test_what_is_no_artifact_is_neither_loaded_nor_overwritten(
    tmp_path: Path, foreign: str
) -> None:
    path = tmp_path / "thesis"
    content = path if foreign == "file" else path / "chapter.txt"
    content.parent.mkdir(exist_ok=True)
    content.write_text("years of work")
    with pytest.raises(ArtifactError):
        Artifact.load(path)
    with pytest.raises(ArtifactError, match="choose another directory"):
        make().save(path)
    assert content.read_text() == "years of work"


def test_an_artifact_of_another_model_is_refused() -> None:
    artifact = make()
    artifact.check(GEOMETRY, artifact.fingerprint)
    with pytest.raises(FingerprintError, match="weights differ"):
        artifact.check(GEOMETRY, (0.25, -1.4, 3e-7))
    with pytest.raises(FingerprintError, match="weights differ"):
        artifact.check(GEOMETRY, (0.25, -1.5))
    other = Geometry(query_heads=4, layers=GEOMETRY.layers[1:])
    with pytest.raises(FingerprintError, match=r"3 layers, 2 of them compressed.*this model has 2"):
        artifact.check(other, artifact.fingerprint)


def test_a_model_in_half_precision_keeps_its_fingerprint() -> None:
    weights = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 0.02
    artifact = replace(make(), fingerprint=tuple(weights.tolist()))
    for dtype in (torch.bfloat16, torch.float16):
        artifact.check(GEOMETRY, tuple(weights.to(dtype).float().tolist()))


# ---- saves that fail


def test_a_full_disk_leaves_the_old_artifact(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matkv.artifact.artifact.save_tensors", write_half)
    with pytest.raises(ArtifactError, match=r"No space left on device.*nothing was changed"):
        make(1).save(saved)
    assert_equal(Artifact.load(saved), make())
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_ctrl_c_while_saving_leaves_the_old_artifact(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("matkv.artifact.artifact.checksum", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(1).save(saved)
    monkeypatch.undo()
    assert_equal(Artifact.load(saved), make())
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


# Saves again and again in child processes; the n-th child is killed before its n-th change to the
# file system, so that every moment of a save is tried, between the two renames too.
KILLED_SAVES = """
import os, sys, types
from pathlib import Path

sys.modules["matkv"] = types.ModuleType("matkv")  # the package without transformers: a quick start
sys.modules["matkv"].__path__ = [sys.argv[4]]
from matkv.artifact import Artifact

old, new = Artifact.load(sys.argv[1]), Artifact.load(sys.argv[2])
runs = Path(sys.argv[3])

def kill_before(number):
    changes = iter(range(number))
    def hook(event, arguments):
        is_change = event in ("os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir") or (
            event == "open" and str(arguments[0]).startswith(str(runs)) and arguments[1] != "rb"
        )
        if is_change and next(changes, None) is None:
            os._exit(9)
    sys.addaudithook(hook)

for number in range(1000):
    run = runs / str(number)
    old.save(run)
    (run / "results").mkdir()
    (run / "results" / "eval.json").write_text("{}")
    child = os.fork()
    if child == 0:
        kill_before(number)
        new.save(run)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
"""


def test_a_process_killed_while_saving_leaves_an_artifact_whole(
    saved: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "killed"
    runs.mkdir()
    make(1).save(tmp_path / "new")
    package = Path(matkv.__file__).parent
    arguments = [saved, tmp_path / "new", runs, package]
    subprocess.run([sys.executable, "-c", KILLED_SAVES, *arguments], check=True, timeout=60)
    trials = len([path for path in runs.iterdir() if path.name.isdigit()])
    states = set()
    for number in range(trials):
        run = runs / str(number)
        was_cut_between_renames = not run.exists()
        survivor = Artifact.load(run)
        is_new = (
            survivor.bases[1]["key"].maps.encode_XDD[0, 0, 0]
            == (make(1).bases[1]["key"].maps.encode_XDD[0, 0, 0])
        )
        assert_equal(survivor, make(1) if is_new else make())
        assert (run / "results" / "eval.json").read_text() == "{}"
        states.add("between" if was_cut_between_renames else "new" if is_new else "old")
        make(2).save(run)
        assert_equal(Artifact.load(run), make(2))
        assert (run / "results" / "eval.json").read_text() == "{}"
    assert trials > 6
    assert states == {"old", "between", "new"}


def test_a_save_after_a_kill_between_the_renames_keeps_other_files(saved: Path) -> None:
    (saved / "notes.txt").write_text("kept")
    saved.rename(saved.with_name(".demo.old"))
    make(1).save(saved)
    assert (saved / "notes.txt").read_text() == "kept"


def test_a_calibrated_artifact_comes_back_and_attaches(gemma3: Tiny, tmp_path: Path) -> None:
    loaded = Artifact.load(gemma3.artifact.save(tmp_path / "run"))
    assert_equal(loaded, gemma3.artifact)
    matkv.attach(gemma3.model, loaded, 0.5)
