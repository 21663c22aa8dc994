"""Networks. The loop and the estimators take any network that fits ``edlm.protocols``; these are ours."""

from .causal_lm import CausalLM, CausalLMConfig
from .dit import DiT, DiTConfig
from .energy import ARResidualEnergy, ar_residual
from .nce_energy import NCEEnergy, NCEEnergyConfig
from .presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "ARResidualEnergy",
    "CausalLM",
    "CausalLMConfig",
    "DiT",
    "DiTConfig",
    "NCEEnergy",
    "NCEEnergyConfig",
    "ar_residual",
    "preset",
]
