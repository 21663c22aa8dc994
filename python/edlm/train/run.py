"""A run's folder: whose it is, and its checkpoints. Killed at any moment, it is put right by the next process that opens it.

It holds ``config.json``, ``metrics.jsonl``, ``tokens/``, ``checkpoints/step_*`` (the last few, and the best) and, at the end,
``model``: the EMA weights as ``from_pretrained`` reads them, and ``best``: those of the best validation, where that was earlier.
"""

from __future__ import annotations

import fcntl
import json
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..config import to_dict
from ..data import replace_file
from .configuration import TrainConfig
from .distributed import World, assign, whole
from .ema import EMA
from .optim import Optimizer

_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
_STEP = re.compile(r"step_(\d+)")
# What may differ when a run goes on: it says how to compute and what to show, and no number of the run depends on it but by rounding.
_FREE = (
    "system.parallel",
    "system.activation_checkpointing",
    "logging",
    "log_every",
    "keep_checkpoints",
    "data.workers",
)


def claim(out: Path, config: TrainConfig) -> None:
    """Write the folder's configuration: from now on it is this run's."""
    replace_file(out / "config.json", (json.dumps(to_dict(config), indent=1) + "\n").encode())


def check_claim(out: Path, config: TrainConfig) -> None:
    """See that the folder is this configuration's, or free; then clear away what a kill left behind."""
    file, plain = out / "config.json", to_dict(config)
    if not file.exists():
        foreign = [name for name in ("model", "checkpoints", "metrics.jsonl") if (out / name).exists()]
        if foreign:
            raise ValueError(
                f"out: {out} holds {', '.join(foreign)} without a config.json: not a run of edlm; choose another folder"
            )
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise ValueError(f"{file}: expected the run's configuration, got something unreadable; choose another folder")
    changed = [key for key in _differences(before, plain) if not key.startswith(_FREE)]
    if changed:
        raise ValueError(
            f"out: {out} holds a run of another configuration ({', '.join(changed)} differ); choose another folder, or remove it"
        )
    checkpoint.clean(out)
    checkpoint.clean(out / "checkpoints")
    for partial in [*out.glob(".*.partial"), *(out / "tokens").glob(".*.partial")]:
        if partial.is_file() and _PARTIAL.fullmatch(partial.name):
            partial.unlink()


def _differences(before: dict[str, Any], after: dict[str, Any], where: str = "") -> list[str]:
    """The keys whose values differ, nested ones as a.b."""
    changed = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _differences(old, new, f"{where}{key}.")
        elif old != new:
            changed.append(where + key)
    return changed


