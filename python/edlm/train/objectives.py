"""What is minimised, and how the same model is validated: one class a method, each a loss module over its model.

A row of the global batch has its own seed and time, whichever process and micro-batch it falls into: sums over rows do not depend on
how they are shared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..diffusion import MaskedDiffusion, evaluation_schedule, nce_batch, nce_loss, nelbo_loss, schedule
from ..eval import Estimate, ar_nll, nelbo
from ..models import CausalLM, DiT, NCEEnergy, ar_residual
from ..samplers import generate, sample_autoregressive
from .configuration import TrainConfig
from .throughput import flops_per_token


class Rows(NamedTuple):
    """Rows ``first .. first + B - 1`` of the batch of a step."""

    x0: torch.Tensor  # int64 [B, L]
    seeds: torch.Tensor  # int64 [B]
    times: torch.Tensor  # float64 [B]


class Objective(nn.Module, ABC):
    """``terms(rows, step) -> [1 + k]``: sums over rows, the loss in front (differentiable) and ``figures`` behind it.

    ``per``: what the loss is a mean over, "token" or "row". Calling the module calls a function where the model's parameters are whole
    and the precision is the run's.
    """

    names: tuple[str, ...] = ("loss",)
    per = "token"

    def __init__(self, config: TrainConfig, model: nn.Module, mask_token_id: int) -> None:
        super().__init__()
        self.config, self.model, self.mask_token_id = config, model, mask_token_id
        self.valid_seed = config.seed ^ (1 << 62)  # none of the counters of training
        self.diffusion = MaskedDiffusion(schedule(config.diffusion.schedule, eps=config.diffusion.eps), mask_token_id)
        self.autocast = config.system.precision == "bfloat16"

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            return function(*arguments)

    def rows(self, x0: torch.Tensor, first: int, step: int) -> Rows:
        """Seeds and times of rows of the batch of a step; times are stratified over the whole batch."""
        spec, last = self.config, first + len(x0)
        times = self.diffusion.training_times(
            spec.batch_size, seed=spec.seed, offset=step, t_min=spec.diffusion.t_min, device=x0.device
        )
        return Rows(x0, spec.seed + torch.arange(first, last, device=x0.device), times[first:last])

    @abstractmethod
    def terms(self, rows: Rows, step: int) -> torch.Tensor: ...

    @abstractmethod
    def validate(self, x0: torch.Tensor, seeds: torch.Tensor) -> dict[str, Estimate]:
        """Estimates of held-out rows under fixed draws, the one to minimise first."""

    def flops_per_token(self, length: int) -> float:
        """Of forward and backward, for one token of the text: ``throughput.flops_per_token``."""
        return self._flops(self.model, length, 1.0)

    def _flops(self, network: Any, length: int, head_share: float) -> float:
        sizes = network.config
        return flops_per_token(
            dim=sizes.dim, num_layers=sizes.num_layers, length=length, vocab_size=sizes.vocab_size, head_share=head_share
        )

    @abstractmethod
    def sample(self, count: int, length: int, steps: int) -> torch.Tensor:
        """Tokens [count, L] from the model as it is."""


class DiffusionObjective(Objective):
    """The continuous-time NELBO. Corruption at step n draws with seed + row and offset n."""

    model: DiT

    def terms(self, rows: Rows, step: int) -> torch.Tensor:
        loss = nelbo_loss(self.model, rows.x0, self.diffusion, seed=rows.seeds, offset=step, times=rows.times)
        return torch.stack([loss.nats.sum()])

    def validate(self, x0: torch.Tensor, seeds: torch.Tensor) -> dict[str, Estimate]:
        """With a schedule under which it is a bound."""
        at = evaluation_schedule(self.config.diffusion.schedule, eps=self.config.diffusion.eps or 1e-3)
        return {"loss": nelbo(self.model, x0, schedule=at, num_times=2, seed=seeds)}

    def flops_per_token(self, length: int) -> float:
        return self._flops(self.model, length, 0.5)  # the head runs where tokens are masked: on half of them

    def sample(self, count: int, length: int, steps: int) -> torch.Tensor:
        device = next(self.model.parameters()).device
        return generate(self.model, batch_size=count, length=length, steps=steps, seed=self.config.seed, device=device).tokens


class CausalObjective(Objective):
    """The negative log-likelihood of every token, the first one given BOS."""

    model: CausalLM

    def terms(self, rows: Rows, step: int) -> torch.Tensor:
        return torch.stack([self.model.nll(rows.x0)])

    def validate(self, x0: torch.Tensor, seeds: torch.Tensor) -> dict[str, Estimate]:
        return {"loss": ar_nll(self.model, x0)}

    def sample(self, count: int, length: int, steps: int) -> torch.Tensor:
        return sample_autoregressive(self.model, batch_size=count, length=length, seed=self.config.seed).tokens


class NceObjective(Objective):
    """Noise contrastive estimation of an energy against a frozen proposal (EDLM-NCE), or of a causal model's residual energy."""

    names = ("nce_loss", "accuracy", "energy_gap")
    per = "row"

    def __init__(self, config: TrainConfig, model: nn.Module, proposal: DiT) -> None:
        super().__init__(config, model, proposal.mask_token_id)
        # In a tuple: it is neither trained, nor copied to other processes, nor sharded.
        self.frozen = (proposal.eval().requires_grad_(False),)
        assert config.nce is not None
        self.nce = config.nce

    def _energy(self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        if isinstance(self.model, NCEEnergy):
            return self.model(x0, xt, t, log_p)
        return ar_residual(self.model, x0, xt, log_p, carry_over=self.nce.carry_over, mask_token_id=self.mask_token_id)

    def _per_row(self, rows: Rows, step: int) -> torch.Tensor:
        """[3, B]: loss, accuracy, gap."""
        batch = nce_batch(
            self.frozen[0],
            rows.x0,
            self.diffusion,
            num_negatives=self.nce.num_negatives,
            seed=rows.seeds,
            offset=step,
            times=rows.times,
        )
        energy = self._energy(batch.candidates, batch.xt, batch.t, batch.log_p)
        loss = nce_loss(energy[:, 0], energy[:, 1:])
        return torch.stack([loss.nats, loss.accuracy, loss.energy_gap])

    def terms(self, rows: Rows, step: int) -> torch.Tensor:
        return self._per_row(rows, step).sum(1)

    def validate(self, x0: torch.Tensor, seeds: torch.Tensor) -> dict[str, Estimate]:
        # One time for each window, whichever process has it: evenly spread by its number among the seeds.
        index = (seeds - self.valid_seed).double()
        times = 1 - (index * 0.6180339887498949) % 1 * (1 - self.config.diffusion.t_min)
        values = [self._per_row(Rows(x, s, t), 0) for x, s, t in zip(x0.split(32), seeds.split(32), times.split(32), strict=True)]
        units = ("nats/row", "share", "nats")
        table = torch.cat(values, 1).cpu()
        return {name: Estimate.of(row, unit) for name, row, unit in zip(self.names, table, units, strict=True)}

    def flops_per_token(self, length: int) -> float:
        # The energy of 1 + n candidates, and a forward pass (a third of both) of the proposal.
        candidates = (1 + self.nce.num_negatives) * self._flops(
            self.model, length, 0.0 if isinstance(self.model, NCEEnergy) else 1.0
        )
        return candidates + self._flops(self.frozen[0], length, 0.5) / 3

    def sample(self, count: int, length: int, steps: int) -> torch.Tensor:
        device = next(self.model.parameters()).device
        return generate(
            self.frozen[0],
            batch_size=count,
            length=length,
            steps=steps,
            energy=self._energy,
            window=(0.0, 1.0),
            seed=self.config.seed,
            device=device,
        ).tokens


def objective_for(config: TrainConfig, model: nn.Module, mask_token_id: int, proposal: DiT | None) -> Objective:
    if proposal is not None:
        return NceObjective(config, model, proposal)
    return (DiffusionObjective if config.model.kind == "dit" else CausalObjective)(config, model, mask_token_id)
