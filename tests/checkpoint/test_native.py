"""Checkpoints: what comes back, and what is refused, on reading and on writing."""

from __future__ import annotations

import os
import resource
import shutil

import pytest
import torch
from edlm import checkpoint
from edlm.checkpoint import clean, kind_of, load, native, save
from tiny_checkpoint import META, alone, same, snapshot, tensors


@pytest.fixture
def path(tmp_path):
    save(tmp_path / "deep" / "model", kind="dit", meta=META, tensors=tensors())
    return tmp_path / "deep" / "model"


# --- what comes back --------------------------------------------------------------------------------------------------------------


def test_round_trip(path):
    stored = load(path)
    assert (stored.kind, stored.meta) == ("dit", META)
    assert same(stored.tensors, tensors())
    assert kind_of(path) == "dit"
    assert alone(path)
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "model.safetensors", "optimizer.state.safetensors"]


def test_shared_and_strided_tensors(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    group = {
        "whole": base,
        "again": base,
        "transposed": base.t(),
        "column": base[:, 1],
        "expanded": torch.tensor([5.0]).expand(3, 2),
        "parameter": torch.nn.Parameter(base[1:]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4, dtype=torch.int64),
        "flags": torch.tensor([True, False]),
        "bytes": torch.tensor([1, 255], dtype=torch.uint8),
    }
    save(tmp_path / "c", kind="x", meta={}, tensors={"group": group, "nothing": {}})
    assert same(load(tmp_path / "c").tensors, {"group": {n: t.detach() for n, t in group.items()}, "nothing": {}})


def test_replacing(path):
    save(path, kind="trainer", meta={"step": 4}, tensors={"other": {"z": torch.zeros(1)}})
    stored = load(path, kind="trainer")
    assert stored.meta == {"step": 4}
    assert same(stored.tensors, {"other": {"z": torch.zeros(1)}})
    assert alone(path)
    assert len(list(path.iterdir())) == 2


def test_whoever_may_read_the_folder_may_read_its_files(tmp_path):
    before = os.umask(0o027)
    try:
        save(tmp_path / "c", kind="x", meta={}, tensors=tensors())
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "c").iterdir()} == {"0o640"}


def test_what_was_loaded_outlives_its_file(path):
    before = load(path)
    save(path, kind="dit", meta={}, tensors=tensors(2.0))
    shutil.rmtree(path)
    assert same(before.tensors, tensors())


def test_a_link_is_written_through(path):
    link = path.parent / "latest"
    link.symlink_to(path.name)
    save(link, kind="dit", meta={}, tensors=tensors(2.0))
    assert link.is_symlink()
    assert same(load(link).tensors, tensors(2.0)) and same(load(path).tensors, tensors(2.0))


def test_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save(".", kind="dit", meta={}, tensors=tensors())
    assert same(load(tmp_path / "here").tensors, tensors())


# --- what is refused on reading ---------------------------------------------------------------------------------------------------


def test_other_kind(path):
    with pytest.raises(ValueError, match=r"model: expected a checkpoint of kind 'causal_lm', got 'dit'"):
        load(path, kind="causal_lm")


def test_nothing_there(tmp_path):
    for name in ("absent", "absent/deeper"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such checkpoint"):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        kind_of(tmp_path / "absent")


def test_empty_folder_plain_file_foreign_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected a checkpoint folder, got one without manifest.json"):
        load(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file: expected a checkpoint folder, got a file"):
        load(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load(tmp_path / "file" / "below")
    for body in ("", "[]", "{}", '{"manifest": 3, "sha256": ""}', '{"manifest": "\\ud800", "sha256": ""}', "\xff", "null"):
        (tmp_path / "empty" / "manifest.json").write_text(body, encoding="latin-1")
        with pytest.raises(ValueError, match=r"empty: corrupt checkpoint: manifest.json cannot be read"):
            load(tmp_path / "empty")


def test_newer_format(path, monkeypatch):
    monkeypatch.setattr(native, "FORMAT", 2)
    save(path, kind="dit", meta={}, tensors={})
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"model: expected checkpoint format 1, got 2; .*upgrade"):
        load(path)


@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.state.safetensors", "manifest.json"])
def test_truncated(path, name, keep):
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    what = "manifest.json cannot be read" if name == "manifest.json" else rf"{name}: expected {len(data)} bytes, got \d+$"
    with pytest.raises(ValueError, match=f"model: corrupt checkpoint: {what}"):
        load(path)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_missing_file(path, name):
    (path / name).unlink()
    with pytest.raises(ValueError, match=rf"model: (corrupt checkpoint: {name} is missing|expected .* without {name})"):
        load(path)


def test_every_flipped_byte_of_the_tensors_is_seen(path):
    file = path / "model.safetensors"
    data = file.read_bytes()
    for i in range(len(data)):
        file.write_bytes(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :])
        with pytest.raises(ValueError, match=r"corrupt checkpoint: model.safetensors does not match its checksum"):
            load(path)
    file.write_bytes(data)
    assert same(load(path).tensors, tensors())


def test_every_flipped_byte_of_the_manifest_is_seen(path):
    """One that JSON does not care about (a space that becomes another) may pass: then the content is what was stored."""
    file = path / "manifest.json"
    data = file.read_bytes()
    refused = 0
    for i in range(len(data)):
        file.write_bytes(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :])
        try:
            stored = load(path)
        except ValueError as error:
            refused += "corrupt checkpoint: manifest.json" in str(error)
        else:
            assert (stored.kind, stored.meta) == ("dit", META) and same(stored.tensors, tensors())
    assert refused > len(data) - 5


