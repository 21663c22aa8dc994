"""The training loop of one process: ``train(config, out)``. Killed at any moment, called again, it ends with the same weights.

NOTE: bit by bit on the CPU with the same number of threads; on CUDA backward passes need not add in a fixed order.

A run folder holds ``config.json``, ``metrics.jsonl``, ``tokens/``, ``checkpoints/step_*`` (the last few) and, at the end, ``model``:
the EMA weights as ``from_pretrained`` reads them. Data order and corruption are functions of the step; a checkpoint adds the
weights, their average, the optimizer and torch's generator, which dropout reads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .. import checkpoint
from ..config import to_dict
from ..data import CharTokenizer, WindowDataset, pack, read_text, replace_file, split, windows
from .configuration import TrainConfig
from .ema import EMA
from .logging import Metrics, Progress
from .objectives import objective_for
from .optim import Optimizer

_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
_STEP = re.compile(r"step_(\d+)")


class Interrupted(Exception):
    """Ctrl-C came; the run was saved and can be resumed."""


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    name: str | None = None,
) -> Path:
    """Train to the end, or go on where an earlier call stopped.

    Args:
        config: of the run. out: its folder; one that holds another configuration's run, or something else, is refused.
        device: CUDA where there is one, else the CPU. progress: a bar on stderr, under ``name``.

    Returns:
        The folder of the trained model (EMA weights), for ``from_pretrained``.

    Raises:
        ValueError: the folder belongs to another configuration or text, or is in use by another process; its model, or every one of
        its checkpoints, is corrupt; bad text. FloatingPointError: the loss or gradient is not finite; the last checkpoint stays.
        Interrupted: Ctrl-C, after a checkpoint was written; a second Ctrl-C stops at once.

    torch's global generator is seeded: weights and dropout come from it.
    """
    out = Path(out)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, got the file {out}; choose another name")
    out.mkdir(parents=True, exist_ok=True)
    with _only_one(out), _ctrl_c() as interrupted:
        _check_claim(out, config)
        if (out / "model").exists():
            return _finished(out / "model", config.model.kind)

        tokenizer = {"text8": CharTokenizer}[config.data.tokenizer]()
        text = read_text(config.data.text)
        dataset, held_out = _data(text, tokenizer, out / "tokens", config)
        held_out = held_out.to(device)
        objective = objective_for(config, tokenizer.mask_token_id)

        torch.manual_seed(config.seed)
        model = config.model.build(
            vocab_size=tokenizer.vocab_size, mask_token_id=tokenizer.mask_token_id, bos_token_id=tokenizer.bos_token_id
        ).to(device)
        ema, optimizer = EMA(model, config.optim.ema_decay), Optimizer(model, config.optim, config.steps)
        # Only now: a mistake in the text or the sizes does not claim the folder, and can be mended in it.
        replace_file(out / "config.json", (json.dumps(to_dict(config), indent=1) + "\n").encode())
        source = hashlib.sha256(text.encode()).hexdigest()
        first = _resume(out, source, model, ema, optimizer)
        metrics = Metrics(out / "metrics.jsonl", resume_step=first)
        bar = Progress(name or config.model.kind, first, config.steps, config.batch_size * config.data.length, show=progress)

        model.train()
        with bar:
            for step in range(first, config.steps):
                loss = objective.loss(model, dataset.batch(step).to(device), step)
                nats = float(loss.detach())
                if not math.isfinite(nats):
                    raise FloatingPointError(f"step {step}: the loss is {nats}; lower optim.lr, or look for bad data")
                loss.backward()
                rate, norm = optimizer.step(step)
                ema.update(model, step)
                done = step + 1
                bar.advance(nats)
                line = {}
                if done % config.log_every == 0:
                    line |= {"loss": nats, "lr": rate, "grad_norm": norm, "tokens_per_second": round(bar.tokens_per_second)}
                if done % config.valid_every == 0 or done == config.steps:
                    estimate = objective.validate(ema.model, held_out)
                    bits = estimate.bits_per_character()
                    line |= {"valid_loss": estimate.mean, "valid_bits": bits.mean, "valid_bits_stderr": bits.stderr}
                    bar.validated(f"{bits.mean:.3f}")
                if line:
                    metrics.write(done, **line)
                stop = interrupted() and done < config.steps
                if done % config.checkpoint_every == 0 or done == config.steps or stop:
                    _save(out, done, source, model, ema, optimizer, config.keep_checkpoints)
                if stop:
                    raise Interrupted(f"stopped at step {done} of {config.steps}; the same command goes on from there")
        ema.model.save_pretrained(out / "model", tokenizer=tokenizer.description())
    return out / "model"


# --- the run folder ---------------------------------------------------------------------------------------------------------------


def _check_claim(out: Path, config: TrainConfig) -> None:
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
    changed = _differences(before, plain)
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


def _finished(path: Path, kind: str) -> Path:
    """The model of a run that came to its end: complete and intact, or an error that says what is not."""
    try:
        checkpoint.load(path, kind=kind)
    except ValueError as error:
        raise ValueError(f"{error}; move it away, and the same command writes it again from the last checkpoint") from None
    return path


def _data(text: str, tokenizer: CharTokenizer, folder: Path, config: TrainConfig) -> tuple[WindowDataset, torch.Tensor]:
    """What is trained on, and the windows that are validated on."""
    parts, length = split(text), config.data.length
    try:
        dataset = WindowDataset(pack(parts.train, tokenizer, folder / "train.bin"), length, config.batch_size, seed=config.seed)
        return dataset, windows(pack(parts.valid, tokenizer, folder / "valid.bin"), length, config.valid_windows)
    except ValueError as error:
        raise ValueError(
            f"data.text: {config.data.text}: {error} (90 % of the text are trained on, the next 5 % validated on: "
            f"it takes about {20 * length} characters for data.length = {length})"
        ) from None


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Two processes in one folder would undo each other's work. The lock goes with the process, however it ends."""
    with (out / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out: {out} is in use by another training process; wait for it, or choose another folder") from None
        yield


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C came. The second one is Python's own again: a KeyboardInterrupt."""
    seen = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield seen.is_set
        return

    def handler(number: int, frame: FrameType | None) -> None:
        seen.set()
        signal.signal(signal.SIGINT, previous)
        # Not print: the signal may have come in the middle of another one, and a stream may not be entered twice.
        os.write(2, b"\nCtrl-C: finishing this step and saving; once more stops at once\n")

    previous = signal.signal(signal.SIGINT, handler) or signal.default_int_handler
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def _checkpoints(out: Path) -> list[Path]:
    """Newest first."""
    found = [(int(m[1]), path) for path in (out / "checkpoints").glob("step_*") if (m := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _save(out: Path, step: int, source: str, model: torch.nn.Module, ema: EMA, optimizer: Optimizer, keep: int) -> None:
    generators = {"cpu": torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(device)
    checkpoint.save(
        out / "checkpoints" / f"step_{step:08d}",
        kind="trainer",
        meta={"step": step, "text_sha256": source},
        tensors={
            "model": model.state_dict(),
            "ema": ema.model.state_dict(),
            "optimizer": optimizer.state(),
            "generator": generators,
        },
    )
    for old in _checkpoints(out)[keep:]:
        # It loses its name first, so that a kill leaves no half of it under that name.
        gone = old.with_name(f".{old.name}.{secrets.token_hex(4)}.partial")
        old.rename(gone)
        shutil.rmtree(gone)


def _resume(out: Path, source: str, model: torch.nn.Module, ema: EMA, optimizer: Optimizer) -> int:
    """Load the newest checkpoint that is whole; the number of steps done. One that is not is named and set aside.

    Where there are checkpoints and none is whole, that is an error: no kill does that, and to start again is for the user to say.
    """
    corrupt: list[tuple[Path, ValueError]] = []
    for path in _checkpoints(out):
        try:
            stored = checkpoint.load(path, kind="trainer")
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
        return 0
    if stored.meta["text_sha256"] != source:
        raise ValueError(
            f"data.text: expected the text that {out} was trained on so far, got another under the same name; bring it back, or choose "
            "another folder"
        )
    try:
        model.load_state_dict(stored.tensors["model"])
        ema.model.load_state_dict(stored.tensors["ema"])
        optimizer.load(stored.tensors["optimizer"])
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path}: expected a checkpoint of this configuration's model, got another: {error}") from None
    torch.set_rng_state(stored.tensors["generator"]["cpu"])
    device = next(model.parameters()).device
    if device.type == "cuda" and "cuda" in stored.tensors["generator"]:
        torch.cuda.set_rng_state(stored.tensors["generator"]["cuda"], device)
    for bad, error in corrupt:
        # Out of the way of its successor's name, and of the count of those that are kept.
        aside = bad.with_name(f"corrupt_{bad.name}_{secrets.token_hex(4)}")
        bad.rename(aside)
        print(f"edlm: {error}; going back to step {stored.meta['step']}, and keeping it as {aside.name}", file=sys.stderr)
    return stored.meta["step"]
