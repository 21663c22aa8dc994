"""One training step, forward and backward: edlm's losses against plain PyTorch, of the same network with the same weights.

edlm: ``diffusion.nelbo_loss`` (the head and the softmax on masked rows alone) and ``CausalLM.nll`` (no logits are stored). Plain:
all logits [B, L, V] and F.cross_entropy, weighted by the mask. Both compute the same number from the same noise, and that is checked
before anything is timed. The optimizer's step is not part of it: it is the same for both. --memory measures the peak beyond what the
process held before (the weights), in fresh processes: see benchmarks/memory.py for how. python benchmarks/training/step.py --help
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

if not __package__:  # run as a script: the checkout it lies in is the package that it belongs to
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "benchmarks.training"

from edlm.diffusion import MaskedDiffusion, nelbo_loss, schedule
from edlm.models import CausalLM, CausalLMConfig, DiT, DiTConfig

from .. import memory
from ..harness import Variant
from ..session import Session

OPS = ("linear_log_probs", "linear_log_probs_backward", "linear_cross_entropy", "linear_cross_entropy_backward")
LARGEST = LARGEST_CUDA = 1 << 16  # of the session's pool of logits, which is not used here
T_MIN = 1e-3
KINDS = ("DiT", "CausalLM")
EDLM, PLAIN = "edlm", "all logits + F.cross_entropy"


class Sizes(NamedTuple):
    """Of a network and its batch. ``vocab`` counts the mask, which is the last id."""

    name: str
    batch: int
    length: int
    vocab: int
    dim: int = 256
    layers: int = 4
    heads: int = 4

    @property
    def case(self) -> str:
        return f"B = {self.batch}, L = {self.length}, V = {self.vocab} ({self.name})"


GPT2 = Sizes("GPT-2's tokens", 8, 128, 50258)
TEXT8 = Sizes("text8", 8, 256, 28)
SMOKE = Sizes("tiny", 2, 8, 101, dim=16, layers=1, heads=2)

Loss = Callable[[int], torch.Tensor]


def network(kind: str, sizes: Sizes, device: torch.device | str = "cpu") -> nn.Module:
    """With random weights everywhere: layers that start at 0 would make every loss log V."""
    torch.manual_seed(0)
    shape = {"dim": sizes.dim, "num_layers": sizes.layers, "num_heads": sizes.heads, "dropout": 0.0}
    mask = sizes.vocab - 1
    model: nn.Module = (
        DiT(DiTConfig(vocab_size=sizes.vocab, mask_token_id=mask, cond_dim=min(128, sizes.dim), **shape))
        if kind == "DiT"
        else CausalLM(CausalLMConfig(vocab_size=mask, bos_token_id=mask, **shape))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.05)
    return model.to(device)


def losses(kind: str, model: nn.Module, sizes: Sizes) -> dict[str, Loss]:
    """The loss of step i, both ways, in nats per token."""
    device = next(model.parameters()).device
    rows = [torch.randint(sizes.vocab - 1, (sizes.batch, sizes.length), device=device) for _ in range(8)]
    if kind == "CausalLM":
        return {
            EDLM: lambda i: model.nll(rows[i % 8]) / rows[i % 8].numel(),
            PLAIN: lambda i: cross_entropy(model(rows[i % 8]).flatten(0, 1), rows[i % 8].flatten()),
        }
    mask = sizes.vocab - 1
    diffusion = MaskedDiffusion(schedule("log_linear", eps=1e-3), mask)

    def plain(i: int) -> torch.Tensor:
        x0 = rows[i % 8]
        t = diffusion.training_times(len(x0), seed=0, offset=i, t_min=T_MIN, device=x0.device)
        xt = diffusion.q_sample(x0, t, seed=0, offset=i)
        logits = model(xt, t.float())
        logits[..., mask] = -torch.inf
        nats = cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="none").view(x0.shape)
        weight = (xt == mask) * diffusion.schedule.loss_weight(t)[:, None].float()
        return (weight * nats).sum(1).mean() / x0.shape[1]

    def ours(i: int) -> torch.Tensor:
        return nelbo_loss(model, rows[i % 8], diffusion, seed=0, offset=i, t_min=T_MIN).nats.mean() / sizes.length

    return {EDLM: ours, PLAIN: plain}


def check(found: dict[str, Loss], parameters: list[nn.Parameter]) -> None:
    """Two ways to the same loss and the same gradients: anything else would compare the times of different things."""
    with torch.no_grad():
        ours, plain = (float(found[name](3)) for name in (EDLM, PLAIN))
    if not abs(ours - plain) <= 1e-4 * abs(plain):
        raise RuntimeError(f"training step: expected equal losses, got {ours} of edlm and {plain} of plain PyTorch")
    mine, theirs = (torch.autograd.grad(found[name](3), parameters) for name in (EDLM, PLAIN))
    for a, b in zip(mine, theirs, strict=True):
        if not float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-7:
            raise RuntimeError("training step: expected equal gradients of edlm's loss and of plain PyTorch's")


def step_of(loss: Loss, parameters: list[nn.Parameter]) -> Callable[[int], object]:
    return lambda i: torch.autograd.grad(loss(i), parameters)


def timed(session: Session, kind: str, sizes: Sizes) -> None:
    model = network(kind, sizes, session.device)
    parameters, found = list(model.parameters()), losses(kind, model, sizes)
    check(found, parameters)
    size = 3 * sum(p.nbytes for p in parameters)  # weights read once each way, gradients written
    variants = [Variant(name, step_of(loss, parameters), size) for name, loss in found.items()]
    case = f"{kind}, time: {sizes.case}"
    session.measure(
        case, variants, n=sizes.batch * sizes.length, v=sizes.vocab, dtype=torch.float32, budget_s=1 if session.smoke else 40
    )


# --- memory -----------------------------------------------------------------------------------------------------------------------


def peak_memory(session: Session, kind: str, sizes: Sizes) -> None:
    rows = []
    for name in (EDLM, PLAIN):
        row = {"family": session.family, "case": f"{kind}, peak memory: {sizes.case}", "name": name}
        row |= {"n": sizes.batch * sizes.length, "v": sizes.vocab, "k": None, "d": sizes.dim, "dtype": "float32"}
        rows.append(row | {"threads": torch.get_num_threads()} | measure(kind, name, sizes, session.device.type))
    session.add(rows)


def measure(kind: str, name: str, sizes: Sizes, device: str = "cpu") -> dict[str, object]:
    """As ``memory.measure``: ``extra_bytes`` at the peak, ``gradient_bytes`` of them that are results, ``method``."""
    if device == "cuda":
        return _measure_on_gpu(kind, name, sizes)
    arguments = json.dumps([kind, name, sizes, torch.get_num_threads()])
    done = subprocess.run([sys.executable, "-P", __file__, "--one-peak", arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"peak memory of {kind}, {name}: the process that measures it failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _measure(kind: str, name: str, sizes: Sizes, threads: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    model = network(kind, sizes)
    parameters, loss = list(model.parameters()), losses(kind, model, sizes)[name]
    memory._warm_up([torch.randn(64, sizes.dim), model.linear.weight.detach()])
    memory._trim()
    before = memory._status("VmRSS")
    peak, _, method = memory._peak(lambda: step_of(loss, parameters)(0))
    return {"extra_bytes": peak - before, "gradient_bytes": sum(p.nbytes for p in parameters), "method": method}


def _measure_on_gpu(kind: str, name: str, sizes: Sizes) -> dict[str, object]:
    model = network(kind, sizes, "cuda")
    parameters, loss = list(model.parameters()), losses(kind, model, sizes)[name]
    for _ in range(2):  # the library of the products keeps a workspace from its first call on
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step_of(loss, parameters)(0)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    gradients = sum(p.nbytes for p in parameters)
    return {"extra_bytes": peak - before, "gradient_bytes": gradients, "method": "max_memory_allocated, the second call"}


def run(session: Session) -> None:
    for sizes in (SMOKE,) if session.smoke else (GPT2, TEXT8):
        for kind in KINDS:
            timed(session, kind, sizes)
            if session.memory and (session.cuda or memory.measurable()):
                peak_memory(session, kind, sizes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one-peak"]:
        kind, name, sizes, threads = json.loads(sys.argv[2])
        print(json.dumps(_measure(kind, name, Sizes(*sizes), threads)))
        sys.exit(0)
    from ..suite import script

    sys.exit(script("step", __doc__))
