"""Fused primitives of the decode loop. Each has a schema, a fake and a pure-torch reference here, and kernels in csrc/."""

from ._library import Reports, backends, deferred_checks
from ._philox import Purpose, philox_uniform
from .cross_entropy import linear_cross_entropy
from .importance import Selection, resample, reverse_step, select_candidate
from .linear import linear_log_probs
from .log_probs import gather_log_probs
from .sampling import Candidates, sample_candidates, sample_categorical
from .upload import upload

__all__ = [
    "Candidates",
    "Purpose",
    "Reports",
    "Selection",
    "backends",
    "deferred_checks",
    "gather_log_probs",
    "linear_cross_entropy",
    "linear_log_probs",
    "philox_uniform",
    "resample",
    "reverse_step",
    "sample_candidates",
    "sample_categorical",
    "select_candidate",
    "upload",
]
