"""From the host to a device without waiting for it."""

from __future__ import annotations

import torch


def upload(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on ``device``. A copy of pageable memory may wait for what the device is at; one of pinned memory does not."""
    if device.type != "cuda":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)