def finished(path: Path, kind: str) -> Path:
    """The model of a run that came to its end: complete and intact, or an error that says what is not."""
    try:
        checkpoint.load(path, kind=kind)
    except ValueError as error:
        raise ValueError(f"{error}; move it away, and the same command writes it again from the last checkpoint") from None
    return path


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Two processes in one folder would undo each other's work. The lock goes with the process, however it ends."""
    with (out / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out: {out} is in use by another training process; wait for it, or choose another folder") from None
        yield


def checkpoints(out: Path) -> list[Path]:
    """Newest first."""
    found = [(int(m[1]), path) for path in (out / "checkpoints").glob("step_*") if (m := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _best(paths: list[Path]) -> Path | None:
    """The checkpoint with the lowest validation, the newest of equal ones."""
    found = []
    for path in paths:
        try:
            found.append((checkpoint.meta_of(path).get("valid_loss"), path))
        except (ValueError, OSError):
            continue  # damaged: resuming says so
    scored = [(loss, path) for loss, path in found if loss is not None]
    return min(scored, key=lambda pair: pair[0])[1] if scored else None


def save(
    out: Path,
    step: int,
    *,
    meta: dict[str, Any],
    model: torch.nn.Module,
    ema: EMA,
    optimizer: Optimizer,
    keep: int,
    world: World,
    sharded: bool,
) -> None:
    """Write ``checkpoints/step_*``, each process its part of a sharded model; remove all but the last ``keep`` and the best."""
    path, meta = out / "checkpoints" / f"step_{step:08d}", {"step": step, **meta}
    tensors = {"model": model.state_dict(), "ema": ema.weights, "optimizer": optimizer.state()}
    if sharded:
        checkpoint.save_sharded(path, kind="trainer_sharded", meta=meta, tensors=tensors)
    else:
        world.first(lambda: checkpoint.save(path, kind="trainer", meta=meta, tensors=tensors))

    def prune() -> None:
        paths = checkpoints(out)
        for old in paths[keep:]:
            if old != _best(paths):
                # It loses its name first, so that a kill leaves no half of it under that name.
                gone = old.with_name(f".{old.name}.{secrets.token_hex(4)}.partial")
                old.rename(gone)
                shutil.rmtree(gone)

    world.first(prune)


def resume(out: Path, source: str, model: torch.nn.Module, ema: EMA, optimizer: Optimizer, world: World) -> int:
    """Load the newest checkpoint that is whole; the number of steps done. One that is not is named and set aside.

    It may have been written by any number of processes, sharded or not. Where there are checkpoints and none is whole, that is an
    error: no kill does that, and to start again is for the user to say.
    """
    found = world.first(lambda: _newest(out, source))
    if found is None:
        return 0
    folder, kind, meta = found
    tensors = {"model": model.state_dict(), "ema": ema.weights, "optimizer": optimizer.state()}
    try:
        if kind == "trainer_sharded":
            checkpoint.load_sharded(folder, tensors)
        else:
            stored = checkpoint.load(folder, kind=kind).tensors
            for stem, group in tensors.items():
                if group.keys() != stored[stem].keys():
                    raise ValueError(f"the tensors of {stem}: {min(group.keys() ^ stored[stem].keys())}")
                for name, tensor in group.items():
                    assign(tensor, stored[stem][name])
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{folder}: expected a checkpoint of this configuration's model, got another: {error}") from None
    return meta["step"]


def _newest(out: Path, source: str) -> tuple[Path, str, dict[str, Any]] | None:
    """Folder, kind and meta of the newest whole checkpoint, or None where there is none."""
    corrupt: list[tuple[Path, ValueError]] = []
    for path in checkpoints(out):
        try:
            kind = checkpoint.kind_of(path)
            if not kind.startswith("trainer"):
                raise ValueError(f"{path}: expected a checkpoint of kind 'trainer', got {kind!r}")
            folder, meta = checkpoint.verify(path)
        except ValueError as error:
            corrupt.append((path, error))
            continue
        break
    else:
        if corrupt:
            raise ValueError(
                f"out: expected a whole checkpoint in {out / 'checkpoints'}, got {len(corrupt)} corrupt ones ({corrupt[0][1]}); "
                "move that folder away to train from the beginning"
            )
        return None
    if meta["source"] != source:
        raise ValueError(
            f"data, nce: expected the text, tokenizer and networks that {out} was trained on so far, got others under the same name; "
            "bring them back, or choose another folder"
        )
    for bad, error in corrupt:
        # Out of the way of its successor's name, and of the count of those that are kept.
        aside = bad.with_name(f"corrupt_{bad.name}_{secrets.token_hex(4)}")
        bad.rename(aside)
        print(f"edlm: {error}; going back to step {meta['step']}, and keeping it as {aside.name}", file=sys.stderr)
    return folder, kind, meta


def export(path: Path, model: Any, weights: dict[str, torch.Tensor], tokenizer: dict[str, Any] | None, world: World) -> None:
    """Write ``weights``, sharded or not, as a folder for ``from_pretrained``."""
    full = {name: whole(weight).cpu() for name, weight in weights.items()}
    world.first(lambda: model.save_pretrained(path, tokenizer=tokenizer, weights=full))


def export_best(out: Path, model: Any, ema: EMA, tokenizer: dict[str, Any] | None, world: World) -> None:
    """``best``, from the checkpoint with the best validation, unless that is the newest."""

    def find() -> tuple[Path, str] | None:
        paths = checkpoints(out)
        best = _best(paths)
        if best is None or best == paths[0]:
            return None
        try:
            return checkpoint.verify(best)[0], checkpoint.kind_of(best)
        except ValueError as error:
            print(f"edlm: {error}; no {out / 'best'} is written", file=sys.stderr)
            return None

    found = world.first(find)
    if found is None:
        return
    weights = {name: weight.clone() for name, weight in ema.weights.items()}
    if found[1] == "trainer_sharded":
        checkpoint.load_sharded(found[0], {"ema": weights})
    else:
        for name, value in checkpoint.load(found[0]).tensors["ema"].items():
            assign(weights[name], value)
    export(out / "best", model, weights, tokenizer, world)