def test_reading_changes_nothing_on_disk(path):
    """Not even a partial folder beside it, which another process may be writing this very moment."""
    other = path.parent / ".other.0123abcd.partial"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"half")
    before = snapshot(path.parent)
    load(path)
    kind_of(path)
    with pytest.raises(FileNotFoundError):
        load(path.parent / "other")
    assert snapshot(path.parent) == before


# --- what is refused on writing ---------------------------------------------------------------------------------------------------


def foreign_folders(tmp_path, path):
    def folder(name, **files):
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file.replace("__", ".")).write_text(text)
        return tmp_path / name

    yield folder("documents", notes__txt="mine")
    yield folder("weights", model__safetensors="somebody's")  # no manifest
    yield folder("extension", manifest__json='{"name": "a browser extension"}')  # another program's
    yield folder("mixed", manifest__json='{"sha256": "', notes__txt="mine")
    with_notes = tmp_path / "with_notes"
    shutil.copytree(path, with_notes)
    (with_notes / "README.md").write_text("what I found out about this model")
    yield with_notes
    with_folder = tmp_path / "with_folder"
    shutil.copytree(path, with_folder)
    (with_folder / "samples.safetensors").mkdir()
    yield with_folder
    (tmp_path / "file").write_text("x")
    yield tmp_path / "file"


def test_what_is_not_a_checkpoint_is_never_replaced(tmp_path, path):
    for place in foreign_folders(tmp_path, path):
        before = snapshot(tmp_path)
        with pytest.raises(
            ValueError, match=r"path: expected a new name or a checkpoint folder to replace, got .*choose another"
        ):
            save(place, kind="dit", meta={}, tensors=tensors())
        assert snapshot(tmp_path) == before


def test_what_stands_where_the_old_one_steps_aside_is_kept(path):
    mine = path.parent / ".model.previous"
    mine.mkdir()
    (mine / "diary.txt").write_text("dear diary")
    before = snapshot(path.parent)
    with pytest.raises(ValueError, match=r"path: .*model needs the name \.model\.previous"):
        save(path, kind="dit", meta={}, tensors=tensors(2.0))
    clean(path.parent)
    assert snapshot(path.parent) == before


def test_an_empty_folder_and_a_corrupt_checkpoint_are_replaced(tmp_path, path):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", kind="dit", meta={}, tensors=tensors(2.0))
    assert same(load(tmp_path / "empty").tensors, tensors(2.0))
    data = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(data[: len(data) // 2])
    (path / "model.safetensors").unlink()
    save(path, kind="dit", meta={}, tensors=tensors(2.0))
    assert same(load(path).tensors, tensors(2.0)) and alone(path)


@pytest.mark.parametrize("meta", [{"x": {1, 2}}, {"x": float("nan")}, {"x": torch.zeros(1)}, {(1, 2): 3}])
def test_meta_that_is_not_json(path, meta):
    before = snapshot(path.parent)
    with pytest.raises(ValueError, match="meta: expected plain JSON values"):
        save(path, kind="dit", meta=meta, tensors=tensors(2.0))
    assert snapshot(path.parent) == before


@pytest.mark.parametrize("stem", ["", "../outside", "a/b", ".hidden", ".."])
def test_stems_are_names(path, stem):
    before = snapshot(path.parent.parent)
    with pytest.raises(ValueError, match="tensors: expected file stems"):
        save(path, kind="dit", meta={}, tensors={"model": {}, stem: {"a": torch.zeros(1)}})
    assert snapshot(path.parent.parent) == before


def test_a_full_disk_loses_nothing(path):
    """A limit on file sizes stands for it: the second file does not fit."""
    before = snapshot(path.parent)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match=r"large\.safetensors: "):
            save(path, kind="dit", meta={}, tensors={"model": {}, "large": {"x": torch.zeros(1 << 19)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot(path.parent) == before


def test_public_names():
    assert set(checkpoint.__all__) == {
        "Checkpoint",
        "clean",
        "kind_of",
        "load",
        "load_sharded",
        "meta_of",
        "save",
        "save_sharded",
        "verify",
    }
