"""Checkpoints of sharded tensors: each process writes its parts, through torch.distributed.checkpoint, into one folder of ``native``.

The folder has the same manifest and checksums, and appears as a whole. It can be read by any number of processes, sharded otherwise or
not at all. NOTE: torch's index of the parts, ``.metadata``, is a pickle; it is opened after its checksum was verified, which guards
against damage and not against malice. Models are exported as safetensors.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .native import writing

State = Mapping[str, Mapping[str, torch.Tensor]]


def save_sharded(path: str | Path, *, kind: str, meta: Mapping[str, Any], tensors: State) -> None:
    """Write a checkpoint; every process of the default group calls this with its parts (DTensors) of the same tensors.

    Raises: as ``save``; where one process fails to write, all of them raise.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    many = dist.is_available() and dist.is_initialized()
    first = not many or dist.get_rank() == 0
    stack = contextlib.ExitStack()

    def together(work: Callable[[], object]) -> str:
        """What ``work`` gives in the first process, to all; its error too: nobody waits for one that has failed."""
        outcome: list[Any] = [None, None]
        if first:
            try:
                outcome[0] = str(work())
            except (OSError, ValueError) as error:
                outcome[1] = error
        if many:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    folder = together(lambda: stack.enter_context(writing(path, kind=kind, meta=meta)))
    with stack:
        try:
            dcp.save({stem: dict(group) for stem, group in tensors.items()}, checkpoint_id=folder, no_dist=not many)
        except dcp.api.CheckpointException as error:
            raise OSError(f"{path}: not saved: {'; '.join(str(e[0]) for e in error.failures.values())}") from error
        sealing = stack.pop_all()
    together(sealing.close)  # nobody goes on, to remove an old one perhaps, before this one has its name


def load_sharded(folder: Path, tensors: State) -> None:
    """Fill ``tensors``, sharded or not, from a folder that ``verify`` gave; every process of the default group calls this.

    Raises:
        ValueError: names or shapes that the folder does not hold.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    alone = not (dist.is_available() and dist.is_initialized())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a load without a process group, which is what is meant
            dcp.load({stem: dict(group) for stem, group in tensors.items()}, checkpoint_id=folder, no_dist=alone)
    except dcp.api.CheckpointException as error:
        raise ValueError(f"{folder}: expected other tensors: {'; '.join(str(e[0]) for e in error.failures.values())}") from None
