"""The five stages of a step, for profilers and for the clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class Stages:
    """Profiler ranges (record_function, NVTX) of the stages, and the host's time in each."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(("denoise", "propose", "energy", "select", "reverse"), 0.0)
        self.cuda = device.type == "cuda"

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        nvtx = torch.cuda.nvtx.range(name) if self.cuda else contextlib.nullcontext()
        with torch.profiler.record_function(name), nvtx:
            yield
        self.seconds[name] += time.perf_counter() - start
