"""What a run of many batches took, without keeping them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..samplers import SampleOutput


@dataclass
class Tally:
    network: str = "denoiser"  # what is called
    nfe: int = 0
    energy_nfe: int = 0
    ess: float = 0.0
    used: int = 0
    seconds: Counter[str] = field(default_factory=Counter)

    def add(self, sample: SampleOutput) -> None:
        ess = sample.ess[~sample.ess.isnan()].double()
        self.nfe += sample.nfe
        self.energy_nfe += sample.energy_nfe
        self.ess += float(ess.sum())
        self.used += ess.numel()
        self.seconds.update(sample.stage_seconds)

    def __str__(self) -> str:
        ess = f", ESS {self.ess / self.used:.2f} on average" if self.used else ""
        seconds = ", ".join(f"{name} {value:.2f} s" for name, value in self.seconds.items() if value > 0)
        return f"# {self.nfe} {self.network} calls, {self.energy_nfe} energy calls{ess}; {seconds}"
