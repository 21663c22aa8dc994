"""What timing on a GPU takes: events behind a held stream, graphs and what their replays draw, and what the GPU is."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence

import edlm.ops
import torch
from edlm.ops import sample_categorical

from .harness import Variant, first_line

# The device spins for so long ahead of a sample, about half a millisecond for each call in it: longer than a host takes to launch it.
HOLD_CYCLES = 1_000_000
_FIELDS = (
    "uuid",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
)


class DeviceTimer:
    """A sample between two events of the current stream.

    The stream is held first. So the host can queue the whole sample before the device begins it, and what lies between the events is
    the device's time, launches of one kernel behind another included, and none of Python's. Whether that came true is part of the
    sample: work that waits for the device is never queued whole, and its time holds the host's.
    """

    def __init__(
        self,
        hold: Callable[[int], object] | None = None,
        event: Callable[[], object] | None = None,
        synchronize: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.hold = hold or torch.cuda._sleep
        event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self.begin, self.end = event(), event()
        self.synchronize, self.clock = synchronize or torch.cuda.synchronize, clock

    def __call__(self, variant: Variant, work: Callable[[], object], calls: int) -> tuple[float, bool | None]:
        if variant.wall:
            self.synchronize()
            begin = self.clock()
            work()
            self.synchronize()
            return 1e3 * (self.clock() - begin), None
        self.hold(HOLD_CYCLES * calls)
        self.begin.record()
        work()
        self.end.record()
        queued = not self.begin.query()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end), queued


def runnable(call: Callable[[int], object]) -> str | None:
    """None where a call runs to its end on the device; otherwise why not, in one line. What broke the device itself is raised."""
    problem = None
    try:
        call(0)
        torch.cuda.synchronize()
    except Exception as error:  # of a library that is not ours, too: whatever it raises
        problem = f"{type(error).__name__}: {first_line(error)}"
    if problem:  # the error is gone, and with it what its frames held
        torch.cuda.synchronize()  # raises where nothing can run any more
        torch.cuda.empty_cache()
    return problem


# --- graphs -----------------------------------------------------------------------------------------------------------------------


def captured(calls: Sequence[Callable[[], object]]) -> tuple[Callable[[], object], list[object]]:
    """A graph of these calls: a function that replays it, and what the calls gave, which every replay writes again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch asks: what is made at the first call is made outside of the capture
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = [call() for call in calls]
    return graph.replay, given


def replayed(name: str, calls: Sequence[Callable[[], object]], size: int, k: int | None = None) -> Variant:
    """The calls as one graph. Its result is the time of one of them."""
    with edlm.ops.deferred_checks():  # their reports hold something from the first replay on
        replay, _ = captured(calls)
        replay()
        torch.cuda.synchronize()
    return Variant(name, lambda i: replay(), size, k, ops=len(calls))


def graph_check(
    device: torch.device, n: int = 64, v: int = 50258, k: int = 8, capture: Callable | None = None
) -> dict[str, object]:
    """sample_categorical under a graph whose offset lies on the device: replayed at two offsets, beside eager calls at the same.

    value: the share of equal draws, or 0 where the second replay repeats the first.
    """
    logits = torch.randn(n, v, generator=torch.Generator().manual_seed(0)).to(device)
    seeds, positions = torch.arange(n, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    offset = torch.zeros(1, dtype=torch.int64, device=device)

    def draw() -> torch.Tensor:
        return sample_categorical(logits, k, position=positions, seed=seeds, offset=offset).tokens

    eager, drawn = [], []
    for step in (5, 6):
        offset.fill_(step)
        eager.append(draw().clone())
    with edlm.ops.deferred_checks():
        replay, (tokens,) = (capture or captured)([draw])
        for step in (5, 6):
            offset.fill_(step)
            replay()
            drawn.append(tokens.clone())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    equal = float((torch.stack(drawn) == torch.stack(eager)).double().mean())
    fresh = float((drawn[0] != drawn[1]).double().mean())
    value = equal if fresh > 0.5 else 0.0
    return {"value": value, "detail": f"{equal:.6f} of the draws are equal, {fresh:.3f} differ between two offsets"}


# --- what the GPU is --------------------------------------------------------------------------------------------------------------


def smi(uuid: str | None = None) -> dict[str, str]:
    """Driver, clocks (MHz), power limit (W) and temperature of one GPU as nvidia-smi reads them; empty without it."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_smi(done.stdout, uuid)


def parse_smi(text: str, uuid: str | None) -> dict[str, str]:
    """The line of that GPU, or else the first one."""
    lines = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.count(",") == len(_FIELDS) - 1]
    if not lines:
        return {}
    line = next((line for line in lines if uuid is not None and line[0].removeprefix("GPU-") == uuid), lines[0])
    return dict(zip(_FIELDS[1:], line[1:], strict=True))


def describe_gpu(device: torch.device) -> dict[str, object]:
    p = torch.cuda.get_device_properties(device)
    read = smi(str(getattr(p, "uuid", "")) or None)
    return {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": p.L2_cache_size,
        "driver": read.pop("driver_version", None),
        "cuda": torch.version.cuda,
        "clocks": read,
        "float32_matmul": torch.get_float32_matmul_precision(),
    }
