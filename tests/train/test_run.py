"""A run's folder: which checkpoints stay, what is exported, and a disk that is full."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from edlm import checkpoint
from edlm.eval import Estimate
from edlm.models import DiT
from edlm.train import objectives, run, train
from tiny_run import assert_same_weights, tiny_config, weights, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def steps_of(out):
    return sorted(int(p.name.removeprefix("step_")) for p in (out / "checkpoints").glob("step_*"))


def validations(monkeypatch, losses):
    """What each validation says, in turn."""
    left = iter(losses)
    monkeypatch.setattr(
        objectives.DiffusionObjective,
        "validate",
        lambda self, x0, seeds: {"loss": Estimate(mean=next(left), stderr=0.1, count=8)},
    )


CHANGES = {"steps": 12, "checkpoint_every": 2, "valid_every": 2, "keep_checkpoints": 2}


def test_the_last_ones_and_the_best_stay(tmp_path, text, monkeypatch):
    validations(monkeypatch, [3.0, 1.0, 2.0, 2.0, 1.5, 1.2])
    config = tiny_config("dit", text, **CHANGES)
    model = train(config, tmp_path / "run", progress=False)
    assert steps_of(tmp_path / "run") == [4, 10, 12]
    best = checkpoint.load(tmp_path / "run" / "checkpoints" / "step_00000004")
    assert best.meta["valid_loss"] == 1.0
    exported = weights(tmp_path / "run" / "best")
    assert all(torch.equal(exported[name], weight) for name, weight in best.tensors["ema"].items())
    assert any(not torch.equal(exported[name], weight) for name, weight in weights(model).items())
    DiT.from_pretrained(tmp_path / "run" / "best")


def test_a_damaged_best_one_does_not_keep_the_model_back(tmp_path, text, monkeypatch, capsys):
    validations(monkeypatch, [3.0, 1.0, 2.0, 2.0, 1.5, 1.2])
    config = tiny_config("dit", text, **CHANGES)
    train(config, tmp_path / "run", progress=False)
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "best")
    file = tmp_path / "run" / "checkpoints" / "step_00000004" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert train(config, tmp_path / "run", progress=False).exists()
    assert not (tmp_path / "run" / "best").exists()
    assert "step_00000004: corrupt checkpoint: ema.safetensors" in capsys.readouterr().err


def test_a_validation_that_is_not_finite_is_no_best_one(tmp_path, text, monkeypatch):
    validations(monkeypatch, [3.0, float("nan"), float("inf"), 2.0, 2.5, 2.6])
    train(tiny_config("dit", text, **CHANGES), tmp_path / "run", progress=False)
    assert steps_of(tmp_path / "run") == [8, 10, 12]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[3]["valid_loss"] is None and rows[7]["valid_loss"] == 2.0


def test_where_the_last_is_the_best_there_is_one_model(tmp_path, text, monkeypatch):
    validations(monkeypatch, [3.0, 2.0, 2.0, 1.5, 1.2, 1.2])
    train(tiny_config("dit", text, **CHANGES), tmp_path / "run", progress=False)
    assert steps_of(tmp_path / "run") == [10, 12] and not (tmp_path / "run" / "best").exists()


def test_checkpoints_without_a_validation_are_no_candidates(tmp_path, text):
    train(tiny_config("dit", text, **CHANGES | {"valid_every": 5}), tmp_path / "run", progress=False)
    metas = {
        step: checkpoint.meta_of(tmp_path / "run" / "checkpoints" / f"step_{step:08d}") for step in steps_of(tmp_path / "run")
    }
    assert set(metas) == {10, 12} and all(meta["valid_loss"] is not None for meta in metas.values())


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("step_99999999", "step_100000000", "step_00000007", "corrupt_step_00000009_ab", "step_x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    found = [p.name for p in run.checkpoints(tmp_path)]
    assert found == ["step_100000000", "step_99999999", "step_00000007"]


@pytest.mark.parametrize("where", ["file", "manifest"])
def test_a_full_disk_while_saving(tmp_path, text, monkeypatch, where):
    """The error is the disk's own; what was there stays, nothing half-written does, and the run goes on where it was."""
    config = tiny_config("dit", text, **CHANGES)
    real, calls = checkpoint.native.save_file, []

    def full(tensors, file):
        calls.append(file)
        if len(calls) == 8:  # of the third checkpoint, after the first file
            real(tensors, file)
            file.write_bytes(file.read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return real(tensors, file)

    with monkeypatch.context() as patch:
        if where == "file":
            patch.setattr(checkpoint.native, "save_file", full)
        else:
            flush, flushed = checkpoint.native._flush, []

            def last(path):
                flushed.append(path)
                if "step_00000006" in str(path) and path.name == "manifest.json":
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))
                flush(path)

            patch.setattr(checkpoint.native, "_flush", last)
        with pytest.raises(OSError, match="No space left on device"):
            train(config, tmp_path / "run", progress=False)
    assert steps_of(tmp_path / "run") == [2, 4]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    whole = train(config, tmp_path / "whole", progress=False)
    assert_same_weights(train(config, tmp_path / "run", progress=False), whole)


def test_how_to_compute_and_what_to_show_may_change_when_a_run_goes_on(tmp_path, text):
    out = tmp_path / "run"
    model = train(tiny_config("dit", text, **CHANGES), out, progress=False)
    kept = weights(model)
    shutil.rmtree(model)
    free = {"log_every": 3, "keep_checkpoints": 1, "system": {"activation_checkpointing": True}, "logging": {"samples": 1}}
    train(tiny_config("dit", text, **CHANGES | free), out, progress=False)
    assert all(torch.equal(kept[name], weight) for name, weight in weights(model).items())
    assert json.loads((out / "config.json").read_text())["keep_checkpoints"] == 1  # the file says what was asked last
    with pytest.raises(ValueError, match=r"another configuration \(system\.compile differ\)"):  # its dropout is another
        train(tiny_config("dit", text, **CHANGES, system={"compile": True}), out, progress=False)
    with pytest.raises(ValueError, match=r"another configuration \(system\.precision differ\)"):
        train(tiny_config("dit", text, **CHANGES, system={"precision": "bfloat16"}), out, progress=False)
