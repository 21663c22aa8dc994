"""Where sequences end: at a length that was asked for, or at the first stop token that is generated."""

from __future__ import annotations

import torch


class Ends:
    """``open`` bool [B] on the CPU says in which sequences there is anything left to decode."""

    def __init__(self, start: torch.Tensor, lengths: torch.Tensor, stop: int | None, mask: int, early: bool) -> None:
        """start int64 [B, L], lengths int64 [B] on the CPU; ``early``: whether sequences may be left before their last step."""
        self.lengths, self.stop, self.mask, self.early = lengths, stop, mask, early
        self.open = torch.ones(len(lengths), dtype=torch.bool)
        self._generated = start == mask

    def look(self, xt: torch.Tensor, ends_block: bool) -> None:
        """After a step. On a GPU only at the end of a block: there this waits for the device."""
        if self.stop is None or not self.early or not (ends_block or xt.device.type == "cpu"):
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
