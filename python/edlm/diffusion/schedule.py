"""Noise schedules: how likely a position is masked at diffusion time t in [0, 1] (0 is data, 1 is noise).

alpha(t) is the probability that a position still shows its token. Everything is float64: near both ends the float32 forms lose
what the loss and the opening times need.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

Time = float | torch.Tensor


def _in_range(name: str, value: Time, high: float) -> torch.Tensor:
    x = torch.as_tensor(value, dtype=torch.float64)
    # Written so that NaN fails as well. On CUDA this waits for the device; the package's own calls do not come through here.
    if not bool(((x >= 0) & (x <= high)).all()):
        bad = x[~((x >= 0) & (x <= high))].flatten()[0].item()
        raise ValueError(f"{name}: expected numbers in [0, {high:g}], got {bad}; diffusion time runs from 0 (data) to 1 (noise)")
    return x


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule(ABC):
    """mask_prob(t) = 1 - alpha(t), rising from 0 at t = 0 to 1 - eps at t = 1.

    Methods take a number or a floating tensor of any shape, and return float64 of that shape on its device. They raise ValueError
    for t outside [0, 1]. A subclass gives the four underscored forms, for float64 tensors that are already checked.

    Args:
        eps: in [0, 1): what is left of the data at t = 1. Train with 1e-3 if you like; evaluate with 0, for with eps > 0 the
            NELBO leaves out the noisiest part of its integral and a perfect denoiser scores below the entropy of its data.
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps: expected a number in [0, 1), got {self.eps}; 1e-3 is usual in training, 0 in evaluation")

    def alpha(self, t: Time) -> torch.Tensor:
        """The probability that a position shows its token at time t."""
        return self._alpha(_in_range("t", t, 1.0))

    def mask_prob(self, t: Time) -> torch.Tensor:
        """1 - alpha(t), accurate to the last bits near t = 0, where 1 - alpha would cancel."""
        return self._mask_prob(_in_range("t", t, 1.0))

    def sigma(self, t: Time) -> torch.Tensor:
        """The total noise -log alpha(t), in nats; inf at t = 1 when eps = 0."""
        x = _in_range("t", t, 1.0)
        p = self._mask_prob(x)
        return torch.where(p < 0.5, -torch.log1p(-p), -torch.log(self._alpha(x)))

    def loss_weight(self, t: Time) -> torch.Tensor:
        """-alpha'(t) / (1 - alpha(t)), the weight of the continuous NELBO, per unit of t; inf at t = 0."""
        return self._loss_weight(_in_range("t", t, 1.0))

    def time_of_mask_prob(self, p: Time) -> torch.Tensor:
        """The t with mask_prob(t) = p, for p in [0, 1 - eps]."""
        return self._time_of_mask_prob(_in_range("p", p, 1.0 - self.eps))

    @abstractmethod
    def _alpha(self, t: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _mask_prob(self, t: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _loss_weight(self, t: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _time_of_mask_prob(self, p: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class LogLinearSchedule(NoiseSchedule):
    """mask_prob(t) = (1 - eps) t; loss_weight(t) = 1 / t. Source: Sahoo et al., arXiv 2406.07524."""

    def _alpha(self, t: torch.Tensor) -> torch.Tensor:
        return self.eps + (1 - self.eps) * (1 - t)

    def _mask_prob(self, t: torch.Tensor) -> torch.Tensor:
        return (1 - self.eps) * t

    def _loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        return 1 / t

    def _time_of_mask_prob(self, p: torch.Tensor) -> torch.Tensor:
        return (p / (1 - self.eps)).clamp_max(1.0)


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(NoiseSchedule):
    """mask_prob(t) = (1 - eps) cos(pi/2 (1 - t)); loss_weight(t) = pi/2 tan(pi/2 (1 - t)). Source: Shi et al., arXiv 2406.04329.

    Each form is written about the end where it is small: cos(pi/2 (1 - t)) as sin(pi/2 t) near 0, 1 minus it as 2 sin^2 near 1.
    """

    def _alpha(self, t: torch.Tensor) -> torch.Tensor:
        late = self.eps + (1 - self.eps) * 2 * torch.sin(math.pi / 4 * (1 - t)).square()
        return torch.where(t < 0.5, 1 - self._mask_prob(t), late)

    def _mask_prob(self, t: torch.Tensor) -> torch.Tensor:
        return (1 - self.eps) * torch.sin(math.pi / 2 * t)

    def _loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        return math.pi / 2 * torch.where(t < 0.5, 1 / torch.tan(math.pi / 2 * t), torch.tan(math.pi / 2 * (1 - t)))

    def _time_of_mask_prob(self, p: torch.Tensor) -> torch.Tensor:
        return (2 / math.pi * torch.asin((p / (1 - self.eps)).clamp_max(1.0))).clamp_max(1.0)


_SCHEDULES: dict[str, type[NoiseSchedule]] = {"log_linear": LogLinearSchedule, "cosine": CosineSchedule}


def schedule(name: str, *, eps: float = 1e-3) -> NoiseSchedule:
    """The schedule of that name: "log_linear" or "cosine". Raises ValueError for any other."""
    if name not in _SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(_SCHEDULES)}, got {name!r}")
    return _SCHEDULES[name](eps=eps)
