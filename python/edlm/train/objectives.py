"""What is minimised, in nats per token, and how the same model is validated."""

from __future__ import annotations

import torch

from ..diffusion import MaskedDiffusion, nelbo_loss, schedule
from ..eval import Estimate, ar_nll, nelbo
from ..models import CausalLM, DiT
from .configuration import TrainConfig


class DiffusionObjective:
    """The continuous-time NELBO with stratified times. Corruption at step n draws with seed + row and offset n."""

    def __init__(self, config: TrainConfig, mask_token_id: int) -> None:
        self.valid_seed = config.seed ^ (1 << 62)  # none of the counters of training
        self.seed, self.t_min, self.schedule = config.seed, config.diffusion.t_min, config.diffusion.schedule
        self.diffusion = MaskedDiffusion(schedule(config.diffusion.schedule, eps=config.diffusion.eps), mask_token_id)

    def loss(self, model: DiT, x0: torch.Tensor, step: int) -> torch.Tensor:
        nats = nelbo_loss(model, x0, self.diffusion, seed=self.seed, offset=step, t_min=self.t_min).nats
        return nats.mean() / x0.shape[1]

    def validate(self, model: DiT, x0: torch.Tensor) -> Estimate:
        """With eps = 0, where it is a bound; the same corruption every time."""
        return nelbo(model, x0, schedule=schedule(self.schedule, eps=0.0), num_times=2, seed=self.valid_seed)


class CausalObjective:
    """The negative log-likelihood of every token, the first one given BOS."""

    def loss(self, model: CausalLM, x0: torch.Tensor, step: int) -> torch.Tensor:
        return -model.log_probs(x0).mean()

    def validate(self, model: CausalLM, x0: torch.Tensor) -> Estimate:
        return ar_nll(model, x0)


def objective_for(config: TrainConfig, mask_token_id: int) -> DiffusionObjective | CausalObjective:
    return DiffusionObjective(config, mask_token_id) if config.model.kind == "dit" else CausalObjective()
