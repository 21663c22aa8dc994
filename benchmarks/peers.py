"""Other people's kernels, where they are installed: what to call, or in one line why not."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .claims import FLASHINFER
from .harness import first_line

LIGER = "Liger fused linear cross entropy"


def flashinfer() -> dict[str, Callable[[torch.Tensor], object]] | str:
    """Eight draws a row, tokens alone, from fresh logits: it has one draw a call. Both read float32, which is made once."""
    try:
        from flashinfer.sampling import sampling_from_logits, sampling_from_probs
    except Exception as error:  # it compiles and probes at import
        return _why_not(error)

    def from_logits(logits: torch.Tensor) -> list[torch.Tensor]:
        x = logits.float()
        return [sampling_from_logits(x) for _ in range(8)]

    def from_probs(logits: torch.Tensor) -> list[torch.Tensor]:
        p = logits.float().softmax(-1)
        return [sampling_from_probs(p) for _ in range(8)]

    return dict(zip(FLASHINFER, (from_logits, from_probs), strict=True))


def liger() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | str:
    """(hidden, weight, tokens) -> the mean negative log-likelihood."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
    except Exception as error:
        return _why_not(error)
    return lambda hidden, weight, tokens: loss(weight, hidden, tokens)


def _why_not(error: Exception) -> str:
    return "not installed" if isinstance(error, ModuleNotFoundError) else f"failed: {type(error).__name__}: {first_line(error)}"
