"""Where sequences end: at a length that was asked for, or at the first stop token that is generated."""

from __future__ import annotations

from typing import Literal

import torch


class Ends:
    """``open`` bool [B] on the CPU says in which sequences there is anything left to decode."""

    def __init__(
        self, start: torch.Tensor, lengths: torch.Tensor, stop: int | None, mask: int, when: Literal["step", "block", "never"]
    ) -> None:
        """start int64 [B, L], lengths int64 [B] on the CPU; ``when`` to look for stop tokens: after each step or block."""
        self.lengths, self.stop, self.mask, self.when = lengths, stop, mask, when
        self.open = torch.ones(len(lengths), dtype=torch.bool)
        self._generated = start == mask

    def look(self, xt: torch.Tensor, ends_block: bool) -> None:
        """After a step: whoever has generated a stop token, with nothing masked before it, is done."""
        if self.stop is None or self.when == "never" or (self.when == "block" and not ends_block):
            return
        stopped = self._stops(xt) & (xt != self.mask).cumprod(1).bool()  # and all before it is open
        self.open &= ~stopped.any(1).cpu()

    def cut(self, xt: torch.Tensor, pad: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens with padding behind each end, int64 [B, L], and the lengths on the CPU, int64 [B]."""
        lengths = self.lengths
        if self.stop is not None:
            stops = self._stops(xt).cpu()
            lengths = torch.where(stops.any(1), torch.minimum(stops.long().argmax(1) + 1, lengths), lengths)
        behind = torch.arange(xt.shape[1]) >= lengths[:, None]
        if bool(behind.any()):
            xt = xt.masked_fill(behind.to(xt.device), self.stop if pad is None else pad)
        return xt, lengths

    def _stops(self, xt: torch.Tensor) -> torch.Tensor:
        inside = torch.arange(xt.shape[1], device=xt.device) < self.lengths.to(xt.device)[:, None]
        return (xt == self.stop) & self._generated.to(xt.device) & inside
