"""A reverse step captured once as a CUDA graph and replayed: one launch in place of hundreds. It has never run on a GPU yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from ..ops import Reports
from .choose import Choice
from .move import Move, Names
from .reverse import Reverse


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Move
    outputs: tuple[torch.Tensor, Choice | None]
    reports: list[tuple[str, torch.Tensor, Callable[[int], str]]]  # of the ops, in the graph's own memory
    wrong: list[torch.Tensor]  # of the energies, likewise
    calls: int  # of the energy in one replay


class Replayed:
    """As the ``Reverse`` that it wraps, by replaying a graph for each shape, with and without the energy.

    The networks must be capturable: no shape, and nothing on the host, may depend on values on the device. What comes is
    overwritten by the next replay. ``reports``: those of the ``deferred_checks`` around, which get a copy from each replay.
    """

    def __init__(self, reverse: Reverse, reports: Reports) -> None:
        self.reverse, self.reports = reverse, reports
        self._captured: dict[tuple[torch.Size, bool], _Captured] = {}
        self._pool: object = None  # one for all: what a replay returns is used before the next one

    def __call__(self, move: Move, names: Names, energy: bool) -> tuple[torch.Tensor, Choice | None]:
        key = (move.xt.shape, energy)
        with torch.cuda.device(move.xt.device):
            if key not in self._captured:
                self._captured[key] = self._capture(move, names, energy)
            captured = self._captured[key]
            for name in (f.name for f in fields(Move)):
                getattr(captured.inputs, name).copy_(getattr(move, name))
            captured.graph.replay()
        for name, invalid, describe in captured.reports:
            self.reports.add(name, invalid.clone(), describe)
        if self.reverse.scorer is not None:
            self.reverse.scorer.nfe += captured.calls
            self.reverse.scorer.unread += [(names, wrong.clone()) for wrong in captured.wrong]
        return captured.outputs

    def _capture(self, move: Move, names: Names, energy: bool) -> _Captured:
        inputs = replace(move, **{f.name: getattr(move, f.name).clone() for f in fields(Move)})
        scorer, made = self.reverse.scorer, len(self.reports)
        nfe, unread = (scorer.nfe, len(scorer.unread)) if scorer else (0, 0)

        def forget() -> None:
            """What a run that is no step has reported and counted."""
            self.reports.take(made)
            if scorer:
                scorer.nfe = nfe
                del scorer.unread[unread:]

        # Kernels and libraries load at their first call, which must not be the captured one; and buffers are allocated there.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.reverse(inputs, names, energy)
        torch.cuda.current_stream().wait_stream(side)
        forget()
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            outputs = self.reverse(inputs, names, energy)
        reports = self.reports.take(made)
        wrong, calls = ([flags for _, flags in scorer.unread[unread:]], scorer.nfe - nfe) if scorer else ([], 0)
        forget()
        return _Captured(graph, inputs, outputs, reports, wrong, calls)
