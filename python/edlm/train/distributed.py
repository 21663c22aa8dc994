"""The processes that train one model: torchrun starts them, ``joined`` gives each its place, ``Shared`` holds the model among them."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from ..eval import Estimate

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's ``rank`` among ``size``, and the device that is its own."""

    rank: int
    size: int
    device: torch.device

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over processes, the same on all of them. In place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def pooled(self, part: Estimate) -> Estimate:
        """The estimate over the sequences of all processes, of which each has a part."""
        var = 0.0 if part.count < 2 else part.stderr**2 * part.count * (part.count - 1)
        sums = torch.tensor([part.count, part.count * part.mean, var + part.count * part.mean**2], dtype=torch.float64)
        count, total, squares = self.sum(sums.to(self.device)).tolist()
        mean = total / count
        var = max(0.0, squares - count * mean**2) / max(1.0, count - 1)
        return Estimate(mean=mean, stderr=math.sqrt(var / count) if count > 1 else math.nan, count=int(count), unit=part.unit)

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in the first process, which alone does it. An error there is raised in all: nobody waits in vain."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        mine: Exception | None = None
        if self.rank == 0:
            try:
                outcome[0] = work()
            except Exception as error:
                mine, outcome[1] = error, _portable(error)
        dist.broadcast_object_list(outcome, src=0)
        if mine is not None:
            raise mine
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def _portable(error: Exception) -> Exception:
    """The error, or what can be said of it where it does not survive the way to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextlib.contextmanager
def joined(device: torch.device | str | None) -> Iterator[World]:
    """The world that torchrun started (or that the caller has initialised), or that of this process alone.

    ``device``: None takes CUDA where there is one; of several GPUs a process of torchrun takes its own. gloo on CPUs, NCCL on GPUs.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not dist.is_available() or not (dist.is_initialized() or dist.is_torchelastic_launched()):
        yield World(0, 1, device)
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", dist.get_node_local_rank(fallback_rank=0))
        torch.cuda.set_device(device)
    mine = not dist.is_initialized()
    if mine:
        _meet("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if mine:
            dist.destroy_process_group()


def _meet(backend: str) -> None:
    """As ``init_process_group(backend)`` under torchrun, in a corner of its store that no earlier attempt has used.

    NOTE: after a restart the store still holds what the dead processes wrote. Whoever reads an old address before it is overwritten
    waits for a port where nobody listens, until a timeout of half an hour: seen with torch 2.13 and gloo.
    """
    store, rank, size = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's way to tell
    dist.init_process_group(backend, store=dist.PrefixStore(f"edlm/{attempt}/{size}", store), rank=rank, world_size=size)


class Shared:
    """A loss module and its model among the processes: as it is, copied (DDP) or sharded (FSDP2).

    Everything that touches the model goes through a call, ``shared(function, *arguments)``: there the parameters are whole, whatever
    holds them between calls.
    """

    def __init__(self, module: nn.Module, blocks: nn.ModuleList, world: World, parallel: str) -> None:
        self.module = module
        if parallel == "fsdp":
            if not dist.is_initialized():
                raise ValueError(
                    "system.parallel: expected processes of torchrun with 'fsdp', got one by itself; start it as "
                    "torchrun --nproc-per-node N -m edlm train ..., or take 'ddp'"
                )
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(world.device.type, (world.size,))
            for block in blocks:
                fully_shard(block, mesh=mesh)
            # A root that kept its whole parameters after a forward pass would not see the weights change: EMA.in_place.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
            self.wrapped: nn.Module = module
        elif world.size > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
        else:
            self.wrapped = module
        self.parallel = parallel

    def __call__(self, function: Callable[..., T], *arguments: Any) -> T:
        return self.wrapped(function, *arguments)

    def evaluate(self, function: Callable[..., T], *arguments: Any) -> T:
        """The same without gradients and without DDP, which would expect a backward pass."""
        with torch.no_grad():
            return self.module(function, *arguments)

    @contextlib.contextmanager
    def gradients_reduced(self, now: bool) -> Iterator[None]:
        """A forward and backward pass whose gradients the processes average ``now``, or add up each for itself until then."""
        if self.parallel == "fsdp":
            self.wrapped.set_requires_gradient_sync(now)
            yield
        elif isinstance(self.wrapped, nn.parallel.DistributedDataParallel) and not now:
            with self.wrapped.no_sync():
                yield
        else:
            yield


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded. Every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(target: torch.Tensor, value: torch.Tensor) -> None:
    """``target`` becomes ``value``, which is whole, each process keeping its part."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)
