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


@dataclass(frozen=True, kw_only=True)
class _NoiseForm(NoiseSchedule):
    """A schedule given by sigma(t), which rises from 0 to -log eps: alpha = exp(-sigma), loss_weight = sigma' alpha / mask_prob.

    The noise at t = 1 is finite, so eps > 0 is required. A subclass gives sigma, what is left of it up to t = 1, slope and inverse.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps == 0:
            raise ValueError(
                "eps: expected a number in (0, 1) for a schedule whose noise at t = 1 is -log eps, got 0; 1e-3 is usual. To evaluate, "
                "take evaluation_schedule(name)"
            )

    @property
    def total_noise(self) -> float:
        """sigma(1) = -log eps, in nats."""
        return -math.log(self.eps)

    def _alpha(self, t: torch.Tensor) -> torch.Tensor:
        # At t = 1 the rounding of a log and an exp would leave something other than eps.
        return torch.where(t == 1, self.eps, torch.exp(-self._sigma(t)))

    def _mask_prob(self, t: torch.Tensor) -> torch.Tensor:
        return torch.where(t == 1, 1 - self.eps, -torch.expm1(-self._sigma(t)).clamp_min(self.eps - 1))

    def _loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        # Not sigma' / expm1(sigma), which overflows where eps is tiny.
        return self._sigma_slope(t) * self._alpha(t) / self._mask_prob(t)

    def _time_of_mask_prob(self, p: torch.Tensor) -> torch.Tensor:
        return torch.where(p >= 1 - self.eps, 1.0, self._time_of_sigma(-torch.log1p(-p)).clamp_max(1.0))

    def _alpha_above_eps(self, t: torch.Tensor) -> torch.Tensor:
        """alpha(t) - eps, without cancellation near t = 1."""
        return self.eps * torch.expm1(self._sigma_left(t))

    @abstractmethod
    def _sigma(self, t: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _sigma_left(self, t: torch.Tensor) -> torch.Tensor:
        """sigma(1) - sigma(t)."""

    @abstractmethod
    def _sigma_slope(self, t: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _time_of_sigma(self, sigma: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(_NoiseForm):
    """sigma(t) = -t log eps, a constant rate of noise: alpha(t) = eps^t. eps > 0. Source: Sahoo et al., arXiv 2406.07524 (appendix)."""

    def _sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self.total_noise * t

    def _sigma_left(self, t: torch.Tensor) -> torch.Tensor:
        return self.total_noise * (1 - t)

    def _sigma_slope(self, t: torch.Tensor) -> torch.Tensor:
        return torch.full_like(t, self.total_noise)

    def _time_of_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma / self.total_noise


@dataclass(frozen=True, kw_only=True)
class GeometricSchedule(_NoiseForm):
    """sigma(t) = sigma_min^(1 - t) sigma_max^t - sigma_min, with sigma_max = sigma_min - log eps. eps > 0.

    The published form has no "- sigma_min" and starts at mask_prob(0) = 1 - exp(-sigma_min) > 0. Here it is moved down to start at
    0, as every schedule of this package does: with mask_prob(0) = 0 the state at t = 0 is the data, and the NELBO is an integral over
    all mask probabilities up to 1 - eps, which needs no reconstruction term. sigma changes by sigma_min nats at most.

    Args:
        sigma_min: > 0. The smaller, the longer the time that is spent at little noise.

    Source: Lou et al., arXiv 2310.16834 (SEDD).
    """

    sigma_min: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma_min < math.inf:
            raise ValueError(f"sigma_min: expected a number > 0, got {self.sigma_min}; 1e-4 is usual")

    @property
    def log_ratio(self) -> float:
        """log(sigma_max / sigma_min)."""
        return math.log1p(self.total_noise / self.sigma_min)

    def _sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self.sigma_min * torch.expm1(self.log_ratio * t)

    def _sigma_left(self, t: torch.Tensor) -> torch.Tensor:
        return -(self.sigma_min + self.total_noise) * torch.expm1(-self.log_ratio * (1 - t))

    def _sigma_slope(self, t: torch.Tensor) -> torch.Tensor:
        return self.sigma_min * self.log_ratio * torch.exp(self.log_ratio * t)

    def _time_of_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        return torch.log1p(sigma / self.sigma_min) / self.log_ratio


@dataclass(frozen=True, kw_only=True)
class _Complete(NoiseSchedule):
    """mask_prob(t) / (1 - eps) of a schedule with eps > 0: it reaches 1 at t = 1, and its loss_weight is the same."""

    inner: _NoiseForm
    eps: float = 0.0

    def _alpha(self, t: torch.Tensor) -> torch.Tensor:
        early = 1 - self._mask_prob(t)
        return torch.where(early > 0.5, early, self.inner._alpha_above_eps(t) / (1 - self.inner.eps))

    def _mask_prob(self, t: torch.Tensor) -> torch.Tensor:
        return (self.inner._mask_prob(t) / (1 - self.inner.eps)).clamp_max(1.0)

    def _loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        return self.inner._loss_weight(t)

    def _time_of_mask_prob(self, p: torch.Tensor) -> torch.Tensor:
        return self.inner._time_of_mask_prob(p * (1 - self.inner.eps))


_SCHEDULES: dict[str, type[NoiseSchedule]] = {
    "log_linear": LogLinearSchedule,
    "cosine": CosineSchedule,
    "linear": LinearSchedule,
    "geometric": GeometricSchedule,
}


def schedule(name: str, *, eps: float = 1e-3) -> NoiseSchedule:
    """The schedule of that name: "log_linear", "cosine", "linear" or "geometric" (these two need eps > 0). ValueError for any other."""
    if name not in _SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(_SCHEDULES)}, got {name!r}")
    return _SCHEDULES[name](eps=eps)


def evaluation_schedule(name: str, *, eps: float = 1e-3) -> NoiseSchedule:
    """The schedule of that name with alpha(1) = 0, under which the NELBO leaves nothing out and is a bound.

    It is mask_prob(t) / (1 - eps), mask_prob being that of ``schedule(name, eps=eps)``, for every name. "log_linear" and "cosine"
    become ``schedule(name, eps=0.0)``, whatever eps is. "linear" and "geometric" have no form with eps = 0, for their noise ends at
    -log eps; this one has, and a network that is conditioned on t meets each mask probability p at the t of (1 - eps) p in training.
    The continuous NELBO of a network that does not read t is the same under all of them.

    Args:
        eps: that of the training, in (0, 1); of no effect for "log_linear" and "cosine".
    """
    if issubclass(_SCHEDULES.get(name, NoiseSchedule), _NoiseForm):
        return _Complete(inner=schedule(name, eps=eps))
    return schedule(name, eps=0.0)
