"""The training loop of one process: ``train(config, out)``. Killed at any moment, called again, it ends with the same weights.

A run folder holds ``config.json``, ``metrics.jsonl``, ``tokens/``, ``checkpoints/step_*`` (the last few) and, at the end, ``model``:
the EMA weights as ``from_pretrained`` reads them. Data order and corruption are functions of the step; a checkpoint adds the
weights, their average, the optimizer and torch's generator, which dropout reads.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from .. import checkpoint
from ..config import to_dict
from ..data import CharTokenizer, WindowDataset, pack, read_text, split, windows
from .configuration import TrainConfig
from .ema import EMA
from .logging import Metrics, Progress
from .objectives import objective_for
from .optim import Optimizer


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
        config: of the run. out: its folder; one that holds another configuration's run is refused.
        device: CUDA where there is one, else the CPU. progress: a bar on stderr, under ``name``.

    Returns:
        The folder of the trained model (EMA weights), for ``from_pretrained``.

    Raises:
        ValueError: the folder belongs to another configuration, or is in use by another process; bad text. FloatingPointError: the
        loss or gradient is not finite. Interrupted: Ctrl-C, after a checkpoint was written; a second Ctrl-C stops at once.
    """
    out = Path(out)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    out.mkdir(parents=True, exist_ok=True)
    with _only_one(out), _ctrl_c() as interrupted:
        _claim(out, config)
        if (out / "model").exists():
            checkpoint.load(out / "model", kind=config.model.kind)  # complete and intact, or an error that says what is not
            return out / "model"

        tokenizer = CharTokenizer()
        text = split(read_text(config.data.text))
        tokens = {part: pack(getattr(text, part), tokenizer, out / "tokens" / f"{part}.bin") for part in ("train", "valid")}
        dataset = WindowDataset(tokens["train"], config.data.length, config.batch_size, seed=config.seed)
        held_out = windows(tokens["valid"], config.data.length, config.valid_windows).to(device)
        objective = objective_for(config, tokenizer.mask_token_id)

        torch.manual_seed(config.seed)
        model = config.model.build(
            vocab_size=tokenizer.vocab_size, mask_token_id=tokenizer.mask_token_id, bos_token_id=tokenizer.bos_token_id
        ).to(device)
        ema, optimizer = EMA(model, config.optim.ema_decay), Optimizer(model, config.optim, config.steps)
        first = _resume(out, model, ema, optimizer)
        metrics = Metrics(out / "metrics.jsonl", resume_step=first)
        bar = Progress(
            name or config.model.kind, first, config.steps, config.batch_size * config.data.length, show=progress
        )

        model.train()
        for step in range(first, config.steps):
            loss = objective.loss(model, dataset.batch(step).to(device), step)
            loss.backward()
            rate, norm = optimizer.step(step)
            ema.update(model, step)
            done = step + 1
            nats = float(loss.detach())
            bar.advance(nats)
            if done % config.log_every == 0:
                metrics.write(done, loss=nats, lr=rate, grad_norm=norm, tokens_per_second=round(bar.tokens_per_second))
            if done % config.valid_every == 0 or done == config.steps:
                estimate = objective.validate(ema.model, held_out)
                bits = estimate.bits_per_character()
                metrics.write(done, valid_loss=estimate.mean, valid_bits=bits.mean, valid_bits_stderr=bits.stderr)
                bar.validated(f"{bits.mean:.3f}")
            if done % config.checkpoint_every == 0 or done == config.steps or interrupted():
                _save(out, done, model, ema, optimizer, config.keep_checkpoints)
            if interrupted() and done < config.steps:
                bar.close()
                raise Interrupted(f"stopped at step {done} of {config.steps}; the same command goes on from there")
        bar.close()
        ema.model.save_pretrained(out / "model", tokenizer=tokenizer.description())
    return out / "model"


# --- the run folder ---------------------------------------------------------------------------------------------------------------


def _claim(out: Path, config: TrainConfig) -> None:
    """Write the configuration, or see that it is the one that is there."""
    checkpoint.clean(out)
    file, plain = out / "config.json", to_dict(config)
    if file.exists():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{file}: expected the run's configuration, got something unreadable; choose another folder") from None
        changed = sorted(key for key in before.keys() | plain.keys() if before.get(key) != plain.get(key))
        if changed:
            raise ValueError(
                f"out: {out} holds a run of another configuration ({', '.join(changed)} differ); choose another folder, or remove it"
            )
        return
    temporary = out / ".config.json.partial"
    temporary.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Two processes in one folder would undo each other's work. The lock goes with the process, however it ends."""
    with (out / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"out: {out} is in use by another training process; wait for it, or choose another folder") from None
        yield


@contextmanager
def _ctrl_c() -> Iterator[object]:
    """A function that says whether Ctrl-C came. The second one is Python's own again: a KeyboardInterrupt."""
    seen = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield seen.is_set
        return

    def handler(number: int, frame: FrameType | None) -> None:
        seen.set()
        signal.signal(signal.SIGINT, previous)
        print("\nCtrl-C: finishing this step and saving; once more stops at once", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def _checkpoints(out: Path) -> list[Path]:
    """Newest first."""
    return sorted((out / "checkpoints").glob("step_*"), reverse=True)


def _save(out: Path, step: int, model: torch.nn.Module, ema: EMA, optimizer: Optimizer, keep: int) -> None:
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        generators["cuda"] = torch.cuda.get_rng_state()
    checkpoint.save(
        out / "checkpoints" / f"step_{step:08d}",
        kind="trainer",
        meta={"step": step},
        tensors={
            "model": model.state_dict(),
            "ema": ema.model.state_dict(),
            "optimizer": optimizer.state(),
            "generator": generators,
        },
    )
    for old in _checkpoints(out)[keep:]:
        shutil.rmtree(old)


def _resume(out: Path, model: torch.nn.Module, ema: EMA, optimizer: Optimizer) -> int:
    """Load the newest checkpoint that is whole; the number of steps done. One that is not is named, and the one before it used."""
    checkpoint.clean(out / "checkpoints")
    for path in _checkpoints(out):
        try:
            stored = checkpoint.load(path, kind="trainer")
        except ValueError as error:
            print(f"edlm: {error}; going back to the checkpoint before it", file=sys.stderr)
            continue
        model.load_state_dict(stored.tensors["model"])
        ema.model.load_state_dict(stored.tensors["ema"])
        optimizer.load(stored.tensors["optimizer"])
        torch.set_rng_state(stored.tensors["generator"]["cpu"])
        if "cuda" in stored.tensors["generator"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(stored.tensors["generator"]["cuda"])
        return stored.meta["step"]
    return 0
