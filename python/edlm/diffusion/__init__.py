"""The mathematics of masked diffusion: schedules, the process and its opening times, SUBS, the NELBO, and the NCE loss of an energy."""

from .loss import NelboLoss, discrete_nelbo, masked_nats, nelbo_loss
from .nce import NceBatch, NceLoss, nce_batch, nce_loss
from .process import MaskedDiffusion, stratified_uniforms
from .schedule import (
    CosineSchedule,
    GeometricSchedule,
    LinearSchedule,
    LogLinearSchedule,
    NoiseSchedule,
    evaluation_schedule,
    schedule,
)
from .subs import subs_log_probs

__all__ = [
    "CosineSchedule",
    "GeometricSchedule",
    "LinearSchedule",
    "LogLinearSchedule",
    "MaskedDiffusion",
    "NceBatch",
    "NceLoss",
    "NelboLoss",
    "NoiseSchedule",
    "discrete_nelbo",
    "evaluation_schedule",
    "masked_nats",
    "nce_batch",
    "nce_loss",
    "nelbo_loss",
    "schedule",
    "stratified_uniforms",
    "subs_log_probs",
]
