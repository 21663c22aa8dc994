"""Devices and models as they are named on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .printing import short

if TYPE_CHECKING:
    import torch

    from ..models import ARResidualEnergy, CausalLM, DiT, NCEEnergy


def device_named(name: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("edlm has kernels for these two")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's own: no such name; no CUDA in this torch, or no such GPU
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--device: expected cpu, or cuda or cuda:N where there is such a GPU, got {name!r} ({reason})"
        ) from None
    return device


def model_folder(path: str) -> str:
    """As given, unless it is the run around a model."""
    inner = Path(path) / "model"
    if inner.is_dir() and not (Path(path) / "manifest.json").exists():
        raise ValueError(f"{path}: expected a model's folder, got that of its run; name {inner}")
    return path


def load_any(path: str, device: torch.device) -> DiT | CausalLM:
    from .. import checkpoint
    from ..models import CausalLM, DiT

    kinds = {"dit": DiT, "causal_lm": CausalLM}
    kind = checkpoint.kind_of(model_folder(path))
    if kind not in kinds:
        raise ValueError(
            f"{path}: expected a model ({', '.join(kinds)}), got a checkpoint of kind {kind!r}; name its run's model folder"
        )
    return kinds[kind].from_pretrained(path, device=device)


def open_energy(path: str, denoiser: DiT, *, carry_over: bool, device: torch.device) -> ARResidualEnergy | NCEEnergy:
    """The energy in a folder, which must read the denoiser's ids."""
    from .. import checkpoint
    from ..models import ARResidualEnergy, CausalLM, NCEEnergy

    kind = checkpoint.kind_of(model_folder(path))
    if kind not in ("causal_lm", "nce_energy"):
        raise ValueError(f"--energy: expected a model of kind 'nce_energy' or 'causal_lm', got {path} of kind {kind!r}")
    if kind == "nce_energy" and carry_over:
        raise ValueError(f"--carry-over: expected an autoregressive model as the energy, got {path} of kind 'nce_energy'")
    network = (CausalLM if kind == "causal_lm" else NCEEnergy).from_pretrained(path, device=device)
    if network.tokenizer_description != denoiser.tokenizer_description or (
        network.config.vocab_size != denoiser.vocab_size - (kind == "causal_lm")
    ):
        raise ValueError(
            f"--energy: expected a model with the denoiser's tokenizer {short(denoiser.tokenizer_description)}, got "
            f"{short(network.tokenizer_description)}; the two must read the same ids"
        )
    return ARResidualEnergy(network, carry_over, mask_token_id=denoiser.mask_token_id) if kind == "causal_lm" else network
