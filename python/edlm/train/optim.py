"""AdamW with warm-up and decay, its state as named tensors."""

from __future__ import annotations

import math

import torch
from torch import nn

from .configuration import OptimSpec
from .distributed import whole


def learning_rate(spec: OptimSpec, step: int, steps: int) -> float:
    """The rate at step 0 .. steps - 1: linear from lr / warmup to lr, then the decay down to final_lr_ratio * lr at the last step."""
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / spec.warmup_steps
    if spec.decay == "constant":
        return spec.lr
    span = max(1, steps - 1 - spec.warmup_steps)
    share = min(1.0, (step - spec.warmup_steps) / span)
    left = 0.5 * (1 + math.cos(math.pi * share)) if spec.decay == "cosine" else 1 - share
    return spec.lr * (spec.final_lr_ratio + (1 - spec.final_lr_ratio) * left)


class Optimizer:
    """AdamW over a model's named parameters. Weight decay falls on matrices, embeddings included, not on norms and biases."""

    def __init__(self, model: nn.Module, spec: OptimSpec, steps: int) -> None:
        self.spec, self.steps = spec, steps
        self.named = dict(model.named_parameters())
        groups = [
            {"params": [p for p in self.named.values() if p.dim() >= 2], "weight_decay": spec.weight_decay},
            {"params": [p for p in self.named.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas)
        # As AdamW makes them at its first step: there from the beginning, a checkpoint is read into them, sharded or not.
        for parameter in self.named.values():
            self.adamw.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, step: int) -> tuple[float, float]:
        """Clip, set the rate, move. Returns the learning rate and the gradient's norm before clipping."""
        norm = float(whole(nn.utils.clip_grad_norm_(self.named.values(), self.spec.grad_clip)))
        rate = learning_rate(self.spec, step, self.steps)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        # A gradient that is not finite would poison the moments for good.
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {step}: the gradient is not finite; lower optim.lr, or look for bad data")
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return rate, norm

    def state(self) -> dict[str, torch.Tensor]:
        """name/key -> tensor: the moments and the step count of every parameter."""
        return {
            f"{name}/{key}": value for name, parameter in self.named.items() for key, value in self.adamw.state[parameter].items()
        }
