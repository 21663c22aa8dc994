"""A reverse step captured once as a CUDA graph and replayed: one launch in place of hundreds. It has never run on a GPU yet."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from .choose import Choice
from .reverse import Move, Names, Reverse


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Move
    outputs: tuple[torch.Tensor, Choice | None]
    wrong: list[torch.Tensor]  # of the energies, in the graph's own memory
    calls: int  # of the energy in one replay


class Replayed:
    """As the ``Reverse`` that it wraps, by replaying a graph for each shape, with and without the energy.

    The networks must be capturable: no shape, and nothing on the host, may depend on values on the device. What comes is
    overwritten by the next replay.
    """

    def __init__(self, reverse: Reverse) -> None:
        self.reverse = reverse
        self._captured: dict[tuple[torch.Size, bool], _Captured] = {}

    def __call__(self, move: Move, names: Names, energy: bool) -> tuple[torch.Tensor, Choice | None]:
        key = (move.xt.shape, energy)
        if key not in self._captured:
            self._captured[key] = self._capture(move, names, energy)
        captured, scorer = self._captured[key], self.reverse.scorer
        for name in (f.name for f in fields(Move)):
            getattr(captured.inputs, name).copy_(getattr(move, name))
        captured.graph.replay()
        if scorer is not None:
            scorer.nfe += captured.calls
            scorer.unread += [(names.where, names.rows, wrong.clone()) for wrong in captured.wrong]
        return captured.outputs

    def _capture(self, move: Move, names: Names, energy: bool) -> _Captured:
        inputs = replace(move, **{f.name: getattr(move, f.name).clone() for f in fields(Move)})
        scorer = self.reverse.scorer
        # Kernels and libraries load at their first call, which must not be the captured one; and buffers are allocated there.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        nfe, unread = (scorer.nfe, len(scorer.unread)) if scorer else (0, 0)
        with torch.cuda.stream(side):
            for _ in range(2):
                self.reverse(inputs, names, energy)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        before = scorer.nfe if scorer else 0
        warm = len(scorer.unread) if scorer else 0
        with torch.cuda.graph(graph):
            outputs = self.reverse(inputs, names, energy)
        wrong, calls = [], 0
        if scorer:
            wrong, calls = [flags for _, _, flags in scorer.unread[warm:]], scorer.nfe - before
            del scorer.unread[unread:]
            scorer.nfe = nfe
        return _Captured(graph, inputs, outputs, wrong, calls)
