"""What a decode asks of its networks: recorded, counted, and asked again. The floor of every loop around them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from edlm.protocols import Denoiser, EnergyModel
from torch import nn


class Recorder:
    """A denoiser in two halves whose every call is kept, and ``energy``, whose calls are kept too. Arguments are copied: a loop may
    write its buffers again."""

    def __init__(self, denoiser: Denoiser, energy: EnergyModel) -> None:
        self.denoiser, self.energy = denoiser, _RecordedEnergy(self, energy)
        self.mask_token_id, self.vocab_size = denoiser.mask_token_id, denoiser.vocab_size
        self.calls: list[tuple[str, Callable[[], torch.Tensor]]] = []

    def record(self, name: str, function: Callable, *arguments: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        kept = [tensor.clone() for tensor in arguments], {key: tensor.clone() for key, tensor in more.items()}
        self.calls.append((name, partial(function, *kept[0], **kept[1])))
        return function(*arguments, **more)

    def hidden(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.record("hidden", self.denoiser.hidden, xt, t)

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        return self.record("head", self.denoiser.head, rows)

    def __call__(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(xt, t))

    def count(self, name: str) -> int:
        return sum(called == name for called, _ in self.calls)

    @property
    def nfe(self) -> int:
        return self.count("hidden")

    @property
    def energy_nfe(self) -> int:
        return self.count("energy")

    @torch.no_grad()
    def replay(self) -> None:
        for _, call in self.calls:
            call()

    def bytes(self, denoiser: nn.Module, scorer: nn.Module) -> int:
        """Of the weights that these calls read, each call once."""
        head = sum(p.nbytes for p in denoiser.output_layer.parameters())
        rest = sum(p.nbytes for p in denoiser.parameters()) - head - denoiser.vocab_embed.weight.nbytes
        scoring = sum(p.nbytes for p in scorer.parameters()) - scorer.vocab_embed.weight.nbytes
        return self.count("hidden") * rest + self.count("head") * head + self.count("energy") * scoring


class _RecordedEnergy:
    """Offers what the energy offers beyond the call: ``score`` and ``vocab_size``, where they are there."""

    def __init__(self, recorder: Recorder, energy: EnergyModel) -> None:
        self.recorder, self.energy = recorder, energy
        if hasattr(energy, "vocab_size"):
            self.vocab_size = energy.vocab_size
        if hasattr(energy, "score"):
            self.score = partial(recorder.record, "energy", energy.score)

    def __call__(self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        return self.recorder.record("energy", self.energy, x0, xt, t, log_p)
