"""The training loop: ``train(config, out)``, in one process or in those of torchrun. Killed at any moment, called again, it ends with
the same weights.

NOTE: bit by bit on the CPU with the same number of threads and processes; on CUDA backward passes need not add in a fixed order. Data
order, corruption, negatives and dropout are functions of the step and the row, so nothing but weights, their average and the optimizer
has to be stored, and any number of processes computes the same batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ..eval import Estimate
from ..models import CausalLM, DiT
from . import run
from .configuration import TrainConfig
from .distributed import Shared, World, joined
from .ema import EMA
from .objectives import Objective, objective_for
from .optim import Optimizer
from .record import Record
from .training_text import TrainingText


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
        device: CUDA where there is one, else the CPU; each process of torchrun has its own. progress: a bar on stderr, under ``name``.

    Returns:
        The folder of the trained model (EMA weights), for ``from_pretrained``.

    Raises:
        ValueError: the folder belongs to another configuration or text, or is in use by another run; its model, or every one of
        its checkpoints, is corrupt; bad text; a proposal with another tokenizer. FloatingPointError: the loss or gradient is not
        finite; the last checkpoint stays. OSError: the disk is full; the last checkpoint stays. Interrupted: Ctrl-C, after a
        checkpoint was written; a second Ctrl-C stops at once.

    Every process of torchrun calls this with the same arguments. The first one reads text, writes files and shows progress.
    torch's global generator is seeded, anew in each step: weights and dropout come from it.
    """
    out = Path(out)
    with joined(device) as world, contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(_ctrl_c())
        stack.enter_context(_no_subnormals())
        done = world.first(lambda: _open(out, config, stack))
        if done:
            return out / "model"
        text = TrainingText.open(config, out / "tokens", world, progress=progress)
        networks, source = _networks(config, text, world)
        model = _model(config, text, networks).to(world.device)
        objective = objective_for(config, model, text.tokenizer.mask_token_id, networks.get("proposal"))
        shared = Shared(objective, model.transformer.blocks, world, config.system.parallel)
        ema, optimizer = EMA(model, config.optim.ema_decay), Optimizer(model, config.optim, config.steps)
        micro = _micro_batches(config, world)
        # Only now: a mistake in the text or the sizes does not claim the folder, and can be mended in it.
        world.first(lambda: run.claim(out, config))
        first = run.resume(out, source, model, ema, optimizer, world)
        record = Record(config, out, first, world, objective, text, name=name, progress=progress)

        with record:
            for step in range(first, config.steps):
                model.train()
                totals = torch.zeros(len(objective.names), dtype=torch.float64)
                for i, rows in enumerate(micro):
                    x0 = text.dataset.rows(step, rows.start, rows.stop).to(world.device)
                    torch.manual_seed(_dropout_seed(config.seed, step, rows.start))
                    with shared.gradients_reduced(now=i == len(micro) - 1):
                        terms = shared(objective.terms, objective.rows(x0, rows.start, step), step)
                        # The processes average their gradients; the loss is a mean over the batch of all of them.
                        (terms[0] * (world.size / _count(objective, config))).backward()
                    totals += terms.detach().cpu().double()
                figures, stop = _agree(world, totals, interrupted(), step, config.steps)
                means = _means(objective, figures, config)
                if not math.isfinite(means[objective.names[0]]):
                    raise FloatingPointError(_not_finite("loss", step, out))
                try:
                    rate, norm = optimizer.step(step)
                except FloatingPointError:
                    raise FloatingPointError(_not_finite("gradient", step, out)) from None
                ema.update(step)
                done = step + 1
                record.step(done, means, rate, norm)
                if done % config.valid_every == 0 or done == config.steps:
                    with record.paused(), ema.in_place():
                        model.eval()
                        record.validated(
                            done, _validate(shared, objective, text, world), _samples(shared, objective, config, text)
                        )
                record.write(done)
                if done % config.checkpoint_every == 0 or done == config.steps or stop:
                    with record.paused():
                        run.save(
                            out,
                            done,
                            meta={"source": source, "valid_loss": record.valid_loss(done)},
                            model=model,
                            ema=ema,
                            optimizer=optimizer,
                            keep=config.keep_checkpoints,
                            world=world,
                            sharded=config.system.parallel == "fsdp",
                        )
                if stop:
                    raise Interrupted(f"stopped at step {done} of {config.steps}; the same command goes on from there")
        described = text.tokenizer.description()
        run.export_best(out, model, ema, described, world)
        run.export(out / "model", model, ema.weights, described, world)
    return out / "model"


# --- before the loop --------------------------------------------------------------------------------------------------------------


