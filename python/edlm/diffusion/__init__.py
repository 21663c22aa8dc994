"""The mathematics of masked diffusion: schedules, the process and its opening times, SUBS, and the NELBO."""

from .loss import NelboLoss, discrete_nelbo, masked_nats, nelbo_loss
from .process import MaskedDiffusion, stratified_uniforms
from .schedule import CosineSchedule, LogLinearSchedule, NoiseSchedule, schedule
from .subs import subs_log_probs

__all__ = [
    "CosineSchedule",
    "LogLinearSchedule",
    "MaskedDiffusion",
    "NelboLoss",
    "NoiseSchedule",
    "discrete_nelbo",
    "masked_nats",
    "nelbo_loss",
    "schedule",
    "stratified_uniforms",
    "subs_log_probs",
]