def _open(out: Path, config: TrainConfig, stack: contextlib.ExitStack) -> bool:
    """See that the folder is this run's and nobody else is in it; whether the run has come to its end."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, got the file {out}; choose another name")
    out.mkdir(parents=True, exist_ok=True)
    stack.enter_context(run.only_one(out))
    run.check_claim(out, config)
    if (out / "model").exists():
        run.finished(out / "model", config.model.kind)
        return True
    return False


def _networks(config: TrainConfig, text: TrainingText, world: World) -> tuple[dict[str, Any], str]:
    """The trained networks that NCE stands on, by their names in [nce]; and what the run is made from, as one string."""
    source = hashlib.sha256(text.fingerprint.encode())
    networks: dict[str, Any] = {}
    if config.nce is not None:
        for key, kind, path in (("proposal", DiT, config.nce.proposal), ("start", CausalLM, config.nce.start)):
            if path is None:
                continue
            network = kind.from_pretrained(path, device=world.device)
            if network.tokenizer_description != text.tokenizer.description():
                raise ValueError(
                    f"nce.{key}: expected a network with the tokenizer of data.tokenizer, {_short(text.tokenizer.description())}, got "
                    f"{_short(network.tokenizer_description)} in {path}; the two must read the same ids"
                )
            networks[key] = network
            for name, tensor in network.state_dict().items():
                source.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return networks, source.hexdigest()


def _short(description: Any) -> str:
    text = json.dumps(description)
    return text if len(text) < 80 else text[:60] + "..."


def _model(config: TrainConfig, text: TrainingText, networks: dict[str, Any]) -> Any:
    """The network to train, the same in every process."""
    torch.manual_seed(config.seed)
    if config.model.kind == "nce_energy":
        model: Any = config.model.build_energy(networks["proposal"])
    elif config.nce is not None:
        model = networks["start"].requires_grad_(True)
        if config.model.dropout is not None:
            model.config = dataclasses.replace(model.config, dropout=config.model.dropout)
            for block in model.transformer.blocks:
                block.dropout = config.model.dropout
    else:
        tokenizer = text.tokenizer
        model = config.model.build(
            vocab_size=tokenizer.vocab_size,
            mask_token_id=tokenizer.mask_token_id,
            bos_token_id=tokenizer.bos_token_id,
            max_length=config.data.length,
        )
    model.transformer.checkpoint_activations = config.system.activation_checkpointing
    if config.system.compile:
        for block in model.transformer.blocks:
            block.compile()
    return model


def _micro_batches(config: TrainConfig, world: World) -> list[range]:
    """The rows of a batch that this process computes, a micro-batch each."""
    size = config.system.micro_batch_size
    if size is None:
        if config.batch_size % world.size:
            raise ValueError(f"batch_size: expected a multiple of the {world.size} processes, got {config.batch_size}")
        size = config.batch_size // world.size
    count = config.batch_size // size
    if count % world.size:
        raise ValueError(
            f"system.micro_batch_size: expected batch_size / micro_batch_size to be a multiple of the {world.size} processes, got "
            f"{config.batch_size} / {size} = {count}"
        )
    mine = range(world.rank * count // world.size, (world.rank + 1) * count // world.size)
    return [range(i * size, (i + 1) * size) for i in mine]


def _dropout_seed(seed: int, step: int, row: int) -> int:
    """Of a micro-batch, whoever computes it; hashed, so that neighbouring seeds share nothing."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{row}".encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def _no_subnormals() -> Iterator[None]:
    """While a run trains, numbers below 1e-38 become 0 on the CPU.

    NOTE: an energy that has learnt gives most pairs a gradient of next to nothing, and CPUs are slow at subnormal numbers: the backward
    pass of such an energy was seen to take six times as long.
    """
    before = bool(torch.tensor(1e-40) * 1 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


# --- in the loop ------------------------------------------------------------------------------------------------------------------


def _count(objective: Objective, config: TrainConfig) -> int:
    return config.batch_size * (config.data.length if objective.per == "token" else 1)


def _means(objective: Objective, figures: torch.Tensor, config: TrainConfig) -> dict[str, float]:
    return dict(zip(objective.names, (figures / _count(objective, config)).tolist(), strict=True))


def _agree(world: World, totals: torch.Tensor, interrupted: bool, step: int, steps: int) -> tuple[torch.Tensor, bool]:
    """Sums over the processes, and whether any of them was told to stop before the last step."""
    both = torch.cat([totals, torch.tensor([float(interrupted)], dtype=torch.float64)])
    both = world.sum(both.to(world.device)).cpu()
    return both[:-1], bool(both[-1] > 0) and step + 1 < steps


def _not_finite(what: str, step: int, out: Path) -> str:
    kept = run.checkpoints(out)
    last = f"the last good checkpoint is {kept[0]}" if kept else "no checkpoint had been written yet"
    return f"step {step}: the {what} is not finite; lower optim.lr, in a new folder, or look for bad data; {last}"


def _validate(shared: Shared, objective: Objective, text: TrainingText, world: World) -> dict[str, Estimate]:
    """The held-out windows, shared among the processes where they can be shared evenly."""
    x0, count = text.held_out.to(world.device), len(text.held_out)
    seeds = objective.valid_seed + torch.arange(count, device=world.device)
    if world.size == 1 or count % world.size:
        return shared.evaluate(objective.validate, x0, seeds)
    mine = slice(world.rank, None, world.size)
    parts = shared.evaluate(objective.validate, x0[mine], seeds[mine])
    return {name: world.pooled(part) for name, part in parts.items()}


def _samples(shared: Shared, objective: Objective, config: TrainConfig, text: TrainingText) -> list[str]:
    spec = config.logging
    if not spec.samples:
        return []
    tokens = shared.evaluate(objective.sample, spec.samples, config.data.length, spec.sample_steps)
    return [text.tokenizer.decode(row) for row in tokens.tolist()]


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
